"""faiss indexes that keep their vectors: flat ones and scalar quantisers, alone or under a map of ids.

Read from the bytes (as `faiss.write_index` lays them out, all little-endian), never through the library: a
file may come from anyone.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from lmd3.errors import FileMissingError, FormatError, ShapeError
from lmd3.store.pieces import Piece

_FLAT = (b"IxF2", b"IxFI", b"IxFl")
_MAPS = (b"IxMp", b"IxM2")

#: d, ntotal, two unused, is_trained, metric_type.
_HEADER = struct.Struct("<iqqqBi")

#: type of the quantiser, two on its training, d, bytes of a code.
_QUANTIZER = struct.Struct("<iifQQ")

#: Types of quantiser that are read: their names in faiss, and bytes of a value.
_TYPES = {0: "8bit", 2: "8bit_uniform", 4: "fp16", 5: "8bit_direct", 7: "bf16"}

_REMEDY = "rebuild the vectors with faiss (index.reconstruct_n) and save them as .npy"


@dataclass(frozen=True)
class FaissIndex:
    """Where the vectors of an index lie.

    Attributes:
        kind: "flat", or a scalar quantiser's type: "8bit", "8bit_uniform", "8bit_direct", "fp16", "bf16".
        n: vectors.
        d: dimensions.
        offset: where the codes begin.
        low, step: a value is low + step · (code + ½)/255, per dimension; for "8bit" and "8bit_uniform".
        ids: where the ids (int64) begin; None: none were given.
    """

    file: Path
    kind: str
    n: int
    d: int
    offset: int
    low: NDArray[np.float32] | None = None
    step: NDArray[np.float32] | None = None
    ids: int | None = None

    @property
    def piece(self) -> Piece | None:
        """The vectors as they lie; None where they have to be computed."""
        dtype = {"flat": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(self.kind)
        return None if dtype is None else Piece(self.file, (dtype, self.n, self.d, self.offset))

    def rows(self, first: int, count: int) -> NDArray[np.float32]:
        """The vectors of a range of rows, (m, d), of a quantiser of 8 bits."""
        codes = np.fromfile(self.file, np.uint8, count * self.d, offset=self.offset + first * self.d)
        if len(codes) != count * self.d:
            raise FormatError("truncated while it was read", file=str(self.file))
        values = codes.reshape(count, self.d).astype(np.float32)
        if self.low is None or self.step is None:
            return values
        return self.low + self.step * ((values + np.float32(0.5)) / np.float32(255))

    def id_numbers(self, first: int, count: int) -> NDArray[np.int64] | None:
        """The ids of a range of rows."""
        if self.ids is None:
            return None
        return np.fromfile(self.file, "<i8", count, offset=self.ids + 8 * first).astype(np.int64)


class _Reader:
    """Reads a file's beginning; every length is checked against what the file has left."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._size = file.seek(0, 2)
        file.seek(0)

    def refuse(self, message: str, remedy: str | None = None) -> FormatError:
        return FormatError(message, file=str(self._path), remedy=remedy)

    def take(self, size: int) -> bytes:
        content = self._file.read(size)
        if len(content) < size:
            raise self.refuse("truncated inside the index's description")
        return content

    def numbers(self, layout: struct.Struct) -> tuple[int | float, ...]:
        return layout.unpack(self.take(layout.size))

    def array(self, size: int) -> tuple[int, int]:
        """(place, bytes) of a vector of elements of a size, which is stepped over."""
        (count,) = struct.unpack("<Q", self.take(8))
        place = self._file.tell()
        if count > (self._size - place) // size:
            raise self.refuse(f"truncated: it promises {count} elements of {size} bytes")
        self._file.seek(count * size, 1)
        return place, count * size

    def end(self) -> None:
        if self._file.tell() != self._size:
            raise self.refuse(f"{self._size - self._file.tell()} bytes more than it promises")


def read_faiss(path: Path) -> FaissIndex:
    """Where the vectors of an index lie.

    Raises:
        FileMissingError: no such file.
        FormatError: no index, a damaged one, or of a kind that does not keep its vectors.
        ShapeError: an empty index.
    """
    try:
        with path.open("rb") as file:
            reader = _Reader(file, path)
            found = _index(reader, path, True)
            reader.end()
            return found
    except OSError as error:
        raise FileMissingError(error.strerror or "can't be read", file=str(path)) from None


def _header(reader: _Reader) -> tuple[int, int]:
    d, n, _, _, _, metric = (int(value) for value in reader.numbers(_HEADER))
    if metric > 1:
        reader.take(4)
    return d, n


def _index(reader: _Reader, path: Path, outer: bool) -> FaissIndex:
    kind = reader.take(4)
    if kind in _MAPS and outer:
        _, n = _header(reader)
        inner = _index(reader, path, False)
        place, size = reader.array(8)
        if size != 8 * inner.n or n != inner.n:
            raise reader.refuse(f"{size // 8} ids for {inner.n} vectors")
        return FaissIndex(path, inner.kind, inner.n, inner.d, inner.offset, inner.low, inner.step, ids=place)
    if kind not in (*_FLAT, b"IxSQ"):
        name = kind.decode("latin-1") if kind.isalnum() else kind.hex()
        raise reader.refuse(f"{name} is not the mark of a flat index or a scalar quantiser", _REMEDY)
    d, n = _header(reader)
    if d < 1 or n < 1:
        raise ShapeError(f"an index of {n} vectors of {d} dimensions", file=str(path))
    if kind in _FLAT:
        place, size = reader.array(4)
        if size != 4 * n * d:
            raise reader.refuse(f"{size // 4} numbers are not {n} vectors of {d} dimensions")
        return FaissIndex(path, "flat", n, d, place)
    return _scalar(reader, path, n, d)


def _scalar(reader: _Reader, path: Path, n: int, d: int) -> FaissIndex:
    number, _, _, inner_d, code_size = reader.numbers(_QUANTIZER)
    if number not in _TYPES:
        raise reader.refuse(f"a scalar quantiser of type {number}, which is not read", _REMEDY)
    kind = _TYPES[int(number)]
    width = 2 if kind in ("fp16", "bf16") else 1
    if inner_d != d or code_size != width * d:
        raise reader.refuse(f"codes of {code_size} bytes for {d} dimensions")
    trained_at, trained_size = reader.array(4)
    codes_at, size = reader.array(1)
    if size != n * int(code_size):
        raise reader.refuse(f"{size} bytes of codes are not {n} of {code_size}")
    expected = {"8bit": 2 * d, "8bit_uniform": 2}.get(kind)
    if expected is None:
        return FaissIndex(path, kind, n, d, codes_at)
    if trained_size != 4 * expected:
        raise reader.refuse(f"{trained_size // 4} trained values, not {expected}")
    trained = np.fromfile(path, "<f4", expected, offset=trained_at).astype(np.float32)
    if not np.isfinite(trained).all():
        raise reader.refuse("trained values that are not finite")
    half = expected // 2
    low, step = trained[:half], trained[half:]
    return FaissIndex(path, kind, n, d, codes_at, np.broadcast_to(low, d), np.broadcast_to(step, d))


def faiss_pieces(path: Path) -> list[Piece]:
    """The vectors of an index as they lie in its file.

    Raises:
        FormatError: they have to be computed; and as `read_faiss`.
    """
    found = read_faiss(path)
    if found.piece is None:
        raise FormatError(
            f"a scalar quantiser ({found.kind}), whose vectors have to be computed",
            file=str(path),
            remedy="lmd3 import reads it",
        )
    return [found.piece]
