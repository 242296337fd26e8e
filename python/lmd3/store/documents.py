"""The documents of a shard: ids, groups and texts in a parquet file, written in small row groups and read by
them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lmd3.errors import FileMissingError, FormatError
from lmd3.store.layout import CHUNK, DOCUMENT, DOCUMENTS, OPTIONAL, ROW_GROUP, SOURCE_ROW


def field_of(name: str) -> pa.Field:
    """The column of a name."""
    return next((field for field in OPTIONAL if field.name == name), None) or DOCUMENTS.field(name)


def with_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of a schema in its order, null where the table lacks them."""
    columns = [
        table[field.name].cast(field.type)
        if field.name in table.column_names
        else pa.chunked_array([pa.nulls(table.num_rows, field.type)])
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


@contextlib.contextmanager
def parquet_file(path: Path) -> Iterator[pq.ParquetFile]:
    """An open parquet file; whatever fails with it names the file."""
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            yield file
    except FileNotFoundError:
        raise FileMissingError("no such file", file=str(path)) from None
    except (OSError, pa.ArrowException) as error:
        raise FormatError(f"not a readable parquet file: {first_line(error)}", file=str(path)) from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error).split("\n", 1)[0].strip().rstrip(".") or type(error).__name__


def take_rows(path: Path, rows: NDArray[np.int64], columns: Mapping[str, str]) -> list[pa.Table]:
    """Sorted rows of a parquet file, a row group at a time; columns: their names here, and in the file."""
    parts = []
    with parquet_file(path) as file:
        present = {name: own for name, own in columns.items() if own in file.schema_arrow.names}
        first = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            inside = rows[np.searchsorted(rows, first) : np.searchsorted(rows, first + count)] - first
            if inside.size:
                table = file.read_row_group(group, columns=list(present.values())).take(pa.array(inside))
                parts.append(table.select(list(present.values())).rename_columns(list(present)))
            first += count
    return parts


def documents_schema(columns: Mapping[str, Any]) -> pa.Schema:
    """The columns of a store's documents, where `columns` were given to `StoreWriter.append`."""
    given = {SOURCE_ROW.name: "source_rows", DOCUMENT.name: "documents", CHUNK.name: "chunks"}
    schema = DOCUMENTS
    for field in OPTIONAL:
        if columns[given[field.name]] is not None:
            schema = schema.append(field)
    return schema


class DocumentsWriter:
    """A parquet file of documents, written in row groups of a fixed size whatever the batches are."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self.schema = schema
        self._file = path.open("wb")
        self._writer = pq.ParquetWriter(self._file, schema, compression="zstd")
        self._waiting: list[pa.Table] = []
        self._rows = 0

    def write(self, table: pa.Table) -> None:
        """Takes the next documents."""
        self._waiting.append(table)
        self._rows += table.num_rows
        if self._rows >= ROW_GROUP:
            waiting = pa.concat_tables(self._waiting)
            whole = self._rows - self._rows % ROW_GROUP
            self._writer.write_table(waiting.slice(0, whole), row_group_size=ROW_GROUP)
            self._waiting = [waiting.slice(whole)]
            self._rows -= whole

    def abandon(self) -> None:
        """Closes the file as it is."""
        self._waiting, self._rows = [], 0
        with contextlib.suppress(Exception):
            self._writer.close()
        with contextlib.suppress(OSError):
            self._file.close()

    def close(self) -> None:
        """Writes what waits, and makes the file durable."""
        if self._file.closed:
            return
        with self._file:
            if self._rows:
                self._writer.write_table(pa.concat_tables(self._waiting), row_group_size=ROW_GROUP)
            self._writer.close()
            self._file.flush()
            os.fsync(self._file.fileno())


def documents_table(ids: Sequence[str], columns: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    """Columns as `StoreWriter.append` takes them, as a table; what was not given is null."""
    values = {
        "id": ids,
        "group": columns["groups"],
        "text": columns["texts"],
        "tokens": columns["tokens"],
        "truncated": columns["truncated"],
        "source_row": columns["source_rows"],
        "document": columns["documents"],
        "chunk": columns["chunks"],
    }
    arrays = []
    for field in schema:
        value = values[field.name]
        arrays.append(pa.nulls(len(ids), field.type) if value is None else pa.array(value, type=field.type))
    return pa.Table.from_arrays(arrays, schema=schema)
