"""Contrasts: the same slope for two models' outcomes, or density under two corpora.

Two models are compared on the same queries: each has its own fit, with its own controls and group effects;
the difference of the slopes has the covariance of both fits' influences, summed per cluster (the query itself
without another cluster, so that a query's two outcomes may go together). For binary outcomes the same is
given on the scale of probabilities (linear-probability models), where it is the slope of the paired
difference.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from lmd3 import study_files as _files
from lmd3.analysis.few_clusters import FEW, effective_clusters, wild_restricted
from lmd3.analysis.inference import decide, sandwich
from lmd3.analysis.slope import Data, Slope, counted_parameters, slope


def models(
    first: Data,
    second: Data,
    x: np.ndarray,
    clusters: np.ndarray | None,
    names: tuple[str, str],
    cluster_name: str | None,
    form: str,
    draws: int,
    seed: int = 0,
) -> pd.DataFrame:
    """Slopes of the last column of x (n, k) for two models' outcomes on the same rows, and their difference.

    Args:
        first, second: the same rows with either outcome.
        x: the design of both.
        clusters: codes, or None: each row is one.
        names: of the two models.
        cluster_name: for the table.
        form: `pooled` or `within`, for the table.
        draws: of the wild bootstrap of the paired difference where clusters are few.
        seed: of the draws.

    Raises:
        WorkError: a logit that does not converge.
    """
    n = len(first.y)
    codes = np.arange(n) if clusters is None else clusters
    covariance = f"cluster:{cluster_name or 'query'}"
    rows: list[dict[str, Any]] = []

    def add(scale: str, sides: tuple[Slope, Slope], p_value: float | None = None) -> None:
        sums = [np.bincount(codes, of.influence) for of in sides]
        g = len(sums[0])
        k = max(counted_parameters(of, codes) for of in sides)
        factor = g / (g - 1) * (n - 1) / (n - k)
        df = np.inf if sides[0].data.binary else g - 1
        estimates = [sides[0].estimate, sides[1].estimate, sides[0].estimate - sides[1].estimate]
        for side, estimate, total in zip(
            (*names, f"{names[0]} − {names[1]}"), estimates, (*sums, sums[0] - sums[1]), strict=True
        ):
            error = float(np.sqrt((total**2).sum() * factor))
            half = float(stats.t.ppf(0.975, df)) * error
            half_low, half_high = estimate - half, estimate + half
            p, t = float(2 * stats.t.sf(abs(estimate / error), df)), estimate / error
            if side in names and clusters is not None:
                # The sides by the rule; so is the paired difference of few clusters, below.
                of = sides[names.index(side)]
                found = decide(of, x, sandwich(of, clusters), clusters, draws, seed, intervals=False)
                if found.few:
                    p, t = found.estimate.p_value, found.estimate.statistic
                    half_low, half_high = found.estimate.ci_low, found.estimate.ci_high
            rows.append(
                {
                    "contrast": "model",
                    "side": side,
                    "form": form,
                    "scale": scale,
                    "estimate": estimate,
                    "std_error": error,
                    "statistic": t,
                    "p_value": p,
                    "ci_low": half_low,
                    "ci_high": half_high,
                    "covariance": covariance,
                    "n": n,
                    "clusters": g,
                }
            )

    both = (slope(first, x), slope(second, x))
    if first.binary:
        add("log odds", both)
    linear = [Data(d.y, False, d.weights, d.effects) for d in (first, second)]
    add("probability" if first.binary else "outcome", (slope(linear[0], x), slope(linear[1], x)))
    if clusters is not None and first.weights is None:
        paired = slope(Data(first.y - second.y, False, None, first.effects), x)
        if effective_clusters(paired, clusters) < FEW:
            wild = wild_restricted(paired, clusters, draws, seed)
            rows.append(
                rows[-1]
                | {
                    "side": rows[-1]["side"] + " (wild cluster restricted bootstrap)",
                    "statistic": wild.statistic,
                    "p_value": wild.p_value,
                    "ci_low": wild.ci_low,
                    "ci_high": wild.ci_high,
                }
            )
    return pd.DataFrame(rows, columns=list(_files.CONTRASTS.names))
