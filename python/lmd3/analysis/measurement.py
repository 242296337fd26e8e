"""Error in the log densities themselves: how reliable they are, and what the slope would be without it.

Approximate densities carry a standard error σ. The *partial* reliability is λ = 1 − mean σ² / Var(log f |
controls, groups): it decides by how much the slope is too small. Regression calibration (Carroll et al. 2006,
ch. 4; for least squares the corrected normal equations of Fuller 1987) divides by it; SIMEX (Cook
and Stefanski 1994; variance: Stefanski and Cook 1995) stands beside. Weights of 1/σ² would not help: they are
for errors in the outcome.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from lmd3.analysis.slope import (
    Data,
    Slope,
    cluster_variance,
    counted_parameters,
    heteroskedastic_variance,
    least_squares,
    slope,
)

#: Below this the density should be scored again, or the slope corrected.
RELIABLE = 0.98
#: Below this no correction is to be trusted (its own doubt is larger than what it mends).
HOPELESS = 0.5
ADDED = (0.0, 0.5, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class Corrected:
    """A corrected slope with its 95 % interval."""

    estimate: float
    std_error: float
    ci_low: float
    ci_high: float

    def to_dict(self) -> dict[str, float]:
        """The four numbers."""
        return {n: getattr(self, n) for n in ("estimate", "std_error", "ci_low", "ci_high")}


def _left(of: Slope, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(what controls and groups leave of the predictor, weights of the rows), by least squares."""
    weights = np.ones(len(of.x)) if of.data.weights is None else of.data.weights
    if not of.data.binary:
        return of.x, weights
    rest: np.ndarray = least_squares(x[:, -1], x[:, :-1], of.codes, weights)["rest"]
    return rest, weights


def reliability(of: Slope, x: np.ndarray, errors: np.ndarray) -> float:
    """Partial reliability of the predictor, the last column of the design x (n, k).

    Args:
        of: its slope.
        x: the design.
        errors: (n,) standard errors of the predictor, on its scale.
    """
    left, weights = _left(of, x)
    return 1.0 - float(weights @ errors**2) / float(weights @ left**2)


def _interval(estimate: float, error: float, df: float) -> Corrected:
    half = float(stats.t.ppf(0.975, df)) * error
    return Corrected(estimate, error, estimate - half, estimate + half)


def calibrated(of: Slope, x: np.ndarray, errors: np.ndarray, clusters: np.ndarray | None) -> Corrected:
    """The slope corrected for error in the predictor: slope / λ.

    Its standard error is a sandwich that counts the doubt of λ as well (errors of the densities are taken as
    known).

    Args:
        of: the slope.
        x: its design.
        errors: (n,) standard errors of the predictor.
        clusters: codes, or None.
    """
    left, weights = _left(of, x)
    total, noise = float(weights @ left**2), float(weights @ errors**2)
    value = 1.0 - noise / total
    # λ = 1 − S/V, so dλ = (S·dV/V − dS)/V.
    doubt = weights * (noise / total * left**2 - errors**2) / total
    estimate = of.estimate / value
    influence = of.influence / value - estimate / value * doubt
    n = len(influence)
    if clusters is None:
        error = float(np.sqrt((influence**2).sum() * n / (n - of.parameters)))
        return _interval(estimate, error, n - of.parameters)
    sums = np.bincount(clusters, influence)
    g = len(sums)
    factor = g / (g - 1) * (n - 1) / (n - counted_parameters(of, clusters))
    return _interval(estimate, float(np.sqrt((sums**2).sum() * factor)), g - 1)


def simex(
    data: Data,
    x: np.ndarray,
    errors: np.ndarray,
    clusters: np.ndarray | None,
    draws: int = 50,
    seed: int = 0,
) -> tuple[Corrected, pd.DataFrame]:
    """SIMEX of the slope of the last column of x: noise is added, and the trend followed back to none.

    Args:
        data: the rows.
        x: (n, k) design, the noisy predictor last.
        errors: (n,) its standard errors.
        clusters: codes of clusters, or None.
        draws: sets of noise at each step.
        seed: of the noise.

    Returns:
        The extrapolated slope (quadratic in the added variance) and a table of `SIMEX`.
    """
    rng = np.random.default_rng(seed)
    noise = [rng.standard_normal(len(errors)) * errors for _ in range(draws)]
    steps = []
    for added in ADDED:
        found = []
        for z in noise if added else noise[:1]:
            moved = x.copy()
            moved[:, -1] += np.sqrt(added) * z
            of = slope(data, moved)
            variance = heteroskedastic_variance(of) if clusters is None else cluster_variance(of, clusters)
            found.append((of.estimate, variance))
        values = np.array(found)
        between = values[:, 0].var(ddof=1) if len(values) > 1 else 0.0
        steps.append((added, values[:, 0].mean(), values[:, 1].mean() - between))
    grid = np.array(steps)
    powers = np.vander(grid[:, 0], 3)
    at = np.array([1.0, -1.0, 1.0])
    estimate = float(at @ np.linalg.lstsq(powers, grid[:, 1], rcond=None)[0])
    variance = float(at @ np.linalg.lstsq(powers, grid[:, 2], rcond=None)[0])
    error = float(np.sqrt(max(variance, grid[0, 2])))
    df = len(data.y) - x.shape[1] - 1 if clusters is None else int(clusters.max())
    rows: list[dict[str, Any]] = [
        {"added": a, "estimate": e, "std_error": float(np.sqrt(max(v, 0.0))), "extrapolation": False}
        for a, e, v in steps
    ]
    rows.append({"added": -1.0, "estimate": estimate, "std_error": error, "extrapolation": True})
    return _interval(estimate, error, df), pd.DataFrame(rows)


def advice(value: float) -> str:
    """What to do at this partial reliability."""
    if value >= RELIABLE:
        return "the densities are accurate enough"
    if value < HOPELESS:
        return (
            "more than half of what the slope rests on is error of the densities: no correction mends that; "
            "score the queries exactly (--method exact) or with a smaller --tolerance"
        )
    return (
        "score the queries exactly (--method exact) or with a smaller --tolerance; until then take the "
        "corrected slope"
    )
