"""Paired outcomes: the same queries before and after an intervention (`lmd3 analyze --before`).

The study is then one of differences: the outcome is after − before, the predictor the change of log density
(where densities before are given, at the same bandwidths), and dose (log(1 + dose)) and the outcome before
are held fixed: Δy ~ Δlog f + log(1 + dose) + baseline. Beside it: the mean change, McNemar's exact test of a
binary outcome, the randomisation test of the dose with its permutations inside groups, and mediation.

A baseline that is part of the difference goes with it by chance alone (regression to the mean): a column
`baseline` of the outcomes, from a run that is not in the difference, takes its place.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy import stats

from lmd3 import study_files as _files
from lmd3 import tables
from lmd3.analysis import mediation as _mediation
from lmd3.analysis.intervention import replay_test
from lmd3.analysis.ladder import orders_of
from lmd3.analysis.slope import within
from lmd3.errors import ColumnError, InputError, JoinError

#: Columns of a paired study: held fixed, and kept beside.
BASELINE, LOG_DOSE = "baseline", "log_dose"
AFTER, BEFORE = "after", "before"
#: The predictor of a paired study with densities before.
CHANGE = "change_of_log_density"
#: Permutations of the dose.
PERMUTATIONS = 1_999
#: Numbers held by all permutations together.
_REPLAYED = 40_000_000
_BATCH = 4_000_000
#: Doses listed apart at most.
_MOST_DOSES = 12


def differences(after: pa.Table, before: pa.Table, dose: str | None, file: str | None = None) -> pa.Table:
    """An outcome table of after − before, with `before`, `after`, `baseline` and, with a dose, `log_dose`.

    Args:
        after, before: outcome tables of one outcome each.
        dose: a column of `after` with the number of leaked texts (or 0 and 1) per query; None: unknown.
        file: named in messages.

    Raises:
        JoinError: no id of the two is the same.
        ColumnError: no such column; a dose that is negative or missing.
        InputError: two kinds of outcome.
    """
    if after["kind"][0] != before["kind"][0]:
        raise InputError("the outcomes before and after are of two kinds", file=file)
    frame = after.to_pandas()
    earlier = before.to_pandas().set_index("id")["value"]
    frame = frame[frame["id"].isin(set(earlier.index))].reset_index(drop=True)
    if frame.empty:
        raise JoinError("no id of the outcomes before is one of those after", file=file)
    frame[AFTER] = frame["value"]
    frame[BEFORE] = earlier.reindex(frame["id"]).to_numpy()
    frame["value"] = frame[AFTER] - frame[BEFORE]
    given = BASELINE in frame.columns
    frame[BASELINE] = tables.numbers(frame[BASELINE], BASELINE, file) if given else frame[BEFORE]
    if dose is not None:
        doses = tables.numbers(tables.column(frame, dose, file), dose, file)
        bad = np.flatnonzero(~(np.isfinite(doses) & (doses >= 0)))
        if len(bad):
            raise ColumnError(
                f"the dose of query {frame['id'].iloc[bad[0]]!r} is {doses[bad[0]]:g}",
                file=file,
                remedy="a dose is 0 or more",
            )
        frame[LOG_DOSE] = np.log1p(doses)
    # A difference of shares of trials is no count of successes.
    frame["trials"] = None
    frame["kind"] = "continuous"
    frame["outcome"] = "change of " + frame["outcome"].astype(str)
    keep = [c for c in frame.columns if c in after.column_names or c in (AFTER, BEFORE, BASELINE, LOG_DOSE)]
    table = pa.Table.from_pandas(frame[keep], preserve_index=False).replace_schema_metadata(None)
    table = table.set_column(table.column_names.index("trials"), "trials", pa.nulls(len(frame), pa.int64()))
    return table


def held(frame: pd.DataFrame, dose: bool) -> tuple[str, ...]:
    """The columns that every paired model holds fixed, as far as they vary."""
    names = (BASELINE, *((LOG_DOSE,) if dose else ()))
    return tuple(c for c in names if frame[c].nunique() > 1)


def tests(
    raw: pd.DataFrame,
    binary: bool,
    dose: np.ndarray | None,
    change: np.ndarray | None,
    controls: np.ndarray,
    clusters: np.ndarray | None,
    groups: np.ndarray | None,
    draws: int,
    seed: int,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The tests beside the slope (`PAIRED`), and their facts.

    Args:
        raw: `before`, `after` and `value` (their difference) of every query.
        binary: whether both outcomes are 0 or 1.
        dose: (n,) log(1 + dose), or None.
        change: (n,) change of log density, or None.
        controls: (n, k) held fixed by the mediation's models, without dose and intercept.
        clusters: (n,) codes, or None.
        groups: (n,) codes; the dose is permuted inside them. None: over all.
        draws: of sign flips and of the mediation's bootstrap.
        seed: of all draws.
    """
    y = raw["value"].to_numpy(dtype=np.float64)
    parts = {"all": np.ones(len(y), dtype=bool)}
    if dose is not None:
        levels = np.unique(dose)
        if len(levels) <= _MOST_DOSES:
            parts |= {f"dose {np.expm1(level):g}": dose == level for level in levels}
        else:
            parts |= {"dose 0": dose == 0, "dose above 0": dose > 0}
    rows: list[dict[str, Any]] = []
    for name, at in parts.items():
        if at.sum() < 2:
            continue
        codes = None if clusters is None else np.unique(clusters[at], return_inverse=True)[1]
        shared = {
            "part": name,
            "n": int(at.sum()),
            "before": float(raw["before"][at].mean()),
            "after": float(raw["after"][at].mean()),
        }
        rows.append({"test": "mean change", **shared, **_mean_change(y[at], codes, draws, seed)})
        if binary:
            rows.append({"test": "McNemar", **shared, **mcnemar(raw["before"][at], raw["after"][at])})
    facts: dict[str, Any] = {"queries": len(y), "dose": dose is not None, "density": change is not None}
    if dose is not None and np.ptp(dose) > 0:
        count = int(min(PERMUTATIONS, max(199, _REPLAYED // len(dose))))
        orders = orders_of(len(dose), groups, count, seed)
        replays = np.array([dose[order] for order in orders])
        test = replay_test(dose, replays, y, groups)
        rows.append(
            {
                "test": "randomisation",
                "part": "log(1 + dose)",
                "n": test.n,
                "estimate": test.slope,
                "statistic": test.statistic,
                "p_value": test.p_value,
            }
        )
        facts["randomisation"] = {
            "permutations": len(test.null),
            "p_value": test.p_value,
            "slope": test.slope,
        }
    if dose is not None and change is not None and np.ptp(dose) > 0:
        codes = np.zeros(len(y), dtype=np.int64) if groups is None else groups
        ones = np.ones(len(y))
        t, m, v = (within(x, codes, ones) for x in (dose, change, y))
        base = within(controls, codes, ones) if controls.shape[1] else np.empty((len(y), 0))
        found = _mediation.mediate(v, m, t, base, clusters, draws=min(draws, _mediation.DRAWS), seed=seed)
        if "refused" not in found:
            found["statsmodels"] = _mediation.simulated(v, m, t, np.column_stack([ones, base]), seed)
            for name in ("indirect", "direct", "total"):
                estimate, low, high = found[name]
                rows.append(
                    {
                        "test": "mediation",
                        "part": name,
                        "n": len(y),
                        "estimate": estimate,
                        "ci_low": low,
                        "ci_high": high,
                        "p_value": found["p_value"] if name == "indirect" else None,
                    }
                )
        facts["mediation"] = found
    table = pd.DataFrame(rows).reindex(columns=list(_files.PAIRED.names))
    whole = table[(table["test"] == "mean change") & (table["part"] == "all")].iloc[0]
    names = ("estimate", "std_error", "p_value", "ci_low", "ci_high", "before", "after")
    facts["mean_change"] = {name: float(whole[name]) for name in names}
    if binary:
        one = table[(table["test"] == "McNemar") & (table["part"] == "all")].iloc[0]
        facts["mcnemar"] = {name: float(one[name]) for name in ("gained", "lost", "p_value", "estimate")}
    return table, facts


def _mean_change(y: np.ndarray, clusters: np.ndarray | None, draws: int, seed: int) -> dict[str, float]:
    """Mean of y with its t interval over clusters, and the p-value of sign flips of clusters."""
    codes = np.arange(len(y)) if clusters is None else clusters
    sums = np.bincount(codes, y - y.mean())
    g = len(sums)
    if g < 2:
        return {"estimate": float(y.mean())}
    error = float(np.sqrt((sums**2).sum() * g / (g - 1))) / len(y)
    half = float(stats.t.ppf(0.975, g - 1)) * error
    mean = float(y.mean())
    p = sign_flips(np.bincount(codes, y), draws, seed)
    return {
        "estimate": mean,
        "std_error": error,
        "statistic": mean / error if error > 0 else float("nan"),
        "p_value": p,
        "ci_low": mean - half,
        "ci_high": mean + half,
    }


def sign_flips(sums: np.ndarray, draws: int, seed: int) -> float:
    """Two-sided p-value of a total whose parts (G,) might as well have had the other sign."""
    g, total = len(sums), abs(float(sums.sum()))
    if g <= 12:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=g)))
        return float((np.abs(signs @ sums) >= total * (1 - 1e-12)).mean())
    rng, reached = np.random.default_rng([seed, 15]), 0
    size = max(1, _BATCH // g)
    for start in range(0, draws, size):
        signs = rng.integers(0, 2, size=(min(size, draws - start), g), dtype=np.int8) * 2 - 1
        reached += int((np.abs(signs @ sums) >= total * (1 - 1e-12)).sum())
    return (1 + reached) / (1 + draws)


def mcnemar(before: Any, after: Any) -> dict[str, float]:
    """McNemar's exact test: `gained` and `lost` queries, their odds as `estimate` with its exact interval.

    Given how many changed, the number gained is binomial: the interval of the odds gained : lost is that of
    Clopper and Pearson.
    """
    was, is_now = np.asarray(before) > 0.5, np.asarray(after) > 0.5
    gained, lost = int((~was & is_now).sum()), int((was & ~is_now).sum())
    changed = gained + lost
    if not changed:
        return {"gained": 0, "lost": 0, "p_value": 1.0}
    test = stats.binomtest(gained, changed, 0.5)
    ends = test.proportion_ci(0.95, method="exact")

    def odds(p: float) -> float:
        return p / (1 - p) if p < 1 else float("inf")

    return {
        "gained": gained,
        "lost": lost,
        "estimate": odds(gained / changed),
        "ci_low": odds(ends.low),
        "ci_high": odds(ends.high),
        "p_value": float(test.pvalue),
    }
