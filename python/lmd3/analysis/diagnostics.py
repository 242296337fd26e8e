"""What may be wrong with vectors or rows: hubs, anisotropy, dimension, influence; distance of corpora."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from lmd3 import study_files as _files
from lmd3.analysis.slope import Slope

#: Hubs that are listed; rows of each side that distances look at; projections; permutations.
HUBS, ROWS, PROJECTIONS, DRAWS = 20, 1_000, 200, 499


def hubness(neighbors: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, Any]]:
    """How often a training row is among the nearest of a query (k-occurrence; Radovanović et al. 2010).

    The skewness is over the rows that occur at all: the others are unknown here and would only add zeros.

    Returns:
        The table `HUBS` of the most frequent, and the facts skewness, largest, rows, share_of_top (of all
        neighbour slots that the listed ones take).
    """
    counts = (
        neighbors.groupby(neighbors["neighbor_id"].astype(str))
        .size()
        .sort_values(ascending=False, kind="stable")
    )
    group = neighbors.drop_duplicates("neighbor_id").set_index(
        neighbors.drop_duplicates("neighbor_id")["neighbor_id"].astype(str)
    )
    top = counts.head(HUBS)
    table = pd.DataFrame({"neighbor_id": top.index, "occurrences": top.to_numpy()})
    table["neighbor_group"] = (
        group["neighbor_group"].reindex(top.index).to_numpy() if "neighbor_group" in group else None
    )
    values = counts.to_numpy(dtype=np.float64)
    facts = {
        "skewness": float(stats.skew(values)) if len(values) > 2 and values.std() > 0 else 0.0,
        "largest": int(values[0]) if len(values) else 0,
        "rows": len(values),
        "share_of_top": float(values[:HUBS].sum() / values.sum()) if len(values) else 0.0,
    }
    return table[list(_files.HUBS.names)], facts


def anisotropy(vectors: np.ndarray) -> float:
    """Mean cosine of two different rows (Ethayarajh 2019): near 0 where directions are spread evenly."""
    norms = np.linalg.norm(vectors, axis=1)
    unit = vectors[norms > 0] / norms[norms > 0][:, None]
    n = len(unit)
    total = unit.sum(axis=0, dtype=np.float64)
    return float((total @ total - n) / (n * (n - 1))) if n > 1 else float("nan")


def influence(of: Slope, ids: list[str]) -> tuple[np.ndarray, dict[str, Any]]:
    """DFBETAS (n,): change of the slope without each row, in standard errors (one step of a logit); facts."""
    left = np.maximum(1.0 - of.leverage, 1e-10)
    change = of.influence / left
    error = float(np.sqrt((change**2).sum()))
    scaled = change / error
    largest = int(np.abs(scaled).argmax())
    limit = 2.0 / np.sqrt(len(ids))
    return scaled, {
        "largest": float(scaled[largest]),
        "largest_id": ids[largest],
        "beyond_limit": int((np.abs(scaled) > limit).sum()),
        "limit": float(limit),
        "largest_leverage": float(of.leverage.max()),
    }


def local_dimension(values: np.ndarray) -> dict[str, float]:
    """Quartiles of the local intrinsic dimension."""
    known = values[np.isfinite(values)]
    if len(known) == 0:
        return {}
    low, middle, high = np.quantile(known, [0.25, 0.5, 0.75])
    return {"low": float(low), "median": float(middle), "high": float(high)}


def _sample(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    chosen = np.sort(rng.choice(len(rows), min(len(rows), ROWS), replace=False))
    return np.asarray(rows[chosen], dtype=np.float64)


def mmd(a: np.ndarray, b: np.ndarray, draws: int = DRAWS, seed: int = 0) -> dict[str, float]:
    """Maximum mean discrepancy of two sets of rows (Gretton et al. 2012), by permutation.

    Gaussian kernel at the median distance; the unbiased estimate of MMD²; at most 1,000 rows of each, drawn
    at random.
    """
    rng = np.random.default_rng(seed)
    a, b = _sample(a, rng), _sample(b, rng)
    n, m = len(a), len(b)
    z = np.vstack([a, b])
    norms = (z**2).sum(axis=1)
    squared = np.maximum(norms[:, None] + norms - 2.0 * (z @ z.T), 0.0)
    width = float(np.median(squared[np.triu_indices(n + m, 1)]))
    kernel = np.exp(-squared / max(width, 1e-12))
    np.fill_diagonal(kernel, 0.0)

    def statistic(first: np.ndarray) -> np.ndarray:
        """first: (n + m, B) of 0 and 1."""
        on = kernel @ first
        aa = (first * on).sum(axis=0)
        cross = on.sum(axis=0) - aa
        bb = kernel.sum() - aa - 2.0 * cross
        return np.asarray(aa / (n * (n - 1)) + bb / (m * (m - 1)) - 2.0 * cross / (n * m))

    value = float(statistic(np.repeat([1.0, 0.0], [n, m])[:, None])[0])
    shuffled = np.empty(draws)
    for start in range(0, draws, 100):
        count = min(100, draws - start)
        marks = np.zeros((n + m, count))
        for column in range(count):
            marks[rng.permutation(n + m)[:n], column] = 1.0
        shuffled[start : start + count] = statistic(marks)
    p = (1 + int((shuffled >= value).sum())) / (1 + draws)
    return {
        "value": value,
        "p_value": p,
        "null_95": float(np.quantile(shuffled, 0.95)),
        "rows": min(n, m),
        "draws": draws,
    }


def sliced_wasserstein(
    a: np.ndarray, b: np.ndarray, projections: int = PROJECTIONS, draws: int = DRAWS, seed: int = 0
) -> dict[str, float]:
    """Sliced 2-Wasserstein distance of two sets of rows (Rabin et al. 2012), by permutation.

    √ of the mean over random directions of the squared distance of the projections' quantiles; equal numbers
    of rows (at most 1,000) of each, drawn at random.
    """
    rng = np.random.default_rng(seed)
    a, b = _sample(a, rng), _sample(b, rng)
    n = min(len(a), len(b))
    a, b = a[:n], b[:n]
    directions = rng.standard_normal((a.shape[1], projections))
    directions /= np.linalg.norm(directions, axis=0)
    both = np.vstack([a, b]) @ directions
    # Sorted once: a permutation only says which of the sorted values belong to the first set.
    order = np.argsort(both, axis=0, kind="stable")
    ordered = np.take_along_axis(both, order, axis=0)

    def distance(first: np.ndarray) -> float:
        mine = first[order]
        left = ordered.T[mine.T].reshape(projections, n)
        right = ordered.T[~mine.T].reshape(projections, n)
        return float(np.sqrt(((left - right) ** 2).mean()))

    marks = np.repeat([True, False], n)
    value = distance(marks)
    shuffled = np.array([distance(rng.permutation(marks)) for _ in range(draws)])
    p = (1 + int((shuffled >= value).sum())) / (1 + draws)
    return {
        "value": value,
        "p_value": p,
        "null_mean": float(shuffled.mean()),
        "null_95": float(np.quantile(shuffled, 0.95)),
        "rows": n,
        "projections": projections,
        "draws": draws,
    }
