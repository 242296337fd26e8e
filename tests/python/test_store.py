"""Stores: what is written is read again in its order; what is bad is refused by name; damage is found."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lmd3
from lmd3.errors import (
    ColumnError,
    DtypeError,
    DuplicateIdError,
    FileMissingError,
    FormatError,
    Lmd3Error,
    NotFiniteError,
    OutputError,
    ParameterError,
    ShapeError,
    VerificationError,
)
from lmd3.store import Store, StoreWriter, open_store, verify_store


def unit_rows(n: int, d: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def write(path: Path, n: int = 50, d: int = 6, **options: Any) -> np.ndarray:
    vectors = unit_rows(n, d)
    with StoreWriter(path, **options) as writer:
        writer.append(
            vectors,
            [f"id{row}" for row in range(n)],
            groups=[("even", "odd")[row % 2] for row in range(n)],
            texts=[f"text {row}" for row in range(n)],
            tokens=np.arange(n),
            truncated=np.arange(n) % 5 == 0,
        )
    return vectors


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- round trips ---


def stored(vectors: np.ndarray, dtype: str) -> np.ndarray:
    """What NumPy makes of the vectors in that element type."""
    if dtype != "int8":
        return vectors.astype(dtype).astype(np.float32)
    scales = np.abs(vectors).max(axis=1, keepdims=True) / np.float32(127)
    return (np.round(vectors / np.where(scales == 0, 1, scales)) * scales).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_is_written_is_read_again_in_its_order(data: st.DataObject) -> None:
    n, d = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 9))
    dtype = data.draw(st.sampled_from(["float16", "float32", "int8"]))
    shard_rows = data.draw(st.integers(1, 70))
    groups = data.draw(st.none() | st.lists(st.sampled_from(["a", "b", "ß"]), min_size=n, max_size=n))
    given_ids = data.draw(st.booleans())
    texts = data.draw(st.none() | st.lists(st.text(max_size=5), min_size=n, max_size=n))
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=5)))
    vectors = unit_rows(n, d, seed=data.draw(st.integers(0, 1000)))
    ids = [f"ü{row}" for row in range(n)] if given_ids else [str(row) for row in range(n)]
    with tempfile.TemporaryDirectory() as folder:
        writer = StoreWriter(Path(folder) / "s", dtype=dtype, shard_rows=shard_rows)
        for start, stop in zip([0, *cuts], [*cuts, n], strict=True):
            part = slice(start, stop)
            writer.append(
                vectors[part],
                ids[part] if given_ids else None,
                groups=None if groups is None else groups[part],
                texts=None if texts is None else texts[part],
            )
        store = writer.close()
        assert (store.n, store.d, store.dtype, len(store)) == (n, d, dtype, n)
        order = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=20)), dtype=np.int64)
        np.testing.assert_allclose(store.rows(order), stored(vectors, dtype)[order], rtol=0, atol=1e-7)
        assert store.ids() == ids
        found = store.documents(order).to_pydict()
        assert found["id"] == [ids[row] for row in order]
        assert found["group"] == [None if groups is None else groups[row] for row in order]
        assert found["text"] == [None if texts is None else texts[row] for row in order]
        codes = store.group_codes()
        if groups is None:
            assert codes is None and store.groups == []
        else:
            assert codes is not None and [store.groups[code] for code in codes] == groups
        if texts is not None:
            assert [text for part in store.texts(batch=7) for text in part] == texts
        # Every shard is a file that NumPy reads.
        files = sorted((Path(folder) / "s").glob("embeddings-*.npy"))
        assert len(files) == -(-n // shard_rows)
        if dtype != "int8":
            np.testing.assert_array_equal(
                np.concatenate([np.load(file) for file in files]), vectors.astype(dtype)
            )
        # One group needs no codes.
        with_codes = groups is not None and len(set(groups)) > 1
        assert len(list((Path(folder) / "s").glob("groups-*.npy"))) == (len(files) if with_codes else 0)
        assert verify_store(store)["rows"] == n
        assert listing(Path(folder)) == ["s", *(f"s/{name}" for name in listing(Path(folder) / "s"))]


def test_documents_of_large_stores_are_found_across_row_groups(tmp_path: Path) -> None:
    n = 10_000
    with StoreWriter(tmp_path / "s", shard_rows=9000, normalised=False) as writer:
        for start in range(0, n, 1234):
            stop = min(n, start + 1234)
            writer.append(np.ones((stop - start, 2), np.float32), [f"id{row}" for row in range(start, stop)])
    store = open_store(tmp_path / "s")
    metadata = pq.ParquetFile(tmp_path / "s" / "documents-00000.parquet").metadata
    assert metadata.num_row_groups == 3
    rows = np.array([9999, 0, 4095, 4096, 8999, 9000, 0])
    assert store.ids(rows) == [f"id{row}" for row in rows]
    assert store.ids() == [f"id{row}" for row in range(n)]


def test_manifest_says_what_was_written(tmp_path: Path) -> None:
    write(tmp_path / "s", dtype="float16", shard_rows=20)
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"]) == ("lmd3-store", 1)
    assert (manifest["d"], manifest["rows"], manifest["dtype"], manifest["metric"]) == (
        6,
        50,
        "float16",
        "euclidean",
    )
    assert [shard["rows"] for shard in manifest["shards"]] == [20, 20, 10]
    even, odd = sum(range(0, 50, 2)), sum(range(1, 50, 2))
    assert manifest["groups"] == [
        {"name": "even", "rows": 25, "tokens": even, "truncated": 5},
        {"name": "odd", "rows": 25, "tokens": odd, "truncated": 5},
    ]
    assert manifest["counts"] == {"rows": 50, "tokens": 49 * 50 // 2, "truncated": 10}
    assert listing(tmp_path / "s") == [
        *(
            f"{kind}-0000{number}.{suffix}"
            for kind, suffix in (("documents", "parquet"), ("embeddings", "npy"), ("groups", "npy"))
            for number in range(3)
        ),
        "manifest.json",
    ]
    assert np.load(tmp_path / "s" / "groups-00001.npy").dtype == np.uint32
    table = pq.read_table(tmp_path / "s" / "documents-00000.parquet")
    assert table.column_names == ["id", "group", "text", "tokens", "truncated"]


def test_arrays_and_bare_files_are_stores(tmp_path: Path) -> None:
    for dtype in ("float32", "float16"):
        vectors = unit_rows(30, 4).astype(dtype)
        np.save(tmp_path / "x.npy", vectors)
        for source in (vectors, np.asfortranarray(vectors), tmp_path / "x.npy", str(tmp_path / "x.npy")):
            store = open_store(source)
            assert (store.n, store.d, store.dtype, store.groups, store.encoder) == (30, 4, dtype, [], None)
            np.testing.assert_array_equal(
                store.rows(np.array([29, 0, 29])), vectors[[29, 0, 29]].astype(np.float32)
            )
            assert store.ids(np.array([3, 1])) == ["3", "1"] and store.ids()[29] == "29"
            assert store.normalised and not store.has_texts and store.group_codes() is None
            assert store.documents(np.array([2])).to_pylist() == [{"id": "2", "group": None, "text": None}]
            assert (store.native is None) != (store.array is None)
            assert open_store(store) is store
            with pytest.raises(ColumnError):
                next(store.texts())
        assert not open_store(vectors * 2).normalised


def test_a_store_in_memory_keeps_its_documents() -> None:
    table = pa.table({"id": ["x", "y", "z"], "group": ["g", "h", "g"], "text": ["1", "2", "3"]})
    store = Store.in_memory(unit_rows(3, 2), table, {"kind": "hashing"})
    assert store.ids(np.array([2, 0])) == ["z", "x"] and store.groups == ["g", "h"]
    assert store.group_codes().tolist() == [0, 1, 0]
    assert list(store.texts(batch=2)) == [["1", "2"], ["3"]] and store.encoder == {"kind": "hashing"}
    with pytest.raises(DuplicateIdError, match="'x' occurs twice: in row 0 and in row 2"):
        Store.in_memory(unit_rows(3, 2), pa.table({"id": ["x", "y", "x"]}))
    with pytest.raises(ShapeError):
        Store.in_memory(unit_rows(2, 2), table)


def test_fingerprints_follow_the_content(tmp_path: Path) -> None:
    prints = set()
    for name, options in {"a": {}, "b": {"dtype": "float32"}, "c": {"shard_rows": 7}, "d": {"n": 49}}.items():
        write(tmp_path / name, **options)
        prints.add(open_store(tmp_path / name).fingerprint)
    write(tmp_path / "again")
    prints.add(open_store(tmp_path / "again").fingerprint)
    assert len(prints) == 4
    x = unit_rows(5, 3)
    assert open_store(x).fingerprint == open_store(x.copy()).fingerprint
    assert open_store(x).fingerprint != open_store(x[::-1]).fingerprint
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", x[::-1])
    assert open_store(tmp_path / "x.npy").fingerprint != open_store(tmp_path / "y.npy").fingerprint
    assert all(len(found) == 16 and int(found, 16) >= 0 for found in prints)


# --- refusals: of arrays and bare files ---


def broken_npy(kind: str, path: Path) -> None:
    x = unit_rows(10, 3)
    match kind:
        case "float64":
            np.save(path, x.astype(np.float64))
        case "integers":
            np.save(path, np.ones((4, 3), np.int64))
        case "bytes":
            np.save(path, np.ones((4, 3), np.int8))
        case "objects":
            np.save(path, np.array([["a", 1]], dtype=object), allow_pickle=True)
        case "strings":
            np.save(path, np.array([["a", "b"]]))
        case "records":
            np.save(path, np.zeros((2, 2), dtype=[("a", "f4")]))
        case "big-endian":
            np.save(path, x.astype(">f4"))
        case "one axis":
            np.save(path, x[0])
        case "three axes":
            np.save(path, x[None])
        case "no rows":
            np.save(path, x[:0])
        case "no columns":
            np.save(path, x[:, :0])
        case "columns first":
            np.save(path, np.asfortranarray(x))
        case "NaN":
            x[7, 1] = np.nan
            np.save(path, x)
        case "infinity":
            x[7, 1] = np.inf
            np.save(path, x.astype(np.float16))
        case "truncated":
            np.save(path, x)
            path.write_bytes(path.read_bytes()[:-1])
        case "header cut":
            np.save(path, x)
            path.write_bytes(path.read_bytes()[:40])
        case "too long":
            np.save(path, x)
            path.write_bytes(path.read_bytes() + b"\0")
        case "junk":
            path.write_bytes(b"no array at all" * 100)
        case "empty file":
            path.write_bytes(b"")
        case "npz":
            np.savez(path.with_suffix(".npz"), x=x)
            path.with_suffix(".npz").rename(path)
        case "missing":
            pass


BROKEN = {
    "float64": DtypeError,
    "integers": DtypeError,
    "bytes": DtypeError,
    "objects": DtypeError,
    "strings": DtypeError,
    "records": DtypeError,
    "big-endian": DtypeError,
    "one axis": ShapeError,
    "three axes": ShapeError,
    "no rows": ShapeError,
    "no columns": ShapeError,
    "columns first": FormatError,
    "NaN": NotFiniteError,
    "infinity": NotFiniteError,
    "truncated": FormatError,
    "header cut": FormatError,
    "too long": FormatError,
    "junk": FormatError,
    "empty file": FormatError,
    "npz": FormatError,
    "missing": FileMissingError,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_bad_file_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    broken_npy(kind, path)
    with pytest.raises(Lmd3Error) as caught:
        open_store(path)
    assert type(caught.value) is BROKEN[kind]
    assert caught.value.file == str(path) and caught.value.refused
    assert caught.value.row == (7 if kind in ("NaN", "infinity") else None)


@pytest.mark.parametrize(
    "kind", [*(kind for kind, error in BROKEN.items() if error in (DtypeError, ShapeError)), "NaN"]
)
def test_a_bad_array_is_refused(kind: str, tmp_path: Path) -> None:
    broken_npy(kind, tmp_path / "x.npy")
    array = np.load(tmp_path / "x.npy", allow_pickle=True)
    with pytest.raises(BROKEN[kind]) as caught:
        open_store(array)
    assert caught.value.row == (7 if kind == "NaN" else None)


def test_no_header_makes_it_crash(tmp_path: Path) -> None:
    """Any byte of the header changed: a store or a refusal, never anything else."""
    buffer = io.BytesIO()
    np.save(buffer, unit_rows(3, 2))
    good = buffer.getvalue()
    path = tmp_path / "x.npy"
    rng = np.random.default_rng(1)
    opened = 0
    for place in range(128):
        for value in rng.integers(0, 256, 4).tolist():
            path.write_bytes(good[:place] + bytes([value]) + good[place + 1 :])
            try:
                opened += open_store(path).n == 3
            except Lmd3Error:
                continue
    assert 0 < opened < 512


# --- refusals: of folders ---


def damage(kind: str, store: Path) -> None:
    manifest_path = store / "manifest.json"
    manifest = json.loads(manifest_path.read_text())
    match kind:
        case "no manifest":
            manifest_path.unlink()
            return
        case "manifest junk":
            manifest_path.write_text("{")
            return
        case "manifest not text":
            manifest_path.write_bytes(b"\xff\xfe{}")
            return
        case "version":
            manifest["version"] = 2
        case "format":
            manifest["format"] = "other"
        case "rows":
            manifest["rows"] += 1
        case "shard rows":
            manifest["shards"][0]["rows"] -= 1
            manifest["shards"][1]["rows"] += 1
        case "d":
            manifest["d"] += 1
        case "dtype":
            manifest["dtype"] = "float32"
        case "escape":
            manifest["shards"][0]["embeddings"]["name"] = "../embeddings-00000.npy"
        case "encoder":
            manifest["encoder"] = "hashing"
        case "group code":
            manifest["groups"] = manifest["groups"][:1]
        case "shard missing":
            (store / "embeddings-00001.npy").unlink()
        case "shard truncated":
            path = store / "embeddings-00001.npy"
            path.write_bytes(path.read_bytes()[:-2])
        case "shard junk":
            path = store / "embeddings-00001.npy"
            path.write_bytes(b"x" * path.stat().st_size)
        case "documents missing":
            (store / "documents-00001.parquet").unlink()
        case "groups truncated":
            path = store / "groups-00001.npy"
            path.write_bytes(path.read_bytes()[:-2])
    manifest_path.write_text(json.dumps(manifest))


DAMAGES = {
    "encoder": (FormatError, "manifest.json"),
    "no manifest": (FileMissingError, ""),
    "manifest junk": (FormatError, "manifest.json"),
    "manifest not text": (FormatError, "manifest.json"),
    "version": (FormatError, "manifest.json"),
    "format": (FormatError, "manifest.json"),
    "rows": (FormatError, "manifest.json"),
    "shard rows": (ShapeError, "embeddings-00000.npy"),
    "d": (ShapeError, "embeddings-00000.npy"),
    "dtype": (ShapeError, "embeddings-00000.npy"),
    "escape": (FormatError, "manifest.json"),
    "group code": (FormatError, "groups-00000.npy"),
    "shard missing": (FileMissingError, "embeddings-00001.npy"),
    "shard truncated": (FormatError, "embeddings-00001.npy"),
    "shard junk": (FormatError, "embeddings-00001.npy"),
    "documents missing": (FileMissingError, "documents-00001.parquet"),
    "groups truncated": (FormatError, "groups-00001.npy"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_store_is_refused_by_the_file(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "s", shard_rows=20)
    damage(kind, tmp_path / "s")
    error, name = DAMAGES[kind]
    with pytest.raises(Lmd3Error) as caught:
        open_store(tmp_path / "s")
    assert type(caught.value) is error
    assert Path(str(caught.value.file)) == tmp_path / "s" / name


def test_damaged_documents_are_refused_where_they_are_read(tmp_path: Path) -> None:
    write(tmp_path / "s")
    path = tmp_path / "s" / "documents-00000.parquet"
    path.write_bytes(b"x" * path.stat().st_size)
    store = open_store(tmp_path / "s")
    for read in (store.ids, lambda: store.ids(np.array([1])), lambda: list(store.texts())):
        with pytest.raises(FormatError) as caught:
            read()
        assert caught.value.file == str(path)


def test_a_store_of_format_version_1_is_read_as_it_was_written() -> None:
    """Written by the first version of lmd3; every later one must read it so."""
    folder = Path(__file__).parents[1] / "formats" / "v1"
    for name in ("float16", "float32", "bfloat16", "int8"):
        store = open_store(folder / name)
        assert (store.n, store.d, store.dtype, store.groups) == (5, 3, name, ["a", "b"])
        angles = np.arange(5)
        expected = np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1)
        tolerance = {"float16": 5e-4, "float32": 1e-7, "bfloat16": 4e-3, "int8": 4e-3}[name]
        np.testing.assert_allclose(store.rows(angles), expected, atol=tolerance)
        assert store.documents(angles, ("id", "group", "text", "tokens", "truncated")).to_pydict() == {
            "id": ["x0", "x1", "x2", "x3", "x4"],
            "group": ["a", "b", "a", "b", "a"],
            "text": ["text é 0", "text é 1", "text é 2", "text é 3", "text é 4"],
            "tokens": [0, 1, 2, 3, 4],
            "truncated": [False, False, False, True, True],
        }
        assert store.encoder == {"kind": "example", "model": "example", "fingerprint": "0" * 16}
        assert verify_store(store)["files"] == (8 if name == "int8" else 6)


# --- verify ---


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["embeddings-00001.npy", "groups-00002.npy", "documents-00000.parquet"])
def test_verify_finds_one_flipped_bit(name: str, tmp_path: Path) -> None:
    write(tmp_path / "s", shard_rows=20)
    assert verify_store(tmp_path / "s")["files"] == 9
    flip(tmp_path / "s" / name, -5)
    if name.startswith("groups"):
        flip(tmp_path / "s" / name, -5)
        flip(tmp_path / "s" / name, -8)
    with pytest.raises(VerificationError) as caught:
        verify_store(tmp_path / "s")
    first = 20 * int(name.split(".")[0][-1])
    assert caught.value.file == str(tmp_path / "s" / name)
    assert f"rows {first} to {min(first + 19, 49)} of" in str(caught.value) and not caught.value.refused


def forged(store: Path, name: str) -> None:
    """Makes the manifest's checksum agree with the file as it is."""
    from lmd3 import _lmd3

    path = store / "manifest.json"
    manifest = json.loads(path.read_text())
    for shard in manifest["shards"]:
        for entry in shard.values():
            if isinstance(entry, dict) and entry["name"] == name:
                entry["xxh3"], entry["bytes"] = _lmd3.checksum(store / name)
    path.write_text(json.dumps(manifest))


def test_verify_finds_what_checksums_do_not(tmp_path: Path) -> None:
    write(tmp_path / "good", shard_rows=20)

    def copy(name: str) -> Path:
        return Path(shutil.copytree(tmp_path / "good", tmp_path / name))

    store = copy("nan")
    shard = np.load(store / "embeddings-00001.npy")
    shard[3, 2] = np.nan
    np.save(store / "embeddings-00001.npy", shard)
    forged(store, "embeddings-00001.npy")
    with pytest.raises(NotFiniteError) as caught:
        verify_store(store)
    assert (caught.value.file, caught.value.row) == (str(store / "embeddings-00001.npy"), 3)

    store = copy("norms")
    np.save(store / "embeddings-00001.npy", np.load(store / "embeddings-00001.npy") * np.float16(2))
    forged(store, "embeddings-00001.npy")
    with pytest.raises(VerificationError, match="normalised"):
        verify_store(store)

    store = copy("ids")
    table = pq.read_table(store / "documents-00002.parquet")
    table = table.set_column(0, "id", pa.array(["id5", *table["id"].to_pylist()[1:]]))
    pq.write_table(table, store / "documents-00002.parquet")
    forged(store, "documents-00002.parquet")
    with pytest.raises(DuplicateIdError, match="'id5' occurs twice: in row 5 and in row 40"):
        verify_store(store)

    store = copy("rows")
    pq.write_table(table.slice(1), store / "documents-00002.parquet")
    forged(store, "documents-00002.parquet")
    with pytest.raises(VerificationError, match="9 documents for 10 rows"):
        verify_store(store)

    store = copy("groups")
    np.save(store / "groups-00000.npy", np.zeros(20, np.uint32))
    forged(store, "groups-00000.npy")
    with pytest.raises(VerificationError, match="'even' 25 rows, there are 35"):
        verify_store(store)


def test_a_bare_file_is_verified_by_its_values(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", unit_rows(5, 3) * 2)
    found = verify_store(tmp_path / "x.npy")
    assert found["norm_min"] == pytest.approx(2) and found["norm_max"] == pytest.approx(2)
    with pytest.raises(ParameterError):
        verify_store(open_store(unit_rows(2, 2)))


# --- the writer ---


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), StoreWriter(tmp_path / "new" / "s", shard_rows=2) as writer:
        writer.append(unit_rows(5, 3))
        assert listing(tmp_path) != []
        raise RuntimeError
    assert listing(tmp_path) == []


def test_duplicate_ids_are_refused_with_both_rows(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "s", shard_rows=4)
    writer.append(unit_rows(6, 3), list("abcdef"))
    writer.append(unit_rows(3, 3), list("ghb"))
    with pytest.raises(DuplicateIdError, match="'b' occurs twice: in row 1 and in row 8") as caught:
        writer.close()
    assert caught.value.row == 8 and listing(tmp_path) == []


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_bad_rows_are_refused_by_their_number_in_the_store(dtype: str, tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "s", dtype=dtype, shard_rows=4, normalised=False) as writer:
        writer.append(unit_rows(6, 3))
        bad = unit_rows(5, 3)
        bad[2, 0] = np.inf
        with pytest.raises(NotFiniteError) as caught:
            writer.append(bad)
        assert caught.value.row == 8
        for wrong in (unit_rows(2, 4), unit_rows(2, 3)[0]):
            with pytest.raises(ShapeError):
                writer.append(wrong)
        with pytest.raises(DtypeError):
            writer.append(np.ones((2, 3), np.int64))
        with pytest.raises(ParameterError, match="must be given for all"):
            writer.append(unit_rows(1, 3), ["x"])
        with pytest.raises(ShapeError):
            writer.append(unit_rows(1, 3), groups=["a", "b"])
        writer.append(unit_rows(1, 3, seed=5))
    store = open_store(tmp_path / "s")
    assert store.n == 7
    np.testing.assert_allclose(store.rows(np.array([6])), stored(unit_rows(1, 3, seed=5), dtype), atol=1e-7)


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    vectors = np.array([[1.0], [70000.0]], np.float32)
    with StoreWriter(tmp_path / "s", normalised=False) as writer:
        with pytest.raises(NotFiniteError, match="65504") as caught:
            writer.append(vectors)
        assert caught.value.row == 1
        writer.append(vectors[:1])


def test_norms_are_held_to(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "s")
    with pytest.raises(ParameterError, match="norm 2") as caught:
        writer.append(np.concatenate([unit_rows(2, 3), 2 * unit_rows(1, 3)]))
    assert caught.value.row == 2
    writer.abandon()
    assert listing(tmp_path) == []


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "s")
    with pytest.raises(OutputError, match="--force"):
        StoreWriter(tmp_path / "s")
    before = open_store(tmp_path / "s")
    write(tmp_path / "s", n=7, force=True)
    assert open_store(tmp_path / "s").n == 7
    # What was open keeps serving the rows it opened.
    assert before.n == 50 and before.rows(np.array([49])).shape == (1, 6)
    assert listing(tmp_path)[0] == "s" and not any(name.startswith(".") for name in listing(tmp_path))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").write_text("x")
    with pytest.raises(OutputError, match="not a store"):
        StoreWriter(tmp_path / "other", force=True)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        StoreWriter(tmp_path / "file" / "s")
    with pytest.raises(OutputError):
        StoreWriter(Path("/proc/nowhere/s"))


@pytest.mark.parametrize("options", [{"dtype": "float64"}, {"dtype": "uint8"}, {"shard_rows": 0}])
def test_bad_options_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Lmd3Error):
        StoreWriter(tmp_path / "s", **options)
    assert listing(tmp_path) == []


def test_a_store_without_rows_is_refused(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "s")
    writer.append(np.empty((0, 3), np.float32))
    with pytest.raises(ShapeError):
        writer.close()
    assert listing(tmp_path) == []


def test_rows_outside_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "s")
    for store in (open_store(tmp_path / "s"), open_store(unit_rows(50, 6))):
        for row in (-1, 50):
            with pytest.raises(ParameterError, match=f"no row {row}"):
                store.rows(np.array([0, row]))
            with pytest.raises(ParameterError):
                store.documents(np.array([row]))
        with pytest.raises(ColumnError):
            store.documents(np.array([0]), ["nonsense"])
        assert store.rows(np.array([], np.int64)).shape == (0, 6)
        assert store.documents(np.array([], np.int64)).num_rows == 0


def test_the_public_names() -> None:
    assert lmd3.open_store is open_store and lmd3.Store is Store and lmd3.StoreWriter is StoreWriter
