"""Texts: JSONL, parquet, CSV and plain text, compressed or not, files and folders, as one stream with stable
ids.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from lmd3.errors import (
    ColumnError,
    FileMissingError,
    FormatError,
    ParameterError,
    ShapeError,
    TextFormatError,
)
from lmd3.unique import UniqueIds

__all__ = ["TextBatch", "Texts", "UniqueIds", "is_texts", "read_texts"]

#: Name of the group of records that have none although a column of groups was asked for.
NO_GROUP = "(none)"

#: Largest weight that stores hold (of a float32).
MAX_WEIGHT = 3.4028234663852886e38

_LINES = (".jsonl", ".csv", ".txt")
_COMPRESSIONS = {"": None, ".gz": "gzip", ".zst": "zstd"}
_SUFFIXES = {kind + packed: (kind, codec) for kind in _LINES for packed, codec in _COMPRESSIONS.items()}
_SUFFIXES[".parquet"] = (".parquet", None)

#: Texts of one batch, and the characters after which it ends sooner.
_BATCH, _BATCH_CHARACTERS = 4096, 1 << 24

_BLOCK = 1 << 20


@dataclass(frozen=True)
class TextBatch:
    """Some texts of the stream: `ids` and `texts` of equal length, and `groups` and `weights` where columns
    of them were named.
    """

    ids: list[str]
    texts: list[str]
    groups: list[str] | None
    weights: list[float] | None = None

    def __len__(self) -> int:
        return len(self.ids)


def _format(path: Path) -> tuple[str, str | None] | None:
    """Kind and compression by a file's name; None for other files."""
    name = path.name.lower()
    return next((found for suffix, found in _SUFFIXES.items() if name.endswith(suffix)), None)


def is_texts(path: str | Path) -> bool:
    """Whether a path is texts by its name: a file of a known suffix, or a folder (not a store) that holds
    such.
    """
    path = Path(path)
    if path.is_dir():
        from lmd3.store.bare import holds_vectors

        return not holds_vectors(path) and bool(_members(path))
    return _format(path) is not None


def _members(folder: Path) -> list[Path]:
    """The text files of a folder and its subfolders in the order of their names; hidden ones are left out."""
    found = (path for path in folder.rglob("*") if _format(path) is not None and path.is_file())
    shown = (
        path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    return sorted(shown, key=lambda path: path.relative_to(folder).as_posix())


class Texts:
    """A stream of texts that can be read again and again: iterating gives `TextBatch`es in input order.

    Made by `read_texts`. Empty texts (nothing but white space) are left out and counted; the ids of the
    others stay as
    they are: the record's id, or its row number in the whole input, counted from 0.

    Attributes:
        paths: the files in order; empty for texts in memory.
        count: texts given by the last complete pass, or None.
        empty: empty texts left out by the last complete pass, or None.
        id_column: the column that ids come from, once something was read; None: they are row numbers.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        text: str = "text",
        id: str | None = None,
        group: str | None = None,
        weight: str | None = None,
        records: Sequence[dict[str, Any]] | None = None,
    ) -> None:
        self.paths = list(paths)
        self.text, self.id, self.group, self.weight = text, id, group, weight
        self.count: int | None = None
        self.empty: int | None = None
        self.id_column = id
        self._records = records
        self._fingerprint: str | None = None
        self._proven = False
        #: The number of the input's first row, where rows are numbered.
        self.first_row = 0

    @classmethod
    def from_lists(
        cls,
        texts: Iterable[str],
        ids: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
        weights: Sequence[float] | None = None,
    ) -> Texts:
        """Texts in memory, with their ids, groups and weights.

        Raises:
            ShapeError: lists of different lengths.
        """
        texts = list(texts)
        columns: dict[str, Sequence[Any]] = {"text": texts}
        for name, column in (("id", ids), ("group", groups), ("weight", weights)):
            if column is not None:
                if len(column) != len(texts):
                    raise ShapeError(f"{len(column)} {name}s for {len(texts)} texts")
                columns[name] = column
        records = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        own = {name: name for name in columns}
        return cls([], id=own.get("id"), group=own.get("group"), weight=own.get("weight"), records=records)

    def number_from(self, first_row: int) -> None:
        """Numbers rows without ids from here on: those that are added to a store."""
        self.first_row, self._fingerprint = first_row, None

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the files' bytes and of the columns read; reads the files once."""
        if self._fingerprint is None:
            digest = hashlib.blake2b(digest_size=8)
            weight = [] if self.weight is None else [self.weight]
            digest.update(json.dumps([self.text, self.id, self.group, *weight]).encode())
            if self.first_row:
                digest.update(str(self.first_row).encode())
            for path in self.paths:
                digest.update(b"\0" + str(path.stat().st_size).encode() + b"\0")
                with path.open("rb") as file:
                    while block := file.read(_BLOCK):
                        digest.update(block)
            for record in self._records or ():
                digest.update(json.dumps(record).encode() + b"\0")
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def __iter__(self) -> Iterator[TextBatch]:
        """Reads the input once.

        Raises:
            FileMissingError, FormatError: a file that is not there or damaged.
            TextFormatError: a broken line or bytes that are not UTF-8, with file and row.
            ColumnError: a column that is missing or holds no text.
            DuplicateIdError: an id that occurs twice, at the end of the first complete pass.
        """
        unique = None if self._proven else UniqueIds()
        count = empty = characters = 0
        ids: list[str] = []
        texts: list[str] = []
        groups: list[str] = []
        weights: list[float] = []
        numbered = False

        def batch() -> TextBatch:
            if unique is not None and not numbered:
                unique.add(ids)
            return TextBatch(
                ids,
                texts,
                None if self.group is None else groups,
                None if self.weight is None else weights,
            )

        # `_items` with nothing made for a record that is as it should be: this loop is what reading costs.
        for source, wanted, offset in self._inputs():
            own = wanted.id
            numbered = own is None
            rows = 0
            for row, values in source.records(wanted.all):
                rows = row + 1
                text = values.get(self.text)
                if text.__class__ is not str or not text.isascii():
                    text = _text(text, self.text, source.file, row)
                if not text or text.isspace():
                    empty += 1
                    continue
                if own is None:
                    ids.append(str(offset[0] + row))
                else:
                    name: Any = values.get(own)
                    if not (name.__class__ is str and name and name.isascii()):
                        name = _id(name, own, source.file, row)
                    ids.append(name)
                if self.group is not None:
                    group: Any = values.get(self.group)
                    if not (group.__class__ is str and group and group.isascii()):
                        group = _group(group, self.group, source.file, row)
                    groups.append(group)
                if self.weight is not None:
                    weights.append(_weight(values.get(self.weight), self.weight, source.file, row))
                texts.append(text)
                characters += len(text)
                if len(texts) >= _BATCH or characters >= _BATCH_CHARACTERS:
                    count += len(texts)
                    yield batch()
                    ids, texts, groups, weights, characters = [], [], [], [], 0
            offset[0] += rows
        if texts:
            count += len(texts)
            yield batch()
        if unique is not None:
            self._prove(unique)
            self._proven = True
        self.count, self.empty = count, empty

    def _prove(self, unique: UniqueIds) -> None:
        found: list[_Item] = []

        def look_up(positions: list[int]) -> list[str]:
            wanted = set(positions)
            kept = (item for item in self._items() if not item.empty)
            found.extend(item for position, item in enumerate(kept) if position in wanted)
            places.update(zip(positions, found, strict=True))
            return [item.id for item in found]

        places: dict[int, _Item] = {}
        unique.check(look_up, place=lambda position: (places[position].file, places[position].row))

    def _items(self) -> Iterator[_Item]:
        """Every record, the empty ones too."""
        for source, wanted, offset in self._inputs():
            rows = 0
            for row, values in source.records(wanted.all):
                rows = row + 1
                text = _text(values.get(self.text), self.text, source.file, row)
                empty = not text or text.isspace()
                name = str(offset[0] + row)
                if wanted.id is not None and not empty:
                    name = _id(values.get(wanted.id), wanted.id, source.file, row)
                yield _Item(name, empty, source.file, row)
            offset[0] += rows

    def _inputs(self) -> Iterator[tuple[_Source, _Wanted, list[int]]]:
        """The files in order, what is read of them, and the number of their first row (the reader adds its
        rows)."""
        own = self.id
        offset = [self.first_row]
        for number, source in enumerate(self._sources()):
            if number == 0 and self.id is None:
                # Decided once for the whole input, by the columns of its first file.
                own = self.id_column = "id" if "id" in source.columns() else None
            names = (self.text, own, self.group, self.weight)
            yield (
                source,
                _Wanted(list(dict.fromkeys(name for name in names if name is not None)), own),
                offset,
            )

    def _sources(self) -> Iterator[_Source]:
        if self._records is not None:
            yield _Memory(self._records)
        for path in self.paths:
            found = _format(path)
            assert found is not None
            kind, codec = found
            match kind:
                case ".jsonl":
                    yield _JsonLines(path, codec)
                case ".csv":
                    yield _Csv(path, codec)
                case ".txt":
                    yield _Lines(path, codec, self.text)
                case _:
                    yield _Parquet(path)


def read_records(path: str | Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The records of a file of texts of any format, in order, with the values of some columns.

    Plain text has one column, of any name.

    Raises:
        FormatError: a file of another kind, or a damaged one.
        TextFormatError, ColumnError: as iterating over `Texts`.
        FileMissingError: no such file.
    """
    path = Path(path)
    if not path.exists():
        raise FileMissingError("no such file", file=str(path))
    if _format(path) is None:
        raise FormatError("not a kind of texts known by its name", file=str(path), remedy=_KNOWN)
    texts = Texts([path], text=columns[0])
    for source in texts._sources():
        for _, record in source.records(list(columns)):
            yield record


class _Item(NamedTuple):
    """A record's id and place."""

    id: str
    empty: bool
    file: str | None
    row: int


class _Wanted(NamedTuple):
    """Columns that are read, and that of the ids among them; None: rows are numbered."""

    all: list[str]
    id: str | None


class _Source(Protocol):
    """One file of texts."""

    @property
    def file(self) -> str | None:
        """Its path; None in memory."""

    def columns(self) -> Sequence[str]:
        """Its columns (of JSON: the keys of the first record)."""

    def records(self, wanted: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Row, counted from 0, and the wanted values of every record."""


class _Memory:
    """Records in memory."""

    file = None

    def __init__(self, records: Sequence[dict[str, Any]]) -> None:
        self._records = records

    def columns(self) -> Sequence[str]:
        return list(self._records[0]) if self._records else []

    def records(self, wanted: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        return enumerate(self._records)


class _Lines:
    """Plain text: one text per line."""

    def __init__(self, path: Path, codec: str | None, name: str) -> None:
        self.file = str(path)
        self._path, self._codec, self._name = path, codec, name

    def columns(self) -> Sequence[str]:
        return [self._name]

    def records(self, wanted: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        _require(wanted, [self._name], self.file)
        for row, line in enumerate(_text_lines(self._path, self._codec)):
            yield row, {self._name: line}


class _JsonLines:
    """One JSON object per line. Blank lines count as rows, so that a row is always its line."""

    def __init__(self, path: Path, codec: str | None) -> None:
        self.file = str(path)
        self._path, self._codec = path, codec

    def columns(self) -> Sequence[str]:
        return next((list(value) for _, value in self._parsed()), [])

    def _parsed(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for row, line in enumerate(_text_lines(self._path, self._codec)):
            if not line or line.isspace():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", "") or _first_line(error)
                raise TextFormatError(
                    f"line {row + 1} is not JSON: {reason}", file=self.file, row=row
                ) from None
            if not isinstance(value, dict):
                raise TextFormatError(f"line {row + 1} is not a JSON object", file=self.file, row=row)
            yield row, value

    def records(self, wanted: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        for row, value in self._parsed():
            record = {}
            for name in wanted:
                found = _member(value, name)
                if found is _ABSENT:
                    _require([name], list(value), self.file, row)
                record[name] = found
            yield row, record


_ABSENT = object()


def _member(value: dict[str, Any], name: str) -> Any:
    """A member of an object; `a.b` is the member b of a where there is no member of that whole name."""
    if name in value or "." not in name:
        return value.get(name, _ABSENT)
    first, rest = name.split(".", 1)
    inner = value.get(first)
    return _member(inner, rest) if isinstance(inner, dict) else _ABSENT


class _Csv:
    """Comma-separated values with a header."""

    def __init__(self, path: Path, codec: str | None) -> None:
        self.file = str(path)
        self._path, self._codec = path, codec

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        """Line and fields of every record, the header first."""
        # Python's limit of 128 KB to a field is below the length of real texts.
        csv.field_size_limit(2**31 - 1)
        lines = (line + "\n" for line in _text_lines(self._path, self._codec))
        reader = csv.reader(lines, strict=True)
        try:
            for fields in reader:
                if fields:
                    yield reader.line_num, fields
        except csv.Error as error:
            raise TextFormatError(
                f"line {reader.line_num} is not CSV: {error}", file=self.file, row=max(reader.line_num - 2, 0)
            ) from None

    def columns(self) -> Sequence[str]:
        return next((fields for _, fields in self._rows()), [])

    def records(self, wanted: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        rows = self._rows()
        _, header = next(rows, (0, []))
        _require(wanted, header, self.file)
        for name in wanted:
            if header.count(name) > 1:
                raise ColumnError(f"the column {name!r} occurs twice in the header", file=self.file)
        places = {name: header.index(name) for name in wanted}
        for row, (line, fields) in enumerate(rows):
            if len(fields) != len(header):
                raise TextFormatError(
                    f"{len(fields)} fields in a table of {len(header)} columns (it ends on line {line})",
                    file=self.file,
                    row=row,
                )
            yield row, {name: fields[place] for name, place in places.items()}


class _Parquet:
    """A parquet file, read by row group."""

    def __init__(self, path: Path) -> None:
        self.file = str(path)
        self._path = path

    @contextlib.contextmanager
    def _open(self) -> Iterator[pq.ParquetFile]:
        with _readable(self._path):
            try:
                with pq.ParquetFile(self._path) as file:
                    yield file
            except pa.ArrowException as error:
                raise FormatError(
                    f"not a readable parquet file: {_first_line(error)}", file=self.file
                ) from None

    def columns(self) -> Sequence[str]:
        with self._open() as file:
            return list(file.schema_arrow.names)

    def records(self, wanted: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        with self._open() as file:
            _require(wanted, list(file.schema_arrow.names), self.file)
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=wanted):
                columns = [batch.column(name).to_pylist() for name in wanted]
                for values in zip(*columns, strict=True):
                    yield row, dict(zip(wanted, values, strict=True))
                    row += 1


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0].strip().rstrip(".") or type(error).__name__


def _require(wanted: Iterable[str], columns: Sequence[str], file: str | None, row: int | None = None) -> None:
    for name in wanted:
        if name not in columns:
            present = ", ".join(repr(column) for column in columns) or "no columns"
            raise ColumnError(f"no column {name!r}; there are {present}", file=file, row=row)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what the operating system and the decompressors say into the errors of lmd3."""
    try:
        yield
    except FileNotFoundError:
        raise FileMissingError("no such file", file=str(path)) from None
    except PermissionError:
        raise FileMissingError("not readable", file=str(path), remedy="check its permissions") from None
    except OSError as error:
        raise FormatError(f"can't be read: {_first_line(error)}", file=str(path)) from None


def _byte_lines(path: Path, codec: str | None) -> Iterator[bytes]:
    """The lines of a file without their ends, decompressed as they are read."""
    with contextlib.ExitStack() as stack:
        with _readable(path):
            stream = stack.enter_context(pa.OSFile(str(path)))
            if codec is not None:
                stream = stack.enter_context(pa.CompressedInputStream(stream, codec))
        pending: list[bytes] = []
        while True:
            with _readable(path):
                block = stream.read(_BLOCK)
            if not block:
                break
            first, *others = block.split(b"\n")
            pending.append(first)
            if others:
                yield b"".join(pending)
                yield from others[:-1]
                pending = [others[-1]]
        if last := b"".join(pending):
            yield last


def _text_lines(path: Path, codec: str | None) -> Iterator[str]:
    for row, line in enumerate(_byte_lines(path, codec)):
        if row == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            yield line.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise TextFormatError(
                f"byte {error.start + 1} of line {row + 1} is not UTF-8", file=str(path), row=row
            ) from None


def _string(value: str, name: str, file: str | None, row: int) -> str:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise TextFormatError(
                f"{name!r} holds half of a surrogate pair, which is no character", file=file, row=row
            ) from None
    return value


def _text(value: Any, name: str, file: str | None, row: int) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ColumnError(f"{name!r} is not text but {_type(value)}", file=file, row=row)
    return _string(value, name, file, row)


def _id(value: Any, name: str, file: str | None, row: int) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ColumnError(
            f"the id {name!r} is neither text nor an integer but {_type(value)}", file=file, row=row
        )
    if not value:
        raise ColumnError(f"the id {name!r} is empty", file=file, row=row)
    return _string(value, name, file, row)


def _group(value: Any, name: str, file: str | None, row: int) -> str:
    if value is None or value == "":
        return NO_GROUP
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ColumnError(
            f"the group {name!r} is neither text nor an integer but {_type(value)}", file=file, row=row
        )
    return _string(value, name, file, row)


def _weight(value: Any, name: str, file: str | None, row: int) -> float:
    """A weight; tables of text (CSV) hold numbers as text."""
    number = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            number = float(value)
    if isinstance(number, bool) or not isinstance(number, int | float):
        what = repr(value) if isinstance(value, str) else _type(value)
        raise ColumnError(f"the weight {name!r} is not a number but {what}", file=file, row=row)
    # As stores hold it: what float32 can't hold is no weight either.
    if not 0 <= number <= MAX_WEIGHT:
        raise ColumnError(f"the weight {name!r} is {number}, not a finite number ≥ 0", file=file, row=row)
    return float(number)


def _type(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def read_texts(
    paths: str | Path | Iterable[str | Path],
    *,
    text: str = "text",
    id: str | None = None,
    group: str | None = None,
    weight: str | None = None,
) -> Texts:
    """Texts from files and folders, as one stream in the order given (folders: by name).

    Formats by name: `.jsonl`, `.csv` (with a header), `.txt` (one text per line), each also with `.gz` or
    `.zst`, and `.parquet`.

    Args:
        paths: one path or several.
        text: column of the text; in JSON, `a.b` is the member b of the member a. Plain text has this one
            column.
        id: column of the id; None: the column "id" if the first file has one, else the row number in the
            whole input.
        group: column of the group (source, domain); None: no groups. Records without one are in the group
            "(none)".
        weight: column of the weight, a finite number ≥ 0; None: all are 1.

    Raises:
        FileMissingError: a path that is not there.
        FormatError: a file of another kind, or a folder without texts.
    """
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not given:
        raise ParameterError("no files of texts are named")
    files: list[Path] = []
    for path in map(Path, given):
        if path.is_dir():
            members = _members(path)
            if not members:
                raise FormatError("a folder without texts", file=str(path), remedy=_KNOWN)
            files += members
        elif not path.exists():
            raise FileMissingError("no such file or folder", file=str(path))
        elif _format(path) is None:
            raise FormatError("not a kind of texts known by its name", file=str(path), remedy=_KNOWN)
        else:
            files.append(path)
    return Texts(files, text=text, id=id, group=group, weight=weight)


_KNOWN = "texts are .jsonl, .csv, .txt (also .gz, .zst) or .parquet"
