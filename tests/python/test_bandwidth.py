"""Bandwidths by leave-one-out likelihood, and of each query's own, against scikit-learn and NumPy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.neighbors import KernelDensity as Theirs

from lmd3 import errors
from lmd3.bandwidth import parse_rule, read_bandwidths
from lmd3.density import KernelDensity, log_normalizer

KERNELS = ("exponential", "gaussian")


def _distances(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return np.sqrt(((rows[:, None] - rows[None]) ** 2).sum(axis=2))


def _left_out(
    kernel: str, rows: np.ndarray, h: float, near: float = -1.0, weights: np.ndarray | None = None
) -> float:
    """Mean log density of every row, itself and rows within `near` left out (float64)."""
    apart = _distances(rows)
    w = np.ones(len(rows)) if weights is None else weights.astype(np.float64)
    scores = -apart / h if kernel == "exponential" else -0.5 * (apart / h) ** 2
    out = (apart <= near) | np.eye(len(rows), dtype=bool)
    kept = np.where(out, 0.0, w)
    with np.errstate(divide="ignore"):
        sums = logsumexp(scores + np.log(kept), axis=1) - np.log(kept.sum(axis=1))
    return float(np.average(sums, weights=w)) - log_normalizer(kernel, rows.shape[1], h)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_likelihood_is_that_of_scikit_learn(kernel: str) -> None:
    rows = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    kde = KernelDensity(kernel=kernel, bandwidth="loo").fit(rows)
    found = kde.resolve(rows[:5])[0]
    assert found.rule == "loo" and found.curve is not None and found.sampled_queries == 60
    points = [*found.curve[20::15], max(found.curve, key=lambda p: p[1])]
    for h, mean, _, _ in points:
        theirs = cross_val_score(
            Theirs(kernel=kernel, bandwidth=h, leaf_size=10**6), rows.astype(float), cv=LeaveOneOut()
        )
        assert mean == pytest.approx(theirs.mean(), rel=1e-5)
    assert found.achieved == pytest.approx(_left_out(kernel, rows, found.bandwidth), rel=1e-6)
    best = minimize_scalar(
        lambda log_h: -_left_out(kernel, rows, float(np.exp(log_h))), bounds=(-4.0, 2.0), method="bounded"
    )
    assert found.bandwidth == pytest.approx(np.exp(best.x), rel=0.02)
    assert found.achieved_low < found.achieved < found.achieved_high


def test_a_cluster_of_copies_is_left_out_whole() -> None:
    rng = np.random.default_rng(1)
    some = rng.normal(size=(80, 3)).astype(np.float32)
    copied = np.concatenate([some, np.repeat(some, 5, axis=0)])
    found = KernelDensity(bandwidth="loo").fit(copied).resolve(some[:2])[0]
    best = max(found.curve, key=lambda p: p[1])
    assert best[1] == pytest.approx(_left_out("exponential", copied, best[0], near=1e-6), rel=1e-6)
    # With one copy left in, the likelihood grows without end.
    naive = [_left_out("exponential", copied, h) for h in (1e-1, 1e-2, 1e-3, 1e-4)]
    assert naive == sorted(naive) and found.bandwidth > 0.02
    # Near-copies are copies where they are named as such.
    moved = copied + rng.normal(scale=1e-3, size=copied.shape).astype(np.float32)
    near = KernelDensity(bandwidth="loo").fit(moved).resolve(some[:2], exclude_within=0.02)[0]
    assert near.bandwidth == pytest.approx(found.bandwidth, rel=0.25)
    with pytest.raises(errors.ParameterError, match="near-copies"):
        KernelDensity(bandwidth="loo").fit(moved).resolve(some[:2])


def test_weights_count() -> None:
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(150, 3)).astype(np.float32)
    weights = rng.uniform(0.1, 3.0, 150).astype(np.float32)
    found = KernelDensity(bandwidth="loo").fit(rows, sample_weight=weights).resolve(rows[:2])[0]
    expected = _left_out("exponential", rows, found.bandwidth, weights=weights)
    assert found.achieved == pytest.approx(expected, rel=1e-6)


def test_narrow_kernels_are_said_and_the_dimension_can_be_named() -> None:
    rng = np.random.default_rng(3)
    # Three dimensions in a space of sixty.
    basis = np.linalg.qr(rng.normal(size=(60, 3)))[0]
    rows = (rng.normal(size=(800, 3)) @ basis.T).astype(np.float32)
    kde = KernelDensity(bandwidth=["loo", "loo=3", "ess=50"], seed=1).fit(rows)
    whole, local, ess = kde.resolve(rows[:100])
    assert [b.rule for b in kde.bandwidths_] == ["loo", "loo=3", "ess=50"] and ess.achieved == pytest.approx(
        50, rel=0.01
    )
    assert whole.bandwidth < 0.3 * local.bandwidth
    assert any("about 3" in note or "about 2.9" in note for note in kde.notices_), kde.notices_
    in_three = (rows.astype(np.float64) @ basis).astype(np.float32)
    same = KernelDensity(bandwidth="loo", seed=1).fit(in_three).resolve(in_three[:2])[0]
    assert local.bandwidth == pytest.approx(same.bandwidth, rel=0.02)
    assert parse_rule("loo").kind == "loo" and parse_rule("loo=3").value == 3
    for bad in ("loo=0", "loo=x", "lou"):
        with pytest.raises(errors.ParameterError):
            parse_rule(bad)
    unit = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    with pytest.raises(errors.ParameterError, match="sphere"):
        KernelDensity(kernel="vmf", bandwidth="loo=3").fit(unit).resolve(unit[:2])
    assert KernelDensity(kernel="vmf", bandwidth="loo").fit(unit).resolve(unit[:2])[0].bandwidth > 0


def test_the_curve_is_kept_and_read_again(tmp_path: Path) -> None:
    rows = np.random.default_rng(4).normal(size=(200, 4)).astype(np.float32)
    kde = KernelDensity(bandwidth="loo").fit(rows)
    table = kde.density(rows[:10], folder=tmp_path / "density")
    table.save(tmp_path / "density")
    kept = json.loads((tmp_path / "density" / "bandwidth.json").read_text())["bandwidths"][0]
    assert kept["rule"] == "loo" and len(kept["curve"]) > 20 and len(kept["curve"][0]) == 4
    again = read_bandwidths(tmp_path / "density" / "bandwidth.json")[0]
    assert again.bandwidth == kde.bandwidth_
    assert KernelDensity(bandwidth="loo").fit(rows).density(rows[:10]).density.equals(table.density)


# --- bandwidths of each query's own ---


@pytest.mark.parametrize("kernel", KERNELS)
def test_adaptive_densities_are_those_at_their_own_bandwidth(kernel: str) -> None:
    rng = np.random.default_rng(5)
    rows = (rng.normal(size=(900, 5)) * rng.choice([0.2, 1.0, 3.0], size=(900, 1))).astype(np.float32)
    queries = (rng.normal(size=(80, 5)) * rng.choice([0.1, 1.0, 4.0], size=(80, 1))).astype(np.float32)
    kde = KernelDensity(kernel=kernel, bandwidth=0.5).fit(rows)
    table = kde.density(queries, neighbors=20, adaptive=0.4)
    frame = table.density.to_pandas()
    own = frame[frame["rule"] == "adaptive=0.4"].reset_index(drop=True)
    assert len(own) == 80 and len(frame) == 160
    apart = np.sqrt(((queries[:, None].astype(float) - rows[None].astype(float)) ** 2).sum(axis=2))
    h = 0.4 * np.sort(apart, axis=1)[:, 19]
    assert h.max() / h.min() > 10
    x = apart / h[:, None]
    scores = -x if kernel == "exponential" else -0.5 * x**2
    np.testing.assert_allclose(own["kernel_sum_log"], logsumexp(scores, axis=1), atol=1e-4)
    for i in range(0, 80, 9):  # the interpolation alone: float32 arithmetic on both sides
        direct = KernelDensity(kernel=kernel, bandwidth=float(h[i]), normalize=False).fit(rows)
        log_sum = direct.score_samples(queries[i : i + 1])[0] + np.log(900)
        assert own["kernel_sum_log"][i] == pytest.approx(log_sum, abs=2e-5)
    ess = np.exp(2 * logsumexp(scores, axis=1) - logsumexp(2 * scores, axis=1))
    np.testing.assert_allclose(own["ess"], ess, rtol=1e-4)
    facts = table.run["adaptive"][0]
    assert facts["neighbors"] == 20 and facts["bandwidth"] == pytest.approx(np.median(h), rel=1e-6)
    np.testing.assert_allclose(own["bandwidth"], np.median(h), rtol=1e-6)
    kth = table.queries.to_pandas()["kth_distance"]
    np.testing.assert_allclose(0.4 * kth, h, rtol=1e-6)
    # Hill's estimates, their inverses averaged.
    nearest = np.sort(apart, axis=1)[:, :20]
    m = 1 / np.mean(-np.log(nearest[:, :-1] / nearest[:, -1:]).mean(axis=1))
    assert facts["dimension"] == pytest.approx(m, rel=1e-5)
    expected = logsumexp(scores, axis=1) - np.log(900) - m * np.log(h / np.median(h))
    np.testing.assert_allclose(own["log_density"], expected, atol=1e-4)
    # The fixed bandwidth beside it stays what it is, and stays the primary one.
    plain = kde.density(queries, neighbors=20).density
    assert table.density.slice(0, 80).equals(plain) and table.run["bandwidths"] == [
        b.to_dict() for b in kde.bandwidths_
    ]


def test_adaptive_densities_follow_the_truth_where_a_fixed_kernel_does_not() -> None:
    rng = np.random.default_rng(6)
    # A tight and a wide cloud: one bandwidth fits neither.
    sizes = np.repeat([0.05, 2.0], 3000)
    rows = (rng.normal(size=(6000, 3)) * sizes[:, None]).astype(np.float32)
    queries = (rng.normal(size=(400, 3)) * np.repeat([0.05, 2.0], 200)[:, None]).astype(np.float32)
    squares = (queries.astype(float) ** 2).sum(axis=1)
    truth = logsumexp([-0.5 * squares / s**2 - 3 * np.log(s) for s in (0.05, 2.0)], axis=0)
    table = KernelDensity(bandwidth=1.0).fit(rows).density(queries, neighbors=50, adaptive=0.3)
    frame = table.density.to_pandas()
    found = {rule: rows["log_density"].to_numpy() for rule, rows in frame.groupby("rule")}
    errors_of = {rule: np.std(x - truth) for rule, x in found.items()}
    assert errors_of["adaptive=0.3"] < 0.7 < 1.5 < errors_of["1"], errors_of


def test_adaptive_refusals_and_left_out_rows() -> None:
    rng = np.random.default_rng(7)
    rows = rng.normal(size=(300, 4)).astype(np.float32)
    kde = KernelDensity(bandwidth=0.5).fit(rows)
    table = kde.density(rows, neighbors=5, adaptive=0.5, exclude_self=True)
    own = table.density.to_pandas().iloc[300:]
    apart = _distances(rows)
    np.fill_diagonal(apart, np.inf)
    h = 0.5 * np.sort(apart, axis=1)[:, 4]
    np.testing.assert_allclose(own["kernel_sum_log"], logsumexp(-apart / h[:, None], axis=1), atol=1e-5)
    assert (own["rows_evaluated"] == 299).all()
    for factor in (0.0, -1.0, float("nan")):
        with pytest.raises(errors.ParameterError, match="positive"):
            kde.density(rows[:3], adaptive=factor)
    with pytest.raises(errors.ParameterError, match="no adaptive bandwidth"):
        KernelDensity(kernel="laplacian", bandwidth=0.5).fit(rows).density(rows[:3], adaptive=0.5)
    copies = np.repeat(rows[:50], 6, axis=0)
    with pytest.raises(errors.ParameterError, match="at no distance"):
        KernelDensity(bandwidth=0.5).fit(copies).density(copies[:3], neighbors=5, adaptive=0.5)
