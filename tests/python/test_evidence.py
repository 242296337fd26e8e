"""The tables beside the headline against statsmodels, hand-worked cases and simulated truth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import statsmodels.api as sm
from scipy import special, stats
from statsmodels.stats.multitest import multipletests

from lmd3 import errors, study_files
from lmd3.analysis import (
    adjustment,
    alternatives,
    contrast,
    diagnostics,
    evidence,
    groups,
    ladder,
    measurement,
    multiplicity,
    neighborhoods,
    regress,
    subsets,
    support,
)
from lmd3.analysis.inference import decide, sandwich
from lmd3.analysis.slope import Data, slope

# --- Shapley, marginal effects ---


def test_shapley_of_two_blocks_by_hand() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=300)
    b = 0.6 * a + rng.normal(size=300)
    frame = pd.DataFrame({"value": a + b + rng.normal(size=300), "a": a, "b": b})
    r = {
        terms: sm.OLS(frame["value"], sm.add_constant(frame[list(terms)])).fit().rsquared
        for terms in (("a",), ("b",), ("a", "b"))
    }
    table = ladder.shapley(frame, [("A", ["a"]), ("B", ["b"])], binary=False).set_index("block")
    assert table.loc["A", "r_squared"] == pytest.approx((r["a",] + r["a", "b"] - r["b",]) / 2, abs=1e-10)
    assert table["r_squared"].sum() == pytest.approx(r["a", "b"], abs=1e-10)
    assert table["share"].sum() == pytest.approx(1.0)


def test_marginal_effect_and_tjur_as_statsmodels() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(500, 2))
    y = (rng.random(500) < special.expit(0.5 * x[:, 1] - 0.3 * x[:, 0])).astype(float)
    of = slope(Data(y, True), x)
    fitted = sm.Logit(y, sm.add_constant(x)).fit(disp=0, cov_type="HC0", tol=1e-12)
    margin = fitted.get_margeff()
    found = evidence.marginal_effect(of, x, None)
    assert found["average_marginal_effect"] == pytest.approx(margin.margeff[1], rel=1e-6)
    assert found["ame_std_error"] == pytest.approx(margin.margeff_se[1], rel=1e-4)
    p = fitted.predict()
    assert evidence.tjur(of) == pytest.approx(p[y == 1].mean() - p[y == 0].mean(), rel=1e-6)


# --- many looks ---


def test_max_t_is_at_least_the_plain_p_and_at_most_bonferroni() -> None:
    rng = np.random.default_rng(2)
    code = np.repeat(np.arange(60), 10)
    x = rng.normal(size=(600, 6))
    y = 0.15 * x[:, 0] + 0.5 * rng.normal(size=60)[code] + rng.normal(size=600)
    base = rng.normal(size=(600, 2))
    for clusters in (code, None):
        data = Data(y, False, None, code)
        found = multiplicity.max_t(data, base, x, clusters, None, 1999)
        plain = np.array([sandwich(slope(data, np.column_stack([base, c])), clusters).p_value for c in x.T])
        assert found.method == ("Freedman-Lane" if clusters is None else "cluster sign flips")
        assert (found.p_max_t > plain - 0.02).all()
        assert (found.p_max_t < np.minimum(1, 6 * plain) + 0.03).all()
        assert np.argmin(found.p_max_t) == 0


def test_freedman_lane_of_one_predictor_by_hand() -> None:
    rng = np.random.default_rng(3)
    x, z = rng.normal(size=(2, 80))
    y = 0.2 * x + z + rng.normal(size=80)
    found = multiplicity.max_t(Data(y, False), z[:, None], x[:, None], None, None, 4000)
    base = sm.OLS(y, sm.add_constant(z)).fit()

    def t_of(outcome: np.ndarray) -> float:
        return float(sm.OLS(outcome, sm.add_constant(np.column_stack([z, x]))).fit().tvalues[2])

    own = abs(t_of(y))
    assert abs(found.statistic[0]) == pytest.approx(own, rel=1e-8)
    draws = [abs(t_of(base.fittedvalues + rng.permutation(base.resid))) for _ in range(600)]
    assert found.p_max_t[0] == pytest.approx(np.mean(np.array(draws) >= own), abs=0.06)


def test_benjamini_yekutieli_leaves_what_is_unknown() -> None:
    p = np.array([0.001, np.nan, 0.04, 0.5])
    adjusted = multiplicity.by_fdr(p)
    assert np.isnan(adjusted[1])
    assert adjusted[[0, 2, 3]] == pytest.approx(multipletests([0.001, 0.04, 0.5], method="fdr_by")[1])


# --- groups ---


def test_random_effects_as_statsmodels() -> None:
    from statsmodels.stats.meta_analysis import combine_effects

    effect, error = np.array([0.1, 0.4, -0.2, 0.6, 0.3]), np.array([0.1, 0.2, 0.15, 0.2, 0.1])
    peer = combine_effects(effect, error**2, method_re="dl")
    found = groups.random_effects(effect, error)
    assert found["mean"] == pytest.approx(peer.mean_effect_re)
    assert found["tau"] ** 2 == pytest.approx(peer.tau2)
    assert found["q"] == pytest.approx(peer.q)
    assert found["i_squared"] == pytest.approx(peer.i2)
    assert found["prediction_low"] < found["ci_low"] < found["mean"] < found["ci_high"]


def test_slope_without_each_cluster_is_a_refit() -> None:
    rng = np.random.default_rng(4)
    code = np.repeat(np.arange(8), 25)
    x = rng.normal(size=(200, 2))
    y = x[:, 1] * 0.3 + rng.normal(size=8)[code] + rng.normal(size=200)
    for effects in (None, code):
        table = groups.left_out(slope(Data(y, False, None, effects), x), pd.Series(code), "cluster")
        for row in table.to_dict("records"):
            kept = code != int(row["name"])
            alone = None if effects is None else np.unique(code[kept], return_inverse=True)[1]
            refit = slope(Data(y[kept], False, None, alone), x[kept])
            assert row["estimate"] == pytest.approx(refit.estimate, rel=1e-8)
            assert row["n"] == 25


def test_forest_of_one_predictor_is_least_squares_in_each_group() -> None:
    rng = np.random.default_rng(5)
    code = np.repeat(np.arange(4), 50)
    x = rng.normal(size=(200, 1))
    y = (0.2 + 0.3 * code) * x[:, 0] + code + rng.normal(size=200)
    table, facts = groups.forest(slope(Data(y, False, None, code), x), pd.Series(code))
    for row in table[table["kind"] == "group"].to_dict("records"):
        at = code == int(row["group"])
        fitted = sm.OLS(y[at], sm.add_constant(x[at])).fit(cov_type="HC1")
        assert row["estimate"] == pytest.approx(fitted.params[1], rel=1e-8)
        assert row["std_error"] == pytest.approx(fitted.bse[1], rel=1e-8)
    assert facts["p_value"] < 0.05 and set(table["kind"]) == {"group", "random effects", "prediction"}


# --- measurement error ---


def test_calibrated_slope_by_hand_and_simex_near_it() -> None:
    rng = np.random.default_rng(6)
    n, sigma = 40_000, 0.5
    true, z = rng.normal(size=(2, n))
    y = 0.5 * true + z + rng.normal(size=n)
    errors_ = np.full(n, sigma)
    x = np.column_stack([z, true + sigma * rng.normal(size=n)])
    data = Data(y, False)
    of = slope(data, x)
    value = measurement.reliability(of, x, errors_)
    assert value == pytest.approx(1 / 1.25, abs=0.01)
    found = measurement.calibrated(of, x, errors_, None)
    assert of.estimate == pytest.approx(0.4, abs=0.02)
    assert found.estimate == pytest.approx(of.estimate / value, rel=1e-10)
    assert found.estimate == pytest.approx(0.5, abs=0.03)
    assert found.std_error > np.sqrt(1 / value) * sandwich(of, None).std_error
    corrected, table = measurement.simex(data, x, errors_, None, draws=5)
    assert corrected.estimate == pytest.approx(0.5, abs=0.04)
    assert list(table.columns) == study_files.SIMEX.names and table["extrapolation"].sum() == 1
    assert "exactly" in measurement.advice(0.9) and "accurate" in measurement.advice(0.99)


# --- subsets, support ---


def test_leave_one_group_out_is_exact() -> None:
    rng = np.random.default_rng(7)
    sums = subsets.Sums(["a", "b", "c"], rng.normal(size=(50, 3)), np.array([10.0, 20.0, 30.0]))
    plain = np.exp(sums.log_sums)
    assert np.exp(sums.log_density) == pytest.approx(plain.sum(1) / 60)
    assert np.exp(sums.without(1)) == pytest.approx((plain[:, 0] + plain[:, 2]) / 40)
    assert sums.shares == pytest.approx(plain / plain.sum(1, keepdims=True))


def test_the_group_that_matters_is_ranked_first() -> None:
    rng = np.random.default_rng(8)
    log_sums = rng.normal(size=(1500, 4)) + np.array([1.0, 0.0, 0.0, -1.0])
    sums = subsets.Sums(list("abcd"), log_sums, np.full(4, 100.0))
    change = sums.log_density - sums.without(2)
    y = 2.0 * (change - change.mean()) / change.std() + rng.normal(size=1500)
    table, facts = subsets.evidence(Data(y, False), np.empty((1500, 0)), sums, None)
    assert list(table.columns) == study_files.SUBSETS.names
    first = table.iloc[0]
    assert first["subset"] == "c" and first["change_p_by"] < 1e-6
    assert first["change_ci_low"] < first["change_estimate"] < first["change_ci_high"]
    assert facts["reference"] == "a" and np.isnan(table.set_index("subset").loc["a", "estimate"])
    assert table.set_index("subset").loc["c", "estimate"] > 0


def test_support_by_hand() -> None:
    found = support.support(np.array([-100.0, 0.0]), np.arange(-50.0, 50.0))
    assert found.p_value == pytest.approx([1 / 101, 52 / 101])
    assert found.unsupported.tolist() == [True, False]
    with pytest.raises(errors.ParameterError, match="too few"):
        support.support(np.zeros(3), np.zeros(5))


# --- contrasts ---


def test_contrast_of_two_models_is_the_interaction_of_one() -> None:
    rng = np.random.default_rng(9)
    n = 400
    x = rng.normal(size=(n, 2))
    item = rng.normal(size=n)
    first = (rng.random(n) < special.expit(0.5 * x[:, 1] + item)).astype(float)
    second = (rng.random(n) < special.expit(0.1 * x[:, 1] + item)).astype(float)
    table = contrast.models(
        Data(first, True), Data(second, True), x, None, ("a", "b"), None, "pooled", 999
    ).set_index(["scale", "side"])
    ones, zeros = np.ones((n, 1)), np.zeros((n, 3))
    own = np.hstack([ones, x])
    stacked = np.vstack([np.hstack([own, own]), np.hstack([own, zeros])])
    fitted = sm.Logit(np.concatenate([first, second]), stacked).fit(
        disp=0, tol=1e-12, cov_type="cluster", cov_kwds={"groups": np.tile(np.arange(n), 2)}
    )
    row = table.loc[("log odds", "a − b")]
    assert row["estimate"] == pytest.approx(fitted.params[5], rel=1e-6)
    # The factors for small samples count rows and parameters in their own ways.
    assert row["std_error"] == pytest.approx(fitted.bse[5], rel=0.01)
    paired = sm.OLS(first - second, own).fit(cov_type="HC1")
    row = table.loc[("probability", "a − b")]
    assert row["estimate"] == pytest.approx(paired.params[2], rel=1e-8)
    assert row["std_error"] == pytest.approx(paired.bse[2], rel=0.01)


# --- few clusters: the tables beside the headline are judged by its rule ---


@pytest.mark.parametrize("binary", [False, True])
def test_subsets_and_contrasts_of_few_clusters(binary: bool) -> None:
    rng = np.random.default_rng(10)
    n, g = 240, 8
    codes = np.repeat(np.arange(g), n // g)
    sums = subsets.Sums(["a", "b", "c"], rng.normal(size=(n, 3)), np.array([100.0, 80.0, 50.0]))
    level = rng.normal(size=g)[codes]
    y = [level + rng.normal(size=n) for _ in range(2)]
    if binary:
        y = [(v > 0).astype(float) for v in y]
    data, other = (Data(v, binary) for v in y)
    controls = rng.normal(size=(n, 1))
    table, _ = subsets.evidence(data, controls, sums, codes, draws=499, seed=3)
    first = table.iloc[0]
    at = sums.names.index(first["subset"])
    rest, change = sums.without(at), sums.log_density - sums.without(at)
    scaled = [(v - v.mean()) / v.std(ddof=1) for v in (rest, change)]
    design = np.column_stack([controls, *scaled])
    of = slope(data, design)
    judged = decide(of, design, sandwich(of, codes), codes, 499, 3, intervals=False)
    assert judged.few and first["change_p_value"] == pytest.approx(judged.estimate.p_value)
    assert first["change_p_value"] != pytest.approx(sandwich(of, codes).p_value, rel=1e-6)
    # The joint model: the share's slope, whichever column it is.
    shares = {name: (s - s.mean()) / s.std(ddof=1) for name, s in zip("abc", sums.shares.T, strict=True)}
    total = (sums.total - sums.total.mean()) / sums.total.std(ddof=1)
    order = [name for _, name in sorted(zip(-sums.shares.mean(axis=0), "abc", strict=True))][1:]
    for name in order:
        others = [shares[o] for o in order if o != name]
        x = np.column_stack([controls, total, *others, shares[name]])
        of = slope(data, x)
        found = decide(of, x, sandwich(of, codes), codes, 499, 3, intervals=False).estimate
        row = table.set_index("subset").loc[name]
        assert row["estimate"] == pytest.approx(found.estimate, rel=1e-6)
        assert row["p_value"] == pytest.approx(found.p_value)
    x = rng.normal(size=(n, 2))
    sides = contrast.models(data, other, x, codes, ("a", "b"), "task", "pooled", 499, 3).set_index(
        ["scale", "side"]
    )
    of = slope(data, x)
    found = decide(of, x, sandwich(of, codes), codes, 499, 3, intervals=False).estimate
    assert sides.iloc[0]["p_value"] == pytest.approx(found.p_value)
    assert any("bootstrap" in side for _, side in sides.index)


def test_counts_enter_as_logarithms() -> None:
    rng = np.random.default_rng(11)
    n = 300
    ids = [str(i) for i in range(n)]
    covariates = pd.DataFrame({"id": ids, "rarest_term_count": rng.poisson(30, n) ** 2.0})
    covariates["duplicates"] = rng.poisson(0.5, n)
    x = pd.DataFrame({"id": ids, "log_density": rng.normal(size=n)})
    y = pd.DataFrame({"id": ids, "value": rng.normal(size=n) + 0.3 * np.log1p(covariates["duplicates"])})
    study = regress(y, x, covariates, draws=199)
    logs = np.log1p(covariates[["rarest_term_count", "duplicates"]])
    columns = pd.concat(
        [(logs - logs.mean()) / logs.std(), x["log_density"] / x["log_density"].std()], axis=1
    )
    direct = sm.OLS(y["value"], sm.add_constant(columns)).fit()
    rows = study.coefficients[study.coefficients["primary"]].set_index("term")["estimate"]
    for term in ("rarest_term_count", "duplicates", "log_density"):
        assert rows[term] == pytest.approx(direct.params[term], rel=1e-8)
    assert study.facts["counts"]["log_counts"] == ["rarest_term_count", "duplicates"]
    none = regress(y, x, covariates.assign(duplicates=0), draws=199)
    assert not any("duplicates was left out" in note for note in none.facts["notices"])


def test_the_answer_names_the_controls_that_leave_nothing() -> None:
    rng = np.random.default_rng(12)
    n = 600
    ids = [str(i) for i in range(n)]
    overlap = rng.normal(size=n)
    covariates = pd.DataFrame({"id": ids, "log_tokens": rng.normal(size=n), "ngram_overlap": overlap})
    x = pd.DataFrame({"id": ids, "log_density": 0.8 * overlap + 0.6 * rng.normal(size=n)})
    y = pd.DataFrame({"id": ids, "value": overlap + 0.5 * rng.normal(size=n)})
    study = regress(y, x, covariates, draws=199)
    path = study.facts["by_controls"]
    assert [p["added"] for p in path] == [[], ["log_tokens"], ["ngram_overlap"]]
    bare = sm.OLS(y["value"], sm.add_constant(x["log_density"] / x["log_density"].std())).fit()
    assert path[0]["estimate"] == pytest.approx(bare.params["log_density"], rel=1e-8)
    assert path[-1]["estimate"] == pytest.approx(study.facts["primary"]["estimate"], rel=1e-8)
    assert "ngram overlap explains what log density seemed to show" in study.summary().replace(
        "Ngram", "ngram"
    )
    # Where a slope stays, or where there was none, nothing is said.
    true = y.assign(value=y["value"] + x["log_density"])
    none = y.assign(value=rng.normal(size=n))
    for other in (true, none):
        assert "seemed to show" not in regress(other, x, covariates, draws=199).summary()


# --- declared graphs ---


def graph(tmp_path: Path, text: str, name: str = "graph.txt") -> adjustment.Graph:
    (tmp_path / name).write_text(text)
    return adjustment.read_graph(tmp_path / name, "log_density", "loss")


def test_roles_in_a_graph(tmp_path: Path) -> None:
    of = graph(
        tmp_path,
        """typicality -> log_density   # a confounder
        typicality -> loss
        log_density -> seen -> loss
        log_density -> rank
        u -> m; u2 -> m
        """.replace("u -> m; u2 -> m", "u -> m\nu -> log_density\nu2 -> m\nu2 -> loss"),
    )
    found = adjustment.judge(of, ["typicality", "seen", "rank", "m", "else"], ["u"])
    assert found["roles"] == {
        "typicality": "confounder",
        "seen": "mediator",
        "rank": "consequence",
        "m": "collider",
        "else": "unknown",
    }
    assert set(found["refused"]) == {"seen", "rank", "m"}
    assert found["sufficient"] is True
    assert adjustment.judge(of, [], [])["missing"] == ["typicality"]
    assert adjustment.judge(of, [], [])["sufficient"] is False


def test_d_separation() -> None:
    of = adjustment.Graph((("a", "b"), ("b", "c"), ("d", "b"), ("b", "e")))
    assert not of.separated("a", "c", [])
    assert of.separated("a", "c", ["b"])
    assert of.separated("a", "d", [])
    assert not of.separated("a", "d", ["e"])


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("density ->", "a.txt", "no arrow"),
        ("density -> outcome\noutcome -> density", "a.txt", "circle"),
        ("a -> outcome", "a.txt", "no density"),
        ("{", "a.json", "JSON"),
    ],
)
def test_graphs_that_are_refused(tmp_path: Path, text: str, name: str, message: str) -> None:
    with pytest.raises(errors.InputError, match=message):
        graph(tmp_path, text, name)


# --- vectors ---


def test_kmeans_finds_blobs_and_keeps_equal_rows_together() -> None:
    rng = np.random.default_rng(10)
    centres = 10 * rng.normal(size=(5, 8))
    home = rng.integers(0, 5, 600)
    home[1] = home[0]
    rows = (centres[home] + rng.normal(size=(600, 8))).astype(np.float32)
    rows[1] = rows[0]
    codes = neighborhoods.kmeans(rows, 12, seed=0)
    assert codes[0] == codes[1]
    assert all(len(set(home[codes == c])) == 1 for c in range(codes.max() + 1))
    assert (codes == neighborhoods.kmeans(rows, 12, seed=0)).all()


def test_moran_by_hand_and_under_noise() -> None:
    rng = np.random.default_rng(11)
    rows = rng.normal(size=(300, 3))
    alike = neighborhoods.moran(rows, rows[:, 0] + 0.1 * rng.normal(size=300))
    noise = neighborhoods.moran(rows, rng.normal(size=300))
    assert alike is not None and noise is not None
    assert alike.value > 0.5 and alike.p_value < 0.01
    assert abs(noise.value) < 0.1 and noise.p_value > 0.01
    e = rows[:, 0] - rows[:, 0].mean()
    distance = ((rows[:, None] - rows[None]) ** 2).sum(-1)
    np.fill_diagonal(distance, np.inf)
    w = np.zeros((300, 300))
    for i in range(300):
        w[i, np.argsort(distance[i])[:10]] = 1
    w = np.maximum(w, w.T)
    found = neighborhoods.moran(rows, rows[:, 0])
    assert found is not None
    assert found.value == pytest.approx(300 / w.sum() * (e @ w @ e) / (e @ e), rel=1e-5)


def test_distances_of_corpora() -> None:
    rng = np.random.default_rng(12)
    a, b = rng.normal(size=(2, 200, 5))
    for of in (diagnostics.mmd, diagnostics.sliced_wasserstein):
        same, moved = of(a, b, draws=199), of(a, b + 0.7, draws=199)
        assert same["p_value"] > 0.02 and moved["p_value"] == pytest.approx(1 / 200)
        assert moved["value"] > same["value"]
    one = diagnostics.sliced_wasserstein(a[:, :1], b[:, :1], projections=3, draws=1)
    by_hand = np.sqrt(((np.sort(a[:, 0]) - np.sort(b[:, 0])) ** 2).mean())
    assert one["value"] == pytest.approx(by_hand, rel=1e-8)
    assert diagnostics.anisotropy(np.ones((5, 3))) == pytest.approx(1.0)


def test_hubs_are_counted() -> None:
    near = pd.DataFrame({"neighbor_id": list("aaaabbc"), "neighbor_group": list("xxxxyyy")})
    table, facts = diagnostics.hubness(near)
    assert table["occurrences"].tolist() == [4, 2, 1] and table["neighbor_group"][0] == "x"
    assert facts["largest"] == 4
    assert facts["skewness"] == pytest.approx(stats.skew([4, 2, 1]))


# --- a whole study ---


class World:
    """A made-up study with everything: groups of queries and of the corpus, errors, vectors."""

    def __init__(self, n: int = 300, binary: bool = False, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.ids = [f"q{i}" for i in range(n)]
        task = np.arange(n) % 6
        sums = {g: rng.normal(-10, 1, n) for g in ("web", "books")}
        total = special.logsumexp(np.column_stack(list(sums.values())), axis=1)
        rows = []
        for name, values, size in (
            (None, total, 300.0),
            ("web", sums["web"], 200.0),
            ("books", sums["books"], 100.0),
        ):
            rows.append(
                pd.DataFrame(
                    {
                        "id": self.ids, "kernel": "exponential", "bandwidth": 0.1, "rule": "ess=1000",
                        "group": name, "log_density": values - np.log(size), "kernel_sum_log": values,
                        "std_error": 0.2, "ess": 50.0, "rows_evaluated": int(size),
                    }
                )
            )  # fmt: skip
        self.density = pd.concat(rows, ignore_index=True)
        self.queries = pd.DataFrame(
            {"id": self.ids, "typicality": rng.normal(size=n), "max_cosine": rng.normal(size=n),
             "local_dimension": 9.0, "duplicates": 0}
        )  # fmt: skip
        self.neighbors = pd.DataFrame(
            {"id": self.ids, "neighbor_id": "t1", "neighbor_group": "web", "rank": 1}
        )
        self.run: dict[str, Any] = {"bandwidths": [{"kernel": "exponential", "bandwidth": 0.1}]}
        y = 1.0 * total + 0.3 * task + rng.normal(size=n)
        if binary:
            y = (y > np.median(y)).astype(float)
        self.outcome = pd.DataFrame({"id": self.ids, "value": y, "task": task.astype(str)})
        self.vectors = (self.ids, rng.normal(size=(n, 4)).astype(np.float32))
        self.corpus = rng.normal(size=(100, 4)).astype(np.float32)
        self.support = pd.DataFrame(
            {
                "id": range(50),
                "kernel": "exponential",
                "bandwidth": 0.1,
                "log_density": rng.normal(-15, 1, 50),
            }
        )


@pytest.mark.parametrize("binary", [False, True])
def test_every_table_has_its_schema_and_every_number_is_saved(tmp_path: Path, binary: bool) -> None:
    w = World(binary=binary)
    other = w.outcome.assign(value=np.roll(w.outcome["value"], 7))
    study = regress(
        w.outcome, w, within="task", cluster="task", draws=199, queries=w.vectors, corpus=w.corpus,
        support=w.support, contrast=other,
        models=["gee", "gam", *(["conditional_logit"] if binary else ["mixed", "mixed_slopes", "quantile"])],
    )  # fmt: skip
    folder = study.save(tmp_path / "s")
    for name, schema in study_files.STUDY.items():
        if name == "paired":
            continue  # of studies of changes: test_paired.py
        table = pq.read_table(folder / f"{name}.parquet")
        assert table.schema.equals(schema), name
        assert table.num_rows > 0, name
    summary = json.loads((folder / "summary.json").read_text())
    for key in ("inference", "multiplicity", "negative_controls", "heterogeneity", "measurement", "subsets",
                "support", "diagnostics", "moran", "contrast", "curvature"):  # fmt: skip
        assert summary[key], key
    assert summary["primary"]["inference"].startswith("score" if binary else "wild cluster restricted")
    assert summary["measurement"]["reliability"] == pytest.approx(0.94, abs=0.04)
    assert abs(summary["measurement"]["regression_calibration"]["estimate"]) > abs(
        summary["primary"]["estimate"]
    )
    specifications = study.tables["specifications"]
    assert specifications["primary"].sum() == 1 and specifications["p_max_t"].notna().sum() == 3
    assert {"web", "books"} <= set(specifications["subset"].dropna())
    points = study.points
    fit = sm.WLS(
        points["outcome_residual"], points["predictor_residual"], weights=points["working_weight"]
    ).fit()
    assert fit.params.iloc[0] == pytest.approx(summary["primary"]["estimate"], rel=1e-6)
    models = set(study.coefficients["model"])
    assert {"gee", "conditional_logit" if binary else "mixed"} <= models
    for model in study.results.values():
        assert type(model).__module__.startswith("statsmodels")
    assert "Beside" in study.summary()


def test_alternatives_agree_with_the_truth() -> None:
    rng = np.random.default_rng(13)
    group = pd.Series(np.repeat(np.arange(40), 20).astype(str))
    x = rng.normal(size=800)
    y = 0.4 * x + rng.normal(size=40)[group.astype(int)] + rng.normal(size=800)
    frame = pd.DataFrame({"value": y, "d": x})
    for name in ("mixed", "mixed_slopes", "gee", "quantile"):
        for fitted in alternatives.alternative(name, frame, ["d"], binary=False, groups=group).values():
            term, _, estimate = alternatives.estimates(fitted, "d")[0]
            assert term == "d" and estimate.estimate == pytest.approx(0.4, abs=0.15)
    frame["value"] = (y > 0).astype(float)
    fitted = alternatives.alternative("conditional_logit", frame, ["d"], binary=True, groups=group)
    within = slope(Data(frame["value"].to_numpy(), True, None, group.astype(int).to_numpy()), x[:, None])
    # The unconditional logit with effects is too large by about m/(m − 1).
    estimate = alternatives.estimates(fitted["conditional_logit"], "d")[0][2].estimate
    assert estimate == pytest.approx(within.estimate * 19 / 20, rel=0.03)
    with pytest.raises(errors.ParameterError, match="continuous"):
        alternatives.alternative("quantile", frame, ["d"], binary=True, groups=None)
    bent = frame.assign(value=x**2 + rng.normal(size=800))
    straight = frame.assign(value=x + rng.normal(size=800))
    assert alternatives.smooth(bent, ["d"], binary=False)[1]["p_curvature"] < 1e-6
    assert alternatives.smooth(straight, ["d"], binary=False)[1]["p_curvature"] > 0.001


def test_reference_corpus_is_taken_off(tmp_path: Path) -> None:
    w, under = World(), World(seed=1)
    study = regress(w.outcome, w, within="task", reference=under, draws=199)
    whole = w.density[w.density["group"].isna()]["log_density"].to_numpy()
    theirs = under.density[under.density["group"].isna()]["log_density"].to_numpy()
    assert study.points["predictor"].to_numpy() == pytest.approx(whole - theirs)
    assert set(study.tables["contrasts"]["side"]) == {"density less reference", "density alone"}
    under.density["bandwidth"] = 0.2
    under.run = {}
    with pytest.raises(errors.ParameterError, match="lack exponential"):
        regress(w.outcome, w, reference=under)


def test_controls_that_a_graph_forbids_are_left_out_or_said(tmp_path: Path) -> None:
    w = World()
    (tmp_path / "g.txt").write_text("density -> typicality -> outcome\ndensity -> outcome\n")
    study = regress(w.outcome, w, adjust=tmp_path / "g.txt")
    assert study.facts["primary"]["controls"] == []
    assert any("typicality is not held fixed" in note for note in study.facts["notices"])
    named = regress(w.outcome, w, adjust=tmp_path / "g.txt", controls=["typicality"])
    assert named.facts["primary"]["controls"] == ["typicality"]
    assert any("held fixed because it was named" in note for note in named.facts["notices"])


def test_shuffles_centre_on_zero_and_the_study_lies_outside() -> None:
    w = World()
    study = regress(w.outcome, w, within="task")
    found = study.facts["negative_controls"]["shuffle"]
    assert abs(found["mean"]) < 3 * found["sd"] / np.sqrt(200) + 0.01
    assert found["p_value"] == pytest.approx(1 / 201) and found["observed"] > found["high"]
