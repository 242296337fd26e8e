"""Which controls enter a model, and the ladder M0 … M4 of what each step explains.

Every step states three things: the in-sample gain of R² (McFadden's R² for a binary outcome), which is never
negative; the 95 % point of that gain when the added columns are shuffled among the rows of a group; and the
gain on rows that the fit has not seen, with an interval, which is negative where the step does not transport.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy import special, stats

from lmd3 import tables
from lmd3.errors import ParameterError

#: The part a known covariate plays; any other column of the covariates is the user's own and enters first.
LENGTH = ("log_tokens",)
LEXICAL = ("unigram_cross_entropy", "rarest_term_count", "ngram_overlap", "duplicates", "reference_loss")
TYPICALITY = "typicality"
MAX_COSINE = "max_cosine"
#: What the headline model of the method asks for; what of it is missing is named.
EXPECTED = (*LENGTH, "unigram_cross_entropy", TYPICALITY)

SHUFFLES = 200
FOLDS = 10
#: Columns of `ladder.parquet`.
LADDER = ("step", "terms", "r_squared", "delta", "shuffle_null", "out_of_group_delta", "ci_low", "ci_high")


@dataclass(frozen=True)
class Controls:
    """The controls of a study.

    Attributes:
        names: columns that enter the headline model, in the order base, lexical, typicality.
        base, lexical: those of M0 and those that M1 adds.
        missing: what the headline model of the method asks for and nobody gave.
        left_out: column → why it was not used.
    """

    names: list[str]
    base: list[str]
    lexical: list[str]
    missing: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def choose(
    wanted: str | Sequence[str], frame: pd.DataFrame, covariates: Sequence[str], predictor: str
) -> Controls:
    """Resolves `--controls`.

    Args:
        wanted: `default` (typicality and every numeric covariate), `none`, or names (a list, or joined by
            commas).
        frame: the joined rows.
        covariates: columns of the covariates' table.
        predictor: never a control of itself.

    Raises:
        ColumnError: a column named does not exist or is not numeric.
        ParameterError: the predictor named as its own control.
    """
    if isinstance(wanted, str):
        wanted = wanted if wanted in ("default", "none") else [w.strip() for w in wanted.split(",")]
    left_out: dict[str, str] = {}
    missing: list[str] = []
    names: list[str] = []
    if wanted == "none":
        pass
    elif wanted == "default":
        for name in dict.fromkeys([*covariates, TYPICALITY]):
            if name not in frame.columns or name in ("id", "group", MAX_COSINE, predictor):
                continue
            if not tables.is_numeric(frame[name]):
                left_out[name] = "not numeric"
            elif not np.isfinite(tables.numbers(frame[name], name)).any():
                left_out[name] = "no values"
            else:
                names.append(name)
        missing = [name for name in EXPECTED if name not in names and name != predictor]
    else:
        names = list(dict.fromkeys(name for name in wanted if name))
        for name in names:
            if name == predictor:
                raise ParameterError(f"{name} is the predictor and can't be a control of itself")
            tables.numbers(tables.column(frame, name), name)
    lexical = [name for name in names if name in LEXICAL]
    base = [name for name in names if name not in (*LEXICAL, TYPICALITY, MAX_COSINE)]
    order = base + lexical + [name for name in (TYPICALITY, MAX_COSINE) if name in names]
    return Controls(order, base, lexical, missing, left_out)


# --- the ladder ---


@dataclass(frozen=True)
class _Step:
    name: str
    terms: list[str]
    before: list[str] | None


def steps(controls: Controls, available: Sequence[str], predictor: str, column: str) -> list[_Step]:
    """The steps of the ladder that this study can take; `before` are the terms of the model compared with."""
    typicality = [TYPICALITY] if TYPICALITY in available and predictor != TYPICALITY else []
    nearest = [MAX_COSINE] if MAX_COSINE in available and predictor != MAX_COSINE else []
    m0 = list(controls.base)
    m1 = m0 + controls.lexical
    m2 = m1 + typicality
    m3 = m2 + nearest
    lower = "M1" if controls.lexical else "M0"
    out = [_Step("M0", m0, None)]
    if controls.lexical:
        out.append(_Step("M1 + lexical", m1, m0))
    if typicality:
        out.append(_Step("M2 + typicality", m2, m1))
    if nearest:
        out.append(_Step("M3 + max cosine", m3, m2))
    out.append(_Step(f"M4 + {words(predictor)}", [*m3, column], m3))
    if nearest:
        out.append(_Step(f"{'M2' if typicality else lower} + {words(predictor)}", [*m2, column], m2))
    return out


def words(name: str) -> str:
    """A column's name as words."""
    return name.replace("_", " ")


def ladder(
    frame: pd.DataFrame,
    path: Sequence[_Step],
    *,
    binary: bool,
    effects: np.ndarray | None = None,
    clusters: np.ndarray | None = None,
    shuffles: int = SHUFFLES,
    seed: int = 0,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Takes the steps.

    Args:
        frame: `value` and the (standardised) terms, without missing values.
        path: from `steps`.
        binary: logit (McFadden's R²) or least squares (R²).
        effects: codes of the groups that have an effect each, in every step, or None.
        clusters: codes of the clusters, or None.
        shuffles: draws of the shuffle null, at least 1.
        seed: of shuffles and folds.

    Returns:
        The table of `LADDER` (`shuffle_null`: 95 % point of the gain under shuffling) and facts for
        `summary.json`: how rows were shuffled and left out, and per step the shuffles' mean gain and p-value.
    """
    y = frame["value"].to_numpy(dtype=np.float64)
    groups = effects if effects is not None else _shuffle_groups(clusters)
    fitter = fitter_of(y, effects, binary)
    folds, left_out = _folds(len(y), effects, clusters, binary, seed)
    # Rows left out inside groups are judged as rows; whole groups as groups.
    grouped = effects if left_out == "groups" else None
    rows, facts = [], {}
    columns = {name: frame[name].to_numpy(dtype=np.float64) for name in dict.fromkeys(sum_terms(path))}
    orders = _orders(len(y), groups, shuffles, seed)
    for step in path:
        full = _matrix(columns, step.terms, len(y))
        r_squared = fitter.r_squared(full)
        row: dict[str, Any] = {"step": step.name, "terms": ", ".join(step.terms), "r_squared": r_squared}
        if step.before is not None:
            base = _matrix(columns, step.before, len(y))
            added = _matrix(columns, [t for t in step.terms if t not in step.before], len(y))
            delta = max(0.0, r_squared - fitter.r_squared(base))
            null = fitter.null_gains(base, added, orders)
            losses = fitter.out_of_fold(base, full, folds)
            gain, low, high = _ratio(*losses, clusters if clusters is not None else grouped)
            row |= {"delta": delta, "shuffle_null": float(np.quantile(null, 0.95))}
            row |= {"out_of_group_delta": gain, "ci_low": low, "ci_high": high}
            p_value = (1 + int((null >= delta).sum())) / (1 + len(null))
            facts[step.name] = {"shuffle_mean": float(null.mean()), "shuffle_p_value": p_value}
        rows.append(row)
    table = pd.DataFrame(rows, columns=list(LADDER))
    how = "whole sample" if groups is None else "groups" if effects is not None else "clusters"
    return table, {
        "shuffles": shuffles,
        "shuffled_within": how,
        "left_out": left_out,
        "folds": int(folds.max()) + 1,
        "seed": seed,
        "steps": facts,
    }


def fitter_of(y: np.ndarray, effects: np.ndarray | None, binary: bool) -> _Linear | _Logit:
    """Quick fits of y, with group effects where codes of groups are given."""
    return _Logit(y, effects) if binary else _Linear(y, effects)


def sum_terms(path: Sequence[_Step]) -> list[str]:
    """All terms of all steps, with repetitions."""
    return [term for step in path for term in step.terms]


def _matrix(columns: dict[str, np.ndarray], terms: Sequence[str], n: int) -> np.ndarray:
    return np.column_stack([columns[t] for t in terms]) if terms else np.empty((n, 0))


def _shuffle_groups(clusters: np.ndarray | None, least: float = 5.0) -> np.ndarray | None:
    """Rows are shuffled within clusters of five rows or more on average; in smaller ones too little moves."""
    if clusters is None or len(clusters) / (int(clusters.max()) + 1) < least:
        return None
    return clusters


def _orders(n: int, groups: np.ndarray | None, draws: int, seed: int) -> list[np.ndarray]:
    """Random orders of the rows that keep every row inside its group."""
    rng = np.random.default_rng(seed)
    if groups is None:
        return [rng.permutation(n) for _ in range(draws)]
    home = np.argsort(groups, kind="stable")
    orders = []
    for _ in range(draws):
        order = np.empty(n, dtype=np.int64)
        order[home] = home[np.lexsort((rng.random(n), groups[home]))]
        orders.append(order)
    return orders


def _folds(
    n: int, effects: np.ndarray | None, clusters: np.ndarray | None, binary: bool, seed: int
) -> tuple[np.ndarray, str]:
    """Fold of every row, and in words what is left out.

    Whole groups are left out where there are at least three of them. A logit with group effects can't predict
    a group it has not seen, so there rows are left out inside the groups.
    """
    rng = np.random.default_rng(seed + 1)
    groups = clusters if clusters is not None else effects
    if groups is not None and not (binary and effects is not None):
        sizes = np.bincount(groups)
        if len(sizes) >= 3:
            order = np.argsort(-(sizes + rng.random(len(sizes)) * 0.5), kind="stable")
            fold_of, loads = np.empty(len(sizes), dtype=np.int64), np.zeros(min(FOLDS, len(sizes)))
            for group in order:
                fold_of[group] = int(np.argmin(loads))
                loads[fold_of[group]] += sizes[group]
            return fold_of[groups], "clusters" if clusters is not None else "groups"
    fold = np.empty(n, dtype=np.int64)
    order = rng.permutation(n)
    if effects is not None:
        order = order[np.argsort(effects[order], kind="stable")]
    fold[order] = np.arange(n) % min(FOLDS, n)
    return fold, "rows"


def _ratio(gains: np.ndarray, scale: np.ndarray, groups: np.ndarray | None) -> tuple[float, float, float]:
    """Σ gains / Σ scale with its 95 % interval: delta method, clustered where groups are given, t(G−1)."""
    total = float(scale.sum())
    ratio = float(gains.sum()) / total
    influence = gains - ratio * scale
    if groups is not None:
        influence = np.asarray(np.bincount(groups, influence), dtype=np.float64)
    count = len(influence)
    error = np.sqrt((influence**2).sum() * count / (count - 1)) / total
    half = float(stats.t.ppf(0.975, count - 1) * error)
    return ratio, ratio - half, ratio + half


class _Linear:
    """Least squares with group effects taken out by the groups' means (Frisch–Waugh–Lovell)."""

    def __init__(self, y: np.ndarray, effects: np.ndarray | None) -> None:
        self._effects = np.zeros(len(y), dtype=np.int64) if effects is None else effects
        self._sizes = np.bincount(self._effects)
        self._total = float(((y - y.mean()) ** 2).sum())
        self._grouped = effects is not None
        self._raw = y
        self._y = self._within(y)

    def _within(self, x: np.ndarray) -> np.ndarray:
        """Columns less their group's mean (the overall mean without groups)."""
        if x.ndim == 1:
            means = np.asarray(np.bincount(self._effects, x) / self._sizes, dtype=np.float64)
            return np.asarray(x - means[self._effects])
        return np.column_stack([self._within(column) for column in x.T]) if x.shape[1] else x

    def _residuals(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(residuals of y, orthonormal basis of x), both after the group means."""
        basis = np.linalg.qr(self._within(x))[0] if x.shape[1] else np.empty((len(x), 0))
        return self._y - basis @ (basis.T @ self._y), basis

    def r_squared(self, x: np.ndarray) -> float:
        """R² of the columns of x (and the group effects)."""
        rest, _ = self._residuals(x)
        return max(0.0, 1.0 - float(rest @ rest) / self._total)

    def null_gains(self, base: np.ndarray, added: np.ndarray, orders: list[np.ndarray]) -> np.ndarray:
        """Gain of R² of the added columns in every one of the orders."""
        rest, basis = self._residuals(base)
        gains = np.empty(len(orders))
        for draw, order in enumerate(orders):
            x = self._within(added[order])
            new = np.linalg.qr(x - basis @ (basis.T @ x))[0]
            gains[draw] = float(((new.T @ rest) ** 2).sum()) / self._total
        return gains

    def out_of_fold(
        self, base: np.ndarray, full: np.ndarray, folds: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(gain in squared error, squared error of the mean) per row, from fits without the row's fold.

        With group effects both sides are taken less their group's means, so a slope is carried to groups that
        the fit has not seen while the level of each stays its own.
        """
        if self._grouped:
            y, base, full = self._y, self._within(base), self._within(full)
            scale = (self._raw - self._raw.mean()) ** 2
        else:
            y, scale = self._raw, np.empty(len(self._raw))
        ones = np.ones((len(y), 1))
        base, full = (x if self._grouped else np.hstack([ones, x]) for x in (base, full))
        gains = np.empty(len(y))
        for fold in range(int(folds.max()) + 1):
            out = folds == fold
            errors = []
            for x in (base, full):
                slopes = np.linalg.lstsq(x[~out], y[~out], rcond=None)[0] if x.shape[1] else np.empty(0)
                errors.append((y[out] - x[out] @ slopes) ** 2)
            gains[out] = errors[0] - errors[1]
            if not self._grouped:
                scale[out] = (y[out] - y[~out].mean()) ** 2
        return gains, scale


class _Logit:
    """Logits by Newton's method, fast enough for many folds; the tables' fits are those of statsmodels."""

    def __init__(self, y: np.ndarray, effects: np.ndarray | None) -> None:
        self._y = y
        count = 0 if effects is None else int(effects.max()) + 1
        dummies = [] if effects is None else [(effects == g).astype(np.float64) for g in range(1, count)]
        self._effects = np.column_stack([np.ones(len(y)), *dummies])
        mean = y.mean()
        self._null = float(special.xlogy(y, mean).sum() + special.xlog1py(1 - y, -mean).sum())

    def _x(self, x: np.ndarray) -> np.ndarray:
        return np.hstack([self._effects, x])

    def r_squared(self, x: np.ndarray) -> float:
        """McFadden's R² of the columns of x (and the group effects)."""
        x = self._x(x)
        return max(0.0, 1.0 - float(_log_likelihood(self._y, x @ newton(self._y, x)).sum()) / self._null)

    def null_gains(self, base: np.ndarray, added: np.ndarray, orders: list[np.ndarray]) -> np.ndarray:
        """By Rao's score statistic: twice the gain in log likelihood, to first order, without a refit."""
        x = self._x(base)
        p = special.expit(x @ newton(self._y, x))
        root = np.sqrt(p * (1 - p))
        basis = np.linalg.qr(root[:, None] * x)[0]
        rest = np.divide(self._y - p, root, out=np.zeros_like(p), where=root > 0)
        gains = np.empty(len(orders))
        for draw, order in enumerate(orders):
            new = root[:, None] * added[order]
            new = np.linalg.qr(new - basis @ (basis.T @ new))[0]
            gains[draw] = 0.5 * float(((new.T @ rest) ** 2).sum()) / -self._null
        return gains

    def out_of_fold(
        self, base: np.ndarray, full: np.ndarray, folds: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(gain in log likelihood, minus that of the base rate) per row, from fits without the row's fold."""
        y, gains, scale = self._y, np.empty(len(self._y)), np.empty(len(self._y))
        base, full = self._x(base), self._x(full)
        for fold in range(int(folds.max()) + 1):
            out = folds == fold
            likelihoods = [_log_likelihood(y[out], x[out] @ newton(y[~out], x[~out])) for x in (base, full)]
            gains[out] = likelihoods[1] - likelihoods[0]
            rate = np.clip(y[~out].mean(), 1e-12, 1 - 1e-12)
            scale[out] = -(special.xlogy(y[out], rate) + special.xlog1py(1 - y[out], -rate))
        return gains, scale


def _log_likelihood(y: np.ndarray, eta: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0.0, np.where(y > 0.5, -eta, eta))


def newton(y: np.ndarray, x: np.ndarray, steps: int = 50) -> np.ndarray:
    """Coefficients of a logit by Newton's method with halved steps.

    A ridge of 1e-8 of the Hessian's mean diagonal keeps separated or repeated columns finite.
    """
    beta = np.zeros(x.shape[1])
    likelihood = float(_log_likelihood(y, x @ beta).sum())
    for _ in range(steps):
        p = special.expit(x @ beta)
        hessian = x.T @ (x * (p * (1 - p))[:, None])
        hessian[np.diag_indices_from(hessian)] += 1e-8 * max(float(np.trace(hessian)) / len(beta), 1e-8)
        move = np.linalg.solve(hessian, x.T @ (y - p))
        for _ in range(20):
            new = float(_log_likelihood(y, x @ (beta + move)).sum())
            if new >= likelihood:
                break
            move /= 2
        beta = beta + move
        if new - likelihood < 1e-10 * abs(likelihood):
            return beta
        likelihood = new
    return beta
