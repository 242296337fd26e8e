"""Linear and logistic fits on statsmodels with the covariances of the method, and their rows for the tables.

Linear models have HC3 or, where clusters are given, the cluster sandwich with t(G−1). Logits have the cluster
sandwich, or HC0 (the plain one: HC3 needs the leverages of least squares, and statsmodels' HC1 of a logit is
its HC0), both with normal (Wald) statistics: under clustering a likelihood-ratio test is not valid.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy import stats
from statsmodels.tools.sm_exceptions import (
    ConvergenceWarning,
    PerfectSeparationError,
    PerfectSeparationWarning,
)

from lmd3.errors import ParameterError, WorkError

#: Columns of `coefficients.parquet`.
COEFFICIENTS = (
    "model",
    "outcome",
    "kernel",
    "bandwidth",
    "rule",
    "term",
    "estimate",
    "std_error",
    "statistic",
    "p_value",
    "ci_low",
    "ci_high",
    "covariance",
    "n",
    "clusters",
    "primary",
)


@dataclass(frozen=True)
class Estimate:
    """One coefficient with its doubt; `df` is None where the reference distribution is the normal."""

    estimate: float
    std_error: float
    statistic: float
    p_value: float
    ci_low: float
    ci_high: float
    df: float | None

    def _quantile(self, p: float) -> float:
        return float(stats.norm.ppf(p) if self.df is None else stats.t.ppf(p, self.df))

    @property
    def smallest_detectable(self) -> float:
        """The effect that a two-sided 5 % test would have found with 80 % power."""
        return (self._quantile(0.975) + self._quantile(0.8)) * self.std_error

    @property
    def equivalence_bound(self) -> float:
        """The largest absolute value in the 90 % interval: effects beyond it are rejected at 5 %."""
        half = self._quantile(0.95) * self.std_error
        return max(abs(self.estimate - half), abs(self.estimate + half))

    def to_dict(self) -> dict[str, float]:
        """The six numbers as in `coefficients.parquet`."""
        names = ("estimate", "std_error", "statistic", "p_value", "ci_low", "ci_high")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Fit:
    """A fitted model.

    Attributes:
        results: the statsmodels results object.
        terms: the terms worth showing, the intercept and group effects left out.
        covariance: `HC3`, `HC0`, `nonrobust` or `cluster:COLUMN`.
        clusters: number of clusters, or None.
        n: rows in the fit.
        r_squared: R² (linear) or McFadden's R² (logit).
    """

    results: Any
    terms: list[str]
    covariance: str
    clusters: int | None
    n: int
    r_squared: float

    def __getitem__(self, term: str) -> Estimate:
        at = list(self.results.model.exog_names).index(term)
        low, high = np.asarray(self.results.conf_int())[at]
        linear = bool(self.results.use_t)
        df = getattr(self.results, "df_resid_inference", None) or self.results.df_resid
        return Estimate(
            float(np.asarray(self.results.params)[at]),
            float(np.asarray(self.results.bse)[at]),
            float(np.asarray(self.results.tvalues)[at]),
            float(np.asarray(self.results.pvalues)[at]),
            float(low),
            float(high),
            float(df) if linear else None,
        )


def design(frame: pd.DataFrame, terms: Sequence[str], effects: pd.Series[Any] | None) -> pd.DataFrame:
    """The design matrix: an intercept, the terms, and one column per group but the first."""
    exog = frame[list(terms)].astype(np.float64)
    exog.insert(0, "const", 1.0)
    if effects is None:
        return exog
    codes, names = pd.factorize(effects, sort=True)
    # Sorted names: the group left out does not depend on the order of the rows.
    dummies = (codes[:, None] == np.arange(1, len(names))).astype(np.float64)
    labels = [f"{effects.name}[{name}]" for name in names[1:]]
    return pd.concat([exog, pd.DataFrame(dummies, columns=labels, index=exog.index)], axis=1)


def fit(
    frame: pd.DataFrame,
    terms: Sequence[str],
    *,
    binary: bool,
    clusters: pd.Series[Any] | None = None,
    effects: pd.Series[Any] | None = None,
    robust: bool = True,
) -> Fit:
    """Fits `value` on the terms.

    Args:
        frame: holds `value` and the terms, without missing values.
        terms: columns of `frame`.
        binary: a logit (True) or least squares.
        clusters: labels of clusters for the covariance; its name is reported.
        effects: labels of groups that get an effect each.
        robust: False gives the model-based ("naive") covariance.

    Raises:
        ParameterError: fewer than two clusters; not more rows than parameters; terms that are linear
            combinations of others.
        WorkError: a logit that does not converge (a term separates the outcomes).
    """
    exog = design(frame, terms, effects)
    y = frame["value"].astype(np.float64)
    n, k = exog.shape
    if n <= k:
        raise ParameterError(f"{n} rows are too few for a model of {k} parameters")
    if len(independent(frame, terms, effects)) < len(terms):
        raise ParameterError("the terms are linear combinations of each other")
    options: dict[str, Any]
    count = None
    if not robust:
        covariance, options = "nonrobust", {"cov_type": "nonrobust"}
    elif clusters is not None:
        codes = pd.factorize(clusters)[0]
        count = int(codes.max()) + 1
        if count < 2:
            raise ParameterError(f"clusters of {clusters.name!r}: there is only one")
        covariance = f"cluster:{clusters.name}"
        options = {"cov_type": "cluster", "cov_kwds": {"groups": codes}}
    else:
        covariance = "HC0" if binary else "HC3"
        options = {"cov_type": covariance}
    if binary:
        results, quality = _fit_logit(y, exog, options), "prsquared"
    else:
        results, quality = sm.OLS(y, exog).fit(method="qr", use_t=True, **options), "rsquared"
    return Fit(results, list(terms), covariance, count, n, float(getattr(results, quality)))


def _fit_logit(y: pd.Series[Any], exog: pd.DataFrame, options: dict[str, Any]) -> Any:
    model = sm.Logit(y, exog)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        warnings.simplefilter("error", PerfectSeparationWarning)
        try:
            for method in ("newton", "bfgs"):
                results = model.fit(method=method, maxiter=200, disp=0, use_t=False, **options)
                # A plane that tells all outcomes apart: the likelihood has no maximum.
                separated = float(np.abs(np.asarray(results.resid_response)).max()) < 0.5
                fine = results.mle_retvals["converged"] and np.isfinite(np.asarray(results.bse)).all()
                if fine and not separated:
                    return results
        except (PerfectSeparationError, PerfectSeparationWarning, np.linalg.LinAlgError):
            pass
    raise WorkError("the logit does not converge", remedy="a term or group separates right from wrong")


def independent(
    frame: pd.DataFrame, terms: Sequence[str], effects: pd.Series[Any] | None, tolerance: float = 1e-8
) -> list[str]:
    """The terms, in their order, that are not linear combinations of those before them and the intercept."""
    basis = np.linalg.qr(design(frame, [], effects).to_numpy())[0]
    kept = []
    for term in terms:
        x = frame[term].to_numpy(dtype=np.float64)
        rest = x - basis @ (basis.T @ x)
        # Twice: one projection leaves rounding of the order that is tested here.
        rest -= basis @ (basis.T @ rest)
        size = float(np.linalg.norm(rest))
        if size > tolerance * max(float(np.linalg.norm(x)), 1e-300):
            kept.append(term)
            basis = np.column_stack([basis, rest / size])
    return kept
