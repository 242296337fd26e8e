"""Opening what holds vectors: a store, a bare file, an array."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmd3 import _lmd3
from lmd3.errors import FormatError, ParameterError
from lmd3.store import remote
from lmd3.store.bare import Found, check_rows, find_vectors
from lmd3.store.layout import ITEM_BYTES, MANIFEST
from lmd3.store.manifest import check_manifest
from lmd3.store.reading import Store, checked_array
from lmd3.unique import UniqueIds

#: Ids of bare vectors up to so many are proven unique when opened; more by `lmd3 verify`.
CHECKED_IDS = 10_000_000

#: Bare files up to this size are checked for NaN when opened; larger ones while scanned.
CHECKED_BYTES = 8 << 30


def threads() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_store(source: str | Path | NDArray[Any] | Store) -> Store:
    """Opens vectors where they lie: a store, bare vectors, an array, or a store, which is returned as it is.

    Bare vectors are `.npy`, `.safetensors` (one matrix), `.fbin .f16bin .u8bin .i8bin`, raw numbers (`.bin`,
    `.raw`, `.dat`) with a description beside them (`NAME.json`: {"dtype": …, "shape": [rows, dimensions]}),
    Arrow files, datasets saved by Hugging Face's `datasets`, flat faiss indexes, and folders of one kind of
    these, files in natural order; with `metadata.parquet` beside them, its columns `id`, `group` (or
    `source`) and `text` are taken. An fsspec address (`s3://…`) is staged first (see `lmd3.store.remote`).

    Nothing is copied or cast. Headers, sizes and facts of the manifest are checked; bare vectors up to 8 GB
    and arrays are also checked for NaN and infinity (stores are proven finite when written).

    Raises:
        FileMissingError, FormatError, ShapeError, DtypeError, NotFiniteError, ColumnError, DuplicateIdError:
            each names the file, and the row where there is one.
    """
    if isinstance(source, Store):
        return source
    if isinstance(source, np.ndarray):
        return Store(array=checked_array(source))
    if not isinstance(source, (str, os.PathLike)):
        raise ParameterError(f"a store is a path or a NumPy array, not {type(source).__name__}")
    if address := remote.address_of(source):
        return open_store(remote.stage(address))
    path = Path(source)
    if not (path / MANIFEST).exists():
        return open_bare(path)
    while True:
        before = (path / MANIFEST).stat().st_mtime_ns
        native = _lmd3.Store(path)
        # The native part has parsed these bytes and checked what it needs; the rest is checked here.
        try:
            manifest = json.loads((path / MANIFEST).read_bytes())
        except ValueError:  # no UTF-8 in a part that the native one passes over
            raise FormatError("damaged manifest: not JSON", file=str(path / MANIFEST)) from None
        if (path / MANIFEST).stat().st_mtime_ns == before:
            break  # else rows were appended between the two readings
    check_manifest(manifest, path / MANIFEST)
    return Store(path=path, native=native, manifest=manifest)


def open_bare(path: Path, column: str | None = None, found: Found | None = None) -> Store:
    """Opens vectors without a manifest; `column` names that of the vectors in Arrow files.

    Raises:
        InputError: and its kinds, as `open_store`.
    """
    found = found or find_vectors(path, column)
    native = _lmd3.Store.of_pieces(path, found.pieces, found.codes)
    shards: dict[Path, int] = {}
    for file, _, rows in native.shards:
        shards[file] = shards.get(file, 0) + rows
    check_rows(found, native.n, shards, path)
    store = Store(path=path, native=native, bare=found.bare)
    if native.n * native.d * ITEM_BYTES[native.dtype] <= CHECKED_BYTES:
        native.check_finite(threads())
    if store.given_ids and store.n <= CHECKED_IDS:
        prove_ids(store)
    return store


def prove_ids(store: Store) -> None:
    """Refuses ids that occur twice; memory is bounded.

    Raises:
        DuplicateIdError: with both rows.
    """
    with UniqueIds() as unique:
        for table in store._read_documents(["id"]):
            unique.add(table["id"].to_pylist())
        unique.check(lambda rows: store.ids(np.asarray(rows)), file=str(store.path))
