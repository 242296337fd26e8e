"""Inference with few clusters: effective clusters, wild bootstraps, CR2 with Satterthwaite's df.

* Effective clusters G*: Carter, Schnepel and Steigerwald (2017), from the spread of the clusters' parts of
  the slope's variance.
* Wild cluster restricted bootstrap: Cameron, Gelbach and Miller (2008), in the form of Roodman, MacKinnon,
  Nielsen and Webb (2019), which works on sums per cluster: a draw costs clusters × columns, not rows. Webb's
  six-point weights for 12 clusters or fewer. All sign patterns are taken where there are no more than draws.
* Score wild bootstrap of a logit: Kline and Santos (2012), scores of the restricted fit, recentred.
* CR2: Bell and McCaffrey (2002), Pustejovsky and Tipton (2018).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import sparse, stats

from lmd3.analysis.slope import Data, Slope, cluster_scores, nested, slope

#: Fewer effective clusters than this are few; at most so many clusters take Webb's weights.
FEW, WEBB_CLUSTERS = 40.0, 12
DRAWS = 9_999
#: Numbers held at once by a batch of draws.
_BATCH = 4_000_000
_WEBB = np.sqrt(np.array([1.5, 1.0, 0.5]))
#: Beyond so many clusters the df of Satterthwaite is that of the normal for all that matters.
_MOST_CR2 = 2_000


@dataclass(frozen=True)
class Wild:
    """The outcome of a wild bootstrap.

    Attributes:
        statistic: t of the null hypothesis that the slope is 0.
        p_value: two-sided, by |t|.
        ci_low, ci_high: 95 % interval by inversion; NaN where it was not asked for.
        bound_low, bound_high: likewise of 90 %.
        critical, critical_90: 95 and 90 % points of |t*| under the null.
        draws: draws taken.
        weights: `Rademacher` or `Webb`.
        enumerated: all patterns of signs were taken.
    """

    statistic: float
    p_value: float
    ci_low: float
    ci_high: float
    bound_low: float
    bound_high: float
    critical: float
    critical_90: float
    draws: int
    weights: str
    enumerated: bool


def effective_clusters(of: Slope, clusters: np.ndarray) -> float:
    """G*, with errors that correlate inside clusters as the residuals do (not at all where effects lie in
    clusters: those take a common error out)."""
    size = np.bincount(clusters)
    own = np.bincount(clusters, of.weights * of.x**2)
    if not (of.data.effects is not None and nested(of.codes, clusters)):
        rho = intraclass(of.rest * np.sqrt(of.weights), clusters)
        # Under a common error a cluster's part is the square of its sum.
        common = np.bincount(clusters, np.sqrt(of.weights) * of.x) ** 2
        own = (1 - rho) * own + rho * common
    count = int((size > 0).sum())
    mean = own.sum() / count
    return float(count / (1.0 + ((own[size > 0] - mean) ** 2).mean() / mean**2)) if mean > 0 else float(count)


def intraclass(x: np.ndarray, clusters: np.ndarray) -> float:
    """Intraclass correlation by the analysis of variance, cut to 0 … 1."""
    size = np.bincount(clusters).astype(np.float64)
    size = size[size > 0]
    n, g = len(x), len(size)
    if g < 2 or n <= g:
        return 0.0
    means = np.bincount(clusters, x)[np.bincount(clusters) > 0] / size
    between = float((size * (means - x.mean()) ** 2).sum()) / (g - 1)
    inside = max(float((x**2).sum() - (size * means**2).sum()) / (n - g), 1e-300)
    typical = (n - float((size**2).sum()) / n) / (g - 1)
    return float(np.clip((between - inside) / (between + (typical - 1) * inside), 0.0, 1.0))


def multipliers(count: int, draws: int, seed: int, webb: bool) -> tuple[np.ndarray, bool]:
    """(count, B) random weights of mean 0 and variance 1, and whether these are all there are."""
    points = np.concatenate([-_WEBB, _WEBB[::-1]]) if webb else np.array([-1.0, 1.0])
    if len(points) ** count <= draws:
        return np.array(list(itertools.product(points, repeat=count))).T, True
    rng = np.random.default_rng(seed)
    if webb:
        return points[rng.integers(0, 6, size=(count, draws))], False
    return rng.integers(0, 2, size=(count, draws)) * 2.0 - 1.0, False


class Restricted:
    """The wild cluster restricted bootstrap of a linear slope, for any null value of it."""

    def __init__(self, of: Slope, clusters: np.ndarray, draws: int = DRAWS, seed: int = 0) -> None:
        g = int(clusters.max()) + 1
        root = np.sqrt(of.weights)
        null = of.rest + of.estimate * of.x  # residuals where the slope is held at 0

        def sums(values: np.ndarray) -> np.ndarray:
            return np.asarray(np.bincount(clusters, values, minlength=g))

        def columns(values: np.ndarray) -> np.ndarray:
            return np.column_stack([sums(values * column) for column in of.basis.T])

        self._score, self._own = sums(of.weights * of.x * null), sums(of.weights * of.x**2)
        self._full = sums(of.weights * of.x * of.rest)
        self._estimate = of.estimate
        totals = np.bincount(of.codes, of.weights)
        cells = sparse.csr_matrix(
            (np.ones(len(clusters)), (clusters, np.arange(len(clusters)))), (g, len(clusters))
        )
        spread = sparse.csr_matrix(
            (1.0 / np.sqrt(totals[of.codes]), (np.arange(len(clusters)), of.codes)),
            (len(clusters), len(totals)),
        )

        def table(values: np.ndarray) -> np.ndarray:
            """Parts on the basis and on the effects, per cluster."""
            on_effects = (cells @ sparse.diags(values * root) @ spread).toarray()
            return np.hstack([columns(values), on_effects])

        self._left = table(root * of.x)
        self._right, self._slope = table(root * null), table(root * of.x)
        # Effects inside clusters take nothing from a cluster's score: their columns are rounding.
        useful = np.abs(self._left).max(axis=0) > 1e-12 * max(np.abs(self._left).max(), 1e-300)
        self._left, self._right, self._slope = (t[:, useful] for t in (self._left, self._right, self._slope))
        self.webb = g <= WEBB_CLUSTERS
        self._v, self.enumerated = multipliers(g, draws, seed, self.webb)
        self._right_v, self._slope_v = self._right.T @ self._v, self._slope.T @ self._v

    @property
    def draws(self) -> int:
        """Draws taken."""
        return int(self._v.shape[1])

    def statistics(self, value: float = 0.0) -> tuple[float, np.ndarray]:
        """(t, t of every draw) of the hypothesis that the slope is `value`."""
        score = self._score - value * self._own
        t = float(score.sum() / np.sqrt((self._full**2).sum()))
        out = np.empty(self.draws)
        size = max(1, _BATCH // len(score))
        for start in range(0, self.draws, size):
            part = slice(start, start + size)
            v = self._v[:, part]
            moved = v * score[:, None]
            rest = moved - self._left @ (self._right_v[:, part] - value * self._slope_v[:, part])
            with np.errstate(divide="ignore", invalid="ignore"):
                out[part] = moved.sum(axis=0) / np.sqrt((rest**2).sum(axis=0))
        return t, np.nan_to_num(out, nan=0.0, posinf=np.inf, neginf=-np.inf)

    def p_value(self, value: float = 0.0) -> float:
        """Two-sided p-value of the hypothesis that the slope is `value`."""
        t, draws = self.statistics(value)
        return _p_value(t, draws, self.enumerated)


def _p_value(t: float, draws: np.ndarray, enumerated: bool) -> float:
    beyond = int((np.abs(draws) >= abs(t) * (1 - 1e-9)).sum())
    return beyond / len(draws) if enumerated else (1 + beyond) / (1 + len(draws))


def _invert(
    p_value: Callable[[float], float], estimate: float, error: float, level: float
) -> tuple[float, float]:
    """The values that are not rejected at `level`, by bisection from the estimate outwards."""
    ends = []
    for sign in (-1.0, 1.0):
        inside, outside = 0.0, 2.0 * error
        for _ in range(12):
            if p_value(estimate + sign * outside) < level:
                break
            inside, outside = outside, 2 * outside
        else:
            ends.append(sign * np.inf)
            continue
        for _ in range(14):
            middle = (inside + outside) / 2
            inside, outside = (
                (middle, outside) if p_value(estimate + sign * middle) >= level else (inside, middle)
            )
        ends.append(estimate + sign * (inside + outside) / 2)
    return float(ends[0]), float(ends[1])


def _result(
    p_value: Callable[[float], float],
    at_zero: tuple[float, np.ndarray],
    enumerated: bool,
    webb: bool,
    of: Slope,
    clusters: np.ndarray,
    intervals: bool,
) -> Wild:
    t, draws = at_zero
    error = float(np.sqrt((cluster_scores(of, clusters) ** 2).sum()))
    low = high = narrow_low = narrow_high = float("nan")
    if intervals:
        low, high = _invert(p_value, of.estimate, error, 0.05)
        narrow_low, narrow_high = _invert(p_value, of.estimate, error, 0.10)
    return Wild(
        t,
        _p_value(t, draws, enumerated),
        low,
        high,
        narrow_low,
        narrow_high,
        float(np.quantile(np.abs(draws), 0.95)),
        float(np.quantile(np.abs(draws), 0.90)),
        len(draws),
        "Webb" if webb else "Rademacher",
        enumerated,
    )


def wild_restricted(
    of: Slope, clusters: np.ndarray, draws: int = DRAWS, seed: int = 0, intervals: bool = True
) -> Wild:
    """The wild cluster restricted bootstrap of a linear slope."""
    bootstrap = Restricted(of, clusters, draws, seed)
    return _result(
        bootstrap.p_value,
        bootstrap.statistics(),
        bootstrap.enumerated,
        bootstrap.webb,
        of,
        clusters,
        intervals,
    )


def score_statistics(sums: np.ndarray, v: np.ndarray) -> tuple[float, np.ndarray]:
    """(t, t of every draw) from sums of scores per cluster (G,) and weights (G, B), recentred."""
    g = len(sums)

    def studentised(total: np.ndarray, squares: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.nan_to_num(
                total / np.sqrt(np.maximum(squares - total**2 / g, 0.0)), posinf=1e300, neginf=-1e300
            )

    t = float(studentised(np.array(sums.sum()), np.array((sums**2).sum())))
    return t, studentised(sums @ v, sums**2 @ v**2)


def wild_score(
    data: Data,
    x: np.ndarray,
    of: Slope,
    clusters: np.ndarray,
    draws: int = DRAWS,
    seed: int = 0,
    intervals: bool = True,
) -> Wild:
    """The score wild bootstrap of a logit's slope (that of the last column of x); `of` is its full fit."""
    g = int(clusters.max()) + 1
    webb = g <= WEBB_CLUSTERS
    v, enumerated = multipliers(g, draws, seed, webb)

    def statistics(value: float) -> tuple[float, np.ndarray]:
        return score_statistics(restricted_scores(data, x, clusters, value), v)

    return _result(
        lambda value: _p_value(*statistics(value), enumerated),
        statistics(0.0),
        enumerated,
        webb,
        of,
        clusters,
        intervals,
    )


def p_value_at(
    data: Data,
    x: np.ndarray,
    of: Slope,
    clusters: np.ndarray,
    value: float,
    draws: int = DRAWS,
    seed: int = 0,
) -> float:
    """The bootstrap's p-value of the hypothesis that the slope of the last column is `value`."""
    if not data.binary:
        return Restricted(of, clusters, draws, seed).p_value(value)
    g = int(clusters.max()) + 1
    v, enumerated = multipliers(g, draws, seed, g <= WEBB_CLUSTERS)
    return _p_value(*score_statistics(restricted_scores(data, x, clusters, value), v), enumerated)


def restricted_scores(data: Data, x: np.ndarray, clusters: np.ndarray, value: float = 0.0) -> np.ndarray:
    """(G,) sums per cluster of the efficient scores of the last column's slope, held at `value`."""
    efficient, rest, weights = restricted(data, x, value)
    return np.bincount(clusters, weights * efficient * rest)


def restricted(data: Data, x: np.ndarray, value: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(efficient regressor, residuals, weights) (n,) each, of the fit whose last slope is held at `value`."""
    from lmd3.analysis.slope import least_squares, logit

    if not data.binary:
        of = slope(data, x)
        return of.x, of.rest + (of.estimate - value) * of.x, of.weights
    from scipy import special

    _, eta = logit(data, x[:, :-1], value * x[:, -1])
    p = special.expit(eta)
    trials = np.ones(len(p)) if data.weights is None else data.weights
    working = np.maximum(trials * p * (1 - p), 1e-14)
    efficient = least_squares(x[:, -1], x[:, :-1], data.codes, working)["rest"]
    return efficient, trials * (data.y - p) / working, working


@dataclass(frozen=True)
class Satterthwaite:
    """CR2 standard error of a slope and the degrees of freedom of its t."""

    std_error: float
    df: float


def cr2(of: Slope, clusters: np.ndarray) -> Satterthwaite | None:
    """CR2 of a linear slope; None beyond 2,000 clusters.

    Effects are taken out before (Pustejovsky and Tipton 2018, theorem 2: the same result where they lie in
    clusters); an intercept alone is a column.
    """
    g = int(clusters.max()) + 1
    if g > _MOST_CR2:
        return None
    root = np.sqrt(of.weights)
    basis = of.basis
    if of.data.effects is None:
        basis = np.column_stack([basis, root / np.sqrt(of.weights.sum())])
    order = np.argsort(clusters, kind="stable")
    ends = np.cumsum(np.bincount(clusters, minlength=g))
    score, parts, own = np.empty(g), np.empty((g, basis.shape[1])), np.empty(g)
    for c in range(g):
        rows = order[(ends[c - 1] if c else 0) : ends[c]]
        q, z = basis[rows], root[rows] * of.x[rows]
        values, vectors = np.linalg.eigh(q.T @ q)
        values = np.clip(values, 0.0, 1.0)
        # (I − QQ')^{-1/2}; a direction that the cluster alone determines is left out.
        gone = values > 1 - 1e-9
        factor = np.where(gone, -1.0, 1.0 / np.sqrt(np.where(gone, 1.0, 1.0 - values)) - 1.0)
        factor = np.where(values > 1e-14, factor / np.maximum(values, 1e-14), 0.5)
        adjusted = z + q @ (vectors @ (factor * (vectors.T @ (q.T @ z))))
        score[c] = adjusted @ (root[rows] * of.rest[rows])
        parts[c], own[c] = q.T @ adjusted, adjusted @ adjusted
    # Satterthwaite under errors of one variance: tr(P)² / tr(P²), P = w'(I − H)w.
    p = np.diag(own) - parts @ parts.T
    df = float(np.trace(p) ** 2 / (p**2).sum())
    return Satterthwaite(float(np.sqrt((score**2).sum()) / of.information), df)


def t_test(estimate: float, error: float, df: float) -> tuple[float, float, float, float]:
    """(t, p, low, high) of a 95 % interval."""
    t = estimate / error
    half = float(stats.t.ppf(0.975, df)) * error
    return t, float(2 * stats.t.sf(abs(t), df)), estimate - half, estimate + half
