"""An open store: its vectors, ids, groups, weights and texts, by row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lmd3 import _lmd3
from lmd3.errors import ColumnError, DtypeError, FormatError, NotFiniteError, ParameterError, ShapeError
from lmd3.store.documents import field_of, parquet_file, take_rows, with_columns
from lmd3.store.layout import COLUMNS, NORM_TOLERANCE, ROUNDING
from lmd3.unique import UniqueIds

_TO_FLOAT32 = "array.astype('float32')"


class Store:
    """n vectors of d dimensions with an id each, perhaps groups and texts. Made by `open_store`; never
    changes.

    Attributes:
        path: the folder or file; None for an array in memory.
        native: the mapped store; None for an array in memory.
        array: (n, d) float32 or float16 in C order, for a store in memory; else None.
        manifest: what `manifest.json` says; {} for bare vectors.
        opened: what was opened and how, in words.
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
        bare: Bare | None = None,
    ) -> None:
        self.path = path
        self.native = native
        self.array = array
        self.manifest: dict[str, Any] = dict(manifest or {})
        described = encoder if encoder is not None else self.manifest.get("encoder")
        self.encoder: dict[str, Any] | None = None if described is None else dict(described)
        self.opened = "in memory" if native is None else bare.opened if bare else "a store, by memory map"
        self._bare = bare
        self._table = table
        self._fingerprint: str | None = None
        self._exact: Store | None = None
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
        array = checked_array(vectors)
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
    def chunked(self) -> bool:
        """Whether the rows are chunks of documents, which the columns "document" and "chunk" name."""
        if self._table is not None:
            return "document" in self._table.column_names
        return bool((self.manifest.get("chunking") or {}).get("mode") == "sliding")

    @property
    def population(self) -> int:
        """The rows that these stand for: more than `n` where a sample of the texts was encoded."""
        return int((self.manifest.get("sampling") or {}).get("texts", self.n))

    @property
    def d(self) -> int:
        """Dimensions."""
        return self.native.d if self.native is not None else int(self._array.shape[1])

    @property
    def dtype(self) -> str:
        """Element type: "float32", "float16", "bfloat16", "int8", or "uint8" (of bare vectors only)."""
        return self.native.dtype if self.native is not None else str(self._array.dtype)

    @property
    def _native(self) -> _lmd3.Store:
        assert self.native is not None
        return self.native

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
            self._normalised = bool(np.all(np.abs(norms - 1) <= NORM_TOLERANCE[self.dtype]))
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
            if self._bare is not None and self.dtype in ("int8", "uint8"):
                # Bare integers are taken as the vectors that were given.
                self._rounding = ROUNDING["float32"]
            elif self.dtype in ROUNDING:
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
    def exact(self) -> Store | None:
        """The finer copy of the same rows that is kept for ranking again, as bare vectors; or None.

        Raises:
            FileMissingError, FormatError, ShapeError, DtypeError: its files are not what the manifest says.
        """
        described = self.manifest.get("exact")
        if described is None or self._exact is not None:
            return self._exact
        pieces: list[tuple[Path, None]] = []
        for number, shard in enumerate(self.manifest["shards"]):
            entry = shard.get("exact")
            if entry is None:
                raise FormatError(f"shard {number} has no copy, as others have", file=self._file)
            file = Path(str(self.path)) / Path(entry["name"]).name
            if file.is_file() and file.stat().st_size != entry["bytes"]:
                raise FormatError(
                    f"{file.stat().st_size} bytes, the manifest says {entry['bytes']}",
                    file=str(file),
                    remedy="restore the file, or convert again",
                )
            pieces.append((file, None))
        native = _lmd3.Store.of_pieces(Path(str(self.path)), pieces)
        for (file, _, rows), shard in zip(native.shards, self.manifest["shards"], strict=True):
            if rows != shard["rows"]:
                raise ShapeError(f"a copy of {rows} rows of a shard of {shard['rows']}", file=str(file))
        if native.d != self.d:
            raise ShapeError(f"a copy of {native.d} dimensions of rows of {self.d}", file=self._file)
        if native.dtype != described["dtype"]:
            raise DtypeError(
                f"a copy of {native.dtype}, the manifest says {described['dtype']}", file=self._file
            )
        self._exact = Store(
            path=self.path, native=native, bare=Bare(f"the {native.dtype} copy of a store, by memory map")
        )
        self._exact._rounding = float(described["rounding"])
        self._exact._normalised = self._normalised
        return self._exact

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
                files = [path for path, _, _ in self._native.shards]
                key = b"".join(map(sampled_bytes, dict.fromkeys(files)))
                if self._bare is not None:
                    for path, _ in self._bare.documents:
                        key += sampled_bytes(path)
            self._fingerprint = _lmd3.xxh3(key)
        return self._fingerprint

    @property
    def groups(self) -> list[str]:
        """Names of the groups; a row's group code is the position here. Empty where no groups were
        recorded.
        """
        if self._table is not None:
            return self._memory_groups()[0]
        if self._bare is not None:
            return list(self._bare.groups)
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
        if self._table is not None or self._bare is not None:
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

    @property
    def weights_kept(self) -> bool:
        """Whether every row has a weight."""
        return any(shard.get("weights") for shard in self.manifest.get("shards", []))

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
        if self._bare is not None:
            return "text" in self._bare.columns
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
            if name not in COLUMNS:
                raise ColumnError(f"stores have no column {name!r}; they have {', '.join(COLUMNS)}")
        numbers = self._row_numbers(rows)
        schema = pa.schema([field_of(name) for name in columns])
        if self._table is not None:
            return with_columns(self._table.take(pa.array(numbers)), schema)
        files = self._document_files()
        if not files:
            ids = pa.table({"id": pa.array([str(row) for row in numbers.tolist()], pa.string())})
            return with_columns(ids, schema)
        wanted, positions = np.unique(numbers, return_inverse=True)
        parts = []
        first = 0
        for path, count in files:
            inside = wanted[np.searchsorted(wanted, first) : np.searchsorted(wanted, first + count)] - first
            if inside.size:
                parts += take_rows(path, inside, self._names(columns))
            first += count
        found = self._completed(pa.concat_tables(parts), schema, wanted) if parts else schema.empty_table()
        return found.take(pa.array(positions))

    def texts(self, batch: int = 4096) -> Iterator[list[str]]:
        """All texts in row order, in lists of at most `batch`.

        Raises:
            ColumnError: the store keeps no texts.
            FormatError: it says that it does, and has rows without one.
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
                if part.column(0).null_count:
                    raise FormatError(
                        "the store says that it keeps texts, and has rows without", file=self._file
                    )
                yield part.column(0).to_pylist()

    @property
    def given_ids(self) -> bool:
        """Whether the ids are those that came with the rows, not row numbers."""
        if self._table is not None:
            return True
        if self._bare is not None:
            return "id" in self._bare.columns
        return self.manifest.get("ids") == "given"

    def _document_files(self) -> list[tuple[Path, int]]:
        """The files of documents and the rows of each; none for bare vectors without."""
        if self._bare is not None:
            return self._bare.documents
        shards = [shard for shard in self.manifest.get("shards", []) if shard.get("documents")]
        return [(Path(str(self.path)) / shard["documents"]["name"], int(shard["rows"])) for shard in shards]

    def _names(self, columns: Sequence[str]) -> dict[str, str]:
        """The names in the files of documents of those columns that they have."""
        if self._bare is None:
            return {name: name for name in columns}
        return {name: self._bare.columns[name] for name in columns if name in self._bare.columns}

    def _read_documents(self, columns: list[str], batch: int = 4096) -> Iterator[pa.Table]:
        names = self._names(columns)
        schema = pa.schema([field_of(name) for name in columns])
        first = 0
        for path, _ in self._document_files():
            with parquet_file(path) as file:
                for part in file.iter_batches(batch_size=batch, columns=list(names.values())):
                    table = pa.Table.from_batches([part]).select(list(names.values()))
                    table = table.rename_columns(list(names))
                    yield self._completed(table, schema, np.arange(first, first + part.num_rows))
                    first += part.num_rows

    def _completed(self, table: pa.Table, schema: pa.Schema, rows: NDArray[np.int64]) -> pa.Table:
        """The columns of a schema; row numbers for ids where the rows brought none."""
        if "id" in schema.names and "id" not in table.column_names and self._bare is not None:
            table = table.append_column("id", pa.array([str(row) for row in rows.tolist()], pa.string()))
        return with_columns(table, schema)


@dataclass(frozen=True)
class Bare:
    """What bare vectors come with.

    Attributes:
        opened: what was opened and how, in words.
        documents: parquet files with a row per vector, in order, and the rows of each.
        columns: names in these files of the columns that stores have.
        groups: names of the groups, in the order of their codes.
    """

    opened: str
    documents: list[tuple[Path, int]] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)
    groups: list[str] = field(default_factory=list)


def sampled_bytes(path: Path) -> bytes:
    """Header, size and 256 evenly spread samples of a file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        parts = [str(size).encode(), file.read(1 << 16)]
        for place in np.linspace(0, max(size - 4096, 0), 256).astype(np.int64).tolist():
            file.seek(place)
            parts.append(file.read(4096))
    return b"".join(parts)


def checked_array(array: NDArray[Any], name: str = "the array") -> NDArray[Any]:
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
