"""Partial files, version 1: what finished segments add to a result, kept so that nothing is computed twice.

A folder of partials belongs to one job (`lmd3.executors.jobs`). Each file holds the parts of a run of whole
segments (see `_lmd3.scan_parts`), in order; folding all of a job's parts in order gives the bytes of an
uninterrupted scan.

A file is `MAGIC`, the version (uint32), and sections. A section is its kind (1 byte), the length of its
content, its stored length (uint64 each), the xxh3-64 of these and of what is stored (uint64; of the first
section with the magic and version before it), and the content, compressed with zstd. All numbers are
little-endian. The kinds:

* `H`, the first: JSON, the configuration of the job.
* `P`, one part: the length of a JSON list of (name, element type, length), the list, and the arrays one after
  the other, the bytes of each by their significance (first all lowest bytes, ...).
* `E`, the last: JSON, the segments covered [start, end), the number of parts, the xxh3-64 of their checksums.

Files appear complete: they are written under a temporary name, flushed to the disk and renamed.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lmd3.errors import FormatError, VerificationError
from lmd3.store import xxh3

#: The folder of a result's partials.
FOLDER = "partials"

MAGIC = b"lmd3part"
VERSION = 1

#: A file is closed after the segment in which it has been open for so long: what a kill can cost.
SECONDS = 15.0

_START = struct.Struct("<8sI")
_SECTION = struct.Struct("<cQQ")
_CHECKSUM = struct.Struct("<Q")

Part = dict[str, NDArray[Any]]


def canonical(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as it comes back from JSON."""
    return dict(json.loads(json.dumps(dict(configuration), sort_keys=True)))


def fingerprint(configuration: Mapping[str, Any]) -> str:
    """The xxh3-64 of a configuration, 16 hexadecimal digits."""
    return xxh3(json.dumps(dict(configuration), sort_keys=True).encode())


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two configurations, in words: `neighbors: 10 then, 20 now`."""

    def show(value: Any) -> str:
        text = json.dumps(value, ensure_ascii=False)
        return text if len(text) <= 120 else text[:117] + "..."

    keys = [*now, *(key for key in then if key not in now)]
    return [
        f"{key}: {show(then.get(key))} then, {show(now.get(key))} now"
        for key in keys
        if then.get(key) != now.get(key)
    ]


# --- one file ---


def _shuffled(array: NDArray[Any]) -> bytes:
    """An array's bytes by significance: equal exponents and small numbers lie together and compress."""
    raw = np.ascontiguousarray(array).view(np.uint8)
    return raw.reshape(-1, array.itemsize).T.tobytes()


def _pack(part: Part) -> bytes:
    arrays = {name: array.astype(array.dtype.newbyteorder("<"), copy=False) for name, array in part.items()}
    index = json.dumps([[name, array.dtype.str, len(array)] for name, array in arrays.items()]).encode()
    return b"".join([struct.pack("<I", len(index)), index, *map(_shuffled, arrays.values())])


def _unpack(content: bytes) -> Part:
    (length,) = struct.unpack_from("<I", content)
    at = 4 + length
    part: Part = {}
    for name, kind, count in json.loads(content[4:at]):
        dtype = np.dtype(kind)
        size = count * dtype.itemsize
        raw = np.frombuffer(content, np.uint8, size, at).reshape(dtype.itemsize, count)
        part[name] = np.ascontiguousarray(raw.T).reshape(-1).view(dtype).astype(dtype.newbyteorder("="))
        at += size
    return part


def _write_section(file: BinaryIO, kind: bytes, content: bytes, before: bytes = b"") -> int:
    """Writes a section and returns its checksum, which covers the bytes given as `before` too."""
    stored = pa.compress(content, codec="zstd", asbytes=True)
    head = _SECTION.pack(kind, len(content), len(stored))
    checksum = int(xxh3(before + head + stored), 16)
    file.write(before + head + _CHECKSUM.pack(checksum) + stored)
    return checksum


def _sections(path: Path) -> Iterator[tuple[bytes, bytes, int]]:
    """(kind, content, checksum) of each section.

    Raises:
        FormatError: another version.
        VerificationError: the file ends too early or its bytes are not those that were written.
    """
    with path.open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        before = file.read(_START.size)
        if len(before) < _START.size or before[:8] != MAGIC:
            raise _damaged(path, "it does not start as one")
        version = _START.unpack(before)[1]
        while head := file.read(_SECTION.size + _CHECKSUM.size):
            if len(head) < _SECTION.size + _CHECKSUM.size:
                raise _damaged(path, "it ends within a section")
            kind, content_length, size = _SECTION.unpack_from(head)
            (checksum,) = _CHECKSUM.unpack_from(head, _SECTION.size)
            stored = file.read(size) if size <= length else b""
            if len(stored) < size:
                raise _damaged(path, "it ends within a section")
            if int(xxh3(before + head[: _SECTION.size] + stored), 16) != checksum:
                raise _damaged(path, "a checksum does not hold")
            if version != VERSION:
                raise FormatError(f"a partial file of version {version}, not {VERSION}", file=str(path))
            before = b""
            yield kind, pa.decompress(stored, content_length, codec="zstd", asbytes=True), checksum


def _damaged(path: Path, reason: str) -> VerificationError:
    return VerificationError(
        f"a damaged partial file: {reason}",
        file=str(path),
        remedy="delete it: its segments are scanned again",
    )


def read_configuration(path: Path) -> dict[str, Any]:
    """The configuration that a partial file is of.

    Raises:
        FormatError: another version.
        VerificationError: damaged.
    """
    for kind, content, _ in _sections(path):
        if kind == b"H":
            return dict(json.loads(content))
        break
    raise _damaged(path, "it has no header")


def read_parts(path: Path) -> Iterator[Part]:
    """The parts of a partial file in order, each proven by its checksum; the whole file at the end.

    Raises:
        FormatError: another version.
        VerificationError: damaged.
    """
    checksums: list[int] = []
    for kind, content, checksum in _sections(path):
        if kind == b"P":
            checksums.append(checksum)
            yield _unpack(content)
        elif kind == b"E":
            end = json.loads(content)
            if end["parts"] != len(checksums) or end["checksums"] != _chain(checksums):
                raise _damaged(path, "parts are missing")
            return
    raise _damaged(path, "its end is missing")


def verify(path: Path) -> dict[str, Any]:
    """Reads a whole file and returns its configuration.

    Raises:
        FormatError: another version.
        VerificationError: damaged.
    """
    configuration = read_configuration(path)
    for _ in read_parts(path):
        pass
    return configuration


def save_part(path: Path, configuration: Mapping[str, Any], part: Part) -> None:
    """Writes a file of one part, of whatever kind: the work of a task that is no scan. It appears complete.

    Args:
        path: of the file.
        configuration: what the part depends on.
        part: arrays by name; they come back one-dimensional.
    """
    temporary = _temporary(path.parent)
    with temporary.open("wb") as file:
        header = json.dumps(dict(configuration), sort_keys=True).encode()
        _write_section(file, b"H", header, _START.pack(MAGIC, VERSION))
        flat = {name: np.ascontiguousarray(array).reshape(-1) for name, array in part.items()}
        checksum = _write_section(file, b"P", _pack(flat))
        end = {"parts": 1, "checksums": _chain([checksum])}
        _write_section(file, b"E", json.dumps(end).encode())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def load_part(path: Path, configuration: Mapping[str, Any]) -> Part | None:
    """The part that `save_part` wrote; None where there is none of this configuration, or it is damaged."""
    try:
        if differences(read_configuration(path), canonical(configuration)):
            return None
        (part,) = read_parts(path)
    except (OSError, VerificationError, FormatError, ValueError):
        return None
    return part


def _temporary(folder: Path) -> Path:
    """Where a process of this machine writes before a file gets its name."""
    return folder / f".{socket.gethostname()}-{os.getpid()}.tmp"


def _chain(checksums: Sequence[int]) -> str:
    return xxh3(np.array(checksums, "<u8").tobytes())


class Writer:
    """Takes the parts of a scan in order and writes them to files of whole segments.

    Closing keeps all whole segments, also where an error ends the work; an unfinished segment is dropped.

    Args:
        folder: of the partials.
        configuration: of the job.
        queries: of the job: a segment is whole when its parts cover them.
        seconds: a file is closed after the segment in which it has been open for so long [`SECONDS`].
    """

    def __init__(
        self, folder: Path, configuration: Mapping[str, Any], queries: int, seconds: float | None = None
    ) -> None:
        self._folder = folder
        self._configuration = json.dumps(dict(configuration), sort_keys=True).encode()
        self._queries = queries
        self._seconds = SECONDS if seconds is None else seconds
        self._file: BinaryIO | None = None
        self._path = _temporary(folder)

    def add(self, part: Part) -> None:
        """Writes a part."""
        segment, first, queries = (int(value) for value in part["place"][:3])
        if self._file is None:
            self._file = self._path.open("wb")
            _write_section(self._file, b"H", self._configuration, _START.pack(MAGIC, VERSION))
            self._since, self._start, self._end = time.monotonic(), segment, segment
            self._checksums: list[int] = []
        self._checksums.append(_write_section(self._file, b"P", _pack(part)))
        if first + queries == self._queries:
            self._end = segment + 1
            self._whole = (self._file.tell(), len(self._checksums))
            if time.monotonic() - self._since >= self._seconds:
                self._seal()

    def _seal(self) -> None:
        """Ends the current file after its last whole segment and gives it its name."""
        file, self._file = self._file, None
        if file is None:
            return
        with file:
            if self._end == self._start:
                self._path.unlink()
                return
            position, count = self._whole
            file.seek(position)
            file.truncate()
            end = {
                "segments": [self._start, self._end],
                "parts": count,
                "checksums": _chain(self._checksums[:count]),
            }
            _write_section(file, b"E", json.dumps(end).encode())
            file.flush()
            os.fsync(file.fileno())
        self._path.replace(self._folder / f"{self._start:06d}-{self._end:06d}.part")
        sync_folder(self._folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._seal()
        except OSError:
            if error is None:
                raise  # else the first error counts


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder last."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # a system that does not open folders
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
