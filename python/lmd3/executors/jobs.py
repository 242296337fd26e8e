"""The folder of a job: what was asked, its partial files, which segments are there and which are missing.

The folder is the source of truth. Whoever works on a job, on whichever machine, looks here for what is to be
done and leaves finished segments here; nothing else has to be remembered.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmd3.errors import FormatError, OtherJobError, VerificationError
from lmd3.executors.partials import (
    FOLDER,
    VERSION,
    Part,
    Writer,
    canonical,
    differences,
    read_parts,
    sync_folder,
    verify,
)

#: What was asked for and the bandwidths found, beside the files: a continued job takes the same numbers.
JOB = "job.json"

_NAME = re.compile(r"(\d+)-(\d+)\.part")


def refuse_difference(then: Mapping[str, Any], now: Mapping[str, Any], file: Path) -> None:
    """Refuses to continue a job with another configuration.

    Raises:
        OtherJobError: they differ; the message names in what.
    """
    found = differences(then, canonical(now))
    if found:
        raise OtherJobError(
            f"holds an unfinished result of another configuration ({'; '.join(found)})",
            file=str(file),
            remedy="give the same options to continue it, another -o, or --force to start anew",
        )


# --- the record of a job ---


@dataclass(frozen=True)
class Record:
    """What `job.json` holds.

    Attributes:
        asked: everything that the bytes of the sums depend on, but for what bandwidth rules come to.
        bandwidths: what they came to, the primary one first.
        work: what another process needs to work on the job: where rows and queries are, and settings of the
            tables.
    """

    asked: dict[str, Any]
    bandwidths: list[dict[str, Any]]
    work: dict[str, Any] = field(default_factory=dict)


def is_unfinished(result: Path) -> bool:
    """Whether a result folder holds a job that was started and not ended."""
    return (result / FOLDER / JOB).is_file() and not (result / "run.json").exists()


def read_record(folder: Path) -> Record | None:
    """The record of the job that a folder of partials is of; None where no job was started.

    Raises:
        FormatError: it can't be read.
    """
    path = folder / JOB
    if not path.exists():
        return None
    try:
        job = json.loads(path.read_text(encoding="utf-8"))
        return Record(
            dict(job["asked"]), [dict(entry) for entry in job["bandwidths"]], dict(job.get("work", {}))
        )
    except (OSError, ValueError, KeyError, TypeError):
        raise FormatError(
            "not the record of a job", file=str(path), remedy="start anew with --force"
        ) from None


def read_job(folder: Path, asked: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The bandwidths of the job that a folder of partials is of; None where no job was started.

    Raises:
        OtherJobError: the job is another one; the message names in what.
        FormatError: its file can't be read.
    """
    record = read_record(folder)
    if record is None:
        return None
    refuse_difference(record.asked, asked, folder)
    return record.bandwidths


def write_job(
    folder: Path,
    asked: Mapping[str, Any],
    bandwidths: Sequence[Mapping[str, Any]],
    work: Mapping[str, Any] | None = None,
) -> None:
    """Notes a job in its folder of partials, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{socket.gethostname()}-{os.getpid()}.tmp"
    value = {
        "format": VERSION,
        "asked": canonical(asked),
        "bandwidths": [dict(entry) for entry in bandwidths],
        "work": dict(work or {}),
    }
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / JOB)
    sync_folder(folder)


# --- the files of a job ---


@dataclass(frozen=True)
class File:
    """A partial file of segments [start, end), by its name."""

    path: Path
    start: int
    end: int


@dataclass(frozen=True)
class Owner:
    """A file with the segments [start, end) that are taken from it."""

    file: File
    start: int
    end: int


def files_of(folder: Path) -> list[File]:
    """The partial files of a folder, in the order in which `owners` takes them."""
    names = [(path, _NAME.fullmatch(path.name)) for path in folder.iterdir()]
    return ordered(File(path, int(name[1]), int(name[2])) for path, name in names if name)


def ordered(files: Iterable[File]) -> list[File]:
    """Files in order of their first segments, longer ones first."""
    return sorted(files, key=lambda file: (file.start, -file.end, str(file.path)))


def owners(files: Iterable[File]) -> list[Owner]:
    """From which file each segment is taken: none is taken twice. The files are `ordered`."""
    found = []
    done = 0
    for file in files:
        if file.end > done:
            found.append(Owner(file, max(done, file.start), file.end))
            done = file.end
    return found


def gaps(found: Iterable[Owner], start: int, end: int) -> list[tuple[int, int]]:
    """Ranges of segments within [start, end) that have no owner."""
    missing = []
    done = start
    for owner in found:
        if owner.start > done:
            missing.append((done, min(owner.start, end)))
        done = max(done, owner.end)
        if done >= end:
            break
    if done < end:
        missing.append((done, end))
    return [(first, last) for first, last in missing if first < last]


def parts_of(found: Iterable[Owner]) -> Iterator[Part]:
    """All parts in order: segments ascending, and of each the queries ascending.

    Raises:
        VerificationError: a file was damaged since it was verified.
    """
    for owner in found:
        for part in read_parts(owner.file.path):
            if owner.start <= int(part["place"][0]) < owner.end:
                yield part


def in_words(ranges: Iterable[tuple[int, int]], most: int = 5) -> str:
    """Ranges of segments [start, end): `3, 7 to 9`."""
    words = [str(start) if end == start + 1 else f"{start} to {end - 1}" for start, end in ranges]
    more = f" and {len(words) - most} more ranges" if len(words) > most else ""
    return ", ".join(words[:most]) + more


class Partials:
    """The partial files of one job: what is there, what is missing, and all parts in order.

    Args:
        folder: is made.
        configuration: of the job: everything that the bytes of its sums depend on.
        segments: of the store.
        queries: of the job.
        notice: takes a line on each damaged file.
        within: only files with segments in this range [start, end) are looked at [all].

    Raises:
        OtherJobError: the folder holds partials of another configuration.
        FormatError: a file of another version.
    """

    def __init__(
        self,
        folder: Path,
        configuration: Mapping[str, Any],
        segments: int,
        queries: int,
        notice: Callable[[str], None],
        within: tuple[int, int] | None = None,
    ) -> None:
        self.folder = folder
        self.configuration = canonical(configuration)
        self.segments = segments
        self.queries = queries
        self.within = within or (0, segments)
        folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        for file in files_of(folder):
            if file.end <= self.within[0] or file.start >= self.within[1]:
                continue
            try:
                refuse_difference(verify(file.path), self.configuration, folder)
            except VerificationError as error:
                again = in_words([(file.start, file.end)])
                notice(f"{file.path}: {error.message}; segments {again} are scanned again")
                file.path.unlink(missing_ok=True)

    def missing(self) -> list[tuple[int, int]]:
        """Ranges of segments [start, end) that no file covers."""
        return gaps(owners(files_of(self.folder)), *self.within)

    def writer(self) -> Writer:
        """Writes the parts of a run of segments that is missing."""
        return Writer(self.folder, self.configuration, self.queries)

    def parts(self) -> Iterator[Part]:
        """All parts in order: segments ascending, and of each the queries ascending.

        Raises:
            VerificationError: a file was damaged since it was verified.
        """
        return parts_of(owners(files_of(self.folder)))


def _remove_abandoned(folder: Path) -> None:
    """Removes what processes of this machine that have ended left half written."""
    host = re.escape(socket.gethostname())
    for path in folder.glob(".*.tmp"):
        if name := re.fullmatch(rf"\.{host}-(\d+)\.tmp", path.name):
            try:
                os.kill(int(name[1]), 0)
            except ProcessLookupError:
                path.unlink(missing_ok=True)
            except OSError:
                pass
