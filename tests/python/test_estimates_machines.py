"""Estimates made in many places: the same tables to the byte, whoever did which range of queries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_machines import Elsewhere, tables

from lmd3 import KernelDensity, errors
from lmd3.cli import main
from lmd3.density.rounds import EXACT, FOLDER
from lmd3.executors.partials import load_part
from lmd3.index import Index
from lmd3.results import read_json
from lmd3.store import StoreWriter, open_store

QUERIES = 100


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12,000 rows in clusters, in 4 shards and 3 groups, with an index; 100 queries, some of them rows."""
    folder = tmp_path_factory.mktemp("estimates")
    rng = np.random.default_rng(7)
    centres = rng.normal(size=(40, 16))
    rows = centres[rng.integers(40, size=12_000)] + 0.4 * rng.normal(size=(12_000, 16))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    with StoreWriter(folder / "store", dtype="float16", shard_rows=3000) as writer:
        ids = [f"r{i}" for i in range(len(rows))]
        writer.append(rows, ids, groups=[f"g{i % 3}" for i in range(len(rows))])
    # The queries of the last range are copies and rows far from all: some go exact.
    queries = np.concatenate([rows[::130][:90] + 0.05 * rng.normal(size=(90, 16)), rows[:5], -rows[:5]])
    np.save(folder / "queries.npy", queries.astype(np.float32))
    Index.build(folder / "store")
    return folder


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("stratified", {"tolerance": 0.05}, {"by_group": True}),
    ("stratified", {"tolerance": "reliability=0.99"}, {}),
    ("sample", {"tolerance": 0.2}, {}),
    ("deann", {"tolerance": 0.1}, {}),
    ("knn", {}, {}),
]


def score(
    corpus: Path, method: str, given: dict[str, Any], asked: dict[str, Any], out: Path, **more: Any
) -> Path:
    kde = KernelDensity(bandwidth=[0.2, 0.3], method=method, threads=1, **given).fit(corpus / "store")
    kde.density(corpus / "queries.npy", 3, **asked, **more).save(out)
    return out


@pytest.mark.parametrize(("method", "given", "asked"), CASES)
def test_the_same_bytes(
    corpus: Path, method: str, given: dict[str, Any], asked: dict[str, Any], tmp_path: Path
) -> None:
    """All at once, in rounds here, by tasks elsewhere: only places and times differ."""
    places = ["whole", "rounds", "elsewhere"]
    whole, rounds, there = (tmp_path / name for name in places)
    score(corpus, method, given, asked, whole)
    score(corpus, method, given, asked, rounds, folder=rounds)
    elsewhere = Elsewhere()
    score(corpus, method, given, asked, there, folder=there, executor=elsewhere)
    assert tables(rounds) == tables(whole) == tables(there) and elsewhere.started > 8
    runs = [read_json(out / "run.json") for out in (whole, rounds, there)]
    assert runs[0]["approximate"] == runs[1]["approximate"] == runs[2]["approximate"]
    if method == "stratified":
        assert runs[0]["approximate"]["queries_estimated"] > 20
    work = runs[2]["work"]
    assert len(work["nodes"]) == 3 and work["executor"] == "elsewhere"


def test_a_killed_job_goes_on(corpus: Path, tmp_path: Path) -> None:
    given: tuple[Any, ...] = ("stratified", {"tolerance": 0.05}, {"by_group": True})
    whole = score(corpus, *given, tmp_path / "whole")
    out = tmp_path / "out"
    for stop in (2, 2, 2):
        failing = Elsewhere(lambda number, stop=stop: "its node is gone" if number == stop else None)
        with pytest.raises(errors.WorkError, match="its node is gone"):
            score(corpus, *given, out, folder=out, executor=failing)
    files = sorted((out / "partials" / FOLDER).glob("*.part"))
    assert files
    files[0].write_bytes(files[0].read_bytes()[:-1])
    told: list[str] = []
    again = Elsewhere()
    score(corpus, *given, out, folder=out, executor=again, notice=told.append)
    assert tables(out) == tables(whole) and any("done before" in line for line in told)
    # What is whole is not done again; what belongs to other options is not taken.
    last = Elsewhere()
    score(corpus, *given, out, folder=out, executor=last)
    assert last.started == 0 and tables(out) == tables(whole)
    with pytest.raises(errors.OtherJobError, match="estimate"):
        score(corpus, "stratified", {"tolerance": 0.06}, {"by_group": True}, out, folder=out)
    with pytest.raises(errors.OtherJobError):
        score(corpus, "exact", {}, {"by_group": True}, out, folder=out)


def test_shards_of_a_batch_system(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"

    def command(place: Path, *more: object, status: int = 0) -> Any:
        sides = ["density", corpus / "store", corpus / "queries.npy", "-o", place, "--neighbors", 3]
        options = ["--bandwidth", 0.2, "--method", "stratified", "--threads", 1, "--json", "--quiet"]
        assert main([str(word) for word in (*sides, *options, *more)]) == status
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    command(whole, "--tolerance", 0.05)
    said = [command(out, "--tolerance", 0.05, "--shard", f"{i}/3") for i in (1, 0, 2)]
    assert [found["queries"] for found in said] == [[32, 64], [0, 32], [64, 100]]
    before = {path: path.stat().st_mtime_ns for path in (out / "partials" / FOLDER).iterdir()}
    assert len(before) >= 3 * 3
    command(out, "--tolerance", 0.05)
    assert tables(out) == tables(whole)
    assert {path: path.stat().st_mtime_ns for path in (out / "partials" / FOLDER).iterdir()} == before
    assert list((out / "partials").glob(f"{EXACT}-*/*.part"))
    refused = command(tmp_path / "r", "--tolerance", "reliability=.99", "--shard", "0/3", status=2)
    assert "reliability with a shard" in refused["error"]["message"]


def test_ranges_are_named_and_other_indexes_refused(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    failing = Elsewhere(lambda number: "corpus.index: no such file" if number == 2 else None)
    with pytest.raises(errors.WorkError, match=r"pilot of queries \d+ to \d+ on node2: corpus.index"):
        score(corpus, "stratified", {"tolerance": 0.05}, {}, out, folder=out, executor=failing)
    other = Index.build(corpus / "store", tmp_path / "other", lists=33)
    with pytest.raises(errors.OtherJobError, match="index"):
        score(corpus, "stratified", {"tolerance": 0.05, "index": other.path}, {}, out, folder=out)
    store = open_store(corpus / "store")
    with pytest.raises(errors.ParameterError, match="elsewhere need files"):
        kde = KernelDensity(bandwidth=0.3, method="sample").fit(store.rows(np.arange(500)))
        kde.density(corpus / "queries.npy", executor=Elsewhere(), folder=tmp_path / "x")
    path = next((out / "partials" / FOLDER).glob("*.part"))
    assert load_part(path, {"another": "configuration"}) is None
