"""The demonstration: where its text comes from, its design, its numbers, its words."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmd3.errors import FileMissingError, InputError
from lmd3.experiments import demo
from lmd3.experiments.documentation import Paragraph, paragraphs

# --- documentation ---


@pytest.fixture(scope="module")
def found() -> list[Paragraph]:
    return paragraphs(("stdlib", "numpy"))


def test_paragraphs_are_prose_of_the_packages(found: list[Paragraph]) -> None:
    assert {paragraph.group for paragraph in found} == {"stdlib", "numpy"}
    assert len(found) > 5000
    assert (
        len({paragraph.id for paragraph in found})
        == len({paragraph.text for paragraph in found})
        == len(found)
    )
    for paragraph in found:
        assert 12 <= len(paragraph.text.split()) <= 120
        assert "\n" not in paragraph.text and paragraph.id.startswith(paragraph.group + "/")
    assert not any("/tests/" in paragraph.id for paragraph in found)


def test_paragraphs_are_those_of_the_documentation_strings(found: list[Paragraph]) -> None:
    import textwrap

    expected = " ".join((ast.get_docstring(ast.parse(Path(textwrap.__file__).read_bytes())) or "").split())
    documentation = " ".join((textwrap.TextWrapper.__doc__ or "").split())
    ours = [paragraph.text for paragraph in found if paragraph.id.startswith("stdlib/textwrap.py#")]
    assert ours and any(text in documentation for text in ours)
    assert expected == "Text wrapping and filling."  # shorter than a paragraph must be
    assert expected not in ours


def test_paragraphs_are_read_without_importing() -> None:
    program = (
        "import sys\n"
        "from lmd3.experiments.documentation import paragraphs\n"
        "assert paragraphs(('statsmodels',))\n"
        "print('statsmodels' in sys.modules)\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "False" and run.stderr == ""


def test_a_missing_package_is_named() -> None:
    with pytest.raises(FileMissingError, match="nothing_of_that_name"):
        paragraphs(("nothing_of_that_name",))


# --- design ---


def made(count: int, group: str) -> list[Paragraph]:
    return [Paragraph(f"{group}/{number}", group, f"{group} {number}") for number in range(count)]


def test_split_holds_out_and_never_trains_on_the_untrained_package() -> None:
    everything = made(5000, "numpy") + made(2000, demo.UNTRAINED)
    training, held_out, unseen = demo.split(everything, np.random.default_rng(0))
    assert {paragraph.group for paragraph in unseen} == {demo.UNTRAINED}
    assert {paragraph.group for paragraph in training + held_out} == {"numpy"}
    assert sorted(paragraph.id for paragraph in training + held_out) == sorted(
        p.id for p in made(5000, "numpy")
    )
    assert abs(len(held_out) - 400) < 80 and abs(len(unseen) - 320) < 70
    assert demo.split(everything, np.random.default_rng(0)) == (training, held_out, unseen)


@settings(max_examples=30, deadline=None)
@given(st.integers(30, 1500), st.integers(0, 5))
def test_leak_assigns_every_arm_once_in_blocks_of_like_density(n: int, seed: int) -> None:
    log_density = np.random.default_rng(seed + 100).normal(size=n)
    plan = demo.plan_leak(log_density, np.random.default_rng(seed))
    size = len(demo.ARMS)
    assert len(plan.items) <= demo.LEAKED and len(plan.items) % size == 0
    assert (np.sort(plan.arms.reshape(-1, size), axis=1) == np.arange(size)).all()
    assert (np.diff(log_density[plan.items]) >= 0).all()
    used = np.concatenate([plan.items, plan.placebos])
    assert len(set(used.tolist())) == len(used)
    treated = sum(demo.ARMS[arm][1] > 0 for arm in plan.arms)
    assert treated == len(plan.placebos)


def test_too_few_paragraphs_are_refused() -> None:
    with pytest.raises(InputError, match="too few"):
        demo.plan_leak(np.zeros(15), np.random.default_rng(0))


def test_control_gets_other_texts_in_the_same_numbers() -> None:
    texts = [f"text {number} with some more words" for number in range(100)]
    plan = demo.plan_leak(np.arange(100.0), np.random.default_rng(0))
    leak, control = demo.added_texts(plan, texts, np.random.default_rng(1))
    assert len(leak) == len(control) == 10 * (len(plan.items) // 6)
    exact = [
        texts[item] for item, arm in zip(plan.items, plan.arms, strict=True) if demo.ARMS[arm] == ("exact", 4)
    ]
    assert all(leak.count(text) == 4 for text in exact)
    assert set(control) == {texts[placebo] for placebo in plan.placebos}
    assert not set(control) & {texts[item] for item in plan.items}


@given(st.lists(st.text("abc", min_size=1), min_size=1, max_size=40), st.integers(0, 9))
def test_dropped_words_leave_the_order_and_at_least_one(words: list[str], seed: int) -> None:
    kept = demo.drop_words(" ".join(words), np.random.default_rng(seed)).split()
    assert 1 <= len(kept) <= len(words)
    rest = iter(words)
    assert all(word in rest for word in kept)


def test_a_fifth_of_the_words_is_dropped() -> None:
    kept = demo.drop_words(" ".join(["word"] * 10000), np.random.default_rng(0)).split()
    assert abs(len(kept) - 8000) < 200


# --- statistics ---


def test_relation_finds_what_was_planted() -> None:
    random = np.random.default_rng(0)
    n = 20_000
    control, density, noise = random.normal(size=(3, n))
    cosine = density + 0.5 * random.normal(size=n)
    loss = control - 0.7 * density + noise
    relation = demo.relate(loss, control[:, None], 3 * density + 5, cosine, ["a", "b"] * (n // 2))
    total = 1 + 0.49 + 1
    assert relation.controls == pytest.approx(1 / total, abs=0.02)
    assert relation.density == pytest.approx(0.49 / total, abs=0.02)
    assert relation.cosine == pytest.approx(0.49 / 1.25 / total, abs=0.02)
    assert relation.density_beyond_cosine == pytest.approx(0.49 * 0.2 / total, abs=0.02)
    assert relation.slope == pytest.approx(-0.7, abs=4 * relation.std_error)
    assert relation.std_error == pytest.approx(1 / np.sqrt(n), rel=0.05)
    assert relation.slope_within is not None and abs(relation.slope_within - relation.slope) < 0.01
    assert demo.relate(loss, control[:, None], density, cosine, ["a"] * n).slope_within is None


def test_leak_reports_its_arms_in_order() -> None:
    random = np.random.default_rng(0)
    arms = np.tile(np.arange(6), 50)
    rise = np.array([{"none": 0.0, "exact": 20.0, "dropout": 10.0}[demo.ARMS[arm][0]] for arm in arms])
    rise += random.normal(size=300)
    loss = -0.05 * rise + 0.01 * random.normal(size=300)
    leak = demo.relate_leak(arms, loss, rise, 500)
    assert [(arm.kind, arm.copies, arm.n) for arm in leak.arms] == [
        ("none", 0, 100), ("dropout", 1, 50), ("dropout", 4, 50), ("exact", 1, 50), ("exact", 4, 50),
    ]  # fmt: skip
    assert leak.slope == pytest.approx(-0.05, abs=0.001) and leak.r_squared > 0.99
    assert leak.slope_dropout == pytest.approx(-0.05, abs=0.002)
    assert leak.arms[3].loss == pytest.approx(-1, abs=0.03)
    assert leak.arms[3].log_density == pytest.approx(20, abs=0.5)


# --- the whole ---


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, object], str, Path]:
    """`lmd3 demo` from another folder: its JSON, its stderr and its folder."""
    folder = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, "-m", "lmd3", "demo", "-o", "out", "--json"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout), run.stderr, folder / "out"


def test_demo_numbers_are_those_of_the_trial(ran: tuple[dict[str, dict[str, float]], str, Path]) -> None:
    """The reference figures have two digits, so ours are taken with as many."""
    result = ran[0]
    trained, untrained, leak = result["trained"], result["untrained"], result["leak"]
    for ours, theirs in (
        (trained["controls"], 0.43),
        (trained["density"], 0.30),
        (trained["cosine"], 0.35),
        (trained["density_beyond_cosine"], 0.00),
        (untrained["density"], 0.04),
        (leak["r_squared"], 0.55),
        (leak["r_squared_dropout"], 0.59),
    ):
        assert abs(round(100 * ours) - round(100 * theirs)) <= 5
    assert -0.8 < trained["slope"] < -0.55 and -0.8 < trained["slope_within"] < -0.5
    assert -0.08 < leak["slope"] < -0.03 and -0.1 < leak["slope_dropout"] < -0.03
    assert result["seconds"] <= 120


def test_demo_writes_what_it_names(ran: tuple[dict[str, object], str, Path]) -> None:
    result, _, folder = ran
    report = folder.parent / str(result["report"])
    assert report.parent == folder and "<html" in report.read_text(encoding="utf-8")
    for name in (
        "corpus.jsonl",
        "queries.jsonl",
        "corpus.lmd3/manifest.json",
        "density/density.parquet",
        "summary.txt",
    ):
        assert (folder / name).is_file()
    summary = (folder / "summary.txt").read_text(encoding="utf-8")
    assert summary.count("\n") <= 45 and max(map(len, summary.splitlines())) <= 100
    assert "does not show" in summary
    # The page holds more fixed than the first part does: the summary says so.
    found = json.loads((folder / "analysis" / "summary.json").read_text(encoding="utf-8"))["primary"]
    assert f"{found['estimate']:+.2f} ({found['ci_low']:+.2f} to {found['ci_high']:+.2f})" in summary


def test_demo_keeps_an_existing_folder(ran: tuple[dict[str, object], str, Path]) -> None:
    folder = ran[2]
    command = [sys.executable, "-m", "lmd3", "demo", "-o", str(folder)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 2
