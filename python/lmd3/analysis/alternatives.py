"""Named alternatives to the headline model, all of statsmodels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy import stats
from statsmodels.gam.api import BSplines, GLMGam

from lmd3 import study_files as _files
from lmd3.analysis.regression import Estimate
from lmd3.errors import ParameterError

ALTERNATIVES = ("mixed", "mixed_slopes", "conditional_logit", "gee", "quantile", "gam")
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
#: Knots of the spline's basis; points of the curve drawn.
KNOTS, POINTS = 8, 60


def alternative(
    name: str,
    frame: pd.DataFrame,
    terms: Sequence[str],
    *,
    binary: bool,
    groups: pd.Series[Any] | None,
    clusters: pd.Series[Any] | None = None,
) -> dict[str, Any]:
    """Fits one alternative; the predictor is the last term.

    * `mixed`: random intercept per group, log density split into its group mean and the rest (the slope
      reported is within); `mixed_slopes`: a random slope as well.
    * `conditional_logit`: within groups, conditional on their number right.
    * `gee`: exchangeable correlation inside clusters, robust errors.
    * `quantile`: at .1, .25, .5, .75, .9.
    * `gam`: a cubic spline of the predictor in place of a line (its approximate test is of curvature).

    Returns:
        model name(s) → statsmodels results.

    Raises:
        ParameterError: an unknown name; a model that needs groups, or another kind of outcome.
    """
    if name not in ALTERNATIVES:
        raise ParameterError(f"unknown model {name!r}", remedy=f"choose of {', '.join(ALTERNATIVES)}")
    y = frame["value"].astype(np.float64)
    x = sm.add_constant(frame[list(terms)].astype(np.float64), has_constant="add")
    if name in ("mixed", "mixed_slopes", "conditional_logit") and groups is None:
        raise ParameterError(f"model {name} needs groups", remedy="name their column (--within or --cluster)")
    if name in ("mixed", "mixed_slopes", "quantile") and binary:
        raise ParameterError(f"model {name} is for continuous outcomes", remedy="conditional_logit or gee")
    if name == "conditional_logit" and not binary:
        raise ParameterError("model conditional_logit is for binary outcomes", remedy="take mixed or gee")
    if name == "conditional_logit" and not y.isin((0.0, 1.0)).all():
        raise ParameterError("model conditional_logit takes single trials, not shares", remedy="take gee")
    within = None if groups is None else np.asarray(pd.factorize(groups)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name in ("mixed", "mixed_slopes"):
            split = _split(x, terms[-1], groups)
            random = split[["const", terms[-1]]] if name == "mixed_slopes" else None
            model = sm.MixedLM(y, split, groups=within, exog_re=random)
            return {name: model.fit(method=["lbfgs", "powell"])}
        if name == "conditional_logit":
            from statsmodels.discrete.conditional_models import ConditionalLogit

            return {name: ConditionalLogit(y, x.drop(columns="const"), groups=within).fit(disp=0)}
        if name == "gee":
            by = clusters if clusters is not None else groups
            codes = np.arange(len(y)) if by is None else pd.factorize(by)[0]
            family = sm.families.Binomial() if binary else sm.families.Gaussian()
            order = np.argsort(codes, kind="stable")
            model = sm.GEE(
                y.iloc[order],
                x.iloc[order],
                groups=codes[order],
                family=family,
                cov_struct=sm.cov_struct.Exchangeable(),
            )
            return {name: model.fit()}
        if name == "quantile":
            return {f"quantile_{q:g}": sm.QuantReg(y, x).fit(q=q) for q in QUANTILES}
        return {"gam": _gam(y, x, terms[-1], binary)[0]}


def estimates(results: Any, term: str) -> list[tuple[str, str, Estimate]]:
    """(term, covariance in words, estimate) of the predictor, its group means and variances, as there are."""
    names = list(getattr(results.params, "index", results.model.exog_names))
    values = {n: np.asarray(getattr(results, n)) for n in ("params", "bse", "tvalues", "pvalues")}
    intervals = np.asarray(results.conf_int())
    kind = type(results.model).__name__
    label = {"GEE": "robust", "GLMGam": "penalised"}.get(kind, "model-based")
    found = []
    for at, name in enumerate(names):
        is_spline = kind == "GLMGam" and str(name).startswith("x0_s")
        if name == term or str(name).startswith(f"{term}:") or is_spline or str(name).startswith("Group"):
            of = [float(values[n][at]) for n in ("params", "bse", "tvalues", "pvalues")]
            low, high = (float(v) for v in intervals[at])
            shown = str(name).replace(f"{term}:", "between:") if name != term else term
            found.append((shown, label, Estimate(of[0], of[1], of[2], of[3], low, high, None)))
    return found


def _split(x: pd.DataFrame, term: str, groups: pd.Series[Any] | None) -> pd.DataFrame:
    """The predictor as what is inside groups, and its group means as a control (Mundlak 1978)."""
    assert groups is not None
    mean = x[term].groupby(groups.to_numpy()).transform("mean")
    out = x.copy()
    out[term] = x[term] - mean
    if float(mean.std()) > 1e-9:
        out[f"{term}:between"] = mean
    return out


def _gam(y: pd.Series[Any], x: pd.DataFrame, term: str, binary: bool) -> tuple[Any, BSplines]:
    spline = BSplines(x[[term]].to_numpy(), df=[KNOTS], degree=[3])
    family = sm.families.Binomial() if binary else sm.families.Gaussian()
    model = GLMGam(y, exog=x.drop(columns=term), smoother=spline, alpha=[1.0], family=family)
    return model.fit(), spline


def smooth(
    frame: pd.DataFrame, terms: Sequence[str], *, binary: bool, most: int = 20_000, seed: int = 0
) -> tuple[pd.DataFrame, dict[str, float]]:
    """The partial effect of the predictor (the last term) as a spline, and a test of its curvature.

    Returns:
        Rows of `CHECKS` (chart `smooth`) and the facts p_curvature (a Wald test of the spline against the
        line), n.
    """
    rng = np.random.default_rng(seed)
    if len(frame) > most:
        frame = frame.iloc[np.sort(rng.choice(len(frame), most, replace=False))]
    y = frame["value"].astype(np.float64)
    x = sm.add_constant(frame[list(terms)].astype(np.float64), has_constant="add")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results, _ = _gam(y, x, terms[-1], binary)
        values = frame[terms[-1]].to_numpy(dtype=np.float64)
        ends = [float(q) for q in np.quantile(values, [0.005, 0.995])]
        grid = np.linspace(ends[0], ends[1], POINTS)
        basis = results.model.smoother.transform(grid[:, None])
        start = x.shape[1] - 1
        columns = slice(start, start + basis.shape[1])
        centre = results.model.smoother.transform(values[:, None]).mean(axis=0)
        inner = basis - centre
        curve = inner @ np.asarray(results.params)[columns]
        covariance = np.asarray(results.cov_params())[columns, columns]
        error = np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", inner, covariance, inner), 0.0))
        # Curvature: the spline's coefficients less the straight line that is nearest on the grid.
        line = np.column_stack([np.ones(POINTS), grid])
        bend = inner - line @ np.linalg.lstsq(line, inner, rcond=None)[0]
        form = bend @ covariance @ bend.T
        rank = basis.shape[1] - 1
        chosen = np.linalg.pinv(form, rcond=1e-8)
        bent = bend @ np.asarray(results.params)[columns]
        statistic = float(bent @ chosen @ bent)
        df = min(rank, int(np.linalg.matrix_rank(form, tol=1e-8 * max(float(np.trace(form)), 1e-300))))
    table = pd.DataFrame(
        {
            "chart": "smooth",
            "x": grid,
            "y": curve,
            "ci_low": curve - 1.96 * error,
            "ci_high": curve + 1.96 * error,
        }
    )
    table["n"] = len(frame)
    p = float(stats.chi2.sf(statistic, max(df, 1)))
    return table[list(_files.CHECKS.names)], {"p_curvature": p, "n": len(frame)}
