"""An experiment that is killed, again and again, in training and in analysis, ends with the same tables."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from lmd3.errors import OutputError
from lmd3.experiments.folder import claim_folder

SCRIPT = """
import sys
from dataclasses import replace
sys.path.insert(0, {tests!r})
from test_leak import texts
from lmd3.experiments.leak import Leak, LeakSettings
from lmd3.experiments.training import TrainingJob
import torch
torch.set_num_threads(1)
job = TrainingJob(width=32, layers=1, heads=2, context=32, batch=4, warmup=3, learning_rate=1e-2,
                  checkpoint_seconds=0.05)
settings = LeakSettings(doses=(0, 2), hold_back=0.3, bandwidths=(0.3, 0.6), replays=1000, model="scratch",
                        seeds=2, epochs=20.0, vocabulary=300, prefix=4, length=4, job=job)
Leak({folder!r}, *texts(base=300, items=60), settings, threads=1, workers=2).run()
"""


def start(folder: Path) -> subprocess.Popen[bytes]:
    script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(folder))
    return subprocess.Popen(
        [sys.executable, "-c", script], env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True
    )


def written(path: Path) -> float:
    """When a file was written last; 0 where it has gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def tables(folder: Path) -> dict[str, dict]:
    """All tables and the summary; of loss curves what does not tell the time."""
    found = {}
    for path in sorted(folder.rglob("*.parquet")):
        table = pq.read_table(path)
        if path.name == "loss.parquet":
            table = table.drop_columns(["seconds"])
        found[str(path.relative_to(folder))] = table.to_pydict()
    return found | {"summary": json.loads((folder / "analysis" / "summary.json").read_text())}


@pytest.mark.slow
def test_killed_five_times_in_training_and_analysis(tmp_path: Path) -> None:
    for package in ("torch", "transformers"):
        pytest.importorskip(package, reason="the experiment has neural arms")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 0
    random = np.random.default_rng(0)

    # Files that every run writes anew when it gets there.
    moments = [
        ("training", "arms/*/steps.txt", 1.5),
        ("training", "arms/*/steps.txt", 1.5),
        ("measuring", "arms/*/measures.parquet", 0.3),
        ("analysis", "measures.parquet", 0.3),
        ("analysis", "measures.parquet", 1.0),
    ]
    for number, (name, pattern, longest) in enumerate(moments):
        started = time.time()
        process = start(killed)
        while process.poll() is None and not any(written(p) > started for p in killed.glob(pattern)):
            time.sleep(0.01)
        time.sleep(float(random.uniform(0, longest)))
        assert process.poll() is None, f"it ended before it was killed in {name}"
        # The first time the parent alone: its training runs must end by themselves.
        if number == 0:
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (killed / "run.json").exists()
        print(f"killed in {name}; there: {sorted(p.name for p in killed.iterdir())}")
    assert start(killed).wait() == 0
    first, second = tables(whole), tables(killed)
    assert first.keys() == second.keys()
    for name, table in first.items():
        # repr: a NaN equals itself.
        assert repr(table) == repr(second[name]), name


def test_what_a_kill_left_is_continued_by_the_same_experiment_alone(tmp_path: Path) -> None:
    folder = tmp_path / "o"
    claim_folder(folder, "leak", {"seed": 0}, "texts")
    (folder / "embeddings").mkdir()
    (folder / "assignment.parquet").write_bytes(b"")
    # Killed before its plan was written.
    claim_folder(folder, "leak", {"seed": 0}, "texts")
    for command, settings, inputs, said in (
        ("leak", {"seed": 1}, "texts", "seed differ"),
        ("leak", {"seed": 0}, "others", "the texts differ"),
        ("subsets", {"seed": 0}, "texts", "it was leak"),
    ):
        with pytest.raises(OutputError, match=said):
            claim_folder(folder, command, settings, inputs)
    assert (folder / "embeddings").is_dir()
    claim_folder(folder, "leak", {"seed": 1}, "texts", force=True)
    assert [p.name for p in folder.iterdir()] == ["begun.json"]


def test_a_folder_of_something_else_is_refused_even_with_force(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    for force in (False, True):
        with pytest.raises(OutputError, match=r"holds no experiment \(thesis.tex\)"):
            claim_folder(tmp_path, "leak", {}, "texts", force=force)
    assert (tmp_path / "thesis.tex").exists()
    # A mark that was cut off is no foreign file.
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "begun.json.tmp").write_text("{")
    claim_folder(tmp_path / "cut", "leak", {}, "texts")
