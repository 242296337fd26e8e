"""What a machine does in a second, as plans need it: measured once, kept in a file, used for any job.

`lmd3 info --measure -o machine.json` measures a node; `lmd3 density --plan --rates machine.json` plans with
it, for whatever rows and queries. Rows and queries are synthetic; the functions are those of a real job.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmd3.density.estimator import KernelDensity
from lmd3.density.job import scan_range
from lmd3.density.scan import Asked, Scanner, fold
from lmd3.errors import FileMissingError, FormatError, ParameterError
from lmd3.executors.jobs import files_of, owners, parts_of
from lmd3.executors.partials import FOLDER, Part, Writer, canonical, verify
from lmd3.store import StoreWriter, open_store
from lmd3.system import cores, measure, simd_level

#: Dimensions, rows and queries of the trial, and what is asked of it: those of the examples in the docs.
DIMENSIONS, ROWS, QUERIES, NEIGHBORS = 384, 1 << 15, 1024, 10
PAIRS = tuple(("exponential", h) for h in (0.05, 0.07, 0.1, 0.15))

#: Segments of the partial files that are folded.
SEGMENTS = 24


@dataclass(frozen=True)
class Rates:
    """Rates of a machine.

    Attributes:
        threads: that computed.
        simd: level of SIMD.
        operations: per second of all threads in a scan, by arithmetic ("float32", "int16", "int8"): 2 per
            row, query and dimension, with four bandwidths and ten neighbours.
        read: bytes per second from memory, all threads.
        fold: bytes of partial sums, before compression, that one process verifies and folds per second.
        start: seconds until a new worker process can begin its first task.
        task: seconds that a task takes beside its scan: looking for what is missing, closing its file.
    """

    threads: int
    simd: str
    operations: dict[str, float]
    read: float
    fold: float
    start: float
    task: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def scan_seconds(
        self, rows: float, queries: int, dimensions: int, row_bytes: int, arithmetic: str
    ) -> float:
        """Seconds of a scan on this machine: of its arithmetic, or of reading from memory if that is more."""
        if arithmetic not in self.operations:
            raise ParameterError(f"the rates have none of {arithmetic}", remedy="measure them again")
        computing = 2.0 * rows * queries * dimensions / self.operations[arithmetic]
        return max(computing, rows * row_bytes / self.read)


def read_rates(path: str | Path) -> Rates:
    """The rates in a file of `lmd3 info --measure -o`.

    Raises:
        FileMissingError: there is none.
        FormatError: it holds no rates.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))["measured"]["rates"]
        rates = Rates(**found)
        if not all(value > 0 for value in (*rates.operations.values(), rates.read, rates.fold)):
            raise ValueError
        return rates
    except FileNotFoundError:
        raise FileMissingError("no such file", file=str(path)) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise FormatError(
            "no rates of a machine", file=str(path), remedy="make it: lmd3 info --measure -o machine.json"
        ) from None


def measure_rates(
    threads: int | None = None, seconds: float = 0.6, measured: Mapping[str, Any] | None = None
) -> Rates:
    """Measures the rates of this machine, in some 10 seconds.

    Args:
        threads: all [default: every core].
        seconds: of each scan.
        measured: what `lmd3.system.measure` gave [it is measured].
    """
    read = (measured or measure(threads))["read_bandwidth_all"]
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(ROWS, DIMENSIONS)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    queries = np.ascontiguousarray(
        rows[:QUERIES] + 0.02 * generator.normal(size=(QUERIES, DIMENSIONS)), np.float32
    )
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        with StoreWriter(place / "store", dtype="int8") as writer:
            writer.append(rows)
        np.save(place / "queries.npy", queries)
        operations, part = {}, None
        for arithmetic in ("float32", "int16", "int8"):
            source = open_store(rows) if arithmetic == "float32" else open_store(place / "store")
            scanner = Scanner(source, None, arithmetic, threads, 2_000_000_000)
            operations[arithmetic], part = _scan(scanner, queries, seconds)
        assert part is not None
        level = simd_level()
        folded = _fold(place, part, level)
        opening, task = _task(place, rows, threads)
        return Rates(threads or cores(), level, operations, read, folded, _start() + opening, task)


def _scan(scanner: Scanner, queries: Any, seconds: float) -> tuple[float, Part]:
    """Operations per second of repeated scans, the first left out, and a part."""
    asked = Asked(neighbors=NEIGHBORS, tables=True)
    parts: list[Part] = []
    best, started = 0.0, time.perf_counter()
    for attempt in range(50):
        begun = time.perf_counter()
        scanner.scan_parts(queries, list(PAIRS), 0, 1, parts.append, asked, lambda done, total: None)
        now = time.perf_counter()
        if attempt > 0:
            best = max(best, 2.0 * ROWS * len(queries) * DIMENSIONS / (now - begun))
        if attempt > 0 and now - started > seconds:
            break
        parts = parts[-1:]
    return best, parts[-1]


def _fold(place: Path, part: Part, level: str) -> float:
    """Bytes per second of reading, verifying and folding partial files of as many segments."""
    folder = place / "folded"
    folder.mkdir()
    size = 0
    with Writer(folder, canonical({}), int(part["place"][2]), 1e9) as writer:
        for segment in range(SEGMENTS):
            moved = dict(part)
            moved["place"] = part["place"].copy()
            moved["place"][0] = segment
            writer.add(moved)
            size += sum(array.nbytes for array in moved.values())
    begun = time.perf_counter()
    for file in files_of(folder):
        verify(file.path)
    fold(parts_of(owners(files_of(folder))), int(part["place"][2]), len(PAIRS), NEIGHBORS, level)
    return size / (time.perf_counter() - begun)


def _start() -> float:
    """Seconds until a new process has what a worker needs."""
    found = []
    for _ in range(2):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import lmd3.density.job"], check=True)
        found.append(time.perf_counter() - begun)
    return min(found)


def _task(place: Path, rows: Any, threads: int | None) -> tuple[float, float]:
    """Seconds in which a worker opens a job, and those of a task that scans next to nothing."""
    with StoreWriter(place / "few", dtype="int8", shard_rows=256) as writer:
        writer.append(rows[: 6 * 256])
    kde = KernelDensity(bandwidth=[h for _, h in PAIRS], threads=threads).fit(place / "few")
    kde.scan_shard(place / "queries.npy", (0, 6), place / "out", NEIGHBORS)
    found = []
    for segment in range(1, 6):
        task = {
            "folder": str(place / "out" / FOLDER),
            "start": segment,
            "end": segment + 1,
            "threads": threads,
        }
        begun = time.perf_counter()
        scan_range(task, lambda done: None)
        found.append(time.perf_counter() - begun)
    usual = statistics.median(found[1:])
    return max(0.0, found[0] - usual), usual
