"""Vectors as a stream of batches, whatever file they are in; remote files are fetched one at a time."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lmd3.errors import DtypeError, FileMissingError, FormatError, ParameterError, ShapeError
from lmd3.store import remote
from lmd3.store.arrow import arrow_batches, vector_column, vector_type, vectors_of
from lmd3.store.bare import ARROW, FAISS, HEADED, RAW, Found, dataset_files, find_vectors, natural, raw_piece
from lmd3.store.documents import first_line, parquet_file
from lmd3.store.faiss_files import read_faiss
from lmd3.store.opening import open_bare, open_store
from lmd3.store.reading import Bare, Store

#: Values of a batch (as float32: 16 MB).
_VALUES = 1 << 22


class Batch(NamedTuple):
    """Vectors (m, d) float32, the columns that lie beside them (None: there are none), and their place."""

    vectors: NDArray[np.float32]
    columns: pa.Table | None
    file: str
    first: int


class Kind(NamedTuple):
    """What is known of vectors before they are read: rows, the element type that keeps them, how far they may
    be from what was given."""

    rows: int | None
    dtype: str
    rounding: float


class Source:
    """Vectors to be read once, in order.

    Args:
        paths: files, folders and fsspec addresses.
        vectors: the column of the vectors, in files of columns.
        raw: element type and shape of raw numbers.
        place: folder for what is fetched from elsewhere, one file at a time.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        vectors: str | None = None,
        raw: tuple[str, tuple[int, int]] | None = None,
        place: Path | None = None,
    ) -> None:
        if not paths:
            raise ParameterError("no vectors are named")
        self._vectors, self._raw, self._place = vectors, raw, place
        self._paths: list[str | Path] = []
        for path in paths:
            self._paths += _expanded(path)

    def kind(self) -> Kind:
        """Facts of the first file, and the rows of all where all are here."""
        kinds: list[Kind] = []
        for number, path in enumerate(self._paths):
            if remote.is_remote(path) and number:
                return Kind(None, *kinds[0][1:])
            with self._fetched(path) as local:
                kinds.append(_kind(local, self._vectors, self._raw))
        rows = [kind.rows for kind in kinds]
        total = None if None in rows else sum(row for row in rows if row is not None)
        return Kind(total, kinds[0].dtype, max(kind.rounding for kind in kinds))

    def batches(self, wanted: Sequence[str]) -> Iterator[Batch]:
        """All rows; `wanted` are columns beside the vectors.

        Raises:
            InputError: and its kinds: what is wrong with a file.
        """
        for path in self._paths:
            with self._fetched(path) as local:
                for batch in _batches(local, self._vectors, self._raw, wanted):
                    yield batch._replace(file=str(path))

    @contextlib.contextmanager
    def _fetched(self, path: str | Path) -> Iterator[Path]:
        if not remote.is_remote(path):
            yield Path(path)
            return
        folder = Path(tempfile.mkdtemp(prefix=".fetched.", dir=self._place))
        try:
            yield remote.fetch(str(path), folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _expanded(path: str | Path) -> list[str | Path]:
    """The files of a folder of parquet files, of a saved dataset, or of an address; else the path itself."""
    if remote.is_remote(path):
        return list(remote.files(str(path)))
    path = Path(path)
    if path.is_dir() and not (path / "manifest.json").exists():
        if (path / "state.json").is_file():
            return list(dataset_files(path))
        tables = sorted(path.glob("*.parquet"), key=natural)
        tables = [file for file in tables if not file.name.startswith(("metadata", "."))]
        others = [file for file in path.iterdir() if file.suffix.lower() in (*HEADED, *ARROW)]
        if tables and not others:
            return [*tables]
    return [path]


def _is_columns(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in (".parquet", *ARROW)


def _kind(path: Path, column: str | None, raw: tuple[str, tuple[int, int]] | None) -> Kind:
    if not path.exists():
        raise FileMissingError("no such file or folder", file=str(path))
    if _is_columns(path):
        if path.suffix.lower() == ".parquet":
            with parquet_file(path) as file:
                schema, rows = file.schema_arrow, file.metadata.num_rows
        else:
            schema, rows = arrow_batches(path)[0], None
        name = vector_column(schema, column, path)
        element = str(schema.field(name).type.value_type)
        return Kind(rows, "float16" if element == "halffloat" else "float32", 0.0)
    if path.suffix.lower() in FAISS:
        index = read_faiss(path)
        dtype = {"fp16": "float16", "bf16": "bfloat16"}.get(index.kind, "float32")
        return Kind(index.n, dtype, 0.0)
    store = _open(path, column, raw)
    # Integers are exact in half precision.
    dtype = "float16" if store.dtype in ("int8", "uint8") and not store.manifest else store.dtype
    return Kind(store.n, dtype, store.rounding if store.manifest else 0.0)


def _open(path: Path, column: str | None, raw: tuple[str, tuple[int, int]] | None) -> Store:
    if (path / "manifest.json").exists():
        return open_store(path)
    if raw is not None and path.suffix.lower() not in (*HEADED, *ARROW, *FAISS):
        return open_bare(path, found=Found([raw_piece(path, *raw)], Bare("raw numbers")))
    if path.is_file() and path.suffix.lower() not in (*HEADED, *RAW, *ARROW, *FAISS):
        known = ", ".join((*HEADED, *RAW, *ARROW, *FAISS, ".parquet"))
        raise FormatError("no kind of vectors known by its name", file=str(path), remedy=f"known: {known}")
    return open_bare(path, found=find_vectors(path, column))


def _batches(
    path: Path, column: str | None, raw: tuple[str, tuple[int, int]] | None, wanted: Sequence[str]
) -> Iterator[Batch]:
    if _is_columns(path):
        yield from _from_columns(path, column, wanted)
    elif path.suffix.lower() in FAISS and read_faiss(path).piece is None:
        index = read_faiss(path)
        step = max(1, _VALUES // index.d)
        for first in range(0, index.n, step):
            count = min(step, index.n - first)
            yield Batch(index.rows(first, count), _ids(index.id_numbers(first, count)), str(path), first)
    else:
        store = _open(path, column, raw)
        index_ids = read_faiss(path) if path.suffix.lower() in FAISS else None
        known = [name for name in wanted if name in ("id", "group", "text")]
        step = max(1, min(1 << 16, _VALUES // store.d))
        for first in range(0, store.n, step):
            rows = np.arange(first, min(first + step, store.n))
            columns = None
            if index_ids is not None:
                columns = _ids(index_ids.id_numbers(first, len(rows)))
            elif store._document_files():
                columns = store.documents(rows, known or ("id",))
            yield Batch(store.rows(rows), columns, str(path), first)


def _ids(numbers: NDArray[np.int64] | None) -> pa.Table | None:
    return None if numbers is None else pa.table({"id": numbers})


def _from_columns(path: Path, column: str | None, wanted: Sequence[str]) -> Iterator[Batch]:
    """A parquet file by row groups, or an Arrow file by record batches."""
    first = 0
    try:
        if path.suffix.lower() == ".parquet":
            with parquet_file(path) as file:
                schema = file.schema_arrow
                name = vector_column(schema, column, path)
                present = [name, *(other for other in wanted if other in schema.names and other != name)]
                for batch in file.iter_batches(batch_size=1 << 14, columns=present):
                    yield _batch(batch, name, path, first)
                    first += batch.num_rows
            return
        schema, batches, _ = arrow_batches(path)
        name = vector_column(schema, column, path)
        for batch in batches:
            if batch.num_rows:
                yield _batch(batch, name, path, first)
                first += batch.num_rows
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise FormatError(f"damaged: {first_line(error)}", file=str(path)) from None


def _batch(batch: Any, name: str, path: Path, first: int) -> Batch:
    array = batch.column(batch.schema.get_field_index(name))
    if not vector_type(array.type):
        raise DtypeError(f"{name!r} holds {array.type}", file=str(path))
    array.validate()
    matrix = vectors_of(array, path, first)
    if not matrix.shape[1]:
        raise ShapeError(f"{name!r} holds vectors without numbers", file=str(path), row=first)
    others = pa.Table.from_batches([batch]).remove_column(batch.schema.get_field_index(name))
    return Batch(np.ascontiguousarray(matrix, np.float32), others, str(path), first)
