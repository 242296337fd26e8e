"""`make claims`: its bars, its words, and a run on documentation without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lmd3.experiments import claims, claims_bars, claims_page
from lmd3.experiments.claims_bars import Bar
from lmd3.experiments.facts import OTHER_QUESTION, OTHER_STATEMENTS, make_facts


@pytest.mark.parametrize(
    ("value", "sign", "bar", "holds"),
    [(0.95, "≥", 0.95, True), (0.949, "≥", 0.95, False), (-0.5, "≤", -0.5, True), (-0.49, "≤", -0.5, False)],
)
def test_bars_hold_at_their_limit(value: float, sign: str, bar: float, holds: bool) -> None:
    assert claims_bars._bar("A", "x", value, sign, bar).holds is holds


def test_a_missing_figure_holds_no_bar() -> None:
    assert not claims_bars._bar("A", "x", float("nan"), "≥", 0.0).holds


def test_calibration_is_held_to_its_bounds() -> None:
    found = {"dose": 0.034, "density": 0.036, "spillover, naive": 0.4, "assignments": 2000}
    bars = {bar.what.split(":")[0]: bar for bar in claims_bars.calibration_bars(found)}
    assert not bars["dose"].holds and bars["density"].holds
    assert set(bars) == {"dose", "density"} and bars["dose"].wanted == "0.035 – 0.065"
    # Few draws can't show 5 % so closely.
    assert claims_bars.calibration_bars({"dose": 0.034, "assignments": 100})[0].holds


def test_tables_are_markdown_whatever_they_hold() -> None:
    text = claims_page.markdown(pd.DataFrame({"a": ["x|y\nz", None], "b": [np.nan, 0.12345]}))
    assert text.splitlines() == ["| a | b |", "|---|---|", "| x\\|y z |  |", "|  | 0.123 |"]
    bar = Bar("A", "what", "≥ 1", "0", False)
    assert "**no**" in claims_page.bars_table([bar])


def test_facts_in_other_words_tell_the_same_kind_of_facts() -> None:
    task = make_facts(background=20, items=20, seed=1, statements=OTHER_STATEMENTS, question=OTHER_QUESTION)
    assert len(task.variants.texts) == 100 and len(task.base) == 120
    assert all(prompt.startswith("Tell me the ") for prompt in task.items.prompts)
    first = make_facts(background=20, items=20, seed=0)
    assert not set(first.items.prompts) & set(task.items.prompts)
    for item, text in zip(task.variants.items, task.variants.texts, strict=True):
        assert (task.items.answers or ())[task.items.ids.index(item)] in text


def test_a_page_of_what_was_not_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LMD3_DATA", raising=False)
    options = ["--out", str(tmp_path / "o"), "--page", str(tmp_path / "claims.md"), "--page-only"]
    assert claims.main(options) == 2
    assert "checks.json" in capsys.readouterr().err and not (tmp_path / "claims.md").exists()
    monkeypatch.setenv("LMD3_DATA", str(tmp_path))
    assert claims.main(options) == 2
    assert "it has no sentences/" in capsys.readouterr().err


@pytest.mark.slow
def test_claims_on_documentation_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LMD3_DATA", raising=False)
    page = tmp_path / "claims.md"
    options = ["--out", str(tmp_path / "o"), "--page", str(page), "--model", "ngram", "--calibration", "200"]
    assert claims.main(options) == 0
    text = page.read_text(encoding="utf-8")
    print(text)
    for title in ("Claims A and B", "Accuracy", "Claim C", "Subsets", "Calibration", "Bars", "confirmed"):
        assert f"\n## {title}" in text or f"\n## What is {title}" in text, title
    assert "documentation (no LMD3_DATA)" in text and "nan" not in text.lower().split()
    page.unlink()
    assert claims.main([*options, "--page-only"]) == 0
    assert page.read_text(encoding="utf-8") == text
