"""The index against independent truth: moments, neighbours, and what a user may break."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import lmd3
from lmd3 import errors
from lmd3.cli import main
from lmd3.index import FaissNeighbors, Index, default_path
from lmd3.store import Store, StoreWriter, open_store


def clustered(n: int, d: int, clusters: int, seed: int, *, unit: bool = True) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, d))
    rows = centres[rng.integers(clusters, size=n)] + 0.5 * rng.normal(size=(n, d))
    if unit:
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32)


def write_store(path: Path, rows: np.ndarray, dtype: str, *, weights: bool, groups: int, shard: int) -> Store:
    rng = np.random.default_rng(7)
    with StoreWriter(path, dtype=dtype, normalised=False, shard_rows=shard) as writer:
        writer.append(
            rows,
            groups=[f"g{g}" for g in rng.integers(groups, size=len(rows))] if groups else None,
            weights=rng.uniform(0.1, 3, size=len(rows)) if weights else None,
        )
    return open_store(path)


def starts(index: Index) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(index.native.sizes)]).astype(int)


@pytest.mark.parametrize(
    ("dtype", "copy"),
    [
        ("float16", None),
        ("int8", None),
        ("float32", None),
        ("bfloat16", None),
        ("float32", "float16"),
        ("float32", "int8"),
    ],
)
def test_moments_are_exact_for_the_rows_as_stored(tmp_path: Path, dtype: str, copy: str | None) -> None:
    store = write_store(tmp_path / "s", clustered(3000, 24, 20, 1), dtype, weights=True, groups=5, shard=1100)
    index = Index.build(store, dtype=copy)
    kept = index.manifest["dtype"]
    assert kept == (copy or (dtype if dtype != "bfloat16" else "float32"))
    ids = index.native.ids.astype(int)
    assert sorted(ids) == list(range(store.n))
    raw = np.load(index.path / "rows.npy").astype(np.float32)
    if kept == "int8":
        raw *= np.load(index.path / "scales.npy")[:, None]
    raw = raw.astype(np.float64)
    original = store.rows(ids).astype(np.float64)
    if copy is None:
        assert np.array_equal(raw, original) and index.manifest["rounding"] == 0
    else:
        error = np.linalg.norm(raw - original, axis=1) / np.linalg.norm(original, axis=1)
        assert error.max() <= index.manifest["rounding"] * (1 + 1e-6) <= (1e-3 if kept == "float16" else 2e-2)
    weights = store.weights()
    codes = store.group_codes()
    assert weights is not None and codes is not None
    assert np.array_equal(np.load(index.path / "weights.npy"), weights[ids])
    assert np.array_equal(np.load(index.path / "groups.npy"), codes[ids])
    moments, means = index.native.moments, index.native.means
    pairs = np.load(index.path / "group_lists.npy")
    group_means, group_moments = (
        np.load(index.path / "group_means.npy"),
        np.load(index.path / "group_moments.npy"),
    )
    seen = 0
    for c, (a, b) in enumerate(zip(starts(index)[:-1], starts(index)[1:], strict=True)):
        if a == b:
            continue
        w, x, g = weights[ids[a:b]].astype(np.float64), raw[a:b], codes[ids[a:b]]
        assert np.allclose(means[c], np.average(x, axis=0, weights=w), atol=1e-6)
        squared = ((x - means[c]) ** 2).sum(1)
        tr = np.average(squared, weights=w)
        expected = [w.sum(), tr, np.average((squared - tr) ** 2, weights=w), (w**2).mean() / w.mean() ** 2]
        assert np.allclose(moments[c], expected, rtol=1e-9, atol=1e-12)
        radii = np.load(index.path / "moments.npy")[c, 6:]
        assert np.allclose(radii, [squared.min(), squared.max()], rtol=1e-9, atol=1e-12)
        for code in np.unique(g):
            assert tuple(pairs[seen]) == (c, code)
            inside = g == code
            assert np.allclose(group_means[seen], np.average(x[inside], axis=0, weights=w[inside]), atol=1e-6)
            around = ((x[inside] - group_means[seen]) ** 2).sum(1)
            expected = [inside.sum(), w[inside].sum(), np.average(around, weights=w[inside])]
            assert np.allclose(group_moments[seen], expected, rtol=1e-9, atol=1e-12)
            seen += 1
    assert seen == len(pairs)
    assert index.manifest["weight"] == pytest.approx(weights.sum(dtype=np.float64))
    assert np.allclose(index.mean, np.average(raw, axis=0, weights=weights[ids]), atol=1e-6)
    index.verify()


def test_lists_are_capped_and_a_copy_finds_its_own_list_first(tmp_path: Path) -> None:
    rows = clustered(6000, 32, 3, 2)
    rows[100:150] = rows[100]
    store = open_store(rows)
    index = Index.build(store, tmp_path / "i", lists=100)
    sizes = index.native.sizes
    assert sizes.max() <= 4 * len(rows) / 100
    list_of = np.empty(len(rows), int)
    list_of[index.native.ids.astype(int)] = np.repeat(np.arange(index.lists), sizes.astype(int))
    chosen = np.random.default_rng(0).choice(len(rows), 1000, replace=False)
    assert np.array_equal(index.native.nearest_lists(rows[chosen], 1)[:, 0], list_of[chosen])
    # The same in any company, and the same build from the same seed.
    assert (
        index.native.nearest_lists(rows[[5]], 3).tolist()
        == index.native.nearest_lists(rows[:40], 3)[[5]].tolist()
    )
    again = Index.build(store, tmp_path / "j", lists=100, threads=1)
    assert again.manifest["files"] == index.manifest["files"]
    other = Index.build(store, tmp_path / "k", lists=100, seed=1)
    assert other.manifest["files"] != index.manifest["files"]


def test_what_strayed_to_a_dense_core_has_a_list_of_its_own(tmp_path: Path) -> None:
    """Narrow clusters in a wide one: a list of both would be described by neither's moments."""
    rng = np.random.default_rng(4)
    centres = rng.normal(size=(20, 24))
    dense = centres[rng.integers(20, size=3000)] + 0.01 * rng.normal(size=(3000, 24))
    rows = np.concatenate([dense, rng.normal(size=(1000, 24))]).astype(np.float32)
    index = Index.build(rows, tmp_path / "i", lists=40)
    outer = np.load(index.path / "shells.npy")
    assert len(outer) == index.lists > np.isinf(outer).sum()
    ids, sizes = index.native.ids.astype(int), index.native.sizes.astype(int)
    of_row = np.repeat(np.arange(index.lists), sizes)
    mixed = [len(set(ids[of_row == c] < 3000)) == 2 for c in range(index.lists)]
    assert np.mean(mixed) < 0.1
    list_of = np.empty(4000, int)
    list_of[ids] = of_row
    chosen = np.concatenate([np.arange(0, 3000, 30), np.arange(3000, 4000, 10)])
    assert np.array_equal(index.native.nearest_lists(rows[chosen], 1)[:, 0], list_of[chosen])


def test_neighbours(tmp_path: Path) -> None:
    rows, queries = clustered(5000, 48, 30, 3), clustered(50, 48, 30, 4)
    exact, _ = lmd3.KernelDensity(bandwidth=1.0).fit(rows).kneighbors(queries, 10)
    for dtype in ("float16", "int8"):
        index = Index.build(rows, tmp_path / dtype, dtype=dtype)
        distances, found = index.kneighbors(queries, 10, probes=index.lists)
        assert np.allclose(distances, exact, rtol=1e-6), "all lists: ranked by the store's rows"
        truth = np.linalg.norm(rows[found].astype(np.float64) - queries[:, None].astype(np.float64), axis=2)
        assert np.allclose(distances, truth, rtol=1e-7)
        sample = np.random.default_rng(1).choice(5000, 200, replace=False)
        wanted, _ = lmd3.KernelDensity(bandwidth=1.0).fit(rows).kneighbors(rows[sample], 10)
        got, _ = index.kneighbors(rows[sample], 10)
        assert np.mean(got <= wanted[:, -1:] * (1 + 1e-6)) >= 0.93, "recall of the default probes"
    few, where = index.kneighbors(queries, 5000, probes=1)
    assert np.isnan(few[:, -1]).all() and (where[:, -1] == -1).all()
    rows_found, sorted_distances = index.query(queries, 3)
    assert rows_found.shape == sorted_distances.shape == (50, 3)
    faiss = pytest.importorskip("faiss")
    flat = faiss.IndexFlatL2(48)
    flat.add(rows)
    ids, distances = FaissNeighbors(flat).query(queries, 10)
    assert np.allclose(distances, exact, atol=1e-3) and ids.dtype == np.int64


@pytest.mark.parametrize(("n", "d"), [(1, 1), (2, 3), (17, 5), (300, 1)])
def test_small_and_odd_stores(tmp_path: Path, n: int, d: int) -> None:
    rows = np.random.default_rng(n).normal(size=(n, d)).astype(np.float32)
    for dtype in ("float16", "int8"):
        index = Index.build(rows, tmp_path / f"{dtype}", dtype=dtype)
        distances, found = index.kneighbors(rows, 1, probes=index.lists)
        assert np.allclose(distances, 0) and np.array_equal(rows[found[:, 0]], rows)


def test_all_rows_alike(tmp_path: Path) -> None:
    rows = np.repeat(np.random.default_rng(0).normal(size=(1, 8)), 500, axis=0).astype(np.float32)
    index = Index.build(rows, tmp_path / "i")
    assert index.native.sizes.sum() == 500


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = clustered(400, 16, 4, 5)
    store = write_store(tmp_path / "s", rows, "float16", weights=False, groups=0, shard=200)
    index = Index.build(store)
    assert index.path == default_path(store) and repr(index).endswith("lists>")
    with pytest.raises(errors.OutputError, match="exists already"):
        Index.build(store)
    other = write_store(
        tmp_path / "t", clustered(400, 16, 4, 6), "float16", weights=False, groups=0, shard=200
    )
    with pytest.raises(errors.StaleIndexError, match="other rows"):
        Index(index.path, other)
    with pytest.raises(errors.DtypeError):
        Index.build(store, tmp_path / "x", dtype="float64")
    with pytest.raises(errors.ShapeError):
        index.kneighbors(rows[:, :5])
    with pytest.raises(errors.ParameterError):
        index.kneighbors(rows, 0)
    with pytest.raises(errors.ParameterError, match="in memory"):
        Index.build(rows)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(errors.OutputError, match="is no index"):
        Index.build(store, tmp_path / "full", force=True)
    big = rows.copy()
    big[7, 3] = 1e6
    with pytest.raises(errors.NotFiniteError, match=r"row 7.*65504"):
        Index.build(big, tmp_path / "big", dtype="float16")
    assert Index.build(big, tmp_path / "big", dtype="int8").n == 400
    # On the command line: made anew, verified, refused.
    assert main(["index", str(tmp_path / "s")]) == 2
    assert main(["index", str(tmp_path / "s"), "--force", "--quiet", "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["rows"] == 400 and said["lists"] == Index(index.path).lists
    assert main(["index", str(tmp_path / "s"), "--check", "--quiet"]) == 0
    assert main(["index", str(tmp_path / "nothing")]) == 2


def test_damage_is_found(tmp_path: Path) -> None:
    index = Index.build(clustered(500, 16, 4, 8), tmp_path / "i")
    for name in ("means.npy", "moments.npy", "centroids.npy", "ids.npy"):
        path = index.path / name
        sound = path.read_bytes()
        path.write_bytes(sound[:-1])
        with pytest.raises(errors.FormatError, match="bytes, the manifest says"):
            Index(index.path)
        path.write_bytes(sound[:-3] + bytes([sound[-3] ^ 4]) + sound[-2:])
        with pytest.raises(errors.VerificationError, match="checksum"):
            Index(index.path)
        path.write_bytes(sound)
    manifest = json.loads((index.path / "index.json").read_text())
    for change, word in (
        ({"version": 9}, "version 9"),
        ({"lists": 10**9}, "numbers that no index has"),
        ({"n": "x"}, "damaged"),
    ):
        (index.path / "index.json").write_text(json.dumps(manifest | change))
        with pytest.raises(errors.FormatError, match=word):
            Index(index.path)
    (index.path / "index.json").unlink()
    with pytest.raises(errors.FileMissingError, match="lmd3 index"):
        Index(index.path)


BUILD = """
import sys
from lmd3.index import Index
Index.build(sys.argv[1], sys.argv[2], max_memory=60_000_000, threads=1)
"""


def test_a_killed_build_continues_to_the_same_bytes(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", clustered(60_000, 96, 50, 9))
    whole = Index.build(tmp_path / "rows.npy", tmp_path / "whole", max_memory=60_000_000, threads=1)
    state = tmp_path / "cut.partial" / "state.json"
    seen = []
    for attempt in range(20):
        process = subprocess.Popen([sys.executable, "-c", BUILD, tmp_path / "rows.npy", tmp_path / "cut"])
        before = state.read_text() if state.exists() else ""
        # Until the state has changed once since the start: then the build is killed in its next step.
        while process.poll() is None and (not state.exists() or state.read_text() == before):
            time.sleep(0.002)
        if process.poll() is None and attempt < 12:
            process.send_signal(signal.SIGKILL)
        process.wait()
        if process.returncode == 0:
            break
        seen.append(json.loads(state.read_text())["rows"])
    assert len(seen) >= 3 and seen[-1] > 0, seen
    cut = Index(tmp_path / "cut")
    assert cut.manifest["files"] == whole.manifest["files"]
    assert not (tmp_path / "cut.partial").exists()
    assert sorted(path.name for path in cut.path.iterdir()) == sorted(
        [*(f["name"] for f in cut.manifest["files"]), "index.json"]
    )
