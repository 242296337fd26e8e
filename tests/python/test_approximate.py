"""Estimated kernel sums against float64 truth: unbiased, honest about errors, the same in any company."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

import lmd3
from lmd3 import errors
from lmd3.cli import main
from lmd3.density import KernelDensity, audit
from lmd3.density.estimated_sums import Sums
from lmd3.density.methods import parse_tolerance
from lmd3.index import Index, draw_keys, neighbor_sums, sample_rows
from lmd3.results import DensityTable
from lmd3.store import Store, StoreWriter, open_store
from lmd3.store.sampling import SampleCounter

N, D = 20_000, 32


def mixture(n: int, seed: int, clusters: int = 60) -> np.ndarray:
    """Unit vectors in clusters of very different sizes and widths."""
    centres = np.random.default_rng(99).normal(size=(clusters, D))
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.full(clusters, 0.7)) if seed == 0 else np.full(clusters, 1 / clusters)
    which = rng.choice(clusters, size=n, p=share)
    rows = centres[which] + (0.2 + 0.1 * (which % 7))[:, None] * rng.normal(size=(n, D))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    rows = mixture(N, 0)
    rows[500:540] = rows[500]  # copies of one row
    rng = np.random.default_rng(5)
    path = tmp_path_factory.mktemp("corpus") / "corpus.lmd3"
    with StoreWriter(path, dtype="float16", shard_rows=7000) as writer:
        writer.append(
            rows,
            groups=[f"g{g}" for g in rng.choice(4, p=[0.6, 0.3, 0.09, 0.01], size=N)],
            weights=rng.uniform(0.2, 2.0, size=N),
        )
    return open_store(path)


@pytest.fixture(scope="module")
def index(store: Store) -> Index:
    return Index.build(store)


@pytest.fixture(scope="module")
def queries(store: Store) -> np.ndarray:
    """Typical ones, then an exact copy of 40 equal rows, a copy of one row, and one far from everything."""
    far = -store.rows(np.arange(1000)).mean(axis=0, keepdims=True)
    far /= np.linalg.norm(far)
    return np.concatenate([mixture(13, 1), store.rows(np.array([510, 77])), far]).astype(np.float32)


KERNELS = [("exponential", 0.08), ("exponential", 0.2), ("gaussian", 0.25)]


def truth(store: Store, queries: np.ndarray, kernels: list[tuple[str, float]]) -> np.ndarray:
    """Kernel sums (Q, B, G) by group, float64 from differences."""
    rows = store.rows(np.arange(store.n)).astype(np.float64)
    weights, codes = store.weights(), store.group_codes()
    assert codes is not None
    w = np.ones(store.n) if weights is None else weights.astype(np.float64)
    out = np.empty((len(queries), len(kernels), len(store.groups)))
    for i, q in enumerate(queries.astype(np.float64)):
        squared = ((rows - q) ** 2).sum(1)
        for b, (kernel, h) in enumerate(kernels):
            k = w * np.exp(-np.sqrt(squared) / h if kernel == "exponential" else -squared / (2 * h * h))
            out[i, b] = np.bincount(codes, k, minlength=len(store.groups))
    return out


def rows_of(q: int, rows: int) -> np.ndarray:
    return np.full(q, rows, np.uint64)


def keys(q: int) -> np.ndarray:
    return draw_keys([f"query {i}" for i in range(q)])


# --- the reference: the same estimator, slow and plain ---


def reference(
    index: Index,
    rows: np.ndarray,
    weights: np.ndarray,
    q: np.ndarray,
    h: float,
    budget: int,
    rng: np.random.Generator,
) -> tuple[float, float]:
    """The stratified estimate of Σ w exp(−D/h) and its variance, as the formulas of the method read.

    Lists by distance to their mean (for the near ones), one draw after the other, no short runs: light lists
    are drawn by single rows.
    """
    sizes, means = index.native.sizes.astype(int), index.native.means.astype(np.float64)
    weight, tr, s4, _ = index.native.moments.T
    kappa, ends = np.array(index.manifest["kappa"]), np.cumsum(sizes)
    dm = ((means - q) ** 2).sum(1)
    order = index.native.nearest_lists(q[None].astype(np.float32), len(sizes))[0]
    place = np.empty(len(sizes), int)
    place[order[order >= 0]] = np.arange((order >= 0).sum())
    bins = np.searchsorted([0.005, 0.02, 0.08, 0.25], (place + 1) / len(sizes))
    u, v = dm + tr, s4 + 2 * 4 * kappa[bins] * dm * tr / D
    g, g1, g2 = -np.sqrt(u) / h, -0.5 / (h * np.sqrt(u)), 0.25 / (h * u**1.5)
    t = np.minimum(v * g1**2, 6)
    mu = np.exp(np.minimum(0, g + np.minimum(v * g1**2, 3) / 2 + v * g2 / 2))
    r = np.exp(np.minimum(0, g + t / 2 + v * g2 / 2)) * np.sqrt(np.expm1(t) - t + 0.003)
    # Where few of a list's rows decide: one of them, at the edge that so many reach.
    n = np.maximum(sizes, 1)
    inner, outer = np.sqrt(np.load(index.path / "moments.npy")[:, 6:].T)
    least = np.maximum(np.maximum(np.sqrt(dm) - outer, inner - np.sqrt(dm)), 0) ** 2
    edge = np.maximum(np.maximum(u - np.sqrt(2 * np.log(n) * v), least), 1e-12)
    tail = v * g1**2 > np.maximum(0.35 * np.log(n), 1)
    r = np.where(tail, np.exp(-np.sqrt(edge) / h) / np.sqrt(n), r)

    def values(c: int, chosen: np.ndarray) -> np.ndarray:
        at = ends[c] - sizes[c] + chosen
        squared = ((rows[at] - q) ** 2).sum(1)
        return weights[at] * (np.exp(-np.sqrt(squared) / h) - mu[c] * (1 + g1[c] * (squared - u[c])))

    whole = np.zeros(len(sizes), bool)
    read = 0
    for rank, c in enumerate(order[order >= 0]):
        if rank >= 2 and read + sizes[c] > 0.4 * budget:
            break
        whole[c], read = True, read + sizes[c]
    z = float(weight @ mu)
    for c in np.flatnonzero(whole):
        z += values(c, np.arange(sizes[c])).sum()
    rest = ~whole & (sizes > 0)
    p = np.where(rest, 0.9 * sizes * r * weight / np.maximum(sizes, 1), 0)
    p = p / p.sum() * 0.9 + 0.1 * np.where(rest, sizes, 0) / sizes[rest].sum()
    draws = max(budget - read, budget // 4)
    lists = rng.choice(len(sizes), size=draws, p=p)
    found = np.array([sizes[c] * values(c, rng.integers(sizes[c], size=1))[0] / p[c] for c in lists])
    return z + found.mean(), found.var(ddof=1) / draws


def test_no_worse_than_the_plain_reference(store: Store, index: Index, queries: np.ndarray) -> None:
    ids = index.native.ids.astype(int)
    weights = store.weights()
    assert weights is not None
    rows, w = store.rows(ids).astype(np.float64), weights[ids].astype(np.float64)
    chosen, h, budget, seeds = queries[:4], 0.2, 1200, 30
    exact = truth(store, chosen, [("exponential", h)])[:, 0].sum(-1)
    plain = np.array(
        [
            [
                reference(index, rows, w, q.astype(float), h, budget, np.random.default_rng(s))[0]
                for q in chosen
            ]
            for s in range(seeds)
        ]
    )
    ours = np.array(
        [
            np.exp(
                index.stage(chosen, keys(4), [("exponential", h)], rows_of(4, budget), seed=s)["log_sum"][
                    :, 0
                ]
            )
            for s in range(seeds)
        ]
    )
    theirs, mine = (np.sqrt(((x / exact - 1) ** 2).mean()) for x in (plain, ours))
    assert abs((plain / exact - 1).mean()) < 4 * theirs / math.sqrt(seeds * 4)
    # Runs of rows within a list, and none drawn twice: at least as good, up to the noise of 120 squares.
    assert mine < 1.25 * theirs
    assert theirs < 0.05


# --- what must hold of any estimator ---


def test_all_rows_are_the_exact_sum(store: Store, index: Index, queries: np.ndarray) -> None:
    exact = truth(store, queries, KERNELS)
    found = index.stage(queries, keys(len(queries)), KERNELS, rows_of(len(queries), 10 * N), by_group=True)
    assert np.allclose(found["log_sum"], np.log(exact.sum(-1)), atol=2e-6)
    assert (found["variance"] == 0).all() and (found["flags"] == 0).all() and (found["rows"] == N).all()
    assert np.allclose(found["group_log_sum"].transpose(0, 2, 1), np.log(exact), atol=2e-6)
    near = index.query(queries, 50)[0]
    deann = sample_rows(store, queries, keys(len(queries)), KERNELS, N, near=near)
    assert (
        np.allclose(deann["log_sum"], np.log(exact.sum(-1)), atol=2e-6) and (deann["variance"] < 1e-12).all()
    )
    plain = sample_rows(store, queries, keys(len(queries)), KERNELS, N)
    assert np.allclose(plain["log_sum"], np.log(exact.sum(-1)), atol=2e-6)


def test_unbiased_with_honest_errors_in_every_cell(store: Store, index: Index, queries: np.ndarray) -> None:
    """Copies and outliers included: |mean error| within 4 of its standard errors, per query and kernel."""
    exact = truth(store, queries, KERNELS)
    seeds, q = 60, len(queries)
    found = [
        index.stage(queries, keys(q), KERNELS, rows_of(q, 1000), by_group=True, seed=s) for s in range(seeds)
    ]
    z = np.exp(np.array([f["log_sum"] for f in found])) / exact.sum(-1)
    bias = (z.mean(0) - 1) / np.maximum(z.std(0, ddof=1) / math.sqrt(seeds), 1e-6)
    assert np.abs(bias).max() < 4.2, bias  # 48 cells
    assert np.abs((z - 1).mean(axis=(0, 1))).max() < 0.02
    groups = np.exp(np.array([f["group_log_sum"] for f in found])).transpose(0, 1, 3, 2)
    # Where none came out negative (and so as 0). Distances to mean rows are in single precision.
    whole = (groups > 0).all(-1)
    assert whole.mean() > 0.5 and np.allclose(groups.sum(-1)[whole], (z * exact.sum(-1))[whole], rtol=3e-6)
    share = groups / exact
    bias = (share.mean(0) - 1) / np.maximum(share.std(0, ddof=1) / math.sqrt(seeds), 1e-5)
    assert (np.abs(bias) < 4.2).mean() > 0.99
    # Intervals of 95 % where many rows decide. (Where few do, draws can't know what they never met: that is
    # the audit's part, see `test_what_few_rows_decide_goes_exact`.)
    error = np.log(z)
    df, variance = (np.array([f[name] for f in found]) for name in ("df", "variance"))
    covered = np.abs(error) <= stats.t.ppf(0.975, df) * np.sqrt(variance) + 2e-5
    assert covered[..., 1].mean() > 0.93
    rms = np.sqrt((error**2).mean(axis=(0, 1)))
    assert (rms < [0.08, 0.01, 0.08]).all(), rms
    plain = np.array(
        [sample_rows(store, queries, keys(q), KERNELS, 1000, seed=s)["log_sum"] for s in range(10)]
    )
    assert (rms < np.sqrt(((plain - np.log(exact.sum(-1))) ** 2).mean(axis=(0, 1))) / 3).all()


def test_the_same_in_any_company(store: Store, index: Index, queries: np.ndarray) -> None:
    q = len(queries)
    together = index.stage(queries, keys(q), KERNELS, rows_of(q, 900), by_group=True, threads=2)
    for chosen in ([3], [15, 2, 7]):
        alone = index.stage(
            queries[chosen], keys(q)[chosen], KERNELS, rows_of(len(chosen), 900), by_group=True, threads=1
        )
        for name in alone:
            assert np.array_equal(alone[name], together[name][chosen], equal_nan=True), name
    other = index.stage(queries, keys(q), KERNELS, rows_of(q, 900), stage=2)
    assert not np.array_equal(other["log_sum"], together["log_sum"])
    near = index.query(queries, 20)[0]
    for options in ({}, {"near": near}, {"moments": (index.mean, index.manifest["sq_norm"])}):
        whole = sample_rows(store, queries, keys(q), KERNELS, 300, **options)
        part = {k: v[[4]] if k == "near" else v for k, v in options.items()}
        one = sample_rows(store, queries[[4]], keys(q)[[4]], KERNELS, 300, **part, threads=1)
        assert np.array_equal(one["log_sum"][0], whole["log_sum"][4])


def test_sampling_and_deann_are_unbiased_and_the_variate_helps(
    store: Store, index: Index, queries: np.ndarray
) -> None:
    wide = [("exponential", 1.0), ("gaussian", 1.0)]
    # Equal weights, in random order: unequal ones vary more than these kernels do.
    shuffled = open_store(store.rows(np.random.default_rng(3).permutation(store.n)))
    rows = shuffled.rows(np.arange(N)).astype(np.float64)
    squared = ((rows[None] - queries[:, None].astype(np.float64)) ** 2).sum(-1)
    exact = np.stack([np.exp(-np.sqrt(squared)).sum(1), np.exp(-squared / 2).sum(1)], axis=1)
    q, seeds = len(queries), 80
    near = np.argsort(squared, axis=1)[:, :100]
    moments = (rows.mean(0), float((rows**2).sum(1).mean()))
    rms = {}
    for name, options in (("plain", {}), ("variate", {"moments": moments}), ("deann", {"near": near})):
        z = (
            np.array(
                [
                    np.exp(sample_rows(shuffled, queries, keys(q), wide, 400, seed=s, **options)["log_sum"])
                    for s in range(seeds)
                ]
            )
            / exact
        )
        bias = (z.mean(0) - 1) / (z.std(0, ddof=1) / math.sqrt(seeds))
        assert np.abs(bias).max() < 4.2, name
        rms[name] = np.sqrt(((z - 1) ** 2).mean())
    assert rms["variate"] < 0.5 * rms["plain"]
    assert rms["deann"] < 1.3 * rms["plain"], "neighbours do not matter where kernels are wide"
    z = np.array(
        [
            np.exp(sample_rows(shuffled, queries, keys(q), wide, 400, seed=s, permuted=True)["log_sum"])
            for s in range(seeds)
        ]
    )
    plain = np.array([np.exp(sample_rows(shuffled, queries, keys(q), wide, shuffled.n)["log_sum"])])
    assert abs((z / plain - 1).mean()) < 0.01
    sums = neighbor_sums(index.kneighbors(queries, 100)[0], wide)
    assert (np.exp(sums["log_sum"]) < 2.1 * exact).all() and np.isnan(sums["variance"]).all()


def test_the_rounding_of_the_copy_is_in_the_error(tmp_path: Path) -> None:
    """Copies of rows at a narrow kernel: their own rounding, far above the arithmetic's, decides the sum."""
    rng = np.random.default_rng(8)
    rows = mixture(4000, 0)
    store, queries, kernels = open_store(rows), rows[rng.choice(4000, 40)], [("exponential", 0.02)]
    squared = ((rows[None].astype(np.float64) - queries[:, None].astype(np.float64)) ** 2).sum(-1)
    exact = np.log(np.exp(-np.sqrt(squared) / 0.02).sum(1))
    for dtype, least in (("float32", 0.0), ("float16", 1e-3), ("int8", 1e-2)):
        index = Index.build(store, tmp_path / dtype, dtype=dtype)
        found = index.stage(queries, keys(40), kernels, rows_of(40, 10 * 4000))
        error, spread = np.abs(found["log_sum"][:, 0] - exact), np.sqrt(found["variance"][:, 0])
        assert (error <= 3 * spread + 2e-5).all(), dtype
        assert (error.max() < 2e-5) if least == 0 else (error.max() > least), dtype
        assert (spread.max() == 0) == (least == 0)
        # Of the size of the error, not of any size.
        assert spread.max() < 30 * max(error.max(), 1e-9), dtype


def test_many_groups_by_their_shares_of_the_draws(tmp_path: Path) -> None:
    """More groups than have moments: unbiased, their standard errors honest, null where few draws fell."""
    rows, queries, h = mixture(N, 0), mixture(12, 1), 0.3
    rng = np.random.default_rng(6)
    share = np.r_[0.3, 0.2, np.full(88, 0.5 / 88)]
    codes = rng.choice(90, size=N, p=share)
    with StoreWriter(tmp_path / "s", dtype="float16") as writer:
        writer.append(rows, groups=[f"g{code:02}" for code in codes])
    store = open_store(tmp_path / "s")
    index = Index.build(store)
    assert not index.manifest["group_moments"] and len(store.groups) == 90
    exact = truth(store, queries, [("exponential", h)])[:, 0]
    found = [
        index.stage(queries, keys(12), [("exponential", h)], rows_of(12, 2500), by_group=True, seed=s)
        for s in range(40)
    ]
    z = np.exp(np.array([f["group_log_sum"][..., 0] for f in found]))
    whole = np.exp(np.array([f["log_sum"][:, 0] for f in found]))
    assert np.allclose(z.sum(-1), whole, rtol=1e-9)
    few = (np.array([f["group_flags"][..., 0] for f in found]) & 16) > 0
    large = np.array([store.groups.index("g00"), store.groups.index("g01")])
    assert not few[:, :, large].any() and few.mean() > 0.5
    ratio = z[:, :, large] / exact[:, large]
    assert np.abs(ratio.mean((0, 1)) - 1).max() < 4 * ratio.std() / math.sqrt(40 * 12)
    spread = np.sqrt(np.array([f["group_variance"][..., 0] for f in found]))[:, :, large]
    off = np.log(ratio) / spread
    assert 0.6 < np.sqrt((off**2).mean()) < 1.25
    assert (np.abs(off) < 1.96).mean() > 0.92
    # Taken together: two kept apart, the others one.
    slots = np.full(90, 2, np.uint32)
    slots[large] = [0, 1]
    three = index.stage(
        queries,
        keys(12),
        [("exponential", h)],
        rows_of(12, 10 * N),
        by_group=True,
        group_map=slots,
    )
    rest = exact.sum(1) - exact[:, large].sum(1)
    assert np.allclose(three["group_log_sum"][..., 0], np.log(np.c_[exact[:, large], rest]), atol=1e-5)
    kde = KernelDensity(bandwidth=h, method="stratified", tolerance=0.05).fit(store)
    chosen = kde.density(mixture(80, 3), by_group=True, groups=("g00", "g01")).density.to_pandas()
    truth_ = KernelDensity(bandwidth=h).fit(store)
    expected = truth_.density(mixture(80, 3), by_group=True, groups=("g00", "g01")).density.to_pandas()
    assert set(chosen["group"].dropna()) == {"g00", "g01", "(other)"}
    estimated = chosen["method"] == "stratified"
    assert estimated.sum() > 60
    off = (chosen["log_density"] - expected["log_density"])[estimated] / chosen["std_error"][estimated]
    assert (np.abs(off.dropna()) < 3.5).mean() > 0.98


def test_a_row_left_out_is_left_out(store: Store, index: Index) -> None:
    own = np.array([5, 510, 9000])
    queries = store.rows(own)
    exact = truth(store, queries, KERNELS).sum(-1) - store.weights()[own].astype(float)[:, None]
    found = index.stage(queries, keys(3), KERNELS, rows_of(3, 10 * N), own=own)
    assert np.allclose(found["log_sum"], np.log(exact), atol=1e-5)
    some = index.stage(queries, keys(3), KERNELS, rows_of(3, 1500), own=own)
    assert (some["flags"] & 8 == 0).all(), "a row's own list is always read whole"
    assert np.allclose(some["excluded"], store.weights()[own])


# --- the product ---


def test_tolerances() -> None:
    assert parse_tolerance(".01").value == 0.01 and parse_tolerance("reliability=.99").kind == "reliability"
    for bad in ("0", "1", "x", "reliability=1", "error", "-0.1", "nan"):
        with pytest.raises(errors.ParameterError):
            parse_tolerance(bad)


@pytest.mark.parametrize("tolerance", ["0.05", "reliability=0.99"])
def test_tables_of_an_estimated_job(store: Store, index: Index, tolerance: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    queries = np.concatenate([mixture(190, 1), store.rows(rng.choice(N, 10))])
    options = {"kernel": "exponential", "bandwidth": [0.2, 0.3]}
    exact = KernelDensity(**options).fit(store).density(queries, neighbors=3, by_group=True)
    job = KernelDensity(**options, method="stratified", tolerance=tolerance).fit(store)
    table = job.density(queries, neighbors=3, by_group=True)
    again = job.density(queries[:50], neighbors=3, by_group=True)
    truth_, found = exact.density.to_pandas(), table.density.to_pandas()
    assert (
        (truth_[["id", "bandwidth", "group"]].fillna("") == found[["id", "bandwidth", "group"]].fillna(""))
        .all()
        .all()
    )
    facts = table.run["approximate"]
    whole = found["group"].isna()
    primary = whole & (found["bandwidth"] == 0.2)
    estimated = primary & (found["method"] == "stratified")
    assert facts["queries_estimated"] == estimated.sum() > 60
    assert facts["audited"] > 10 and facts["audit"]["ratio"][0] < 2
    error = (found["log_density"] - truth_["log_density"])[estimated]
    target = facts["target"]
    assert np.sqrt((error**2).mean()) <= 1.25 * target
    if tolerance.startswith("reliability"):
        spread = truth_["log_density"][primary].std()
        assert 1 - (found["std_error"][estimated] ** 2).mean() / spread**2 >= 0.99
    done = whole & (found["method"] == "exact")
    assert np.allclose(found["log_density"][done], truth_["log_density"][done], rtol=0, atol=1e-5)
    assert (found["std_error"][done] == 0).all() and (found["std_error"][estimated] > 0).all()
    z = error / found["std_error"][estimated]
    # Few rows on one side make the tails of small errors heavier than normal ones.
    assert (np.abs(z) < 3).mean() > 0.97
    assert (np.abs(error) < 4.5 * np.maximum(found["std_error"][estimated], 0.1 * target)).all()
    inside = (found["ci_low"] <= truth_["log_density"]) & (truth_["log_density"] <= found["ci_high"])
    assert inside[estimated].mean() > 0.88
    assert (found["rows_evaluated"][estimated] < N / 2).all()
    groups = found["group"].notna() & (found["method"] == "stratified") & found["log_density"].notna()
    off = ((found["log_density"] - truth_["log_density"]) / found["std_error"])[groups]
    assert groups.sum() > 300 and (np.abs(off) < 5).mean() > 0.97
    few = found["flags"].str.contains("few_draws") & found["group"].notna()
    assert found["log_density"][few].isna().all()
    # Draws depend on the id alone (which queries the audit takes depends on the job).
    both = found[estimated].merge(again.density.to_pandas(), on=["id", "bandwidth"], suffixes=("", "_again"))
    both = both[both["group_again"].isna() & (both["method_again"] == "stratified")]
    if not tolerance.startswith("reliability"):
        assert len(both) > 5 and np.allclose(
            both["log_density"], both["log_density_again"], rtol=0, atol=1e-12
        )
    q_exact, q_found = exact.queries.to_pandas(), table.queries.to_pandas()
    assert np.allclose(q_exact["typicality"], q_found["typicality"], atol=1e-4)
    assert (q_found["nearest_id"] == q_exact["nearest_id"]).mean() > 0.95
    loaded = DensityTable.load(table.save(tmp_path / "out"))
    assert loaded.run["approximate"]["method"] == "stratified"


def test_auto_reads_all_rows_of_a_small_store(store: Store, index: Index, queries: np.ndarray) -> None:
    table = KernelDensity(bandwidth=0.2, method="auto").fit(store).density(queries)
    assert set(table.density["method"].to_pylist()) == {"exact"} and table.run["method"] == "exact"


def test_what_few_rows_decide_goes_exact(tmp_path: Path) -> None:
    """A narrow kernel: one or a few rows decide each sum. The flags and the audit must see it."""
    rows = mixture(N, 0)
    store = open_store(rows)
    index = Index.build(store, tmp_path / "i")
    queries = mixture(120, 1)
    kde = KernelDensity(
        kernel="gaussian", bandwidth=0.05, method="stratified", tolerance=0.05, index=index.path
    )
    exact = KernelDensity(kernel="gaussian", bandwidth=0.05).fit(store).density(queries)
    table = kde.fit(store).density(queries)
    error = table.density["log_density"].to_numpy() - exact.density["log_density"].to_numpy()
    spread = np.maximum(table.density["std_error"].to_numpy(), 1e-4)
    assert (np.abs(error) < 5 * spread).mean() > 0.98
    assert np.isfinite(table.density["log_density"].to_numpy()).all()


def test_the_audit_widens_within_the_tolerance_and_gives_up_beyond() -> None:
    """Standard errors three times too small are widened where the tolerance holds all the same, and given up
    where the errors met, or what they would be widened to, are beyond it."""
    q, rng = 400, np.random.default_rng(2)
    exact = np.zeros(q, bool)
    exact[:40] = True
    truth_ = rng.normal(size=(q, 1))
    scan: Any = SimpleNamespace(total=SimpleNamespace(log_sum=truth_[exact]))

    def judged(error: float, claimed: float, target: float) -> tuple[bool, Sums, dict[str, Any]]:
        variance = np.full((q, 1), claimed**2)
        sums = Sums(
            truth_ + error * rng.choice([-1.0, 1.0], size=(q, 1)),
            variance,
            np.full((q, 1), np.inf),
            np.ones((q, 1)),
            np.zeros((q, 1), np.uint32),
            *(np.ones(q) for _ in range(3)),
        )
        facts: dict[str, Any] = {}
        given_up = audit.judge(
            np.arange(40), exact, scan, sums, np.zeros((q, 1)), target, facts, lambda line: None
        )
        return given_up, sums, facts["audit"]

    given_up, sums, facts = judged(error=0.03, claimed=0.01, target=0.1)
    assert not given_up and facts["widened"] and np.allclose(np.sqrt(sums.variance), 0.03)
    assert facts["error"][0] == pytest.approx(0.03) and not sums.flags.any()
    assert judged(error=0.03, claimed=0.01, target=0.05)[0], "errors beyond half the tolerance"
    assert judged(error=0.03, claimed=0.01, target=math.nan)[0]
    given_up, sums, facts = judged(error=0.015, claimed=0.015, target=0.1)
    assert not given_up and not facts["widened"] and np.allclose(np.sqrt(sums.variance), 0.015)


def test_arithmetic_is_no_failure_of_the_estimates(tmp_path: Path) -> None:
    """Rows of large norms at a narrow kernel, summed whole: single precision errs by more than 2e-5, and the
    audit must not take that for a sampling error and give the estimates up."""
    rng = np.random.default_rng(12)
    centres = 2 * rng.normal(size=(30, 48))
    rows = (centres[rng.integers(30, size=8000)] + 0.5 * rng.normal(size=(8000, 48))).astype(np.float32)
    queries = (centres[rng.integers(30, size=100)] + 0.5 * rng.normal(size=(100, 48))).astype(np.float32)
    store = open_store(rows)
    index = Index.build(store, tmp_path / "i")
    kde = KernelDensity(
        kernel="gaussian", bandwidth=0.25, method="stratified", tolerance=0.05, index=index.path
    )
    table = kde.fit(store).density(queries)
    squared = ((rows[None].astype(np.float64) - queries[:, None].astype(np.float64)) ** 2).sum(-1)
    exact = np.log(np.exp(-(squared - squared.min(1, keepdims=True)) / 0.125).sum(1)) - squared.min(1) / 0.125
    error = np.abs(table.density["log_density"].to_numpy() + np.log(8000) - exact)
    assert (error < 4 * np.maximum(table.density["std_error"].to_numpy(), 5e-4)).all()
    facts = table.run["approximate"]
    assert not facts["audit"]["given_up"] and facts["audit"]["ratio"][0] < 1.5
    assert facts["queries_estimated"] > 10


def test_refusals(
    store: Store, index: Index, queries: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = store.rows(np.arange(2000))
    with pytest.raises(errors.ParameterError, match="no index"):
        KernelDensity(bandwidth=0.2, method="stratified").fit(rows).density(queries)
    with pytest.raises(errors.ParameterError, match="unknown method"):
        KernelDensity(bandwidth=0.2, method="magic").fit(store)
    with pytest.raises(errors.ParameterError, match="tophat"):
        KernelDensity(kernel="tophat", bandwidth=0.5, method="stratified").fit(store).density(queries)
    with pytest.raises(errors.ParameterError, match="left out by distance"):
        KernelDensity(bandwidth=0.2, method="stratified").fit(store).density(queries, exclude_within=0.1)
    with pytest.raises(errors.StaleIndexError):
        KernelDensity(bandwidth=0.2, method="stratified", index=index.path).fit(rows).density(queries)
    fell_back = KernelDensity(kernel="tophat", bandwidth=0.9, method="auto").fit(store).density(queries)
    assert any("tophat" in notice for notice in fell_back.run["notices"])
    np.save(tmp_path / "q.npy", queries)
    command = ["density", str(store.path), str(tmp_path / "q.npy"), "--bandwidth", "0.2", "-o"]
    assert (
        main(
            [
                *command,
                str(tmp_path / "a"),
                "--method",
                "stratified",
                "--tolerance",
                "0.05",
                "--quiet",
                "--json",
            ]
        )
        == 0
    )
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["method"] == "stratified" and said["approximate"]["audited"] >= 0
    assert main([*command, str(tmp_path / "b"), "--tolerance", "7"]) == 2
    assert main([*command, str(tmp_path / "b"), "--method", "magic"]) == 2
    assert main([*command, str(tmp_path / "b"), "--tolerance", "0.1", "--quiet"]) == 2, "exact needs none"
    assert not (tmp_path / "b").exists()
    assert lmd3.Index is Index


def test_a_sampled_store_keeps_its_own_error(tmp_path: Path) -> None:
    """Rows that are a sample have an error that no estimate over them knows: they are summed exactly."""
    rows, queries = mixture(3000, 0), mixture(20, 1)
    counter = SampleCounter(0.5, 1, None)
    ids = [str(row) for row in range(len(rows))]
    counter.add(ids, None)
    design = counter.finish()
    taken = np.flatnonzero(design.keep(ids, None))
    with StoreWriter(tmp_path / "s", dtype="float16") as writer:
        writer.facts["sampling"] = design.describe()
        writer.append(
            rows[taken], [ids[row] for row in taken], None, weights=design.weights(len(taken), None)
        )
    drawn = open_store(tmp_path / "s")
    Index.build(drawn)
    with pytest.raises(errors.ParameterError, match="are a sample"):
        KernelDensity(bandwidth=0.2, method="stratified").fit(drawn).density(queries)
    table = KernelDensity(bandwidth=0.2, method="auto").fit(drawn).density(queries)
    exact = KernelDensity(bandwidth=0.2).fit(drawn).density(queries)
    assert table.density.equals(exact.density) and (exact.density["std_error"].to_numpy() > 0).all()
    assert any("are a sample" in notice for notice in table.run["notices"])
