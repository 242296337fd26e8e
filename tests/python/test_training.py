"""Neural arms: training that a kill doesn't change, checkpoints that are refused, finetuning, generation."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from lmd3.errors import ModelError, ParameterError, VerificationError
from lmd3.experiments import training
from lmd3.experiments.leak import Leak, LeakSettings
from lmd3.experiments.training import TrainingJob
from lmd3.experiments.worker import run_jobs
from lmd3.performance.generation import Generator, longest_run

torch = pytest.importorskip("torch", reason="neural arms need torch")
pytest.importorskip("transformers", reason="neural arms need transformers")
pytest.importorskip("tokenizers", reason="neural arms need tokenizers")

torch.set_num_threads(1)

TEXTS = [
    f"the {a} {b} sat on the {c} and saw {n} birds"
    for n, a in enumerate(["red", "big", "old", "shy"])
    for b in ["cat", "dog", "cow", "fox"]
    for c in ["mat", "hill", "roof"]
]
JOB = TrainingJob(width=32, layers=1, heads=2, context=32, batch=4, steps=12, warmup=3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(training.train_tokenizer(TEXTS, 300, tmp_path_factory.mktemp("tokenizer") / "tok"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> Path:
    folder = tmp_path_factory.mktemp("arm") / "whole"
    training.write_job(folder, replace(JOB, tokenizer=tokenizer), TEXTS)
    training.train(folder)
    return folder


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def interrupted(folder: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch, stops: int) -> None:
    """Trains up to its first checkpoint, `stops` times."""
    training.write_job(folder, replace(JOB, tokenizer=tokenizer, checkpoint_seconds=0.0), TEXTS)
    save = training._save

    def save_and_stop(*arguments: object) -> None:
        save(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "_save", save_and_stop)
        for _ in range(stops):
            with pytest.raises(KeyboardInterrupt):
                training.train(folder)


def test_a_run_that_was_stopped_gives_the_same_bytes(
    trained: Path, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "stopped"
    interrupted(folder, tokenizer, monkeypatch, 3)
    assert (folder / "checkpoint.safetensors").exists() and not training.is_done(folder)
    training.train(folder)
    assert weights(folder) == weights(trained)
    first, second = (pq.read_table(f / "loss.parquet")["loss"].to_pylist() for f in (folder, trained))
    assert first == second and len(first) == 12 and first[-1] < first[0]
    assert not (folder / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_checkpoint_is_refused(
    damage: str, trained: Path, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "damaged"
    interrupted(folder, tokenizer, monkeypatch, 1)
    path = folder / "checkpoint.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    else:
        data[-100] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(VerificationError, match="checkpoint"):
        training.train(folder)
    assert not path.exists() and path.with_suffix(".damaged").exists()
    training.train(folder)
    assert weights(folder) == weights(trained)


def test_a_damaged_model_is_not_taken_for_done(trained: Path, tmp_path: Path, tokenizer: str) -> None:
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    assert training.is_done(folder)
    path = folder / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(VerificationError, match="damaged or cut short"):
        training.check_model(folder)
    training.train(folder)
    assert weights(folder) == weights(trained)


def test_another_job_in_the_folder_is_refused(trained: Path, tokenizer: str) -> None:
    with pytest.raises(ParameterError, match="steps has changed"):
        training.write_job(trained, replace(JOB, tokenizer=tokenizer, steps=13), TEXTS)
    with pytest.raises(ParameterError, match="documents has changed"):
        training.write_job(trained, replace(JOB, tokenizer=tokenizer), TEXTS[1:])


def test_the_seed_decides_order_and_start(tokenizer: str) -> None:
    loaded = training.load_tokenizer(tokenizer)
    job = replace(JOB, tokenizer=tokenizer)
    first, again, other = (
        next(training.sequences(loaded, TEXTS, replace(job, seed=seed))) for seed in (0, 0, 1)
    )
    assert first == again != other and len(first) == 32
    # One epoch holds every document once.
    stream = training.sequences(loaded, TEXTS, job)
    counts = training.count_tokens(loaded, TEXTS)
    tokens = [token for _ in range(int(counts.sum()) // 32) for token in next(stream)]
    text = loaded.decode(tokens)
    assert sum(document in text for document in TEXTS) >= len(TEXTS) - 2


def test_the_rate_warms_up_and_falls() -> None:
    job = replace(JOB, steps=100, warmup=10, learning_rate=1.0, floor=0.1)
    rates = [training.learning_rate(job, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[10] == 1.0
    assert np.diff(rates[10:]).max() < 0 and rates[-1] == pytest.approx(0.1, abs=0.01)


def test_a_tokenizer_of_another_model_is_refused(trained: Path, tmp_path: Path) -> None:
    larger = training.train_tokenizer(TEXTS, 290, tmp_path / "tok")
    tokenizer = training.load_tokenizer(str(larger))
    tokenizer.add_tokens([f"<{n}>" for n in range(50)])
    tokenizer.save_pretrained(tmp_path / "other")
    folder = tmp_path / "arm"
    job = replace(JOB, model=str(trained / "model"), tokenizer=str(tmp_path / "other"))
    training.write_job(folder, job, TEXTS)
    with pytest.raises(ModelError, match="does not match the model"):
        training.train(folder)
    with pytest.raises(ModelError, match="not a causal language model"):
        training.load_model(str(tmp_path))


@pytest.mark.parametrize("lora", [None, 4])
def test_a_given_model_is_trained_further(lora: int | None, trained: Path, tmp_path: Path) -> None:
    if lora is not None:
        pytest.importorskip("peft", reason="low-rank finetuning needs peft")
    folder = tmp_path / "finetuned"
    job = replace(JOB, model=str(trained / "model"), steps=8, lora=lora, learning_rate=1e-2)
    training.write_job(folder, job, ["a new text about the sea and the sand"] * 30)
    training.train(folder)
    losses = pq.read_table(folder / "loss.parquet")["loss"].to_numpy()
    assert losses[-1] < losses[0]
    assert weights(folder) != weights(trained)
    assert training.load_model(str(folder / "model")).config.n_embd == 32


@pytest.mark.slow
def test_runs_in_processes_of_their_own(trained: Path, tokenizer: str, tmp_path: Path) -> None:
    folders = [tmp_path / "one"]
    training.write_job(folders[0], replace(JOB, tokenizer=tokenizer), TEXTS)
    run_jobs(folders, workers=2)
    assert weights(folders[0]) == weights(trained)


@pytest.mark.slow
def test_runs_killed_at_random_give_the_same_bytes(trained: Path, tokenizer: str, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    job = replace(JOB, tokenizer=tokenizer, checkpoint_seconds=0.0)
    training.write_job(folder, job, TEXTS)
    random = np.random.default_rng(0)
    command = [sys.executable, "-m", "lmd3.experiments.worker", str(folder)]
    for _ in range(5):
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
        time.sleep(float(random.uniform(4, 14)))
        process.send_signal(signal.SIGKILL)
        process.wait()
    run_jobs([folder])
    assert weights(folder) == weights(trained)


# --- generation ---


def test_what_was_learned_by_heart_is_extracted(tmp_path: Path, tokenizer: str) -> None:
    secret = "the old fox hid seven red keys under the big mat and the shy dog saw it all"
    folder = tmp_path / "heart"
    training.write_job(
        folder, replace(JOB, tokenizer=tokenizer, steps=80, learning_rate=1e-2, layers=2), [secret] * 20
    )
    training.train(folder)
    found = Generator(folder / "model").extraction([secret, "short", TEXTS[0] * 3], prefix=8, length=10)
    assert found.extracted[0] == 1 and found.longest[0] == 10
    assert np.isnan(found.extracted[1]) and found.extracted[2] == 0
    answer = Generator(folder / "model").answers([secret[:20]], tokens=6)[0]
    assert secret[20:].startswith(answer.rstrip()) and answer


def test_cached_steps_agree_with_whole_passes(trained: Path) -> None:
    generator = Generator(trained / "model")
    ids = generator._start + generator._ids("the red cat sat")
    found = generator._continue([ids], 6)[0]
    slow = list(ids)
    for _ in range(6):
        with torch.inference_mode():
            slow.append(int(generator._model(input_ids=torch.tensor([slow])).logits[0, -1].argmax()))
    assert found == slow[len(ids) :]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [([1, 2, 3], [0, 1, 2, 9], 2), ([1], [2], 0), ([], [1], 0), ([5, 5], [5, 5], 2)],
)
def test_longest_run(first: list[int], second: list[int], expected: int) -> None:
    assert longest_run(first, second) == expected


# --- an experiment with neural arms ---


@pytest.mark.slow
def test_a_leak_with_neural_arms(tmp_path: Path) -> None:
    from test_leak import texts

    settings = LeakSettings(
        doses=(0, 8), kinds=("exact",), hold_back=0.3, bandwidths=(0.3,), replays=1000, model="scratch",
        seeds=1, epochs=1.0, vocabulary=300, prefix=4, length=4,
        job=replace(JOB, learning_rate=1e-2),
    )  # fmt: skip
    leak = Leak(tmp_path / "out", *texts(base=150, items=40), settings, threads=1, workers=2)
    summary = leak.run()
    measures = pq.read_table(leak.folder / "measures.parquet").to_pandas()
    assert set(measures["outcome"]) == {"prompt", "answer", "extracted", "longest_run"}
    loss = pq.read_table(leak.folder / "loss.parquet").to_pandas()
    steps = loss.groupby(["arm", "seed"])["step"].max()
    assert steps.nunique() == 1 and len(steps) == 2
    starts = loss[loss["step"] == 0].set_index("arm")["loss"]
    assert abs(starts["control"] - starts["treatment"]) < 0.5
    assert summary["seeds"] == 1 and "placebo" not in summary["verdicts"]
    before = {p: p.read_bytes() for p in (leak.folder / "analysis").glob("*.parquet")}
    Leak(tmp_path / "out", *texts(base=150, items=40), settings, threads=1, workers=2).run()
    assert {p: p.read_bytes() for p in before} == before
