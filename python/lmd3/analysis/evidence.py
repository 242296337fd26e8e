"""The tables beside the headline: specification curve, negative controls, charts of the fit, points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from lmd3 import study_files as _files
from lmd3.analysis import controls as _controls
from lmd3.analysis import join as _join
from lmd3.analysis import ladder as _ladder
from lmd3.analysis import multiplicity as _many
from lmd3.analysis import regression as _regression
from lmd3.analysis import subsets as _subsets
from lmd3.analysis.inference import decide, sandwich
from lmd3.analysis.sample import Sample, usable
from lmd3.analysis.slope import Data, Slope, slope, within
from lmd3.errors import WorkError

#: Points of a quantile plot; bins of the other charts.
_POINTS, _BINS = 200, 12


def control_sets(sample: Sample) -> dict[str, list[str]]:
    """Sets of controls of the specification curve, by name, from none to all."""
    of = sample.controls
    sets = {"none": [], "base": list(of.base), "base + lexical": [*of.base, *of.lexical]}
    sets["headline"] = list(of.names)
    if _controls.MAX_COSINE in sample.beside and _controls.MAX_COSINE not in of.names:
        sets["headline + max cosine"] = [*of.names, _controls.MAX_COSINE]
    kept: dict[str, list[str]] = {}
    for name, terms in sets.items():
        # The headline's own name wins where two sets are the same.
        same = [other for other, there in kept.items() if set(there) == set(terms)]
        if same and name == "headline":
            kept.pop(same[0])
        elif same:
            continue
        kept[name] = terms
    return kept


def specifications(
    sample: Sample,
    predictors: _join.Predictors,
    ess: Sequence[float | None],
    is_within: bool,
    draws: int,
    seed: int,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The specification curve with its adjusted p-values, and facts of the family."""
    everything = np.ones(len(sample.frame), dtype=bool)
    forms = {"pooled": everything}
    if sample.within is not None:
        forms["within"] = usable(sample)
    own = "within" if is_within else "pooled"
    rows: list[dict[str, Any]] = []
    family: list[int] = []
    columns: list[np.ndarray] = []
    name = _covariance(sample)

    def take(
        s: _join.Specification,
        x: np.ndarray,
        subset: str | None,
        controls: str,
        terms: list[str],
        form: str,
        of_ess: Any,
    ) -> None:
        at = forms[form]
        data = Data(
            sample.frame["value"].to_numpy(dtype=np.float64)[at],
            sample.binary,
            None if sample.weights is None else sample.weights[at],
            sample.effects(at) if form == "within" else None,
        )
        base = sample.frame[terms].to_numpy(dtype=np.float64)[at]
        if not _subsets.independent(data, [base], {0: x[at]}):
            return
        try:
            of = slope(data, np.column_stack([base, x[at]]))
        except (WorkError, np.linalg.LinAlgError):
            return
        clusters = sample.codes(at)
        row = {
            "kernel": s.kernel,
            "bandwidth": s.bandwidth,
            "rule": s.rule,
            "ess_median": of_ess,
            "subset": subset,
            "controls": controls,
            "terms": ", ".join(
                [
                    *terms,
                    s.predictor,
                    *(
                        [f"effects of {sample.within.name}"]
                        if form == "within" and sample.within is not None
                        else []
                    ),
                ]
            ),
            "form": form,
            "covariance": name if clusters is not None else "HC0" if sample.binary else "HC3",
            **judged(of, np.column_stack([base, x[at]]), clusters, draws, seed),
            "n": len(of.x),
            "clusters": None if clusters is None else int(clusters.max()) + 1,
            "primary": False,
        }
        if controls == "headline" and form == own:
            family.append(len(rows))
            columns.append(x[at])
            row["primary"] = len(family) == 1
        rows.append(row)

    sets = control_sets(sample)
    order = ["headline", *[c for c in sets if c != "headline"]]
    for number, s in enumerate(sample.specifications):
        x = sample.frame[s.column].to_numpy(dtype=np.float64)
        for controls in order:
            for form in [own, *[f for f in forms if f != own]]:
                take(s, x, None, controls, sets[controls], form, ess[number])
        if predictors.density is not None and s.kernel is not None and s.bandwidth is not None:
            sums = _subsets.sums_of(predictors.density, list(sample.raw["id"]), s.kernel, s.bandwidth)
            if sums is not None:
                shares = sums.shares.mean(axis=0)
                for g in np.argsort(-shares, kind="stable")[: _subsets.MOST]:
                    values = sums.log_sums[:, g]
                    if (
                        shares[g] >= _subsets.LEAST_SHARE
                        and np.isfinite(values).all()
                        and values.std() > 1e-9
                    ):
                        inside = (values - values.mean()) / values.std(ddof=1)
                        take(s, inside, sums.names[g], "headline", sets["headline"], own, None)
    table = pd.DataFrame(rows, columns=list(_files.SPECIFICATIONS.names))
    facts: dict[str, Any] = {}
    if family:
        at = forms[own]
        data = Data(
            sample.frame["value"].to_numpy(dtype=np.float64)[at],
            sample.binary,
            None if sample.weights is None else sample.weights[at],
            sample.effects(at) if is_within else None,
        )
        base = sample.frame[sets["headline"]].to_numpy(dtype=np.float64)[at]
        clusters = sample.codes(at)
        # Rows beyond counting would make thousands of draws slow and change nothing.
        taken = draws if len(data.y) <= 20_000 or clusters is not None else min(draws, 499)
        found = _many.max_t(data, base, np.column_stack(columns), clusters, None, taken, seed)
        table.loc[family, "p_max_t"] = found.p_max_t
        table.loc[family, "p_by"] = _many.by_fdr(table.loc[family, "p_value"].to_numpy(dtype=np.float64))
        head = table.iloc[family[0]]
        same = np.sign(table["estimate"]) == np.sign(head["estimate"])
        facts = {
            "looks": len(family),
            "specifications": len(table),
            "method": found.method,
            "draws": found.draws,
            "p_max_t": float(head["p_max_t"]),
            "p_by": float(head["p_by"]),
            "share_of_same_sign": float(same.mean()),
            "share_below_05": float((table["p_value"] < 0.05).mean()),
            "share_of_same_sign_below_05": float((same & (table["p_value"] < 0.05)).mean()),
        }
    table["clusters"] = table["clusters"].astype("Int64")
    return table, facts


def by_controls(sample: Sample, table: pd.DataFrame, is_within: bool) -> list[dict[str, Any]]:
    """The primary specification's slope as sets of controls are added, from none to those of the headline.

    Returns:
        controls (name of the set), added (names that the set before lacks), estimate, p_value, ci_low,
        ci_high of each.
    """
    s = sample.specifications[0]
    rows = table[table["subset"].isna() & (table["form"] == ("within" if is_within else "pooled"))]
    if s.kernel is not None:
        rows = rows[(rows["kernel"] == s.kernel) & (rows["bandwidth"] == s.bandwidth)]
    found: list[dict[str, Any]] = []
    before: list[str] = []
    for name, terms in control_sets(sample).items():
        row = rows[rows["controls"] == name]
        if len(row) and "max cosine" not in name:
            numbers = {k: float(row[k].iloc[0]) for k in ("estimate", "p_value", "ci_low", "ci_high")}
            found.append({"controls": name, "added": [t for t in terms if t not in before], **numbers})
            before = terms
    return found


def _covariance(sample: Sample) -> str:
    return f"cluster:{sample.cluster_name}"


def test(of: Slope, clusters: np.ndarray | None) -> dict[str, float]:
    """estimate, std_error, statistic, p_value, ci_low, ci_high of a slope, by the sandwich."""
    return sandwich(of, clusters).to_dict()


def judged(of: Slope, x: np.ndarray, clusters: np.ndarray | None, draws: int, seed: int) -> dict[str, float]:
    """The same numbers by the rule: a bootstrap where the effective clusters are few."""
    return decide(of, x, sandwich(of, clusters), clusters, draws, seed, intervals=False).estimate.to_dict()


def shuffled_slopes(
    of: Slope, x: np.ndarray, groups: np.ndarray | None, draws: int, seed: int
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Slopes of the predictor shuffled within groups: exact for least squares, by Rao's score for a logit.

    Args:
        of: the headline slope.
        x: (n, k) its design, the predictor last.
        groups: codes; rows stay in their group. None: the whole sample.
        draws: shuffles.
        seed: of the shuffles.
    """
    fitter = _ladder.fitter_of(of.data.y, of.data.effects, of.data.binary, of.data.weights)
    base = fitter.restricted(x[:, :-1])
    null = _ladder.Shuffled(base, x[:, -1:])
    scale = 1.0 if of.data.binary else float(base.weights @ base.rest**2) / (len(of.x) - of.parameters)
    found = np.empty((draws, 2))
    for draw, order in enumerate(_ladder.orders_of(len(of.x), groups, draws, seed)):
        score, information = null.parts(order)
        found[draw] = score[0] / information[0, 0], score[0] / np.sqrt(information[0, 0] * scale)
    own, information = null.parts(np.arange(len(of.x)))
    statistic = float(own[0] / np.sqrt(information[0, 0] * scale))
    table = pd.DataFrame({"control": "shuffle", "draw": np.arange(draws), "estimate": found[:, 0]})
    table["statistic"] = found[:, 1]
    return table, negative_control(found[:, 0], found[:, 1], of.estimate, statistic)


def negative_control(
    estimates: np.ndarray, statistics: np.ndarray, own: float, own_statistic: float | None
) -> dict[str, Any]:
    """Facts of draws of a negative control beside the slope itself."""
    compared, value = (estimates, own) if own_statistic is None else (statistics, own_statistic)
    low, high = np.quantile(estimates, [0.025, 0.975])
    return {
        "draws": len(estimates),
        "mean": float(estimates.mean()),
        "sd": float(estimates.std(ddof=1)),
        "low": float(low),
        "high": float(high),
        "observed": own,
        "p_value": (1 + int((np.abs(compared) >= abs(value)).sum())) / (1 + len(estimates)),
    }


def checks(of: Slope) -> pd.DataFrame:
    """Charts of the fit: `qq` and `scale_location`, or `calibration` of a binary outcome."""
    rows: list[pd.DataFrame] = []
    if of.data.binary:
        p, y = of.fitted, of.data.y
        code = _tenths(p, 10)
        for part in np.unique(code):
            at = code == part
            weights = np.ones(int(at.sum())) if of.data.weights is None else of.data.weights[at]
            n, mean = float(weights.sum()), float(np.average(y[at], weights=weights))
            ends = stats.binomtest(round(mean * n), round(n)).proportion_ci(0.95, method="wilson")
            x = float(np.average(p[at], weights=weights))
            rows.append(pd.DataFrame([["calibration", x, mean, ends.low, ends.high, int(at.sum())]]))
    else:
        rest = np.sqrt(of.weights) * of.rest
        standard = rest / np.sqrt(np.maximum(1.0 - of.leverage, 1e-10))
        standard = standard / standard.std(ddof=1)
        points = min(_POINTS, len(rest))
        grid = (np.arange(points) + 0.5) / points
        frame = pd.DataFrame({0: "qq", 1: stats.norm.ppf(grid), 2: np.quantile(standard, grid)})
        rows.append(frame.assign(**{"3": np.nan, "4": np.nan, "5": len(rest)}).set_axis(range(6), axis=1))
        root, fitted = np.sqrt(np.abs(standard)), of.fitted
        code = _tenths(fitted, _BINS)
        for part in np.unique(code):
            at = code == part
            half = 1.96 * float(root[at].std(ddof=1)) / np.sqrt(at.sum()) if at.sum() > 1 else np.nan
            mean = float(root[at].mean())
            x = float(fitted[at].mean())
            rows.append(pd.DataFrame([["scale_location", x, mean, mean - half, mean + half, int(at.sum())]]))
    return pd.concat(rows, ignore_index=True).set_axis(list(_files.CHECKS.names), axis=1)


def _tenths(x: np.ndarray, count: int) -> np.ndarray:
    edges = np.unique(np.quantile(x, np.linspace(0, 1, count + 1)))
    return np.asarray(np.clip(np.searchsorted(edges, x, side="right") - 1, 0, max(len(edges) - 2, 0)))


def marginal_effect(of: Slope, x: np.ndarray, clusters: np.ndarray | None) -> dict[str, float]:
    """Average marginal effect of the predictor (per SD, in probability) with its delta-method interval."""
    p, trials = of.fitted, np.ones(len(of.x)) if of.data.weights is None else of.data.weights
    density = p * (1 - p)
    total = float(trials.sum())
    effect = of.estimate * float(trials @ density) / total
    # d effect / d coefficients with the effects (levels) following, and d effect / d levels.
    bend = of.estimate * trials * density * (1 - 2 * p) / total
    inner = within(x, of.codes, of.weights)
    gradient = inner.T @ bend
    gradient[-1] += float(trials @ density) / total
    score = of.weights * of.rest
    bread = np.linalg.inv((inner * of.weights[:, None]).T @ inner)
    levels = np.bincount(of.codes, bend) / np.bincount(of.codes, of.weights)
    influence = (inner @ (bread @ gradient) + levels[of.codes]) * score
    sums = influence if clusters is None else np.bincount(clusters, influence)
    g = len(sums)
    error = float(np.sqrt((sums**2).sum() * (1.0 if clusters is None else g / (g - 1))))
    return {
        "average_marginal_effect": effect,
        "ame_std_error": error,
        "ame_ci_low": effect - 1.96 * error,
        "ame_ci_high": effect + 1.96 * error,
    }


def tjur(of: Slope) -> float:
    """Tjur's R² (2009): mean fitted probability of the right less that of the wrong."""
    weights = np.ones(len(of.x)) if of.data.weights is None else of.data.weights
    right, wrong = weights * of.data.y, weights * (1 - of.data.y)
    return float(right @ of.fitted / right.sum() - wrong @ of.fitted / wrong.sum())


def points(
    sample: Sample,
    fitted: _regression.Fit,
    rows: np.ndarray,
    extra: Mapping[str, np.ndarray],
    group: pd.Series[Any] | None,
) -> pd.DataFrame:
    """One row per query analysed (`POINTS`); what the headline fit leaves out is null."""
    s, of = sample.specifications[0], fitted.slope
    table = pd.DataFrame({"id": sample.raw["id"], "value": sample.raw["value"]})
    table["predictor"] = sample.raw[s.column]
    for c in (_controls.TYPICALITY, _controls.MAX_COSINE):
        table[c] = sample.raw[c] if c in sample.raw.columns else np.nan
    table["group"] = None if group is None else group.astype(str)
    table["cluster"] = None if sample.cluster is None else sample.cluster.astype(str)
    columns = {
        "fitted": of.fitted,
        "residual": of.data.y - of.fitted,
        "predictor_residual": of.x,
        "outcome_residual": of.rest + of.estimate * of.x,
        "working_weight": of.weights,
        "leverage": of.leverage,
    }
    for name, values in columns.items():
        table[name] = np.nan
        table.loc[rows, name] = values
    for name, values in extra.items():
        table[name] = values
    for name in _files.POINTS.names:
        if name not in table.columns:
            table[name] = None if name in ("unsupported", "duplicates") else np.nan
    return table[list(_files.POINTS.names)]
