"""The rule by which a slope is judged: which covariance, which reference distribution, what stands beside.

Without clusters: HC3 with t (least squares), HC0 with the normal (logit). With clusters: the sandwich with
t(G−1), for a logit the normal. Where the effective clusters are fewer than 40: the wild cluster restricted
bootstrap (least squares), or the score wild bootstrap with a linear-probability check (logit); the sandwich
and CR2 stand beside.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lmd3.analysis import few_clusters as _few
from lmd3.analysis.regression import Estimate, Fit
from lmd3.analysis.slope import Data, Slope, cluster_variance, heteroskedastic_variance, slope


@dataclass(frozen=True)
class Inference:
    """The judgement of one slope.

    Attributes:
        estimate: by the rule.
        label: where p-value and interval come from, in words.
        effective_clusters: G*, or None without clusters.
        few: whether a bootstrap decides.
        sandwich: the plain one.
        wild: the bootstrap that decides, or None.
        cr2: CR2 with Satterthwaite's df (of the linear-probability model for a logit), or None.
        linear: of a logit with few clusters: the linear-probability model by the restricted bootstrap.
    """

    estimate: Estimate
    label: str
    effective_clusters: float | None
    few: bool
    sandwich: Estimate
    wild: _few.Wild | None = None
    cr2: Estimate | None = None
    linear: Estimate | None = None

    def to_dict(self) -> dict[str, Any]:
        """As in `summary.json`."""
        found: dict[str, Any] = {
            "label": self.label,
            "few": self.few,
            "effective_clusters": self.effective_clusters,
            "sandwich": self.sandwich.to_dict(),
            "cr2": None if self.cr2 is None else self.cr2.to_dict() | {"df": self.cr2.df},
            "linear_probability": None if self.linear is None else self.linear.to_dict(),
        }
        if self.wild is not None:
            found |= {
                "draws": self.wild.draws,
                "weights": self.wild.weights,
                "enumerated": self.wild.enumerated,
            }
        return found


def judge(
    fit: Fit, term: str, clusters: np.ndarray | None, draws: int, seed: int, intervals: bool = True
) -> Inference:
    """Judges the last term of a fit of statsmodels; see `decide`."""
    return decide(fit.slope, fit.x, fit[term], clusters, draws, seed, intervals)


def decide(
    of: Slope,
    x: np.ndarray,
    plain: Estimate,
    clusters: np.ndarray | None,
    draws: int,
    seed: int,
    intervals: bool = True,
) -> Inference:
    """Judges a slope.

    Args:
        of: the slope.
        x: (n, k) its design.
        plain: its test by the sandwich.
        clusters: (n,) codes of the rows, or None.
        draws: of the bootstraps.
        seed: of the draws.
        intervals: invert the bootstrap; else its critical value times the standard error.
    """
    if clusters is None:
        return Inference(plain, _label(plain), None, False, plain)
    effective = _few.effective_clusters(of, clusters)
    if effective >= _few.FEW:
        return Inference(plain, _label(plain), effective, False, plain)
    data = of.data
    linear = cr2 = None
    base = of
    if data.binary:
        wild = _few.wild_score(data, x, of, clusters, draws, seed, intervals)
        name = "score wild bootstrap"
        # The linear-probability model of the same rows.
        base = slope(Data(data.y, False, data.weights, data.effects), x)
        check = _few.wild_restricted(base, clusters, draws, seed, intervals)
        linear = _estimate(base.estimate, float(np.sqrt(cluster_variance(base, clusters))), check)
    else:
        wild = _few.wild_restricted(of, clusters, draws, seed, intervals)
        name = "wild cluster restricted bootstrap"
    found = _few.cr2(base, clusters)
    if found is not None and found.std_error > 0:
        t, p, low, high = _few.t_test(base.estimate, found.std_error, found.df)
        cr2 = Estimate(base.estimate, found.std_error, t, p, low, high, found.df)
    judged = replace(_estimate(plain.estimate, plain.std_error, wild), df=plain.df)
    how = "all patterns" if wild.enumerated else f"{wild.draws:,} draws"
    return Inference(
        judged, f"{name}, {how}, {wild.weights} weights", effective, True, plain, wild, cr2, linear
    )


def sandwich(of: Slope, clusters: np.ndarray | None) -> Estimate:
    """The plain test: HC3 or HC0, or the cluster sandwich; t for least squares, the normal for a logit."""
    variance = heteroskedastic_variance(of) if clusters is None else cluster_variance(of, clusters)
    error = float(np.sqrt(variance))
    df: float | None = None
    if not of.data.binary:
        df = float(len(of.x) - of.parameters if clusters is None else int(clusters.max()))
    t, p, low, high = _few.t_test(of.estimate, error, np.inf if df is None else df)
    return Estimate(of.estimate, error, t, p, low, high, df)


def _estimate(estimate: float, error: float, wild: _few.Wild) -> Estimate:
    low, high, bound = wild.ci_low, wild.ci_high, max(abs(wild.bound_low), abs(wild.bound_high))
    if np.isnan(low):
        low, high = estimate - wild.critical * error, estimate + wild.critical * error
        bound = max(abs(estimate - wild.critical_90 * error), abs(estimate + wild.critical_90 * error))
    return Estimate(
        estimate,
        error,
        wild.statistic,
        wild.p_value,
        low,
        high,
        None,
        critical=wild.critical,
        bound=bound,
    )


def _label(of: Estimate) -> str:
    return "normal" if of.df is None else f"t({of.df:g})"
