"""Work in many places: the same bytes however it is cut, and nothing counted twice whatever dies."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmd3 import KernelDensity
from lmd3.density.job import Job, open_job, scan_range
from lmd3.density.merge import merge
from lmd3.errors import (
    FileMissingError,
    OtherJobError,
    OutputError,
    ParameterError,
    VerificationError,
    WorkError,
)
from lmd3.executors import Done, Function, Summary, Task, Watch, make_executor, run_tasks
from lmd3.executors.jobs import files_of
from lmd3.executors.partials import Part, Writer
from lmd3.progress import silent
from lmd3.store import StoreWriter

TABLES = ("density.parquet", "queries.parquet", "neighbors.parquet", "bandwidth.json")
BANDWIDTHS = (0.3, 0.4)
SEGMENTS = 14


def tables(out: Path) -> list[bytes]:
    return [(out / name).read_bytes() for name in TABLES]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """28,000 rows in 14 shards, each a segment, in three groups; 150 queries of which 100 are rows."""
    folder = tmp_path_factory.mktemp("machines")
    generator = np.random.default_rng(1)
    rows = generator.normal(size=(2000 * SEGMENTS, 24)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    with StoreWriter(folder / "store", dtype="float16", shard_rows=2000) as writer:
        ids = [f"r{i}" for i in range(len(rows))]
        writer.append(rows, ids, groups=[f"g{i % 3}" for i in range(len(rows))])
    np.save(folder / "queries.npy", np.concatenate([rows[::280], rows[1:51] + 0.1]))
    return folder


def estimator(corpus: Path, threads: int = 1) -> KernelDensity:
    return KernelDensity(bandwidth=list(BANDWIDTHS), threads=threads).fit(corpus / "store")


def density(corpus: Path, out: Path, threads: int = 1, **options: Any) -> Path:
    kde = estimator(corpus, threads)
    kde.density(corpus / "queries.npy", 3, by_group=True, folder=out, **options).save(out)
    return out


def scan_shard(corpus: Path, out: Path, i: int, n: int, threads: int = 1) -> dict[str, Any]:
    return estimator(corpus, threads).scan_shard(corpus / "queries.npy", (i, n), out, 3, by_group=True)


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return density(corpus, tmp_path_factory.mktemp("whole") / "out")


class Elsewhere:
    """An executor that behaves like one on other machines, here: any order, values that are JSON."""

    name = "elsewhere"
    in_process = False
    slots = 3
    threads = 1

    def __init__(self, fail: Callable[[int], str | None] = lambda number: None) -> None:
        self.fail = fail
        self.started = 0

    def run(self, function: Function, tasks: Iterable[Task], watch: Watch) -> Iterator[Done]:
        assert function.__module__ and "<" not in function.__qualname__
        waiting = iter(tasks)
        while batch := list(itertools.islice(waiting, 2 * self.slots)):
            random.shuffle(batch)
            for task in batch:
                self.started += 1
                error = self.fail(self.started)
                node = f"node{self.started % self.slots}"
                value: dict[str, Any] = {}
                if error is None:
                    value, error = self.do(function, node, json.loads(json.dumps(task.arguments)))
                watch(None)
                yield Done(task, node, 0.1, json.loads(json.dumps(value)), error)

    def do(
        self, function: Function, node: str, arguments: dict[str, Any]
    ) -> tuple[dict[str, Any], str | None]:
        """What a task returned, and what it raised."""
        return function(arguments, lambda done: None), None


# --- the same bytes ---


def test_threads_and_places_do_not_matter(corpus: Path, whole: Path, tmp_path: Path) -> None:
    assert tables(density(corpus, tmp_path / "two", threads=2)) == tables(whole)
    elsewhere = Elsewhere()
    out = density(corpus, tmp_path / "elsewhere", executor=elsewhere)
    assert tables(out) == tables(whole) and elsewhere.started == SEGMENTS
    work = json.loads((out / "run.json").read_text(encoding="utf-8"))["work"]
    assert sum(node["rows"] for node in work["nodes"].values()) == 2000 * SEGMENTS
    assert sum(node["tasks"] for node in work["nodes"].values()) == SEGMENTS
    assert sum(node["bytes"] for node in work["nodes"].values()) == 2000 * SEGMENTS * 24 * 2


def test_shards_in_one_folder(corpus: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = [scan_shard(corpus, out, i, 7, threads=1 + i % 2) for i in (3, 0, 6, 2, 1, 5, 4)]
    assert tuple(found[0]["segments"]) == (6, 8)
    assert found[0]["missing"] == [(0, 6), (8, 14)] and found[-1]["missing"] == []
    merge([out]).save(out)
    assert tables(out) == tables(whole)


def test_shards_in_folders_of_their_own_that_overlap(corpus: Path, whole: Path, tmp_path: Path) -> None:
    cuts = [(0, 2), (1, 2), (2, 5), (0, 3)]
    for i, n in cuts:
        scan_shard(corpus, tmp_path / f"{i}-{n}", i, n)
    folders = [tmp_path / f"{i}-{n}" for i, n in cuts]
    for order in (folders, folders[::-1], [folders[2] / "partials", *folders[:2]]):
        merge(order).save(tmp_path / "out")
        assert tables(tmp_path / "out") == tables(whole)


def test_a_job_moves_with_its_rows(corpus: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "first")
    scan_shard(tmp_path / "first", tmp_path / "out", 0, 1)
    (tmp_path / "first").rename(tmp_path / "second")
    with pytest.raises(FileMissingError, match="first"):
        merge([tmp_path / "out"])
    place = tmp_path / "second"
    merge([tmp_path / "out"], corpus=place / "store", queries=place / "queries.npy").save(tmp_path / "out")
    assert tables(tmp_path / "out") == tables(whole)


def test_queries_in_memory_travel_with_the_job(corpus: Path, whole: Path, tmp_path: Path) -> None:
    queries = np.load(corpus / "queries.npy")
    kde = estimator(corpus)
    wanted = kde.density(queries, 3, by_group=True, exclude_within=0.5)
    kde.scan_shard(queries, (0, 2), tmp_path, 3, by_group=True, exclude_within=0.5)
    job = open_job(tmp_path / "partials")
    assert np.array_equal(job.queries, queries)
    scan_range({"folder": str(tmp_path / "partials"), "start": 0, "end": 14, "threads": 1}, print)
    assert merge([tmp_path]).density.equals(wanted.density)
    with pytest.raises(ParameterError, match="elsewhere need files"):
        KernelDensity(bandwidth=0.3).fit(queries).density(queries, executor=Elsewhere(), folder=tmp_path)


# --- what dies and what breaks ---


@pytest.fixture(scope="module")
def parts(corpus: Path, whole: Path) -> tuple[Job, list[list[Part]]]:
    """The job, and the parts of each of its segments."""
    job = open_job(whole / "partials")
    found: list[list[Part]] = [[] for _ in range(SEGMENTS)]
    job.scanner.scan_parts(
        job.queries,
        job.pairs,
        0,
        SEGMENTS,
        lambda part: found[int(part["place"][0])].append(part),
        job.asked,
        lambda done, total: None,
    )
    return job, found


# What may happen to a folder: a worker writes segments [start, end) and ends, is killed before it closes its
# file, or its file is damaged later.
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["ends", "killed", "damaged", "cut short"]),
        st.integers(0, SEGMENTS - 1),
        st.integers(1, SEGMENTS),
        st.sampled_from([0.0, 1e9]),
        st.integers(0, 10**6),
    ),
    max_size=10,
)


@settings(max_examples=25, deadline=None)
@given(EVENTS)
def test_whatever_happened_the_run_ends_right(
    corpus: Path,
    whole: Path,
    parts: tuple[Job, list[list[Part]]],
    tmp_path_factory: pytest.TempPathFactory,
    events: list[tuple[str, int, int, float, int]],
) -> None:
    job, found = parts
    out = tmp_path_factory.mktemp("events") / "out"
    shutil.copytree(whole / "partials", out / "partials", ignore=shutil.ignore_patterns("*.part"))
    folder = out / "partials"
    for kind, start, length, seconds, at in events:
        writer = Writer(folder, job.configuration(SEGMENTS), len(job.queries), seconds)
        for segment in range(start, min(SEGMENTS, start + length)):
            for part in found[segment]:
                writer.add(part)
        if kind != "killed":
            writer._seal()
        written = files_of(folder)
        if kind in ("damaged", "cut short") and written:
            path = written[at % len(written)].path
            content = bytearray(path.read_bytes())
            if kind == "damaged" and content:
                content[at % len(content)] ^= 1 + at % 255
            else:
                content = content[: at % max(1, len(content))]
            path.write_bytes(content)
    assert tables(density(corpus, out, executor=Elsewhere())) == tables(whole)


def test_failed_tasks_are_named_and_what_ended_is_kept(corpus: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    failing = Elsewhere(lambda number: "shard-00003: no such file" if number == 2 else None)
    with pytest.raises(WorkError, match=r"segments \d+ of 14 on node2: shard-00003: no such file"):
        density(corpus, out, executor=failing)
    assert not (out / "run.json").exists()
    # Those that ran with it were waited for; no other was begun.
    assert failing.started == 6 and len(files_of(out / "partials")) == 5
    again = Elsewhere()
    assert tables(density(corpus, out, executor=again)) == tables(whole)
    assert again.started == SEGMENTS - 5


def test_a_shard_that_is_not_there_is_named(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "copy")
    scan_shard(tmp_path / "copy", tmp_path / "out", 0, 2)
    gone = sorted((tmp_path / "copy" / "store").glob("embeddings-*.npy"))[9]
    gone.unlink()
    arguments = {"folder": str(tmp_path / "out" / "partials"), "start": 9, "end": 10, "threads": 1}
    with pytest.raises((FileMissingError, VerificationError), match=gone.name):
        scan_range(arguments, print)


class OneNodeLacks(Elsewhere):
    """An executor whose node 1 sees another folder in the store's place: its tasks run in processes of their
    own, in a mount namespace where that folder lies over the store."""

    def __init__(self, lacking: Path, store: Path) -> None:
        super().__init__()
        self.places = (lacking, store)

    def do(
        self, function: Function, node: str, arguments: dict[str, Any]
    ) -> tuple[dict[str, Any], str | None]:
        if node != "node1":
            return super().do(function, node, arguments)
        program = (
            "import importlib, json, sys\n"
            "module, name, arguments = json.loads(sys.argv[1])\n"
            "function = getattr(importlib.import_module(module), name)\n"
            "try:\n    print(json.dumps(function(arguments, print)))\n"
            "except Exception as error:\n    sys.exit(str(error))\n"
        )
        order = json.dumps([function.__module__, function.__qualname__, arguments])
        script = 'mount --bind "$1" "$2" && exec "$3" -c "$4" "$5"'
        command = ["unshare", "-m", "sh", "-c", script, "node", *map(str, self.places), sys.executable]
        done = subprocess.run([*command, program, order], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return {}, done.stderr.strip()
        return dict(json.loads(done.stdout.splitlines()[-1])), None


def test_a_shard_is_missing_on_one_node(corpus: Path, whole: Path, tmp_path: Path) -> None:
    """The others go on with what they have; the error names the segments, the node and the file."""
    try:
        subprocess.run(["unshare", "-m", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no mount namespaces here: {error}")
    store = corpus / "store"
    lacking = tmp_path / "store"
    shutil.copytree(store, lacking)
    gone = sorted(lacking.glob("embeddings-*.npy"))[9].name
    (lacking / gone).unlink()
    out = tmp_path / "out"
    with pytest.raises(WorkError, match=rf"segments \d+ of 14 on node1: .*{re.escape(gone)}") as caught:
        density(corpus, out, executor=OneNodeLacks(lacking, store))
    assert "node0" not in str(caught.value) and not (out / "run.json").exists()
    assert len(files_of(out / "partials")) >= 3
    # Where the node sees the whole store it is a node like any other, and what is there is not done again.
    assert tables(density(corpus, out, executor=OneNodeLacks(store, store))) == tables(whole)


def other_level(whole: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line on a machine that has the portable level only."""
    if json.loads((whole / "run.json").read_text(encoding="utf-8"))["simd"] == "portable":
        pytest.skip("this CPU has the portable level only")
    environment = {**os.environ, "LMD3_SIMD": "portable"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_another_level_or_version_is_refused(corpus: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "partials", tmp_path / "partials")
    arguments = {"folder": str(tmp_path / "partials"), "start": 0, "end": 1, "threads": 1}
    job = json.loads((tmp_path / "partials" / "job.json").read_text(encoding="utf-8"))
    job["work"]["version"] = "0.0.0"
    (tmp_path / "partials" / "job.json").write_text(json.dumps(job), encoding="utf-8")
    with pytest.raises(WorkError, match=r"begun by 0\.0\.0"):
        scan_range(arguments, print)
    program = "import sys; from pathlib import Path; from lmd3.density.job import open_job; "
    done = other_level(whole, "-c", program + "open_job(Path(sys.argv[1]))", whole / "partials")
    assert "SIMD level portable, the job at" in done.stderr and "LMD3_SIMD" in done.stderr


# --- merging ---


def test_mixed_configurations_are_refused(corpus: Path, tmp_path: Path) -> None:
    scan_shard(corpus, tmp_path / "a", 0, 2)
    other = KernelDensity(bandwidth=[0.3, 0.5], threads=1).fit(corpus / "store")
    other.scan_shard(corpus / "queries.npy", (1, 2), tmp_path / "b", 3, by_group=True)
    for allow in (False, True):
        with pytest.raises(OutputError, match=r"bandwidths: .*0\.4.* then, .*0\.5"):
            merge([tmp_path / "a", tmp_path / "b"], allow_mixed=allow)
    with pytest.raises(OtherJobError, match="bandwidths"):
        scan_shard(corpus, tmp_path / "b", 0, 2)


def test_mixed_levels_are_merged_on_demand(corpus: Path, whole: Path, tmp_path: Path) -> None:
    scan_shard(corpus, tmp_path / "a", 0, 2)
    level = json.loads((whole / "run.json").read_text(encoding="utf-8"))["simd"]
    sides = (corpus / "store", corpus / "queries.npy", "-o", tmp_path / "b", "--neighbors", 3, "--by-group")
    bandwidths = [option for h in BANDWIDTHS for option in ("--bandwidth", h)]
    done = other_level(whole, "-m", "lmd3", "density", *sides, *bandwidths, "--shard", "1/2")
    assert done.returncode == 0, done.stderr
    with pytest.raises(OutputError, match="--allow-mixed"):
        merge([tmp_path / "a", tmp_path / "b"])
    told: list[str] = []
    table = merge([tmp_path / "a", tmp_path / "b"], allow_mixed=True, notice=told.append)
    assert table.run["simd"] == "+".join(sorted([level, "portable"])) and "different simd" in told[0]
    exact = merge([whole]).density["log_density"].to_numpy()
    assert np.abs(table.density["log_density"].to_numpy() - exact).max() < 1e-4


def test_mixed_precisions_are_merged_on_demand(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    rows = generator.normal(size=(4000, 64)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    with StoreWriter(tmp_path / "store", dtype="float16", shard_rows=500) as writer:
        writer.append(rows)
    queries = rows[::40] + 0.05 * generator.normal(size=(100, 64)).astype(np.float32)
    np.save(tmp_path / "queries.npy", queries)

    def kde(precision: str) -> KernelDensity:
        return KernelDensity(bandwidth=0.1, threads=1, precision=precision).fit(tmp_path / "store")

    for i, precision in enumerate(("float32", "int16")):
        kde(precision).scan_shard(tmp_path / "queries.npy", (i, 2), tmp_path / precision, 3)
    both = [tmp_path / "float32", tmp_path / "int16"]
    with pytest.raises(OutputError, match=r"precision: .*float32.* then, .*int16") as caught:
        merge(both)
    assert "--allow-mixed" in str(caught.value.remedy)
    told: list[str] = []
    table = merge(both, allow_mixed=True, notice=told.append)
    assert "different precision: float32, int16" in told[0] and told[0] in table.run["notices"]
    assert table.run["precision"] == "float32+int16"
    assert set(table.density["precision"].to_pylist()) == {"float32+int16"}
    exact = kde("float32").density(queries, 3).density["log_density"].to_numpy()
    found = table.density["log_density"].to_numpy()
    # The stated error of int16: 5e-4 of the size of a log density.
    assert 0 < np.abs(found - exact).max() < 5e-4 * np.abs(exact).max()
    out = tmp_path / "out"
    assert "--allow-mixed" in lmd3("merge", *both, "-o", out, status=2)["error"]["remedy"]
    lmd3("merge", *both, "-o", out, "--allow-mixed")
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["precision"] == "float32+int16"


def test_what_is_missing_or_damaged_is_named(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for i in (0, 2):
        scan_shard(corpus, out, i, 7)
    with pytest.raises(FileMissingError, match="segments 2 to 3, 6 to 13 of 14 are missing"):
        merge([out])
    scan_shard(corpus, out, 0, 1)
    path = files_of(out / "partials")[0].path
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(VerificationError, match="damaged") as caught:
        merge([out])
    assert caught.value.file == str(path)
    with pytest.raises(FileMissingError, match="no such folder"):
        merge([tmp_path / "nowhere"])


def lmd3(*arguments: object, status: int = 0) -> Any:
    command = [sys.executable, "-m", "lmd3", *map(str, arguments), "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_the_commands(corpus: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ("density", corpus / "store", corpus / "queries.npy", "-o", out, "--neighbors", 3, "--by-group")
    assert "--bandwidth @bandwidth.json" in lmd3(*given, "--shard", "0/2", status=2)["error"]["remedy"]
    assert "counted from 0" in lmd3(*given, "--shard", "2/2", status=2)["error"]["remedy"]
    assert not out.exists()
    sized = (*given, "--bandwidth", f"@{whole / 'bandwidth.json'}")
    assert lmd3(*sized, "--shard", "1/2")["missing"] == [[0, 7]]
    assert "0 to 6 of 14 are missing" in lmd3("merge", out, "-o", out, status=2)["error"]["message"]
    lmd3(*sized, "--shard", "0/2")
    lmd3("merge", out, "-o", out)
    assert tables(out) == tables(whole)
    assert lmd3("merge", out, "-o", out, status=2)["error"]["kind"] == "OutputError"
    assert lmd3(*sized, "--executor", "slurm", status=2)["error"]["kind"] in ("OutputError", "ParameterError")


# --- executors ---


def test_stragglers_are_named() -> None:
    summary = Summary()
    for number in range(30):
        node = f"node{number % 3}"
        task = Task(f"segments {number}", {}, 10.0)
        summary.add(Done(task, node, 4.0 if node == "node2" else 1.0, {"rows": 5, "bytes": 7}))
    found = summary.to_dict()
    assert found["stragglers"] == ["node2 took 4.0 times as long as the median node"]
    assert found["nodes"]["node1"] == {"tasks": 10, "rows": 50, "bytes": 70, "seconds": 10.0}
    assert {entry["node"] for entry in found["slowest"]} == {"node2"}


def nothing(arguments: dict[str, Any], report: Callable[[float], None]) -> dict[str, Any]:
    return {"rows": 1}


def test_memory_does_not_grow_with_the_number_of_tasks() -> None:
    def peak(count: int) -> int:
        tracemalloc.start()
        tasks = (Task(f"task {i}", {"folder": "x" * 100, "start": i}, 1.0) for i in range(count))
        options: dict[str, Any] = {"label": "", "total": float(count), "unit": "", "progress": silent}
        summary = run_tasks(Elsewhere(), nothing, tasks, **options)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert sum(node.tasks for node in summary.nodes.values()) == count
        return most

    peak(100)
    assert peak(10_000) < peak(100) + 50_000


def test_unknown_executors_are_refused() -> None:
    with pytest.raises(ParameterError, match="unknown executor 'slurm'"):
        make_executor("slurm")
    with pytest.raises(ParameterError, match="Ray cluster"):
        make_executor("local", address="auto")


def test_ray_on_this_machine(corpus: Path, whole: Path, tmp_path: Path) -> None:
    """In a process of its own: a cluster of one node for one job."""
    pytest.importorskip("ray", reason="Ray is not installed")
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from test_machines import density; from lmd3.executors import make_executor\n"
        "density(Path(sys.argv[2]), Path(sys.argv[3]), executor=make_executor('ray', threads=1))\n"
    )
    places = [str(Path(__file__).parent), str(corpus), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": places[0]}
    subprocess.run([sys.executable, "-c", program, *places], check=True, env=environment)
    assert tables(tmp_path / "out") == tables(whole)
