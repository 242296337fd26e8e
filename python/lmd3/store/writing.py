"""Writing a store: batches in, shards out, and nothing under the store's name before all is proven."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from lmd3 import _lmd3
from lmd3.errors import DtypeError, NotFiniteError, OutputError, ParameterError, ShapeError, WorkError
from lmd3.store.documents import DocumentsWriter, documents_schema, documents_table
from lmd3.store.files import check_replaceable, entry_of, listed, sync_file, sync_folder, umask
from lmd3.store.layout import (
    DTYPES,
    EXACT_DTYPES,
    FINENESS,
    FORMAT,
    MANIFEST,
    NORM_TOLERANCE,
    ROUNDING,
    VERSION,
)
from lmd3.store.lock import WriterLock
from lmd3.store.opening import open_store
from lmd3.store.reading import Store, checked_array
from lmd3.unique import UniqueIds

if TYPE_CHECKING:
    from lmd3.encoders import Encoder


class StoreWriter:
    """Writes a store: append batches, then close. Nothing is there under the store's name before `close`
    succeeds.

    Use it as a context manager: leaving it by an exception removes all that was written.

    Args:
        path: the folder to make.
        dtype: element type on disk: "float16", "float32", "bfloat16" or "int8" (one scale per row).
        encoder: the encoder of the vectors (its description and fitted state are kept), or a description.
        normalised: whether every vector has norm 1, checked on what is appended; None: as it turns out.
        shard_rows: rows of one shard.
        force: replace a store that is there already.
        source: facts on the input for the manifest, such as its fingerprint and the number of empty texts;
            `facts` takes further entries of the manifest.
        rounding: how far the given rows may be from those that they stand for, relative to their norms
            (`Store.rounding` of the store that they come from).
        first_row: the number of the first row, where rows are numbered.
        exact: keep a copy of the given rows of this finer type, "float16" or "float32" (`Store.exact`);
            None: none.
        locked: the caller holds the store's `WriterLock`.

    Raises:
        OutputError: the path exists, another process writes to it, or its folder can't be written.
        DtypeError: a type that stores are not written in; a copy that is no finer than the rows.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: str = "float16",
        encoder: Encoder | Mapping[str, Any] | None = None,
        normalised: bool | None = True,
        shard_rows: int = 1 << 20,
        force: bool = False,
        source: Mapping[str, Any] | None = None,
        rounding: float = 0.0,
        first_row: int = 0,
        exact: str | None = None,
        locked: bool = False,
    ) -> None:
        if dtype not in DTYPES:
            raise DtypeError(f"stores are not written as {dtype}", remedy=f"use {', '.join(DTYPES)}")
        check_exact(exact, dtype)
        if shard_rows < 1:
            raise ParameterError(f"a shard has at least one row, not {shard_rows}")
        self.path = Path(path)
        self.source: dict[str, Any] = dict(source or {})
        self._dtype = dtype
        self._encoder = encoder
        self._normalised = normalised
        self._first_row = first_row
        self._off = 0.0
        self._shard_rows = shard_rows
        self._force = force
        check_replaceable(self.path, force)
        #: Further entries of the manifest, and of its groups by their names.
        self.facts: dict[str, Any] = {}
        self.group_facts: dict[str, Mapping[str, Any]] = {}
        self._made: list[Path] = []
        self._lock = contextlib.ExitStack()
        if not locked:
            self._lock.enter_context(WriterLock(self.path))
        try:
            self._folder = self._make_folder()
        except OSError as error:
            self._lock.close()
            raise OutputError(f"can't be written: {error.strerror or error}", file=str(self.path)) from None
        self._shard: _lmd3.ShardWriter | None = None
        self._exact_dtype = exact
        self._exact: _lmd3.ShardWriter | None = None
        self._documents: DocumentsWriter | None = None
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
        self._group_counts: dict[str, Counter[str]] = {}
        self._kept: tuple[bool, ...] | None = None
        self._d: int | None = None
        self._n = 0

    def _make_folder(self) -> Path:
        """A folder beside the result, so that the last step is a rename."""
        parents = self.path.absolute().parents
        self._made = [parent for parent in parents if not parent.exists()]
        parents[0].mkdir(parents=True, exist_ok=True)
        # What killed writers left: the lock is held, so none of it is being written.
        left = re.compile(rf"\.{re.escape(self.path.name)}\.[a-z0-9_]{{8}}\.partial")
        for path in parents[0].iterdir():
            if left.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
        return Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", suffix=".partial", dir=parents[0]))

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
        documents: Sequence[str] | None = None,
        chunks: NDArray[Any] | None = None,
        left_out: NDArray[Any] | None = None,
    ) -> None:
        """Appends m rows. What is given for one batch must be given for all.

        Args:
            vectors: (m, d) float32 or float16.
            ids: m ids, unique in the store (proved by `close`); None: the row's number.
            groups, texts, tokens, truncated: one per row, or None.
            weights: finite numbers ≥ 0, one per row; None: all are 1.
            source_rows: the rows' numbers in the store that they come from, kept in the documents.
            documents, chunks: of which document's id the row is which chunk, counted from 0.
            left_out: tokens cut off each text; only their sums are kept.

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
        given |= {"weights": weights, "source_rows": source_rows, "documents": documents, "chunks": chunks}
        given |= {"left_out": left_out}
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
            vectors = np.ascontiguousarray(checked_array(vectors, "the batch"), dtype=np.float32)
        except NotFiniteError as error:
            raise NotFiniteError(error.message, file=str(self.path), row=self._n + (error.row or 0)) from None
        if self._d is None:
            self._d = vectors.shape[1]
        elif vectors.shape[1] != self._d:
            raise ShapeError(
                f"a batch of {vectors.shape[1]} dimensions in a store of {self._d}", file=str(self.path)
            )
        if self._normalised is not False:
            off = np.abs(np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64)) - 1)
            self._off = max(self._off, float(off.max()))
            if self._normalised and off.max() > NORM_TOLERANCE["float16"] + 2 * self._brought:
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
                self._documents = DocumentsWriter(
                    self._folder / f"documents-{number:05}.parquet", documents_schema(columns)
                )
                if self._exact_dtype is not None:
                    self._exact_folder.mkdir(exist_ok=True)
                    d = int(vectors.shape[1])
                    self._exact = _lmd3.ShardWriter(self._exact_folder, number, d, self._exact_dtype)
            try:
                self._shard.append(vectors)
                if self._exact is not None:
                    self._exact.append(vectors)
            except NotFiniteError as error:
                row = number * self._shard_rows + (error.row or 0)
                raise NotFiniteError(
                    error.message, file=str(self.path), row=row, remedy=error.remedy
                ) from None
            first = self._first_row + self._n
            ids = columns["ids"] or [str(row) for row in range(first, first + len(vectors))]
            self._documents.write(documents_table(ids, columns, self._documents.schema))
            if columns["groups"] is not None:
                for name in columns["groups"]:
                    self._groups.setdefault(name, len(self._groups))
                self._group_rows.update(columns["groups"])
                codes = np.asarray([self._groups[name] for name in columns["groups"]], dtype=np.uint32)
                self._codes.append(codes)
                self._count_groups(codes, columns)
            if columns["weights"] is not None:
                self._weights.append(np.asarray(columns["weights"], dtype=np.float32))
            if columns["tokens"] is not None:
                self._counts["tokens"] += int(np.sum(columns["tokens"], dtype=np.int64))
            if columns["truncated"] is not None:
                self._counts["truncated"] += int(np.count_nonzero(columns["truncated"]))
            if columns["left_out"] is not None:
                lost = int(np.sum(columns["left_out"], dtype=np.int64))
                self._counts["tokens_left_out"] = self._counts.get("tokens_left_out", 0) + lost
            self._n += len(vectors)
            if self._n % self._shard_rows == 0:
                self._finish_shard()

    def _count_groups(self, codes: NDArray[np.uint32], columns: Mapping[str, Any]) -> None:
        """Tokens, truncated texts and tokens left out, per group."""
        names = list(self._groups)
        for name, column in (
            ("tokens", "tokens"),
            ("truncated", "truncated"),
            ("tokens_left_out", "left_out"),
        ):
            if columns[column] is not None:
                sums = np.bincount(codes, np.asarray(columns[column], np.float64), len(names))
                for code in np.flatnonzero(sums).tolist():
                    self._group_counts.setdefault(names[code], Counter())[name] += int(sums[code])

    def _group_entry(self, name: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": name, "rows": self._group_rows[name]}
        if self._group_counts:
            counted = self._group_counts.get(name, Counter())
            entry |= {kind: counted[kind] for kind in self._counts}
        return entry | dict(self.group_facts.get(name, {}))

    def _finish_shard(self) -> None:
        if self._shard is None or self._documents is None:
            return
        self._rounding = max(self._rounding, self._shard.rounding)
        rows, embeddings, scales = self._shard.finish()
        shard: dict[str, Any] = {"rows": rows, "embeddings": entry_of(*embeddings)}
        if scales is not None:
            shard["scales"] = entry_of(*scales)
        if self._exact is not None:
            _, (name, size, digest), _ = self._exact.finish()
            target = name.replace("embeddings", "exact", 1)
            (self._exact_folder / name).replace(self._folder / target)
            shard["exact"] = entry_of(target, size, digest)
        for name, parts in (("groups", self._codes), ("weights", self._weights)):
            if parts:
                path = self._folder / f"{name}-{len(self._shards):05}.npy"
                with path.open("wb") as file:
                    np.save(file, np.concatenate(parts), allow_pickle=False)
                    os.fsync(file.fileno())
                shard[name] = listed(path)
        self._documents.close()
        shard["documents"] = listed(self._documents.path)
        self._shards.append(shard)
        self._codes, self._weights = [], []
        self._shard = self._documents = self._exact = None

    @property
    def _exact_folder(self) -> Path:
        """Where the copy is written, under the names of embeddings."""
        return self._folder / "exact"

    def attach(self, path: Path) -> None:
        """Copies a file into the store and lists it: the state of an encoder that is given as a description.

        Raises:
            WorkError: the disk is full, or the like.
        """
        with self._failures():
            copy = self._folder / path.name
            shutil.copyfile(path, copy)
            sync_file(copy)
            self._files.append(listed(copy))

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
                            (self._folder / entry["name"]).unlink(missing_ok=True)
                manifest = self._manifest()
                if self._exact_dtype is not None:
                    self._exact_folder.rmdir()
                with (self._folder / MANIFEST).open("w", encoding="utf-8") as file:
                    json.dump(manifest, file, ensure_ascii=False, indent=1)
                    file.write("\n")
                    file.flush()
                    os.fsync(file.fileno())
                sync_folder(self._folder)
                # Opened before it is published: what can't be opened must not get the store's name.
                draft = open_store(self._folder)
                self._unique.check(lambda rows: draft.ids(np.asarray(rows)), file=str(self.path))
                self._folder.chmod(0o777 & ~umask())
                self._publish()
        except BaseException:
            self.abandon()
            raise
        self._lock.close()
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
                sync_file(self._folder / state)
                others.append(listed(self._folder / state))
        ids, _, texts, _, _, weights, *_ = self._kept or (False,) * 6
        return {
            "format": FORMAT,
            "version": VERSION,
            "created_by": f"lmd3 {_lmd3.__version__}",
            "d": self._d,
            "rows": self._n,
            "dtype": self._dtype,
            "metric": "euclidean",
            "normalised": self._is_normalised(),
            "rounding": self._rounding,
            "ids": "given" if ids else "rows",
            "texts": texts,
            "weights": weights,
            "counts": {"rows": self._n, **self._counts},
            "source": self.source,
            "encoder": description,
            **({} if self._exact_dtype is None else {"exact": self._describe_exact(self._exact_dtype)}),
            **self.facts,
            "groups": [self._group_entry(name) for name in self._groups],
            "files": others,
            "shards": self._shards,
        }

    def _describe_exact(self, dtype: str) -> dict[str, Any]:
        return {"dtype": dtype, "rounding": max(self._brought, ROUNDING[dtype])}

    def _is_normalised(self) -> bool:
        """As the writer was told, or by the norms of all rows."""
        if self._normalised is not None:
            return self._normalised
        return self._off <= NORM_TOLERANCE["float16"] + 2 * self._brought

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
        sync_folder(self.path.absolute().parent)

    def abandon(self) -> None:
        """Removes all that was written; does nothing after `close`."""
        if self._shard is not None:
            self._shard.abandon()
        if self._documents is not None:
            with contextlib.suppress(Exception):
                self._documents.close()
        if self._exact is not None:
            self._exact.abandon()
        self._shard = self._documents = self._exact = None
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.close()
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


def check_exact(exact: str | None, dtype: str) -> None:
    """Refuses a copy of a type that copies are not kept in, or that is no finer than the rows.

    Raises:
        DtypeError: either.
    """
    if exact is None:
        return
    if exact not in EXACT_DTYPES:
        raise DtypeError(f"no copy is kept as {exact}", remedy=f"use {' or '.join(EXACT_DTYPES)}")
    if FINENESS[exact] <= FINENESS[dtype]:
        raise DtypeError(f"a {exact} copy of {dtype} rows is no finer than they are", remedy="leave it away")
