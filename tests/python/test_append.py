"""Append: more rows to a store, the old ones untouched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import lmd3
from lmd3.cli import main
from lmd3.errors import DuplicateIdError, ModelError, OutputError, ParameterError, ShapeError
from lmd3.store import StoreWriter, verify_store
from lmd3.store.lock import WriterLock

D = 8


def unit(n: int, seed: int = 0) -> NDArray[np.float32]:
    rows = np.random.default_rng(seed).normal(size=(n, D))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def write(path: Path, rows: NDArray[Any], start: int = 0, shard_rows: int = 40, **columns: Any) -> lmd3.Store:
    with StoreWriter(path, dtype=columns.pop("dtype", "float32"), shard_rows=shard_rows) as writer:
        ids = None if start < 0 else [f"n{start + row}" for row in range(len(rows))]
        writer.append(rows, ids, **columns)
        return writer.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_rows_follow_the_old_ones(dtype: str, tmp_path: Path) -> None:
    rows = unit(150)
    groups = [["a", "b"][row % 2] for row in range(100)], [["b", "c"][row % 2] for row in range(50)]
    base = write(tmp_path / "s", rows[:100], dtype=dtype, groups=groups[0], weights=np.ones(100))
    write(tmp_path / "t", rows[100:], 100, groups=groups[1], weights=np.full(50, 2.0))
    before = contents(tmp_path / "s")
    found = _append_with_weights(tmp_path)
    whole = write(
        tmp_path / "whole",
        rows,
        dtype=dtype,
        groups=groups[0] + groups[1],
    )
    assert found.n == 150
    np.testing.assert_allclose(
        found.rows(np.arange(150)), whole.rows(np.arange(150)), atol=1e-6 if dtype == "int8" else 0
    )
    assert found.ids() == whole.ids()
    assert found.groups == ["a", "b", "c"]
    np.testing.assert_array_equal(found.group_codes(), whole.group_codes())
    np.testing.assert_array_equal(found.weights(), np.r_[np.ones(100), np.full(50, 2)])
    assert [group["rows"] for group in found.manifest["groups"]] == [50, 75, 25]
    assert verify_store(found)["rows"] == 150
    after = contents(tmp_path / "s")
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: content for name, content in before.items() if name != "manifest.json"
    }
    assert found.manifest["appended"][0]["fingerprint"] == base.fingerprint
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def _append_with_weights(tmp_path: Path) -> lmd3.Store:
    """The rows of the store `t` with its columns in a file of their own."""
    other = lmd3.open_store(tmp_path / "t")
    lines = [
        json.dumps({"i": name, "g": group, "w": 2.0})
        for name, group in zip(
            other.ids(), other.documents(np.arange(other.n))["group"].to_pylist(), strict=True
        )
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    np.save(tmp_path / "t.npy", other.rows(np.arange(other.n)))
    return lmd3.append_vectors(
        tmp_path / "s", tmp_path / "t.npy", metadata=tmp_path / "t.jsonl", id="i", group="g", weight="w"
    )


def test_numbered_rows_are_numbered_on(tmp_path: Path) -> None:
    write(tmp_path / "s", unit(30), -1)
    np.save(tmp_path / "v.npy", unit(20, 1))
    lmd3.append_vectors(tmp_path / "s", tmp_path / "v.npy")
    found = lmd3.append_vectors(tmp_path / "s", tmp_path / "v.npy")
    assert found.ids() == [str(row) for row in range(70)]
    assert [entry["rows"] for entry in found.manifest["appended"]] == [30, 50]
    verify_store(found)


def test_texts_are_encoded_as_the_store_was(tmp_path: Path) -> None:
    texts = [f"the {word} of number {row}" for row in range(60) for word in ("cat", "dog", "sea")]
    lmd3.encode(texts, out=tmp_path / "s", dtype="float32")
    more = ["a new cat", "", "a new dog"]
    (tmp_path / "more.txt").write_text("\n".join(more), encoding="utf-8")
    base = lmd3.open_store(tmp_path / "s")
    found = lmd3.append_texts(tmp_path / "s", lmd3.read_texts(tmp_path / "more.txt"))
    expected = lmd3.encode_queries(["a new cat", "a new dog"], base)
    np.testing.assert_allclose(found.rows(np.array([180, 181])), expected.rows(np.arange(2)), atol=1e-7)
    assert found.ids(np.array([179, 180, 181])) == ["179", "180", "182"]
    assert found.encoder == base.encoder
    assert found.documents(np.array([181]))["text"].to_pylist() == ["a new dog"]
    verify_store(found)


def test_what_does_not_fit_is_refused_and_leaves_the_store(tmp_path: Path) -> None:
    lmd3.encode([f"text {row}" for row in range(40)], out=tmp_path / "encoded")
    write(tmp_path / "s", unit(40), groups=["a"] * 40)
    np.save(tmp_path / "v.npy", unit(10))
    np.save(tmp_path / "narrow.npy", unit(10)[:, :3])
    np.save(tmp_path / "long.npy", unit(10) * 2)
    write(tmp_path / "same", unit(10), 35, groups=["b"] * 10)
    write(tmp_path / "plain", unit(40))
    before = {name: contents(tmp_path / name) for name in ("encoded", "s", "plain")}

    def refused(store: str, source: str, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            lmd3.append_vectors(tmp_path / store, tmp_path / source)

    refused("encoded", "v.npy", ModelError, "bare vectors do not say.*--same-encoder")
    refused("s", "v.npy", ParameterError, "has groups, and these rows none")
    refused("s", "same", DuplicateIdError, "'n35' occurs twice: in row 35 and in row 40")
    refused("plain", "narrow.npy", ShapeError, "3 dimensions for a store of 8")
    refused("plain", "long.npy", ParameterError, "normalised, and these are not")
    refused("v.npy", "v.npy", ParameterError, "bare vectors, not a store")
    with pytest.raises(ModelError):
        lmd3.append_texts(tmp_path / "plain", lmd3.read_texts(_texts(tmp_path)))
    assert {name: contents(tmp_path / name) for name in before} == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def _texts(tmp_path: Path) -> Path:
    (tmp_path / "t.txt").write_text("one\ntwo\n", encoding="utf-8")
    return tmp_path / "t.txt"


def test_two_writers(tmp_path: Path) -> None:
    write(tmp_path / "s", unit(30))
    np.save(tmp_path / "v.npy", unit(10))
    program = (
        "import sys, time\n"
        "from lmd3.store.lock import WriterLock\n"
        "with WriterLock(sys.argv[1]):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "s")], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match=f"is being written by process {other.pid} on "):
            lmd3.append_vectors(tmp_path / "s", tmp_path / "v.npy")
        other.kill()
        other.wait()
    # The lock ends with its owner.
    with WriterLock(tmp_path / "s"):
        pass
    assert lmd3.append_vectors(tmp_path / "s", tmp_path / "v.npy").n == 40


def test_a_store_that_is_open_keeps_its_rows(tmp_path: Path) -> None:
    """Another process appends again and again while this one reads."""
    rows = unit(500)
    write(tmp_path / "s", rows[:100], -1, shard_rows=50)
    np.save(tmp_path / "v.npy", rows[100:150])
    program = "import sys, lmd3\nfor _ in range(6):\n    lmd3.append_vectors(sys.argv[1], sys.argv[2])\n"
    opened = lmd3.open_store(tmp_path / "s")
    expected = lmd3.KernelDensity(bandwidth=0.3).fit(opened).score_samples(rows[:9])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", program, str(tmp_path / "s"), str(tmp_path / "v.npy")]
    seen = set()
    with subprocess.Popen(arguments, env=environment) as other:
        while other.poll() is None:
            np.testing.assert_array_equal(opened.rows(np.arange(100)), rows[:100])
            assert opened.ids() == [str(row) for row in range(100)]
            # Whoever opens it anew sees a whole store, of before or after an append.
            fresh = lmd3.open_store(tmp_path / "s")
            assert len(fresh.ids()) == fresh.n
            seen.add(fresh.n)
            time.sleep(0.01)
        assert other.returncode == 0
    assert seen <= {100 + 50 * k for k in range(7)}
    assert lmd3.open_store(tmp_path / "s").n == 400
    np.testing.assert_array_equal(
        lmd3.KernelDensity(bandwidth=0.3).fit(opened).score_samples(rows[:9]), expected
    )


def test_what_a_killed_append_left_is_not_in_the_way(tmp_path: Path) -> None:
    write(tmp_path / "s", unit(30), -1)
    # Files that were moved in before the manifest, and an addition that was not.
    (tmp_path / "s" / "embeddings-00001.npy").write_bytes(b"junk")
    (tmp_path / ".s.adding").mkdir()
    (tmp_path / ".s.adding" / "junk").write_bytes(b"junk")
    np.save(tmp_path / "v.npy", unit(10, 3))
    found = lmd3.append_vectors(tmp_path / "s", tmp_path / "v.npy")
    np.testing.assert_array_equal(found.rows(np.arange(30, 40)), unit(10, 3))
    verify_store(found)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = str(tmp_path / "s")
    lmd3.encode([f"text {row}" for row in range(40)], out=store)
    assert main(["append", store, str(_texts(tmp_path)), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["appended"], found["shards"]) == (42, 2, 2)
    np.save(tmp_path / "v.npy", np.eye(3, dtype=np.float32))
    assert main(["append", store, str(tmp_path / "v.npy")]) == 2
    assert "--same-encoder" in capsys.readouterr().err
    assert main(["append", store, str(tmp_path / "v.npy"), str(_texts(tmp_path))]) == 2
    assert "one after the other" in capsys.readouterr().err
