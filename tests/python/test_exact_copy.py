"""A finer copy beside coarse rows: kept, proven, carried on, and what ranks neighbours again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import lmd3
from lmd3.cli import main
from lmd3.errors import DtypeError, FormatError, VerificationError
from lmd3.index import Index
from lmd3.store import StoreWriter, verify_store

N, D = 900, 12


def unit(n: int, d: int = D, seed: int = 0) -> NDArray[np.float32]:
    rows = np.random.default_rng(seed).normal(size=(n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def source(tmp_path: Path) -> lmd3.Store:
    """float32 rows in three shards, with all that stores keep beside them."""
    rows = np.arange(N)
    with StoreWriter(tmp_path / "s", dtype="float32", shard_rows=400) as writer:
        writer.append(
            unit(N),
            [f"id{row}" for row in rows],
            [("b", "a")[row % 2] for row in rows],
            weights=np.random.default_rng(1).random(N),
            tokens=rows,
            truncated=rows % 7 == 0,
            left_out=rows % 7,
        )
    return lmd3.open_store(tmp_path / "s")


@pytest.mark.parametrize("copy", ["float16", "float32"])
def test_a_copy_is_kept_beside_int8_rows(copy: str, source: lmd3.Store, tmp_path: Path) -> None:
    found = lmd3.convert(source, tmp_path / "t", dtype="int8", exact=copy)
    rows = np.arange(N)
    assert found.dtype == "int8" and found.exact is not None and found.exact.dtype == copy
    np.testing.assert_array_equal(found.exact.rows(rows), unit(N).astype(copy).astype(np.float32))
    plain = lmd3.convert(source, tmp_path / "plain", dtype="int8")
    assert plain.exact is None
    np.testing.assert_array_equal(found.rows(rows), plain.rows(rows))
    files = sorted(path.name for path in (tmp_path / "t").glob("exact*"))
    assert files == [f"exact-{shard:05}.npy" for shard in range(3)]
    # A plain file that numpy opens.
    np.testing.assert_array_equal(np.load(tmp_path / "t" / files[2]), unit(N)[800:].astype(copy))
    assert verify_store(found)["files"] == verify_store(plain)["files"] + 3
    # Nothing else is lost on the way.
    np.testing.assert_array_equal(found.weights(), source.weights())
    assert found.ids() == source.ids()
    assert found.manifest["groups"] == source.manifest["groups"]
    assert found.manifest["groups"][0]["tokens_left_out"] == sum(row % 7 for row in range(0, N, 2))
    assert found.manifest["counts"] == source.manifest["counts"]


def test_the_finest_that_is_known_is_converted_on(source: lmd3.Store, tmp_path: Path) -> None:
    coarse = lmd3.convert(source, tmp_path / "t", dtype="int8", exact="float32")
    back = lmd3.convert(coarse, tmp_path / "u", dtype="float32")
    np.testing.assert_array_equal(back.rows(np.arange(N)), unit(N))
    assert back.exact is None and back.rounding == source.rounding
    # Sorting carries the copy with its rows; dropping it is asked for.
    order = np.argsort(source.group_codes(), kind="stable")  # type: ignore[arg-type]
    ranked = lmd3.convert(coarse, tmp_path / "v", sort_by="group")
    assert ranked.exact is not None
    np.testing.assert_array_equal(ranked.exact.rows(np.arange(N)), unit(N)[order])
    assert lmd3.convert(coarse, tmp_path / "w", exact="none").exact is None


def test_neighbours_are_ranked_by_the_copy(tmp_path: Path) -> None:
    # Rows so near to each other that int8 confuses their order.
    draw = np.random.default_rng(3)
    centres = unit(40, 32)
    rows = centres[draw.integers(0, 40, 2000)] + 0.02 * draw.normal(size=(2000, 32))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    queries = centres + np.float32(0.01)
    np.save(tmp_path / "x.npy", rows)
    truth = np.linalg.norm(rows[None].astype(np.float64) - queries[:, None].astype(np.float64), axis=2)
    expected = np.sort(truth, axis=1)[:, :10]
    copied = lmd3.convert(tmp_path / "x.npy", tmp_path / "copied", dtype="int8", exact="float32")
    plain = lmd3.convert(tmp_path / "x.npy", tmp_path / "plain", dtype="int8")

    def errors(store: lmd3.Store) -> tuple[float, float]:
        """Largest error of the k-th distances: of a scan, and by an index that looks in all its lists."""
        scanned, _ = lmd3.KernelDensity(bandwidth=0.1).fit(store).kneighbors(queries, 10)
        index = Index.build(store, tmp_path / f"{store.path.name}.i", lists=4)  # type: ignore[union-attr]
        found, _ = index.kneighbors(queries, 10, probes=4)
        return float(np.abs(scanned - expected).max()), float(np.abs(found - expected).max())

    assert max(errors(copied)) < 1e-7 < 1e-4 < min(errors(plain))
    # Densities are those of the rows as stored, with a copy or without.
    tables = [
        lmd3.KernelDensity(bandwidth=0.1).fit(store).density(queries).density for store in (copied, plain)
    ]
    assert tables[0]["log_density"].equals(tables[1]["log_density"])


def test_appended_rows_bring_their_copy(source: lmd3.Store, tmp_path: Path) -> None:
    lmd3.convert(source, tmp_path / "t", dtype="int8", exact="float16")
    np.save(tmp_path / "v.npy", unit(50, seed=9))
    lines = [json.dumps({"id": f"n{row}", "g": "a", "w": 1.0}) for row in range(50)]
    (tmp_path / "v.jsonl").write_text("\n".join(lines), encoding="utf-8")
    more = {"metadata": tmp_path / "v.jsonl", "id": "id", "group": "g", "weight": "w"}
    found = lmd3.append_vectors(tmp_path / "t", tmp_path / "v.npy", **more)  # type: ignore[arg-type]
    assert found.exact is not None and found.exact.n == found.n == N + 50
    np.testing.assert_array_equal(found.exact.rows(np.arange(N, N + 50)), unit(50, seed=9).astype(np.float16))
    verify_store(found)


def test_encoding_keeps_a_copy_too(tmp_path: Path) -> None:
    texts = [f"the cat number {row} and the dog {row % 7}" for row in range(120)]
    kept: dict[str, Any] = {"window": 16, "shard_rows": 50}
    found = lmd3.encode(texts, out=tmp_path / "s", dtype="int8", exact="float16", **kept)
    plain = lmd3.encode(texts, out=tmp_path / "p", dtype="float16", **kept)
    assert found.exact is not None
    np.testing.assert_array_equal(found.exact.rows(np.arange(120)), plain.rows(np.arange(120)))
    verify_store(found)
    lmd3.append_texts(tmp_path / "s", lmd3.texts.Texts.from_lists(["another cat"]))
    again = lmd3.open_store(tmp_path / "s")
    assert again.exact is not None and again.exact.n == 121
    verify_store(again)


def test_copies_that_are_none_are_refused(source: lmd3.Store, tmp_path: Path) -> None:
    for dtype, copy, match in (
        ("float32", "float32", "no finer"),
        ("float16", "float16", "no finer"),
        ("int8", "int8", "no copy is kept as int8"),
        ("int8", "bfloat16", "no copy is kept as bfloat16"),
    ):
        with pytest.raises(DtypeError, match=match):
            lmd3.convert(source, tmp_path / "t", dtype=dtype, exact=copy)
    coarse = lmd3.convert(source, tmp_path / "t", dtype="int8")
    with pytest.raises(DtypeError, match="would know no more"):
        lmd3.convert(coarse, tmp_path / "u", exact="float16")
    assert not (tmp_path / "u").exists()


def test_damage_to_a_copy_is_found(source: lmd3.Store, tmp_path: Path) -> None:
    lmd3.convert(source, tmp_path / "t", dtype="int8", exact="float16")
    path = tmp_path / "t" / "exact-00001.npy"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    path.write_bytes(bytes(flipped))
    with pytest.raises(VerificationError, match=r"rows 400 to 799") as caught:
        verify_store(tmp_path / "t")
    assert caught.value.file == str(path)
    path.write_bytes(whole[:-40])
    with pytest.raises(FormatError, match="bytes, the manifest says"):
        _ = lmd3.open_store(tmp_path / "t").exact
    # Files that are whole, of other rows.
    path.write_bytes(whole)
    other = np.load(path)[::-1]
    np.save(path, other)
    manifest = json.loads((tmp_path / "t" / "manifest.json").read_text())
    from lmd3.store.files import listed

    manifest["shards"][1]["exact"] = listed(path)
    (tmp_path / "t" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(VerificationError, match="is not of this row"):
        verify_store(tmp_path / "t")


def test_the_commands(source: lmd3.Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["convert", str(source.path), "-o", str(tmp_path / "t"), "--dtype", "int8"]
    assert main([*line, "--keep-exact", "float16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exact"] == {"dtype": "float16", "rounding": 2.0**-11}
    assert main(["inspect", str(tmp_path / "t")]) == 0
    assert "exact copy  float16, to rank neighbours again" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "t")]) == 0
    capsys.readouterr()
    assert main([*line, "--force", "--keep-exact", "int8"]) == 2
    assert "no copy is kept as int8" in capsys.readouterr().err
