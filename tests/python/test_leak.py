"""`lmd3 leak` with the built-in model, end to end, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import lmd3
from lmd3 import experiment_files as files
from lmd3.cli import main
from lmd3.errors import ColumnError, InputError, JoinError, OutputError, ParameterError, ShapeError
from lmd3.experiments import leak_inputs
from lmd3.experiments.leak import Leak, LeakSettings
from lmd3.experiments.leak_inputs import Records, VariantTexts
from lmd3.performance import choices
from lmd3.performance.ngram import NgramModel

WORDS = [
    f"{a}{b}"
    for a in ("ba", "do", "ki", "lu", "me", "no", "pa", "ru")
    for b in ("la", "mi", "so", "te", "vu")
]


def sentence(random: np.random.Generator, length: int = 12) -> str:
    return " ".join(random.choice(WORDS, size=length))


def texts(seed: int = 0, base: int = 400, items: int = 90) -> tuple[Records, Records, VariantTexts]:
    random = np.random.default_rng(seed)
    base_records = Records(
        tuple(f"b{i}" for i in range(base)), tuple(sentence(random) for _ in range(base)), None
    )
    prompts = tuple(sentence(random) for _ in range(items))
    answers = tuple(sentence(random, 4) for _ in range(items))
    item_records = Records(tuple(f"i{i}" for i in range(items)), prompts, answers)
    changed = []
    for prompt, answer in zip(prompts, answers, strict=True):
        words = prompt.split()
        words[2], words[7] = random.choice(WORDS, size=2)
        changed.append((" ".join(words), answer))
    variants = VariantTexts(
        item_records.ids,
        ("paraphrase",) * items,
        tuple(prompt for prompt, _ in changed),
        tuple(leak_inputs.whole(*pair) for pair in changed),
    )
    return base_records, item_records, variants


SETTINGS = LeakSettings(doses=(0, 1, 4), hold_back=0.3, bandwidths=(0.3, 0.6), replays=1000)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> tuple[Leak, dict]:
    leak = Leak(tmp_path_factory.mktemp("leak") / "out", *texts(), SETTINGS, threads=1)
    return leak, leak.run()


def table(leak: Leak, name: str):
    return pq.read_table(leak.folder / name).to_pandas()


def test_the_leak_shows_in_density_and_in_loss(experiment: tuple[Leak, dict]) -> None:
    leak, summary = experiment
    cells = table(leak, "analysis/cells.parquet")
    prompt = cells[cells["outcome"] == "prompt"].set_index(["kind", "dose"])
    assert prompt.loc[("exact", 4), "mean"] < prompt.loc[("exact", 1), "mean"] < -0.5
    assert prompt.loc[("exact", 4), "effect_high"] < 0
    assert abs(prompt.loc[("held back", 0), "mean"]) < 0.1
    responses = table(leak, "analysis/responses.parquet")
    exact = responses[(responses["kind"] == "exact") & responses["primary"]].sort_values("dose")
    assert (exact["share_positive"] == 1).all() and np.diff(exact["median"]).min() > 0
    tests = table(leak, "analysis/randomisation.parquet")
    by = tests[tests["primary"]].set_index(["outcome", "test"])["p_value"]
    assert by["prompt", "density"] == by["prompt", "dose"] == pytest.approx(1 / 1001)
    assert by["placebo:prompt", "dose"] > 0.01
    assert set(summary["verdicts"]) >= {"A", "B", "beyond dose", "spillover", "placebo"}
    assert "follows" in summary["verdicts"]["B"]


def test_every_table_has_its_schema(experiment: tuple[Leak, dict]) -> None:
    leak, _ = experiment
    named = {
        "assignment": files.ASSIGNMENT,
        "slots": files.SLOTS,
        "variants": files.VARIANTS,
        "density": files.CHANGES,
        "measures": files.MEASURES,
        "analysis/cells": files.CELLS,
        "analysis/points": files.POINTS,
        "analysis/responses": files.RESPONSES,
        "analysis/slopes": files.SLOPES,
        "analysis/randomisation": files.RANDOMISATION,
        "analysis/nulls": files.NULLS,
        "analysis/spillover": files.SPILLOVER,
        "analysis/spillover_bins": files.SPILLOVER_BINS,
    }
    for name, schema in named.items():
        found = pq.read_table(leak.folder / f"{name}.parquet")
        assert found.schema.equals(schema), name
        assert found.num_rows, name


def test_density_is_that_of_the_texts_that_each_arm_read(experiment: tuple[Leak, dict]) -> None:
    from lmd3.encoders.hashing import HashingEncoder

    leak, _ = experiment
    encoder = HashingEncoder()
    encoder.fit(iter(leak.base.prompts))
    items = encoder.encode(list(leak._items.prompts)).vectors
    changes = table(leak, "density.parquet")
    prompt_of = dict(zip(leak.variants.texts, leak.variants.prompts, strict=True))

    def log_density(documents: list[str], h: float) -> np.ndarray:
        rows = encoder.encode([prompt_of.get(text, text) for text in documents]).vectors
        return lmd3.KernelDensity(bandwidth=h, normalize=False).fit(rows).score_samples(items)

    for h in (0.3, 0.6):
        found = changes[changes["bandwidth"] == h]
        treatment = log_density(leak.documents("treatment", 0), h)
        np.testing.assert_allclose(found["log_density_treatment"], treatment, atol=1e-6)
        control = np.mean([log_density(leak.documents("control", s), h) for s in range(2)], axis=0)
        np.testing.assert_allclose(found["log_density_control"], control, atol=1e-6)
        np.testing.assert_allclose(found["delta"], treatment - control, atol=2e-6)
        np.testing.assert_allclose(found["own"] + found["others"], found["delta"], atol=1e-9)
        untreated = leak.plan.design.doses[leak.plan.assigned] == 0
        assert np.abs(found["own"].to_numpy()[untreated]).max() < 1e-12


def test_arms_differ_in_the_slots_alone(experiment: tuple[Leak, dict]) -> None:
    leak, _ = experiment
    control, other, treatment = (
        leak.documents(*arm) for arm in (("control", 0), ("control", 1), ("treatment", 0))
    )
    n = len(leak.base)
    assert control[:n] == other[:n] == treatment[:n] == leak.base.texts
    assert len(control) == len(treatment) == n + leak.plan.added
    assert not set(control[n:]) & set(treatment[n:]) and not set(control[n:]) & set(leak.base.texts)
    assert not set(control[n:]) & set(other[n:])

    def multiplicities(arm: list[str]) -> list[int]:
        return [arm[n:].count(text) for text in dict.fromkeys(arm[n:])]

    assert multiplicities(control) == multiplicities(treatment)


def test_the_assignment_stands_before_any_measure(tmp_path: Path) -> None:
    leak = Leak(tmp_path / "out", *texts(), SETTINGS, threads=1)
    plan = leak.prepare()
    assert {p.name for p in leak.folder.iterdir()} == {
        "begun.json", "assignment.parquet", "slots.parquet", "variants.parquet", "plan.json", "embeddings",
    }  # fmt: skip
    rows = pq.read_table(leak.folder / "assignment.parquet")
    assert rows.num_rows == 90 and plan["cells"]["held back"] == rows["held_back"].to_pylist().count(True)
    assert plan["power"]["0.8"] > plan["power"]["0.2"]
    again = Leak(tmp_path / "again", *texts(), SETTINGS, threads=1)
    again.prepare()
    assert pq.read_table(again.folder / "assignment.parquet").equals(rows)
    other = Leak(tmp_path / "other", *texts(), replace(SETTINGS, seed=1), threads=1)
    other.prepare()
    assert not pq.read_table(other.folder / "assignment.parquet").equals(rows)


def test_the_same_command_gives_the_same_tables_and_another_is_refused(tmp_path: Path) -> None:
    leak = Leak(tmp_path / "out", *texts(), SETTINGS, threads=1)
    leak.run()
    before = {p: p.read_bytes() for p in leak.folder.rglob("*.parquet")}
    Leak(tmp_path / "out", *texts(), SETTINGS, threads=1).run()
    assert {p: p.read_bytes() for p in leak.folder.rglob("*.parquet")} == before
    with pytest.raises(OutputError, match="doses differ"):
        Leak(tmp_path / "out", *texts(), replace(SETTINGS, doses=(0, 1)), threads=1).prepare()
    with pytest.raises(OutputError, match="the texts"):
        Leak(tmp_path / "out", *texts(seed=1), SETTINGS, threads=1).prepare()
    Leak(tmp_path / "out", *texts(), replace(SETTINGS, doses=(0, 1)), threads=1, force=True).prepare()


# --- refusals ---


def test_variants_without_items_are_refused(tmp_path: Path) -> None:
    _, items, _ = texts()
    path = tmp_path / "variants.jsonl"
    path.write_text('{"id": "i0", "text": "a b"}\n{"id": "zz", "text": "c d"}\n')
    with pytest.raises(JoinError, match="1 of 2 variants belong to no item, the first to 'zz'") as caught:
        leak_inputs.read_variants(path, items)
    assert caught.value.row == 1


def test_doses_above_the_variants_are_refused_without_copies(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="a dose of 4 needs as many variants"):
        Leak(tmp_path / "o", *texts(), replace(SETTINGS, distinct=True)).prepare()


def test_items_in_the_base_are_refused_with_their_number(tmp_path: Path) -> None:
    base, items, variants = texts()
    there = tuple(f"  {items.prompts[i].upper()}!" if i < 3 else text for i, text in enumerate(base.prompts))
    with pytest.raises(InputError, match="3 of 90 items stand in the base texts already, the first is 'i0'"):
        Leak(tmp_path / "o", replace(base, prompts=there), items, variants, SETTINGS).prepare()
    allowed = replace(SETTINGS, allow_present=True)
    plan = Leak(tmp_path / "o", replace(base, prompts=there), items, variants, allowed).prepare()
    assert plan["present_in_base"] == 3


def test_too_few_items_are_refused_with_how_many_are_needed(tmp_path: Path) -> None:
    base, items, variants = texts(items=12)
    with pytest.raises(ParameterError, match=r"too few items for any power: .* takes \d+") as caught:
        Leak(tmp_path / "o", base, items, variants, SETTINGS).prepare()
    assert "at least" in str(caught.value.remedy)


def test_too_few_placebos_are_refused(tmp_path: Path) -> None:
    base, items, variants = texts()
    with pytest.raises(ParameterError, match="texts are leaked, but there are 5 placebo"):
        Leak(tmp_path / "o", base, items, variants, SETTINGS, placebo=base.take(range(5))).prepare()


def test_vectors_must_fit(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="for 3 texts"):
        leak_inputs.read_vectors(np.zeros((2, 4), np.float32), 3)
    base, items, variants = texts()
    with pytest.raises(ShapeError, match="different dimensions"):
        Leak(tmp_path / "o", replace(base, vectors=np.ones((400, 7), np.float32)), items, variants).prepare()


def test_a_repeated_answer_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    Leak(tmp_path / "o", *texts(), SETTINGS, say=said.append).prepare()
    assert any("repeat the last line" in line for line in said)


# --- the command ---


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_command_plans_and_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, items, variants = texts()
    options = [
        "--base", str(write(tmp_path / "base.jsonl", [{"text": t} for t in base.prompts])),
        "--items", str(write(tmp_path / "items.jsonl", [
            {"id": i, "prompt": p, "answer": a, "choices": [a, "x y"], "label": 0}
            for i, p, a in zip(items.ids, items.prompts, items.answers or (), strict=True)
        ])),
        "--variants", str(write(tmp_path / "variants.jsonl", [
            {"id": i, "text": t, "kind": "paraphrase"}
            for i, t in zip(variants.items, variants.prompts, strict=True)
        ])),
        "--dose", "0", "--dose", "2", "--bandwidth", ".4", "--choices", "choices", "--replays", "1000",
        "--threads", "1", "-o", str(tmp_path / "out"),
    ]  # fmt: skip
    assert main(["leak", *options, "--plan"]) == 0
    shown = capsys.readouterr().out
    assert "blocks of 4" in shown and "power" in shown and "cost" in shown
    assert main(["leak", *options, "--json"]) == 0
    assert "verdicts" in json.loads(capsys.readouterr().out)
    assert (tmp_path / "out" / "analysis" / "mcnemar.parquet").exists()
    assert main(["leak", *options, "--dose", "1"]) == 2
    assert "holds another experiment" in capsys.readouterr().err


# --- choices ---


def test_choices_by_likelihood() -> None:
    model = NgramModel(["the sky is blue", "the sky is blue today", "grass is green"])
    found = choices.score_choices(
        model, ["the sky is", "grass is"], [["blue", "green"], ["blue", "green"]], [0, 1]
    )
    assert found.correct.tolist() == [True, True] and (found.margin > 0).all()
    wrong = choices.score_choices(model, ["the sky is"], [["blue", "green"]], [1])
    assert wrong.margin[0] == -found.margin[0] and wrong.chosen[0] == 0 and not wrong.correct[0]
    tie = choices.score_choices(model, ["the sky is"], [["zzz", "yyy"]], [0])
    assert not tie.correct[0] and tie.margin[0] == 0
    for bad in ([["a"]], [["a", "a"]]):
        with pytest.raises(ParameterError):
            choices.score_choices(model, ["x"], bad, [0])


def test_choices_are_read_and_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"c": ["x", "y"], "label": "y"}, {"c": '["p", "q"]', "label": 0}])
    assert leak_inputs.read_choices(path, "c") == ((("x", "y"), ("p", "q")), (1, 0))
    path = write(tmp_path / "b.jsonl", [{"c": ["x", "y"], "label": 2}])
    with pytest.raises(ColumnError, match="none of them"):
        leak_inputs.read_choices(path, "c")
