"""Rows of an index assigned to their lists in many places: the one stage of a build that is worth it.

The build is paused where it knows its lists and every row is to be assigned. Tasks on other machines, or
processes that know of no others, each assign a range of rows and leave a checksummed file (the format of
`lmd3.executors.partials`) in `lists/` of the unfinished build. When all rows are there the files are joined,
and the build goes on: to the byte as if one process had done it all, since the list of a row depends on
nothing but the row, the tree and the SIMD level.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from lmd3.errors import ParameterError, VerificationError, WorkError
from lmd3.executors import TASKS_PER_SLOT, Executor, Summary, Task, in_lines, run_tasks
from lmd3.executors.jobs import File, Owner, files_of, gaps, owners
from lmd3.executors.local import LocalExecutor
from lmd3.executors.partials import load_part, save_part, sync_folder
from lmd3.index import default_path, route_rows
from lmd3.progress import ProgressFactory, silent
from lmd3.store import Store, open_store, xxh3
from lmd3.system import simd_level

#: The folder of files of lists inside that of the unfinished build, and their joint file.
FOLDER, JOINED = "lists", "lists.bin"

#: Rows of a file at most, and of one call into the native core.
FILE_ROWS, CALL_ROWS = 1 << 24, 1 << 18

#: The joint file of a killed local build holds whole steps of so many rows.
_STEP = 1 << 18


@dataclass(frozen=True)
class Lists:
    """The lists of a build that waits for them.

    Attributes:
        store: the rows.
        partial: the folder of the unfinished build.
        configuration: what the files of lists depend on.
        notice: takes a line on each file that is damaged, and on what ran where.
    """

    store: Store
    partial: Path
    configuration: dict[str, Any]
    notice: Callable[[str], None]

    @classmethod
    def open(cls, store: Store, target: Path, notice: Callable[[str], None]) -> Self | None:
        """Those of the unfinished build of an index at `target`; None where nothing waits for lists.

        Files that are damaged or of another tree are removed.
        """
        partial = target.with_name(target.name + ".partial")
        try:
            state = json.loads((partial / "state.json").read_bytes())
            plan = state["plan"]
            if state["assigned"] or state["trees"] == 0 or plan["store"] != store.fingerprint:
                return None
            tree = xxh3((partial / "centroids.npy").read_bytes())
        except (OSError, ValueError, KeyError, TypeError):
            return None
        found = cls(store, partial, {"store": store.fingerprint, "tree": tree, "simd": plan["level"]}, notice)
        for file in found._files():
            part = load_part(file.path, found.configuration)
            if part is None or len(part.get("lists", ())) != file.end - file.start:
                notice(f"{file.path}: damaged or of other lists; its rows are assigned again")
                file.path.unlink(missing_ok=True)
        return found

    @property
    def begun(self) -> bool:
        """Whether some rows were assigned by tasks or shards."""
        return bool(self._files())

    def _files(self) -> list[File]:
        folder = self.partial / FOLDER
        return files_of(folder) if folder.is_dir() else []

    def _owners(self) -> list[Owner]:
        """From which file each row is taken; the first rows may be those of a local build that was killed."""
        joined = self.partial / JOINED
        rows = joined.stat().st_size // 8 if joined.exists() else 0
        rows = rows if rows == self.store.n else min(rows, self.store.n) // _STEP * _STEP
        return owners([File(joined, 0, rows), *self._files()])

    def missing(self) -> list[tuple[int, int]]:
        """Ranges of rows [start, end) without lists."""
        return gaps(self._owners(), 0, self.store.n)

    def assign(
        self, executor: Executor, progress: ProgressFactory, within: tuple[int, int] | None = None
    ) -> Summary:
        """Assigns the rows that have no list yet.

        Args:
            executor: where.
            progress: makes the bar.
            within: only rows [start, end) [all].

        Raises:
            WorkError: tasks failed; each is named.
        """
        if simd_level() != self.configuration["simd"]:
            raise _other_level(self.configuration["simd"])
        start, end = within or (0, self.store.n)
        missing = gaps(self._owners(), start, end)
        left = sum(last - first for first, last in missing)
        (self.partial / FOLDER).mkdir(exist_ok=True)
        length = left if executor.in_process else -(-left // (TASKS_PER_SLOT * executor.slots))
        length = max(1, min(length, FILE_ROWS))

        def tasks() -> Iterator[Task]:
            for first, last in missing:
                for begin in range(first, last, length):
                    stop = min(begin + length, last)
                    arguments = {
                        "store": str(Path(self.store.path).absolute()) if self.store.path else None,
                        "partial": str(self.partial.absolute()),
                        "configuration": self.configuration,
                        "start": begin,
                        "end": stop,
                        "threads": executor.threads,
                    }
                    yield Task(f"lists of rows {begin:,} to {stop - 1:,}", arguments, float(stop - begin))

        def here(arguments: dict[str, Any], report: Callable[[float], None]) -> dict[str, Any]:
            return _assign(self.store, arguments, report)

        def done() -> float:
            return float(left - sum(last - first for first, last in gaps(self._owners(), start, end)))

        summary = run_tasks(
            executor,
            here if executor.in_process else assign_range,
            tasks(),
            label="assigning rows to lists",
            total=float(left),
            unit="rows",
            progress=progress,
            count=done,
        )
        if not executor.in_process:
            for line in in_lines(summary.to_dict()):
                self.notice(line)
        return summary

    def join(self) -> None:
        """Joins all files into the one that the build goes on with.

        Raises:
            VerificationError: a file is damaged by now or went missing.
        """
        found = self._owners()
        joined = self.partial / JOINED
        if gaps(found, 0, self.store.n):
            raise VerificationError("files of lists went missing", file=str(self.partial / FOLDER))
        if found[0].file.path != joined or found[0].end != self.store.n:
            temporary = joined.with_suffix(".tmp")
            with temporary.open("wb") as out:
                for owner in found:
                    out.write(self._lists(owner))
                out.flush()
                os.fsync(out.fileno())
            temporary.replace(joined)
            sync_folder(self.partial)
        shutil.rmtree(self.partial / FOLDER, ignore_errors=True)

    def _lists(self, owner: Owner) -> bytes:
        """The lists that are taken from a file, 8 bytes a row, little-endian."""
        file = owner.file
        if file.path.name == JOINED:
            with file.path.open("rb") as joined:
                joined.seek(8 * owner.start)
                return joined.read(8 * (owner.end - owner.start))
        part = load_part(file.path, self.configuration)
        if part is None:
            raise VerificationError(
                "a damaged file of lists", file=str(file.path), remedy="give the same command again"
            )
        return part["lists"][owner.start - file.start : owner.end - file.start].astype("<u8").tobytes()


# --- the work of a task ---


def assign_range(arguments: dict[str, Any], report: Callable[[float], None]) -> dict[str, Any]:
    """A task on any machine: the lists of rows [start, end) into a file.

    Raises:
        InputError, WorkError: and their kinds: the rows are not here or not the same, or this machine
            computes at another SIMD level.
    """
    store = _opened(arguments["store"])
    wanted = arguments["configuration"]
    if store.fingerprint != wanted["store"]:
        raise VerificationError("not the rows that the index is of", file=arguments["store"])
    if simd_level() != wanted["simd"]:
        raise _other_level(wanted["simd"])
    return _assign(store, arguments, report)


@functools.lru_cache(maxsize=1)
def _opened(path: str) -> Store:
    """A store, kept open between the tasks of a worker."""
    return open_store(path)


def _other_level(level: str) -> WorkError:
    return WorkError(
        f"this machine computes at SIMD level {simd_level()}, the index was begun at {level}",
        remedy="set LMD3_SIMD to a level that all have, and start anew",
    )


def _assign(store: Store, arguments: dict[str, Any], report: Callable[[float], None]) -> dict[str, Any]:
    partial, start, end = Path(arguments["partial"]), arguments["start"], arguments["end"]
    configuration = arguments["configuration"]
    path = partial / FOLDER / f"{start:012d}-{end:012d}.part"
    if load_part(path, configuration) is not None:
        return {"rows": 0, "bytes": 0}  # of a worker that was lost after it had written
    found = []
    for first in range(start, end, CALL_ROWS):
        last = min(first + CALL_ROWS, end)
        found.append(route_rows(store, partial, first, last, arguments["threads"]))
        report(float(last - start))
    if xxh3((partial / "centroids.npy").read_bytes()) != configuration["tree"]:
        raise WorkError("the lists of the index were made anew meanwhile", file=str(partial))
    save_part(path, configuration, {"lists": np.concatenate(found)})
    row_bytes = store.d * {"float32": 4, "float16": 2, "bfloat16": 2}.get(store.dtype, 1)
    return {"rows": end - start, "bytes": (end - start) * row_bytes}


# --- processes that know of no others ---


def assign_shard(
    store: str | Path | Store,
    shard: tuple[int, int],
    path: str | Path | None = None,
    *,
    threads: int | None = None,
    notice: Callable[[str], None] | None = None,
    progress: ProgressFactory | None = None,
) -> dict[str, Any]:
    """Assigns the i-th of n ranges of a store's rows to the lists of an index that `Index.prepare` began.

    Args:
        store: the rows.
        shard: (i, n), i from 0.
        path: of the index [beside the store].
        threads: None takes all cores.
        notice: takes lines on files that are damaged.
        progress: shows progress.

    Returns:
        `rows` [start, end) of the range, `of` all, `missing` ranges of all without lists yet, and what
        `Summary.to_dict` gives.

    Raises:
        ParameterError: no such shard, or no build waits for lists.
    """
    index, count = shard
    if not 0 <= index < count:
        raise ParameterError(f"no shard {index} of {count}", remedy="shards are counted from 0: 0/8 … 7/8")
    opened = open_store(store)
    target = default_path(opened) if path is None else Path(path)
    lists = Lists.open(opened, target, notice or (lambda line: None))
    if lists is None:
        raise ParameterError(
            f"no build of {target} waits for its rows to be assigned",
            remedy="begin it with lmd3 index STORE --pause, and give the shards then",
        )
    within = (index * opened.n // count, (index + 1) * opened.n // count)
    summary = lists.assign(LocalExecutor(threads), progress or silent, within)
    return {"rows": within, "of": opened.n, "missing": lists.missing(), **summary.to_dict()}


__all__ = ["Lists", "assign_range", "assign_shard"]
