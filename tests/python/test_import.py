"""Import: vectors of other tools as a store, with the columns that go with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

import lmd3
from lmd3.cli import main
from lmd3.errors import (
    ColumnError,
    DuplicateIdError,
    FormatError,
    NotFiniteError,
    OutputError,
    ShapeError,
)
from lmd3.store import verify_store
from lmd3.store.lock import WriterLock

N, D = 3000, 8


@pytest.fixture(scope="module")
def vectors() -> NDArray[np.float32]:
    rows = np.random.default_rng(3).normal(size=(N, D))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def lists(rows: NDArray[Any], kind: str = "list") -> pa.Array:
    values = pa.array(rows.reshape(-1))
    if kind == "fixed":
        return pa.FixedSizeListArray.from_arrays(values, rows.shape[1])
    return pa.ListArray.from_arrays(np.arange(0, rows.size + 1, rows.shape[1], dtype=np.int32), values)


def table(rows: NDArray[Any], kind: str = "list") -> pa.Table:
    n = len(rows)
    return pa.table(
        {
            "key": [f"k{row}" for row in range(n)],
            "source": pa.array(["ab"[row % 2] for row in range(n)]).dictionary_encode(),
            "text": [f"text {row}" for row in range(n)],
            "w": [row / n for row in range(n)],
            "vector": lists(rows, kind),
        }
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("kind", ["list", "fixed"])
def test_parquet_by_row_group(kind: str, dtype: str, vectors: NDArray[np.float32], tmp_path: Path) -> None:
    rows = vectors.astype(dtype)
    whole = table(rows, kind)
    (tmp_path / "in").mkdir()
    pq.write_table(whole.slice(0, 2000), tmp_path / "in" / "2.parquet", row_group_size=300)
    pq.write_table(whole.slice(2000), tmp_path / "in" / "10.parquet", row_group_size=300)
    store = lmd3.import_vectors(
        tmp_path / "in", tmp_path / "out", id="key", group="source", text="text", weight="w", shard_rows=1700
    )
    assert (store.n, store.dtype) == (N, "float16" if dtype == "float16" else "float32")
    np.testing.assert_array_equal(store.rows(np.arange(N)), rows.astype(np.float32))
    assert store.documents(np.array([2999, 0])).to_pylist() == [
        {"id": "k2999", "group": "b", "text": "text 2999"},
        {"id": "k0", "group": "a", "text": "text 0"},
    ]
    np.testing.assert_array_equal(store.weights(), (np.arange(N) / N).astype(np.float32))
    assert store.normalised and len(store.manifest["shards"]) == 2
    verify_store(store)
    queries = vectors[:5] + np.float32(0.1)
    expected = lmd3.KernelDensity(bandwidth=0.3).fit(rows.astype(np.float32), sample_weight=np.arange(N) / N)
    np.testing.assert_allclose(
        lmd3.KernelDensity(bandwidth=0.3).fit(store).score_samples(queries),
        expected.score_samples(queries),
        atol=1e-6,
    )


@pytest.mark.parametrize("name", ["8bit", "8bit_uniform", "8bit_direct", "fp16", "bf16"])
@pytest.mark.parametrize("mapped", [False, True])
def test_faiss_quantisers(name: str, mapped: bool, vectors: NDArray[np.float32], tmp_path: Path) -> None:
    import faiss

    rows = np.rint(vectors * 50 + 100) if name == "8bit_direct" else vectors
    index = faiss.IndexScalarQuantizer(D, getattr(faiss.ScalarQuantizer, f"QT_{name}"))
    index.train(rows)
    whole = faiss.IndexIDMap2(index) if mapped else index
    if mapped:
        whole.add_with_ids(rows, np.arange(N) * 3 - 7)
    else:
        whole.add(rows)
    faiss.write_index(whole, str(tmp_path / "i.faiss"))
    store = lmd3.import_vectors(tmp_path / "i.faiss", tmp_path / "out")
    expected = index.reconstruct_n(0, N)
    np.testing.assert_allclose(store.rows(np.arange(N)), expected, atol=1e-6, rtol=0)
    assert store.ids(np.array([0, 5])) == (["-7", "8"] if mapped else ["0", "5"])


def test_other_faiss_indexes_are_refused(vectors: NDArray[np.float32], tmp_path: Path) -> None:
    import faiss

    index = faiss.index_factory(D, "HNSW8,Flat")
    index.add(vectors)
    faiss.write_index(index, str(tmp_path / "i.faiss"))
    with pytest.raises(FormatError, match="IHNf is not the mark"):
        lmd3.import_vectors(tmp_path / "i.faiss", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl", ".txt"])
def test_columns_of_a_sidecar(suffix: str, vectors: NDArray[np.float32], tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", vectors)
    whole = table(vectors).drop_columns(["vector"])
    path = tmp_path / f"meta{suffix}"
    columns: dict[str, Any] = {"id": "key", "group": "source", "text": "text"}
    match suffix:
        case ".parquet":
            pq.write_table(whole, path, row_group_size=700)
        case ".csv":
            path.write_text(
                "key,source,text\n" + "".join(f"k{r},{'ab'[r % 2]},text {r}\n" for r in range(N)),
                encoding="utf-8",
            )
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in whole.to_pylist()), encoding="utf-8")
        case _:
            path.write_text("".join(f"k{row}\n" for row in range(N)), encoding="utf-8")
            columns = {"id": "id"}
    store = lmd3.import_vectors(tmp_path / "v.npy", tmp_path / "out", metadata=path, **columns)
    assert store.ids() == [f"k{row}" for row in range(N)]
    if suffix != ".txt":
        assert store.documents(np.array([7])).to_pylist() == [{"id": "k7", "group": "b", "text": "text 7"}]


def test_a_sidecar_must_fit(vectors: NDArray[np.float32], tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", vectors)
    for suffix, count, match in [
        ("parquet", N - 1, "2999 rows of metadata for 3000 vectors"),
        ("jsonl", N - 1, "2999 rows of metadata, and there are more vectors"),
        ("jsonl", N + 1, "more rows of metadata than the 3000 vectors"),
    ]:
        path = tmp_path / f"meta.{suffix}"
        if suffix == "parquet":
            pq.write_table(pa.table({"id": range(count)}), path)
        else:
            path.write_text("".join(f'{{"id": {row}}}\n' for row in range(count)), encoding="utf-8")
        with pytest.raises(ShapeError, match=match):
            lmd3.import_vectors(tmp_path / "v.npy", tmp_path / "out", metadata=path, id="id")
        assert not (tmp_path / "out").exists()
    with pytest.raises(ColumnError, match="no column"):
        lmd3.import_vectors(tmp_path / "v.npy", tmp_path / "out", metadata=path, id="nope")


def test_what_is_wrong_is_named(vectors: NDArray[np.float32], tmp_path: Path) -> None:
    def refused(columns: dict[str, Any], error: type[Exception], match: str, **options: Any) -> None:
        pq.write_table(pa.table(columns), tmp_path / "v.parquet", row_group_size=1000)
        with pytest.raises(error, match=match):
            lmd3.import_vectors(tmp_path / "v.parquet", tmp_path / "out", **options)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["v.parquet"]

    bad = vectors.copy()
    bad[2345, 3] = np.nan
    refused({"v": lists(bad)}, NotFiniteError, "v.parquet: row 2345")
    refused({"v": lists(vectors), "id": [0, *range(N - 1)]}, DuplicateIdError, "'0' occurs twice")
    refused({"v": lists(vectors), "id": [None] * N}, ColumnError, "row 0: the id 'id' is empty")
    refused({"v": lists(vectors), "w": [-1.0] * N}, ColumnError, "row 0: a weight", weight="w")
    refused({"v": lists(vectors), "w": ["x"] * N}, ColumnError, "no column of weights", weight="w")
    refused({"x": [1.0] * N}, ColumnError, "no column of lists")
    refused({"x": [1.0] * N}, ColumnError, "has no column 'v'", vectors="v")


def test_compressed_arrow_and_bare_integers(vectors: NDArray[np.float32], tmp_path: Path) -> None:
    feather.write_feather(table(vectors), tmp_path / "v.arrow", compression="zstd", chunksize=900)
    store = lmd3.import_vectors(tmp_path / "v.arrow", tmp_path / "a", id="key")
    np.testing.assert_array_equal(store.rows(np.arange(N)), vectors)
    assert store.ids(np.array([17])) == ["k17"]
    integers = np.random.default_rng(0).integers(0, 256, (50, 6)).astype(np.uint8)
    (tmp_path / "v.u8bin").write_bytes(np.array([50, 6], "<u4").tobytes() + integers.tobytes())
    store = lmd3.import_vectors(tmp_path / "v.u8bin", tmp_path / "b")
    assert store.dtype == "float16" and not store.normalised
    np.testing.assert_array_equal(store.rows(np.arange(50)), integers)


def test_files_of_other_machines(
    vectors: NDArray[np.float32], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    monkeypatch.setenv("LMD3_CACHE", str(tmp_path / "cache"))
    for number, part in enumerate(np.array_split(vectors, 11)):
        with system.open(f"/bucket/part-{number}.npy", "wb") as file:
            np.save(file, part)
    seen: list[int] = []
    fetch = lmd3.store.remote.fetch

    def watched(address: str, folder: Path) -> Path:
        # One file at a time: nothing else is there.
        seen.append(len(list(folder.parent.glob(".fetched.*"))))
        return fetch(address, folder)

    monkeypatch.setattr(lmd3.store.remote, "fetch", watched)
    store = lmd3.import_vectors("memory://bucket", tmp_path / "out")
    np.testing.assert_array_equal(store.rows(np.arange(N)), vectors)
    assert len(seen) == 12 and set(seen) == {1}
    assert not list(tmp_path.glob(".fetched.*"))
    # Opened directly: staged, and not again.
    seen.clear()
    np.testing.assert_array_equal(lmd3.open_store("memory://bucket").rows(np.arange(N)), vectors)
    assert len(seen) == 11
    assert lmd3.open_store(Path("memory://bucket")).n == N
    assert len(seen) == 11
    system.rm("/bucket/part-10.npy")
    with system.open("/bucket/part-0.npy", "wb") as file:
        np.save(file, vectors[:1])
    assert lmd3.open_store("memory://bucket").n == N - 272 - 273 + 1
    assert len(seen) == 12


def test_one_writer_at_a_time(vectors: NDArray[np.float32], tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", vectors)
    taken = pytest.raises(OutputError, match=r"is being written by process \d+ on ")
    with WriterLock(tmp_path / "out"), taken:
        lmd3.import_vectors(tmp_path / "v.npy", tmp_path / "out")
    lmd3.import_vectors(tmp_path / "v.npy", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "v.npy"]


def test_the_command(
    vectors: NDArray[np.float32], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "v.dat").write_bytes(vectors.astype(np.float16).tobytes())
    out = tmp_path / "out"
    assert (
        main(["import", str(tmp_path / "v.dat"), "-o", str(out), "--raw", f"float16:{N}x{D}", "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["dtype"], found["ids"]) == (N, "float16", "row numbers")
    assert main(["import", str(tmp_path / "v.dat"), "-o", str(out), "--raw", "float16:3x4"]) == 2
    assert main(["import", str(tmp_path / "v.dat"), "-o", str(tmp_path / "x"), "--raw", "float16:3"]) == 2
    assert "is no shape" in capsys.readouterr().err
