"""Stores: embeddings on disk with their ids, groups and texts; opened by mapping, written atomically,
verified.

A store is a folder (`manifest.json`, `embeddings-00000.npy`, `documents-00000.parquet`, …), a bare `.npy`
or `.safetensors` file, or an array in memory; `open_store` makes one `Store` of each.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lmd3 import _lmd3
from lmd3.errors import (
    ColumnError,
    DtypeError,
    FileMissingError,
    FormatError,
    NotFiniteError,
    OutputError,
    ParameterError,
    ShapeError,
    VerificationError,
    WorkError,
)
from lmd3.texts import UniqueIds

if TYPE_CHECKING:
    from lmd3.encoders import Encoder

__all__ = ["Store", "StoreWriter", "open_store", "verify_store"]

FORMAT = "lmd3-store"
VERSION = 1
MANIFEST = "manifest.json"

#: Element types that stores are written in.
DTYPES = ("float16", "float32", "bfloat16", "int8")

#: Rounding to an element type relative to the norm: half a unit in the last place. (That of int8 depends on
#: the rows.)
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}

#: Columns of `documents-*.parquet`.
DOCUMENTS = pa.schema(
    [
        ("id", pa.string()),
        ("group", pa.string()),
        ("text", pa.string()),
        ("tokens", pa.int32()),
        ("truncated", pa.bool_()),
    ]
)

#: The column that sorting adds: the row's number in the store that was sorted.
SOURCE_ROW = pa.field("source_row", pa.int64())

#: Columns that may be asked for.
_COLUMNS = (*DOCUMENTS.names, SOURCE_ROW.name)

#: Rows of one row group of the documents: what a look-up of one row reads.
_ROW_GROUP = 4096

#: Bare files up to this size are checked for NaN when opened; larger ones while scanned.
_CHECKED_BYTES = 8 << 30

#: Allowed distance of a norm from 1 where a store says that it is normalised.
_NORM_TOLERANCE = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1.6e-2, "int8": 5e-2}

_TO_FLOAT32 = "array.astype('float32')"


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Store:
    """n vectors of d dimensions with an id each, perhaps groups and texts. Made by `open_store`; never
    changes.

    Attributes:
        path: the folder or file; None for an array in memory.
        native: the mapped store; None for an array in memory.
        array: (n, d) float32 or float16 in C order, for a store in memory; else None.
        manifest: what `manifest.json` says; {} for bare vectors.
        encoder: how the vectors were made (`Encoder.describe`); None for bare vectors.
    """

    def __init__(
        self,
        *,
        path: Path | None = None,
        native: _lmd3.Store | None = None,
        array: NDArray[Any] | None = None,
        manifest: Mapping[str, Any] | None = None,
        table: pa.Table | None = None,
        encoder: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = path
        self.native = native
        self.array = array
        self.manifest: dict[str, Any] = dict(manifest or {})
        described = encoder if encoder is not None else self.manifest.get("encoder")
        self.encoder: dict[str, Any] | None = None if described is None else dict(described)
        self._table = table
        self._fingerprint: str | None = None
        self._normalised: bool | None = self.manifest.get("normalised")
        self._rounding: float | None = self.manifest.get("rounding")

    @classmethod
    def in_memory(
        cls, vectors: NDArray[Any], documents: pa.Table, encoder: Mapping[str, Any] | None = None
    ) -> Store:
        """A store of vectors (n, d) with a table of their documents (columns of `DOCUMENTS`, the id at
        least).

        Raises:
            DtypeError, ShapeError, NotFiniteError: as `open_store` for arrays.
            DuplicateIdError: two rows with one id.
        """
        array = _checked_array(vectors)
        if documents.num_rows != len(array):
            raise ShapeError(f"{documents.num_rows} documents for {len(array)} vectors")
        unique = UniqueIds()
        ids = documents["id"].to_pylist()
        unique.add(ids)
        unique.check(lambda rows: [ids[row] for row in rows])
        return cls(array=array, table=documents, encoder=encoder)

    @property
    def n(self) -> int:
        """Rows."""
        return self.native.n if self.native is not None else len(self._array)

    @property
    def d(self) -> int:
        """Dimensions."""
        return self.native.d if self.native is not None else int(self._array.shape[1])

    @property
    def dtype(self) -> str:
        """Element type: "float32", "float16", "bfloat16" or "int8"."""
        return self.native.dtype if self.native is not None else str(self._array.dtype)

    @property
    def _array(self) -> NDArray[Any]:
        assert self.array is not None
        return self.array

    def __len__(self) -> int:
        return self.n

    def __repr__(self) -> str:
        place = "in memory" if self.path is None else str(self.path)
        return f"<Store {place}: {self.n:,} × {self.d} {self.dtype}>"

    @property
    def normalised(self) -> bool:
        """Whether every vector has norm 1 within the element type's rounding; judged by at most 4,096 rows
        spread evenly where no manifest says it."""
        if self._normalised is None:
            rows = np.unique(np.linspace(0, self.n - 1, min(self.n, 4096)).astype(np.int64))
            norms = np.linalg.norm(self.rows(rows).astype(np.float64), axis=1)
            self._normalised = bool(np.all(np.abs(norms - 1) <= _NORM_TOLERANCE[self.dtype]))
        return self._normalised

    @property
    def rounding(self) -> float:
        """How far a stored row x̂ may lie from the row x that was given: ‖x̂ − x‖ ≤ rounding · ‖x‖.

        The manifest's figure, measured when the rows were written; half a unit in the last place where it has
        none. For int8 rows without it: the typical √(d/12) · scale (scale = max abs x̂ / 127) relative to the
        norm, the largest of at most 4,096 rows spread evenly. (Twice that is above √d · scale / 2, which no
        row exceeds.)
        """
        if self._rounding is None:
            if self.dtype in ROUNDING:
                self._rounding = ROUNDING[self.dtype]
            else:
                chosen = np.unique(np.linspace(0, self.n - 1, min(self.n, 4096)).astype(np.int64))
                rows = self.rows(chosen).astype(np.float64)
                norms = np.linalg.norm(rows, axis=1)
                scales = np.abs(rows).max(axis=1) / 127
                relative = np.divide(scales, norms, out=np.zeros_like(norms), where=norms > 0)
                self._rounding = float(np.sqrt(self.d / 12) * relative.max())
        return self._rounding

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that differ where the vectors, ids or groups do: of the manifest's facts and
        checksums; of a bare file's header, size and sampled bytes; of all bytes of an array."""
        if self._fingerprint is None:
            if self.array is not None:
                facts = f"{self.array.shape} {self.array.dtype}".encode()
                ids = b"" if self._table is None else "\0".join(self._table["id"].to_pylist()).encode()
                key = facts + self.array.tobytes() + ids
            elif self.manifest:
                # What was written, not when or by which version.
                kept = ("version", "d", "rows", "dtype", "normalised", "encoder", "groups", "shards")
                key = json.dumps({name: self.manifest.get(name) for name in kept}, sort_keys=True).encode()
            else:
                key = _sampled_bytes(Path(str(self.path)))
            self._fingerprint = _lmd3.xxh3(key)
        return self._fingerprint

    @property
    def groups(self) -> list[str]:
        """Names of the groups; a row's group code is the position here. Empty where no groups were
        recorded.
        """
        if self._table is not None:
            return self._memory_groups()[0]
        return [group["name"] for group in self.manifest.get("groups", [])]

    def _memory_groups(self) -> tuple[list[str], NDArray[np.uint32] | None]:
        assert self._table is not None
        if "group" not in self._table.column_names or self._table["group"].null_count == self._table.num_rows:
            return [], None
        encoded = self._table["group"].combine_chunks().dictionary_encode()
        return encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.uint32)

    def group_codes(self) -> NDArray[np.uint32] | None:
        """The group code of every row, (n,) uint32; None where no groups were recorded."""
        if self._table is not None:
            return self._memory_groups()[1]
        codes = None if self.native is None else self.native.group_codes()
        if codes is None and len(self.groups) == 1:
            return np.zeros(self.n, np.uint32)
        return codes

    def group_runs(self) -> int:
        """Runs of rows of one group, from end to end of the store: 1 where no groups were recorded."""
        if self._table is not None:
            codes = self.group_codes()
            parts = [] if codes is None else [codes]
        else:
            parts = list(self._column("groups"))
        runs, last = 1, None
        for part in parts:
            runs += int(np.count_nonzero(part[1:] != part[:-1])) + int(last is not None and last != part[0])
            last = part[-1]
        return runs

    def weights(self) -> NDArray[np.float32] | None:
        """The weight of every row, (n,) float32; None where all are 1."""
        parts = list(self._column("weights"))
        return np.concatenate(parts) if parts else None

    def _column(self, name: str) -> Iterator[NDArray[Any]]:
        """A column of numbers beside the embeddings, shard by shard, mapped; none of a shard without it."""
        for shard in self.manifest.get("shards", []):
            if entry := shard.get(name):
                yield np.load(Path(str(self.path)) / entry["name"], mmap_mode="r", allow_pickle=False)

    def rows(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        """The vectors of the given row numbers (m,), in their order: (m, d) float32.

        Raises:
            ParameterError: a number outside 0 … n − 1.
        """
        rows = self._row_numbers(rows)
        if self.native is not None:
            return self.native.read_rows(rows)
        return np.ascontiguousarray(self._array[rows], dtype=np.float32)

    def _row_numbers(self, rows: NDArray[Any]) -> NDArray[np.int64]:
        numbers = np.ascontiguousarray(rows, dtype=np.int64).reshape(-1)
        if numbers.size and not (numbers.min() >= 0 and numbers.max() < self.n):
            bad = int(numbers.min() if numbers.min() < 0 else numbers.max())
            raise ParameterError(f"there is no row {bad} in a store of {self.n} rows", file=self._file)
        return numbers

    @property
    def _file(self) -> str | None:
        return None if self.path is None else str(self.path)

    @property
    def has_texts(self) -> bool:
        """Whether the store keeps the texts of its rows."""
        if self._table is not None:
            return "text" in self._table.column_names and self._table["text"].null_count < self.n
        return bool(self.manifest.get("texts", False))

    def ids(self, rows: NDArray[Any] | None = None) -> list[str]:
        """The ids of the given row numbers in their order, or of all rows; the row's number where none are
        recorded.
        """
        if rows is None:
            if self._table is not None:
                return list(self._table["id"].to_pylist())
            if not self._document_files():
                return [str(row) for row in range(self.n)]
            return [name for table in self._read_documents(["id"]) for name in table["id"].to_pylist()]
        return list(self.documents(rows, ("id",))["id"].to_pylist())

    def documents(self, rows: NDArray[Any], columns: Sequence[str] = ("id", "group", "text")) -> pa.Table:
        """What is known of the given rows besides their vectors, in the order of `rows`.

        Reads the row groups concerned only, one at a time. What the store does not keep is null, except the
        id: the row's number.

        Args:
            rows: (m,) row numbers.
            columns: of "id", "group", "text", "tokens", "truncated", "source_row" (see
                `lmd3.convert`).

        Raises:
            ColumnError: a column that stores do not have.
            ParameterError: a row number outside the store.
        """
        for name in columns:
            if name not in _COLUMNS:
                raise ColumnError(f"stores have no column {name!r}; they have {', '.join(_COLUMNS)}")
        numbers = self._row_numbers(rows)
        schema = pa.schema([_field(name) for name in columns])
        if self._table is not None:
            return _with_columns(self._table.take(pa.array(numbers)), schema)
        files = self._document_files()
        if not files:
            ids = pa.table({"id": pa.array([str(row) for row in numbers.tolist()], pa.string())})
            return _with_columns(ids, schema)
        wanted, positions = np.unique(numbers, return_inverse=True)
        parts = []
        first = 0
        for path, count in files:
            inside = wanted[np.searchsorted(wanted, first) : np.searchsorted(wanted, first + count)] - first
            if inside.size:
                parts += _take_rows(path, inside, list(columns))
            first += count
        found = pa.concat_tables(parts) if parts else schema.empty_table()
        return _with_columns(found.take(pa.array(positions)), schema)

    def texts(self, batch: int = 4096) -> Iterator[list[str]]:
        """All texts in row order, in lists of at most `batch`.

        Raises:
            ColumnError: the store keeps no texts.
        """
        if not self.has_texts:
            raise ColumnError(
                "the store keeps no texts",
                file=self._file,
                remedy="encode from texts and without --no-texts, or give the texts themselves",
            )
        tables = iter([self._table]) if self._table is not None else self._read_documents(["text"], batch)
        for table in tables:
            for part in table.select(["text"]).to_batches(max_chunksize=batch):
                yield part.column(0).to_pylist()

    def _document_files(self) -> list[tuple[Path, int]]:
        """The documents of each shard and their number; none for bare vectors."""
        shards = [shard for shard in self.manifest.get("shards", []) if shard.get("documents")]
        return [(Path(str(self.path)) / shard["documents"]["name"], int(shard["rows"])) for shard in shards]

    def _read_documents(self, columns: list[str], batch: int = 4096) -> Iterator[pa.Table]:
        for path, _ in self._document_files():
            with _parquet(path) as file:
                for part in file.iter_batches(batch_size=batch, columns=columns):
                    yield pa.Table.from_batches([part])


def _field(name: str) -> pa.Field:
    return SOURCE_ROW if name == SOURCE_ROW.name else DOCUMENTS.field(name)


def _with_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of a schema in its order, null where the table lacks them."""
    columns = [
        table[field.name].cast(field.type)
        if field.name in table.column_names
        else pa.chunked_array([pa.nulls(table.num_rows, field.type)])
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            yield file
    except FileNotFoundError:
        raise FileMissingError("no such file", file=str(path)) from None
    except (OSError, pa.ArrowException) as error:
        raise FormatError(f"not a readable parquet file: {_first_line(error)}", file=str(path)) from None


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0].strip().rstrip(".") or type(error).__name__


def _take_rows(path: Path, rows: NDArray[np.int64], columns: list[str]) -> list[pa.Table]:
    """Sorted rows of a parquet file, a row group at a time."""
    parts = []
    with _parquet(path) as file:
        present = [name for name in columns if name in file.schema_arrow.names]
        first = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            inside = rows[np.searchsorted(rows, first) : np.searchsorted(rows, first + count)] - first
            if inside.size:
                parts.append(file.read_row_group(group, columns=present).take(pa.array(inside)))
            first += count
    return parts


def _sampled_bytes(path: Path) -> bytes:
    """Header, size and 256 evenly spread samples of a file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        parts = [str(size).encode(), file.read(1 << 16)]
        for place in np.linspace(0, max(size - 4096, 0), 256).astype(np.int64).tolist():
            file.seek(place)
            parts.append(file.read(4096))
    return b"".join(parts)


def _checked_array(array: NDArray[Any], name: str = "the array") -> NDArray[Any]:
    """The array in C order, or the error that says why it is no matrix of embeddings."""
    if array.dtype.kind == "O":
        raise DtypeError(f"{name} holds objects, not numbers", remedy="numpy.stack(rows).astype('float32')")
    if array.dtype not in (np.dtype("float32"), np.dtype("float16")) or not array.dtype.isnative:
        raise DtypeError(f"{name} is {array.dtype}, not float32 or float16", remedy=_TO_FLOAT32)
    if array.ndim != 2:
        raise ShapeError(f"{name} has the shape {array.shape}, not (rows, dimensions)")
    if 0 in array.shape:
        raise ShapeError(f"{name} is empty: {array.shape[0]} rows × {array.shape[1]} dimensions")
    array = np.ascontiguousarray(array)
    step = max(1, (1 << 22) // array.shape[1])
    for start in range(0, len(array), step):
        finite = np.isfinite(array[start : start + step]).all(axis=1)
        if not finite.all():
            raise NotFiniteError(f"{name} holds NaN or infinity", row=start + int(np.argmin(finite)))
    return array


def open_store(source: str | Path | NDArray[Any] | Store) -> Store:
    """Opens vectors: a store's folder, a bare `.npy` or `.safetensors` file, an array, or a store, which is
    returned as it is.

    Nothing is copied or cast. Headers, sizes and facts of the manifest are checked; bare files up to 8 GB
    and arrays are also checked for NaN and infinity (stores are proven finite when written).

    Raises:
        FileMissingError, FormatError, ShapeError, DtypeError, NotFiniteError: each names the file, and the
            row where there is one.
    """
    if isinstance(source, Store):
        return source
    if isinstance(source, np.ndarray):
        return Store(array=_checked_array(source))
    if not isinstance(source, (str, os.PathLike)):
        raise ParameterError(f"a store is a path or a NumPy array, not {type(source).__name__}")
    path = Path(source)
    native = _lmd3.Store(path)
    if path.is_dir():
        # The native part has parsed these bytes and checked what it needs; the rest is checked here.
        manifest = json.loads((path / MANIFEST).read_bytes())
        for name, kind in (("encoder", dict), ("counts", dict), ("source", dict), ("files", list)):
            if not isinstance(manifest.get(name), kind | None):
                raise FormatError(
                    f"damaged manifest: {name!r} is not what it should be", file=str(path / MANIFEST)
                )
        rounding = manifest.get("rounding", 0.0)
        if not (isinstance(rounding, int | float) and 0 <= rounding <= 1):
            raise FormatError("damaged manifest: 'rounding' is no share of a norm", file=str(path / MANIFEST))
        return Store(path=path, native=native, manifest=manifest)
    if path.stat().st_size <= _CHECKED_BYTES:
        native.check_finite(_threads())
    return Store(path=path, native=native)


class StoreWriter:
    """Writes a store: append batches, then close. Nothing is there under the store's name before `close`
    succeeds.

    Use it as a context manager: leaving it by an exception removes all that was written.

    Args:
        path: the folder to make.
        dtype: element type on disk: "float16", "float32", "bfloat16" or "int8" (one scale per row).
        encoder: the encoder of the vectors (its description and fitted state are kept), or a description.
        normalised: whether every vector has norm 1; checked on what is appended.
        shard_rows: rows of one shard.
        force: replace a store that is there already.
        source: facts on the input for the manifest, such as its fingerprint and the number of empty texts.
        rounding: how far the given rows may be from those that they stand for, relative to their norms
            (`Store.rounding` of the store that they come from).

    Raises:
        OutputError: the path exists, or its folder can't be written.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: str = "float16",
        encoder: Encoder | Mapping[str, Any] | None = None,
        normalised: bool = True,
        shard_rows: int = 1 << 20,
        force: bool = False,
        source: Mapping[str, Any] | None = None,
        rounding: float = 0.0,
    ) -> None:
        if dtype not in DTYPES:
            raise DtypeError(f"stores are not written as {dtype}", remedy=f"use {', '.join(DTYPES)}")
        if shard_rows < 1:
            raise ParameterError(f"a shard has at least one row, not {shard_rows}")
        self.path = Path(path)
        self.source: dict[str, Any] = dict(source or {})
        self._dtype = dtype
        self._encoder = encoder
        self._normalised = normalised
        self._shard_rows = shard_rows
        self._force = force
        check_replaceable(self.path, force)
        parents = self.path.absolute().parents
        self._made = [parent for parent in parents if not parent.exists()]
        try:
            parents[0].mkdir(parents=True, exist_ok=True)
            # Beside the result, so that the last step is a rename.
            self._folder = Path(
                tempfile.mkdtemp(
                    prefix=f".{self.path.name}.", suffix=".partial", dir=self.path.absolute().parent
                )
            )
        except OSError as error:
            raise OutputError(f"can't be written: {error.strerror or error}", file=str(self.path)) from None
        self._shard: _lmd3.ShardWriter | None = None
        self._documents: _DocumentsWriter | None = None
        self._codes: list[NDArray[np.uint32]] = []
        self._weights: list[NDArray[np.float32]] = []
        self._files: list[dict[str, Any]] = []
        self._brought = rounding
        self._rounding = max(rounding, ROUNDING.get(dtype, 0.0))
        self._shards: list[dict[str, Any]] = []
        self._groups: dict[str, int] = {}
        self._group_rows: Counter[str] = Counter()
        self._unique = UniqueIds()
        self._counts = {"tokens": 0, "truncated": 0}
        self._kept: tuple[bool, ...] | None = None
        self._d: int | None = None
        self._n = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._folder.exists():
            self.close()
        else:
            self.abandon()

    @property
    def n(self) -> int:
        """Rows so far."""
        return self._n

    def append(
        self,
        vectors: NDArray[Any],
        ids: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
        texts: Sequence[str] | None = None,
        tokens: NDArray[Any] | None = None,
        truncated: NDArray[Any] | None = None,
        *,
        weights: NDArray[Any] | None = None,
        source_rows: NDArray[Any] | None = None,
    ) -> None:
        """Appends m rows. What is given for one batch must be given for all.

        Args:
            vectors: (m, d) float32 or float16.
            ids: m ids, unique in the store (proved by `close`); None: the row's number.
            groups, texts, tokens, truncated: one per row, or None.
            weights: finite numbers ≥ 0, one per row; None: all are 1.
            source_rows: the rows' numbers in the store that they come from, kept in the documents.

        Raises:
            DtypeError, ShapeError, NotFiniteError: vectors that can't be stored; the row is counted in the
                store.
            WorkError: the disk is full, or the like.
        """
        vectors = np.asarray(vectors)
        if not vectors.size and vectors.ndim == 2:
            return
        vectors = self._check(vectors)
        given = {"ids": ids, "groups": groups, "texts": texts, "tokens": tokens, "truncated": truncated}
        given |= {"weights": weights, "source_rows": source_rows}
        if weights is not None and not (np.isfinite(weights).all() and (np.asarray(weights) >= 0).all()):
            raise ParameterError("weights must be finite and not negative", file=str(self.path))
        for name, column in given.items():
            if column is not None and len(column) != len(vectors):
                raise ShapeError(f"{len(column)} {name} for {len(vectors)} vectors")
        kept = tuple(column is not None for column in given.values())
        if self._kept not in (None, kept):
            raise ParameterError("what is given for one batch (ids, groups, texts, …) must be given for all")
        self._kept = kept
        if ids is not None:
            self._unique.add(ids)
        for start, stop in self._pieces(len(vectors)):
            part = slice(start, stop)
            self._append_piece(
                vectors[part], {name: None if c is None else c[part] for name, c in given.items()}
            )

    def _check(self, vectors: NDArray[Any]) -> NDArray[np.float32]:
        try:
            vectors = np.ascontiguousarray(_checked_array(vectors, "the batch"), dtype=np.float32)
        except NotFiniteError as error:
            raise NotFiniteError(error.message, file=str(self.path), row=self._n + (error.row or 0)) from None
        if self._d is None:
            self._d = vectors.shape[1]
        elif vectors.shape[1] != self._d:
            raise ShapeError(
                f"a batch of {vectors.shape[1]} dimensions in a store of {self._d}", file=str(self.path)
            )
        if self._normalised:
            off = np.abs(np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64)) - 1)
            if off.max() > _NORM_TOLERANCE["float16"] + 2 * self._brought:
                row = int(off.argmax())
                raise ParameterError(
                    f"a vector of norm {1 + off[row]:.4g} or its inverse in a store of normalised vectors",
                    row=self._n + row,
                    remedy="normalise the vectors, or write the store with normalised=False",
                )
        return vectors

    def _pieces(self, count: int) -> Iterator[tuple[int, int]]:
        """Splits a batch at the ends of shards."""
        start = 0
        while start < count:
            stop = min(count, start + self._shard_rows - self._n % self._shard_rows)
            yield start, stop
            start = stop

    def _append_piece(self, vectors: NDArray[np.float32], columns: dict[str, Any]) -> None:
        number = len(self._shards)
        with self._failures():
            if self._shard is None or self._documents is None:
                self._shard = _lmd3.ShardWriter(self._folder, number, int(vectors.shape[1]), self._dtype)
                schema = DOCUMENTS if columns["source_rows"] is None else DOCUMENTS.append(SOURCE_ROW)
                self._documents = _DocumentsWriter(self._folder / f"documents-{number:05}.parquet", schema)
            try:
                self._shard.append(vectors)
            except NotFiniteError as error:
                row = number * self._shard_rows + (error.row or 0)
                raise NotFiniteError(
                    error.message, file=str(self.path), row=row, remedy=error.remedy
                ) from None
            ids = columns["ids"] or [str(row) for row in range(self._n, self._n + len(vectors))]
            self._documents.write(_documents(ids, columns, self._documents.schema))
            if columns["groups"] is not None:
                for name in columns["groups"]:
                    self._groups.setdefault(name, len(self._groups))
                self._group_rows.update(columns["groups"])
                codes = [self._groups[name] for name in columns["groups"]]
                self._codes.append(np.asarray(codes, dtype=np.uint32))
            if columns["weights"] is not None:
                self._weights.append(np.asarray(columns["weights"], dtype=np.float32))
            if columns["tokens"] is not None:
                self._counts["tokens"] += int(np.sum(columns["tokens"], dtype=np.int64))
            if columns["truncated"] is not None:
                self._counts["truncated"] += int(np.count_nonzero(columns["truncated"]))
            self._n += len(vectors)
            if self._n % self._shard_rows == 0:
                self._finish_shard()

    def _finish_shard(self) -> None:
        if self._shard is None or self._documents is None:
            return
        self._rounding = max(self._rounding, self._shard.rounding)
        rows, embeddings, scales = self._shard.finish()
        shard: dict[str, Any] = {"rows": rows, "embeddings": _entry(*embeddings)}
        if scales is not None:
            shard["scales"] = _entry(*scales)
        for name, parts in (("groups", self._codes), ("weights", self._weights)):
            if parts:
                path = self._folder / f"{name}-{len(self._shards):05}.npy"
                with path.open("wb") as file:
                    np.save(file, np.concatenate(parts), allow_pickle=False)
                    os.fsync(file.fileno())
                shard[name] = _listed(path)
        self._documents.close()
        shard["documents"] = _listed(self._documents.path)
        self._shards.append(shard)
        self._codes, self._weights = [], []
        self._shard = self._documents = None

    def attach(self, path: Path) -> None:
        """Copies a file into the store and lists it: the state of an encoder that is given as a description.

        Raises:
            WorkError: the disk is full, or the like.
        """
        with self._failures():
            copy = self._folder / path.name
            shutil.copyfile(path, copy)
            _sync_file(copy)
            self._files.append(_listed(copy))

    def close(self) -> Store:
        """Seals the store: last shard, proof that ids are unique, manifest, one rename.

        Raises:
            DuplicateIdError: an id that occurs twice, with both rows.
            ShapeError: no rows were appended.
            OutputError: the path has come into being meanwhile.
        """
        try:
            with self._failures():
                if self._n == 0:
                    raise ShapeError("a store without rows", file=str(self.path))
                self._finish_shard()
                if len(self._groups) < 2:
                    # One group needs no codes.
                    for shard in self._shards:
                        if entry := shard.pop("groups", None):
                            (self._folder / entry["name"]).unlink()
                manifest = self._manifest()
                with (self._folder / MANIFEST).open("w", encoding="utf-8") as file:
                    json.dump(manifest, file, ensure_ascii=False, indent=1)
                    file.write("\n")
                    file.flush()
                    os.fsync(file.fileno())
                _sync_folder(self._folder)
                # Opened before it is published: what can't be opened must not get the store's name.
                draft = open_store(self._folder)
                self._unique.check(lambda rows: draft.ids(np.asarray(rows)), file=str(self.path))
                self._folder.chmod(0o777 & ~_umask())
                self._publish()
        except BaseException:
            self.abandon()
            raise
        return open_store(self.path)

    def _manifest(self) -> dict[str, Any]:
        others = list(self._files)
        description: dict[str, Any] | None = None
        if isinstance(self._encoder, Mapping):
            description = dict(self._encoder)
        elif self._encoder is not None:
            description = self._encoder.describe()
            self._encoder.save_state(self._folder)
            if state := description.get("state_file"):
                _sync_file(self._folder / state)
                others.append(_listed(self._folder / state))
        ids, _, texts, _, _, weights, _ = self._kept or (False,) * 7
        return {
            "format": FORMAT,
            "version": VERSION,
            "created_by": f"lmd3 {_lmd3.__version__}",
            "d": self._d,
            "rows": self._n,
            "dtype": self._dtype,
            "metric": "euclidean",
            "normalised": self._normalised,
            "rounding": self._rounding,
            "ids": "given" if ids else "rows",
            "texts": texts,
            "weights": weights,
            "counts": {"rows": self._n, **self._counts},
            "source": self.source,
            "encoder": description,
            "groups": [{"name": name, "rows": self._group_rows[name]} for name in self._groups],
            "files": others,
            "shards": self._shards,
        }

    def _publish(self) -> None:
        check_replaceable(self.path, self._force)
        if not self.path.exists():
            self._folder.rename(self.path)
        elif not any(self.path.iterdir()):
            self._folder.replace(self.path)
        else:
            aside = Path(
                tempfile.mkdtemp(prefix=f".{self.path.name}.", suffix=".old", dir=self.path.absolute().parent)
            )
            self.path.rename(aside / "store")
            self._folder.rename(self.path)
            shutil.rmtree(aside, ignore_errors=True)
        _sync_folder(self.path.absolute().parent)

    def abandon(self) -> None:
        """Removes all that was written; does nothing after `close`."""
        if self._shard is not None:
            self._shard.abandon()
        if self._documents is not None:
            with contextlib.suppress(Exception):
                self._documents.close()
        self._shard = self._documents = None
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            # Not where something else, or the finished store, is in them by now.
            for parent in self._made:
                parent.rmdir()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Failures of the disk are failures of the work, not bad input."""
        try:
            yield
        except OutputError as error:
            raise WorkError(error.message, file=str(self.path), remedy=error.remedy) from None
        except OSError as error:
            raise WorkError(error.strerror or str(error), file=str(self.path)) from None


class _DocumentsWriter:
    """A parquet file of documents, written in row groups of a fixed size whatever the batches are."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self.schema = schema
        self._file = path.open("wb")
        self._writer = pq.ParquetWriter(self._file, schema, compression="zstd")
        self._waiting: list[pa.Table] = []
        self._rows = 0

    def write(self, table: pa.Table) -> None:
        self._waiting.append(table)
        self._rows += table.num_rows
        if self._rows >= _ROW_GROUP:
            waiting = pa.concat_tables(self._waiting)
            whole = self._rows - self._rows % _ROW_GROUP
            self._writer.write_table(waiting.slice(0, whole), row_group_size=_ROW_GROUP)
            self._waiting = [waiting.slice(whole)]
            self._rows -= whole

    def close(self) -> None:
        if self._file.closed:
            return
        with self._file:
            if self._rows:
                self._writer.write_table(pa.concat_tables(self._waiting), row_group_size=_ROW_GROUP)
            self._writer.close()
            self._file.flush()
            os.fsync(self._file.fileno())


def _documents(ids: Sequence[str], columns: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    values = {
        "id": ids,
        "group": columns["groups"],
        "text": columns["texts"],
        "tokens": columns["tokens"],
        "truncated": columns["truncated"],
        "source_row": columns["source_rows"],
    }
    arrays = []
    for field in schema:
        value = values[field.name]
        arrays.append(pa.nulls(len(ids), field.type) if value is None else pa.array(value, type=field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _entry(name: str, size: int, digest: str) -> dict[str, Any]:
    return {"name": name, "bytes": size, "xxh3": digest}


def xxh3(data: bytes) -> str:
    """The xxh3-64 of bytes, 16 hexadecimal digits."""
    return _lmd3.xxh3(data)


def _listed(path: Path) -> dict[str, Any]:
    digest, size = _lmd3.checksum(path)
    return _entry(path.name, size, digest)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Makes the names inside a folder durable, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_replaceable(path: Path, force: bool) -> None:
    """Refuses to write a store over what is there; with `force` over anything that is not a store.

    Raises:
        OutputError: the path exists.
    """
    if not path.exists() and not path.is_symlink():
        return
    if path.is_dir() and not any(path.iterdir()):
        return
    if not force:
        raise OutputError("exists already", file=str(path), remedy="name another output, or give --force")
    if path.is_symlink() or not (path / MANIFEST).is_file():
        raise OutputError("exists and is not a store: it is not overwritten", file=str(path))


def verify_store(source: str | Path | Store, progress: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Proves a store against its manifest: checksums of all files, row counts, finite values, norms, unique
    ids.

    Bare files have no checksums: their header, size and values are checked.

    Args:
        source: the store.
        progress: called with the number of bytes checked so far.

    Returns:
        `rows`, `files` (checked against a checksum), `bytes`, `norm_min`, `norm_max`, `ids` ("unique").

    Raises:
        VerificationError: a file that is not what was written, or a fact of the manifest that does not hold.
        NotFiniteError: NaN or infinity, with file and row.
        DuplicateIdError: an id that occurs twice, with both rows.
        FileMissingError, FormatError, ShapeError, DtypeError: as `open_store`.
    """
    store = open_store(source)
    if store.native is None or store.path is None:
        raise ParameterError("an array in memory has nothing to verify")
    listed = [
        entry
        for shard in store.manifest.get("shards", [])
        for entry in shard.values()
        if isinstance(entry, dict)
    ]
    listed += store.manifest.get("files", [])
    done = 0
    for entry in listed:
        path = store.path / Path(entry["name"]).name
        digest, size = _lmd3.checksum(path)
        if (digest, size) != (entry["xxh3"], entry["bytes"]):
            first, rows = _rows_of(store, entry["name"])
            place = f" (rows {first} to {first + rows - 1} of the store)" if rows else ""
            raise VerificationError(
                f"its bytes are not those that were written{place}: checksum {digest}, not {entry['xxh3']}",
                file=str(path),
                remedy="restore the file, or encode again",
            )
        done += size
        if progress is not None:
            progress(done)
    store.native.check_finite(_threads())
    low, high = store.native.norms(_threads())
    # Rows converted from a coarser type keep its norms.
    tolerance = max(_NORM_TOLERANCE[store.dtype], 2 * store.manifest.get("rounding", 0.0))
    if store.manifest.get("normalised") and not (low >= 1 - tolerance and high <= 1 + tolerance):
        raise VerificationError(
            f"the manifest says that vectors are normalised, and their norms are {low:.6g} to {high:.6g}",
            file=str(store.path / MANIFEST),
        )
    _verify_documents(store)
    _verify_groups(store)
    return {
        "rows": store.n,
        "files": len(listed),
        "bytes": done,
        "norm_min": low,
        "norm_max": high,
        "ids": "unique",
    }


def _rows_of(store: Store, name: str) -> tuple[int, int]:
    """First row and number of rows of the shard that a file belongs to; (0, 0) for files of no shard."""
    first = 0
    for shard in store.manifest["shards"]:
        if any(isinstance(entry, dict) and entry["name"] == name for entry in shard.values()):
            return first, int(shard["rows"])
        first += int(shard["rows"])
    return 0, 0


def _verify_documents(store: Store) -> None:
    unique = UniqueIds()
    for path, rows in store._document_files():
        with _parquet(path) as file:
            if file.metadata.num_rows != rows:
                raise VerificationError(f"{file.metadata.num_rows} documents for {rows} rows", file=str(path))
    for table in store._read_documents(["id"]):
        unique.add(table["id"].to_pylist())
    unique.check(lambda rows: store.ids(np.asarray(rows)), file=str(store.path))


def _verify_groups(store: Store) -> None:
    codes = store.group_codes()
    if codes is None:
        return
    counted = np.bincount(codes, minlength=len(store.groups)).tolist()
    for group, rows in zip(store.manifest["groups"], counted, strict=True):
        if group["rows"] != rows:
            raise VerificationError(
                f"the manifest gives the group {group['name']!r} {group['rows']} rows, there are {rows}",
                file=str(Path(str(store.path)) / MANIFEST),
            )
