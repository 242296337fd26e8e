"""Densities of chunks brought together by document: the logarithm of the mean, and the largest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from lmd3.errors import ColumnError
from lmd3.results import DOCUMENTS
from lmd3.store import Store

__all__ = ["by_document"]

_KEYS = ("kernel", "bandwidth", "rule", "group")


def by_document(density: pa.Table, queries: Store) -> pa.Table:
    """One row per document, kernel, bandwidth and group, in the order of the documents' first chunks.

    Args:
        density: the densities of the chunks.
        queries: their store, which says of which document each chunk is.

    Returns:
        `id` (of the document), kernel, bandwidth, rule, group; `log_density`: log of the mean of the chunks'
        densities; `log_density_max`: the largest; `chunks`; `std_error` of `log_density`, an upper bound:
        chunks of a document share their error.

    Raises:
        ColumnError: the queries were not cut into chunks.
    """
    if not queries.chunked:
        raise ColumnError("the queries are no chunks of documents", remedy="encode them with --chunk sliding")
    rows = queries.documents(np.arange(queries.n), ("id", "document"))
    names = dict(zip(rows["id"].to_pylist(), rows["document"].to_pylist(), strict=True))
    order = {name: place for place, name in enumerate(dict.fromkeys(names.values()))}
    owner = np.array([order[names[chunk]] for chunk in density["id"].to_pylist()])
    part, parts = _parts(density)
    log_density = density["log_density"].to_numpy().astype(np.float64)
    error = density["std_error"].to_numpy().astype(np.float64)
    cell = part * len(order) + owner
    cells, where = np.unique(cell, return_inverse=True)
    counts = np.bincount(where)
    highest = np.full(len(cells), -np.inf)
    np.maximum.at(highest, where, log_density)
    # Relative to the largest: e^−2000 is no number.
    base = np.where(np.isneginf(highest), 0.0, highest)
    share = np.exp(log_density - base[where])
    sums = np.bincount(where, share)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.log(sums / counts) + base
        doubt = np.bincount(where, share * error) / sums
    columns: dict[str, Any] = {
        "id": pa.array(list(order), pa.string()).take(pa.array(cells % len(order))),
        **{name: parts[name].take(pa.array(cells // len(order))) for name in _KEYS},
        "log_density": mean,
        "log_density_max": highest,
        "std_error": np.where(np.isfinite(doubt), doubt, 0.0),
        "chunks": counts,
    }
    return pa.table({field.name: columns[field.name] for field in DOCUMENTS}, schema=DOCUMENTS)


def _parts(density: pa.Table) -> tuple[Any, dict[str, pa.Array]]:
    """The number of each row's kernel, bandwidth and group in the order in which they come, and their
    values."""
    keys = list(zip(*(density[name].to_pylist() for name in _KEYS), strict=True))
    places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    values = {
        name: pa.array([key[at] for key in places], density.schema.field(name).type)
        for at, name in enumerate(_KEYS)
    }
    return np.array([places[key] for key in keys]), values
