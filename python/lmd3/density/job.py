"""A density job on disk: what identifies it, how any process takes it up, and the scan of its segments.

A job is a scan (`Scanner`, queries, kernels, `Asked`) and a folder of partial files. `job.json` in the folder
says where rows and queries are, so that a process on another machine needs the folder's path alone; queries
that lie in memory only are put beside it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lmd3.bandwidth import Bandwidth
from lmd3.density.groups import choose_groups
from lmd3.density.scan import Asked, Pair, Scan, Scanner, fold, version
from lmd3.density.sides import describe, query_matrix
from lmd3.errors import FormatError, ParameterError, VerificationError, WorkError
from lmd3.executors import TASKS_PER_SLOT, Executor, Function, Summary, Task, run_tasks
from lmd3.executors.jobs import (
    JOB,
    Partials,
    Record,
    files_of,
    gaps,
    in_words,
    owners,
    read_job,
    read_record,
    write_job,
)
from lmd3.executors.partials import canonical
from lmd3.progress import ProgressFactory
from lmd3.results import write_json, write_parquet
from lmd3.store import Store, open_store, xxh3

#: Segments of a task whose groups are renamed: 4 bytes a row.
RENAMED_SEGMENTS = 256

#: Queries of the job that no file holds elsewhere, and the rows left out for them.
QUERIES, IDS, OWN = "queries.npy", "ids.parquet", "own.npy"


def identity(scanner: Scanner, queries: Store, chosen: Mapping[str, Any], asked: Asked) -> dict[str, Any]:
    """Everything that the bytes of a job's sums depend on, but for what bandwidth rules come to.

    Args:
        scanner: of the corpus.
        queries: its fingerprint.
        chosen: the bandwidths or their rules.
        asked: what is asked beside.
    """
    weights = scanner.weights
    names = scanner.store.groups
    kept = {} if asked.groups is None else {"groups": [names[code] for code in asked.groups]}
    return {
        "store": scanner.store.fingerprint,
        "queries": queries.fingerprint,
        **chosen,
        "neighbors": asked.neighbors,
        "by_group": asked.by_group,
        **kept,
        "exclude_self": None if asked.own is None else xxh3(asked.own.tobytes()),
        "exclude_within": asked.exclude_within,
        "weights": None if weights is None else xxh3(weights.tobytes()),
        "precision": scanner.arithmetic,
        "rounding": scanner.store.rounding,
        "simd": scanner.level,
    }


@dataclass(frozen=True)
class Job:
    """A scan whose finished segments are kept in partial files.

    Attributes:
        scanner: of the corpus.
        queries: (Q, d) float32.
        pairs: kernels with their bandwidths.
        asked: what is asked beside.
        identified: its `identity`.
    """

    scanner: Scanner
    queries: NDArray[np.float32]
    pairs: Sequence[Pair]
    asked: Asked
    identified: Mapping[str, Any]

    def configuration(self, segments: int) -> dict[str, Any]:
        """What every partial file of the job begins with."""
        numbers = {"kernels": self.pairs, "segments": segments, "query_count": len(self.queries)}
        return canonical({**self.identified, **numbers})

    def partials(
        self, folder: Path, notice: Callable[[str], None], within: tuple[int, int] | None = None
    ) -> Partials:
        """The job's files in a folder, those of the segments `within` verified.

        Raises:
            OutputError: the folder holds partials of another configuration.
        """
        segments = len(self.scanner.segments())
        return Partials(folder, self.configuration(segments), segments, len(self.queries), notice, within)

    def scan(
        self,
        partials: Partials,
        executor: Executor,
        notice: Callable[[str], None],
        progress: ProgressFactory,
        summary: Summary | None = None,
    ) -> Summary:
        """Scans the segments that have no file yet; what ran where is counted in `summary`.

        Raises:
            WorkError: tasks failed elsewhere.
        """
        rows = self.scanner.segments()
        start, end = partials.within
        missing = partials.missing()
        total = sum(rows[start:end])
        left = sum(sum(rows[first:last]) for first, last in missing)
        if left < total:
            notice(f"continued: {total - left:,} of {total:,} rows were done before")
        count = len(self.queries)

        def done_since() -> float:
            """Pairs done, by the files that are there."""
            gone = gaps(owners(files_of(partials.folder)), start, end)
            return float(left - sum(sum(rows[first:last]) for first, last in gone)) * count

        pieces = missing if executor.in_process else _cut(missing, TASKS_PER_SLOT * executor.slots)
        if self.asked.groups is not None:
            # The codes of a task's rows are renamed in memory.
            pieces = _cut(pieces, -(-sum(last - first for first, last in pieces) // RENAMED_SEGMENTS))

        def tasks() -> Iterator[Task]:
            for first, last in pieces:
                arguments = {
                    "folder": str(partials.folder.absolute()),
                    "start": first,
                    "end": last,
                    "threads": executor.threads,
                }
                size = float(sum(rows[first:last])) * count
                yield Task(f"segments {in_words([(first, last)])} of {len(rows)}", arguments, size)

        def here(arguments: dict[str, Any], report: Callable[[float], None]) -> dict[str, Any]:
            return _scan_range(self, partials, arguments["start"], arguments["end"], report)

        function: Function = here if executor.in_process else scan_range
        return run_tasks(
            executor,
            function,
            tasks(),
            label="density",
            total=float(left) * count,
            unit="pairs",
            progress=progress,
            count=done_since,
            summary=summary,
        )

    def fold(self, partials: Partials) -> Scan:
        """The result of all segments.

        Raises:
            VerificationError: files went missing during the work, or are damaged by now.
        """
        level = self.scanner.level
        scan, after = fold(partials.parts(), len(self.queries), len(self.pairs), self.asked.neighbors, level)
        if after != (partials.segments, 0):
            raise VerificationError("partial files went missing during the work", file=str(partials.folder))
        return scan


def _cut(ranges: Sequence[tuple[int, int]], pieces: int) -> list[tuple[int, int]]:
    """Ranges cut into about so many pieces of about one length."""
    length = max(1, sum(end - start for start, end in ranges) // max(1, pieces))
    return [(first, min(first + length, end)) for start, end in ranges for first in range(start, end, length)]


# --- the work of a task ---


def _scan_range(
    job: Job, partials: Partials, start: int, end: int, report: Callable[[float], None]
) -> dict[str, Any]:
    """Scans segments [start, end) into files."""
    rows = sum(job.scanner.segments()[start:end])

    def told(done: int, total: int) -> None:
        report(float(done))

    with partials.writer() as writer:
        job.scanner.scan_parts(job.queries, job.pairs, start, end, writer.add, job.asked, told)
    return {"rows": rows, "bytes": rows * job.scanner.row_bytes}


def scan_range(arguments: dict[str, Any], report: Callable[[float], None]) -> dict[str, Any]:
    """A task on any machine: scans what is missing of the segments [start, end) of the job in a folder.

    Args:
        arguments: `folder` of the partials, `start`, `end`, `threads`.
        report: is told the pairs done.

    Raises:
        InputError, WorkError: and their kinds: rows or queries are not here or not the same, or this machine
            computes otherwise than the job was begun.
    """
    folder = Path(arguments["folder"])
    job = _opened(folder, (folder / JOB).stat().st_mtime_ns, arguments["threads"])
    partials = job.partials(folder, lambda line: None, (arguments["start"], arguments["end"]))
    found = {"rows": 0, "bytes": 0}
    for start, end in partials.missing():
        done = _scan_range(job, partials, start, end, report)
        found = {key: found[key] + done[key] for key in found}
    return found


@functools.lru_cache(maxsize=1)
def _opened(folder: Path, written: int, threads: int | None) -> Job:
    """The job of a folder, kept open between the tasks of a worker."""
    return open_job(folder, threads)


# --- taking a job up from its folder ---


def describe_work(
    folder: Path, scanner: Scanner, queries: Store, job: Job, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What `job.json` says for other processes; queries that lie in memory only are written beside it.

    Args:
        folder: of the partials, which is made.
        scanner: of the corpus.
        queries: their store.
        job: the job.
        settings: of the tables, and the seed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if queries.path is None:
        _save_array(folder / QUERIES, job.queries)
        write_parquet(folder / IDS, pa.table({"id": pa.array(queries.ids(), pa.string())}))
    if job.asked.own is not None:
        _save_array(folder / OWN, job.asked.own)
    corpus = scanner.store
    return {
        "version": version(),
        "corpus": None if corpus.path is None else str(Path(corpus.path).absolute()),
        "queries": None if queries.path is None else str(Path(queries.path).absolute()),
        "asked_of": describe(queries),
        "precision": scanner.precision,
        "max_memory": scanner.memory,
        "io": scanner.io,
        "settings": dict(settings),
    }


def note_job(
    folder: Path,
    queries: Store,
    job: Job,
    bandwidths: Sequence[Bandwidth],
    settings: Mapping[str, Any],
    more: Mapping[str, Any],
) -> None:
    """Notes a job in the folder of its partials, and its bandwidths beside that.

    Args:
        folder: of the partials.
        queries: their store.
        job: the job.
        bandwidths: what its rules came to.
        settings: of the tables, and the seed.
        more: what else other processes must know.

    Raises:
        OtherJobError: another job is noted there: an estimate by another index, or an exact one.
    """
    entries = [entry.to_dict() for entry in bandwidths]
    work = describe_work(folder, job.scanner, queries, job, settings)
    read_job(folder, job.identified)
    write_job(folder, job.identified, entries, work | dict(more))
    write_json(folder.parent / "bandwidth.json", {"format": 1, "bandwidths": entries})


def _save_array(path: Path, array: NDArray[Any]) -> None:
    """Writes an array under a temporary name and renames it; several processes may do so at once."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def open_job(
    folder: Path,
    threads: int | None = None,
    *,
    corpus: str | Path | None = None,
    queries: str | Path | None = None,
    any_level: bool = False,
) -> Job:
    """The job of a folder of partials.

    Args:
        folder: of the partials.
        threads: that may be used.
        corpus: where the rows are now [where they were].
        queries: where the queries are now [where they were].
        any_level: take it up on whatever SIMD level, to fold it.

    Raises:
        FormatError: the folder holds no record of a job that can be taken up.
        FileMissingError: rows or queries are not there.
        VerificationError: they are not those that the job began with.
        WorkError: this machine computes at another SIMD level, or by another version.
    """
    record = _record(folder)
    work, asked = record.work, record.asked
    place = corpus or work.get("corpus")
    if place is None:
        raise ParameterError(
            "the rows of this job lay in memory only",
            file=str(folder),
            remedy="save them to a file or store first, or name it with --corpus",
        )
    scanner = Scanner(
        open_store(place), None, work["precision"], threads, work["max_memory"], work.get("io", "mmap")
    )
    _same("the rows", scanner.store.fingerprint, asked["store"], str(place))
    found = queries or work.get("queries")
    if found is not None:
        store = open_store(found)
        _same("the queries", store.fingerprint, asked["queries"], str(found))
        # Their encoder was judged when the job was made.
        matrix = query_matrix(scanner.store, store, scanner.memory, any_encoder=True)
    else:
        matrix = np.load(folder / QUERIES, mmap_mode="r", allow_pickle=False)
    own = np.load(folder / OWN, allow_pickle=False) if asked["exclude_self"] is not None else None
    if not any_level:
        if scanner.level != asked["simd"]:
            raise WorkError(
                f"this machine computes at SIMD level {scanner.level}, the job at {asked['simd']}",
                remedy="set LMD3_SIMD to a level that all have, and start anew",
            )
        if work["version"] != version():
            raise WorkError(f"lmd3 {version()} is installed here, the job was begun by {work['version']}")
    pairs = [(entry["kernel"], float(entry["bandwidth"])) for entry in record.bandwidths]
    kept = choose_groups(scanner.store, asked["groups"]) if "groups" in asked else None
    wanted = Asked(asked["neighbors"], asked["by_group"], kept, own, asked["exclude_within"], tables=True)
    return Job(scanner, np.asarray(matrix), pairs, wanted, asked)


def ids_of(folder: Path, queries: str | Path | None = None) -> list[str]:
    """The ids of a job's queries."""
    found = queries or _record(folder).work.get("queries")
    if found is not None:
        return open_store(found).ids()
    ids: list[str] = pq.read_table(folder / IDS)["id"].to_pylist()
    return ids


def _record(folder: Path) -> Record:
    record = read_record(folder)
    if record is None or not record.work:
        raise FormatError(
            "no job that can be taken up", file=str(folder), remedy="give the folder of `lmd3 density`"
        )
    return record


def _same(what: str, found: str, wanted: str, place: str) -> None:
    if found != wanted:
        raise VerificationError(f"{what} are not those that the job began with", file=place)
