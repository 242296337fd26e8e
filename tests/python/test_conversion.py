"""Conversion: what a store holds survives another element type and another order; bfloat16 and int8 equal
NumPy's."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lmd3
from lmd3 import conversion
from lmd3.errors import DtypeError, FormatError, NotFiniteError, OutputError, ParameterError
from lmd3.store import DTYPES, StoreWriter, open_store, verify_store


def unit_rows(n: int, d: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, ties to even, by the bits: the upper half of a float32."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return (bits + 0x7FFF + ((bits >> 16) & 1) >> 16).astype(np.uint16)


def widen_bfloat16(halves: np.ndarray) -> np.ndarray:
    return (halves.astype(np.uint32) << 16).view(np.float32)


def read_bfloat16(path: Path) -> np.ndarray:
    """The one matrix of a safetensors file, by the format's description."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert list(header) == ["embeddings"] and (8 + length) % 64 == 0
    tensor = header["embeddings"]
    assert tensor["dtype"] == "BF16" and tensor["data_offsets"] == [0, len(data) - 8 - length]
    return np.frombuffer(data[8 + length :], np.uint16).reshape(tensor["shape"])


def to_int8(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scales = np.abs(values).max(axis=1) / np.float32(127)
    safe = np.where(scales > 0, scales, 1).astype(np.float32)
    return values / safe[:, None], scales


def write(path: Path, vectors: np.ndarray, **options: Any) -> lmd3.Store:
    n = len(vectors)
    rng = np.random.default_rng(n)
    with StoreWriter(path, **options) as writer:
        writer.append(
            vectors,
            [f"id{row}" for row in range(n)],
            groups=[("b", "a", "ß")[code] for code in rng.integers(0, 3, n)],
            texts=[f"text {row}" for row in range(n)],
            tokens=np.arange(n),
            truncated=np.arange(n) % 5 == 0,
            weights=rng.random(n),
        )
    return open_store(path)


def contents(store: lmd3.Store, rows: np.ndarray) -> dict[str, Any]:
    table = store.documents(rows, ("id", "group", "text", "tokens", "truncated")).to_pydict()
    weights = store.weights()
    assert weights is not None
    return table | {"weight": weights[rows].tolist()}


values = st.one_of(
    st.floats(-4, 4, width=32),
    st.floats(-(2.0**-100), 2.0**-100, width=32),
    st.floats(-(2.0**100), 2.0**100, width=32),
)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_bfloat16_and_int8_are_written_as_numpy_rounds(data: st.DataObject) -> None:
    n, d = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 9))
    drawn = data.draw(st.lists(values, min_size=n * d, max_size=n * d))
    vectors = np.array(drawn, np.float32).reshape(n, d)
    shard_rows = data.draw(st.integers(1, 12))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "b"
        with StoreWriter(path, dtype="bfloat16", normalised=False, shard_rows=shard_rows) as writer:
            writer.append(vectors)
        files = sorted(path.glob("embeddings-*.safetensors"))
        assert len(files) == -(-n // shard_rows)
        halves = np.concatenate([read_bfloat16(file) for file in files])
        np.testing.assert_array_equal(halves, to_bfloat16(vectors))
        store = open_store(path)
        assert store.dtype == "bfloat16" and store.rounding == 2.0**-8
        np.testing.assert_array_equal(store.rows(np.arange(n)), widen_bfloat16(halves))
        verify_store(store)
        # A bare file is a store as well.
        np.testing.assert_array_equal(
            open_store(files[0]).rows(np.arange(min(n, shard_rows))), widen_bfloat16(halves[:shard_rows])
        )

        path = Path(folder) / "i"
        with StoreWriter(path, dtype="int8", normalised=False, shard_rows=shard_rows) as writer:
            writer.append(vectors)
        integers = np.concatenate([np.load(file) for file in sorted(path.glob("embeddings-*.npy"))])
        scales = np.concatenate([np.load(file) for file in sorted(path.glob("scales-*.npy"))])
        wanted, wanted_scales = to_int8(vectors)
        assert integers.dtype == np.int8 and np.abs(integers.astype(int)).max(initial=0) <= 127
        np.testing.assert_array_equal(scales, wanted_scales)
        normal = scales >= np.finfo(np.float32).tiny
        # The nearest integer, where a tie may go either way.
        assert (np.abs(integers - wanted)[normal] <= 0.5 + 1e-4).all()
        assert (integers[~normal] == 0).all()
        store = open_store(path)
        read = store.rows(np.arange(n))
        np.testing.assert_array_equal(read, integers.astype(np.float32) * scales[:, None])
        verify_store(store)
        exact = vectors.astype(np.float64)
        errors, norms = np.linalg.norm(read - exact, axis=1)[normal], np.linalg.norm(exact, axis=1)[normal]
        assert store.rounding == pytest.approx(max(errors / norms, default=0.0), rel=1e-3, abs=1e-6)
        # Twice the figure without a measurement is a bound of every row.
        del store.manifest["rounding"]
        store._rounding = None
        assert (errors <= 2 * store.rounding * norms * (1 + 1e-4)).all()


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_any_type_becomes_any_other(source: str, target: str, tmp_path: Path) -> None:
    store = write(tmp_path / "s", unit_rows(700, 24), dtype=source, shard_rows=300)
    lmd3.convert(tmp_path / "s", tmp_path / "t", dtype=target)
    found = open_store(tmp_path / "t")
    rows = np.arange(700)
    assert (found.n, found.d, found.dtype, found.normalised) == (700, 24, target, True)
    assert [shard["rows"] for shard in found.manifest["shards"]] == [300, 300, 100]
    assert contents(found, rows) == contents(store, rows)
    assert found.groups == store.groups and found.manifest["counts"] == store.manifest["counts"]
    distance = np.linalg.norm(found.rows(rows) - store.rows(rows).astype(np.float64), axis=1)
    assert distance.max() <= 2 * found.rounding
    finer = {"float32": DTYPES, "float16": ("float16",), "bfloat16": ("bfloat16",), "int8": ()}
    if source in finer[target] and (target, source) != ("float32", "float32"):
        assert distance.max() == 0
    if source == target == "int8":
        assert distance.max() <= 1e-6
    # The rows are as far from those first given as before.
    given = np.linalg.norm(found.rows(rows) - unit_rows(700, 24).astype(np.float64), axis=1)
    assert given.max() <= 2 * found.rounding and found.rounding >= store.rounding
    assert verify_store(found)["rows"] == 700


@pytest.mark.parametrize("in_memory", [1000, 1 << 17])
def test_sorting_by_group_keeps_the_permutation(
    in_memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "_SORTED_ROWS", in_memory)
    monkeypatch.setattr(conversion, "_VALUES", 6 * 333)
    store = write(tmp_path / "s", unit_rows(5000, 6), dtype="float16", shard_rows=1700)
    found = lmd3.convert(store, tmp_path / "t", sort_by="group")
    codes = store.group_codes()
    assert codes is not None
    order = np.argsort(codes, kind="stable")
    rows = np.arange(5000)
    np.testing.assert_array_equal(found.rows(rows), store.rows(order))
    assert contents(found, rows) == contents(store, order)
    assert found.groups == store.groups and found.group_runs() == 3 < store.group_runs()
    assert found.documents(rows, ("source_row",))["source_row"].to_pylist() == order.tolist()
    table = pq.read_table(tmp_path / "t" / "documents-00001.parquet")
    assert table.column_names == ["id", "group", "text", "tokens", "truncated", "source_row"]
    verify_store(found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s", "t"]
    # A second conversion passes the permutation on.
    again = lmd3.convert(found, tmp_path / "u", dtype="int8", sort_by="group")
    assert again.documents(rows, ("source_row",))["source_row"].to_pylist() == order.tolist()
    # Densities do not depend on the order.
    h = {"bandwidth": 0.3}
    queries = unit_rows(9, 6, seed=5)
    tables = [lmd3.KernelDensity(**h).fit(s).density(queries, by_group=True).density for s in (store, found)]
    np.testing.assert_allclose(tables[0]["log_density"], tables[1]["log_density"], rtol=1e-6)
    assert tables[0]["group"].equals(tables[1]["group"])


def test_bare_vectors_and_arrays_become_stores(tmp_path: Path) -> None:
    vectors = 3 * unit_rows(50, 7)
    np.save(tmp_path / "x.npy", vectors)
    for source in (tmp_path / "x.npy", vectors):
        store = lmd3.convert(source, tmp_path / "t", dtype="float32", force=True)
        np.testing.assert_array_equal(store.rows(np.arange(50)), vectors)
        assert store.ids() == [str(row) for row in range(50)]
        assert not store.normalised and store.weights() is None and store.groups == []


def test_the_encoder_goes_with_its_state(tmp_path: Path) -> None:
    texts = [f"a text with word{i % 7} and word{i % 3}" for i in range(60)]
    store = lmd3.encode(texts, "hashing", tmp_path / "s")
    converted = lmd3.convert(store, tmp_path / "t", dtype="int8")
    assert converted.encoder == store.encoder
    queries = [lmd3.encode_queries(["a word3"], s).rows(np.arange(1)) for s in (store, converted)]
    np.testing.assert_array_equal(*queries)
    verify_store(converted)


def test_what_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    vectors = unit_rows(20, 4)
    np.save(tmp_path / "x.npy", vectors)
    with pytest.raises(ParameterError, match="no groups"):
        lmd3.convert(tmp_path / "x.npy", tmp_path / "t", sort_by="group")
    with pytest.raises(ParameterError, match="text"):
        lmd3.convert(tmp_path / "x.npy", tmp_path / "t", sort_by="text")
    with pytest.raises(DtypeError, match="float64"):
        lmd3.convert(tmp_path / "x.npy", tmp_path / "t", dtype="float64")
    np.save(tmp_path / "large.npy", np.array([[1.0, 2.0], [1e6, 0.0]], np.float32))
    with pytest.raises(NotFiniteError, match="65504") as caught:
        lmd3.convert(tmp_path / "large.npy", tmp_path / "t", dtype="float16")
    assert caught.value.row == 1
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "mine").touch()
    with pytest.raises(OutputError):
        lmd3.convert(tmp_path / "x.npy", tmp_path / "t")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.npy", "t", "x.npy"]


@pytest.mark.parametrize("rounding", [-1, 2, "x", float("nan")])
def test_a_rounding_that_is_none_is_refused(rounding: object, tmp_path: Path) -> None:
    write(tmp_path / "s", unit_rows(5, 4))
    path = tmp_path / "s" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rounding": rounding}))
    with pytest.raises(FormatError, match="rounding"):
        open_store(tmp_path / "s")


def command(*arguments: str, folder: Path) -> dict[str, Any]:
    line = [sys.executable, "-m", "lmd3", *arguments, "--json"]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_the_command_converts_and_inspect_advises_it(tmp_path: Path) -> None:
    write(tmp_path / "s", unit_rows(300, 6))
    advised = command("inspect", "s", folder=tmp_path)
    assert "--sort-by group" in advised["advice"][0] and advised["group_run"] < 3
    done = command("convert", "s", "-o", "t", "--dtype", "int8", "--sort-by", "group", folder=tmp_path)
    assert (done["rows"], done["dtype"], done["sorted_by"]) == (300, "int8", "group")
    inspected = command("inspect", "t", folder=tmp_path)
    assert inspected["advice"] == [] and inspected["group_run"] == 100
    np.save(tmp_path / "q.npy", unit_rows(3, 6, seed=1))
    arguments = ("density", "t", "q.npy", "--bandwidth", "0.3")
    assert command(*arguments, "-o", "d", folder=tmp_path)["precision"] == "int16"
    forced = command(*arguments, "--precision", "float32", "-o", "e", folder=tmp_path)
    assert forced["precision"] == "float32"
    assert json.loads((tmp_path / "d" / "run.json").read_text())["precision"] == "int16"
    written = pq.read_table(tmp_path / "d" / "density.parquet")
    assert set(written["precision"].to_pylist()) == {"int16"}
