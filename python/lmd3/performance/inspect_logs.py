"""Reads the logs of inspect: `.eval` files, `.json` logs, and tables saved from its `samples_df()`.

A sample's epochs are repeated measures: their mean is the value, their number the trials. `C`, `P`, `I` and
`N` are 1, ½, 0 and 0; NaN, and a sample that failed before it was scored, is unscored. A scorer that gives
several values gives several outcomes, `scorer/value`.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmd3 import tables
from lmd3.errors import FormatError, TextFormatError
from lmd3.performance.samples import Log, Sample, number

HARNESS = "inspect"

_LETTERS = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}
_ZSTANDARD = 93


def is_log(value: Any) -> bool:
    """Whether a JSON object is such a log."""
    return isinstance(value, dict) and isinstance(value.get("eval"), dict) and "version" in value


def is_table(columns: set[str]) -> bool:
    """Whether these are the columns of a saved `samples_df()`."""
    return {"id", "epoch"} <= columns and any(name.startswith("score_") for name in columns)


def read(path: Path, text: str | None = None, group: str | None = None) -> Log:
    """The samples of one log; `text` and `group` are fields of a sample, with dots for those inside others.

    Raises:
        FormatError, TextFormatError: not such a file, or a damaged one.
    """
    log = Log(HARNESS)
    failed = 0
    for row, (task, record) in enumerate(_records(path)):
        if not isinstance(record, dict) or "id" not in record:
            raise FormatError("a sample without an id", file=str(path), row=row)
        sample = Sample(
            task,
            str(record["id"]),
            _values(record.get("scores"), log),
            epoch=str(record.get("epoch", 1)),
            text=_field(record, text, path, row),
            group=_field(record, group, path, row),
            file=str(path),
            row=row,
        )
        failed += not sample.scores
        log.samples.append(sample)
    _fill(log, failed)
    return log


def read_table(path: Path, text: str | None = None, group: str | None = None) -> Log:
    """The samples of a saved `samples_df()`, `.parquet` or `.csv`."""
    log = Log(HARNESS)
    frame = tables.read_table(path)
    scorers = [
        str(c) for c in frame.columns if str(c).startswith("score_") and not str(c).endswith("_metadata")
    ]
    task_column = next((c for c in ("task_name", "task") if c in frame.columns), None)
    for name in (text, group):
        if name is not None:
            tables.column(frame, name, str(path))
    for row, record in enumerate(frame.to_dict("records")):
        scores: dict[str, float] = {}
        for column in scorers:
            value = record[column]
            name = column.removeprefix("score_")
            missing = value is None or value != value
            of = _value(name, None if missing else value, log)
            scores |= of
        sample = Sample(
            str(record[task_column]) if task_column else path.stem,
            str(record["id"]),
            scores,
            epoch=str(record["epoch"]),
            text=None if text is None else str(record[text]),
            group=None if group is None else str(record[group]),
            file=str(path),
            row=row,
        )
        log.samples.append(sample)
    _fill(log, 0)
    return log


def _fill(log: Log, failed: int) -> None:
    """A sample that lacks a score others have is unscored, not absent."""
    names = dict.fromkeys(name for sample in log.samples for name in sample.scores)
    for sample in log.samples:
        sample.scores = {name: sample.scores.get(name, math.nan) for name in names}
    if failed:
        log.notices.append(f"{failed:,} samples have no score: they failed, or the run was cut off.")


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """(task, sample) of every sample of a log."""
    if path.suffix == ".eval":
        yield from _of_archive(path)
        return
    try:
        log = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise TextFormatError(f"not readable as JSON: {error}", file=str(path)) from None
    if not is_log(log):
        raise FormatError("not a log of inspect", file=str(path))
    for sample in log.get("samples") or []:
        yield _task(log), sample


def _task(header: Any) -> str:
    name = str((header.get("eval") or {}).get("task", "task")) if isinstance(header, dict) else "task"
    return name.rsplit("/", 1)[-1]


def _of_archive(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            # A run that was cut off has no header, only what it wrote at its start.
            start = next((n for n in ("header.json", "_journal/start.json") if n in names), None)
            if start is None:
                raise FormatError("not a log of inspect: no header in it", file=str(path))
            task = _task(json.loads(_member(archive, start)))
            samples = [info for info in archive.infolist() if info.filename.startswith("samples/")]
            for info in samples:
                if info.filename.endswith(".json"):
                    yield task, json.loads(_member(archive, info.filename))
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise FormatError(f"a damaged log of inspect: {error}", file=str(path)) from None


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """One file of an archive; Zstandard, which newer logs use, is no part of Python's own reader yet."""
    info = archive.getinfo(name)
    if info.compress_type != _ZSTANDARD:
        return archive.read(info)
    import pyarrow as pa

    assert archive.fp is not None
    archive.fp.seek(info.header_offset)
    header = archive.fp.read(30)
    if len(header) < 30:
        raise zipfile.BadZipFile("it ends too soon")
    skipped = sum(struct.unpack("<HH", header[26:30]))
    archive.fp.seek(info.header_offset + 30 + skipped)
    packed = archive.fp.read(info.compress_size)
    try:
        found: bytes = pa.CompressedInputStream(pa.BufferReader(packed), "zstd").read()
    except (pa.ArrowException, OSError) as error:
        raise zipfile.BadZipFile(str(error)) from None
    if len(found) != info.file_size or zlib.crc32(found) != info.CRC:
        raise zipfile.BadZipFile(f"bad checksum of {name}")
    return found


def _values(scores: Any, log: Log) -> dict[str, float]:
    out: dict[str, float] = {}
    for name, score in (scores or {}).items():
        out |= _value(name, score.get("value") if isinstance(score, dict) else score, log)
    return out


def _value(name: str, value: Any, log: Log) -> dict[str, float]:
    if isinstance(value, dict):
        out: dict[str, float] = {}
        for key, item in value.items():
            out |= _value(f"{name}/{key}", item, log)
        return out
    if isinstance(value, str) and value in _LETTERS:
        return {name: _LETTERS[value]}
    words = {"yes": 1.0, "no": 0.0}
    if isinstance(value, str) and value.strip().lower() in words:
        return {name: words[value.strip().lower()]}
    try:
        return {name: number(value)}
    except ValueError:
        log.skipped.setdefault(name, "no number for each sample")
        return {}


def _field(record: dict[str, Any], name: str | None, path: Path, row: int) -> str | None:
    if name is None:
        return None
    value: Any = record
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if value is None:
        raise FormatError(
            f"the sample has no field {name!r}",
            file=str(path),
            row=row,
            remedy=f"there are: {', '.join(record)}",
        )
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
