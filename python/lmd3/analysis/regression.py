"""Linear and logistic fits on statsmodels with the covariances of the method, and their rows for the tables.

Linear models have HC3 or, where clusters are given, the cluster sandwich with t(G−1). Logits have the cluster
sandwich, or HC0 (the plain one: HC3 needs the leverages of least squares, and statsmodels' HC1 of a logit is
its HC0), both with normal (Wald) statistics: under clustering a likelihood-ratio test is not valid.

Group effects are taken out by means, not by columns: such a fit is a statsmodels result of the outcome and
terms less their group means (least squares), or of a logit whose offset holds the effects; its covariance is
that of the model with a column per group.
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
from statsmodels.tools.sm_exceptions import ConvergenceWarning

from lmd3.analysis import slope as _slope
from lmd3.errors import ParameterError
from lmd3.study_files import COEFFICIENTS as _COEFFICIENTS

#: Columns of `coefficients.parquet`.
COEFFICIENTS = tuple(_COEFFICIENTS.names)


@dataclass(frozen=True)
class Estimate:
    """One coefficient with its doubt; `df` is None where the reference distribution is the normal.

    `critical` (95 % point of |t|) and `bound` (largest absolute value in the 90 % interval) are set where a
    bootstrap gives them.
    """

    estimate: float
    std_error: float
    statistic: float
    p_value: float
    ci_low: float
    ci_high: float
    df: float | None
    critical: float | None = None
    bound: float | None = None

    def _quantile(self, p: float) -> float:
        return float(stats.norm.ppf(p) if self.df is None else stats.t.ppf(p, self.df))

    @property
    def smallest_detectable(self) -> float:
        """The effect that a two-sided 5 % test would have found with 80 % power."""
        critical = self._quantile(0.975) if self.critical is None else self.critical
        return (critical + self._quantile(0.8)) * self.std_error

    @property
    def equivalence_bound(self) -> float:
        """The largest absolute value in the 90 % interval: effects beyond it are rejected at 5 %."""
        if self.bound is not None:
            return self.bound
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
        slope: the parts of the last term's slope.
        x: (n, k) the terms.
    """

    results: Any
    terms: list[str]
    covariance: str
    clusters: int | None
    n: int
    r_squared: float
    slope: _slope.Slope
    x: np.ndarray

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


def fit(
    frame: pd.DataFrame,
    terms: Sequence[str],
    *,
    binary: bool,
    clusters: pd.Series[Any] | None = None,
    effects: pd.Series[Any] | None = None,
    robust: bool = True,
    weights: np.ndarray | None = None,
) -> Fit:
    """Fits `value` on the terms.

    Args:
        frame: holds `value` and the terms, without missing values.
        terms: columns of `frame`.
        binary: a logit (True) or least squares.
        clusters: labels of clusters for the covariance; its name is reported.
        effects: labels of groups that get an effect each.
        robust: False gives the model-based ("naive") covariance.
        weights: (n,) positive weights, trials counted in; then `value` may be a share of the trials.

    Raises:
        ParameterError: fewer than two clusters; not more rows than parameters; terms that are linear
            combinations of others.
        WorkError: a logit that does not converge (a term separates the outcomes).
    """
    x = frame[list(terms)].to_numpy(dtype=np.float64)
    y = frame["value"].to_numpy(dtype=np.float64)
    codes = None if effects is None else np.asarray(pd.factorize(effects, sort=True)[0], dtype=np.int64)
    data = _slope.Data(y, binary, weights, codes)
    n, k = len(y), x.shape[1] + data.effect_count
    if n <= k:
        raise ParameterError(f"{n} rows are too few for a model of {k} parameters")
    if len(independent(frame, terms, effects)) < len(terms):
        raise ParameterError("the terms are linear combinations of each other")
    cluster_codes, count = None, None
    if not robust:
        covariance = "nonrobust"
    elif clusters is not None:
        cluster_codes = np.asarray(pd.factorize(clusters)[0], dtype=np.int64)
        count = int(cluster_codes.max()) + 1
        if count < 2:
            raise ParameterError(f"clusters of {clusters.name!r}: there is only one")
        covariance = f"cluster:{clusters.name}"
    else:
        covariance = "HC0" if binary else "HC3"
    of = _slope.slope(data, x)
    if effects is None:
        results = _plain(data, x, list(terms), frame.index, cluster_codes, covariance)
    else:
        results = _absorbed(of, x, list(terms), frame.index, cluster_codes, robust, covariance)
    return Fit(results, list(terms), covariance, count, n, of.quality, of, x)


def _plain(
    data: _slope.Data,
    x: np.ndarray,
    terms: list[str],
    index: pd.Index[Any],
    clusters: np.ndarray | None,
    covariance: str,
) -> Any:
    """The statsmodels result of a model with an intercept."""
    exog = pd.DataFrame(x, columns=terms, index=index)
    exog.insert(0, "const", 1.0)
    y = pd.Series(data.y, index=index, name="value")
    options: dict[str, Any] = {"cov_type": covariance}
    if clusters is not None:
        options = {"cov_type": "cluster", "cov_kwds": {"groups": clusters}}
    if not data.binary:
        model = sm.OLS(y, exog) if data.weights is None else sm.WLS(y, exog, weights=data.weights)
        return model.fit(method="qr", use_t=True, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        warnings.simplefilter("ignore", ConvergenceWarning)
        if data.weights is None:
            return sm.Logit(y, exog).fit(method="newton", maxiter=200, disp=0, use_t=False, **options)
        model = sm.GLM(y, exog, sm.families.Binomial(), var_weights=data.weights)
        return model.fit(maxiter=200, tol=1e-12, use_t=False, **options)


def _absorbed(
    of: _slope.Slope,
    x: np.ndarray,
    terms: list[str],
    index: pd.Index[Any],
    clusters: np.ndarray | None,
    robust: bool,
    covariance: str,
) -> Any:
    """The statsmodels result of a model with group effects; see the head of this file."""
    data = of.data
    if data.binary:
        exog = pd.DataFrame(x, columns=terms, index=index)
        y = pd.Series(data.y, index=index, name="value")
        shift = of.linear - x @ of.coefficients
        model = sm.GLM(y, exog, sm.families.Binomial(), offset=shift, var_weights=data.weights)
        results = model.fit(start_params=of.coefficients, maxiter=50, tol=1e-12, use_t=False)
    else:
        exog = pd.DataFrame(_slope.within(x, of.codes, of.weights), columns=terms, index=index)
        y = pd.Series(_slope.within(data.y, of.codes, of.weights), index=index, name="value")
        model = sm.OLS(y, exog) if data.weights is None else sm.WLS(y, exog, weights=data.weights)
        model.df_resid = len(y) - of.parameters
        results = model.fit(method="qr", use_t=True)
    inner = getattr(results, "_results", results)
    inner.cov_params_default = _slope.full_covariance(of, x, clusters, robust)
    inner.cov_type, inner.cov_kwds = covariance, {"description": "group effects taken out"}
    inner.use_t = not data.binary
    if not data.binary:
        inner.df_resid_inference = inner.df_resid
        if clusters is not None:
            inner.df_resid_inference = int(clusters.max())
    return results


def independent(
    frame: pd.DataFrame, terms: Sequence[str], effects: pd.Series[Any] | None, tolerance: float = 1e-8
) -> list[str]:
    """The terms, in their order, that are not linear combinations of those before them and the effects."""
    n = len(frame)
    codes = np.zeros(n, dtype=np.int64) if effects is None else pd.factorize(effects)[0]
    ones = np.ones(n)
    basis = np.empty((n, 0))
    kept = []
    for term in terms:
        x = frame[term].to_numpy(dtype=np.float64)
        rest = _slope.within(x, codes, ones)
        # Twice: one projection leaves rounding of the order that is tested here.
        for _ in range(2):
            rest = _slope.within(rest - basis @ (basis.T @ rest), codes, ones)
        size = float(np.linalg.norm(rest))
        if size > tolerance * max(float(np.linalg.norm(x)), 1e-300):
            kept.append(term)
            basis = np.column_stack([basis, rest / size])
    return kept
