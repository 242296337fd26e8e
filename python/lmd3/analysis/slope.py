"""One slope with everything else taken out: what covariances, bootstraps and charts are made from.

Least squares and the logit are one case here: at its maximum a logit is the weighted least squares of its
working residuals. Group effects are taken out by weighted group means (Frisch–Waugh–Lovell), never by
columns, so 200,000 rows in 200 groups cost no more than in one. The intercept is the effect of one group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse, special

from lmd3.errors import WorkError

#: Newton steps of a logit, and the relative change of the likelihood that ends them.
STEPS, TOLERANCE = 60, 1e-12
#: A linear predictor beyond this means that the likelihood has no maximum.
SEPARATED = 30.0


@dataclass(frozen=True)
class Data:
    """Rows of a regression.

    Attributes:
        y: (n,) outcome; for a binary one 0 or 1, or a share of `trials`.
        binary: a logit (True) or least squares.
        weights: (n,) positive weights (trials counted in), or None for ones.
        effects: (n,) codes 0 … F−1 of groups that get an effect each, or None for an intercept alone.
    """

    y: np.ndarray
    binary: bool
    weights: np.ndarray | None = None
    effects: np.ndarray | None = None

    @property
    def codes(self) -> np.ndarray:
        """Codes of the effects; all 0 for an intercept alone."""
        return np.zeros(len(self.y), dtype=np.int64) if self.effects is None else self.effects

    @property
    def effect_count(self) -> int:
        """Number of effects, the intercept counted as one."""
        return 1 if self.effects is None else int(np.max(self.effects)) + 1

    def take(self, rows: np.ndarray) -> Data:
        """The data of some rows; codes of effects are made dense again."""
        effects = None if self.effects is None else np.unique(self.effects[rows], return_inverse=True)[1]
        return Data(self.y[rows], self.binary, None if self.weights is None else self.weights[rows], effects)


@dataclass(frozen=True)
class Slope:
    """The slope of the last column of a design, and its parts.

    Attributes:
        estimate: the slope.
        x: (n,) the predictor less what the other columns and the effects say of it, under `weights`.
        weights: (n,) weights of least squares, working weights of a logit.
        rest: (n,) residuals (working residuals of a logit) of the full model.
        basis: (n, k) orthonormal: √weights × (columns less their effects); the last is that of the predictor.
        coefficients: (k,) of all columns.
        levels: (F,) the effects.
        linear: (n,) fitted value, on the scale of the logit for a binary outcome.
        codes: (n,) codes of the effects.
        quality: R², or McFadden's R².
        log_likelihood: of a logit; NaN else.
        data: the rows.
    """

    estimate: float
    x: np.ndarray
    weights: np.ndarray
    rest: np.ndarray
    basis: np.ndarray
    coefficients: np.ndarray
    levels: np.ndarray
    linear: np.ndarray
    codes: np.ndarray
    quality: float
    log_likelihood: float
    data: Data

    @property
    def information(self) -> float:
        """Σ weights × x²."""
        return float(self.weights @ self.x**2)

    @property
    def influence(self) -> np.ndarray:
        """(n,) what each row contributes to (estimate − truth), to first order."""
        return np.asarray(self.weights * self.x * self.rest / self.information)

    @property
    def leverage(self) -> np.ndarray:
        """(n,) diagonal of the hat matrix, effects included."""
        totals = np.bincount(self.codes, self.weights)
        return np.asarray((self.basis**2).sum(axis=1) + self.weights / totals[self.codes])

    @property
    def fitted(self) -> np.ndarray:
        """(n,) fitted values on the outcome's scale."""
        return np.asarray(special.expit(self.linear)) if self.data.binary else self.linear

    @property
    def parameters(self) -> int:
        """Columns and effects."""
        return int(self.basis.shape[1]) + len(self.levels)


def group_means(x: np.ndarray, codes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(F,) or (F, k) weighted means per group."""
    totals = np.bincount(codes, weights)
    if x.ndim == 1:
        return np.asarray(np.bincount(codes, weights * x) / totals)
    if len(totals) == 1:
        return np.asarray((weights @ x / totals[0])[None, :])
    table = sparse.csr_matrix((weights, (codes, np.arange(len(codes)))), shape=(len(totals), len(codes)))
    return np.asarray(table @ x) / totals[:, None]


def within(x: np.ndarray, codes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Columns less their group's weighted mean."""
    means = group_means(x, codes, weights)
    return np.asarray(x - (means[0] if len(means) == 1 else means[codes]))


def least_squares(y: np.ndarray, x: np.ndarray, codes: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """Weighted least squares with effects: coefficients, levels, residuals and an orthonormal basis."""
    root = np.sqrt(weights)
    inner = within(x, codes, weights)
    basis, upper = np.linalg.qr(root[:, None] * inner)
    inside = within(y, codes, weights)
    projected = basis.T @ (root * inside)
    beta = np.linalg.solve(upper, projected) if len(upper) else np.empty(0)
    levels = group_means(y - x @ beta, codes, weights)
    return {
        "beta": beta,
        "levels": levels,
        "rest": inside - inner @ beta,
        "basis": basis,
        "upper": upper,
        "inner": inner,
    }


def logit(
    data: Data,
    x: np.ndarray,
    offset: np.ndarray | None = None,
    start: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients and linear predictor of a logit with effects, by Newton's method with halved steps.

    Args:
        data: rows of a binary outcome.
        x: (n, k) columns.
        offset: (n,) added to the linear predictor with coefficient 1.
        start: coefficients (k,) and effects (F,) to begin with.

    Raises:
        WorkError: the likelihood has no maximum (a column or group separates the outcomes).
    """
    y, codes = data.y, data.codes
    trials = np.ones(len(y)) if data.weights is None else data.weights
    shift = np.zeros(len(y)) if offset is None else offset
    if start is None:
        mean = float(np.average(y, weights=trials))
        level = special.logit(np.clip(mean, 1e-6, 1 - 1e-6)) - np.average(shift)
        beta, levels = np.zeros(x.shape[1]), np.full(data.effect_count, level)
    else:
        beta, levels = start
    eta = x @ beta + levels[codes] + shift
    likelihood = float(trials @ _log_likelihood(y, eta))
    for _ in range(STEPS):
        p = special.expit(eta)
        working = np.maximum(trials * p * (1 - p), 1e-14)
        # Normal equations will do for the direction: the terms are of one scale, and the steps correct it.
        score = trials * (y - p)
        totals = np.bincount(codes, working)
        means = group_means(x, codes, working)
        inner = x - (means[0] if len(means) == 1 else means[codes])
        try:
            move = np.linalg.solve((inner * working[:, None]).T @ inner, inner.T @ score)
        except np.linalg.LinAlgError:
            break
        shifts = np.bincount(codes, score) / totals - means @ move
        step = 1.0
        for _ in range(30):
            new_beta, new_levels = beta + step * move, levels + step * shifts
            new_eta = x @ new_beta + new_levels[codes] + shift
            new = float(trials @ _log_likelihood(y, new_eta))
            if new >= likelihood - 1e-12 * abs(likelihood):
                break
            step /= 2
        beta, levels, eta = new_beta, new_levels, new_eta
        if abs(new - likelihood) <= TOLERANCE * max(abs(likelihood), 1.0):
            if np.abs(eta - shift).max() > SEPARATED and _is_separated(y, eta, trials):
                break
            return beta, eta
        likelihood = new
    raise WorkError("the logit does not converge", remedy="a term or group separates right from wrong")


def _is_separated(y: np.ndarray, eta: np.ndarray, trials: np.ndarray) -> bool:
    return bool(np.abs(y - special.expit(eta)).max() < 0.5) or float(trials @ _log_likelihood(y, eta)) > -1e-6


def _log_likelihood(y: np.ndarray, eta: np.ndarray) -> np.ndarray:
    return np.asarray(y * eta - np.logaddexp(0.0, eta))


def slope(data: Data, x: np.ndarray, offset: np.ndarray | None = None) -> Slope:
    """The slope of the last column of x (n, k ≥ 1), the others and the effects taken out.

    Args:
        data: the rows.
        x: (n, k) columns, linearly independent of each other and the effects.
        offset: (n,) of a logit: enters with coefficient 1.

    Raises:
        WorkError: a logit that does not converge.
    """
    codes, y = data.codes, data.y
    weights = np.ones(len(y)) if data.weights is None else data.weights
    log_likelihood = float("nan")
    if data.binary:
        beta, eta = logit(data, x, offset)
        p = special.expit(eta)
        working = np.maximum(weights * p * (1 - p), 1e-14)
        parts = least_squares(weights * (y - p) / working, x, codes, working)
        parts["rest"] = weights * (y - p) / working
        # The intercepts follow from the linear predictor; at the maximum `parts` has only rounding in them.
        shift = 0.0 if offset is None else offset
        levels = group_means(eta - x @ beta - shift, codes, np.ones(len(y)))
        log_likelihood = float(weights @ _log_likelihood(y, eta))
        mean = float(np.average(y, weights=weights))
        null = float((weights.sum()) * (special.xlogy(mean, mean) + special.xlog1py(1 - mean, -mean)))
        quality = 1.0 - log_likelihood / null
        linear, use = eta, working
    else:
        parts = least_squares(y, x, codes, weights)
        beta, levels, use = parts["beta"], parts["levels"], weights
        linear = y - parts["rest"]
        mean = float(np.average(y, weights=weights))
        quality = 1.0 - float(weights @ parts["rest"] ** 2) / float(weights @ (y - mean) ** 2)
    last = parts["basis"][:, -1] * parts["upper"][-1, -1] / np.sqrt(use)
    return Slope(
        float(beta[-1]),
        last,
        use,
        parts["rest"],
        parts["basis"],
        beta,
        levels,
        linear,
        codes,
        quality,
        log_likelihood,
        data,
    )


# --- covariances ---


def nested(effects: np.ndarray, clusters: np.ndarray) -> bool:
    """Whether every group of effects lies in one cluster."""
    pairs = np.unique(np.column_stack([effects, clusters]), axis=0)
    return bool(len(pairs) == len(np.unique(pairs[:, 0])))


def counted_parameters(of: Slope, clusters: np.ndarray | None) -> int:
    """Parameters that a small-sample factor counts.

    Group effects inside clusters are not among them (Cameron and Miller 2015, section III.B): their scores
    add up to zero in every cluster.
    """
    if clusters is None or of.data.effects is None or not nested(of.codes, clusters):
        return of.parameters
    return int(of.basis.shape[1])


def cluster_scores(of: Slope, clusters: np.ndarray) -> np.ndarray:
    """(G,) sums of the influence per cluster."""
    return np.bincount(clusters, of.influence)


def cluster_variance(of: Slope, clusters: np.ndarray) -> float:
    """The cluster sandwich with G/(G−1)·(n−1)/(n−k), as statsmodels has it."""
    sums = cluster_scores(of, clusters)
    g, n = len(sums), len(of.x)
    return float((sums**2).sum() * g / (g - 1) * (n - 1) / (n - counted_parameters(of, clusters)))


def heteroskedastic_variance(of: Slope) -> float:
    """HC3 of least squares, HC0 of a logit."""
    influence = of.influence
    if not of.data.binary:
        influence = influence / np.maximum(1.0 - of.leverage, 1e-10)
    return float((influence**2).sum())


def full_covariance(of: Slope, x: np.ndarray, clusters: np.ndarray | None, robust: bool) -> np.ndarray:
    """(k, k) covariance of all coefficients (effects taken out): the sandwich of the kind asked for."""
    inner = within(x, of.codes, of.weights)
    bread = np.linalg.inv((inner * of.weights[:, None]).T @ inner)
    n = len(inner)
    if not robust:
        scale = 1.0
        if not of.data.binary:
            scale = float(of.weights @ of.rest**2) / (n - of.parameters)
        return np.asarray(bread * scale)
    scores = inner * (of.weights * of.rest)[:, None]
    if clusters is None:
        if not of.data.binary:
            scores = scores / np.maximum(1.0 - of.leverage, 1e-10)[:, None]
        return np.asarray(bread @ (scores.T @ scores) @ bread)
    g = int(clusters.max()) + 1
    sums = np.column_stack([np.bincount(clusters, column, minlength=g) for column in scores.T])
    factor = g / (g - 1) * (n - 1) / (n - counted_parameters(of, clusters))
    return np.asarray(bread @ (sums.T @ sums) @ bread * factor)
