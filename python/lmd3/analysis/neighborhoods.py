"""Queries near each other: clusters by k-means where no group is given, and Moran's I of the residuals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import sparse

#: Rows per centre that k-means learns from, its rounds, and rows assigned at once.
_LEARN, _ROUNDS, _STEP = 64, 12, 8_192
#: Queries that Moran's I looks at, neighbours of each, permutations.
MORAN_ROWS, MORAN_NEIGHBORS, MORAN_DRAWS = 3_000, 10, 999


def default_clusters(n: int) -> int:
    """√n clusters, at least two."""
    return max(2, round(math.sqrt(n)))


def kmeans(vectors: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Codes 0 … of the nearest of `count` centres (those that nobody is nearest to are left out).

    Lloyd's rounds from distinct rows drawn at random, on at most 64 rows per centre; then all rows are
    assigned. The same seed gives the same clusters.

    Args:
        vectors: (n, d).
        count: centres, at most the number of rows.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    n = len(vectors)
    count = min(count, n)
    learn = np.sort(rng.choice(n, min(n, count * _LEARN), replace=False))
    rows = np.asarray(vectors[learn], dtype=np.float32)
    rows = rows - rows.mean(axis=0)
    centres = rows[rng.choice(len(rows), count, replace=False)]
    shift = np.asarray(vectors[learn], dtype=np.float32).mean(axis=0)
    for _ in range(_ROUNDS):
        code, distance = _nearest(rows, centres)
        sizes = np.bincount(code, minlength=count)
        table = sparse.csr_matrix(
            (np.ones(len(rows), dtype=np.float32), (code, np.arange(len(rows)))), shape=(count, len(rows))
        )
        centres = np.asarray(table @ rows) / np.maximum(sizes, 1)[:, None]
        empty = np.flatnonzero(sizes == 0)
        if len(empty):
            # A centre without rows moves to the rows farthest from theirs.
            centres[empty] = rows[np.argsort(-distance, kind="stable")[: len(empty)]]
    codes = np.empty(n, dtype=np.int64)
    for start in range(0, n, _STEP):
        part = np.asarray(vectors[start : start + _STEP], dtype=np.float32) - shift
        codes[start : start + _STEP] = _nearest(part, centres)[0]
    return np.unique(codes, return_inverse=True)[1].astype(np.int64)


def _nearest(rows: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(code of the nearest centre, squared distance to it) per row."""
    norms = (centres**2).sum(axis=1)
    codes, distances = np.empty(len(rows), dtype=np.int64), np.empty(len(rows))
    for start in range(0, len(rows), _STEP):
        part = rows[start : start + _STEP]
        squared = norms - 2.0 * (part @ centres.T)
        codes[start : start + _STEP] = squared.argmin(axis=1)
        distances[start : start + _STEP] = squared.min(axis=1) + (part**2).sum(axis=1)
    return codes, distances


@dataclass(frozen=True)
class Moran:
    """Moran's I: how alike the residuals of near queries are. `expected` is its mean without any likeness."""

    value: float
    expected: float
    p_value: float
    z: float
    n: int
    neighbors: int
    draws: int


def moran(vectors: np.ndarray, residuals: np.ndarray, seed: int = 0) -> Moran | None:
    """Moran's I of the residuals over the 10 nearest queries (either way round), by 999 permutations.

    At most 3,000 queries, drawn at random, are looked at; None for fewer than 30.
    """
    n = len(residuals)
    if n < 30:
        return None
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(n, min(n, MORAN_ROWS), replace=False))
    rows = np.asarray(vectors[chosen], dtype=np.float32)
    e = residuals[chosen] - residuals[chosen].mean()
    m, k = len(chosen), min(MORAN_NEIGHBORS, len(chosen) - 1)
    squared = (rows**2).sum(axis=1) - 2.0 * (rows @ rows.T)
    np.fill_diagonal(squared, np.inf)
    near = np.argpartition(squared, k - 1, axis=1)[:, :k]
    ones = np.ones(m * k)
    table = sparse.csr_matrix((ones, (np.repeat(np.arange(m), k), near.ravel())), shape=(m, m))
    table = ((table + table.T) > 0).astype(np.float64)
    total = table.sum()

    def statistic(values: np.ndarray) -> np.ndarray:
        return np.asarray(m / total * (values * (table @ values)).sum(axis=0) / (values**2).sum(axis=0))

    value = float(statistic(e))
    draws = np.concatenate(
        [
            statistic(np.column_stack([rng.permutation(e) for _ in range(111)]))
            for _ in range(MORAN_DRAWS // 111)
        ]
    )
    beyond = int((np.abs(draws - draws.mean()) >= abs(value - draws.mean())).sum())
    z = (value - draws.mean()) / draws.std()
    return Moran(value, -1.0 / (m - 1), (1 + beyond) / (1 + len(draws)), float(z), m, k, len(draws))
