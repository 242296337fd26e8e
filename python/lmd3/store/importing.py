"""Vectors of other tools to a store, streamed, with the ids, groups, texts and weights that go with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lmd3.errors import NotFiniteError, ParameterError, ShapeError
from lmd3.progress import ProgressFactory, silent
from lmd3.store.lock import WriterLock
from lmd3.store.reading import Store
from lmd3.store.sidecar import Columns, Sidecar
from lmd3.store.sources import Batch, Source
from lmd3.store.writing import StoreWriter

__all__ = ["import_vectors", "write_source"]


def import_vectors(
    source: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    vectors: str | None = None,
    metadata: str | Path | Sequence[str | Path] | None = None,
    id: str | None = None,
    group: str | None = None,
    text: str | None = None,
    weight: str | None = None,
    dtype: str | None = None,
    raw: tuple[str, tuple[int, int]] | None = None,
    encoder: Mapping[str, Any] | None = None,
    shard_rows: int = 1 << 20,
    force: bool = False,
    progress: ProgressFactory | None = None,
) -> Store:
    """Writes vectors of another tool as a store. Memory is that of a batch, and of the proof of ids.

    Args:
        source: files or folders in row order: whatever `open_store` opens; parquet files (read by row group);
            Arrow files, compressed or not; faiss indexes (flat, or scalar quantisers of 8 bits, fp16 and
            bf16, with their ids); or fsspec addresses of such files, fetched one at a time.
        out: the store's folder.
        vectors: the column of the vectors, in files of columns; None: the only one of lists of numbers.
        metadata: files with a row per vector, in the vectors' order (parquet, CSV, JSONL, or plain text of
            one id per line): there the next four are looked for; None: beside the vectors.
        id, group, text, weight: names of columns to attach. Ids default to the column `id` beside the
            vectors (or the ids of a faiss index), else row numbers.
        dtype: "float16", "float32", "bfloat16" or "int8"; None: that of the source (float64 is rounded to
            float32; integers are exact in float16).
        raw: element type and shape (rows, dimensions) of raw numbers.
        encoder: how the vectors were made, as the manifest of another store describes it.
        shard_rows: rows of one shard.
        force: replace a store that is there.
        progress: makes the bars.

    Raises:
        OutputError: `out` exists, is being written, or can't be written.
        InputError: and its kinds: what is wrong with a file, with its name and row.
        WorkError: the disk is full, or the like.
    """
    paths = [source] if isinstance(source, (str, Path)) else list(source)
    with WriterLock(out):
        return write_source(
            Source(paths, vectors=vectors, raw=raw, place=Path(out).absolute().parent),
            out,
            sidecar=_sidecar(metadata, Columns(id, group, text, weight)),
            columns=Columns(id, group, text, weight),
            dtype=dtype,
            encoder=encoder,
            shard_rows=shard_rows,
            force=force,
            facts={"imported": [str(path) for path in paths]},
            progress=progress or silent,
        )


def _sidecar(metadata: str | Path | Sequence[str | Path] | None, columns: Columns) -> Sidecar | None:
    if metadata is None:
        return None
    files = [metadata] if isinstance(metadata, (str, Path)) else metadata
    return Sidecar([Path(file) for file in files], columns)


def write_source(
    source: Source,
    out: str | Path,
    *,
    columns: Columns,
    sidecar: Sidecar | None = None,
    dtype: str | None = None,
    encoder: Mapping[str, Any] | None = None,
    shard_rows: int = 1 << 20,
    force: bool = False,
    first_row: int = 0,
    exact: str | None = None,
    facts: Mapping[str, Any],
    progress: ProgressFactory = silent,
) -> Store:
    """Writes a source as a store, whose lock the caller holds; see `import_vectors`.

    `first_row`: the number of its first row; `exact`: type of a finer copy to keep.
    """
    kind = source.kind()
    known = None if sidecar is None else sidecar.count()
    if sidecar is not None and None not in (known, kind.rows) and known != kind.rows:
        raise ShapeError(f"{known} rows of metadata for {kind.rows} vectors", file=str(sidecar.files[-1]))
    with StoreWriter(
        out,
        dtype=dtype or kind.dtype,
        encoder=encoder,
        normalised=None,
        shard_rows=shard_rows,
        force=force,
        source=facts,
        rounding=kind.rounding,
        first_row=first_row,
        exact=exact,
        locked=True,
    ) as writer:
        beside = None
        wanted = list(dict.fromkeys(["id", *columns.named.values()]))
        with progress("importing", None if kind.rows is None else float(kind.rows), "rows") as bar:
            for batch in source.batches(wanted):
                if beside is None:
                    beside = _beside(batch, columns, sidecar)
                _refuse_not_finite(batch)
                attached = {} if sidecar is None else sidecar.take(len(batch.vectors))
                if beside.named:
                    table = batch.columns if batch.columns is not None else pa.table({})
                    attached |= beside.values(table, batch.file, batch.first)
                writer.append(batch.vectors, **attached)
                bar.update(float(writer.n))
        if sidecar is not None:
            sidecar.finish()
        return writer.close()


def _beside(batch: Batch, columns: Columns, sidecar: Sidecar | None) -> Columns:
    """What is taken from beside the vectors."""
    own = "id" if batch.columns is not None and "id" in batch.columns.column_names else None
    if sidecar is None:
        return Columns(columns.id or own, columns.group, columns.text, columns.weight)
    return Columns() if columns.id is not None else Columns(id=own)


def _refuse_not_finite(batch: Batch) -> None:
    finite = np.isfinite(batch.vectors).all(axis=1)
    if not finite.all():
        row = batch.first + int(np.argmin(finite))
        raise NotFiniteError("NaN or infinity", file=batch.file, row=row)


def raw_shape(text: str) -> tuple[int, int]:
    """ROWSxDIMENSIONS as numbers.

    Raises:
        ParameterError: it is none.
    """
    rows, _, d = text.lower().partition("x")
    if not (rows.isdecimal() and d.isdecimal()):
        raise ParameterError(f"{text!r} is no shape", remedy="give ROWSxDIMENSIONS, such as 1000000x384")
    return int(rows), int(d)
