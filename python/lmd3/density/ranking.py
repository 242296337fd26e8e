"""Neighbours ranked again by a finer copy of the rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lmd3.store import Store

#: Rows taken at a time, so that their vectors are few.
_STEP = 1 << 14


def ranked_again(
    exact: Store, queries: NDArray[np.float32], rows: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The k nearest of candidates by ‖x − q‖ in double precision; ties go to the lower row.

    Args:
        exact: the copy.
        queries: (Q, d).
        rows: (Q, m) candidates' row numbers, m ≥ k.

    Returns:
        Distances (Q, k) float64 and row numbers (Q, k) int64, nearest first.
    """
    distances = np.empty(rows.shape)
    step = max(1, _STEP // rows.shape[1])
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        vectors = exact.rows(some.reshape(-1)).reshape(*some.shape, -1).astype(np.float64)
        own = queries[start : start + step, None].astype(np.float64)
        distances[start : start + step] = np.linalg.norm(vectors - own, axis=2)
    order = np.lexsort((rows, distances), axis=1)[:, :k]
    return np.take_along_axis(distances, order, 1), np.take_along_axis(rows, order, 1)
