"""Columns that are attached to vectors: ids, groups, texts, weights, of the same files or of others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lmd3.errors import ColumnError, ParameterError, ShapeError
from lmd3.store.documents import parquet_file
from lmd3.texts import NO_GROUP, read_records

__all__ = ["Columns", "Sidecar"]

_STEP = 1 << 14


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are taken; None: that is not attached."""

    id: str | None = None
    group: str | None = None
    text: str | None = None
    weight: str | None = None

    @property
    def named(self) -> dict[str, str]:
        """What is attached, by the names that stores give it."""
        pairs = (("id", self.id), ("group", self.group), ("text", self.text), ("weight", self.weight))
        return {ours: theirs for ours, theirs in pairs if theirs is not None}

    def values(self, table: pa.Table, file: str, first: int) -> dict[str, Any]:
        """The columns as `StoreWriter.append` takes them.

        Args:
            table: with the columns named.
            file: for messages.
            first: the number of its first row in that file.

        Raises:
            ColumnError: a column that is missing, or values that are none of its kind, with the row.
        """
        found: dict[str, Any] = {}
        for ours, theirs in self.named.items():
            if theirs not in table.column_names:
                names = ", ".join(table.column_names) or "none"
                raise ColumnError(f"has no column {theirs!r}; it has: {names}", file=file)
            column = table[theirs]
            if ours == "weight":
                found["weights"] = _weights(column, theirs, file, first)
            else:
                found[f"{ours}s"] = _strings(column, ours, theirs, file, first)
        return found


def _strings(column: pa.ChunkedArray, ours: str, theirs: str, file: str, first: int) -> list[str]:
    kind = column.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    fits = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not (fits or pa.types.is_null(kind) or (ours != "text" and pa.types.is_integer(kind))):
        raise ColumnError(f"{theirs!r} is no column of {ours}s but of {column.type}", file=file)
    values: list[str | None] = column.cast(pa.string()).to_pylist()
    if ours == "id":
        for row, value in enumerate(values):
            if not value:
                raise ColumnError(f"the id {theirs!r} is empty", file=file, row=first + row)
    return [value or (NO_GROUP if ours == "group" else "") for value in values]


def _weights(column: pa.ChunkedArray, theirs: str, file: str, first: int) -> Any:
    try:
        weights = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    except (pa.ArrowException, ValueError):
        raise ColumnError(f"{theirs!r} is no column of weights but of {column.type}", file=file) from None
    with np.errstate(invalid="ignore"):
        wrong = ~(np.isfinite(weights) & (weights >= 0))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ColumnError(
            f"a weight that is not a finite number ≥ 0: {weights[row]}", file=file, row=first + row
        )
    return weights.astype(np.float32)


class Sidecar:
    """Files with a row per vector, in their order: parquet, CSV, JSONL or plain text (one id per line).

    Args:
        files: read one after the other.
        columns: those to take.
    """

    def __init__(self, files: Sequence[Path], columns: Columns) -> None:
        if not columns.named:
            raise ParameterError("no column of the metadata is named", remedy="name one: --id, --group, …")
        self.files, self.columns = list(files), columns
        self._tables = self._read()
        self._waiting: list[tuple[pa.Table, str, int]] = []
        self._rows = 0
        self._taken = 0

    def count(self) -> int | None:
        """Rows of all files, where that is known before they are read."""
        total = 0
        for file in self.files:
            if file.suffix.lower() != ".parquet":
                return None
            with parquet_file(file) as opened:
                total += opened.metadata.num_rows
        return total

    def _read(self) -> Iterator[tuple[pa.Table, str, int]]:
        wanted = list(dict.fromkeys(self.columns.named.values()))
        for file in self.files:
            first = 0
            if file.suffix.lower() == ".parquet":
                with parquet_file(file) as opened:
                    present = [name for name in wanted if name in opened.schema_arrow.names]
                    for batch in opened.iter_batches(batch_size=_STEP, columns=present):
                        yield pa.Table.from_batches([batch]), str(file), first
                        first += batch.num_rows
                continue
            rows: list[Mapping[str, Any]] = []
            for record in read_records(file, wanted):
                rows.append(record)
                if len(rows) == _STEP:
                    yield _table(rows, wanted, str(file), first), str(file), first
                    first += len(rows)
                    rows = []
            if rows:
                yield _table(rows, wanted, str(file), first), str(file), first

    def take(self, count: int) -> dict[str, Any]:
        """The columns of the next rows.

        Raises:
            ShapeError: there are fewer.
            ColumnError: as `Columns.values`.
        """
        while self._rows < count:
            found = next(self._tables, None)
            if found is None:
                raise ShapeError(
                    f"{self._taken + self._rows} rows of metadata, and there are more vectors",
                    file=str(self.files[-1]),
                )
            self._waiting.append(found)
            self._rows += found[0].num_rows
        parts: list[dict[str, Any]] = []
        left = count
        while left:
            table, file, first = self._waiting.pop(0)
            parts.append(self.columns.values(table.slice(0, left), file, first))
            if table.num_rows > left:
                self._waiting.insert(0, (table.slice(left), file, first + left))
            left -= min(left, table.num_rows)
        self._rows -= count
        self._taken += count
        joined: dict[str, Any] = {}
        for name in parts[0] if parts else ():
            columns = [part[name] for part in parts]
            joined[name] = np.concatenate(columns) if name == "weights" else [v for c in columns for v in c]
        return joined

    def finish(self) -> None:
        """Refuses rows that no vector was there for.

        Raises:
            ShapeError: names the file.
        """
        left = self._waiting[0] if self._waiting else next(self._tables, None)
        if left is not None:
            raise ShapeError(
                f"more rows of metadata than the {self._taken} vectors", file=left[1], row=left[2]
            )


def _table(rows: Sequence[Mapping[str, Any]], names: Sequence[str], file: str, first: int) -> pa.Table:
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, OverflowError):
            kinds = {type(value).__name__ for value in values}
            raise ColumnError(
                f"{name!r} mixes values of the types {', '.join(sorted(kinds))}", file=file, row=first
            ) from None
    return pa.table(columns)
