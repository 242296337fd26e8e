"""One slope and its small-cluster inference: statsmodels, linearmodels, wildboottest, dense algebra."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import linalg, special

from lmd3.analysis import few_clusters as few
from lmd3.analysis.slope import (
    Data,
    cluster_variance,
    full_covariance,
    heteroskedastic_variance,
    slope,
)
from lmd3.errors import WorkError


def made(n: int = 300, groups: int = 9, seed: int = 0, binary: bool = False, weighted: bool = False) -> Any:
    rng = np.random.default_rng(seed)
    code = np.sort(rng.integers(0, groups, n))
    level = rng.normal(size=groups)[code]
    x = np.column_stack([rng.normal(size=n), rng.normal(size=n) + 0.5 * level])
    y = 0.3 * x[:, 0] + 0.2 * x[:, 1] + level + rng.normal(size=n)
    if binary:
        y = (y > 0).astype(float)
    weights = rng.integers(1, 5, n).astype(float) if weighted else None
    return x, y, code, weights


def dummies(code: np.ndarray) -> np.ndarray:
    return (code[:, None] == np.arange(code.max() + 1)).astype(float)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("effects", [False, True])
def test_least_squares_as_statsmodels_with_dummies(effects: bool, weighted: bool) -> None:
    x, y, code, weights = made(weighted=weighted)
    design = np.hstack([dummies(code) if effects else np.ones((len(y), 1)), x])
    peer = sm.WLS(y, design, weights=np.ones(len(y)) if weights is None else weights)
    own = slope(Data(y, False, weights, code if effects else None), x)
    assert own.estimate == pytest.approx(peer.fit().params[-1], rel=1e-10)
    assert own.coefficients == pytest.approx(peer.fit().params[-2:], rel=1e-10)
    hc3 = peer.fit(cov_type="HC3").bse
    assert np.sqrt(heteroskedastic_variance(own)) == pytest.approx(hc3[-1], rel=1e-9)
    assert np.sqrt(np.diag(full_covariance(own, x, None, True))) == pytest.approx(hc3[-2:], rel=1e-9)
    assert np.sqrt(np.diag(full_covariance(own, x, None, False))) == pytest.approx(
        peer.fit().bse[-2:], rel=1e-9
    )
    clustered = peer.fit(cov_type="cluster", cov_kwds={"groups": code}).bse[-1]
    # Effects inside clusters are not counted as parameters; statsmodels counts every column.
    n, k = design.shape
    counted = np.sqrt((n - k) / (n - 2)) if effects else 1.0
    assert np.sqrt(cluster_variance(own, code)) == pytest.approx(clustered * counted, rel=1e-9)
    assert own.fitted == pytest.approx(peer.fit().fittedvalues, rel=1e-8)
    root = np.sqrt(own.weights)[:, None] * design
    hat = root @ np.linalg.pinv(root)
    assert own.leverage == pytest.approx(np.diag(hat), rel=1e-8)


def test_effects_and_clusters_as_linearmodels() -> None:
    from linearmodels.iv.absorbing import AbsorbingLS

    x, y, code, _ = made()
    peer = AbsorbingLS(
        y, pd.DataFrame(x, columns=["a", "b"]), absorb=pd.DataFrame({"g": pd.Categorical(code)})
    )
    fitted = peer.fit(cov_type="clustered", clusters=code, debiased=False)
    own = slope(Data(y, False, None, code), x)
    assert own.estimate == pytest.approx(fitted.params["b"], rel=1e-9)
    g, n = code.max() + 1, len(y)
    plain = np.sqrt(cluster_variance(own, code) / (g / (g - 1) * (n - 1) / (n - 2)))
    assert plain == pytest.approx(fitted.std_errors["b"], rel=1e-6)


@pytest.mark.parametrize("effects", [False, True])
def test_logit_as_statsmodels_with_dummies(effects: bool) -> None:
    x, y, code, _ = made(binary=True, n=500)
    design = np.hstack([dummies(code) if effects else np.ones((len(y), 1)), x])
    peer = sm.Logit(y, design).fit(disp=0, tol=1e-12)
    own = slope(Data(y, True, None, code if effects else None), x)
    assert own.coefficients == pytest.approx(peer.params[-2:], rel=1e-7)
    assert own.quality == pytest.approx(peer.prsquared, rel=1e-8)
    assert np.sqrt(np.diag(full_covariance(own, x, None, False))) == pytest.approx(peer.bse[-2:], rel=1e-6)
    hc0 = sm.Logit(y, design).fit(disp=0, tol=1e-12, cov_type="HC0").bse
    assert np.sqrt(heteroskedastic_variance(own)) == pytest.approx(hc0[-1], rel=1e-6)
    # By row groups across effects, so that every parameter counts.
    rows = np.arange(len(y)) % 25
    clustered = sm.Logit(y, design).fit(disp=0, tol=1e-12, cov_type="cluster", cov_kwds={"groups": rows}).bse
    assert np.sqrt(cluster_variance(own, rows)) == pytest.approx(clustered[-1], rel=1e-6)


def test_trials_as_so_many_rows() -> None:
    x, _, _, _ = made(binary=True, n=400)
    x, trials = np.round(x[:100]), np.tile([1.0, 2.0, 3.0, 6.0], 25)
    right = np.random.default_rng(1).binomial(trials.astype(int), special.expit(0.5 * x[:, 1]))
    own = slope(Data(right / trials, True, trials), x)
    peer = sm.GLM(np.column_stack([right, trials - right]), sm.add_constant(x), sm.families.Binomial()).fit()
    assert own.coefficients == pytest.approx(peer.params[1:], rel=1e-7)
    assert np.sqrt(np.diag(full_covariance(own, x, None, False))) == pytest.approx(peer.bse[1:], rel=1e-6)


def test_separation_is_refused() -> None:
    x, _, _, _ = made()
    with pytest.raises(WorkError, match="separates"):
        slope(Data((x[:, 1] > 0).astype(float), True), x)


# --- bootstraps ---


def dense_bootstrap(x: np.ndarray, y: np.ndarray, code: np.ndarray, v: np.ndarray, value: float = 0.0) -> Any:
    """Wild cluster restricted bootstrap as the text-book says it: residuals, new outcomes, refits."""

    def t_of(outcome: np.ndarray) -> float:
        bread = np.linalg.inv(x.T @ x)
        beta = bread @ x.T @ outcome
        scores = x * (outcome - x @ beta)[:, None]
        sums = np.array([scores[code == c].sum(0) for c in range(code.max() + 1)])
        return float((beta[-1] - value) / np.sqrt((bread @ sums.T @ sums @ bread)[-1, -1]))

    moved = y - value * x[:, -1]
    fitted = x[:, :-1] @ np.linalg.lstsq(x[:, :-1], moved, rcond=None)[0]
    rest = moved - fitted
    return t_of(y), [t_of(value * x[:, -1] + fitted + w[code] * rest) for w in v.T]


@pytest.mark.parametrize("effects", ["none", "nested", "across"])
@pytest.mark.parametrize("value", [0.0, 0.15])
def test_restricted_bootstrap_draw_by_draw(effects: str, value: float) -> None:
    x, y, code, _ = made(groups=6)
    groups = {"none": None, "nested": code, "across": np.arange(len(y)) % 4}[effects]
    own = slope(Data(y, False, None, groups), x)
    bootstrap = few.Restricted(own, code, draws=50, seed=3)
    t, draws = bootstrap.statistics(value)
    design = np.hstack([np.ones((len(y), 1)) if groups is None else dummies(groups), x])
    peer_t, peer = dense_bootstrap(design, y, code, bootstrap._v, value)
    assert t == pytest.approx(peer_t, rel=1e-8)
    assert draws == pytest.approx(np.array(peer), rel=1e-7)


@pytest.mark.parametrize(("groups", "name"), [(8, "rademacher"), (5, "webb")])
def test_p_value_as_wildboottest(groups: int, name: str) -> None:
    from wildboottest.wildboottest import wildboottest

    x, y, code, _ = made(groups=groups, n=200)
    own = slope(Data(y, False), x)
    if name == "rademacher":
        bootstrap = few.Restricted(own, code)
        bootstrap.webb = False
        bootstrap._v, bootstrap.enumerated = few.multipliers(groups, 9_999, 0, webb=False)
        bootstrap._right_v = bootstrap._right.T @ bootstrap._v
        bootstrap._slope_v = bootstrap._slope.T @ bootstrap._v
        assert bootstrap.enumerated
        p = bootstrap.p_value()
    else:
        found = few.wild_restricted(own, code, intervals=False)
        assert found.weights == "Webb" and found.enumerated
        p = found.p_value
    frame = pd.DataFrame(x, columns=["a", "b"]).assign(y=y)
    model = sm.OLS.from_formula("y ~ a + b", frame)
    peer = wildboottest(
        model,
        param="b",
        cluster=pd.Series(code),
        B=9999,
        weights_type=name,
        impose_null=True,
        bootstrap_type="11",
        seed=1,
        show=False,
    )
    peer_p = float(np.asarray(peer["p-value"]).ravel()[0])
    # Theirs draws (Webb) or enumerates; at p near .05 the error of 9,999 draws is .0022.
    assert p == pytest.approx(peer_p, abs=0.012)


def test_interval_is_where_the_p_value_is_five_percent() -> None:
    x, y, code, _ = made(groups=15)
    own = slope(Data(y, False), x)
    found = few.wild_restricted(own, code, draws=1999)
    bootstrap = few.Restricted(own, code, 1999)
    assert found.weights == "Rademacher" and not found.enumerated
    for end in (found.ci_low, found.ci_high):
        assert bootstrap.p_value(end) == pytest.approx(0.05, abs=0.006)
    assert found.ci_low < found.bound_low < own.estimate < found.bound_high < found.ci_high


def test_score_bootstrap_by_hand() -> None:
    x, y, code, _ = made(groups=6, binary=True, n=400)
    data = Data(y, True)
    own = slope(data, x)
    found = few.wild_score(data, x, own, code, intervals=False)
    base = sm.Logit(y, sm.add_constant(x[:, :1])).fit(disp=0, tol=1e-12)
    p = base.predict()
    w = p * (1 - p)
    inner = sm.add_constant(x[:, :1])
    efficient = x[:, 1] - inner @ np.linalg.solve(
        (inner * w[:, None]).T @ inner, (inner * w[:, None]).T @ x[:, 1]
    )
    sums = np.array([(efficient * (y - p))[code == c].sum() for c in range(6)])
    t = sums.sum() / np.sqrt(((sums - sums.mean()) ** 2).sum())
    assert found.statistic == pytest.approx(t, rel=1e-6)
    points = np.concatenate([-few._WEBB, few._WEBB])
    rng = np.random.default_rng(0)
    moved = points[rng.integers(0, 6, size=(4000, 6))] * sums
    draws = moved.sum(1) / np.sqrt(((moved - moved.mean(1, keepdims=True)) ** 2).sum(1))
    assert found.p_value == pytest.approx((np.abs(draws) >= abs(t)).mean(), abs=0.03)


def test_cr2_and_its_df_by_dense_algebra() -> None:
    x, y, code, _ = made(groups=7, n=80)
    for effects in (None, code):
        own = slope(Data(y, False, None, effects), x)
        found = few.cr2(own, code)
        assert found is not None
        design = np.column_stack([np.ones(80), x]) if effects is None else np.hstack([dummies(code), x])
        bread = np.linalg.inv(design.T @ design)
        hat = design @ bread @ design.T
        rest = y - hat @ y
        c = np.zeros(design.shape[1])
        c[-1] = 1
        total, columns = 0.0, []
        for g in range(7):
            at = np.flatnonzero(code == g)
            values, vectors = linalg.eigh(np.eye(len(at)) - hat[np.ix_(at, at)])
            root = (
                vectors
                @ np.diag(np.where(values > 1e-9, 1 / np.sqrt(np.maximum(values, 1e-12)), 0.0))
                @ vectors.T
            )
            w = root @ design[at] @ bread @ c
            total += float(w @ rest[at]) ** 2
            column = np.zeros(80)
            column[at] = w
            columns.append((np.eye(80) - hat) @ column)
        p = np.array(columns) @ np.array(columns).T
        assert found.std_error == pytest.approx(np.sqrt(total), rel=1e-6)
        assert found.df == pytest.approx(np.trace(p) ** 2 / (p**2).sum(), rel=1e-6)


def test_effective_clusters() -> None:
    rng = np.random.default_rng(0)
    even = np.repeat(np.arange(50), 20)
    x, y = rng.normal(size=(1000, 1)), rng.normal(size=1000)
    assert few.effective_clusters(slope(Data(y, False), x), even) > 40
    uneven = np.concatenate([np.zeros(700, dtype=int), np.arange(300) % 49 + 1])
    assert few.effective_clusters(slope(Data(y, False), x), uneven) < 5


def test_all_sign_patterns_where_there_are_few() -> None:
    v, every = few.multipliers(4, 100, 0, webb=False)
    assert every and {tuple(c) for c in v.T} == set(itertools.product((-1.0, 1.0), repeat=4))
    v, every = few.multipliers(5, 9_999, 0, webb=True)
    assert every and v.shape == (5, 6**5)
    assert (v**2).mean() == pytest.approx(1.0) and v.mean() == pytest.approx(0.0, abs=1e-12)
