"""The page of an experiment, and the figures it is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lmd3 import errors
from lmd3 import experiment_files as files
from lmd3.cli import main
from lmd3.report import figures, render_experiment, write_experiment

HOSTILE = "<script>alert(1)</script>"


def save(folder: Path, name: str, rows: list[dict[str, Any]], schema: Any) -> None:
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(files.as_table(pd.DataFrame(rows), schema), folder / f"{name}.parquet")


def leak(folder: Path, kinds: tuple[str, ...] = ("exact", HOSTILE)) -> Path:
    rng = np.random.default_rng(0)
    out = folder / "analysis"
    at = {"kernel": "exponential", "bandwidth": 0.1, "rule": "0.1"}
    cells = [("none", 0, 40)] + [(kind, dose, 12) for kind in kinds for dose in (1, 4)]
    save(
        out,
        "responses",
        [
            {
                "kind": k,
                "dose": d,
                "n": n,
                "median": d * 0.5,
                "ci_low": d * 0.4,
                "ci_high": d * 0.6,
                **at,
                "primary": p,
            }
            for p in (True, False)
            for k, d, n in cells
        ],
        files.RESPONSES,
    )
    save(
        out,
        "cells",
        [
            {
                "outcome": outcome,
                "kind": k,
                "dose": d,
                "n": n,
                "mean": -d,
                "ci_low": -d - 0.1,
                "ci_high": -d + 0.1,
            }
            | ({} if d == 0 else {"effect": -d * 1.0, "effect_low": -d - 0.2, "effect_high": -d + 0.2})
            for outcome in ("prompt", "placebo:prompt")
            for k, d, n in cells
        ],
        files.CELLS,
    )
    bins = {"outcome": "prompt", "focal": "held back", "ci_low": -0.1, "ci_high": 0.1, "n": 20}
    band = {"estimate": 0.0, "null_low": -0.1, "null_high": 0.1}
    save(out, "spillover_bins", [{**bins, **band, "x": x} for x in (-0.1, 0.0, 0.1)], files.SPILLOVER_BINS)
    points = [
        {"id": f"{HOSTILE}{k}{d}-{i}", "outcome": "prompt", "kind": k, "dose": d, "held_back": False,
         "delta_density": d + rng.normal(), "delta": -d + rng.normal()}
        for k, d, n in cells for i in range(n)
    ]  # fmt: skip
    save(out, "points", points, files.POINTS)
    slope = {"outcome": "prompt", "model": "overall", "sample": "all", "term": "density", "estimate": -0.75}
    save(
        out,
        "slopes",
        [{**slope, "ci_low": -0.9, "ci_high": -0.6, "p_value": 1e-5, **at, "primary": True}],
        files.SLOPES,
    )
    test = {"outcome": "prompt", "test": "density", "statistic": -0.9, "slope": -0.75, "p_value": 0.0005}
    save(
        out, "randomisation", [{**test, "replays": 1999, "n": 88, **at, "primary": True}], files.RANDOMISATION
    )
    save(
        out,
        "nulls",
        [{"outcome": "prompt", "test": "density", "statistic": float(x)} for x in rng.normal(size=300) * 0.1],
        files.NULLS,
    )
    verdicts = {"A": f"Density responds {HOSTILE}.", "B": "Performance follows."}
    summary = {"primary_outcome": "prompt", "primary_bandwidth": {"bandwidth": 0.1}, "verdicts": verdicts}
    (out / "summary.json").write_text(json.dumps(summary))
    (folder / "run.json").write_text(json.dumps({"command": "leak", "version": "0"}))
    plan = {"blocks": 12, "block_size": 6, "cells": {"none": 24, f"{HOSTILE} × 1": 12}}
    (folder / "plan.json").write_text(json.dumps(plan))
    save(
        folder,
        "loss",
        [
            {"step": s, "loss": 5 - s / 50, "arm": arm, "seed": 0}
            for arm in ("control", "treatment")
            for s in range(9)
        ],
        files.LOSS_CURVES,
    )
    return folder


def test_page_of_a_leak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = leak(tmp_path / "e")
    html = render_experiment(folder)
    assert "What does leaking texts into training do?" in html
    for name in ("response", "dose-prompt", "changes-prompt", "spillover", "placebo", "null-density", "loss"):
        assert f'data-figure="{name}"' in html and f'id="figure-{name}"' in html
    assert HOSTILE not in html and "&lt;script&gt;alert(1)" in html
    assert "12 blocks of 6" in html and "−0.750" in html and "Tests by replayed assignments" in html
    assert len(html.encode()) < 10_000_000
    assert main(["report", str(folder), "-o", str(tmp_path / "r.html"), "--json"]) == 0
    assert (tmp_path / "r.html").read_text() == html
    assert (
        main(["report", str(folder), "-o", str(tmp_path / "s.html"), "--latex", str(tmp_path / "t.tex")]) == 2
    )


def test_panels_of_files_that_are_not_there_are_left_out(tmp_path: Path) -> None:
    folder = leak(tmp_path / "e")
    for name in ("nulls", "points", "cells", "slopes", "randomisation", "responses", "spillover_bins"):
        (folder / "analysis" / f"{name}.parquet").unlink()
    (folder / "loss.parquet").unlink()
    page = write_experiment(folder, tmp_path / "r.html").read_text()
    assert "data-figure=" not in page.split("<script>")[0] and "Performance follows." in page
    with pytest.raises(errors.FileMissingError, match="no experiment"):
        render_experiment(tmp_path)


def test_pages_of_training_runs_and_of_subsets(tmp_path: Path) -> None:
    out = tmp_path / "p" / "analysis"
    estimate = {"estimate": -0.3, "ci_low": -0.4, "ci_high": -0.2, "std_error": 0.05, "primary": True}
    relation = {"sample": "trained", "effects": "within", "controls": "base + typicality", **estimate}
    save(out, "relations", [relation, {**relation, "sample": "untrained", "estimate": 0.0}], files.RELATIONS)
    group = {
        "group": "brown",
        "trained": False,
        "controls": "base",
        "estimate": -0.2,
        "std_error": 0.1,
        "primary": True,
    }
    save(out, "groups", [group], files.GROUP_SLOPES)
    difference = {"contrast": "trained − untrained", "controls": "base", "difference": -0.3, "ci_low": -0.4}
    save(out, "contrasts", [{**difference, "ci_high": -0.2, "primary": True}], files.CONTRASTS)
    save(
        out,
        "rivals",
        [{"predictor": "max_cosine", "effects": "within", "estimate": -0.1, "std_error": 0.02}],
        files.RIVALS,
    )
    score = {
        "predictor": "density",
        "score": "lds",
        "estimate": 0.4,
        "ci_low": 0.3,
        "ci_high": 0.5,
        "primary": True,
    }
    save(out, "scores", [score], files.SCORES)
    (out / "summary.json").write_text(json.dumps({"verdicts": {"C": "Loss is explained."}}))
    (tmp_path / "p" / "run.json").write_text(json.dumps({"command": "pretrain"}))
    html = render_experiment(tmp_path / "p")
    for name in ("relations", "group-slopes", "contrasts", "rivals", "scores"):
        assert f'id="figure-{name}"' in html
    assert "brown (not trained on)" in html and "Does density explain the loss" in html


def test_spillover_curve_and_empty_figures() -> None:
    bins = pd.DataFrame(
        {"x": [2.0, 1.0], "estimate": [0.2, 0.1], "ci_low": [0.1, 0.0], "ci_high": [0.3, 0.2]}
    )
    bare = figures.spillover_curve(bins, "exposure", "change")
    banded = figures.spillover_curve(bins.assign(null_low=-0.1, null_high=0.1), "exposure", "change")
    assert bare is not None and banded is not None
    assert len(banded["data"]) == len(bare["data"]) + 1
    # In the order of exposure, whatever the order of the rows.
    assert list(bare["data"][0]["x"]) == [1.0, 2.0]
    assert figures.spillover_curve(bins.head(1), "x", "y") is None
    assert figures.draws_against([1.0], 0.0, "t") is None
    assert figures.loss_curves(pd.DataFrame({"step": [], "loss": []})) is None
    nothing = pd.DataFrame({"kind": [], "dose": [], "estimate": [], "ci_low": [], "ci_high": []})
    assert figures.dose_curve(nothing, "t") is None
    assert figures.two_changes(pd.DataFrame({"x": [np.nan], "y": [1.0]}), "x", "y") is None
