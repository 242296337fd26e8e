"""Slopes group by group, how much they differ, and what one group or cluster does to the headline slope."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from lmd3 import study_files as _files
from lmd3.analysis.multiplicity import by_fdr
from lmd3.analysis.slope import Slope

#: Rows that a group needs for a slope of its own.
LEAST = 10
#: Clusters named in `left_out.parquet`: those that move the slope most.
MOST_NAMED = 1_000


def forest(of: Slope, labels: pd.Series[Any]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Slope inside each group, the controls' coefficients held in common; their mean and its spread.

    A group's slope is that of the outcome on the predictor, both less what the other terms of the headline
    model say (with the working weights of a logit) and less their means in the group, HC1. Groups of fewer
    than 10 rows, or without variation, are left out. The mean over groups is DerSimonian and Laird's (1986)
    with the interval of Hartung and Knapp; the prediction interval is for the slope of a new group.

    Returns:
        A table of `FOREST` and the facts q, df, p_value, i_squared, tau.
    """
    codes, names = pd.factorize(labels, sort=True)
    rest = of.rest + of.estimate * of.x
    rows: list[dict[str, Any]] = []
    for code, name in enumerate(names):
        at = np.flatnonzero(codes == code)
        if len(at) < LEAST:
            continue
        w = of.weights[at]
        x = of.x[at] - np.average(of.x[at], weights=w)
        y = rest[at] - np.average(rest[at], weights=w)
        information = float(w @ x**2)
        if not information > 1e-12 * of.information:
            continue
        estimate = float((w * x) @ y) / information
        error = (
            float(np.sqrt((((w * x) * (y - estimate * x)) ** 2).sum() * len(at) / (len(at) - 2)))
            / information
        )
        if not error > 0 or (of.data.binary and len(np.unique(of.data.y[at])) < 2):
            continue
        half = float(stats.t.ppf(0.975, len(at) - 2)) * error
        rows.append(
            {
                "kind": "group",
                "group": str(name),
                "n": len(at),
                "outcome_mean": float(of.data.y[at].mean()),
                "estimate": estimate,
                "std_error": error,
                "ci_low": estimate - half,
                "ci_high": estimate + half,
                "p_value": float(2 * stats.t.sf(abs(estimate / error), len(at) - 2)),
            }
        )
    table = pd.DataFrame(rows, columns=list(_files.FOREST.names))
    if len(rows) < 2:
        return table, {}
    table["p_by"] = by_fdr(table["p_value"].to_numpy(dtype=np.float64))
    effect = table["estimate"].to_numpy(dtype=np.float64)
    errors = table["std_error"].to_numpy(dtype=np.float64)
    pooled = random_effects(effect, errors)
    table["shrunken"] = pooled["mean"] + (effect - pooled["mean"]) * pooled["tau"] ** 2 / (
        pooled["tau"] ** 2 + errors**2
    )
    table["weight"] = pooled.pop("weights")
    whole = {"n": int(table["n"].sum()), "estimate": pooled["mean"]}
    table = pd.concat(
        [
            table,
            pd.DataFrame(
                [
                    {
                        "kind": "random effects",
                        **whole,
                        "std_error": pooled["std_error"],
                        "ci_low": pooled["ci_low"],
                        "ci_high": pooled["ci_high"],
                        "p_value": pooled["p_mean"],
                    },
                    {
                        "kind": "prediction",
                        **whole,
                        "ci_low": pooled["prediction_low"],
                        "ci_high": pooled["prediction_high"],
                    },
                ]
            ),
        ],
        ignore_index=True,
    )
    names_kept = ("q", "df", "p_value", "i_squared", "tau", "mean", "ci_low", "ci_high")
    return table, {name: pooled[name] for name in names_kept} | {"groups": len(rows)}


def random_effects(effect: np.ndarray, error: np.ndarray) -> dict[str, Any]:
    """DerSimonian and Laird's mean of effects (k,), Hartung and Knapp's interval, and heterogeneity."""
    k = len(effect)
    w = 1.0 / error**2
    fixed = float(w @ effect / w.sum())
    q = float(w @ (effect - fixed) ** 2)
    tau2 = max(0.0, (q - (k - 1)) / float(w.sum() - (w**2).sum() / w.sum()))
    v = 1.0 / (error**2 + tau2)
    mean = float(v @ effect / v.sum())
    # At least the variance of the plain random-effects mean (Röver, Knapp and Friede 2015).
    scale = max(1.0, float(v @ (effect - mean) ** 2) / (k - 1))
    sd = float(np.sqrt(scale / v.sum()))
    half = float(stats.t.ppf(0.975, k - 1)) * sd
    wide = float(stats.t.ppf(0.975, max(k - 2, 1))) * float(np.sqrt(tau2 + sd**2))
    return {
        "mean": mean,
        "std_error": sd,
        "ci_low": mean - half,
        "ci_high": mean + half,
        "p_mean": float(2 * stats.t.sf(abs(mean / sd), k - 1)),
        "prediction_low": mean - wide,
        "prediction_high": mean + wide,
        "q": q,
        "df": k - 1,
        "p_value": float(stats.chi2.sf(q, k - 1)),
        "i_squared": max(0.0, (q - (k - 1)) / q) if q > 0 else 0.0,
        "tau": float(np.sqrt(tau2)),
        "weights": v / v.sum(),
    }


def left_out(of: Slope, labels: pd.Series[Any], kind: str) -> pd.DataFrame:
    """The headline slope without each cluster: exact for least squares, one Newton step for a logit.

    The clusters that move it most come first; at most 1,000 are kept.
    """
    codes, names = pd.factorize(labels, sort=True)
    root = np.sqrt(of.weights)
    basis = np.column_stack([of.basis, root / np.sqrt(np.bincount(of.codes, of.weights))[of.codes]])
    # A cluster's effects go with it where they lie inside; elsewhere the intercept is a column like others.
    columns = basis if of.data.effects is None else of.basis
    order = np.argsort(codes, kind="stable")
    ends = np.concatenate([[0], np.cumsum(np.bincount(codes))])
    scale = float(np.sqrt(of.information))
    changes = np.empty(len(names))
    for c in range(len(names)):
        at = order[ends[c] : ends[c + 1]]
        q, e = columns[at], root[at] * of.rest[at]
        gram = q.T @ q
        # β − β₋g = (X'X − X_g'X_g)⁻¹ X_g'e_g, in the orthonormal basis.
        try:
            move = np.linalg.solve(np.eye(len(gram)) - gram, q.T @ e)
        except np.linalg.LinAlgError:
            changes[c] = np.nan
            continue
        changes[c] = -move[of.basis.shape[1] - 1] * np.sign(of.x @ (of.basis[:, -1] * root)) / scale
    table = pd.DataFrame(
        {"kind": kind, "name": [str(n) for n in names], "n": np.diff(ends), "estimate": of.estimate + changes}
    )
    table["change"] = changes
    table = table.reindex(table["change"].abs().sort_values(ascending=False, kind="stable").index)
    return table.head(MOST_NAMED).reset_index(drop=True)[list(_files.LEFT_OUT.names)]
