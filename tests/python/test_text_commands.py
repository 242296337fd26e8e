"""The commands `perplexity` and `covariates`, from files to files."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import lmd3
from lmd3.cli import main
from lmd3.performance.ngram import NgramModel

TRAIN = ["The cat sat on the mat.", "The dog sat on the log.", "A dog and a cat."]
TEST = ["The cat sat on the log.", "Unicorns, everywhere", "A dog"]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text("".join(json.dumps({"text": text}) + "\n" for text in TRAIN))
    rows = [
        {"id": f"t{i}", "question": text, "topic": "ab"[i % 2], "hint": "A cat."}
        for i, text in enumerate(TEST)
    ]
    test.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return train, test


def test_perplexity_writes_every_format(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    train, test = files
    options = ["--train", str(train), "--text", "question", "--train-text", "text", "--group", "topic"]
    scores = NgramModel(TRAIN).score(TEST)
    expected = np.column_stack([scores.nats / scores.tokens, scores.nats / scores.bytes]).ravel()
    found = {}
    for suffix in ("parquet", "csv", "jsonl"):
        out = test.with_name(f"out.{suffix}")
        assert main(["perplexity", str(test), "-o", str(out), "--json", *options]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["texts"] == 3 and answer["nats_per_token"] == pytest.approx(expected[::2].mean())
        run = json.loads(out.with_name(out.name + ".run.json").read_text())
        assert run["model"]["texts"] == 3 and run["input"]["text"] == "question" and run["unknown"] == 3
        found[suffix] = out
    table = pq.read_table(found["parquet"]).to_pylist()
    assert [row["value"] for row in table] == pytest.approx(expected)
    assert [(row["id"], row["group"]) for row in table[::2]] == [("t0", "a"), ("t1", "b"), ("t2", "a")]
    with found["csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["value"]) for row in rows] == [row["value"] for row in table]
    assert rows[0]["trials"] == "" and rows[1]["outcome"] == "nats_per_byte"
    assert [json.loads(line) for line in found["jsonl"].read_text().splitlines()] == table
    assert lmd3.read_outcomes(found["csv"], outcome="nats_per_token").num_rows == 3


def test_perplexity_given_a_prompt(files: tuple[Path, Path]) -> None:
    train, test = files
    out = test.with_name("out.parquet")
    command = ["perplexity", str(test), "--train", str(train), "--train-text", "text", "-o", str(out)]
    assert main([*command, "--text", "question", "--prompt", "hint"]) == 0
    scores = NgramModel(TRAIN).score(TEST, ["A cat."] * 3)
    assert pq.read_table(out)["value"].to_pylist()[::2] == pytest.approx(scores.nats / scores.tokens)


def test_refusals_write_nothing(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    train, test = files
    there = test.with_name("there.csv")
    there.write_text("mine")
    ok = ["--train", str(train), "--text", "question", "--train-text", "text"]
    cases = [
        (["-o", "out.parquet", "--text", "question"], "training texts"),
        (["-o", "out.parquet", *ok, "--model", "no/such/model"], "n-gram model only"),
        (["-o", "out.txt", *ok], "format"),
        (["-o", str(there), *ok], "exists"),
        (["-o", "out.parquet", "--train", str(train), "--text", "answer"], "answer"),
        (["-o", "out.parquet", "--train", str(train.with_name("nowhere.jsonl"))], "nowhere"),
    ]
    for arguments, message in cases:
        arguments = [str(test.with_name(a)) if a.startswith("out.") else a for a in arguments]
        assert main(["perplexity", str(test), *arguments]) == 2
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in test.parent.iterdir()) == ["test.jsonl", "there.csv", "train.jsonl"]
    assert there.read_text() == "mine"


def test_without_torch_neural_models_say_what_to_install(files: tuple[Path, Path]) -> None:
    program = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('torch', 'transformers'):\n"
        "            raise ModuleNotFoundError(name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from lmd3.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = [
        "perplexity",
        str(files[1]),
        "--text",
        "question",
        "--model",
        "gpt2",
        "-o",
        str(files[1]) + ".csv",
    ]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "not installed: torch" in done.stderr and "pip install 'lmd3[encode]'" in done.stderr


def test_covariates_of_texts_and_of_stores(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = files
    store = train.with_name("corpus.lmd3")
    lmd3.encode(lmd3.read_texts(train), out=store)
    out = train.with_name("covariates.parquet")
    options = ["--text", "question", "--group", "topic"]
    assert main(["covariates", str(store), str(test), "-o", str(out), *options]) == 0
    rows = pq.read_table(out).to_pylist()
    assert [row["id"] for row in rows] == ["t0", "t1", "t2"] and rows[1]["group"] == "b"
    assert rows[0]["unigram_cross_entropy"] < rows[1]["unigram_cross_entropy"]
    assert all(row["typicality"] is not None for row in rows)
    capsys.readouterr()

    np.save(train.with_name("bare.npy"), np.eye(3, 384, dtype=np.float32))
    out = train.with_name("bare.csv")
    assert main(["covariates", str(store), str(train.with_name("bare.npy")), "-o", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    missing = json.loads(captured.out)["missing"]
    assert set(missing) >= {"log_tokens", "unigram_cross_entropy", "ngram_overlap"}
    assert "log_tokens is null: the queries keep no texts" in captured.err


def test_covariates_that_a_user_brings(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    train, test = files
    store = train.with_name("corpus.lmd3")
    lmd3.encode(lmd3.read_texts(train), out=store)
    table = train.with_name("own.csv")
    table.write_text("id,level\nt0,1\nt1,2\nt2,3\n")
    reference = train.with_name("reference.parquet")
    assert main(["perplexity", str(test), "--text", "question", "--train", str(train), "--train-text", "text",
                 "-o", str(reference), "--quiet"]) == 0  # fmt: skip
    out = train.with_name("c.parquet")
    line = ["covariates", str(store), str(test), "-o", str(out), "--text", "question", "--force"]
    assert main([*line, "--join", str(table), "--column", "topic", "--reference", str(reference)]) == 0
    rows = pq.read_table(out).to_pylist()
    assert [row["level"] for row in rows] == [1.0, 2.0, 3.0]
    assert [row["topic"] for row in rows] == ["a", "b", "a"]
    assert all(row["reference_loss"] > 0 for row in rows)
    for option, kind in (("--column", "ColumnError"), ("--join", "FileMissingError"),
                         ("--reference", "FileMissingError")):  # fmt: skip
        capsys.readouterr()
        assert main([*line, option, "nothing", "--json"]) == 2
        assert json.loads(capsys.readouterr().out)["error"]["kind"] == kind
