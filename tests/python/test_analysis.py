"""The analysis against independent computations: sandwiches by hand, plain statsmodels, known answers."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import statsmodels.api as sm
from scipy import special, stats

from lmd3 import errors
from lmd3.analysis import controls, regress, regression, words
from lmd3.analysis import ladder as ladders
from lmd3.cli import main
from lmd3.outcomes import read_outcomes

DATA = os.environ.get("LMD3_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="LMD3_DATA is not set: no real data")


@dataclass
class Tables:
    """A density table as the analysis takes it."""

    density: pd.DataFrame
    queries: pd.DataFrame | None
    neighbors: pd.DataFrame | None
    run: dict[str, Any]


def density_rows(ids: list[str], values: np.ndarray, h: float = 0.05, rule: str = "ess=1000") -> pd.DataFrame:
    return pd.DataFrame(
        {
            "id": ids,
            "kernel": "exponential",
            "bandwidth": h,
            "rule": rule,
            "group": None,
            "log_density": values,
            "std_error": 0.0,
            "ci_low": values,
            "ci_high": values,
            "kernel_sum_log": values + 3.0,
            "ess": 100.0,
            "rows_evaluated": 1000,
            "method": "exact",
            "precision": "float32",
            "flags": "",
        }
    )


@dataclass
class World:
    """Made-up queries: density = typicality + something of its own; loss depends on both."""

    ids: list[str]
    typicality: np.ndarray
    log_density: np.ndarray
    max_cosine: np.ndarray
    length: np.ndarray
    group: np.ndarray
    loss: np.ndarray

    def tables(self, **more: Any) -> Tables:
        queries = pd.DataFrame({"id": self.ids, "max_cosine": self.max_cosine, "typicality": self.typicality})
        return Tables(density_rows(self.ids, self.log_density), queries, None, more)

    def outcome(self, values: np.ndarray | None = None) -> pd.DataFrame:
        values = self.loss if values is None else values
        return pd.DataFrame({"id": self.ids, "value": values, "task": self.group})

    def covariates(self) -> pd.DataFrame:
        return pd.DataFrame({"id": self.ids, "group": self.group, "log_tokens": self.length})


def world(n: int = 400, effect: float = -0.3, seed: int = 0, groups: int = 20) -> World:
    rng = np.random.default_rng(seed)
    group = rng.integers(0, groups, n)
    typicality = rng.normal(size=n)
    density = 3 * (0.6 * typicality + 0.8 * rng.normal(size=n)) - 40
    length = rng.normal(size=n)
    level = rng.normal(size=groups)[group]
    loss = 2 + effect * density / 3 - 0.4 * typicality + 0.3 * length + 0.5 * level + rng.normal(size=n)
    cosine = 0.7 + 0.02 * density + 0.03 * rng.normal(size=n)
    return World([f"q{i}" for i in range(n)], typicality, density, cosine, length, group.astype(str), loss)


def per_sd(x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / x.std(ddof=1)


def row_of(study: Any, model: str, term: str = "log_density") -> pd.Series:
    table = study.coefficients
    return table[(table["model"] == model) & (table["term"] == term)].iloc[0]


# --- covariances by hand ---


def hc3(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    bread = np.linalg.inv(x.T @ x)
    beta = bread @ x.T @ y
    leverage = np.einsum("ij,jk,ik->i", x, bread, x)
    scores = x * ((y - x @ beta) / (1 - leverage))[:, None]
    return beta, np.sqrt(np.diag(bread @ scores.T @ scores @ bread))


def cluster_sandwich(x: np.ndarray, scores: np.ndarray, bread: np.ndarray, codes: np.ndarray) -> np.ndarray:
    n, k = x.shape
    sums = np.array([scores[codes == c].sum(0) for c in np.unique(codes)])
    g = len(sums)
    return np.sqrt(np.diag(bread @ (sums.T @ sums) @ bread) * g / (g - 1) * (n - 1) / (n - k))


def test_least_squares_with_hc3() -> None:
    w = world()
    study = regress(w.outcome(), w.tables(), w.covariates())
    x = np.column_stack([np.ones(400), *map(per_sd, (w.log_density, w.length, w.typicality))])
    beta, errors_ = hc3(x, w.loss)
    row = row_of(study, "headline")
    assert row["covariance"] == "HC3"
    assert row["estimate"] == pytest.approx(beta[1], rel=1e-10)
    assert row["std_error"] == pytest.approx(errors_[1], rel=1e-10)
    half = stats.t.ppf(0.975, 396) * errors_[1]
    assert row["ci_high"] - row["ci_low"] == pytest.approx(2 * half, rel=1e-10)
    assert row["p_value"] == pytest.approx(2 * stats.t.sf(abs(beta[1] / errors_[1]), 396), rel=1e-8)
    assert study.facts["scales"]["log_density"]["sd"] == pytest.approx(w.log_density.std(ddof=1))
    assert study.facts["primary"]["smallest_detectable_effect"] == pytest.approx(
        (stats.t.ppf(0.975, 396) + stats.t.ppf(0.8, 396)) * errors_[1]
    )


def test_least_squares_clustered_has_t_of_clusters_less_one() -> None:
    w = world()
    study = regress(w.outcome(), w.tables(), controls="none", cluster="task")
    x = np.column_stack([np.ones(400), per_sd(w.log_density)])
    beta = np.linalg.lstsq(x, w.loss, rcond=None)[0]
    scores = x * (w.loss - x @ beta)[:, None]
    error = cluster_sandwich(x, scores, np.linalg.inv(x.T @ x), w.group.astype(int))[1]
    # Twenty clusters are few: the bootstrap decides, the sandwich stands beside.
    head, row = row_of(study, "headline"), row_of(study, "headline_sandwich")
    assert head["inference"].startswith("wild cluster restricted bootstrap, 9,999 draws, Rademacher")
    assert head["estimate"] == row["estimate"] and head["std_error"] == row["std_error"]
    assert head["p_value"] < 0.001 and head["ci_low"] < beta[1] < head["ci_high"] < 0
    assert (row["covariance"], row["clusters"]) == ("cluster:task", 20)
    assert row["std_error"] == pytest.approx(error, rel=1e-9)
    assert row["p_value"] == pytest.approx(2 * stats.t.sf(abs(beta[1] / error), 19), rel=1e-8)
    assert row["ci_high"] == pytest.approx(beta[1] + stats.t.ppf(0.975, 19) * error, rel=1e-8)
    naive = row_of(study, "naive")
    assert naive["std_error"] == pytest.approx(sm.OLS(w.loss, x).fit().bse[1], rel=1e-9)


@pytest.mark.parametrize("cluster", [None, "task"])
def test_logit(cluster: str | None) -> None:
    w = world(seed=3)
    right = (w.loss < np.median(w.loss)).astype(float)
    study = regress(w.outcome(right), w.tables(), controls="none", cluster=cluster)
    x = np.column_stack([np.ones(400), per_sd(w.log_density)])
    beta = sm.Logit(right, x).fit(disp=0, tol=1e-12).params
    p = special.expit(x @ beta)
    bread = np.linalg.inv((x * (p * (1 - p))[:, None]).T @ x)
    scores = x * (right - p)[:, None]
    if cluster:
        error = cluster_sandwich(x, scores, bread, w.group.astype(int))[1]
    else:
        error = np.sqrt(np.diag(bread @ (scores.T @ scores) @ bread)[1])
    row = row_of(study, "headline_sandwich" if cluster else "headline")
    if cluster:
        assert row_of(study, "headline")["inference"].startswith("score wild bootstrap")
        assert row_of(study, "headline_linear")["p_value"] < 0.01
    assert row["covariance"] == ("cluster:task" if cluster else "HC0")
    assert row["estimate"] == pytest.approx(beta[1], abs=1e-7)
    assert row["std_error"] == pytest.approx(error, rel=1e-6)
    assert row["p_value"] == pytest.approx(2 * stats.norm.sf(abs(beta[1] / error)), rel=1e-5)


def test_results_are_those_of_statsmodels() -> None:
    w = world()
    study = regress(w.outcome(), w.tables(), w.covariates(), controls="log_tokens")
    results = study.results["headline"]
    assert "log_tokens" in results.summary().as_text()
    assert results.model.exog.shape == (400, 3)
    assert list(study.coefficients["primary"][:3]) == [True] * 3
    assert not study.coefficients["primary"][3:].any()


# --- groups ---


def test_within_is_primary_where_every_group_has_ten_rows() -> None:
    w = world(groups=8)
    study = regress(w.outcome(), w.tables(), controls="none", within="task")
    dummies = pd.get_dummies(pd.Series(w.group), dtype=float).to_numpy()
    x = np.column_stack([per_sd(w.log_density), dummies])
    beta, errors_ = hc3(x, w.loss)
    row = row_of(study, "headline")
    assert study.facts["primary"]["form"] == "within"
    assert row["estimate"] == pytest.approx(beta[0], rel=1e-9)
    assert row["std_error"] == pytest.approx(errors_[0], rel=1e-9)
    pooled = row_of(study, "headline_pooled")
    assert pooled["estimate"] == pytest.approx(np.polyfit(per_sd(w.log_density), w.loss, 1)[0], rel=1e-9)
    assert not any("task[" in term for term in study.coefficients["term"])


def test_pooled_is_primary_where_a_group_is_small() -> None:
    w = world(groups=8)
    w.group[np.flatnonzero(w.group == "0")[9:]] = "1"
    study = regress(w.outcome(), w.tables(), controls="none", within="task")
    assert study.facts["primary"]["form"] == "pooled"
    assert study.facts["counts"]["smallest_group"] == 9
    assert {"headline", "headline_within"} <= set(study.coefficients["model"])


def test_cluster_changes_the_errors_only() -> None:
    w = world()
    plain = row_of(regress(w.outcome(), w.tables()), "headline")
    clustered = row_of(regress(w.outcome(), w.tables(), cluster="task"), "headline")
    assert plain["estimate"] == pytest.approx(clustered["estimate"], rel=1e-12)
    assert plain["std_error"] != clustered["std_error"]


def test_logit_within_leaves_out_groups_of_one_outcome() -> None:
    w = world(groups=8, seed=1)
    right = (w.loss < np.median(w.loss)).astype(float)
    right[w.group == "3"] = 1.0
    study = regress(w.outcome(right), w.tables(), controls="none", within="task")
    alone = int((w.group == "3").sum())
    assert study.facts["counts"]["rows_in_groups_without_variation"] == alone
    assert study.facts["primary"]["n"] == 400 - alone
    assert study.points["fitted"].isna().sum() == alone


# --- the ladder ---


def test_ladder_against_plain_least_squares() -> None:
    w = world(n=1500)
    covariates = w.covariates().assign(unigram_cross_entropy=np.random.default_rng(5).normal(size=1500))
    study = regress(w.outcome(), w.tables(), covariates)
    entropy = covariates["unigram_cross_entropy"].to_numpy()
    path = {
        "M0": [w.length],
        "M1 + lexical": [w.length, entropy],
        "M2 + typicality": [w.length, entropy, w.typicality],
        "M3 + max cosine": [w.length, entropy, w.typicality, w.max_cosine],
        "M4 + log density": [w.length, entropy, w.typicality, w.max_cosine, w.log_density],
        "M2 + log density": [w.length, entropy, w.typicality, w.log_density],
    }
    expected = {
        step: sm.OLS(w.loss, sm.add_constant(np.column_stack(c))).fit().rsquared for step, c in path.items()
    }
    ladder = study.ladder.set_index("step")
    assert list(ladder.index) == list(path)
    assert ladder["r_squared"].to_dict() == pytest.approx(expected, abs=1e-10)
    assert ladder.loc["M4 + log density", "delta"] == pytest.approx(
        expected["M4 + log density"] - expected["M3 + max cosine"], abs=1e-10
    )
    assert ladder.loc["M2 + log density", "delta"] == pytest.approx(
        expected["M2 + log density"] - expected["M2 + typicality"], abs=1e-10
    )
    assert ladder.loc["M2 + log density", "delta"] > ladder.loc["M2 + log density", "shuffle_null"]
    assert ladder.loc["M2 + log density", "ci_low"] > 0
    assert ladder.loc["M1 + lexical", "out_of_group_delta"] < 0.005


@pytest.mark.parametrize("within", [False, True])
def test_logit_ladder_against_statsmodels(within: bool) -> None:
    w = world(groups=6)
    right = (w.loss < np.median(w.loss)).astype(float)
    effects = w.group.astype(int) if within else None
    frame = pd.DataFrame({"value": right, "a": per_sd(w.log_density), "b": per_sd(w.typicality)})
    chosen = controls.Controls([], [], [])
    path = [
        ladders._Step("M0", ["b"], None),
        ladders._Step("M1", ["b", "a"], ["b"]),
    ]
    table, _ = ladders.ladder(frame, path, binary=True, effects=effects, shuffles=200)
    dummies = pd.get_dummies(w.group, dtype=float).to_numpy()[:, 1:] if within else np.empty((400, 0))
    x = sm.add_constant(np.column_stack([frame["b"], frame["a"], dummies]))
    full = sm.Logit(right, x).fit(disp=0)
    base = sm.Logit(right, np.delete(x, 2, axis=1)).fit(disp=0)
    assert table["r_squared"][1] == pytest.approx(full.prsquared, abs=1e-8)
    assert table["delta"][1] == pytest.approx(full.prsquared - base.prsquared, abs=1e-8)
    # The score form of the shuffles' gain agrees with refits.
    fitter = ladders.fitter_of(right, effects, True)
    order = np.random.default_rng(1).permutation(400)
    shuffled = x.copy()
    shuffled[:, 2] = shuffled[order, 2]
    refit = sm.Logit(right, shuffled).fit(disp=0).prsquared - base.prsquared
    quick = fitter.null_gains(frame[["b"]].to_numpy(), frame[["a"]].to_numpy(), [order])[0]
    assert quick == pytest.approx(refit, rel=0.03)
    assert chosen.names == []


def test_out_of_group_gain_by_hand() -> None:
    w = world(n=90, groups=3)
    codes = w.group.astype(int)
    frame = pd.DataFrame({"value": w.loss, "a": per_sd(w.log_density)})
    path = [ladders._Step("M0", [], None), ladders._Step("M1", ["a"], [])]
    table, facts = ladders.ladder(frame, path, binary=False, clusters=codes, shuffles=200)
    base, full, total = np.zeros(90), np.zeros(90), np.zeros(90)
    for g in range(3):
        out = codes == g
        slope, level = np.polyfit(frame["a"][~out], w.loss[~out], 1)
        full[out] = (w.loss[out] - level - slope * frame["a"][out]) ** 2
        base[out] = total[out] = (w.loss[out] - w.loss[~out].mean()) ** 2
    gain = (base - full).sum() / total.sum()
    assert facts["left_out"] == "clusters"
    assert table["out_of_group_delta"][1] == pytest.approx(gain, abs=1e-10)
    influence = np.array([((base - full) - gain * total)[codes == g].sum() for g in range(3)])
    error = np.sqrt((influence**2).sum() * 3 / 2) / total.sum()
    assert table["ci_high"][1] == pytest.approx(gain + stats.t.ppf(0.975, 2) * error, abs=1e-10)


def test_shuffles_stay_inside_their_groups() -> None:
    groups = np.random.default_rng(0).integers(0, 7, 200)
    for order in ladders.orders_of(200, groups, 20, 0):
        assert (groups[order] == groups).all()
        assert (np.sort(order) == np.arange(200)).all()
        assert not (order == np.arange(200)).all()


def test_shuffle_null_holds_its_level() -> None:
    """Where the predictor means nothing its gain beats the 95 % point about one time in twenty."""
    rng = np.random.default_rng(7)
    beaten = 0
    for seed in range(200):
        frame = pd.DataFrame({"value": rng.normal(size=60), "a": rng.normal(size=60)})
        path = [ladders._Step("M0", [], None), ladders._Step("M1", ["a"], [])]
        table, _ = ladders.ladder(frame, path, binary=False, shuffles=200, seed=seed)
        beaten += table["delta"][1] > table["shuffle_null"][1]
    assert 2 <= beaten <= 20  # 200 × .05 = 10, ± 3 standard deviations


# --- joining ---


def test_what_does_not_join_is_counted_and_named() -> None:
    w = world()
    outcome = w.outcome().iloc[10:]
    outcome = pd.concat([outcome, pd.DataFrame({"id": ["x"], "value": [1.0], "task": ["0"]})])
    outcome.iloc[0, 1] = np.nan
    study = regress(outcome, w.tables(), w.covariates().iloc[:-5])
    counts = study.facts["counts"]
    assert counts["queries_read"] == 400
    assert counts["outcomes_read"] == 391
    assert counts["outcomes_without_query"] == 1
    assert counts["queries_without_outcome"] == 10
    assert counts["without_covariates"] == 5
    assert counts["unscored"] == 1
    assert counts["analysed"] == 384 == study.facts["primary"]["n"]
    assert study.facts["unmatched"]["outcomes"] == ["x"]
    assert study.facts["unmatched"]["queries"] == [f"q{i}" for i in range(5)]


def test_refusals() -> None:
    w = world()
    outcome, tables = w.outcome(), w.tables()
    with pytest.raises(errors.JoinError, match="'z0'"):
        regress(outcome.assign(id=[f"z{i}" for i in range(400)]), tables)
    with pytest.raises(errors.DuplicateIdError):
        regress(outcome, tables, pd.concat([w.covariates(), w.covariates()]))
    with pytest.raises(errors.ColumnError, match="no column 'subject'"):
        regress(outcome, tables, cluster="subject")
    with pytest.raises(errors.ColumnError, match="no column 'a'"):
        regress(outcome, tables, controls="a,typicality")
    with pytest.raises(errors.ColumnError, match="not a number"):
        regress(outcome.assign(kind_of="x"), tables, controls=["kind_of"])
    with pytest.raises(errors.ParameterError, match="control of itself"):
        regress(outcome, tables, controls="max_cosine", predictor="max_cosine")
    with pytest.raises(errors.ParameterError, match="one value only"):
        regress(outcome.assign(value=1.0), tables)
    with pytest.raises(errors.ParameterError, match="linear combination"):
        regress(outcome.assign(twice=2 * w.log_density + 1), tables, controls="twice")
    with pytest.raises(errors.ParameterError, match="no bandwidth 3"):
        regress(outcome, tables, bandwidth=3)
    with pytest.raises(errors.ParameterError, match="only one"):
        regress(outcome.assign(task="a"), tables, cluster="task")
    with pytest.raises(errors.ParameterError, match="too few"):
        regress(outcome.iloc[:3], tables)
    with pytest.raises(errors.WorkError, match="separates"):
        regress(w.outcome((w.log_density > -40).astype(float)), tables, controls="none")


def test_zero_density_needs_a_floor() -> None:
    w = world()
    w.log_density[7] = -np.inf
    with pytest.raises(errors.NotFiniteError, match="'q7'"):
        regress(w.outcome(), w.tables())
    study = regress(w.outcome(), w.tables(), floor=-60.0)
    assert study.points["predictor"][7] == -60.0
    assert sum(study.facts["counts"]["floored"].values()) == 1


def test_controls_default_none_and_named() -> None:
    w = world()
    covariates = w.covariates().assign(note="text", constant=3.0, again=2 * w.length)
    study = regress(w.outcome(), w.tables(), covariates)
    assert study.facts["primary"]["controls"] == ["log_tokens", "typicality"]
    assert study.facts["controls_missing"] == ["unigram_cross_entropy"]
    assert set(study.facts["controls_left_out"]) == {"note", "constant", "again"}
    assert regress(w.outcome(), w.tables(), covariates, controls="none").facts["primary"]["controls"] == []
    named = regress(w.outcome(), w.tables(), covariates, controls="typicality, log_tokens")
    assert named.facts["primary"]["controls"] == ["log_tokens", "typicality"]


def test_many_bandwidths_the_first_of_the_run_is_primary() -> None:
    w = world()
    tables = w.tables()
    wide = density_rows(w.ids, w.typicality * 2.0, 0.2, "0.2")
    tables.density = pd.concat(
        [wide, tables.density, density_rows(w.ids, w.loss, 0.3, "0.3").assign(group="a")]
    )
    tables.run["bandwidths"] = [
        {"kernel": "exponential", "bandwidth": 0.05},
        {"kernel": "exponential", "bandwidth": 0.2},
    ]
    study = regress(w.outcome(), tables, controls="none")
    assert [b["bandwidth"] for b in study.facts["bandwidths"]] == [0.05, 0.2]
    assert study.facts["primary"]["bandwidth"] == 0.05
    heads = study.coefficients[(study.coefficients["model"] == "headline")]
    assert set(heads["bandwidth"]) == {0.05, 0.2}
    assert set(heads[heads["primary"]]["bandwidth"]) == {0.05}
    wide_only = regress(w.outcome(), tables, controls="none", bandwidth=[0.2])
    assert wide_only.facts["primary"]["bandwidth"] == 0.2
    by_rule = regress(w.outcome(), tables, controls="none", bandwidth=["0.2", "ess=1000"])
    assert [b["bandwidth"] for b in by_rule.facts["bandwidths"]] == [0.2, 0.05]
    assert by_rule.facts["bandwidths"][0]["correlation"]["typicality"] == pytest.approx(1.0)


def test_repeated_texts_are_counted_and_clustered_together() -> None:
    w = world()
    text = [f"text {i % 390}" for i in range(400)]
    study = regress(w.outcome().assign(text=text), w.tables())
    assert study.facts["counts"]["repeated_texts"] == 10
    assert study.facts["primary"]["covariance"] == "cluster:text"
    assert study.facts["primary"]["clusters"] == 390
    assert any("10 of 400 rows repeat" in note for note in study.facts["notices"])


# --- words ---


def test_words_when_typicality_explains() -> None:
    rng = np.random.default_rng(0)
    w = world(n=1000)
    w.log_density = 5 * w.typicality + 0.05 * rng.normal(size=1000)
    w.max_cosine = rng.normal(size=1000)
    w.loss = -0.5 * w.typicality + rng.normal(size=1000)
    study = regress(w.outcome(), w.tables(), controls="none")
    assert study.facts["explained_by"]["typicality"]["verdict"] == "explains"
    assert study.facts["explained_by"]["max_cosine"]["verdict"] == "leaves"
    assert "ypicality explains what log density seemed to show" in study.summary()


def test_words_when_density_stands() -> None:
    w = world(n=1000)
    w.loss = -0.5 * per_sd(w.log_density) + 0.1 * w.typicality + np.random.default_rng(4).normal(size=1000)
    study = regress(w.outcome(), w.tables())
    verdicts = {c: v["verdict"] for c, v in study.facts["explained_by"].items()}
    assert verdicts["typicality"] == "leaves"
    assert "explains what log density seemed" not in study.summary()


def test_a_true_slope_is_not_explained_by_a_control_much_like_it() -> None:
    """Density and typicality correlate .95 and density does the work: its gain shrinks, its slope stays."""
    rng = np.random.default_rng(3)
    w = world(n=3000)
    w.log_density = w.typicality + 0.33 * rng.normal(size=3000)
    w.max_cosine = rng.normal(size=3000)
    w.loss = -w.log_density + 0.5 * rng.normal(size=3000)
    found = regress(w.outcome(), w.tables()).facts["explained_by"]["typicality"]
    assert found["r_squared_share_left"] < 0.15
    assert found["verdict"] == "leaves"


def test_words_when_the_nearest_text_says_it_all() -> None:
    w = world(n=2000)
    rng = np.random.default_rng(2)
    w.max_cosine = rng.normal(size=2000)
    w.log_density = w.max_cosine + 0.5 * rng.normal(size=2000)
    w.loss = -w.max_cosine + rng.normal(size=2000)
    study = regress(w.outcome(), w.tables())
    assert study.facts["explained_by"]["max_cosine"]["verdict"] == "explains"
    assert "nearest training text explains" in study.summary()


def test_a_null_is_an_interval_and_a_detectable_effect() -> None:
    w = world()
    noise = np.random.default_rng(11).normal(size=400)
    study = regress(w.outcome(noise), w.tables(), controls="none")
    text = study.facts["answer"][0]
    assert study.facts["primary"]["p_value"] > 0.05
    assert "no effect" not in study.summary()
    assert "80 % power" in text and "interval" in text and "ruled out" in text


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0.1861, "0.186"),
        (-0.0791, "−0.079"),
        (1319.0, "1,319"),
        (0.0, "0.000"),
        (12.345, "12.3"),
        (1e-7, "1.00e−07"),
        (float("nan"), "unknown"),
    ],
)
def test_numbers_in_words(x: float, text: str) -> None:
    assert words.number(x) == text


def test_p_values_in_words() -> None:
    assert [words.p_value(p) for p in (0.0014, 0.0311, 0.92, 1e-9)] == [
        "p = .0014",
        "p = .031",
        "p = .92",
        "p < .0001",
    ]


# --- files and the command line ---


def save_tables(tables: Tables, folder: Path) -> Path:
    folder.mkdir()
    tables.density.to_parquet(folder / "density.parquet")
    if tables.queries is not None:
        tables.queries.to_parquet(folder / "queries.parquet")
    (folder / "run.json").write_text(json.dumps(tables.run))
    return folder


def test_command_writes_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    w = world()
    density = save_tables(w.tables(), tmp_path / "density")
    w.outcome().to_csv(tmp_path / "o.csv", index=False)
    w.covariates().to_parquet(tmp_path / "c.parquet")
    command = ["analyze", str(density), str(tmp_path / "o.csv"), "-o", str(tmp_path / "s")]
    command += ["--outcome-value", "value", "--covariates", str(tmp_path / "c.parquet"), "--within", "task"]
    assert main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    coefficients = pq.read_table(tmp_path / "s" / "coefficients.parquet").to_pandas()
    ladder = pq.read_table(tmp_path / "s" / "ladder.parquet")
    summary = json.loads((tmp_path / "s" / "summary.json").read_text())
    assert list(coefficients.columns) == list(regression.COEFFICIENTS)
    assert ladder.column_names == list(ladders.LADDER)
    assert summary["primary"] == printed["primary"]
    assert len(summary["answer"]) == 3
    assert coefficients["estimate"][0] == summary["primary"]["estimate"]
    assert main(command) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0


def test_command_refuses_what_does_not_join(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    w = world()
    density = save_tables(w.tables(), tmp_path / "density")
    (tmp_path / "o.csv").write_text("id,value\nzz,1\nyy,2\n")
    assert main(["analyze", str(density), str(tmp_path / "o.csv"), "-o", str(tmp_path / "s"), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "JoinError"
    assert not (tmp_path / "s").exists()


# --- known answers on real data ---


@needs_data
def test_bigbench_is_an_honest_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = f"{DATA}/bigbench_pile/pythia-6.9b.csv"
    command = ["analyze", table, table, "-o", str(tmp_path / "s"), "--predictor", "max_cosine", "--json"]
    assert main([*command, "--controls", "none", "--cluster", "task", "--outcome-value", "correct"]) == 0
    facts = json.loads(capsys.readouterr().out)
    naive = facts["bandwidths"][0]["slopes"]["naive"]
    assert facts["primary"]["n"] == 1847
    assert facts["primary"]["estimate"] == pytest.approx(0.037, abs=0.0005)
    assert naive["std_error"] == pytest.approx(0.048, abs=0.0005)
    assert facts["primary"]["std_error"] == pytest.approx(0.143, abs=0.0005)
    assert facts["counts"]["repeated_texts"] == 380
    assert "80 % power" in facts["answer"][0]


@pytest.fixture(scope="module")
def gsm8k() -> Tables:
    """float64 NumPy densities of the GSM8K test questions under the training questions."""
    rows = np.load(f"{DATA}/sentences/embeddings.npy", mmap_mode="r")[:7473].astype(np.float64)
    queries = np.load(f"{DATA}/gsm8k/test_questions_minilm.npy").astype(np.float64)
    squared = (rows**2).sum(1) + (queries**2).sum(1)[:, None] - 2 * queries @ rows.T
    values = special.logsumexp(-np.sqrt(np.maximum(squared, 0)) / 0.2, axis=1) - np.log(len(rows))
    unit = queries / np.linalg.norm(queries, axis=1)[:, None]
    mean = rows.mean(0)
    near = unit @ (rows / np.linalg.norm(rows, axis=1)[:, None]).T
    ids = [str(i) for i in range(len(queries))]
    facts = pd.DataFrame(
        {"id": ids, "max_cosine": near.max(1), "typicality": unit @ mean / np.linalg.norm(mean)}
    )
    return Tables(density_rows(ids, values, 0.2, "0.2"), facts, None, {})


@needs_data
@pytest.mark.parametrize(
    ("model", "slope", "p"), [("metamath_7b", 0.186, 0.0014), ("gpt-3.5-turbo", 0.006, 0.92)]
)
def test_gsm8k_slope_without_controls(gsm8k: Tables, model: str, slope: float, p: float) -> None:
    outcome = read_outcomes(f"{DATA}/gsm8k/results/{model}.jsonl")
    study = regress(outcome, gsm8k, controls="none")
    assert study.facts["primary"]["estimate"] == pytest.approx(slope, abs=0.001)
    assert study.facts["bandwidths"][0]["slopes"]["naive"]["p_value"] == pytest.approx(p, abs=0.005)


@needs_data
def test_gsm8k_typicality_explains_metamath(gsm8k: Tables) -> None:
    outcome = read_outcomes(f"{DATA}/gsm8k/results/metamath_7b.jsonl")
    for wanted in ("none", "default"):
        study = regress(outcome, gsm8k, controls=wanted)
        found = study.facts["explained_by"]["typicality"]
        assert found["verdict"] == "explains"
        assert found["correlation"] == pytest.approx(0.995, abs=0.002)
        assert found["with"]["p_value"] > 0.5
        assert "ypicality explains what log density seemed to show" in " ".join(study.facts["answer"])
