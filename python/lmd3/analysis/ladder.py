"""The ladder M0 … M4: what each step explains.

Every step states three things: the in-sample gain of R² (McFadden's R² for a binary outcome), which is never
negative; the 95 % point of that gain when the added columns are shuffled among the rows of a group; and the
gain on rows that the fit has not seen, with an interval, which is negative where the step does not transport.
Beside it Shapley's split of R² among the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import special, stats

from lmd3 import study_files as _files
from lmd3.analysis import slope as _slope
from lmd3.analysis.controls import MAX_COSINE, TYPICALITY, Controls
from lmd3.errors import WorkError

SHUFFLES = 200
FOLDS = 10
#: Columns of `ladder.parquet`.
LADDER = tuple(_files.LADDER.names)


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
    groups: np.ndarray | None = None,
    weights: np.ndarray | None = None,
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
        groups: codes inside which rows are shuffled (the effects where there are any), or None.
        weights: (n,) of the rows, trials counted in, or None.
        shuffles: draws of the shuffle null, at least 1.
        seed: of shuffles and folds.

    Returns:
        The table of `LADDER` (`shuffle_null`: 95 % point of the gain under shuffling) and facts for
        `summary.json`: how rows were shuffled and left out, and per step the shuffles' mean gain and p-value.
    """
    y = frame["value"].to_numpy(dtype=np.float64)
    groups = effects if effects is not None else groups
    fitter = fitter_of(y, effects, binary, weights)
    folds, left_out = _folds(len(y), effects, clusters, binary, seed)
    # Rows left out inside groups are judged as rows; whole groups as groups.
    grouped = effects if left_out == "groups" else None
    columns = {name: frame[name].to_numpy(dtype=np.float64) for name in dict.fromkeys(sum_terms(path))}
    rows: list[dict[str, Any]] = []
    nulls: dict[str, Shuffled] = {}
    losses: dict[tuple[str, ...], tuple[np.ndarray, np.ndarray]] = {}
    for step in path:
        full = _matrix(columns, step.terms, len(y))
        r_squared = fitter.r_squared(full)
        row: dict[str, Any] = {"step": step.name, "terms": ", ".join(step.terms), "r_squared": r_squared}
        if step.before is not None:
            base = _matrix(columns, step.before, len(y))
            added = _matrix(columns, [t for t in step.terms if t not in step.before], len(y))
            nulls[step.name] = Shuffled(fitter.restricted(base), added)
            for terms, x in ((step.before, base), (step.terms, full)):
                if tuple(terms) not in losses:
                    losses[tuple(terms)] = fitter.losses(x, folds)
            before, scale = losses[tuple(step.before)]
            gains_out = before - losses[tuple(step.terms)][0]
            gain, low, high = _ratio(gains_out, scale, clusters if clusters is not None else grouped)
            row["delta"] = max(0.0, r_squared - fitter.r_squared(base))
            row |= {"out_of_group_delta": gain, "ci_low": low, "ci_high": high}
        rows.append(row)
    gains: dict[str, list[float]] = {name: [] for name in nulls}
    # One order at a time serves every step: 200 orders of 200,000 rows would be a third of a gigabyte.
    for order in orders_of(len(y), groups, shuffles, seed):
        for name, null in nulls.items():
            gains[name].append(fitter.gain(null, order))
    facts = {}
    for row in rows:
        if row["step"] in gains:
            shuffled = np.array(gains[row["step"]])
            row["shuffle_null"] = float(np.quantile(shuffled, 0.95))
            p_value = (1 + int((shuffled >= row["delta"]).sum())) / (1 + len(shuffled))
            facts[row["step"]] = {"shuffle_mean": float(shuffled.mean()), "shuffle_p_value": p_value}
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


def shapley(
    frame: pd.DataFrame,
    blocks: Sequence[tuple[str, Sequence[str]]],
    *,
    binary: bool,
    effects: np.ndarray | None = None,
    weights: np.ndarray | None = None,
) -> pd.DataFrame:
    """R² (McFadden's for a binary outcome) of all blocks, beyond the group effects, split by Shapley.

    A block's share is its mean gain over all orders in which the blocks can enter (Lindeman, Merenda and Gold
    1980; Shapley 1953).

    Args:
        frame: `value` and the terms.
        blocks: (name, terms) of each, at most ten.
        binary, effects, weights: as `ladder`.

    Returns:
        A table with the columns block, terms, r_squared (the block's part), share (of the whole).
    """
    y = frame["value"].to_numpy(dtype=np.float64)
    fitter = fitter_of(y, effects, binary, weights)
    columns = {t: frame[t].to_numpy(dtype=np.float64) for _, terms in blocks for t in terms}
    count = len(blocks)
    worth = np.empty(1 << count)
    for chosen in range(1 << count):
        entered = [t for b in range(count) if chosen >> b & 1 for t in blocks[b][1]]
        worth[chosen] = fitter.r_squared(_matrix(columns, entered, len(y)))
    total = float(worth[-1] - worth[0])
    rows = []
    for b, (name, terms) in enumerate(blocks):
        part = 0.0
        for chosen in range(1 << count):
            if not chosen >> b & 1:
                size = chosen.bit_count()
                orders = math.factorial(size) * math.factorial(count - size - 1) / math.factorial(count)
                part += orders * float(worth[chosen | 1 << b] - worth[chosen])
        share = part / total if total > 0 else float("nan")
        rows.append({"block": name, "terms": ", ".join(terms), "r_squared": part, "share": share})
    return pd.DataFrame(rows, columns=["block", "terms", "r_squared", "share"])


@dataclass(frozen=True)
class _Restricted:
    """A fit without the added columns: (working) weights and residuals, basis, codes, unit of R²."""

    weights: np.ndarray
    rest: np.ndarray
    basis: np.ndarray
    codes: np.ndarray
    unit: float


class Shuffled:
    """What one order of the added columns costs: sums over the rows, no refit."""

    def __init__(self, base: _Restricted, added: np.ndarray) -> None:
        self.base, self.added = base, added
        self.root = np.sqrt(base.weights)
        self.totals = np.bincount(base.codes, base.weights)
        self.score = base.weights * base.rest

    def parts(self, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(scores (a,), information (a, a)) of the added columns in this order."""
        x = self.added[order]
        scaled = self.root[:, None] * x
        on_basis = self.base.basis.T @ scaled
        sums = np.column_stack([np.bincount(self.base.codes, self.base.weights * column) for column in x.T])
        information = scaled.T @ scaled - on_basis.T @ on_basis - (sums / self.totals[:, None]).T @ sums
        return self.score @ x, information


def fitter_of(
    y: np.ndarray, effects: np.ndarray | None, binary: bool, weights: np.ndarray | None = None
) -> _Fitter:
    """Quick fits of y, with group effects where codes of groups are given."""
    return _Logit(y, effects, weights) if binary else _Linear(y, effects, weights)


def sum_terms(path: Sequence[_Step]) -> list[str]:
    """All terms of all steps, with repetitions."""
    return [term for step in path for term in step.terms]


def _matrix(columns: dict[str, np.ndarray], terms: Sequence[str], n: int) -> np.ndarray:
    return np.column_stack([columns[t] for t in terms]) if terms else np.empty((n, 0))


def shuffle_groups(clusters: np.ndarray | None, least: float = 5.0) -> np.ndarray | None:
    """Rows are shuffled within clusters of five rows or more on average; in smaller ones too little moves."""
    if clusters is None or len(clusters) / (int(clusters.max()) + 1) < least:
        return None
    return clusters


def orders_of(n: int, groups: np.ndarray | None, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Random orders of the rows that keep every row inside its group."""
    rng = np.random.default_rng(seed)
    if groups is None:
        for _ in range(draws):
            yield rng.permutation(n)
        return
    home = np.argsort(groups, kind="stable")
    inside = groups[home].astype(np.float64)
    for _ in range(draws):
        order = np.empty(n, dtype=np.int64)
        order[home] = home[np.argsort(inside + rng.random(n))]
        yield order


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


class _Fitter:
    """Quick fits of one outcome on many sets of columns."""

    def __init__(self, y: np.ndarray, effects: np.ndarray | None, weights: np.ndarray | None) -> None:
        self.data = _slope.Data(y, isinstance(self, _Logit), weights, effects)
        self.weights = np.ones(len(y)) if weights is None else weights
        self.mean = float(np.average(y, weights=self.weights))

    def r_squared(self, x: np.ndarray) -> float:
        """R² of the columns of x (and the group effects)."""
        raise NotImplementedError

    def restricted(self, x: np.ndarray) -> _Restricted:
        """The fit of the columns of x as the base of shuffles."""
        raise NotImplementedError

    def gain(self, null: Shuffled, order: np.ndarray) -> float:
        """Gain of R² of the shuffled columns: exact for least squares; by Rao's score for a logit (twice the
        gain of log likelihood to first order)."""
        score, information = null.parts(order)
        if len(score) == 1:
            value = score[0] ** 2 / max(information[0, 0], 1e-300)
        else:
            value = score @ np.linalg.lstsq(information, score, rcond=None)[0]
        return float(value) / null.base.unit

    def null_gains(self, base: np.ndarray, added: np.ndarray, orders: Sequence[np.ndarray]) -> np.ndarray:
        """Gain of R² of the added columns in every one of the orders."""
        null = Shuffled(self.restricted(base), added)
        return np.array([self.gain(null, order) for order in orders])

    def losses(self, x: np.ndarray, folds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(loss, loss of the mean) per row, from fits without the row's fold."""
        raise NotImplementedError


class _Linear(_Fitter):
    """Least squares with group effects taken out by the groups' means (Frisch–Waugh–Lovell)."""

    def __init__(self, y: np.ndarray, effects: np.ndarray | None, weights: np.ndarray | None) -> None:
        super().__init__(y, effects, weights)
        self._total = float(self.weights @ (y - self.mean) ** 2)

    def _fit(self, x: np.ndarray) -> dict[str, Any]:
        return _slope.least_squares(self.data.y, x, self.data.codes, self.weights)

    def r_squared(self, x: np.ndarray) -> float:
        """R² of the columns of x (and the group effects)."""
        return max(0.0, 1.0 - float(self.weights @ self._fit(x)["rest"] ** 2) / self._total)

    def restricted(self, x: np.ndarray) -> _Restricted:
        """The fit of the columns of x as the base of shuffles."""
        parts = self._fit(x)
        return _Restricted(self.weights, parts["rest"], parts["basis"], self.data.codes, self._total)

    def losses(self, x: np.ndarray, folds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(squared error, that of the mean) per row.

        With group effects both sides are taken less their group's means, so a slope is carried to groups that
        the fit has not seen while the level of each stays its own.
        """
        y, w = self.data.y, self.weights
        grouped = self.data.effects is not None
        if grouped:
            scale = w * (y - self.mean) ** 2
            y, x = (_slope.within(values, self.data.codes, w) for values in (y, x))
        else:
            x, scale = np.hstack([np.ones((len(y), 1)), x]), np.empty(len(y))
        errors, root = np.empty(len(y)), np.sqrt(w)
        for fold in range(int(folds.max()) + 1):
            out = folds == fold
            slopes = np.empty(0)
            if x.shape[1]:
                slopes = np.linalg.lstsq(root[~out, None] * x[~out], root[~out] * y[~out], rcond=None)[0]
            errors[out] = w[out] * (y[out] - x[out] @ slopes) ** 2
            if not grouped:
                scale[out] = w[out] * (y[out] - np.average(y[~out], weights=w[~out])) ** 2
        return errors, scale


class _Logit(_Fitter):
    """Logits by Newton's method; gains are of the log likelihood, in units of that of the base rate."""

    def __init__(self, y: np.ndarray, effects: np.ndarray | None, weights: np.ndarray | None) -> None:
        super().__init__(y, effects, weights)
        mean = self.mean
        self._null = float(
            self.weights.sum() * (special.xlogy(mean, mean) + special.xlog1py(1 - mean, -mean))
        )

    def r_squared(self, x: np.ndarray) -> float:
        """McFadden's R² of the columns of x (and the group effects)."""
        _, eta = _slope.logit(self.data, x)
        return max(0.0, 1.0 - float(self.weights @ _log_likelihood(self.data.y, eta)) / self._null)

    def restricted(self, x: np.ndarray) -> _Restricted:
        """The fit of the columns of x as the base of shuffles."""
        _, eta = _slope.logit(self.data, x)
        p = special.expit(eta)
        working = np.maximum(self.weights * p * (1 - p), 1e-14)
        rest = self.weights * (self.data.y - p) / working
        basis = _slope.least_squares(rest, x, self.data.codes, working)["basis"]
        return _Restricted(working, rest, basis, self.data.codes, -2.0 * self._null)

    def losses(self, x: np.ndarray, folds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(minus the log likelihood, that of the base rate) per row."""
        y, w, codes = self.data.y, self.weights, self.data.codes
        losses, scale = np.empty(len(y)), np.empty(len(y))
        beta, eta = _slope.logit(self.data, x)
        start = (beta, _slope.group_means(eta - x @ beta, codes, np.ones(len(y))))
        for fold in range(int(folds.max()) + 1):
            out = folds == fold
            part = _slope.Data(y[~out], True, w[~out], None if self.data.effects is None else codes[~out])
            try:
                found, inside = _slope.logit(part, x[~out], start=start)
            except (WorkError, np.linalg.LinAlgError):
                # A group all right or all wrong without this fold: its effect has no maximum.
                levels = np.clip(_levels(part, start[1]), -10.0, 10.0)
                found, inside = beta, x[~out] @ beta + levels[part.codes]
            count = len(start[1])
            totals = np.bincount(part.codes, minlength=count)
            levels = np.bincount(part.codes, inside - x[~out] @ found, minlength=count) / np.maximum(
                totals, 1
            )
            losses[out] = -w[out] * _log_likelihood(y[out], x[out] @ found + levels[codes[out]])
            rate = np.clip(np.average(y[~out], weights=w[~out]), 1e-12, 1 - 1e-12)
            scale[out] = -w[out] * (special.xlogy(y[out], rate) + special.xlog1py(1 - y[out], -rate))
        return losses, scale


def _levels(part: _slope.Data, start: np.ndarray) -> np.ndarray:
    """Logits of the groups' rates, half a row added on both sides."""
    weights = np.ones(len(part.y)) if part.weights is None else part.weights
    right = np.bincount(part.codes, weights * part.y, minlength=len(start)) + 0.5
    count = np.bincount(part.codes, weights, minlength=len(start)) + 1.0
    return np.asarray(special.logit(right / count))


def _log_likelihood(y: np.ndarray, eta: np.ndarray) -> np.ndarray:
    return np.asarray(y * eta - np.logaddexp(0.0, eta))
