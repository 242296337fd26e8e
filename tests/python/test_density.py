"""KernelDensity and the density tables against independent truth."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.special import logsumexp

from lmd3 import errors, system
from lmd3.bandwidth import DEFAULT_RULES, Bandwidth, parse_rule, read_bandwidths, split_rules
from lmd3.density import KernelDensity, local_dimension, log_normalizer
from lmd3.results import DENSITY_FILES, DensityTable
from lmd3.store import StoreWriter, open_store

DATA = os.environ.get("LMD3_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="LMD3_DATA is not set: real data is not at hand")


def unit(generator: np.random.Generator, n: int, d: int) -> np.ndarray:
    rows = generator.normal(size=(n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def log_kernel(kernel: str, distance: np.ndarray, h: float) -> np.ndarray:
    return -distance / h if kernel == "exponential" else -0.5 * (distance / h) ** 2


def distances(rows: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """(Q, n) from differences, float64."""
    rows, queries = rows.astype(np.float64), queries.astype(np.float64)
    return np.stack([np.sqrt(((rows - q) ** 2).sum(axis=1)) for q in queries])


def truth(kernel: str, rows: np.ndarray, queries: np.ndarray, h: float) -> np.ndarray:
    return logsumexp(log_kernel(kernel, distances(rows, queries), h), axis=1) - np.log(len(rows))


# --- scikit-learn, at every level this CPU has ---

AGREEMENT = """
import json, sys
import numpy as np
from sklearn.neighbors import KernelDensity as Theirs
from lmd3 import KernelDensity, system

level, kernel = sys.argv[1], sys.argv[2]
assert system.simd_level() == level
worst = 0.0
rng = np.random.default_rng(7)
for d in (1, 3, 8, 64, 384, 1000):
    for n, q in ((1, 1), (2, 2), (15, 17), (16, 16), (17, 33), (95, 31), (96, 32), (97, 2), (400, 3)):
        rows = rng.normal(size=(n, d)).astype(np.float32)
        queries = np.concatenate([rows[:1], rng.normal(size=(q - 1, d)).astype(np.float32)])
        for h in (0.2, 1.0, 4.0):
            # One leaf: with its default leaves of 40 rows scikit-learn cancels bounds against each other and
            # loses all digits in many dimensions.
            theirs = Theirs(kernel=kernel, bandwidth=h, leaf_size=10**6).fit(rows.astype(float))
            reference = theirs.score_samples(queries.astype(float))
            ours = KernelDensity(kernel=kernel, bandwidth=h).fit(rows).score_samples(queries)
            plain = KernelDensity(kernel=kernel, bandwidth=h, normalize=False).fit(rows)
            plain = plain.score_samples(queries)
            from lmd3.density import log_normalizer
            for mine, other in ((ours, reference), (plain, reference + log_normalizer(kernel, d, h))):
                worst = max(worst, float((np.abs(mine - other) / np.maximum(1, np.abs(other))).max()))
print(json.dumps(worst))
"""


@pytest.mark.parametrize("kernel", ["exponential", "gaussian"])
@pytest.mark.parametrize("level", system.simd_levels())
def test_agrees_with_scikit_learn(level: str, kernel: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AGREEMENT, level, kernel],
        env={**os.environ, "LMD3_SIMD": level},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) <= 1e-6


def test_an_unknown_simd_level_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from lmd3 import system; system.simd_level()"],
        env={**os.environ, "LMD3_SIMD": "mmx"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "ParameterError" in done.stderr and "portable" in done.stderr


def test_normalizers_integrate_to_one() -> None:
    for kernel in ("exponential", "gaussian"):
        x = np.linspace(-60, 60, 400_001)
        integral = np.trapezoid(np.exp(log_kernel(kernel, np.abs(x), 1.3)), x)
        assert log_normalizer(kernel, 1, 1.3) == pytest.approx(np.log(integral), abs=1e-6)
        # In d dimensions the shell at radius r has area 2π^{d/2} r^{d−1} / Γ(d/2).
        r, d = np.linspace(1e-9, 80, 400_001), 4
        integral = np.trapezoid(2 * np.pi**2 * r**3 * np.exp(log_kernel(kernel, r, 0.7)), r)
        assert log_normalizer(kernel, d, 0.7) == pytest.approx(np.log(integral), abs=1e-6)


# --- scikit-learn's manners ---


def test_manners() -> None:
    from sklearn.base import clone
    from sklearn.neighbors import NearestNeighbors

    rng = np.random.default_rng(0)
    rows, queries = unit(rng, 300, 20), unit(rng, 7, 20)
    kde = KernelDensity(kernel="gaussian", bandwidth=0.5)
    assert clone(kde).get_params() == kde.get_params()
    assert kde.set_params(bandwidth=0.4).bandwidth == 0.4
    with pytest.raises(errors.ParameterError):
        kde.set_params(leaf_size=3)
    with pytest.raises(errors.ParameterError, match="fit"):
        kde.score_samples(queries)
    kde.fit(rows)
    assert kde.bandwidth_ == 0.4
    assert kde.score(queries) == pytest.approx(kde.score_samples(queries).sum())
    several = KernelDensity(kernel=["exponential", "gaussian"], bandwidth=[0.2, 0.4]).fit(rows)
    assert several.score_samples(queries).shape == (7, 4)
    assert np.array_equal(several.score_samples(queries)[:, 3], kde.score_samples(queries))
    distance, index = kde.kneighbors(queries, 6)
    reference = NearestNeighbors(n_neighbors=6, algorithm="brute").fit(rows.astype(float)).kneighbors(queries)
    assert np.array_equal(index, reference[1])
    np.testing.assert_allclose(distance, reference[0], rtol=1e-6)
    assert np.array_equal(kde.kneighbors(queries, 6, return_distance=False), index)
    with pytest.raises(errors.ParameterError):
        kde.kneighbors(queries, 301)


def test_weights() -> None:
    rng = np.random.default_rng(1)
    rows, queries = unit(rng, 200, 40), unit(rng, 9, 40)
    weights = rng.uniform(0, 3, 200).astype(np.float32)
    weights[::7] = 0
    for kernel in ("exponential", "gaussian"):
        kde = KernelDensity(kernel=kernel, bandwidth=0.3, normalize=False).fit(rows, sample_weight=weights)
        logs = log_kernel(kernel, distances(rows, queries), 0.3)
        expected = logsumexp(logs, axis=1, b=weights.astype(float)) - np.log(weights.astype(float).sum())
        np.testing.assert_allclose(kde.score_samples(queries), expected, rtol=1e-6)
        table = kde.density(queries, neighbors=200)
        shares = table.neighbors.to_pandas().groupby("id")["share"].sum()
        np.testing.assert_allclose(shares, 1.0, atol=1e-5)
    for bad in (weights[:-1], -weights, np.zeros(200), np.full(200, np.nan)):
        with pytest.raises(errors.InputError):
            KernelDensity(bandwidth=1.0).fit(rows, sample_weight=bad)


def test_bad_rows_and_queries_are_refused() -> None:
    rng = np.random.default_rng(2)
    rows = unit(rng, 30, 8)
    kde = KernelDensity(bandwidth=0.3)
    broken = rows.copy()
    broken[17, 3] = np.nan
    for bad in (broken, broken.astype(np.float64)):
        with pytest.raises(errors.NotFiniteError) as caught:
            kde.fit(bad).score_samples(rows)
        assert caught.value.row == 17
    with pytest.raises(errors.NotFiniteError):
        kde.fit(rows).score_samples(broken)
    with pytest.raises(errors.ShapeError, match="dimensions"):
        kde.fit(rows).score_samples(rows[:, :5])
    for bad in (np.zeros((3, 4), dtype=np.int64), np.array([["a", "b"]], dtype=object)):
        with pytest.raises(errors.DtypeError):
            kde.fit(bad)
    for bad in (
        np.zeros((0, 4), dtype=np.float32),
        np.zeros((4, 0), dtype=np.float32),
        np.zeros(4, dtype=np.float32),
    ):
        with pytest.raises(errors.ShapeError):
            kde.fit(bad)
    for parameters in (
        {"kernel": "cosine"},
        {"kernel": []},
        {"kernel": ["gaussian", "gaussian"]},
        {"bandwidth": 0.0},
        {"bandwidth": -1.0},
        {"bandwidth": float("nan")},
        {"bandwidth": "wide"},
        {"bandwidth": "ess=0"},
        {"bandwidth": "ess=1"},
        {"bandwidth": []},
        {"bandwidth": [0.1, 0.1]},
        {"bandwidth": "@missing.json"},
    ):
        with pytest.raises(errors.InputError):
            KernelDensity(**parameters).fit(rows)


# --- copies, threads, groups, exclusions ---


def shards(folder: Path, rows: np.ndarray, shard_rows: int, dtype: str = "float32", groups=None, ids=None):
    with StoreWriter(folder, dtype=dtype, shard_rows=shard_rows) as writer:
        writer.append(rows, ids or [str(i) for i in range(len(rows))], groups=groups)
        return writer.close()


@pytest.mark.parametrize("copies", [1, 50, 5000])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_copies_of_a_query_over_several_shards(tmp_path: Path, copies: int, dtype: str) -> None:
    rng = np.random.default_rng(3)
    query = unit(rng, 1, 384)
    if dtype == "float16":
        query = query.astype(np.float16).astype(np.float32)
    rows = unit(rng, 12_000, 384)
    rows[rng.choice(len(rows), copies, replace=False)] = query
    store = shards(tmp_path / "s.lmd3", rows, 5000, dtype)
    stored = rows.astype(dtype)
    table = KernelDensity(bandwidth=0.05).fit(store).density(query)
    expected = truth("exponential", stored, query, 0.05)
    assert abs(table.density["log_density"][0].as_py() - expected[0]) <= 1e-5
    assert table.queries["duplicates"][0].as_py() == copies


def test_the_same_bytes_for_any_number_of_threads(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    rows, queries = unit(rng, 30_000, 48), unit(rng, 70, 48)
    names = ["a", "b", "c"]
    groups = [names[i] for i in rng.integers(0, 3, len(rows))]
    store = shards(tmp_path / "s.lmd3", rows, 11_000, groups=groups)
    tables = []
    for threads in (1, 2, 3, 7):
        kde = KernelDensity(kernel=["exponential", "gaussian"], bandwidth=[0.1, 0.3], threads=threads)
        tables.append(kde.fit(store).density(queries, by_group=True))
    for table in tables[1:]:
        for name in ("density", "queries", "neighbors"):
            assert getattr(table, name).equals(getattr(tables[0], name)), name


def test_groups_add_up_and_equal_their_own_stores(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    rows, queries = unit(rng, 900, 16), unit(rng, 11, 16)
    groups = np.array(["web", "books", "code"])[rng.integers(0, 3, 900)]
    store = shards(tmp_path / "s.lmd3", rows, 350, groups=groups.tolist())
    table = KernelDensity(bandwidth=[0.2]).fit(store).density(queries, by_group=True).density.to_pandas()
    whole = table[table["group"].isna()]
    parts = table[table["group"].notna()].pivot(index="id", columns="group", values="kernel_sum_log")
    np.testing.assert_allclose(
        logsumexp(parts.loc[whole["id"]].to_numpy(), axis=1), whole["kernel_sum_log"], rtol=1e-12
    )
    for name in ("web", "books", "code"):
        mine = table[table["group"] == name]
        np.testing.assert_allclose(
            mine["log_density"], truth("exponential", rows[groups == name], queries, 0.2), rtol=1e-6
        )
        assert (mine["rows_evaluated"] == (groups == name).sum()).all()
    with pytest.raises(errors.ParameterError, match="groups"):
        KernelDensity(bandwidth=0.2).fit(rows).density(queries, by_group=True)


def test_leaving_out_the_query_itself_and_near_copies(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    rows = unit(rng, 400, 24)
    rows[100] = rows[7]  # an exact copy of a query under another id
    store = shards(tmp_path / "s.lmd3", rows, 150, ids=[f"t{i}" for i in range(400)])
    chosen = [3, 7, 250]
    queries = shards(tmp_path / "q.lmd3", rows[chosen], 10, ids=[f"t{i}" for i in chosen])
    kde = KernelDensity(bandwidth=0.1).fit(store)
    table = kde.density(queries, exclude_self=True)
    for at, row in enumerate(chosen):
        expected = truth("exponential", np.delete(rows, row, axis=0), rows[[row]], 0.1)
        assert table.density["log_density"][at].as_py() == pytest.approx(expected[0], rel=1e-6)
    assert table.queries["excluded"].to_pylist() == [1, 1, 1]
    assert table.queries["duplicates"].to_pylist() == [0, 1, 0]
    assert table.queries["nearest_id"][1].as_py() == "t100"
    whole = kde.density(store, exclude_self=True)
    assert whole.queries["excluded"].to_pylist() == [1] * 400
    near = kde.density(queries, exclude_within=0.5)
    assert near.queries["excluded"].to_pylist() == [1, 2, 1]
    expected = truth("exponential", np.delete(rows, [7, 100], axis=0), rows[[7]], 0.1)
    assert near.density["log_density"][1].as_py() == pytest.approx(expected[0], rel=1e-6)
    strangers = shards(tmp_path / "x.lmd3", unit(rng, 3, 24), 10, ids=["t1", "t2", "new"])
    with pytest.raises(errors.JoinError, match="another vector"):
        kde.density(strangers, exclude_self=True)
    unknown = shards(tmp_path / "y.lmd3", unit(rng, 2, 24), 10, ids=["u1", "u2"])
    with pytest.raises(errors.JoinError, match="no query"):
        kde.density(unknown, exclude_self=True)


def test_typicality_cosines_and_shares_of_rows_of_any_norm() -> None:
    rng = np.random.default_rng(8)
    rows = (rng.normal(size=(500, 12)) * rng.uniform(0.1, 9, (500, 1))).astype(np.float32)
    queries = rng.normal(size=(20, 12)).astype(np.float32)
    table = KernelDensity(bandwidth=2.0).fit(rows).density(queries, neighbors=4)
    x, q = rows.astype(float), queries.astype(float)
    cosine = (q @ x.T) / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(x, axis=1)
    mean = x.mean(axis=0)
    frame = table.queries.to_pandas()
    np.testing.assert_allclose(frame["max_cosine"], cosine.max(axis=1), atol=1e-6)
    np.testing.assert_allclose(
        frame["typicality"], q @ mean / np.linalg.norm(q, axis=1) / np.linalg.norm(mean), atol=1e-6
    )
    distance = distances(rows, queries)
    order = np.argsort(distance, axis=1, kind="stable")[:, :4]
    neighbors = table.neighbors.to_pandas()
    assert neighbors["neighbor_id"].tolist() == [str(i) for i in order.ravel()]
    assert neighbors["rank"].tolist() == [1, 2, 3, 4] * 20
    np.testing.assert_allclose(
        neighbors["distance"], np.take_along_axis(distance, order, 1).ravel(), rtol=1e-6
    )
    np.testing.assert_allclose(neighbors["cosine"], np.take_along_axis(cosine, order, 1).ravel(), atol=1e-6)
    kernel = np.exp(-distance / 2.0)
    share = kernel / kernel.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(neighbors["share"], np.take_along_axis(share, order, 1).ravel(), rtol=1e-5)
    ess = kernel.sum(axis=1) ** 2 / (kernel**2).sum(axis=1)
    np.testing.assert_allclose(table.density["ess"].to_numpy(), ess, rtol=1e-5)
    np.testing.assert_allclose(
        frame["local_dimension"], local_dimension(np.sort(distance, axis=1)[:, :4]), rtol=1e-4
    )


def test_local_dimension_is_hills_estimator() -> None:
    distance = np.array([[0.0, 0.5, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0], [0.1, 0.2, 0.4, 0.8]])
    found = local_dimension(distance)
    assert found[0] == pytest.approx(-1 / np.mean(np.log([0.25, 0.5])))  # the zero distance is left out
    assert np.isnan(found[1])
    assert found[2] == pytest.approx(-1 / np.mean(np.log([0.125, 0.25, 0.5])))


def test_no_neighbours_and_fewer_rows_than_neighbours() -> None:
    rng = np.random.default_rng(9)
    rows = unit(rng, 3, 5)
    table = KernelDensity(bandwidth=0.4).fit(rows).density(unit(rng, 2, 5), neighbors=10)
    assert table.neighbors.num_rows == 6
    table = KernelDensity(bandwidth=0.4).fit(rows).density(unit(rng, 2, 5), neighbors=0)
    assert table.neighbors.num_rows == 0 and table.queries["max_cosine"].null_count == 0


# --- bandwidth rules ---


def test_rules_reach_their_targets_and_are_resolved_once() -> None:
    rng = np.random.default_rng(10)
    rows, queries = unit(rng, 4000, 16), unit(rng, 300, 16)
    for kernel in ("exponential", "gaussian"):
        kde = KernelDensity(kernel=kernel, bandwidth=["ess=100", 0.3, "mass=5"]).fit(rows)
        table = kde.density(queries)
        by_rule = {entry.rule: entry for entry in kde.bandwidths_}
        frame = table.density.to_pandas()
        ess = frame[frame["rule"] == "ess=100"]["ess"].median()
        mass = np.exp(frame[frame["rule"] == "mass=5"]["kernel_sum_log"]).median()
        assert ess == pytest.approx(100, rel=0.01) and mass == pytest.approx(5, rel=0.01)
        assert by_rule["ess=100"].achieved == pytest.approx(ess, rel=1e-6)
        assert by_rule["ess=100"].achieved_low < ess < by_rule["ess=100"].achieved_high
        assert by_rule["0.3"].bandwidth == 0.3 and by_rule["0.3"].achieved is None
        first = kde.bandwidths_
        kde.score_samples(unit(rng, 50, 16) * 1.0)
        assert kde.bandwidths_ is first
    fitted = KernelDensity(bandwidth="ess=100").fit(rows, queries=queries)
    assert fitted.bandwidth_ == pytest.approx(
        KernelDensity(bandwidth="ess=100").fit(rows).resolve(queries)[0].bandwidth
    )


def test_the_default_grid_drops_what_the_corpus_cannot_carry() -> None:
    kept, notices = split_rules(DEFAULT_RULES, ["exponential"], 3000, defaults=True)
    assert [rule.text for rule in kept] == ["ess=100", "ess=10"] and "ess=1000" in notices[0]
    kept, notices = split_rules(DEFAULT_RULES, ["exponential"], 50_000, defaults=True)
    assert [rule.text for rule in kept] == ["ess=1000", "ess=10", "ess=100", "ess=10000"] and not notices
    with pytest.raises(errors.ParameterError, match="quarter") as caught:
        split_rules(["ess=1000"], ["exponential"], 3000, defaults=False)
    assert "ess=750" in str(caught.value)
    with pytest.raises(errors.ParameterError, match="too few"):
        split_rules(DEFAULT_RULES, ["exponential"], 30, defaults=True)


def test_an_unreachable_target_is_refused() -> None:
    rng = np.random.default_rng(11)
    rows = np.repeat(unit(rng, 20, 8), 50, axis=0)  # every text fifty times: never below ess 50
    with pytest.raises(errors.ParameterError, match="near-copies"):
        KernelDensity(bandwidth="ess=10").fit(rows).score_samples(rows[::50])


def test_files_of_bandwidths(tmp_path: Path) -> None:
    rng = np.random.default_rng(12)
    rows, queries = unit(rng, 500, 8), unit(rng, 40, 8)
    table = (
        KernelDensity(kernel=["gaussian", "exponential"], bandwidth=["ess=20", 0.5])
        .fit(rows)
        .density(queries)
    )
    folder = table.save(tmp_path / "d")
    again = KernelDensity(bandwidth=f"@{folder / 'bandwidth.json'}").fit(rows).density(queries)
    assert again.density.equals(table.density)
    assert [entry.kernel for entry in read_bandwidths(folder / "bandwidth.json")] == ["gaussian"] * 2 + [
        "exponential"
    ] * 2
    for text in (
        "{",
        "[]",
        '{"format": 2, "bandwidths": []}',
        '{"format": 1, "bandwidths": [{"kernel": "gaussian"}]}',
        '{"format": 1, "bandwidths": []}',
        '{"format": 1, "bandwidths": [{"kernel": "x", "bandwidth": -1, "rule": ""}]}',
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(errors.FormatError):
            read_bandwidths(tmp_path / "bad.json")
    assert parse_rule(0.1).text == "0.1"
    assert Bandwidth("gaussian", 0.1, "0.1").to_dict()["rule"] == "0.1"


# --- files, signals, real data ---


def test_tables_come_back_as_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(13)
    table = KernelDensity(bandwidth=0.3).fit(unit(rng, 50, 6)).density(unit(rng, 5, 6))
    folder = table.save(tmp_path / "d")
    assert sorted(path.name for path in folder.iterdir()) == sorted(DENSITY_FILES)
    loaded = DensityTable.load(folder)
    assert loaded.density.equals(table.density) and loaded.run == json.loads(json.dumps(table.run))
    assert loaded.primary["bandwidth"] == 0.3
    (folder / "neighbors.parquet").unlink()
    with pytest.raises(errors.FileMissingError, match=r"neighbors\.parquet"):
        DensityTable.load(folder)
    (folder / "neighbors.parquet").write_bytes(b"junk")
    with pytest.raises(errors.FormatError):
        DensityTable.load(folder)
    with pytest.raises(errors.FileMissingError):
        DensityTable.load(tmp_path / "nothing")


def test_ctrl_c_stops_a_scan_within_a_second() -> None:
    code = (
        "import numpy as np, lmd3\n"
        "rows = np.random.default_rng(0).normal(size=(60_000, 256)).astype(np.float32)\n"
        "kde = lmd3.KernelDensity(bandwidth=[1.0] + [2.0 + i for i in range(40)]).fit(rows)\n"
        "print('go', flush=True)\n"
        "kde.score_samples(rows)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(1.0)
        assert process.poll() is None, "the scan was too short to be stopped"
        process.send_signal(signal.SIGINT)
        stopped = time.monotonic()
        _, stderr = process.communicate(timeout=60)
        # A second for the scan, and some for a busy machine to end the interpreter.
        assert time.monotonic() - stopped < 3.0
        assert process.returncode != 0 and b"KeyboardInterrupt" in stderr


@needs_data
def test_real_embeddings_equal_a_float64_table() -> None:
    rows = np.load(f"{DATA}/sentences/embeddings.npy")[:7473]
    queries = np.load(f"{DATA}/gsm8k/test_questions_minilm.npy").astype(np.float32)
    kernels = ["exponential", "gaussian"]
    table = KernelDensity(kernel=kernels, bandwidth=[0.05, 0.1, 0.2]).fit(rows).density(queries)
    frame = table.density.to_pandas()
    chosen = np.random.default_rng(0).choice(len(queries), 150, replace=False)
    for kernel in kernels:
        for h in (0.05, 0.1, 0.2):
            mine = frame[(frame["kernel"] == kernel) & (frame["bandwidth"] == h)]["log_density"].to_numpy()[
                chosen
            ]
            expected = truth(kernel, rows, queries[chosen], h)
            assert (np.abs(mine - expected) <= 1e-5 * np.maximum(1, np.abs(expected))).all()
            if kernel == "exponential":
                assert np.abs(mine - expected).max() <= 1e-5


def test_the_command_writes_the_tables(tmp_path: Path) -> None:
    rng = np.random.default_rng(14)
    np.save(tmp_path / "rows.npy", unit(rng, 300, 8))
    np.save(tmp_path / "queries.npy", unit(rng, 20, 8))
    command = [
        sys.executable,
        "-m",
        "lmd3",
        "density",
        "rows.npy",
        "queries.npy",
        "--bandwidth",
        "0.3",
        "-o",
        "out",
    ]
    done = subprocess.run([*command, "--json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["queries"] == 20
    written = pq.read_table(tmp_path / "out" / "density.parquet")
    expected = truth("exponential", np.load(tmp_path / "rows.npy"), np.load(tmp_path / "queries.npy"), 0.3)
    np.testing.assert_allclose(written["log_density"].to_numpy(), expected, rtol=1e-6)
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 2 and "--force" in again.stderr
    one = ["bandwidth", "rows.npy", "queries.npy", "--bandwidth", "ess=20", "-o", "b.json"]
    done = subprocess.run([sys.executable, "-m", "lmd3", *one], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_bandwidths(tmp_path / "b.json")[0].achieved == pytest.approx(20, rel=0.02)
    for bad in (["--kernel", "cosine"], ["--bandwidth", "0"], ["--precision", "int3"], ["--method", "magic"]):
        base = [*command[:-4], *bad, "-o", "other"]
        done = subprocess.run(base, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("lmd3: "), done.stderr
        assert not (tmp_path / "other").exists()


def test_queries_of_another_model_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(15)
    encoder = {"kind": "hashing", "model": "hashing", "dim": 8, "fingerprint": "aa"}
    stores = []
    for name, fingerprint in (("a", "aa"), ("b", "bb")):
        with StoreWriter(
            tmp_path / name, dtype="float32", encoder={**encoder, "fingerprint": fingerprint}
        ) as writer:
            writer.append(unit(rng, 30, 8), [str(i) for i in range(30)])
            stores.append(writer.close())
    kde = KernelDensity(bandwidth=0.3).fit(stores[0])
    kde.density(open_store(stores[0].path))
    with pytest.raises(errors.ModelError, match="fingerprint"):
        kde.density(stores[1])
