"""Reads the small tables that users bring: CSV, JSONL and parquet, with ids that stay as they were written.

Nothing is guessed from the look of a value: CSV cells are strings until a column is asked for as numbers, so
an id `007` stays `007`, and a value that is no number is refused with its row.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lmd3.errors import (
    ColumnError,
    DuplicateIdError,
    FileMissingError,
    FormatError,
    InputError,
    TextFormatError,
)

#: Spellings of "no value" in text cells.
_MISSING = frozenset({"", "na", "n/a", "nan", "null", "none"})
_WORDS = {"true": 1.0, "false": 0.0}
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}


def as_frame(table: Any) -> pd.DataFrame:
    """A pandas frame of an Arrow table, a frame or a path of a table; integers with nulls stay integers."""
    if isinstance(table, pd.DataFrame):
        return table.reset_index(drop=True)
    if isinstance(table, pa.Table):
        frame: pd.DataFrame = table.to_pandas(integer_object_nulls=True)
        return frame
    if isinstance(table, (str, Path)):
        return read_table(table)
    raise InputError(f"expected a table or the path of one, got {type(table).__name__}")


def read_table(path: str | Path) -> pd.DataFrame:
    """Reads a `.csv`, `.jsonl` (both also `.gz`, `.zst`) or `.parquet` table.

    CSV cells are strings; JSON values stay as they are.

    Raises:
        FileMissingError: no such file.
        FormatError: the name ends in none of these, or the parquet file is damaged.
        TextFormatError: a broken line (its number, counted from 0), bytes that are not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise FileMissingError("no such file", file=str(path))
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = _COMPRESSED.get(suffixes[-1]) if suffixes else None
    kind = suffixes[-2] if compression and len(suffixes) > 1 else suffixes[-1] if suffixes else ""
    if kind == ".parquet":
        try:
            return as_frame(pq.read_table(path))
        except (pa.ArrowException, OSError) as error:
            raise FormatError(f"not a readable parquet file: {_first_line(error)}", file=str(path)) from None
    if kind not in (".csv", ".jsonl", ".ndjson"):
        raise FormatError(
            "not a table by its name", file=str(path), remedy="tables end in .csv, .jsonl or .parquet"
        )
    text = _text(path, compression)
    return _read_csv(text, path) if kind == ".csv" else _read_jsonl(text, path)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _text(path: Path, compression: str | None) -> str:
    try:
        data = path.read_bytes()
        if compression == "gzip":
            data = gzip.decompress(data)
        elif compression == "zstd":
            data = pa.CompressedInputStream(pa.BufferReader(data), "zstd").read()
    except (OSError, EOFError, pa.ArrowException) as error:
        raise FormatError(f"can't be decompressed: {_first_line(error)}", file=str(path)) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = data[: error.start].count(b"\n")
        raise TextFormatError("bytes that are not UTF-8", file=str(path), row=row) from None


def _read_csv(text: str, path: Path) -> pd.DataFrame:
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise TextFormatError(f"not valid CSV: {error}", file=str(path)) from None
    rows = [row for row in rows if row]
    if not rows:
        raise TextFormatError("empty: a CSV table starts with a line of column names", file=str(path))
    header = rows[0]
    if len(set(header)) != len(header):
        raise TextFormatError("two columns have the same name", file=str(path))
    for number, row in enumerate(rows[1:]):
        if len(row) != len(header):
            raise TextFormatError(
                f"{len(row)} cells where the header names {len(header)}", file=str(path), row=number
            )
    return pd.DataFrame(rows[1:], columns=header, dtype=object)


def _read_jsonl(text: str, path: Path) -> pd.DataFrame:
    columns: dict[str, list[Any]] = {}
    count = 0
    for number, line in enumerate(text.split("\n")):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise TextFormatError(f"broken JSON line: {error}", file=str(path), row=number) from None
        if not isinstance(record, dict):
            raise TextFormatError("a line that is not a JSON object", file=str(path), row=number)
        for name in record.keys() - columns.keys():
            columns[name] = [None] * count
        for name, values in columns.items():
            values.append(record.get(name))
        count += 1
    return pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in columns.items()})


def column(frame: pd.DataFrame, name: str, file: str | None = None) -> pd.Series[Any]:
    """A named column, or a `ColumnError` that lists those there are."""
    if name not in frame.columns:
        there = ", ".join(map(str, frame.columns[:12])) + (", …" if len(frame.columns) > 12 else "")
        raise ColumnError(f"no column {name!r}", file=file, remedy=f"there are: {there}")
    return frame[name]


def row_ids(frame: pd.DataFrame, name: str | None, file: str | None = None) -> list[str]:
    """The ids of a table's rows as strings: of the named column, else `id`, `doc_id`, else the row numbers.

    Raises:
        ColumnError: the named column does not exist, or an id is missing.
    """
    if name is None:
        name = next((known for known in ("id", "doc_id") if known in frame.columns), None)
        if name is None:
            return [str(row) for row in range(len(frame))]
    values = column(frame, name, file)
    missing = np.flatnonzero(values.isna().to_numpy())
    if len(missing):
        raise ColumnError(f"no id in column {name!r}", file=file, row=int(missing[0]))
    # Strings of Arrow are slow one by one.
    return [str(value) for value in values.to_numpy(dtype=object)]


def refuse_duplicates(ids: Sequence[str], file: str | None = None, what: str = "id") -> None:
    """Raises `DuplicateIdError`, with the row of the second of them, where an id occurs twice."""
    if len(set(ids)) == len(ids):
        return
    seen: dict[str, int] = {}
    for row, name in enumerate(ids):
        first = seen.setdefault(name, row)
        if first != row:
            raise DuplicateIdError(f"{what} {name!r} occurs in rows {first} and {row}", file=file, row=row)


def as_number(value: Any) -> float:
    """A cell as a number: numbers, booleans and their spellings; NaN for a missing one; else `ValueError`."""
    if value is None:
        return float("nan")
    if isinstance(value, str):
        word = value.strip().lower()
        if word in _MISSING:
            return float("nan")
        return _WORDS[word] if word in _WORDS else float(word)
    if value is pd.NA or value is pd.NaT:
        return float("nan")
    return float(value)


def numbers(values: pd.Series[Any], name: str, file: str | None = None) -> np.ndarray:
    """A column as float64, NaN where a value is missing; true and false are 1 and 0.

    Raises:
        ColumnError: a value that is no number, with its row.
    """
    if values.dtype.kind in "iufb":
        return values.to_numpy(dtype=np.float64)
    out = np.empty(len(values), dtype=np.float64)
    for row, value in enumerate(values):
        try:
            out[row] = as_number(value)
        except (TypeError, ValueError):
            shown = repr(value)[:40]
            raise ColumnError(f"{shown} in column {name!r} is not a number", file=file, row=row) from None
    return out


def is_numeric(values: pd.Series[Any]) -> bool:
    """Whether a column holds numbers or booleans (some at least, and nothing else)."""
    if values.dtype.kind in "iufb":
        return True
    try:
        return bool(np.isfinite(numbers(values, "")).any())
    except ColumnError:
        return False
