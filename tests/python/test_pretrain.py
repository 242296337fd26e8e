"""`lmd3 pretrain` and `lmd3 subsets` with the built-in model, and the rivals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from lmd3 import experiment_files as files
from lmd3.cli import main
from lmd3.errors import OutputError, ParameterError
from lmd3.experiments import pretrain_analysis, subsets
from lmd3.experiments.facts import make_facts
from lmd3.experiments.leak_inputs import Records, normalised
from lmd3.experiments.pretrain import Pretrain, PretrainSettings, split
from lmd3.experiments.subsets import Subsets, SubsetSettings

GROUPS = ("ships", "plants", "songs", "stars", "stones")


def grouped(n: int = 160, seed: int = 0) -> Records:
    """Texts of five groups, each with words of its own, of sentences that repeat more or less."""
    random = np.random.default_rng(seed)
    common = [f"c{a}" for a in range(40)]
    prompts, groups = [], []
    for group in GROUPS:
        own = [f"{group}{a}" for a in range(60)]
        for _ in range(n):
            first = int(random.integers(60))
            words = [own[(first + k * k) % 60] for k in range(int(random.integers(4, 9)))]
            words += list(random.choice(common, size=5))
            prompts.append(" ".join(words))
            groups.append(group)
    return Records(tuple(f"t{i}" for i in range(len(prompts))), tuple(prompts), None, tuple(groups))


SETTINGS = PretrainSettings(
    left_out=("stars", "stones"), held_out=40, scored=60, finetune=60, bandwidths=(0.3, 0.6)
)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pretrain, dict]:
    experiment = Pretrain(tmp_path_factory.mktemp("pretrain") / "out", grouped(), SETTINGS, threads=1)
    return experiment, experiment.run()


def test_roles_do_not_overlap() -> None:
    records = grouped()
    doubled = Records(
        tuple(f"t{i}" for i in range(2 * len(records))),
        (*records.prompts, *(text.upper() + "!" for text in records.prompts)),
        None,
        (*(records.groups or ()), *(records.groups or ())),
    )
    role = split(doubled, SETTINGS)
    of = {
        name: {normalised(doubled.prompts[i]) for i, r in enumerate(role) if r == name}
        for name in ("train", "held_out", "untrained", "finetune")
    }
    assert sum(map(len, of.values())) == len(set.union(*of.values())) == sum(r is not None for r in role)
    assert len(of["held_out"]) == 120 and len(of["untrained"]) == 120 and len(of["finetune"]) == 60
    groups = {r: {(doubled.groups or ())[i] for i, x in enumerate(role) if x == r} for r in of}
    assert groups["train"] == groups["held_out"] == {"ships", "plants", "songs"}
    assert groups["untrained"] == {"stars", "stones"} and groups["finetune"] <= groups["untrained"]


def test_tables_have_their_schemas_and_the_models_differ_where_they_should(
    pretrained: tuple[Pretrain, dict],
) -> None:
    experiment, summary = pretrained
    for name, schema in {
        "relations": files.RELATIONS,
        "groups": files.GROUP_SLOPES,
        "contrasts": files.CONTRASTS,
    }.items():
        table = pq.read_table(experiment.folder / "analysis" / f"{name}.parquet")
        assert table.schema.equals(schema) and table.num_rows
    losses = summary["mean_loss"]
    assert losses["base"]["held_out"] < losses["base"]["untrained"] - 0.5
    assert losses["finetuned"]["untrained"] < losses["base"]["untrained"] - 0.5
    assert set(summary["verdicts"]) >= {"C", "untrained groups", "finetuned, after − before"}


def test_a_relation_is_that_of_statsmodels() -> None:
    import statsmodels.formula.api as smf

    random = np.random.default_rng(0)
    n = 300
    frame = pd.DataFrame({"c": random.normal(size=n), "group": random.choice(list("abc"), size=n)})
    x = 2 * random.normal(size=n) + frame["c"].to_numpy()
    frame["value"] = 0.4 * x + frame["c"] + (frame["group"] == "a") + random.normal(size=n)
    found = pretrain_analysis.relation(frame, x, ["c"], True)
    frame["x"] = (x - x.mean()) / x.std(ddof=1)
    peer = smf.ols("value ~ x + c + C(group)", frame).fit(cov_type="HC3", use_t=True)
    without = smf.ols("value ~ c + C(group)", frame).fit()
    assert found["estimate"] == pytest.approx(peer.params["x"])
    assert found["std_error"] == pytest.approx(peer.bse["x"])
    assert found["delta_r_squared"] == pytest.approx(peer.rsquared - without.rsquared)
    inside = frame["value"] - frame.groupby("group")["value"].transform("mean")
    share = (without.ssr - peer.ssr) / (inside**2).sum()
    assert found["delta_within"] == pytest.approx(share)


def test_a_pretraining_is_continued_and_others_are_refused(tmp_path: Path) -> None:
    Pretrain(tmp_path / "o", grouped(), SETTINGS, threads=1).run()
    before = {p: p.read_bytes() for p in (tmp_path / "o" / "analysis").glob("*.parquet")}
    Pretrain(tmp_path / "o", grouped(), SETTINGS, threads=1).run()
    assert {p: p.read_bytes() for p in before} == before
    with pytest.raises(OutputError, match="the texts"):
        Pretrain(tmp_path / "o", grouped(seed=1), SETTINGS).prepare()
    for bad, match in (
        (PretrainSettings(left_out=("moons",)), "no group 'moons'"),
        (PretrainSettings(), "name the groups"),
        (PretrainSettings(left_out=("stars",), held_out=100), "too few to score"),
    ):
        with pytest.raises(ParameterError, match=match):
            Pretrain(tmp_path / "p", grouped(), bad).prepare()


# --- subsets ---


def test_effects_of_a_planted_world_are_measured() -> None:
    random = np.random.default_rng(1)
    settings = SubsetSettings(models=32)
    included = subsets.draw_subsets(8, settings)
    assert (
        included.shape == (32, 8) and (included.sum(axis=0) == 16).all() and (included.sum(axis=1) == 4).all()
    )
    truth = random.normal(size=(50, 8))
    losses = 5 + included @ truth.T
    found = subsets.measured_effects(losses, included)
    np.testing.assert_allclose(found, truth - truth.mean(axis=1, keepdims=True), atol=1e-9)
    perfect = subsets.scores(losses, included, -losses)
    assert all(value == pytest.approx(1.0) for value in perfect.values())
    noise = subsets.scores(losses, included, random.normal(size=losses.shape))
    assert all(abs(value) < 0.15 for value in noise.values())
    draws = subsets.resampled(losses, included, random.normal(size=losses.shape), draws=50, seed=0)
    low, high = subsets.interval(0.0, draws["effects"])
    assert low < 0 < high and -low == high == pytest.approx(1.96 * draws["effects"].std(), rel=1e-4)


def test_leave_one_out_leaves_each_group_out_once() -> None:
    included = subsets.draw_subsets(5, SubsetSettings(design="leave-one-out"))
    assert included.shape == (6, 5) and included[0].all() and (included[1:].sum(axis=1) == 4).all()


def test_subsets_of_groups_are_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = grouped(n=60)
    settings = SubsetSettings(models=14, held_out=10, bandwidths=(0.4,), draws=40)
    experiment = Subsets(tmp_path / "o", records, settings, threads=1)
    experiment.run()
    table = pq.read_table(tmp_path / "o" / "analysis" / "scores.parquet")
    assert table.schema.equals(files.SCORES)
    rows = table.to_pandas()
    effects = rows[rows["score"] == "effects"].set_index("predictor")
    # Words of its own group are what a query needs, and what its density sees; the others rank by chance.
    assert effects.loc["density", "estimate"] > 0.3
    assert effects.loc["random", "ci_low"] < 0 < effects.loc["random", "ci_high"]
    gap = effects.loc["density", "estimate"] - effects.loc["max_cosine", "estimate"]
    assert effects.loc["density", "over_max_cosine"] == pytest.approx(gap)
    assert effects.loc["density", "over_low"] < gap < effects.loc["density", "over_high"]
    entries, said = experiment.predictors()
    chosen = experiment.included[3]
    train = [row for rows, use in zip(experiment.train_rows, chosen, strict=True) if use for row in rows]
    import lmd3

    everything = [row for rows in experiment.train_rows for row in rows]
    vectors = experiment._vectors("train", everything)
    kept = [everything.index(row) for row in train]
    direct = lmd3.KernelDensity(bandwidth=0.4, normalize=False).fit(vectors[kept])
    queries = experiment._vectors("queries", experiment.query_rows)
    np.testing.assert_allclose(said["density:0"][3], direct.score_samples(queries), atol=1e-6)
    np.testing.assert_allclose(said["max_cosine"][3], (queries @ vectors[kept].T).max(axis=1), atol=1e-5)
    assert entries[0]["bandwidth"] == 0.4


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = grouped(n=60)
    path = tmp_path / "texts.jsonl"
    rows = zip(records.ids, records.prompts, records.groups or (), strict=True)
    path.write_text("".join(json.dumps({"id": i, "text": t, "source": g}) + "\n" for i, t, g in rows))
    common = [str(path), "--group", "source", "--bandwidth", ".4", "--threads", "1"]
    assert main(["pretrain", *common, "--leave-out", "stars", "--held-out", "20", "--scored", "20",
                 "-o", str(tmp_path / "p"), "--json"]) == 0  # fmt: skip
    assert "C" in json.loads(capsys.readouterr().out)["verdicts"]
    assert (
        main(["subsets", *common, "--models", "14", "--held-out", "10", "-o", str(tmp_path / "s"), "--json"])
        == 0
    )
    assert "subsets" in json.loads(capsys.readouterr().out)["verdicts"]
    assert main(["pretrain", *common, "--leave-out", "moon", "-o", str(tmp_path / "q")]) == 2


# --- facts ---


def test_facts_are_about_different_people() -> None:
    task = make_facts(background=40, items=40)
    assert len(task.items) == 40 and len(task.base) == 240 and len(task.placebo) == 240
    assert len(task.variants.texts) == 200
    for prompt, answer, options, right in zip(
        task.items.prompts, task.items.answers or (), *task.choices, strict=True
    ):
        assert options[right] == answer and len(set(options)) == 4
        assert prompt not in task.base.prompts and prompt not in task.placebo.prompts
    for item, text in zip(task.variants.items, task.variants.texts, strict=True):
        row = task.items.ids.index(item)
        assert (task.items.answers or ())[row] in text


# --- rivals ---


@pytest.mark.slow
def test_rivals_stand_in_the_same_ladder(tmp_path: Path) -> None:
    for package in ("torch", "transformers"):
        pytest.importorskip(package, reason="rivals need a neural model")
    import torch

    from lmd3.experiments import rivals
    from lmd3.experiments.training import TrainingJob

    torch.set_num_threads(1)
    job = TrainingJob(width=32, layers=1, heads=2, context=32, batch=8, warmup=3, learning_rate=1e-2)
    settings = PretrainSettings(
        left_out=("stones",), held_out=20, scored=20, bandwidths=(0.4,), model="scratch", vocabulary=400,
        epochs=3, job=job,
    )  # fmt: skip
    experiment = Pretrain(tmp_path / "o", grouped(n=80), settings, threads=1)
    experiment.run()
    sentence = rivals.run_rivals(experiment, queries=40, k=3)
    table = pq.read_table(tmp_path / "o" / "analysis" / "rivals.parquet")
    assert table.schema.equals(files.RIVALS)
    fragments = pq.read_table(tmp_path / "o" / "analysis" / "fragments.parquet").to_pandas()
    names = ["in_context", "mirrored_influence", "log_density", "max_cosine"]
    # A model that reproduces nothing, or all, leaves nothing to explain.
    more = int(fragments["share"].dropna().nunique() > 1)
    assert table["predictor"].to_pylist() == [*names, "log_density"][: 4 + more]
    assert table["outcome"].to_pylist() == ["nats_per_token"] * 4 + ["unique_fragments"] * more
    # A training text's density leaves itself out.
    import lmd3

    vectors = experiment.vectors(experiment.train_texts, "train")
    for row, found in zip(fragments["row"][:3], fragments["log_density"][:3], strict=True):
        kde = lmd3.KernelDensity(bandwidth=0.4, normalize=False).fit(np.delete(vectors, row, axis=0))
        assert found == pytest.approx(float(kde.score_samples(vectors[row : row + 1])[0]), abs=1e-6)
    assert "in_context" in sentence and "fragments" in sentence
    # A step on a text lowers the loss of that very text, and the weights are put back.
    texts = experiment.train_texts.texts[:3]
    folder = experiment.model_folder()
    first = rivals.mirrored(folder, texts, [[text] for text in texts], rate=1e-2)
    assert (first > 0).all()
    again = rivals.mirrored(folder, [*texts, texts[0]], [[t] for t in [*texts, texts[0]]], rate=1e-2)
    assert again[0] == again[3]


def test_leakage_is_related_to_density_where_it_varies(pretrained: tuple[Pretrain, dict]) -> None:
    import pyarrow as pa

    from lmd3.experiments import rivals

    experiment, _ = pretrained
    rows = np.arange(60)
    density = np.random.default_rng(0).normal(size=60)
    table = pa.table({"row": rows, "share": 0.2 + 0.05 * density, "log_density": density})
    found = rivals.leakage(experiment, table)
    assert found is not None and found["outcome"] == "unique_fragments" and found["n"] == 60
    assert found["estimate"] == pytest.approx(0.05 * density.std(ddof=1), rel=1e-9)
    nothing = table.set_column(1, "share", pa.array(np.zeros(60)))
    assert rivals.leakage(experiment, nothing) is None
    assert rivals.leakage(experiment, table.slice(0, 9)) is None


def test_unique_fragments_are_counted_by_hand(tmp_path: Path) -> None:
    for package in ("torch", "transformers"):
        pytest.importorskip(package, reason="fragments need a neural model")
    from lmd3.experiments import rivals, training

    texts = ["a b c d e f", "a b c d x y", "q r s t u v w"] * 2
    tokenizer = training.train_tokenizer(texts, 257, tmp_path / "tok")
    job = training.TrainingJob(
        tokenizer=str(tokenizer), width=16, layers=1, heads=2, context=32, steps=2, batch=2
    )
    training.write_job(tmp_path / "m", job, texts)
    training.train(tmp_path / "m")
    # Bytes as tokens: every 4-byte fragment of a repeated text stands in two texts.
    table = rivals.unique_fragments(tmp_path / "m" / "model", texts, length=4)
    assert table["fragments"].to_pylist() == [0] * 6
    table = rivals.unique_fragments(tmp_path / "m" / "model", texts[:3], length=4).sort_by("row")
    # Of 8 places, 5 lie in the start that the first two share; of 10, none.
    assert table["fragments"].to_pylist() == [3, 3, 10]
