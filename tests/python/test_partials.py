"""Partial files, and that a job killed at any time ends with the bytes of an uninterrupted one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmd3 import KernelDensity, _lmd3
from lmd3.bandwidth import read_bandwidths
from lmd3.errors import FormatError, OutputError, VerificationError
from lmd3.executors import partials
from lmd3.executors.jobs import Partials
from lmd3.executors.partials import Writer, read_configuration, read_parts
from lmd3.results import DensityTable
from lmd3.store import StoreWriter

#: The files that must come out the same; `run.json` holds times.
TABLES = ("density.parquet", "queries.parquet", "neighbors.parquet", "bandwidth.json")

# A file per segment, and work slow enough to be killed in its midst: only the interval differs from `lmd3`.
RUN = """
import sys
from lmd3.executors import partials
partials.SECONDS = 0.0
from lmd3.cli import main
sys.exit(main(sys.argv[1:]))
"""


def unit(seed: int, n: int, d: int) -> np.ndarray[Any, Any]:
    rows = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240,000 rows in 24 shards (each a segment) with groups, and queries of which some are rows."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = unit(1, 240_000, 48)
    with StoreWriter(folder / "store", dtype="float32", shard_rows=10_000) as writer:
        for start in range(0, len(rows), 40_000):
            part = rows[start : start + 40_000]
            ids = [f"r{i}" for i in range(start, start + len(part))]
            writer.append(part, ids, groups=[f"g{i % 3}" for i in range(len(part))])
    queries = np.concatenate([rows[::2000], unit(2, 1200, 48)])
    np.save(folder / "queries.npy", queries)
    return folder


BANDWIDTHS = ("0.3", "0.4")
OPTIONS = ("--bandwidth", "0.3", "--bandwidth", "0.4", "--by-group", "--neighbors", "3", "--quiet")


def command(corpus: Path, out: Path, *more: str) -> list[str]:
    given = ["density", str(corpus / "store"), str(corpus / "queries.npy"), "-o", str(out)]
    return [sys.executable, "-c", RUN, *given, *OPTIONS, *more]


def run(corpus: Path, out: Path, *more: str, status: int = 0) -> str:
    done = subprocess.run(command(corpus, out, *more), capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def tables(out: Path) -> list[bytes]:
    return [(out / name).read_bytes() for name in TABLES]


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(corpus, out)
    return out


def test_files_and_memory_give_the_same_bytes(corpus: Path, whole: Path, tmp_path: Path) -> None:
    kde = KernelDensity(bandwidth=BANDWIDTHS).fit(corpus / "store")
    kde.density(corpus / "queries.npy", 3, by_group=True).save(tmp_path)
    assert tables(tmp_path) == tables(whole)
    assert len(list((whole / "partials").glob("*.part"))) == 24


def test_a_run_killed_at_any_time_continues_to_the_same_bytes(
    corpus: Path, whole: Path, tmp_path: Path
) -> None:
    generator = np.random.default_rng(int(time.time()))
    out = tmp_path / "out"
    before = 0
    for attempt in range(4):
        threads = str(1 + attempt % 2)
        process = subprocess.Popen(
            command(corpus, out, "--threads", threads), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        # Killed some time after a new file appeared, so that every attempt gets somewhere.
        while process.poll() is None and len(list(out.glob("partials/*.part"))) <= before:
            time.sleep(0.01)
        time.sleep(float(generator.uniform(0, 0.3)))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        files = {path: path.stat().st_mtime_ns for path in out.glob("partials/*.part")}
        before = len(files)
        assert before > 0
    run(corpus, out)
    assert tables(out) == tables(whole)
    # What was there was not scanned again.
    assert all(path.stat().st_mtime_ns == then for path, then in files.items())
    assert not list(out.glob("partials/.*"))


@pytest.fixture
def unfinished(whole: Path, tmp_path: Path) -> Path:
    """A job killed before its tables were written, and with two segments missing."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for name in (*TABLES, "run.json", "partials/000003-000004.part", "partials/000023-000024.part"):
        (out / name).unlink()
    return out


def test_a_damaged_file_is_named_and_its_segments_are_scanned_again(
    corpus: Path, whole: Path, unfinished: Path
) -> None:
    damaged = unfinished / "partials" / "000007-000008.part"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 4
    damaged.write_bytes(content)
    (unfinished / "partials" / "000009-000010.part").write_bytes(b"")
    arguments = [argument for argument in command(corpus, unfinished) if argument != "--quiet"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert f"{damaged}: a damaged partial file" in done.stderr
    assert "segments 7 are scanned again" in done.stderr
    assert "000009-000010.part" in done.stderr
    assert "200,000 of 240,000 rows were done before" in done.stderr
    assert tables(unfinished) == tables(whole)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--neighbors", "4"], "neighbors: 3 then, 4 now"),
        (["--bandwidth", "0.5"], "bandwidths:"),
        (["--kernel", "gaussian"], "gaussian"),
        (["--exclude-within", "0.1"], "exclude_within: 0.0 then, 0.1 now"),
    ],
)
def test_another_configuration_is_refused_and_named(
    corpus: Path, unfinished: Path, change: list[str], named: str
) -> None:
    files = sorted(path.name for path in unfinished.rglob("*"))
    message = run(corpus, unfinished, *change, status=2)
    assert named in message and "--force" in message
    assert sorted(path.name for path in unfinished.rglob("*")) == files


def test_a_bandwidth_found_by_a_rule_is_kept(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", unit(7, 5000, 8))
    np.save(tmp_path / "queries.npy", unit(8, 60, 8))
    given = [tmp_path / "rows.npy", tmp_path / "queries.npy", "-o", tmp_path / "out", "--bandwidth", "ess=50"]
    arguments = [sys.executable, "-c", RUN, "density", *map(str, given)]
    subprocess.run(arguments, check=True, capture_output=True)
    found = KernelDensity(bandwidth="ess=50").fit(tmp_path / "rows.npy", queries=tmp_path / "queries.npy")
    job = tmp_path / "out" / "partials" / "job.json"
    assert str(found.bandwidth_) in job.read_text(encoding="utf-8")
    # Started, and killed before the first segment was done: the number noted is taken, not found again.
    job.write_text(job.read_text(encoding="utf-8").replace(str(found.bandwidth_), "0.25"), encoding="utf-8")
    for path in (*(tmp_path / "out" / "partials").glob("*.part"), *(tmp_path / "out").glob("*.*")):
        path.unlink()
    refused = subprocess.run([*arguments, "--seed", "1"], check=False, capture_output=True, text=True)
    assert refused.returncode == 2 and "seed: 0 then, 1 now" in refused.stderr
    subprocess.run(arguments, check=True, capture_output=True)
    assert [entry.bandwidth for entry in read_bandwidths(tmp_path / "out" / "bandwidth.json")] == [0.25]
    assert set(DensityTable.load(tmp_path / "out").density["bandwidth"].to_pylist()) == {0.25}


def test_other_rows_are_refused_and_force_starts_anew(corpus: Path, unfinished: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "queries.npy", unit(3, 50, 48))
    (tmp_path / "store").symlink_to(corpus / "store")
    assert "queries:" in run(tmp_path, unfinished, status=2)
    run(tmp_path, unfinished, "--force")
    fresh = tmp_path / "fresh"
    kde = KernelDensity(bandwidth=BANDWIDTHS).fit(corpus / "store")
    kde.density(tmp_path / "queries.npy", 3, by_group=True).save(fresh)
    assert tables(unfinished) == tables(fresh)


def test_a_finished_result_is_refused_and_a_refused_job_leaves_nothing(
    corpus: Path, whole: Path, tmp_path: Path
) -> None:
    assert "holds a result already" in run(corpus, whole, status=2)
    run(corpus, tmp_path / "out", "--bandwidth", "ess=100000", status=2)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_scan_keeps_its_finished_segments(corpus: Path, tmp_path: Path) -> None:
    kde = KernelDensity(bandwidth=0.3).fit(corpus / "store")
    taken = 0

    class Stop(Exception):
        pass

    def add(part: partials.Part) -> None:
        nonlocal taken
        writer.add(part)
        taken += 1
        if taken == 6:
            raise Stop

    queries = unit(4, 64, 48)
    arguments = (kde.store_.native, queries, [("exponential", 0.3)])
    with pytest.raises(Stop), Writer(tmp_path, {"a": 1}, len(queries)) as writer:
        _lmd3.scan_parts(*arguments, 2, 20, add, neighbors=2)
    assert [path.name for path in tmp_path.iterdir()] == ["000002-000008.part"]
    folder = Partials(tmp_path, {"a": 1}, 24, len(queries), pytest.fail)
    assert folder.missing() == [(0, 2), (8, 24)]
    assert [int(part["place"][0]) for part in folder.parts()] == [2, 3, 4, 5, 6, 7]


# --- the file ---


def part(segment: int, first: int, queries: int, seed: int = 0) -> partials.Part:
    generator = np.random.default_rng(seed + segment)
    return {
        "place": np.array([segment, first, queries, 2], np.uint64),
        "max": generator.normal(size=2 * queries),
        "duplicates": generator.integers(0, 9, queries).astype(np.uint32),
        "row_sum": np.empty(0),
    }


def write(folder: Path, segments: range, queries: int = 5, configuration: Any = None) -> Path:
    with Writer(folder, configuration or {"k": [1, "é"]}, queries) as writer:
        for segment in segments:
            writer.add(part(segment, 0, 3))
            writer.add(part(segment, 3, queries - 3))
    return folder / f"{segments.start:06d}-{segments.stop:06d}.part"


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    path = write(tmp_path, range(4, 6))
    assert read_configuration(path) == {"k": [1, "é"]}
    found = list(read_parts(path))
    wanted = [part(4, 0, 3), part(4, 3, 2), part(5, 0, 3), part(5, 3, 2)]
    for read, written in zip(found, wanted, strict=True):
        assert read.keys() == written.keys()
        for name, array in written.items():
            assert read[name].dtype == array.dtype and np.array_equal(read[name], array)


def test_a_segment_that_is_not_whole_is_dropped(tmp_path: Path) -> None:
    with Writer(tmp_path, {}, 5) as writer:
        writer.add(part(0, 0, 3))
    assert not list(tmp_path.iterdir())
    with Writer(tmp_path, {}, 5) as writer:
        for first in (0, 3):
            writer.add(part(0, first, 3 - first // 3))
        writer.add(part(1, 0, 3))
    assert [len(list(read_parts(path))) for path in tmp_path.iterdir()] == [2]
    assert (tmp_path / "000000-000001.part").exists()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_damaged_byte_goes_unseen(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = write(tmp_path_factory.mktemp("one"), range(2))
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(VerificationError):
        partials.verify(path)


def test_another_version_is_told_from_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partials, "VERSION", 2)
    path = write(tmp_path, range(1))
    monkeypatch.undo()
    with pytest.raises(FormatError, match="version 2, not 1"):
        read_configuration(path)


def test_overlapping_files_count_once(tmp_path: Path) -> None:
    for segments in (range(0, 4), range(2, 6), range(3, 4), range(8, 9)):
        write(tmp_path, segments)
    folder = Partials(tmp_path, {"k": [1, "é"]}, 10, 5, pytest.fail)
    assert folder.missing() == [(6, 8), (9, 10)]
    assert [int(p["place"][0]) for p in folder.parts()][::2] == [0, 1, 2, 3, 4, 5, 8]
    with pytest.raises(OutputError, match="k: "):
        Partials(tmp_path, {"k": 2}, 10, 5, pytest.fail)


def test_leftovers_of_processes_that_ended_are_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    mine = Writer(tmp_path, {}, 5)
    mine.add(part(0, 0, 3))
    for path in tmp_path.glob(".*"):
        shutil.copy(path, path.with_name(path.name.replace(str(os.getpid()), str(ended.pid))))
    assert len(list(tmp_path.glob(".*.tmp"))) == 2
    Partials(tmp_path, {}, 1, 5, pytest.fail)
    assert [path.name for path in tmp_path.glob(".*.tmp")] == [mine._path.name]


def test_a_fold_refuses_what_does_not_follow() -> None:
    rows, queries = unit(5, 9000, 8), unit(6, 40, 8)
    found: list[partials.Part] = []
    _lmd3.scan_parts(rows, queries, [("exponential", 0.5)], 0, 1, found.append, neighbors=1)
    fold = _lmd3.Fold(40, 1, 1, _lmd3.simd_level())
    fold.add(found[0])
    assert fold.next == (1, 0)
    with pytest.raises(ValueError, match="does not follow"):
        fold.add(found[0])
    whole = _lmd3.scan(rows, queries, [("exponential", 0.5)], neighbors=1)
    scan = fold.finish()
    assert np.array_equal(scan.total.log_density, whole.total.log_density)
    assert np.array_equal(scan.neighbor_rows, whole.neighbor_rows)
    for key in found[0]:
        broken = {**found[0], key: np.zeros(1, np.int8)}
        with pytest.raises(ValueError, match="does not fit"):
            _lmd3.Fold(40, 1, 1, _lmd3.simd_level()).add(broken)


# --- any number of queries ---


def peak_memory(program: str) -> int:
    """Bytes of anonymous memory that a Python program held at most, above those at its start."""
    watch = """
import threading, time
def _anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
_peak = [0]
def _watch():
    while True:
        _peak[0] = max(_peak[0], _anonymous())
        time.sleep(0.005)
"""
    start = "_base = _anonymous(); threading.Thread(target=_watch, daemon=True).start()\n"
    setup, work = program.split("# ---\n")
    done = subprocess.run(
        [sys.executable, "-c", watch + setup + start + work + "print(_peak[0] - _base)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.splitlines()[-1])


SELF = """
import numpy as np, tempfile
from lmd3 import KernelDensity
n, d = {n}, {d}
rows = np.random.default_rng(1).normal(size=(n, d)).astype(np.float16)
folder = tempfile.TemporaryDirectory()
np.save(folder.name + "/rows.npy", rows)
kde = KernelDensity(bandwidth=0.5 * d**0.5, max_memory={memory}).fit(folder.name + "/rows.npy")
del rows
# ---
table = kde.density(folder.name + "/rows.npy", {neighbors}, exclude_self=True, folder=folder.name + "/out")
assert table.density.num_rows == n and set(table.queries["excluded"].to_pylist()) == {{1}}
folder.cleanup()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read memory from")
@pytest.mark.parametrize(
    ("n", "d", "memory"),
    [
        (40_000, 64, 40_000_000),
        pytest.param(1_000_000, 64, 2_000_000_000, marks=pytest.mark.slow),
    ],
)
def test_a_corpus_under_itself_in_bounded_memory(n: int, d: int, memory: int) -> None:
    """The bound: `max_memory`, a kilobyte per query for the result itself, and 32 MB for what runs anyway."""
    assert peak_memory(SELF.format(n=n, d=d, memory=memory, neighbors=0)) < memory + 1000 * n + 32_000_000
