"""Stores of another element type, or with the rows of each group together."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lmd3.errors import DtypeError, ParameterError
from lmd3.progress import ProgressFactory, silent
from lmd3.store import SOURCE_ROW, Store, StoreWriter, open_store
from lmd3.store.layout import FINENESS
from lmd3.store.writing import check_exact

__all__ = ["convert"]

#: Values of embeddings taken at a time (as float32: 64 MB).
_VALUES = 1 << 24

#: Documents sorted in memory at a time, and the largest number of files that others wait in.
_SORTED_ROWS, _SORTED_FILES = 1 << 17, 256

#: Columns of the documents that are carried over; `source_row` too, where the source was sorted itself.
_CARRIED = ("id", "group", "text", "tokens", "truncated", SOURCE_ROW.name, "document", "chunk")

#: Facts of the manifest that stay true of the rows in another type or order.
_FACTS = ("sampling", "chunking", "counts")


def convert(
    source: str | Path | NDArray[Any] | Store,
    out: str | Path,
    *,
    dtype: str | None = None,
    exact: str | None = None,
    sort_by: str | None = None,
    shard_rows: int | None = None,
    force: bool = False,
    progress: ProgressFactory | None = None,
) -> Store:
    """Writes a store again: in another element type, or with the rows of each group together.

    Ids, groups, texts, weights and the encoder's description and state are kept. Memory is that of one piece
    of rows, and 8 bytes a row for ids (28 where rows are sorted, and one 256th of the documents).

    Args:
        source: a store, a bare `.npy` or `.safetensors` file, or an array (n, d).
        out: the folder to make.
        dtype: "float32", "float16", "bfloat16" or "int8"; None: that of the source. To int8 every value is
            off by at most half its row's scale (max abs x / 127); a type as fine as the source's, or the
            same, keeps the values (int8 to int8: up to the last bit of a scale). A source that keeps a copy
            is converted from that.
        exact: "float16" or "float32": keep a finer copy of the rows beside them, by which neighbours are
            ranked again (`Store.exact`); "none": keep none; None: that of the source, where it is finer than
            `dtype`.
        sort_by: "group": rows ordered by group, in the order of the groups' first rows, and by row within a
            group. The column `source_row` of the documents says where each row was; a source that was sorted
            itself passes its own on.
        shard_rows: rows of one shard; None: as many as the largest shard of the source, for bare vectors
            2²⁰.
        force: replace a store that is there.
        progress: makes the bars.

    Raises:
        ParameterError: an unknown `sort_by`, or a source without groups.
        DtypeError: an element type that stores are not written in; a copy that would be no finer than the
            rows, or than the source.
        NotFiniteError: a value beyond the type's range, with the row.
        OutputError: `out` exists, is being written by another process (it is named), or can't be written.
        InputError: and its kinds: the source can't be opened.
    """
    store = open_store(source)
    if sort_by not in (None, "group"):
        raise ParameterError(f"stores are not sorted by {sort_by!r}", remedy="sort by group")
    if sort_by and not store.groups:
        raise ParameterError("the store has no groups", file=None if store.path is None else str(store.path))
    dtype = dtype or store.dtype
    copied = _copy_type(store, dtype, exact)
    # The finest that is known of the rows.
    finest = store.exact or store
    sizes = [int(shard["rows"]) for shard in store.manifest.get("shards", [])]
    described = dict(store.manifest.get("source") or {})
    described["converted"] = {"fingerprint": store.fingerprint, "dtype": store.dtype, "sorted_by": sort_by}
    with StoreWriter(
        out,
        dtype=dtype,
        encoder=store.encoder,
        normalised=store.normalised,
        shard_rows=shard_rows or max(sizes, default=1 << 20),
        force=force,
        source=described,
        rounding=finest.rounding if store.manifest else 0.0,
        exact=copied,
    ) as writer:
        writer.facts.update({name: store.manifest[name] for name in _FACTS if store.manifest.get(name)})
        # Tokens that were left out are no column of the documents.
        writer.group_facts = {
            group["name"]: {name: value for name, value in group.items() if name not in ("name", "rows")}
            for group in store.manifest.get("groups", [])
        }
        for entry in store.manifest.get("files", []):
            writer.attach(Path(str(store.path)) / Path(entry["name"]).name)
        order = None
        if sort_by:
            codes = store.group_codes()
            assert codes is not None
            order = np.argsort(codes, kind="stable")
            del codes
        weights = store.weights()
        with (progress or silent)("converting", float(store.n), "rows") as bar:
            for rows, documents in _pieces(store, order, writer.path.absolute().parent):
                columns = _columns(store, documents, rows if sort_by else None)
                writer.append(
                    finest.rows(rows), **columns, weights=None if weights is None else weights[rows]
                )
                bar.update(float(writer.n))
        return writer.close()


def _copy_type(store: Store, dtype: str, exact: str | None) -> str | None:
    """The type of the copy to keep."""
    if exact == "none":
        return None
    own = store.manifest.get("exact")
    if exact is None:
        kept = None if own is None else str(own["dtype"])
        return kept if kept and FINENESS[kept] > FINENESS.get(dtype, 9) else None
    check_exact(exact, dtype if dtype in FINENESS else "int8")
    # Bare integers are the vectors themselves.
    known = FINENESS[own["dtype"] if own else store.dtype] if store.manifest else 9
    if known <= FINENESS.get(dtype, 0):
        raise DtypeError(
            f"the source is {store.dtype} itself: a {exact} copy would know no more",
            file=None if store.path is None else str(store.path),
            remedy="convert the store that it was made of",
        )
    return exact


def _pieces(
    store: Store, order: NDArray[np.int64] | None, place: Path
) -> Iterator[tuple[NDArray[np.int64], pa.Table]]:
    """Row numbers in the order wanted, piece by piece, and their documents."""
    step = max(1, min(1 << 16, _VALUES // store.d))
    if order is None:
        for first in range(0, store.n, step):
            rows = np.arange(first, min(first + step, store.n))
            yield rows, store.documents(rows, _CARRIED)
        return
    first = 0
    for table in _sorted_documents(store, order, place):
        for start in range(0, table.num_rows, step):
            part = table.slice(start, step)
            yield order[first : first + part.num_rows], part
            first += part.num_rows


def _sorted_documents(store: Store, order: NDArray[np.int64], place: Path) -> Iterator[pa.Table]:
    """All documents in a given order, many at a time.

    They are dealt out to temporary files by where they belong, and each file is sorted in memory: two passes
    over the documents, however the groups are mixed.
    """
    size = max(_SORTED_ROWS, -(-store.n // _SORTED_FILES))
    if store.n <= size:
        yield store.documents(order, _CARRIED)
        return
    target = np.empty(store.n, dtype=np.int64)
    target[order] = np.arange(store.n)
    with tempfile.TemporaryDirectory(prefix=".sorting.", dir=place) as folder:
        paths = [Path(folder) / f"{number}.arrow" for number in range(-(-store.n // size))]
        writers: list[Any] = [None] * len(paths)
        with ExitStack() as stack:
            for first in range(0, store.n, _SORTED_ROWS):
                rows = np.arange(first, min(first + _SORTED_ROWS, store.n))
                table = store.documents(rows, _CARRIED).append_column("target", pa.array(target[rows]))
                part = target[rows] // size
                for number in np.unique(part).tolist():
                    if writers[number] is None:
                        writers[number] = stack.enter_context(
                            pa.ipc.new_stream(str(paths[number]), table.schema)
                        )
                    writers[number].write_table(table.take(pa.array(np.flatnonzero(part == number))))
        for path in paths:
            with path.open("rb") as file, pa.ipc.open_stream(file) as reader:
                table = reader.read_all()
            path.unlink()
            yield table.sort_by("target").drop_columns(["target"])


def _columns(store: Store, documents: pa.Table, sorted_rows: NDArray[np.int64] | None) -> dict[str, Any]:
    """What `StoreWriter.append` takes of the documents: a column that the source does not have is None."""

    def column(name: str, kept: bool) -> Any:
        return documents[name].to_pylist() if kept else None

    def numbers(name: str) -> Any:
        return None if documents[name].null_count else documents[name].to_numpy()

    earlier = numbers(SOURCE_ROW.name)
    return {
        "ids": column("id", store.given_ids or sorted_rows is not None),
        "groups": column("group", bool(store.groups)),
        "texts": column("text", store.has_texts),
        "tokens": numbers("tokens"),
        "truncated": numbers("truncated"),
        "source_rows": sorted_rows if earlier is None else earlier,
        "documents": column("document", store.chunked),
        "chunks": numbers("chunk") if store.chunked else None,
    }
