"""Before and after an intervention: tests and mediation against scipy, statsmodels and truth."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as theirs
from statsmodels.stats.mediation import Mediation

from lmd3 import errors, study_files
from lmd3.analysis import mediation, paired, regress
from lmd3.cli import main
from lmd3.report import write_report


def _density(rng: np.random.Generator, ids: list[str], values: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "id": ids,
            "kernel": "exponential",
            "bandwidth": 0.1,
            "rule": "ess=100",
            "group": None,
            "log_density": values,
            "ess": 100.0,
            "std_error": 0.0,
        }
    )


def _study(n: int = 600, binary: bool = True, through: float = 0.6, seed: int = 0) -> dict[str, pd.DataFrame]:
    """Doses 0, 1, 4 inside 12 groups; density rises with dose and noise, the outcome with density."""
    rng = np.random.default_rng(seed)
    ids = [f"q{i}" for i in range(n)]
    group = np.repeat(np.arange(12), n // 12)
    dose = np.concatenate([rng.permutation(np.resize([0, 0, 1, 4], n // 12)) for _ in range(12)])
    change = 0.8 * np.log1p(dose) + 0.8 * rng.standard_normal(n)
    base = rng.standard_normal(n)
    latent = 0.8 * rng.standard_normal(12)[group] + rng.standard_normal(n)
    after = latent + through * change + 0.2 * np.log1p(dose) + 0.5 * rng.standard_normal(n)
    before = latent + 0.5 * rng.standard_normal(n)
    if binary:
        before, after = (before > 0).astype(float), (after > 0).astype(float)
    return {
        "after": pd.DataFrame({"id": ids, "value": after, "copies": dose, "group": [f"g{g}" for g in group]}),
        "before": pd.DataFrame({"id": ids, "value": before}),
        "density": _density(rng, ids, base + change),
        "density_before": _density(rng, ids, base),
    }


def test_mcnemar_is_that_of_statsmodels() -> None:
    rng = np.random.default_rng(1)
    for share in (0.1, 0.5, 0.9):
        before, after = (rng.random(80) < 0.5).astype(float), (rng.random(80) < share).astype(float)
        found = paired.mcnemar(before, after)
        table = pd.crosstab(before, after).to_numpy()
        assert found["p_value"] == pytest.approx(theirs(table, exact=True).pvalue)
        assert (found["gained"], found["lost"]) == (table[0, 1], table[1, 0])
        assert found["ci_low"] < found["estimate"] < found["ci_high"]
    assert paired.mcnemar(np.ones(5), np.ones(5)) == {"gained": 0, "lost": 0, "p_value": 1.0}


def test_sign_flips_hold_their_level_and_are_exact_for_few_clusters() -> None:
    assert paired.sign_flips(np.array([1.0, 2.0, 3.0]), 999, 0) == pytest.approx(2 / 8)
    rng = np.random.default_rng(2)
    p = np.array([paired.sign_flips(rng.standard_t(3, 20), 499, i) for i in range(600)])
    assert 0.03 < (p < 0.05).mean() < 0.075
    sums = rng.standard_normal(40) + 0.3
    assert paired.sign_flips(sums, 9_999, 0) == pytest.approx(stats.ttest_1samp(sums, 0).pvalue, abs=0.02)


def test_mediation_finds_the_truth_and_agrees_with_statsmodels() -> None:
    rng = np.random.default_rng(3)
    n, g = 3000, 60
    codes = np.repeat(np.arange(g), n // g)
    t, c = rng.integers(0, 3, n).astype(float), rng.standard_normal(n)
    m = 0.7 * t + 0.4 * c + rng.standard_normal(n)
    y = 0.5 * m + 0.3 * t - 0.2 * c + 0.5 * rng.standard_normal(g)[codes] + rng.standard_normal(n)
    controls = np.column_stack([np.ones(n), c])
    found = mediation.mediate(y, m, t, controls, codes, draws=500)
    # Against the products of coefficients of least squares.
    a = sm.OLS(m, np.column_stack([t, controls])).fit().params[0]
    fit = sm.OLS(y, np.column_stack([t, m, controls])).fit()
    assert found["indirect"][0] == pytest.approx(a * fit.params[1], rel=1e-9)
    assert found["direct"][0] == pytest.approx(fit.params[0], rel=1e-9)
    total = sm.OLS(y, np.column_stack([t, controls])).fit().params[0]
    assert found["total"][0] == pytest.approx(total, rel=1e-9)
    assert (
        found["indirect"][1] < 0.35 < found["indirect"][2] and found["direct"][1] < 0.3 < found["direct"][2]
    )
    frame = pd.DataFrame({"y": y, "m": m, "t": t, "one": 1.0, "c": c})
    np.random.seed(0)
    own = Mediation(
        sm.OLS(frame["y"], frame[["t", "m", "one", "c"]]),
        sm.OLS(frame["m"], frame[["t", "one", "c"]]),
        "t",
        "m",
    ).fit(method="parametric", n_rep=500)
    acme = own.summary().loc["ACME (average)"]
    assert found["indirect"][0] == pytest.approx(acme["Estimate"], abs=0.01)
    beside = mediation.simulated(y, m, t, controls)
    assert beside is not None and beside["indirect"] == pytest.approx(0.35, abs=0.05)
    assert mediation.simulated(y, m, t, controls) == beside  # the seed decides, not what was drawn before
    assert mediation.simulated(y, m, t, controls, seed=1) != beside
    # At ρ = 0 the sensitivity gives the estimate; at ρ̂ it vanishes.
    assert found["sensitivity"]["+0.0"] == pytest.approx(found["indirect"][0], rel=1e-6)
    assert found["rho_zero"] > 0 and found["p_value"] < 0.01
    refused = mediation.mediate(y, 2 * t + 0.01 * m, t, controls, codes)
    assert "can't be told" in refused["refused"] and "indirect" not in refused
    with pytest.raises(errors.ParameterError, match="does not vary"):
        mediation.mediate(y, m, np.ones(n), controls, codes)


def test_the_bootstrap_of_clusters_covers() -> None:
    covered = []
    for seed in range(120):
        rng = np.random.default_rng([seed, 4])
        codes = np.repeat(np.arange(50), 6)
        t = rng.integers(0, 2, 50).astype(float)[codes]
        m = 0.5 * t + 0.7 * rng.standard_normal(50)[codes] + rng.standard_normal(300)
        y = 0.6 * m + 0.7 * rng.standard_normal(50)[codes] + rng.standard_normal(300)
        found = mediation.mediate(y, m, t, np.ones((300, 1)), codes, draws=300, seed=seed)
        covered.append(found["indirect"][1] <= 0.3 <= found["indirect"][2])
    assert 0.88 <= np.mean(covered) <= 0.99


def test_a_study_of_changes() -> None:
    data = _study()
    study = regress(
        data["after"],
        data["density"],
        within="group",
        before=data["before"],
        density_before=data["density_before"],
        dose="copies",
        controls="none",
        draws=499,
    )
    of = study.facts["primary"]
    assert study.facts["outcome"] == "change of outcome" and study.facts["kind"] == "continuous"
    assert of["predictor"] == paired.CHANGE and set(of["controls"]) == {"baseline", "log_dose"}
    # The headline is Δy ~ Δlog f + log(1 + dose) + baseline + groups, as statsmodels fits it with columns.
    change = data["density"]["log_density"] - data["density_before"]["log_density"]
    groups = pd.get_dummies(data["after"]["group"], dtype=float)
    x = pd.DataFrame({"change": change / change.std(), "dose": np.log1p(data["after"]["copies"])})
    x["baseline"] = data["before"]["value"]
    y = data["after"]["value"] - data["before"]["value"]
    direct = sm.OLS(y, pd.concat([x, groups], axis=1)).fit(cov_type="HC3", use_t=True)
    assert of["estimate"] == pytest.approx(direct.params["change"], rel=1e-8)
    assert of["std_error"] == pytest.approx(direct.bse["change"], rel=1e-6) and of["p_value"] < 1e-4
    table = study.tables["paired"]
    assert list(dict.fromkeys(table["test"])) == ["mean change", "McNemar", "randomisation", "mediation"]
    assert set(table["part"]) >= {"all", "dose 0", "dose 1", "dose 4", "indirect", "direct", "total"}
    crossed = pd.crosstab(data["before"]["value"], data["after"]["value"]).to_numpy()
    row = table[(table["test"] == "McNemar") & (table["part"] == "all")].iloc[0]
    assert row["p_value"] == pytest.approx(theirs(crossed, exact=True).pvalue)
    facts = study.facts["paired"]
    assert facts["randomisation"]["p_value"] <= 0.01
    through = facts["mediation"]
    assert through["indirect"][1] > 0 and through["statsmodels"]["indirect"] == pytest.approx(
        through["indirect"][0], abs=0.02
    )
    text = study.summary()
    assert "McNemar" in text and "passes through density" in text and "change of log density" in text


def test_nothing_is_found_where_nothing_is() -> None:
    rng = np.random.default_rng(8)
    p = []
    for seed in range(200):
        n = 120
        groups = np.repeat(np.arange(6), 20)
        dose = np.concatenate([rng.permutation(np.resize([0.0, 1.0], 20)) for _ in range(6)])
        raw = pd.DataFrame({"before": (rng.random(n) < 0.5).astype(float)})
        raw["after"] = np.where(rng.random(n) < 0.7, raw["before"], 1 - raw["before"])
        raw["value"] = raw["after"] - raw["before"]
        table, _ = paired.tests(raw, True, dose, None, np.empty((n, 0)), None, groups, 199, seed)
        p.append(table[table["test"] == "randomisation"]["p_value"].iloc[0])
    assert 0.015 <= (np.array(p) <= 0.05).mean() <= 0.095


def test_by_hand_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = _study(n=240)
    for name, frame in data.items():
        if name.startswith("density"):
            (tmp_path / name).mkdir()
            frame.to_parquet(tmp_path / name / "density.parquet")
        else:
            frame.to_csv(tmp_path / f"{name}.csv", index=False)
    out = tmp_path / "study"
    command = ["analyze", str(tmp_path / "density"), str(tmp_path / "after.csv"), "-o", str(out)]
    command += ["--before", str(tmp_path / "before.csv"), "--dose", "copies", "--within", "group"]
    command += [
        "--density-before",
        str(tmp_path / "density_before"),
        "--draws",
        "199",
        "--outcome-value",
        "value",
    ]
    assert main(command) == 0
    assert "McNemar" in capsys.readouterr().out
    facts = json.loads((out / "summary.json").read_text())
    assert facts["paired"]["mediation"]["share"] > 0
    assert pq.read_table(out / "paired.parquet").schema.equals(study_files.PAIRED)
    page = write_report(out, tmp_path / "report.html").read_text()
    assert ("Before and after" in page and "McNemar" in page and "data-paired" in page) or "paired" in page
    # What makes no sense is refused before work.
    for extra, word in (
        (["--reference", str(tmp_path / "density_before")], "change"),
        (["--dose", "nothing"], "nothing"),
    ):
        assert main([*command[:4], str(tmp_path / "other"), *command[5:], *extra]) == 2
        assert word in capsys.readouterr().err
    alone = [*command[:4], str(tmp_path / "third"), "--dose", "copies", "--outcome-value", "value"]
    assert main(alone) == 2 and "--before" in capsys.readouterr().err


def test_refusals() -> None:
    data = _study(n=120)
    other = data["before"].assign(id=[f"x{i}" for i in range(120)])
    with pytest.raises(errors.JoinError, match="before"):
        regress(data["after"], data["density"], before=other)
    with pytest.raises(errors.InputError, match="two kinds"):
        regress(data["after"], data["density"], before=data["before"].assign(value=np.arange(120.0)))
    bad = data["after"].assign(copies=-1)
    with pytest.raises(errors.ColumnError, match="dose"):
        regress(bad, data["density"], before=data["before"], dose="copies")
    moved = data["density_before"].assign(bandwidth=0.2)
    with pytest.raises(errors.ParameterError, match="bandwidth"):
        regress(data["after"], data["density"], before=data["before"], density_before=moved)
