"""Vectors in Arrow files (streams and files, uncompressed), found by their place in the mapped file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lmd3.errors import ColumnError, DtypeError, FileMissingError, FormatError, NotFiniteError, ShapeError
from lmd3.store.documents import first_line
from lmd3.store.pieces import Piece

#: Arrow's element types that are vectors, and their bytes.
FLAT = {"float": 4, "halffloat": 2}
_OURS = {"float": "float32", "halffloat": "float16"}

_IMPORT = "lmd3 import reads it"


def vector_type(kind: pa.DataType) -> bool:
    """Whether a column's type is lists of numbers that can be embeddings."""
    lists = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return bool(lists and pa.types.is_floating(kind.value_type))


def vector_column(schema: pa.Schema, column: str | None, file: Path) -> str:
    """The column of the vectors: the one asked for, or the only one that can be.

    Raises:
        ColumnError: there is none, or there are several.
    """
    try:
        fitting: list[str] = [field.name for field in schema if vector_type(field.type)]
    except UnicodeDecodeError:
        raise FormatError("a column's name is not UTF-8", file=str(file)) from None
    if column is None:
        if len(fitting) == 1:
            if schema.get_field_index(fitting[0]) < 0:
                raise FormatError("a column's name can't be looked up", file=str(file))
            return fitting[0]
        what = "no column of" if not fitting else f"several columns of ({', '.join(fitting)})"
        remedy = None if not fitting else "name one with --vectors of lmd3 import"
        raise ColumnError(f"{what} lists of floating numbers", file=str(file), remedy=remedy)
    if schema.get_field_index(column) < 0:
        raise ColumnError(f"has no column {column!r}", file=str(file))
    if column not in fitting:
        raise ColumnError(f"{column!r} is no list of floating numbers", file=str(file))
    return column


def vectors_of(array: pa.Array, file: Path, first: int) -> NDArray[Any]:
    """A chunk of lists as a matrix (m, d): a view of its values where nothing has to be copied.

    Raises:
        ShapeError: lists of different lengths.
        NotFiniteError: a missing list or value, with its row.
    """
    if array.null_count:
        row = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise NotFiniteError("no vector there", file=str(file), row=first + row)
    kind = array.type
    if pa.types.is_fixed_size_list(kind):
        d = kind.list_size
        values = array.values.slice(array.offset * d, len(array) * d)
    else:
        offsets = array.offsets.to_numpy()
        lengths = np.diff(offsets)
        d = int(lengths[0]) if len(lengths) else 0
        if (lengths != d).any():
            row = int(np.flatnonzero(lengths != d)[0])
            raise ShapeError(
                f"a vector of {lengths[row]} numbers after some of {d}", file=str(file), row=first + row
            )
        start = int(offsets[0]) if len(offsets) else 0
        if start < 0 or start + len(array) * d > len(array.values):
            raise FormatError("lists that lie outside their values", file=str(file))
        values = array.values.slice(start, len(array) * d)
    if len(values) != len(array) * d:
        raise FormatError("lists that lie outside their values", file=str(file))
    if values.null_count:
        at = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        raise NotFiniteError("a value is missing", file=str(file), row=first + at // max(d, 1))
    matrix: NDArray[Any] = values.to_numpy(zero_copy_only=False).reshape(len(array), d)
    return matrix


def arrow_batches(file: Path) -> tuple[pa.Schema, Iterator[pa.RecordBatch], pa.Buffer]:
    """Schema and record batches of an Arrow file or stream, and the buffer that it is mapped in.

    Raises:
        FormatError: it is neither.
    """
    try:
        whole = pa.memory_map(str(file)).read_buffer()
        if whole.slice(0, 6).to_pybytes() == b"ARROW1":
            reader: Any = pa.ipc.open_file(whole)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            reader = pa.ipc.open_stream(whole)
            batches = iter(reader)
        return reader.schema, batches, whole
    except FileNotFoundError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise FormatError(f"not an Arrow file: {first_line(error)}", file=str(file)) from None


def arrow_pieces(file: Path, column: str | None) -> tuple[str, list[Piece]]:
    """The column of the vectors, and the place of every chunk of it in the file.

    Raises:
        FormatError: no Arrow file, or a compressed one.
        ColumnError: no column of vectors, or several and none was named.
        DtypeError, ShapeError, NotFiniteError: vectors that can't be taken where they lie.
    """
    if not file.exists():
        raise FileMissingError("no such file", file=str(file))
    schema, batches, whole = arrow_batches(file)
    chosen = vector_column(schema, column, file)
    element = str(schema.field(chosen).type.value_type)
    if element not in _OURS:
        raise DtypeError(f"{chosen!r} holds elements of type {element}", file=str(file), remedy=_IMPORT)
    pieces: list[Piece] = []
    first = 0
    try:
        for batch in batches:
            if not batch.num_rows:
                continue
            array = batch.column(schema.get_field_index(chosen))
            array.validate()
            matrix = vectors_of(array, file, first)
            place = matrix.ctypes.data - whole.address
            if not (place >= 0 and place + matrix.nbytes <= whole.size) or not matrix.flags.c_contiguous:
                raise FormatError("its chunks are compressed", file=str(file), remedy=_IMPORT)
            pieces.append(Piece(file, (_OURS[element], len(matrix), matrix.shape[1], place)))
            first += len(matrix)
    except (OSError, ValueError, IndexError, pa.ArrowException) as error:
        if isinstance(error, (FormatError, ShapeError, NotFiniteError)):
            raise
        raise FormatError(f"a damaged Arrow file: {first_line(error)}", file=str(file)) from None
    return chosen, pieces
