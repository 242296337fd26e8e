"""The two sides of the question: rows of a corpus and queries, and which of them are the same."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmd3.errors import JoinError, ModelError, NotFiniteError, ShapeError
from lmd3.store import Store, open_store

#: What a corpus or queries may be given as.
Source = str | Path | NDArray[Any] | Store

#: Rows handled at once where all would take too much memory.
_STEP = 1 << 16


def as_source(source: Source | ArrayLike, what: str) -> Store:
    """A store of whatever was given; float64 arrays are rounded to float32 here and nowhere else."""
    if isinstance(source, (str, Path, Store)):
        store = open_store(source)
    else:
        array = np.asarray(source)
        if array.dtype == np.float64:
            if not np.isfinite(array).all():
                row = int(np.flatnonzero(~np.isfinite(array).all(axis=tuple(range(1, array.ndim))))[0])
                raise NotFiniteError(f"{what} hold NaN or infinity", row=row)
            array = array.astype(np.float32)
        store = open_store(np.ascontiguousarray(array))
    return store


def query_matrix(
    corpus: Store, queries: Store, memory: int, any_encoder: bool = False
) -> NDArray[np.float32]:
    """All queries as float32 (Q, d); beyond a quarter of `memory` bytes in a file that the page cache holds.

    Raises:
        ShapeError: other dimensions than the corpus.
        ModelError: encoded otherwise than the corpus.
    """
    if queries.d != corpus.d:
        raise ShapeError(f"queries have {queries.d} dimensions, the corpus has {corpus.d}")
    check_same_encoder(corpus, queries, any_encoder)
    if queries.array is not None and queries.array.dtype == np.float32:
        return queries.array
    if queries.n * queries.d * 4 <= memory // 4:
        return queries.rows(np.arange(queries.n))
    with tempfile.TemporaryFile() as file:
        spooled = np.memmap(file, np.float32, "w+", shape=(queries.n, queries.d))
    for start in range(0, queries.n, _STEP):
        end = min(start + _STEP, queries.n)
        spooled[start:end] = queries.rows(np.arange(start, end))
    return np.asarray(spooled)


def check_same_encoder(corpus: Store, queries: Store, forced: bool = False) -> None:
    """Refuses queries that another model (or another state of it) has encoded.

    Raises:
        ModelError: both sides name their encoder and the names differ, and it is not `forced`.
    """
    if corpus.encoder is None or queries.encoder is None or forced:
        return
    if (known := corpus.encoder.get("fingerprint")) is not None and known == queries.encoder.get(
        "fingerprint"
    ):
        # The same weights, prompt and limits, wherever the model lies by now.
        return
    for key in ("kind", "model", "revision", "prompt", "dim", "fingerprint"):
        mine, other = corpus.encoder.get(key), queries.encoder.get(key)
        if key in corpus.encoder and key in queries.encoder and mine != other:
            raise ModelError(
                f"queries were encoded otherwise than the corpus: {key} {other!r}, not {mine!r}",
                file=None if queries.path is None else str(queries.path),
                remedy="encode the queries with the corpus's own model: give their texts to lmd3 density; "
                "--any-encoder scores them all the same",
            )


def own_rows(corpus: Store, queries: Store, matrix: NDArray[np.float32]) -> NDArray[np.int64]:
    """Row of the corpus that each query is, by id; −1 for none. Vectors must agree.

    Raises:
        JoinError: no query is a row, or one has the id of a row with another vector.
    """
    own = np.full(queries.n, -1, dtype=np.int64)
    same = queries is corpus or (queries.path is not None and queries.path == corpus.path)
    if same:
        own = np.arange(corpus.n, dtype=np.int64)
    else:
        wanted = {identifier: row for row, identifier in enumerate(queries.ids())}
        for start in range(0, corpus.n, _STEP):
            rows = np.arange(start, min(start + _STEP, corpus.n))
            for row, identifier in zip(rows, corpus.ids(rows), strict=True):
                if identifier in wanted:
                    own[wanted[identifier]] = row
    found = np.flatnonzero(own >= 0)
    if len(found) == 0:
        raise JoinError("no query has the id of a row of the corpus", remedy="leave --exclude-self out")
    for start in range(0, len(found), 4096):
        part = found[start : start + 4096]
        vectors = matrix[part].astype(np.float64)
        distance = np.linalg.norm(vectors - corpus.rows(own[part]), axis=1)
        allowed = max(1e-3, 2 * corpus.rounding) * np.linalg.norm(vectors, axis=1)
        # A zero row equals itself.
        other = (distance >= allowed) & (distance > 0)
        if other.any():
            bad = int(part[np.flatnonzero(other)[0]])
            name = queries.ids(np.array([bad]))[0]
            raise JoinError(
                f"query {name!r} has the id of row {own[bad]} of the corpus but another vector",
                row=bad,
                remedy="these ids name different things: leave --exclude-self out, or give other ids",
            )
    return own


def describe(store: Store) -> dict[str, Any]:
    """A side as `run.json` tells it."""
    return {
        "path": None if store.path is None else str(store.path),
        "fingerprint": store.fingerprint,
        "n": store.n,
        "d": store.d,
        "dtype": store.dtype,
        "normalised": store.normalised,
        "groups": list(store.groups),
        "encoder": store.encoder,
    }
