"""Densities equal a float64 reference over the rows as stored, for every stored type and arithmetic."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from scipy.special import logsumexp

from lmd3 import KernelDensity, convert, errors, open_store
from lmd3.store import DTYPES, Store, StoreWriter
from lmd3.system import simd_level

DATA = os.environ.get("LMD3_DATA", "")
needs_data = pytest.mark.skipif(not DATA, reason="LMD3_DATA is not set")

KERNELS = ("exponential", "gaussian")


def unit(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    rows = rng.normal(size=(n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def distances(rows: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """(Q, n) from differences, float64."""
    rows = rows.astype(np.float64)
    return np.stack([np.sqrt(((rows - q) ** 2).sum(axis=1)) for q in queries.astype(np.float64)])


def truth(kernel: str, measured: np.ndarray, h: float) -> np.ndarray:
    exponent = -measured / h if kernel == "exponential" else -0.5 * (measured / h) ** 2
    return np.asarray(logsumexp(exponent, axis=1) - np.log(measured.shape[1]))


def has_int8() -> bool:
    """Whether this run multiplies 8-bit integers four at a time."""
    cpu = Path("/proc/cpuinfo")
    return simd_level() == "avx512" and cpu.exists() and "avx512_vnni" in cpu.read_text()


def bound(precision: str, h: float) -> float:
    if precision == "int8":
        return 5e-3 if h >= 0.1 else np.inf
    return 1e-5 if precision == "float32" else 1e-4 if h >= 0.2 else 5e-4


def check(store: Store, queries: np.ndarray, scale: float = 1.0) -> None:
    """All kernels and bandwidths (of a typical norm) in both kinds of arithmetic against float64."""
    measured = distances(store.rows(np.arange(store.n)), queries)
    relative = (0.03, 0.1, 0.2, 0.5, 1.0)
    for precision in ("float32", "int16", "int8") if has_int8() else ("float32", "int16"):
        kde = KernelDensity(
            kernel=KERNELS, bandwidth=[h * scale for h in relative], normalize=False, precision=precision
        )
        scores = iter(kde.fit(store).score_samples(queries).T)
        for kernel in KERNELS:
            for h in relative:
                expected = truth(kernel, measured, h * scale)
                error = np.abs(next(scores) - expected) / np.maximum(1, np.abs(expected))
                assert error.max() <= bound(precision, h), (store.dtype, precision, kernel, h)


def written(folder: Path, rows: np.ndarray, dtype: str, normalised: bool = True) -> Store:
    with StoreWriter(folder, dtype=dtype, shard_rows=1700, normalised=normalised) as writer:
        writer.append(rows)
    return open_store(folder)


@needs_data
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_embeddings(dtype: str, tmp_path: Path) -> None:
    rows = np.load(f"{DATA}/sentences/embeddings.npy")[:20_000]
    store = convert(rows, tmp_path / "s", dtype=dtype)
    queries = np.load(f"{DATA}/gsm8k/test_questions_minilm.npy").astype(np.float32)
    chosen = np.random.default_rng(0).choice(len(queries), 20, replace=False)
    # Also rows themselves, as they were before they were stored.
    check(store, np.concatenate([queries[chosen], rows[:5000:1000].astype(np.float32)]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [5, 100, 384])
@pytest.mark.parametrize("norm", [1e-3, 1.0, 1e3])
def test_random_vectors(dtype: str, d: int, norm: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(d)
    rows = unit(rng, 4000, d) * np.float32(norm)
    store = written(tmp_path / "s", rows, dtype, normalised=norm == 1)
    check(store, np.concatenate([unit(rng, 20, d) * np.float32(norm), rows[:5]]), scale=norm)


@pytest.mark.parametrize("copies", [1, 50, 5000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_of_a_query_over_several_shards(tmp_path: Path, copies: int, dtype: str) -> None:
    rng = np.random.default_rng(3)
    given = unit(rng, 1, 384)
    rows = unit(rng, 6000, 384)
    places = rng.choice(len(rows), copies, replace=False)
    rows[places] = given
    store = written(tmp_path / "s", rows, dtype)
    stored = store.rows(places[:1])
    for query in (stored, given):  # the row as it is stored, and as it was
        table = KernelDensity(bandwidth=[0.05, 0.3]).fit(store).density(query, neighbors=10)
        measured = distances(store.rows(np.arange(store.n)), query)
        precision = "int16" if dtype == "int8" else "float32"
        for row, h in enumerate((0.05, 0.3)):
            expected = truth("exponential", measured, h)[0]
            found = table.density["log_density"][row].as_py()
            # Where copies dominate they are exact, whatever the arithmetic.
            allowed = 1e-6 if copies > 1 and h == 0.05 else bound(precision, h)
            assert abs(found - expected) <= allowed * max(1, abs(expected))
            assert table.density["precision"][row].as_py() == precision
        assert table.queries["duplicates"][0].as_py() == copies
        nearest = table.queries["nearest_distance"][0].as_py()
        assert nearest == pytest.approx(measured.min(), rel=1e-9, abs=1e-12)
        found = set(table.neighbors["neighbor_id"].to_pylist()[: min(copies, 10)])
        assert found <= {str(place) for place in places}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_corpus_scores_itself_without_its_rows(tmp_path: Path, dtype: str) -> None:
    rows = unit(np.random.default_rng(4), 600, 64)
    rows[7] = 0  # a zero row is a copy of itself too
    corpus = written(tmp_path / "s", rows, dtype, normalised=False)
    queries = written(tmp_path / "q", rows, "float32", normalised=False)
    kde = KernelDensity(bandwidth=0.3).fit(corpus)
    for asked in (corpus, queries):
        table = kde.density(asked, exclude_self=True)
        assert set(table.queries["excluded"].to_pylist()) == {1}
        measured = distances(corpus.rows(np.arange(600)), asked.rows(np.arange(600)))
        np.fill_diagonal(measured, np.inf)
        expected = truth("exponential", measured, 0.3) + np.log(600 / 599)
        allowed = bound("int16" if dtype == "int8" else "float32", 0.3)
        error = np.abs(table.density["log_density"].to_numpy() - expected)
        assert (error <= allowed * np.maximum(1, np.abs(expected))).all()


def test_the_precision_follows_the_rows(tmp_path: Path) -> None:
    rows = unit(np.random.default_rng(5), 100, 8)
    for dtype in DTYPES:
        table = KernelDensity(bandwidth=0.3).fit(written(tmp_path / dtype, rows, dtype)).density(rows[:3])
        expected = "int16" if dtype == "int8" else "float32"
        assert table.run["precision"] == expected
        assert set(table.density["precision"].to_pylist()) == {expected}
    table = KernelDensity(bandwidth=0.3, precision="int16").fit(rows).density(rows[:3])
    assert table.run["precision"] == "int16"
    with pytest.raises(errors.ParameterError, match="int3"):
        KernelDensity(bandwidth=0.3, precision="int3").fit(rows)


def test_int8_is_refused_where_it_would_not_be_faster() -> None:
    rows = unit(np.random.default_rng(7), 50, 40)
    kde = KernelDensity(bandwidth=0.3, precision="int8").fit(rows)
    if has_int8():
        assert kde.density(rows[:2]).run["precision"] == "int8"
    else:
        with pytest.raises(errors.ParameterError, match="int16"):
            kde.density(rows[:2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_read_give_the_same_bytes_as_rows_that_are_mapped(dtype: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    rows, queries = unit(rng, 9000, 48), unit(rng, 40, 48)
    names = [f"g{code}" for code in rng.integers(5, size=len(rows))]
    with StoreWriter(tmp_path / "store", dtype=dtype, shard_rows=5000, normalised=True) as writer:
        writer.append(rows, [str(i) for i in range(len(rows))], names)
    for count in (1, 40):
        tables = [
            KernelDensity(bandwidth=[0.1, 0.5], io=io)
            .fit(tmp_path / "store")
            .density(queries[:count], by_group=True)
            for io in ("mmap", "pread")
        ]
        assert tables[0].density.equals(tables[1].density)
        assert tables[0].neighbors.equals(tables[1].neighbors)
    with pytest.raises(errors.ParameterError, match="unknown io"):
        KernelDensity(bandwidth=0.3, io="magic").fit(rows)


def test_weights_of_a_store_count(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    rows, weights = unit(rng, 300, 8), rng.random(300).astype(np.float32)
    with StoreWriter(tmp_path / "s", dtype="float32", shard_rows=120) as writer:
        writer.append(rows, weights=weights)
    queries = unit(rng, 4, 8)
    kde = KernelDensity(bandwidth=0.3)
    ours = kde.fit(tmp_path / "s").density(queries)
    theirs = KernelDensity(bandwidth=0.3).fit(rows, sample_weight=weights).density(queries)
    np.testing.assert_allclose(ours.density["log_density"], theirs.density["log_density"], rtol=1e-6)
    np.testing.assert_allclose(ours.neighbors["share"], theirs.neighbors["share"], rtol=1e-6)
    with pytest.raises(errors.ParameterError, match="weights"), StoreWriter(tmp_path / "t") as writer:
        writer.append(rows, weights=-weights)
