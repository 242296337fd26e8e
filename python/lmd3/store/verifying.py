"""Proof that a store is what was written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lmd3 import _lmd3
from lmd3.errors import ParameterError, VerificationError
from lmd3.store.documents import parquet_file
from lmd3.store.layout import MANIFEST, NORM_TOLERANCE
from lmd3.store.opening import open_store, prove_ids, threads
from lmd3.store.reading import Store


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
        VerificationError: a file that is not what was written, a fact of the manifest that does not hold, or
            a copy for ranking again that is of other rows.
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
    store.native.check_finite(threads())
    low, high = _verify_norms(store)
    _verify_documents(store)
    _verify_groups(store)
    _verify_exact(store)
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


def _verify_norms(store: Store) -> tuple[float, float]:
    """The smallest and largest norm, after proof that they are 1 where the manifest says so."""
    assert store.native is not None
    found = store.native.norms(threads())
    if store.manifest.get("normalised"):
        # Rows converted from a coarser type keep its norms.
        tolerance = max(NORM_TOLERANCE[store.dtype], 2 * store.manifest.get("rounding", 0.0))
        for (file, first, rows), (low, low_row, high, high_row) in zip(
            store.native.shards, found, strict=True
        ):
            norm, row = (low, low_row) if low < 1 - tolerance else (high, high_row)
            if not 1 - tolerance <= norm <= 1 + tolerance:
                raise VerificationError(
                    f"the manifest says that vectors are normalised, and its norms are {low:.6g} to "
                    f"{high:.6g} (rows {first} to {first + rows - 1} of the store)",
                    file=str(file),
                    row=row,
                )
    return min(low for low, *_ in found), max(high for _, _, high, _ in found)


def _verify_documents(store: Store) -> None:
    for path, rows in store._document_files():
        with parquet_file(path) as file:
            if file.metadata.num_rows != rows:
                raise VerificationError(f"{file.metadata.num_rows} documents for {rows} rows", file=str(path))
    if store.given_ids or store.manifest:
        prove_ids(store)


def _verify_groups(store: Store) -> None:
    codes = store.group_codes()
    if codes is None or not store.manifest:
        return
    counted = np.bincount(codes, minlength=len(store.groups)).tolist()
    for group, rows in zip(store.manifest["groups"], counted, strict=True):
        if group["rows"] != rows:
            raise VerificationError(
                f"the manifest gives the group {group['name']!r} {group['rows']} rows, there are {rows}",
                file=str(Path(str(store.path)) / MANIFEST),
            )


#: Rows at most that are compared with their copy, spread evenly.
_COMPARED = 1 << 16


def _verify_exact(store: Store) -> None:
    """Proves the finer copy finite, and that a spread of its rows are the store's, within the rounding of
    both."""
    exact = store.exact
    if exact is None:
        return
    assert exact.native is not None
    exact.native.check_finite(threads())
    chosen = np.unique(np.linspace(0, store.n - 1, min(store.n, _COMPARED)).astype(np.int64))
    # Either may be so far from the row that was given, relative to that row's norm.
    allowed = 1.01 * (store.rounding + exact.rounding) / (1 - exact.rounding)
    for start in range(0, len(chosen), 4096):
        rows = chosen[start : start + 4096]
        copy = exact.rows(rows).astype(np.float64)
        off = np.linalg.norm(store.rows(rows) - copy, axis=1) > allowed * np.linalg.norm(copy, axis=1) + 1e-30
        if off.any():
            row = int(rows[off.argmax()])
            raise VerificationError(
                "the copy for ranking again is not of this row",
                file=str(store.path),
                row=row,
                remedy="convert the store that it was made of again",
            )
