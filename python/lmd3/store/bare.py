"""Vectors of other tools, opened where they lie: which files, in which order, and what comes beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lmd3.errors import ColumnError, DtypeError, FileMissingError, FormatError, ShapeError
from lmd3.store.arrow import FLAT, arrow_pieces
from lmd3.store.documents import parquet_file
from lmd3.store.faiss_files import faiss_pieces
from lmd3.store.pieces import Piece
from lmd3.store.reading import Bare
from lmd3.texts import NO_GROUP

#: Files whose header says how their vectors lie.
HEADED = (".npy", ".safetensors", ".fbin", ".f16bin", ".u8bin", ".i8bin")

#: Files of numbers and nothing else; `NAME.json` beside one says {"dtype": …, "shape": [rows, dimensions]}.
RAW = (".bin", ".raw", ".dat")

ARROW = (".arrow", ".feather")

FAISS = (".faiss", ".index")

#: Subfolders of the embedding-reader's layout.
_PARTS = ("img_emb", "text_emb", "embeddings", ".")

#: Columns of a metadata file that are taken, the first that is there.
_METADATA = {"id": ("id",), "group": ("group", "source"), "text": ("text",)}


@dataclass(frozen=True)
class Found:
    """Vectors that were found: the pieces in row order, what they come with, and their groups' codes."""

    pieces: list[Piece]
    bare: Bare
    codes: NDArray[np.uint32] | None = None


def holds_vectors(path: Path) -> bool:
    """Whether a path is vectors by its name: a file of a known suffix, or a folder that holds such."""
    if path.is_dir():
        return (
            (path / "manifest.json").exists() or bool(_vector_files(path)) or (path / "state.json").exists()
        )
    return path.suffix.lower() in (*HEADED, *RAW, *ARROW, *FAISS)


def find_vectors(path: Path, column: str | None = None) -> Found:
    """The vectors of a file or of a folder without a manifest.

    Args:
        path: `.npy`, `.safetensors`, `.fbin` and its kin, raw numbers with a description beside them, Arrow
            files, a dataset that Hugging Face's `datasets` saved, a faiss index, or a folder of one kind of
            these, perhaps with `metadata.parquet`.
        column: the column of the vectors, for Arrow files; None: the only one that can be.

    Raises:
        FileMissingError, FormatError, ShapeError, DtypeError, ColumnError: each names the file.
    """
    if not path.exists():
        raise FileMissingError("no such file or folder", file=str(path))
    return _folder(path, column) if path.is_dir() else _files([path], column, path)


def _files(files: Sequence[Path], column: str | None, path: Path) -> Found:
    suffix = files[0].suffix.lower()
    many = "" if len(files) == 1 else f"{len(files)} files "
    if suffix in ARROW:
        return _arrow(files, column, path)
    if suffix in RAW:
        pieces = [_raw(file) for file in files]
        return Found(pieces, Bare(f"{many}raw numbers, by memory map, without a copy"))
    if suffix in FAISS:
        if many:
            raise FormatError("a folder of faiss indexes", file=str(path), remedy="name one of them")
        return Found(faiss_pieces(path), Bare("faiss index (flat), by memory map, without a copy"))
    return Found(
        [Piece(file) for file in files], Bare(f"{many}{suffix or 'file'}, by memory map, without a copy")
    )


def _arrow(files: Sequence[Path], column: str | None, path: Path) -> Found:
    pieces: list[Piece] = []
    chosen = column
    for file in files:
        chosen, found = arrow_pieces(file, chosen)
        pieces += found
    kind = "Arrow file" if path.is_file() else f"dataset of {len(files)} Arrow files"
    opened = f"{kind}, column {chosen!r} in {len(pieces)} chunks, by memory map, without a copy"
    return Found(pieces, Bare(opened))


def _raw(file: Path) -> Piece:
    beside = file.with_name(file.name + ".json")
    remedy = f'write {beside.name} beside it: {{"dtype": "float32", "shape": [rows, dimensions]}}'
    try:
        described = json.loads(beside.read_bytes())
        dtype, shape = described["dtype"], described["shape"]
        rows, d = (int(extent) for extent in shape)
        offset = int(described.get("offset", 0))
    except FileNotFoundError:
        raise FormatError("raw numbers do not say what they are", file=str(file), remedy=remedy) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FormatError("does not describe raw numbers", file=str(beside), remedy=remedy) from None
    return raw_piece(file, dtype, (rows, d), offset)


def raw_piece(file: Path, dtype: str, shape: tuple[int, int], offset: int = 0) -> Piece:
    """Raw numbers of a known type and shape, which the whole file must be.

    Raises:
        DtypeError, ShapeError, FormatError, FileMissingError: as their names say.
    """
    names = {**FLAT, "float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1}
    if dtype not in names:
        raise DtypeError(f"elements of type {dtype!r} are not known", file=str(file))
    rows, d = shape
    if min(rows, d) < 1 or offset < 0 or max(rows, d, offset) >= 1 << 63:
        raise ShapeError(f"{rows} rows × {d} dimensions from byte {offset} are no matrix", file=str(file))
    try:
        size = file.stat().st_size
    except OSError as error:
        raise FileMissingError(error.strerror or "can't be read", file=str(file)) from None
    expected = offset + rows * d * names[dtype]
    if size != expected:
        raise FormatError(
            f"{size} bytes, {rows} rows × {d} {dtype} from byte {offset} are {expected}", file=str(file)
        )
    return Piece(file, (dtype, rows, d, offset))


def natural(path: Path) -> tuple[list[tuple[bool, int, str]], str]:
    """A sorting key by which part-2 comes before part-10."""
    parts = [part for part in re.split(r"([0-9]+)", path.name) if part]
    numbers = [part.isascii() and part.isdecimal() for part in parts]
    return [
        (not number, int(part) if number else 0, "" if number else part)
        for number, part in zip(numbers, parts, strict=True)
    ], path.name


def _vector_files(folder: Path) -> list[Path]:
    """The files of vectors in a folder, or in the subfolder of the embedding-reader's layout."""
    for name in _PARTS:
        place = folder / name
        if place.is_dir():
            found = [
                file
                for file in place.iterdir()
                if file.suffix.lower() in (*HEADED, *ARROW) and not file.name.startswith(".")
            ]
            if found:
                return sorted(found, key=natural)
    return []


def _folder(folder: Path, column: str | None) -> Found:
    if (folder / "state.json").is_file():
        return _arrow(dataset_files(folder), column, folder)
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(part.parent.name for part in folder.glob("*/state.json"))
        raise FormatError(
            "a dataset with splits", file=str(folder), remedy=f"name one of them: {', '.join(splits)}"
        )
    files = _vector_files(folder)
    # The files of a store alone are no folder of vectors: scales, order and groups would be lost.
    if not files or (folder / "documents-00000.parquet").exists():
        raise FileMissingError(
            "neither a store (it holds no manifest.json) nor a folder of vectors",
            file=str(folder),
            remedy="a store that was not finished has no manifest: encode again",
        )
    kinds = {file.suffix.lower() for file in files}
    if len(kinds) > 1:
        raise FormatError(
            f"vectors of several kinds ({', '.join(sorted(kinds))})",
            file=str(folder),
            remedy="put those that belong together into a folder of their own",
        )
    found = _files(files, column, folder)
    documents = _metadata_files(folder, files)
    return found if not documents else _with_documents(found, documents, folder)


def dataset_files(folder: Path) -> list[Path]:
    """The files of a saved dataset in order."""
    state = folder / "state.json"
    try:
        listed = json.loads(state.read_bytes())
        names = [entry["filename"] for entry in listed["_data_files"]]
        indices = listed.get("_indices_data_files") or listed.get("_indices_files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise FormatError("not the state of a saved dataset", file=str(state)) from None
    if indices:
        raise FormatError(
            "a dataset with an index over its rows",
            file=str(folder),
            remedy="save it with its rows in order: dataset.flatten_indices().save_to_disk(…)",
        )
    files = []
    for name in names:
        # A dataset may come from anyone: it must not lead out of its folder.
        if not isinstance(name, str) or Path(name).name != name or not name:
            raise FormatError(f"{name!r} is not a plain file name", file=str(state))
        files.append(folder / name)
    if not files:
        raise ShapeError("a dataset without rows", file=str(folder))
    return files


def _metadata_files(folder: Path, vectors: Sequence[Path]) -> list[Path]:
    """`metadata.parquet` beside the vectors, or `metadata_*.parquet` there or in `metadata/`."""
    places = dict.fromkeys([folder, folder / "metadata", vectors[0].parent])
    for place in places:
        if place.is_dir():
            found = [file for file in place.glob("*.parquet") if file.name.startswith("metadata")]
            if found:
                return sorted(found, key=natural)
    return []


def _with_documents(found: Found, files: list[Path], folder: Path) -> Found:
    counts: list[tuple[Path, int]] = []
    columns: dict[str, str] = {}
    for number, file in enumerate(files):
        with parquet_file(file) as opened:
            counts.append((file, opened.metadata.num_rows))
            names = opened.schema_arrow.names
            if number == 0:
                for ours, theirs in _METADATA.items():
                    for name in theirs:
                        if name in names:
                            columns.setdefault(ours, name)
            for name in columns.values():
                _check_column(opened.schema_arrow, name, file)
    codes = None
    groups: list[str] = []
    if "group" in columns:
        codes, groups = group_codes(files, columns["group"])
    bare = Bare(f"{found.bare.opened}, with {len(files)} metadata file(s)", counts, columns, groups)
    return Found(found.pieces, bare, codes)


def _check_column(schema: pa.Schema, name: str, file: Path) -> None:
    if name not in schema.names:
        raise ColumnError(f"has no column {name!r}, as the first metadata file has", file=str(file))
    kind = schema.field(name).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
        raise ColumnError(f"{name!r} is neither text nor an integer but {kind}", file=str(file))


def group_codes(files: Sequence[Path], column: str) -> tuple[NDArray[np.uint32], list[str]]:
    """The code of every row's group, and the groups' names in the order of their first rows."""
    known: dict[str, int] = {}
    parts: list[NDArray[np.uint32]] = []
    for file in files:
        with parquet_file(file) as opened:
            for batch in opened.iter_batches(batch_size=1 << 16, columns=[column]):
                encoded = batch.column(0).cast(pa.string()).fill_null(NO_GROUP).dictionary_encode()
                names = [name or NO_GROUP for name in encoded.dictionary.to_pylist()]
                own = np.array([known.setdefault(name, len(known)) for name in names], np.uint32)
                parts.append(own[encoded.indices.to_numpy()] if len(batch) else np.empty(0, np.uint32))
    return (np.concatenate(parts) if parts else np.empty(0, np.uint32)), list(known)


def check_rows(found: Found, n: int, shards: Mapping[Path, int], path: Path) -> None:
    """Refuses metadata of another number of rows than the vectors.

    Raises:
        ShapeError: names the files that do not fit.
    """
    documents = found.bare.documents
    if not documents:
        return
    if len(documents) == len(shards):
        for (file, rows), (vectors, count) in zip(documents, shards.items(), strict=True):
            if rows != count:
                raise ShapeError(f"{rows} rows for the {count} vectors of {vectors}", file=str(file))
    elif (total := sum(rows for _, rows in documents)) != n:
        raise ShapeError(f"{total} rows of metadata for {n} vectors", file=str(path))
