"""Vectors of other tools, opened where they lie: written by their own libraries, equal to the .npy's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import lmd3
from lmd3.errors import (
    ColumnError,
    DuplicateIdError,
    FileMissingError,
    FormatError,
    InputError,
    NotFiniteError,
    ShapeError,
)
from lmd3.store.bare import natural
from lmd3.store.faiss_files import read_faiss
from lmd3.texts import is_texts

N, D = 2500, 12


@pytest.fixture(scope="module")
def vectors() -> NDArray[np.float32]:
    rows = np.random.default_rng(5).normal(size=(N, D))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def save_bin(path: Path, rows: NDArray[Any]) -> Path:
    path.write_bytes(np.array(rows.shape, "<u4").tobytes() + np.ascontiguousarray(rows).tobytes())
    return path


def npy(folder: Path, rows: NDArray[Any]) -> Path:
    np.save(folder / "v.npy", rows)
    return folder / "v.npy"


def npy_folder(folder: Path, rows: NDArray[Any]) -> Path:
    # More than ten, so that names in plain order would be wrong.
    for number, part in enumerate(np.array_split(rows, 12)):
        np.save(folder / f"part-{number}.npy", part)
    return folder


def fbin(folder: Path, rows: NDArray[Any]) -> Path:
    return save_bin(folder / f"v.{'fbin' if rows.dtype == np.float32 else 'f16bin'}", rows)


def raw(folder: Path, rows: NDArray[Any]) -> Path:
    # Seven bytes before the rows: none of them is aligned.
    (folder / "v.bin").write_bytes(b"1234567" + rows.tobytes())
    described = {"dtype": str(rows.dtype), "shape": list(rows.shape), "offset": 7}
    (folder / "v.bin.json").write_text(json.dumps(described), encoding="utf-8")
    return folder / "v.bin"


def safetensors(folder: Path, rows: NDArray[Any]) -> Path:
    from safetensors.numpy import save_file

    save_file({"x": rows}, folder / "v.safetensors")
    return folder / "v.safetensors"


def table(rows: NDArray[Any], fixed: bool = True) -> pa.Table:
    values = pa.array(rows.reshape(-1))
    if fixed:
        lists = pa.FixedSizeListArray.from_arrays(values, rows.shape[1])
    else:
        lists = pa.ListArray.from_arrays(np.arange(0, rows.size + 1, rows.shape[1], dtype=np.int32), values)
    return pa.table({"id": [f"n{row}" for row in range(len(rows))], "embedding": lists})


def arrow_file(folder: Path, rows: NDArray[Any]) -> Path:
    with pa.ipc.new_file(str(folder / "v.arrow"), table(rows).schema) as writer:
        writer.write_table(table(rows), max_chunksize=700)
    return folder / "v.arrow"


def arrow_stream(folder: Path, rows: NDArray[Any]) -> Path:
    with pa.ipc.new_stream(str(folder / "v.arrow"), table(rows, False).schema) as writer:
        writer.write_table(table(rows, False), max_chunksize=999)
    return folder / "v.arrow"


def saved_dataset(folder: Path, rows: NDArray[Any]) -> Path:
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "embedding": datasets.List(datasets.Value(str(rows.dtype)), length=rows.shape[1]),
        }
    )
    columns = {"text": [f"t {row}" for row in range(len(rows))], "embedding": list(rows)}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(folder / "saved", num_shards=3)
    return folder / "saved"


def faiss_flat(folder: Path, rows: NDArray[Any]) -> Path:
    import faiss

    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    faiss.write_index(index, str(folder / "v.faiss"))
    return folder / "v.faiss"


WRITERS: list[tuple[Callable[[Path, NDArray[Any]], Path], tuple[str, ...]]] = [
    (npy, ("float32", "float16")),
    (npy_folder, ("float32", "float16")),
    (fbin, ("float32", "float16")),
    (raw, ("float32", "float16")),
    (safetensors, ("float32", "float16")),
    (arrow_file, ("float32", "float16")),
    (arrow_stream, ("float32",)),
    (saved_dataset, ("float32", "float16")),
    (faiss_flat, ("float32",)),
]


@pytest.mark.parametrize(
    ("write", "dtype"), [(write, dtype) for write, dtypes in WRITERS for dtype in dtypes]
)
def test_rows_and_densities_are_those_of_the_array(
    write: Callable[[Path, NDArray[Any]], Path], dtype: str, vectors: NDArray[np.float32], tmp_path: Path
) -> None:
    rows = vectors.astype(dtype)
    store = lmd3.open_store(write(tmp_path, rows))
    assert (store.n, store.d, store.dtype) == (N, D, dtype)
    np.testing.assert_array_equal(store.rows(np.arange(N)), rows.astype(np.float32))
    assert "without a copy" in store.opened
    queries = vectors[:7] + np.float32(0.05)
    mine, theirs = (
        lmd3.KernelDensity(bandwidth=0.3).fit(source).score_samples(queries) for source in (store, rows)
    )
    # Pieces are summed apart, so the order of additions differs.
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6)
    single = lmd3.open_store(write(tmp_path, rows))
    assert single.fingerprint == store.fingerprint


def test_bfloat16_of_safetensors(vectors: NDArray[np.float32], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    rows = torch.from_numpy(vectors).bfloat16()
    save_file({"x": rows}, tmp_path / "v.safetensors")
    store = lmd3.open_store(tmp_path / "v.safetensors")
    assert store.dtype == "bfloat16"
    np.testing.assert_array_equal(store.rows(np.arange(N)), rows.float().numpy())


@pytest.mark.parametrize(("suffix", "dtype"), [("u8bin", "uint8"), ("i8bin", "int8")])
@pytest.mark.parametrize("precision", ["float32", "int16"])
def test_integers_are_taken_as_they_are(suffix: str, dtype: str, precision: str, tmp_path: Path) -> None:
    low, high = (0, 256) if dtype == "uint8" else (-127, 128)
    rows = np.random.default_rng(1).integers(low, high, (300, 20)).astype(dtype)
    store = lmd3.open_store(save_bin(tmp_path / f"v.{suffix}", rows))
    assert store.dtype == dtype
    np.testing.assert_array_equal(store.rows(np.arange(300)), rows)
    queries = rows[:9].astype(np.float32) + 3
    kde = lmd3.KernelDensity(bandwidth=60.0, precision=precision, normalize=False)
    distance = np.linalg.norm(queries[:, None].astype(float) - rows[None], axis=2)
    expected = np.log(np.exp(-distance / 60).mean(axis=1))
    np.testing.assert_allclose(kde.fit(store).score_samples(queries), expected, rtol=5e-4)


def test_files_come_in_natural_order() -> None:
    names = ["part-10.npy", "part-9.npy", "part-009b.npy", "a.npy", "part-1.npy"]
    ordered = [path.name for path in sorted(map(Path, names), key=natural)]
    assert ordered == ["a.npy", "part-1.npy", "part-9.npy", "part-009b.npy", "part-10.npy"]


@pytest.mark.parametrize("layout", ["beside", "embedding-reader"])
def test_metadata_beside_vectors(layout: str, vectors: NDArray[np.float32], tmp_path: Path) -> None:
    place, metadata = (tmp_path, tmp_path)
    if layout == "embedding-reader":
        place, metadata = tmp_path / "img_emb", tmp_path / "metadata"
        place.mkdir()
        metadata.mkdir()
    columns = {
        "id": pa.array(range(1000, 1000 + N)),
        "source": ["wiki" if row % 3 else None for row in range(N)],
        "text": [f"text {row}" for row in range(N)],
    }
    whole = pa.table(columns)
    if layout == "beside":
        np.save(place / "vectors.npy", vectors)
        pq.write_table(whole, metadata / "metadata.parquet")
    else:
        for number in range(11):
            part = slice(number * 200, (number + 1) * 200 if number < 10 else N)
            np.save(place / f"img_emb_{number}.npy", vectors[part])
            pq.write_table(
                whole.slice(part.start, part.stop - part.start), metadata / f"metadata_{number}.parquet"
            )
    assert not is_texts(tmp_path)
    store = lmd3.open_store(tmp_path)
    wanted = np.array([2201, 5, 0])
    assert store.documents(wanted).to_pylist() == [
        {"id": "3201", "group": "wiki", "text": "text 2201"},
        {"id": "1005", "group": "wiki", "text": "text 5"},
        {"id": "1000", "group": None, "text": "text 0"},
    ]
    np.testing.assert_array_equal(store.rows(wanted), vectors[wanted])
    assert store.groups == ["(none)", "wiki"]
    assert store.group_codes().tolist() == [int(row % 3 > 0) for row in range(N)]  # type: ignore[union-attr]
    assert next(store.texts())[:2] == ["text 0", "text 1"]
    table = lmd3.KernelDensity(bandwidth=0.3).fit(store).density(vectors[:3], by_group=True)
    assert set(table.density["group"].to_pylist()) == {None, "(none)", "wiki"}


def test_metadata_must_fit(vectors: NDArray[np.float32], tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", vectors)
    pq.write_table(pa.table({"id": range(N - 1)}), tmp_path / "metadata.parquet")
    with pytest.raises(ShapeError, match="2499 rows for the 2500 vectors"):
        lmd3.open_store(tmp_path)
    pq.write_table(pa.table({"id": [*range(N - 1), 7]}), tmp_path / "metadata.parquet")
    with pytest.raises(DuplicateIdError, match="'7' occurs twice: in row 7 and in row 2499"):
        lmd3.open_store(tmp_path)


def test_what_can_not_be_opened_is_named(vectors: NDArray[np.float32], tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str, name: str) -> None:
        with pytest.raises(error, match=match):
            lmd3.open_store(tmp_path / name)

    feather.write_feather(table(vectors), tmp_path / "packed.arrow", compression="zstd")
    refused(FormatError, "compressed.*lmd3 import", "packed.arrow")
    feather.write_feather(
        pa.table({"a": table(vectors)["embedding"], "b": table(vectors)["embedding"]}),
        tmp_path / "two.arrow",
        compression="uncompressed",
    )
    refused(ColumnError, "several columns.*a, b", "two.arrow")
    ragged = pa.table({"v": pa.array([[1.0, 2.0], [1.0]], pa.list_(pa.float32()))})
    feather.write_feather(ragged, tmp_path / "ragged.arrow", compression="uncompressed")
    refused(ShapeError, "row 1: a vector of 1 numbers", "ragged.arrow")
    hole = pa.table({"v": pa.array([[1.0, 2.0], None], pa.list_(pa.float32()))})
    feather.write_feather(hole, tmp_path / "hole.arrow", compression="uncompressed")
    refused(NotFiniteError, "row 1: no vector", "hole.arrow")
    (tmp_path / "v.raw").write_bytes(b"12345678")
    refused(FormatError, "do not say what they are.*shape", "v.raw")
    (tmp_path / "v.raw.json").write_text('{"dtype": "float32", "shape": [1, 3]}', encoding="utf-8")
    refused(FormatError, "8 bytes, 1 rows × 3 float32 from byte 0 are 12", "v.raw")
    (tmp_path / "empty").mkdir()
    refused(FileMissingError, "neither a store", "empty")
    (tmp_path / "mixed").mkdir()
    np.save(tmp_path / "mixed" / "a.npy", vectors)
    save_bin(tmp_path / "mixed" / "b.fbin", vectors)
    refused(FormatError, "several kinds", "mixed")
    (tmp_path / "widths").mkdir()
    np.save(tmp_path / "widths" / "a.npy", vectors)
    np.save(tmp_path / "widths" / "b.npy", vectors[:, :5])
    refused(ShapeError, "b.npy: holds 5 dimensions of float32", "widths")


# --- hostile files: any error but those of the library would be a crash ---


def damaged(whole: bytes, data: st.DataObject) -> bytes:
    """Some bytes of a file changed, or the file cut, or lengthened."""
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(content) - 1, 300)))
        content[at] = data.draw(st.sampled_from([0, 1, 127, 128, 255, data.draw(st.integers(0, 255))]))
    match data.draw(st.sampled_from(["keep", "cut", "more"])):
        case "cut":
            return bytes(content[: data.draw(st.integers(0, len(content)))])
        case "more":
            return bytes(content) + data.draw(st.binary(min_size=1, max_size=9))
    return bytes(content)


def opens_or_refuses(path: Path) -> None:
    try:
        store = lmd3.open_store(path)
        store.rows(np.array([0, store.n - 1]))
    except InputError as error:
        assert error.message


@pytest.mark.parametrize("write", [npy, fbin, safetensors, arrow_file, arrow_stream, faiss_flat])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_files_are_refused(
    write: Callable[[Path, NDArray[Any]], Path],
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.getbasetemp() / f"damaged-{write.__name__}"
    folder.mkdir(exist_ok=True)
    keep = folder / "whole"
    if not keep.exists():
        path = write(folder, np.ones((6, 3), np.float32))
        keep.write_bytes(path.read_bytes())
        (folder / "name").write_text(path.name, encoding="utf-8")
    path = folder / (folder / "name").read_text(encoding="utf-8")
    path.write_bytes(damaged(keep.read_bytes(), data))
    opens_or_refuses(path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_quantisers_are_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    import faiss

    path = tmp_path_factory.getbasetemp() / "quantiser.faiss"
    keep = path.with_suffix(".whole")
    if not keep.exists():
        index = faiss.index_factory(3, "IDMap,SQ8")
        rows = np.random.default_rng(0).random((6, 3), dtype=np.float32)
        index.train(rows)
        index.add_with_ids(rows, np.arange(6))
        faiss.write_index(index, str(keep))
    path.write_bytes(damaged(keep.read_bytes(), data))
    try:
        found = read_faiss(path)
        assert found.rows(0, found.n).shape == (found.n, found.d)
    except InputError as error:
        assert error.message


def test_numbers_of_a_quantiser_that_are_not_used_may_be_anything(tmp_path: Path) -> None:
    """Found by fuzzing: a NaN where faiss keeps an argument of its training."""
    import faiss

    index = faiss.IndexScalarQuantizer(3, faiss.ScalarQuantizer.QT_8bit)
    rows = np.random.default_rng(0).random((6, 3), dtype=np.float32)
    index.train(rows)
    index.add(rows)
    faiss.write_index(index, str(tmp_path / "i.faiss"))
    whole = bytearray((tmp_path / "i.faiss").read_bytes())
    whole[45:49] = np.float32(np.nan).tobytes()
    (tmp_path / "i.faiss").write_bytes(whole)
    np.testing.assert_allclose(read_faiss(tmp_path / "i.faiss").rows(0, 6), index.reconstruct_n(0, 6))


# --- files cut short under the map ---


@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="no SIGBUS on this system")
@pytest.mark.parametrize("json_wanted", [False, True])
def test_a_file_cut_short_under_its_map_is_named(json_wanted: bool, tmp_path: Path) -> None:
    path = tmp_path / 'v "1".npy'
    np.save(path, np.ones((100_000, 8), np.float32))
    program = (
        "import os, sys, numpy, lmd3\n"
        "from lmd3.system import end_where_files_are_cut_short\n"
        f"end_where_files_are_cut_short({json_wanted})\n"
        "store = lmd3.open_store(sys.argv[1])\n"
        "os.truncate(sys.argv[1], 4096)\n"
        "store.rows(numpy.array([99_999]))\n"
    )
    found = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True)
    assert found.returncode == 1
    if json_wanted:
        error = json.loads(found.stdout)["error"]
        assert (error["kind"], error["file"]) == ("WorkError", str(path))
        assert "cut short" in error["message"]
    else:
        assert found.stderr == (
            f"lmd3: {path}: it was cut short while it was read (restore the file, then run again)\n"
        )


@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="no SIGBUS on this system")
def test_other_bus_errors_stay_what_they_are() -> None:
    program = (
        "import os, signal\n"
        "from lmd3.system import end_where_files_are_cut_short\n"
        "end_where_files_are_cut_short(False)\n"
        "os.kill(os.getpid(), signal.SIGBUS)\n"
        "os.kill(os.getpid(), signal.SIGBUS)\n"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGBUS


def test_the_console_script_takes_the_signal() -> None:
    program = (
        "import signal, sys\n"
        "from lmd3 import system\n"
        "seen = []\n"
        "system.end_where_files_are_cut_short = seen.append\n"
        "from lmd3.cli import run\n"
        "sys.argv = ['lmd3', '--version', '--json']\n"
        "try:\n    run()\nexcept SystemExit:\n    pass\n"
        "sys.exit(0 if seen == [True] else 1)\n"
    )
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    assert (
        subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True).returncode == 0
    )


# --- a query is not a row ---


def test_a_bad_query_is_not_blamed_on_the_corpus(vectors: NDArray[np.float32], tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", vectors)
    queries = vectors[:4].copy()
    queries[2] = 1e25
    kde = lmd3.KernelDensity(bandwidth=0.3).fit(tmp_path / "v.npy")
    with pytest.raises(NotFiniteError, match="query holds NaN") as caught:
        kde.score_samples(queries)
    assert (caught.value.file, caught.value.row) == (None, 2)
