"""The kernels of the plain path and all normalising constants against independent truth."""

from __future__ import annotations

import math
import os
from pathlib import Path

import mpmath
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import laplace, vonmises_fisher
from sklearn.neighbors import KernelDensity as Theirs

from lmd3 import errors
from lmd3.density import KernelDensity
from lmd3.kernels import KERNELS, log_bessel_scaled, log_kernel, log_normalizer
from lmd3.store import StoreWriter, open_store

COMPACT = ("tophat", "epanechnikov", "linear")
PLAIN = ("vmf", "laplacian", *COMPACT)

DATA = os.environ.get("LMD3_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="LMD3_DATA is not set: real data is not at hand")


def unit(generator: np.random.Generator, n: int, d: int) -> np.ndarray:
    rows = generator.normal(size=(n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def log_weights(kernel: str, rows: np.ndarray, queries: np.ndarray, h: float) -> np.ndarray:
    """log k of every pair (Q, n) by the kernel's formula, in float64."""
    x, q = rows.astype(np.float64)[None], queries.astype(np.float64)[:, None]
    if kernel == "vmf":
        return ((x * q).sum(axis=2) - 1) / h**2
    if kernel == "laplacian":
        return -np.abs(x - q).sum(axis=2) / h
    share = np.sqrt(((x - q) ** 2).sum(axis=2)) / h
    with np.errstate(divide="ignore", invalid="ignore"):
        profile = {
            "exponential": np.exp(-share),
            "gaussian": np.exp(-0.5 * share**2),
            "tophat": 1.0 * (share < 1),
            "epanechnikov": np.where(share < 1, 1 - share**2, 0),
            "linear": np.where(share < 1, 1 - share, 0),
        }[kernel]
        return np.log(profile)


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
    finite = np.isfinite(expected)
    error = np.abs(found[finite] - expected[finite]) / np.maximum(1, np.abs(expected[finite]))
    assert error.max(initial=0) <= tolerance


# --- densities ---


@pytest.mark.parametrize("kernel", COMPACT)
@pytest.mark.parametrize("d", [1, 3, 8, 64])
def test_compact_kernels_agree_with_scikit_learn(kernel: str, d: int) -> None:
    rng = np.random.default_rng(d)
    rows = rng.normal(size=(500, d)).astype(np.float32)
    queries = np.concatenate([rows[:5], rng.normal(size=(20, d)), rng.normal(size=(5, d)) + 9])
    queries = queries.astype(np.float32)
    zeros = 0
    for share in (0.3, 1.0, 1.5):
        h = share * math.sqrt(2 * d)
        # One leaf: with its default leaves of 40 rows scikit-learn adds and subtracts bounds of nodes and
        # loses all digits in many dimensions.
        theirs = Theirs(kernel=kernel, bandwidth=h, leaf_size=10**6).fit(rows.astype(float))
        expected = theirs.score_samples(queries.astype(float))
        ours = KernelDensity(kernel=kernel, bandwidth=h).fit(rows).score_samples(queries)
        assert_close(ours, expected, 1e-11)
        zeros += int(np.isneginf(expected).sum())
    assert zeros > 0


@pytest.mark.parametrize("d", [1, 3, 8, 64, 384])
def test_laplacian_agrees_with_products_of_laplace_densities(d: int) -> None:
    rng = np.random.default_rng(d)
    rows = rng.normal(size=(300, d)).astype(np.float32)
    queries = np.concatenate([rows[:3], rng.normal(size=(20, d)).astype(np.float32)])
    for h in (0.1, 1.0, 10.0):
        products = laplace.logpdf(queries[:, None].astype(float), rows[None].astype(float), h).sum(axis=2)
        expected = logsumexp(products, axis=1) - math.log(300)
        ours = KernelDensity(kernel="laplacian", bandwidth=h).fit(rows).score_samples(queries)
        assert_close(ours, expected, 1e-12)


@pytest.mark.parametrize("d", [2, 3, 10])
def test_vmf_agrees_with_scipy(d: int) -> None:
    rng = np.random.default_rng(d)
    rows, queries = unit(rng, 50, d), unit(rng, 9, d)
    for h in (0.1, 0.5, 2.0):
        parts = []
        for row in rows.astype(np.float64):
            mean = row / np.linalg.norm(row)
            # scipy wants unit vectors to the last bit; ours are rounded to single precision.
            q = queries / np.linalg.norm(queries.astype(np.float64), axis=1, keepdims=True)
            parts.append(vonmises_fisher(mean, 1 / h**2).logpdf(q))
        expected = logsumexp(parts, axis=0) - math.log(50)
        ours = KernelDensity(kernel="vmf", bandwidth=h).fit(rows).score_samples(queries)
        assert np.abs(ours - expected).max() <= 2e-7 / h**2 + 1e-9


def test_on_the_sphere_vmf_is_the_gaussian() -> None:
    rng = np.random.default_rng(4)
    rows, queries = unit(rng, 2000, 64), unit(rng, 33, 64)
    for h in (0.05, 0.2, 1.0):
        both = KernelDensity(kernel=["vmf", "gaussian"], bandwidth=h, normalize=False).fit(rows)
        vmf, gaussian = both.score_samples(queries).T
        assert_close(vmf, logsumexp(log_weights("vmf", rows, queries, h), axis=1) - math.log(2000), 1e-12)
        assert np.abs(vmf - gaussian).max() <= 2e-7 / h**2 + 1e-5 * np.abs(gaussian).max()


@pytest.mark.parametrize("kernel", COMPACT)
def test_the_edge_of_a_compact_kernel_is_decided_in_double_precision(kernel: str) -> None:
    h = 0.75
    for d in (1, 3, 40, 384):
        offsets = h * np.array([1, 1 - 1e-5, 1 + 1e-5, 1 - 2e-7, 1 + 2e-7, 0.5], dtype=np.float64)
        rows = np.zeros((len(offsets), d), dtype=np.float32)
        rows[:, -1] = offsets
        # Far from the origin single-precision distances from dot products are off by far more than the gaps.
        for shift in (0.0, 1.0, 64.0):
            moved, query = rows.copy(), np.zeros((1, d), dtype=np.float32)
            moved[:, 0] += np.float32(shift)
            query[:, 0] = shift
            for row in moved:
                distance = np.linalg.norm(row.astype(np.float64) - query[0])
                kde = KernelDensity(kernel=kernel, bandwidth=h, normalize=False).fit(row[None])
                found = kde.score_samples(query)[0]
                assert np.isneginf(found) == (distance >= h)
                if distance < h:
                    value = {"tophat": 1.0, "linear": 1 - distance / h}.get(kernel, 1 - (distance / h) ** 2)
                    assert found == pytest.approx(math.log(value), rel=1e-8, abs=1e-15)


# --- constants ---


@pytest.mark.parametrize("d", [2, 3, 4, 5, 16, 64, 100, 384, 768, 1024, 2048, 4096])
def test_vmf_constant_against_mpmath(d: int) -> None:
    order = mpmath.mpf(d) / 2 - 1
    with mpmath.workdps(40):
        for kappa in np.geomspace(1e-2, 1e6, 9):
            x = mpmath.mpf(float(kappa))
            exact = mpmath.log(mpmath.besseli(order, x)) - x
            assert log_bessel_scaled(float(order), float(kappa)) == pytest.approx(
                float(exact), rel=1e-11, abs=1e-11
            )
            h = float(kappa) ** -0.5
            x = 1 / mpmath.mpf(h) ** 2
            constant = (
                mpmath.mpf(d) / 2 * mpmath.log(2 * mpmath.pi)
                + mpmath.log(mpmath.besseli(order, x))
                - order * mpmath.log(x)
                - x
            )
            assert log_normalizer("vmf", d, h) == pytest.approx(float(constant), rel=1e-10, abs=1e-10)


def test_vmf_constant_where_bessel_functions_underflow() -> None:
    from scipy.special import ive

    assert ive(383, 20) == 0
    assert math.isfinite(log_normalizer("vmf", 768, 20**-0.5))
    # As κ → 0 the constant becomes the area of the sphere, 2π^{d/2}/Γ(d/2).
    for d in (1, 2, 3, 50, 1000):
        area = math.log(2) + 0.5 * d * math.log(math.pi) - math.lgamma(0.5 * d)
        assert log_normalizer("vmf", d, 1e6) == pytest.approx(area, rel=1e-9)
    # Far beyond what scipy's argument reduction allows, the sphere is flat: the gaussian's constant in d − 1.
    for d in (2, 3, 50, 1000):
        assert log_normalizer("vmf", d, 1e-9) == pytest.approx(
            log_normalizer("gaussian", d - 1, 1e-9), rel=1e-9
        )


@pytest.mark.parametrize("kernel", ["laplacian", *COMPACT])
def test_constants_are_integrals(kernel: str) -> None:
    h = 0.7
    x = np.linspace(-40, 40, 2_000_001)[:, None]
    zero = np.zeros_like(x)
    with np.errstate(divide="ignore"):
        values = np.exp(log_kernel(kernel, h, np.abs(x[:, 0]), x, zero))
    assert log_normalizer(kernel, 1, h) == pytest.approx(math.log(np.trapezoid(values, x[:, 0])), abs=1e-4)
    if kernel != "laplacian":
        r = np.linspace(0, h, 200_001)[:, None]
        with np.errstate(divide="ignore"):
            values = np.exp(log_kernel(kernel, h, r[:, 0], r, 0 * r))
        shells = 2 * np.pi**2 * r[:, 0] ** 3 * values
        assert log_normalizer(kernel, 4, h) == pytest.approx(
            math.log(np.trapezoid(shells, r[:, 0])), abs=1e-4
        )


def test_unknown_kernels_are_refused() -> None:
    for call in (
        lambda: log_normalizer("cosine", 3, 1.0),
        lambda: KernelDensity(kernel="cosine").check_params(),
    ):
        with pytest.raises(errors.ParameterError, match="unknown kernel 'cosine'"):
            call()


# --- beside everything else a scan does ---


def grouped(folder: Path, rows: np.ndarray, dtype: str = "float32", shard_rows: int = 400) -> Path:
    with StoreWriter(folder, dtype=dtype, shard_rows=shard_rows) as writer:
        names = [f"r{i}" for i in range(len(rows))]
        writer.append(rows, names, groups=[("a", "b", "c")[i * 3 // len(rows)] for i in range(len(rows))])
    return folder


def test_kernels_of_both_paths_in_one_call(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    rows = unit(rng, 1000, 24)
    queries = np.concatenate([rows[[7, 500]], unit(rng, 20, 24)])
    store = open_store(grouped(tmp_path / "corpus", rows))
    order = ["tophat", "gaussian", "vmf", "exponential", "laplacian", "linear", "epanechnikov"]
    assert sorted(order) == sorted(KERNELS)
    bandwidths = [1.05, 0.4]
    options = {"neighbors": 4, "by_group": True, "exclude_within": 0.9}
    together = KernelDensity(kernel=order, bandwidth=bandwidths).fit(store).density(queries, **options)
    frame = together.density.to_pandas()
    assert list(dict.fromkeys(frame["kernel"])) == order
    codes = store.group_codes()
    distance = np.linalg.norm(rows.astype(float) - queries.astype(float)[:, None], axis=2)
    kept = distance >= 0.9
    for (kernel, h, group), part in frame.groupby(["kernel", "bandwidth", "group"], dropna=False):
        chosen = np.ones(1000, bool) if not isinstance(group, str) else codes == store.groups.index(group)
        logs = np.where(kept, log_weights(kernel, rows, queries, h), -np.inf)[:, chosen]
        with np.errstate(divide="ignore"):
            sums = logsumexp(logs, axis=1)
        fused = kernel in ("exponential", "gaussian")
        assert_close(part["kernel_sum_log"].to_numpy(), sums, 1e-5 if fused else 1e-11)
        expected = sums - np.log(kept[:, chosen].sum(axis=1))
        assert_close(part["log_density"].to_numpy(), expected, 1e-5 if fused else 1e-11)
        with np.errstate(invalid="ignore"):
            ess = np.exp(2 * sums - logsumexp(2 * logs, axis=1))
        np.testing.assert_allclose(part["ess"], np.nan_to_num(ess), rtol=1e-4)
        assert (part["precision"] == ("float32" if fused else "float64")).all()
        assert ((part["flags"] == "zero") == np.isneginf(part["log_density"])).all()
    assert together.run["zero_densities"] == int(np.isneginf(frame["log_density"]).sum()) > 0
    for kernel in order:
        alone = KernelDensity(kernel=kernel, bandwidth=bandwidths).fit(store).density(queries, **options)
        of = frame[frame["kernel"] == kernel].reset_index(drop=True)
        fused = kernel in ("exponential", "gaussian")
        np.testing.assert_allclose(
            alone.density.to_pandas()["log_density"], of["log_density"], rtol=1e-6 if fused else 0
        )
        assert alone.queries.equals(together.queries)
        listed = alone.neighbors.to_pandas()
        at = queries[[int(i) for i in listed["id"]]].astype(float)
        pairs = rows[[int(i[1:]) for i in listed["neighbor_id"]]].astype(float)
        log_k = log_kernel(kernel, 1.05, listed["distance"].to_numpy(), pairs, at)
        whole = of[(of["bandwidth"] == 1.05) & of["group"].isna()].set_index("id")["kernel_sum_log"]
        with np.errstate(invalid="ignore"):
            share = np.exp(log_k - whole[listed["id"]].to_numpy())
        np.testing.assert_allclose(listed["share"].astype(float), share, rtol=1e-6, atol=1e-300)


def test_weights_own_rows_and_threads() -> None:
    rng = np.random.default_rng(6)
    rows = unit(rng, 5000, 16)
    weights = rng.random(5000).astype(np.float32) * (rng.random(5000) > 0.1)
    queries = rows[:40]
    seen = set()
    for threads in (1, 2, 3):
        kde = KernelDensity(kernel=list(PLAIN), bandwidth=1.0, normalize=False, threads=threads)
        seen.add(kde.fit(rows, sample_weight=weights).score_samples(queries).tobytes())
    assert len(seen) == 1
    scores = np.frombuffer(seen.pop()).reshape(40, len(PLAIN))
    with np.errstate(divide="ignore"):
        log_w = np.log(weights.astype(np.float64))
    for column, kernel in enumerate(PLAIN):
        expected = logsumexp(log_weights(kernel, rows, queries, 1.0) + log_w, axis=1)
        assert_close(scores[:, column], expected - np.log(weights.sum(dtype=float)), 1e-11)
    store = open_store(rows)
    left = KernelDensity(kernel=list(PLAIN), bandwidth=0.8).fit(store).density(store, exclude_self=True)
    frame = left.density.to_pandas()
    assert (frame["rows_evaluated"] == 4999).all()
    some = np.arange(40)
    for kernel in PLAIN:
        logs = log_weights(kernel, rows, rows[some], 0.8)
        logs[some, some] = -np.inf
        found = frame[frame["kernel"] == kernel]["log_density"].to_numpy()[some]
        assert_close(found, logsumexp(logs, axis=1) - math.log(4999), 1e-11)


# --- vmf wants unit vectors ---


def test_vectors_off_the_sphere_are_refused_with_their_row(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    rows, queries = unit(rng, 900, 12), unit(rng, 5, 12)
    kde = KernelDensity(kernel="vmf", bandwidth=0.3)
    rows[617] *= 1.001
    with pytest.raises(errors.ParameterError, match="not a unit vector") as caught:
        kde.fit(rows).score_samples(queries)
    assert caught.value.row == 617 and "gaussian" in caught.value.remedy
    with pytest.raises(errors.ParameterError, match="not a unit vector") as caught:
        kde.fit(grouped(tmp_path / "corpus", rows)).score_samples(queries)
    assert caught.value.row == 217 and "embeddings-00001" in str(caught.value.file)
    with pytest.raises(errors.ParameterError, match="query 3 is not a unit vector"):
        kde.fit(queries).score_samples(queries * np.array([[1], [1], [1], [1.1], [1]], dtype=np.float32))
    # Half-precision rows are unit vectors within their rounding, and so are queries read from such a store.
    rows[617] = rows[0]
    half = grouped(tmp_path / "half", rows, dtype="float16")
    assert np.isfinite(kde.fit(half).score_samples(half)).all()
    assert np.isfinite(kde.fit(rows).score_samples(half)).all()


@needs_data
def test_sentences_are_unit_vectors() -> None:
    rows = np.array(np.load(Path(str(DATA)) / "sentences" / "embeddings.npy", mmap_mode="r")[:3000])
    kde = KernelDensity(kernel=["vmf", "gaussian"], bandwidth=0.2, normalize=False).fit(rows)
    vmf, gaussian = kde.score_samples(rows[:50]).T
    # κ(⟨x,q⟩ − 1) + κD²/2 = κ((‖x‖² + ‖q‖²)/2 − 1): what the rounding of stored norms leaves between the two.
    gap = np.abs((rows.astype(np.float64) ** 2).sum(axis=1) - 1).max() / 0.2**2
    assert np.abs(vmf - gaussian).max() <= gap < 0.05


# --- the rules ---


@pytest.mark.parametrize("kernel", ["exponential", "gaussian", "laplacian", "vmf", "epanechnikov", "linear"])
@pytest.mark.parametrize("target", [1e-2, 1e-3])
def test_mu_is_the_median_density_within_a_hundredth(kernel: str, target: float) -> None:
    rng = np.random.default_rng(9)
    rows, queries = unit(rng, 3000, 12), unit(rng, 100, 12)
    kde = KernelDensity(kernel=kernel, bandwidth=f"mu={target}", normalize=False).fit(rows)
    densities = np.exp(kde.score_samples(queries))
    assert abs(np.median(densities) / target - 1) <= 0.0101
    assert kde.bandwidths_[0].achieved == pytest.approx(np.median(densities), rel=1e-6)
    weighted = KernelDensity(kernel=kernel, bandwidth=f"mu={target}", normalize=False)
    weighted.fit(rows, sample_weight=np.where(np.arange(3000) < 1500, 3.0, 0.5))
    assert abs(np.median(np.exp(weighted.score_samples(queries))) / target - 1) <= 0.0101


def test_mu_that_cannot_be_is_refused() -> None:
    rng = np.random.default_rng(10)
    rows, queries = unit(rng, 200, 12), unit(rng, 21, 12)
    with pytest.raises(errors.ParameterError, match="below 1"):
        KernelDensity(bandwidth="mu=1").check_params()
    with pytest.raises(errors.ParameterError, match="steps over it"):
        KernelDensity(kernel="tophat", bandwidth="mu=0.0125").fit(rows).score_samples(queries)
    found = KernelDensity(kernel="tophat", bandwidth="mu=0.02", normalize=False).fit(rows)
    assert np.median(np.exp(found.score_samples(queries))) == pytest.approx(0.02)


@pytest.mark.parametrize("kernel", PLAIN)
def test_other_rules_hold_for_every_kernel(kernel: str) -> None:
    rng = np.random.default_rng(11)
    rows, queries = unit(rng, 4000, 32), unit(rng, 201, 32)
    kde = KernelDensity(kernel=kernel, bandwidth=["ess=100", "mass=50"]).fit(rows)
    frame = kde.density(queries).density.to_pandas()
    assert frame[frame["rule"] == "ess=100"]["ess"].median() == pytest.approx(100, rel=0.05)
    sums = np.exp(frame[frame["rule"] == "mass=50"]["kernel_sum_log"])
    assert sums.median() == pytest.approx(50, rel=0.05)
