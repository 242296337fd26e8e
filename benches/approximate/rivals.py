"""Other estimators of a kernel sum, simulated on the full vectors of distances and weights in float64.

Each gets `rows`, the number of rows (centroids included) that it may look at, and returns one estimate.
Rivals are given what favours them: parameters picked in hindsight, and for `levels` neighbours that cost
nothing to find.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


def sampling(k: Vector, rows: int, rng: np.random.Generator) -> float:
    """Random sampling, without replacement."""
    return float(len(k) * k[rng.choice(len(k), rows, replace=False)].mean())


def permuted(k: Vector, order: NDArray[np.int64], rows: int, rng: np.random.Generator) -> float:
    """One run of a permuted corpus from a random start."""
    start = rng.integers(len(k))
    return float(len(k) * k[order[(start + np.arange(rows)) % len(k)]].mean())


def with_variate(k: Vector, squared: Vector, rows: int, rng: np.random.Generator) -> float:
    """Random sampling with one control variate, D², whose mean is known; slopes across halves."""
    chosen = rng.choice(len(k), rows, replace=False)
    x, y, mean = squared[chosen], k[chosen], squared.mean()
    first, second = slice(0, None, 2), slice(1, None, 2)
    total = 0.0
    for half, other in ((first, second), (second, first)):
        slope = np.cov(x[other], y[other])[0, 1] / x[other].var(ddof=1)
        total += (y[half] - slope * (x[half] - mean)).sum()
    return float(len(k) * total / rows)


def deann_parameters(
    lists: list[NDArray[np.int64]], near: NDArray[np.int64], rows: int
) -> Iterator[tuple[int, NDArray[np.int64], int]]:
    """(lists probed, rows in them, random rows left) for every number of probes that the rows allow."""
    count = 1
    while count <= len(near):
        members = np.concatenate([lists[c] for c in near[:count]])
        left = rows - len(lists) - len(members)
        if left < 50:
            return
        yield count, members, left
        count = max(count + 1, count * 3 // 2)


def deann(k: Vector, members: NDArray[np.int64], rows: int, rng: np.random.Generator) -> float:
    """DEANN: all probed rows exactly, random rows for the complement."""
    mask = np.zeros(len(k), bool)
    mask[members] = True
    drawn = rng.choice(len(k), rows + len(members), replace=False)
    drawn = drawn[~mask[drawn]][:rows]
    return float(k[members].sum() + (len(k) - len(members)) * k[drawn].mean())


def levels(k: Vector, squared: Vector, rows: int, rng: np.random.Generator) -> float:
    """Exponentially decaying random subsets, the nearest rows of each (the idea of arXiv 2601.11765)."""
    depth = max(1, int(np.ceil(np.log2(len(k) / rows))) + 2)
    each = rows // (depth + 1)
    uniform = rng.random(len(k))
    total, inner = 0.0, -1.0
    for level in range(depth + 1):
        members = np.flatnonzero(uniform < 2.0**-level)
        if level < depth and len(members) > each:
            nearest = members[np.argpartition(squared[members], each)[:each]]
            outer = squared[nearest].max()
        else:
            nearest, outer = members, np.inf
        ring = nearest[(squared[nearest] > inner) & (squared[nearest] <= outer)]
        total += 2.0**level * k[ring].sum()
        inner = outer
        if outer == np.inf:
            break
    return float(total)


def oracle(
    k: Vector, squared: Vector, lists: list[NDArray[np.int64]], near: NDArray[np.int64], rows: int
) -> float:
    """The relative standard error of the stratified estimator if it knew every list's true residual spread.

    Near lists whole with 40 % of the rows, the others by Neyman's allocation, a linear control variate fitted
    inside each list.
    """
    budget = rows - len(lists)
    whole, used = 0, 0
    for c in near:
        if whole >= 2 and used + len(lists[c]) > 0.4 * budget:
            break
        whole, used = whole + 1, used + len(lists[c])
    sizes, spreads = [], []
    for c in near[whole:]:
        x, y = squared[lists[c]], k[lists[c]]
        if len(y) < 3:
            continue
        slope = ((x - x.mean()) * (y - y.mean())).sum() / max(((x - x.mean()) ** 2).sum(), 1e-300)
        spreads.append((y - y.mean() - slope * (x - x.mean())).std())
        sizes.append(len(y))
    n, r = np.array(sizes, float), np.array(spreads)
    draws, left, open_ = np.zeros(len(n)), float(budget - used), np.ones(len(n), bool)
    for _ in range(50):
        weight = (n * r)[open_].sum()
        if weight <= 0 or left <= 0:
            break
        draws[open_] = left * (n * r)[open_] / weight
        full = open_ & (draws >= n)
        if not full.any():
            break
        draws[full] = n[full]
        left -= n[full].sum()
        open_ &= ~full
    some = (draws > 0) & (draws < n)
    variance = (n[some] ** 2 * r[some] ** 2 * (1 / draws[some] - 1 / n[some])).sum()
    return float(np.sqrt(variance) / k.sum())
