"""Mean outcome in bins of the predictor, over all rows and per group: what the report draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

#: Columns of `bins.parquet`; `group` is null for all rows together.
BINS = ("group", "bin", "n", "low", "high", "predictor", "mean", "ci_low", "ci_high")
#: Groups drawn, the largest first.
MOST_GROUPS = 24


def bins(
    x: np.ndarray,
    y: np.ndarray,
    *,
    binary: bool,
    groups: pd.Series[Any] | None = None,
    clusters: np.ndarray | None = None,
) -> pd.DataFrame:
    """Equal-count bins of x with the mean of y and its 95 % interval.

    Intervals are Wilson's (binary) or t's; over all rows with clusters given they are those of the
    cluster-robust mean, t(G−1) over the clusters in the bin.

    Args:
        x, y: (n,) predictor and outcome, finite.
        binary: whether y is 0 or 1.
        groups: labels; each of the largest gets bins of its own (a third as many rows' worth).
        clusters: codes of clusters.
    """
    rows = _bins(x, y, binary, None, int(np.clip(len(x) // 25, 3, 12)), clusters)
    if groups is not None:
        for name in groups.value_counts().head(MOST_GROUPS).index:
            at = (groups == name).to_numpy()
            if at.sum() >= 10:
                rows += _bins(x[at], y[at], binary, str(name), int(np.clip(at.sum() // 20, 2, 6)), None)
    return pd.DataFrame(rows, columns=list(BINS))


def _bins(
    x: np.ndarray, y: np.ndarray, binary: bool, group: str | None, count: int, clusters: np.ndarray | None
) -> list[dict[str, Any]]:
    edges = np.unique(np.quantile(x, np.linspace(0, 1, count + 1)))
    code = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, max(len(edges) - 2, 0))
    rows = []
    for number, part in enumerate(np.unique(code)):
        at = code == part
        low, high = _interval(y[at], binary, None if clusters is None else clusters[at])
        rows.append(
            {
                "group": group,
                "bin": number,
                "n": int(at.sum()),
                "low": float(x[at].min()),
                "high": float(x[at].max()),
                "predictor": float(x[at].mean()),
                "mean": float(y[at].mean()),
                "ci_low": low,
                "ci_high": high,
            }
        )
    return rows


def _interval(y: np.ndarray, binary: bool, clusters: np.ndarray | None) -> tuple[float, float]:
    n, mean = len(y), float(y.mean())
    if clusters is not None:
        sums = np.bincount(np.unique(clusters, return_inverse=True)[1], y - mean)
        if len(sums) >= 2:
            error = np.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)) / n
            half = float(stats.t.ppf(0.975, len(sums) - 1) * error)
            return (max(0.0, mean - half), min(1.0, mean + half)) if binary else (mean - half, mean + half)
    if binary:
        interval = stats.binomtest(int(y.sum()), n).proportion_ci(0.95, method="wilson")
        return float(interval.low), float(interval.high)
    if n < 2:
        return float("nan"), float("nan")
    half = float(stats.t.ppf(0.975, n - 1) * y.std(ddof=1) / np.sqrt(n))
    return mean - half, mean + half
