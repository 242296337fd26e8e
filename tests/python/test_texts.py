"""Texts: every format gives the same stream; ids are stable; what is broken is refused with its line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lmd3
from lmd3.errors import (
    ColumnError,
    DuplicateIdError,
    FileMissingError,
    FormatError,
    Lmd3Error,
    ParameterError,
    ShapeError,
    TextFormatError,
)
from lmd3.texts import Texts, UniqueIds, is_texts, read_texts

Record = dict[str, Any]


def compressed(data: bytes, codec: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def jsonl(records: list[Record]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def as_csv(records: list[Record]) -> bytes:
    sink = io.StringIO(newline="")
    writer = csv.DictWriter(sink, list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    return sink.getvalue().encode()


def as_parquet(records: list[Record]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), sink, row_group_size=3)
    return sink.getvalue()


FORMATS: dict[str, Callable[[list[Record]], bytes]] = {
    "x.jsonl": jsonl,
    "x.jsonl.gz": lambda records: gzip.compress(jsonl(records)),
    "x.jsonl.zst": lambda records: compressed(jsonl(records), "zstd"),
    "x.csv": as_csv,
    "x.CSV.GZ": lambda records: gzip.compress(as_csv(records)),
    "x.parquet": as_parquet,
}


def flat(texts: Texts) -> list[tuple[str, str, str | None]]:
    found = []
    for batch in texts:
        assert len(batch) == len(batch.ids) == len(batch.texts) > 0
        groups = batch.groups if batch.groups is not None else [None] * len(batch)
        found += list(zip(batch.ids, batch.texts, groups, strict=True))
    return found


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


# --- formats ---

# What CSV can hold: no carriage returns (which its readers turn into line ends), no NUL.
characters = st.characters(codec="utf-8", exclude_characters="\r\0")


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.text(characters, max_size=12), st.sampled_from(["a", "b", ""])), min_size=1, max_size=20
    ),
    own_ids=st.booleans(),
)
def test_every_format_gives_the_same_stream(rows: list[tuple[str, str]], own_ids: bool) -> None:
    records: list[Record] = [{"body": text, "kind": kind} for text, kind in rows]
    if own_ids:
        records = [{"id": f"é{row}", **record} for row, record in enumerate(records)]
    expected = [
        (f"é{row}" if own_ids else str(row), text, kind or "(none)")
        for row, (text, kind) in enumerate(rows)
        if text and not text.isspace()
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, encode in FORMATS.items():
            path = write(Path(folder) / name, encode(records))
            texts = read_texts(path, text="body", group="kind")
            # Twice: the stream can be read again.
            assert flat(texts) == expected and flat(texts) == expected
            assert (texts.count, texts.empty) == (len(expected), len(rows) - len(expected))
            assert texts.id_column == ("id" if own_ids else None)


def test_plain_text_is_one_text_per_line(tmp_path: Path) -> None:
    path = write(tmp_path / "x.txt", "\ufeffone\r\n\r\n  \nfour é\nlast")
    assert flat(read_texts(path)) == [("0", "one", None), ("3", "four é", None), ("4", "last", None)]
    texts = read_texts(write(tmp_path / "x.txt.gz", gzip.compress(b"a\n\nb\n")))
    assert flat(texts) == [("0", "a", None), ("2", "b", None)] and texts.empty == 1
    with pytest.raises(ColumnError):
        flat(read_texts(path, id="id"))


def test_json_rows_are_lines(tmp_path: Path) -> None:
    """Blank lines keep their number, so that an id is always the line it came from."""
    path = write(tmp_path / "x.jsonl", '{"text": "a"}\n\n{"text": ""}\n{"text": null}\n{"text": "e"}')
    texts = read_texts(path)
    assert flat(texts) == [("0", "a", None), ("4", "e", None)] and texts.empty == 2


def test_members_of_members(tmp_path: Path) -> None:
    records = [
        {"text": "a", "meta": {"source": "x"}, "n.m": 1},
        {"text": "b", "meta": {"source": "y"}, "n.m": 2},
    ]
    path = write(tmp_path / "x.jsonl", jsonl(records))
    assert flat(read_texts(path, group="meta.source", id="n.m")) == [("1", "a", "x"), ("2", "b", "y")]
    with pytest.raises(ColumnError, match=r"'meta\.other'"):
        flat(read_texts(path, group="meta.other"))


def test_a_folder_and_several_files_are_one_stream(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    write(tmp_path / "in" / "b.jsonl", jsonl([{"text": "b0"}, {"text": ""}, {"text": "b2"}]))
    write(tmp_path / "in" / "a.csv", "text\na0\na1\n")
    write(tmp_path / "in" / "deep" / "c.txt", "c0\n")
    write(tmp_path / "in" / ".hidden.txt", "no\n")
    write(tmp_path / "in" / "README.md", "no\n")
    expected = [("0", "a0"), ("1", "a1"), ("2", "b0"), ("4", "b2"), ("5", "c0")]
    assert [item[:2] for item in flat(read_texts(tmp_path / "in"))] == expected
    several = read_texts([tmp_path / "in" / "deep", tmp_path / "in" / "a.csv"])
    assert [item[:2] for item in flat(several)] == [("0", "c0"), ("1", "a0"), ("2", "a1")]


def test_long_input_comes_in_bounded_batches(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", jsonl([{"text": f"text {row}"} for row in range(10_000)]))
    sizes = [len(batch) for batch in read_texts(path)]
    assert sum(sizes) == 10_000 and max(sizes) <= 4096
    big = "x" * 3_000_000
    path = write(tmp_path / "y.csv", as_csv([{"text": big}] * 8))
    found = list(read_texts(path))
    assert [len(batch) for batch in found] == [6, 2] and found[1].texts == [big, big]


def test_compressed_members_and_frames_are_joined(tmp_path: Path) -> None:
    parts = [jsonl([{"text": "a"}]), jsonl([{"text": "b"}])]
    for name, codec in (("x.jsonl.gz", "gzip"), ("x.jsonl.zst", "zstd")):
        path = write(tmp_path / name, b"".join(compressed(part, codec) for part in parts))
        assert [item[1] for item in flat(read_texts(path))] == ["a", "b"]


def test_ids_and_groups_may_be_integers(tmp_path: Path) -> None:
    records = [{"text": "a", "id": 7, "group": 1}, {"text": "b", "id": 8, "group": 2}]
    for name in ("x.jsonl", "x.parquet", "x.csv"):
        path = write(tmp_path / name, FORMATS[name](records))
        assert flat(read_texts(path, group="group")) == [("7", "a", "1"), ("8", "b", "2")]


def test_texts_in_memory() -> None:
    texts = Texts.from_lists(["a", " ", "c"], ids=["x", "y", "z"], groups=["g", "g", "h"])
    assert flat(texts) == [("x", "a", "g"), ("z", "c", "h")] and texts.empty == 1
    assert flat(Texts.from_lists(["a", "", "c"])) == [("0", "a", None), ("2", "c", None)]
    assert texts.fingerprint != Texts.from_lists(["a", " ", "c"]).fingerprint
    with pytest.raises(ShapeError):
        Texts.from_lists(["a"], ids=[])


def test_fingerprints_follow_bytes_and_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", jsonl([{"text": "a"}]))
    first = read_texts(path).fingerprint
    assert read_texts(path).fingerprint == first
    assert read_texts(path, text="other").fingerprint != first
    assert read_texts([path, path]).fingerprint != first
    write(path, jsonl([{"text": "b"}]))
    assert read_texts(path).fingerprint != first


def test_what_is_texts(tmp_path: Path) -> None:
    for name in ("x.jsonl", "x.JSONL.gz", "x.parquet", "x.csv.zst", "x.txt"):
        assert is_texts(tmp_path / name)
    for name in ("x.npy", "x.json", "x", "x.fbin"):
        assert not is_texts(tmp_path / name)
    assert not is_texts(tmp_path)
    write(tmp_path / "a.parquet", b"")
    assert is_texts(tmp_path)
    write(tmp_path / "manifest.json", b"{}")
    assert not is_texts(tmp_path)


# --- refusals ---

GOOD = '{"id": "a", "text": "good"}\n'
REFUSED: dict[str, tuple[str, bytes, type[Lmd3Error], int | None, str]] = {
    "broken line": ("x.jsonl", (GOOD + '{"text": "b"\n').encode(), TextFormatError, 1, "line 2 is not JSON"),
    "not an object": ("x.jsonl", (GOOD + "[1]\n").encode(), TextFormatError, 1, "line 2"),
    "deep JSON": ("x.jsonl", b"[" * 200_000, TextFormatError, 0, "line 1"),
    "not UTF-8": ("x.jsonl", GOOD.encode() + b'{"text": "\xe9"}\n', TextFormatError, 1, "byte 11 of line 2"),
    "not UTF-8, txt": ("x.txt", b"a\n\xff\n", TextFormatError, 1, "not UTF-8"),
    "not UTF-8, csv": ("x.csv", b"text\na\n\xff\n", TextFormatError, 2, "line 3"),
    "UTF-16": ("x.jsonl", GOOD.encode("utf-16"), TextFormatError, 0, "not UTF-8"),
    "surrogate": ("x.jsonl", b'{"text": "\\ud800"}\n', TextFormatError, 0, "surrogate"),
    "no column": ("x.jsonl", b'{"body": "b"}\n', ColumnError, 0, "no column 'text'; there are 'body'"),
    "column gone": ("x.jsonl", (GOOD + '{"id": "b"}\n').encode(), ColumnError, 1, "no column 'text'"),
    "id gone": ("x.jsonl", (GOOD + '{"text": "b"}\n').encode(), ColumnError, 1, "no column 'id'"),
    "no column, csv": ("x.csv", b"body\nb\n", ColumnError, None, "no column 'text'"),
    "column twice": ("x.csv", b"text,text\na,b\n", ColumnError, None, "twice"),
    "number": ("x.jsonl", (GOOD + '{"id": "b", "text": 5}\n').encode(), ColumnError, 1, "int"),
    "null id": ("x.jsonl", b'{"id": null, "text": "a"}\n', ColumnError, 0, "null"),
    "float id": ("x.jsonl", b'{"id": 1.5, "text": "a"}\n', ColumnError, 0, "float"),
    "boolean id": ("x.jsonl", b'{"id": true, "text": "a"}\n', ColumnError, 0, "bool"),
    "empty id": ("x.jsonl", b'{"id": "", "text": "a"}\n', ColumnError, 0, "empty"),
    "twice": (
        "x.jsonl",
        (GOOD + '{"id": "b", "text": "b"}\n' + GOOD).encode(),
        DuplicateIdError,
        2,
        "'a' occurs twice: in row 0 and in row 2",
    ),
    "uneven": ("x.csv", b"id,text\n1,a\n2\n", TextFormatError, 1, "1 fields in a table of 2 columns"),
    "quote": ("x.csv", b'id,text\n1,"a\n', TextFormatError, None, "not CSV"),
    "gzip junk": ("x.jsonl.gz", b"junk" * 100, FormatError, None, "can't be read"),
    "gzip cut": ("x.jsonl.gz", gzip.compress(GOOD.encode() * 1000)[:-20], FormatError, None, "can't be read"),
    "zstd junk": ("x.jsonl.zst", b"junk" * 100, FormatError, None, "can't be read"),
    "zstd cut": (
        "x.jsonl.zst",
        compressed(GOOD.encode() * 1000, "zstd")[:-8],
        FormatError,
        None,
        "can't be read",
    ),
    "parquet junk": ("x.parquet", b"junk" * 100, FormatError, None, "parquet"),
    "parquet cut": ("x.parquet", as_parquet([{"text": "a"}] * 50)[:-9], FormatError, None, "parquet"),
    "no column, parquet": ("x.parquet", as_parquet([{"body": "a"}]), ColumnError, None, "no column 'text'"),
    "number, parquet": ("x.parquet", as_parquet([{"text": 5}]), ColumnError, 0, "int"),
    "no kind": ("x.xyz", b"a", FormatError, None, "kind"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_broken_is_refused_with_its_place(kind: str, tmp_path: Path) -> None:
    name, data, error, row, words = REFUSED[kind]
    path = write(tmp_path / name, data)
    with pytest.raises(Lmd3Error) as caught:
        flat(read_texts(path))
    assert type(caught.value) is error
    assert words in str(caught.value)
    assert caught.value.file == str(path) and caught.value.refused
    assert row is None or caught.value.row == row


def test_missing_and_empty_places(tmp_path: Path) -> None:
    with pytest.raises(FileMissingError):
        read_texts(tmp_path / "x.jsonl")
    with pytest.raises(FormatError, match="without texts"):
        read_texts(tmp_path)
    with pytest.raises(ParameterError):
        read_texts([])
    texts = read_texts(write(tmp_path / "x.jsonl", b""))
    assert flat(texts) == [] and texts.count == 0
    (tmp_path / "x.jsonl").unlink()
    with pytest.raises(FileMissingError):
        flat(texts)


def test_duplicates_over_files_name_both(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", '{"id": "x", "text": ""}\n{"id": "y", "text": "a"}\n')
    second = write(tmp_path / "b.jsonl", '{"id": "x", "text": "b"}\n{"id": "y", "text": "c"}\n')
    with pytest.raises(DuplicateIdError) as caught:
        flat(read_texts([first, second]))
    # The empty text is left out, and its id with it.
    assert f"'y' occurs twice: in row 1 of {first} and in row 1" in caught.value.message
    assert (caught.value.file, caught.value.row) == (str(second), 1)


@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=2), max_size=60),
    size=st.integers(1, 9),
)
def test_unique_ids_agree_with_a_set(ids: list[str], size: int) -> None:
    unique = UniqueIds()
    for start in range(0, len(ids), size):
        unique.add(ids[start : start + size])

    def check() -> None:
        unique.check(lambda rows: [ids[row] for row in rows])

    if len(set(ids)) == len(ids):
        check()
        return
    second = next(row for row, name in enumerate(ids) if name in ids[:row])
    with pytest.raises(DuplicateIdError) as caught:
        check()
    assert caught.value.row == second
    assert f"in row {ids.index(ids[second])} and in row {second}" in caught.value.message


def test_the_public_name() -> None:
    assert lmd3.read_texts is read_texts
