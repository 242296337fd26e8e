"""What an index finds near queries: the nearest rows, copies, and the largest cosine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lmd3.executors.partials import Part
from lmd3.index import Index
from lmd3.store import Store


def nearest(
    index: Index,
    store: Store,
    queries: NDArray[np.float32],
    k: int,
    own: NDArray[np.int64] | None = None,
    threads: int | None = None,
) -> Part:
    """The nearest rows of queries by the index of their store.

    Args:
        index: of the store.
        store: the rows.
        queries: (Q, d).
        k: how many rows.
        own: (Q,) rows to leave out, −1 for none.
        threads: threads; None takes all cores.

    Returns:
        `near` rows and their `distances` (Q, k); `duplicates`, copies counted among at most 256; `cosines`,
        the largest ⟨x, q⟩/‖x‖, NaN where rows are not unit vectors.
    """
    extra = 0 if own is None else 1
    norms = np.linalg.norm(queries.astype(np.float64), axis=1)
    radius = np.maximum(1e-3, 2 * store.rounding) * norms
    wide = min(k + extra, store.n)
    distances, rows = index.kneighbors(queries, wide, rerank=False, threads=threads)
    # Where all that were found are copies there may be more.
    crowded = np.flatnonzero((distances < radius[:, None]).all(axis=1))
    if len(crowded) and wide < min(256, store.n):
        more, more_rows = index.kneighbors(queries[crowded], min(256, store.n), rerank=False, threads=threads)
    else:
        more, more_rows = np.empty((0, 0)), np.empty((0, 0), np.int64)
        crowded = crowded[:0]
    with np.errstate(invalid="ignore"):
        close = distances < radius[:, None]
        if own is not None:
            close &= rows != own[:, None]
        duplicates = close.sum(axis=1).astype(np.uint64)
        if len(crowded):
            near = more < radius[crowded][:, None]
            if own is not None:
                near &= more_rows != own[crowded][:, None]
            duplicates[crowded] = near.sum(axis=1)
    if own is not None:
        keep = np.argsort(rows == own[:, None], axis=1, kind="stable")
        rows, distances = np.take_along_axis(rows, keep, 1), np.take_along_axis(distances, keep, 1)
    rows, distances = rows[:, :k], distances[:, :k]
    cosines = np.full(len(queries), np.nan)
    if store.normalised:
        present = np.flatnonzero(rows[:, 0] >= 0)
        for start in range(0, len(present), 4096):
            part = present[start : start + 4096]
            vectors = store.rows(rows[part, 0]).astype(np.float64)
            dots = np.einsum("ij,ij->i", vectors, queries[part].astype(np.float64))
            cosines[part] = dots / np.linalg.norm(vectors, axis=1)
    return {"near": rows, "distances": distances, "duplicates": duplicates, "cosines": cosines}
