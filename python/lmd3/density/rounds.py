"""The rounds of an estimate over ranges of queries, in this process or as tasks elsewhere, kept in files.

What a round (pilot, main, top-up, neighbours) finds for a query depends on the query, its id, the seed and
the rows it was given, never on the queries beside it. So queries are cut into ranges; a task does a round for
one range and leaves a checksummed file in `estimates/` of the job's partials; a job that was killed, and
shards that know of no others, find there what is done. The queries that are scored exactly are a scan of
their own, whose partials lie beside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmd3.density.estimation import NEIGHBORS, Estimation
from lmd3.density.job import Job, describe_work, identity, ids_of, open_job
from lmd3.density.methods import Tolerance
from lmd3.density.scan import Asked, Scan
from lmd3.density.sides import as_source
from lmd3.errors import FormatError
from lmd3.executors import Executor, Summary, Task, run_tasks
from lmd3.executors.jobs import JOB, read_record, write_job
from lmd3.executors.partials import Part, canonical, fingerprint, load_part, save_part
from lmd3.index import Index, draw_keys
from lmd3.progress import ProgressFactory
from lmd3.store import xxh3

#: The folder of the rounds' files, and the beginning of the names of folders of exact scans.
FOLDER, EXACT = "estimates", "exact"

#: Queries of a range: a share of all, but so many at least and at most.
SHARE, FEWEST, MOST = 32, 32, 1024

#: Queries of ranges that this process does together.
TOGETHER = 4096

#: Names of the rounds in progress and errors.
ROUNDS = ("pilot", "estimate", "top-up", "neighbours", "more draws", "more draws again")


def range_length(queries: int) -> int:
    """Queries of a range: the same for all who work on a job."""
    return min(max(queries // SHARE, FEWEST), MOST)


def asked_of_estimate(estimation: Estimation) -> dict[str, Any]:
    """What the numbers of an estimate depend on beside what those of an exact job do."""
    index = estimation.index
    return {
        "method": estimation.method,
        "tolerance": [estimation.tolerance.kind, estimation.tolerance.value],
        "seed": estimation.seed,
        "automatic": estimation.automatic,
        "index": None if index is None else xxh3(repr(index.manifest["files"]).encode()),
    }


def asked_before(then: Mapping[str, Any], method: str, tolerance: Tolerance, seed: int) -> dict[str, Any]:
    """What an estimate is asked for before its method is chosen, and the rest as the job of a folder has it.

    Args:
        then: `asked_of_estimate` of that job.
        method: as asked for; of "auto" that job knows the outcome.
        tolerance: as asked for.
        seed: of the draws.
    """
    automatic = method == "auto"
    return {
        **then,
        "method": then["method"] if automatic else method,
        "tolerance": [tolerance.kind, tolerance.value],
        "seed": seed,
        "automatic": automatic,
    }


@dataclass(frozen=True)
class Rounds:
    """Where the rounds of a job run and are kept.

    Attributes:
        folder: of the job's partials.
        asked: all that the numbers depend on (the `asked` of the job's record).
        executor: where tasks run.
        notice: takes lines on what is continued and was damaged.
        progress: makes the bars.
        summary: what ran where.
    """

    folder: Path
    asked: Mapping[str, Any]
    executor: Executor
    notice: Callable[[str], None]
    progress: ProgressFactory
    summary: Summary = field(default_factory=Summary)

    def run(
        self,
        estimation: Estimation,
        number: int,
        chosen: NDArray[np.int64],
        rows: NDArray[np.float64],
        target: float,
        aims: NDArray[np.float64] | None = None,
    ) -> Part:
        """One round: the numbers of the chosen queries in their order, each array (Q, numbers per query).

        Args:
            estimation: the job.
            number: of the round (`ROUNDS`).
            chosen: ascending numbers of queries.
            rows: for each how many rows to read (of the neighbours' round: how many neighbours).
            target: the standard error aimed at.
            aims: for each what `Estimation.stage` takes; None: all rows of it.
        """
        length = range_length(len(estimation.queries))
        where = chosen // length
        pieces = [(int(c), np.flatnonzero(where == c)) for c in np.unique(where)]
        (self.folder / FOLDER).mkdir(parents=True, exist_ok=True)
        orders: dict[int, dict[str, Any]] = {
            c: {
                "asked": dict(self.asked),
                "round": number,
                "target": target,
                "chosen": chosen[at].tolist(),
                "rows": rows[at].tolist(),
                "aims": None if aims is None else aims[at].tolist(),
            }
            for c, at in pieces
        }
        found = {c: load_part(_path(self.folder, number, c), _short(order)) for c, order in orders.items()}
        todo = [c for c, part in found.items() if part is None]
        if (done := len(pieces) - len(todo)) and number != NEIGHBORS:
            self.notice(f"{ROUNDS[number]}: {done} of {len(pieces)} ranges of queries were done before")

        def tasks() -> Iterator[Task]:
            together = max(1, TOGETHER // length) if self.executor.in_process else 1
            for start in range(0, len(todo), together):
                some = todo[start : start + together]
                queries = sum(len(orders[c]["chosen"]) for c in some)
                last = min((some[-1] + 1) * length, len(estimation.queries)) - 1
                arguments = {
                    "folder": str(self.folder.absolute()),
                    "threads": self.executor.threads,
                    "orders": {str(c): orders[c] for c in some},
                }
                name = f"{ROUNDS[number]} of queries {some[0] * length:,} to {last:,}"
                yield Task(name, arguments, float(queries))

        def here(arguments: dict[str, Any], report: Callable[[float], None]) -> dict[str, Any]:
            return _do(estimation, arguments)

        run_tasks(
            self.executor,
            here if self.executor.in_process else do_round,
            tasks(),
            label=ROUNDS[number],
            total=float(sum(len(orders[c]["chosen"]) for c in todo)),
            unit="queries",
            progress=self.progress,
            summary=self.summary,
        )
        for c in todo:
            path = _path(self.folder, number, c)
            found[c] = load_part(path, _short(orders[c]))
            if found[c] is None:
                raise FormatError(
                    "what a task left of an estimate is not there or damaged",
                    file=str(path),
                    remedy="give the same command again",
                )
        # Files hold flat arrays.
        parts = [
            {name: array.reshape(len(at), -1) for name, array in (found[c] or {}).items()} for c, at in pieces
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def scan(self, estimation: Estimation, queries: NDArray[np.float32], asked: Asked) -> Scan:
        """An exact scan of some queries, its segments kept in files too."""
        store = as_source(queries, "queries")
        kernels = [[kernel, bandwidth] for kernel, bandwidth in estimation.pairs]
        identified = identity(estimation.scanner, store, {"bandwidths": kernels}, asked)
        job = Job(estimation.scanner, queries, estimation.pairs, asked, identified)
        place = self.folder / f"{EXACT}-{fingerprint(canonical(identified))}"
        work = describe_work(place, estimation.scanner, store, job, {})
        bandwidths = [{"kernel": kernel, "bandwidth": h, "rule": ""} for kernel, h in estimation.pairs]
        write_job(place, identified, bandwidths, work)
        files = job.partials(place, self.notice)
        job.scan(files, self.executor, self.notice, self.progress, self.summary)
        return job.fold(files)


def _path(folder: Path, number: int, c: int) -> Path:
    return folder / FOLDER / f"round-{number}-{c:06d}.part"


def _short(order: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of the order it answers: long lists by their checksums."""
    lists = {name: xxh3(repr(order[name]).encode()) for name in ("chosen", "rows", "aims")}
    return {**order, "target": repr(order["target"]), **lists}


def _do(estimation: Estimation, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Does a round for some ranges and leaves their files."""
    orders = {int(c): order for c, order in arguments["orders"].items()}
    first = next(iter(orders.values()))
    chosen = np.concatenate([np.array(order["chosen"], np.int64) for order in orders.values()])
    rows = np.concatenate([np.array(order["rows"], np.float64) for order in orders.values()])
    aims = None
    if first["aims"] is not None:
        aims = np.concatenate([np.array(order["aims"], np.float64) for order in orders.values()])
    part = estimation.round(first["round"], chosen, rows, first["target"], aims)
    at = 0
    for c, order in orders.items():
        count = len(order["chosen"])
        own = {name: array[at : at + count] for name, array in part.items()}
        path = _path(Path(arguments["folder"]), order["round"], c)
        save_part(path, _short(order), own)
        at += count
    read = int(part["rows"].sum()) if "rows" in part else 0
    return {"rows": read, "bytes": read * estimation.scanner.row_bytes}


# --- the work of a task ---


def do_round(arguments: dict[str, Any], report: Callable[[float], None]) -> dict[str, Any]:
    """A task on any machine: a round of the job in a folder, for some ranges of its queries.

    Args:
        arguments: `folder` of the partials, `threads`, `orders` by range.
        report: is not used.

    Raises:
        InputError, WorkError: and their kinds: rows, queries or the index are not here or not the same, or
            this machine computes otherwise than the job was begun.
    """
    folder = Path(arguments["folder"])
    return _do(_opened(folder, (folder / JOB).stat().st_mtime_ns, arguments["threads"]), arguments)


@functools.lru_cache(maxsize=1)
def _opened(folder: Path, written: int, threads: int | None) -> Estimation:
    """The job of a folder, kept open between the tasks of a worker."""
    job = open_job(folder, threads)
    record = read_record(folder)
    assert record is not None  # open_job has read it
    asked = record.asked["estimate"]
    place = record.work["index"]
    index = None if place is None else Index(place, job.scanner.store)
    estimation = Estimation(
        job.scanner,
        index,
        asked["method"],
        Tolerance(*asked["tolerance"]),
        job.queries,
        draw_keys(ids_of(folder)),
        job.pairs,
        job.asked,
        asked["seed"],
        automatic=asked["automatic"],
    )
    if asked_of_estimate(estimation) != asked:
        raise FormatError("not the index that the job began with", file=str(place))
    return estimation
