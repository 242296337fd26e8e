"""Densities that those of the queries are judged by: of training rows, and among random vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lmd3.density.estimator import KernelDensity
from lmd3.density.scan import Asked
from lmd3.errors import ParameterError
from lmd3.kernels import log_normalizer
from lmd3.progress import ProgressFactory, silent
from lmd3.store import Store

__all__ = ["held_out", "random_densities", "some_rows"]

#: Training rows drawn by default.
ROWS = 1_000
#: Of the negative control: draws, rows of the corpus, queries.
RANDOM_DRAWS, RANDOM_ROWS, RANDOM_QUERIES = 20, 100_000, 5_000


def held_out(
    kde: KernelDensity,
    rows: int = ROWS,
    seed: int = 0,
    *,
    normalize: bool = False,
    progress: ProgressFactory | None = None,
) -> pa.Table:
    """Log densities of training rows drawn at random, each left out of its own density.

    Args:
        kde: fitted, its bandwidths resolved.
        rows: how many (all, where there are fewer).
        seed: of the draw.
        normalize: subtract the kernel's constant, as was done for the queries.
        progress: shows the pairs.

    Returns:
        A table with the columns id, kernel, bandwidth, rule, log_density; rows × bandwidths rows.

    Raises:
        ParameterError: bandwidths that are not resolved.
    """
    if not hasattr(kde, "bandwidths_"):
        raise ParameterError("no bandwidth yet", remedy="call resolve(queries) or density(queries) first")
    store = kde.store_
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(store.n, min(rows, store.n), replace=False)).astype(np.int64)
    sample = np.ascontiguousarray(store.rows(chosen), dtype=np.float32)
    pairs = [(b.kernel, b.bandwidth) for b in kde.bandwidths_]
    scan = kde._scanner().scan(sample, pairs, Asked(own=chosen), progress or silent, "training rows")
    ids = store.ids(chosen)
    tables = [
        pa.table(
            {
                "id": pa.array(ids, pa.string()),
                "kernel": pa.repeat(b.kernel, len(ids)),
                "bandwidth": pa.repeat(float(b.bandwidth), len(ids)),
                "rule": pa.repeat(b.rule, len(ids)),
                "log_density": scan.total.log_density[:, number]
                - (log_normalizer(b.kernel, store.d, b.bandwidth) if normalize else 0.0),
            }
        )
        for number, b in enumerate(kde.bandwidths_)
    ]
    return pa.concat_tables(tables)


def some_rows(store: Store, seed: int = 0, rows: int = ROWS) -> NDArray[np.float32]:
    """(rows, d) vectors drawn at random."""
    rng = np.random.default_rng([seed, 1])
    chosen = np.sort(rng.choice(store.n, min(rows, store.n), replace=False))
    return np.ascontiguousarray(store.rows(chosen), dtype=np.float32)


def random_densities(
    corpus: Store,
    queries: Store,
    bandwidth: Mapping[str, Any],
    draws: int = RANDOM_DRAWS,
    seed: int = 0,
    progress: ProgressFactory | None = None,
) -> pa.Table:
    """Log densities of the queries among vectors that mean nothing: a negative control.

    Every row and query gets a random direction in place of its vector; where the bandwidth came from a rule
    it is found again among them (its number means nothing here). At most 100,000 rows and 5,000 queries
    take part.

    Args:
        corpus, queries: for their sizes, dimension and the queries' ids.
        bandwidth: the study's primary one: {"kernel", "bandwidth", "rule"}.
        draws: sets of vectors.
        seed: of the vectors.
        progress: shows the pairs.

    Returns:
        A table with the columns id, draw, log_density.
    """
    rng = np.random.default_rng([seed, 2])
    n, m = min(corpus.n, RANDOM_ROWS), min(queries.n, RANDOM_QUERIES)
    chosen = np.sort(rng.choice(queries.n, m, replace=False))
    ids = pa.array(queries.ids(chosen), pa.string())
    rule = str(bandwidth["rule"])
    if rule.startswith("ess="):
        # The same share of the rows, where only a part of them takes part.
        rule = f"ess={max(2.0, float(rule[4:]) * n / corpus.n):g}"
    tables = []
    for draw in range(draws):
        vectors = rng.standard_normal((n + m, corpus.d), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1)[:, None]
        kde = KernelDensity(kernel=str(bandwidth["kernel"]), bandwidth=rule, seed=seed).fit(vectors[:n])
        kde.resolve(vectors[n:], progress=progress)
        pairs = [(b.kernel, b.bandwidth) for b in kde.bandwidths_]
        scan = kde._scanner().scan(vectors[n:], pairs, Asked(), progress or silent, "negative control")
        columns = {"id": ids, "draw": pa.repeat(draw, m), "log_density": scan.total.log_density[:, 0]}
        tables.append(pa.table(columns))
    return pa.concat_tables(tables)
