"""Many looks at one question: the specification curve, and p-values adjusted for all of them.

One specification is declared primary. The family is every kernel × bandwidth × subset of the corpus under the
headline's controls and form. Its p-values are adjusted by the maximum of |t|: under cluster sign flips where
there are clusters; else by Freedman and Lane's (1983) shuffles of the restricted residuals, the same shuffle
for all specifications, within groups; rows flip signs where the outcome is binary or there are more than
5,000 rows. Benjamini and Yekutieli's false-discovery rate stands beside.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from statsmodels.stats.multitest import multipletests

from lmd3.analysis.few_clusters import restricted, score_statistics
from lmd3.analysis.ladder import orders_of
from lmd3.analysis.slope import Data, least_squares, within

DRAWS = 1_999
#: More rows than this flip signs instead of being shuffled (the same to first order, and faster).
MOST_SHUFFLED = 5_000
_BATCH = 4_000_000


@dataclass(frozen=True)
class Family:
    """Adjusted p-values of a family of slopes.

    Attributes:
        statistic: (m,) t of each, as the adjustment sees it.
        p_max_t: (m,) by the maximum of |t|.
        method: `cluster sign flips`, `row sign flips` or `Freedman-Lane`.
        draws: draws taken.
    """

    statistic: np.ndarray
    p_max_t: np.ndarray
    method: str
    draws: int


def max_t(
    data: Data,
    base: np.ndarray,
    predictors: np.ndarray,
    clusters: np.ndarray | None,
    groups: np.ndarray | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Family:
    """Adjusts the slopes of several predictors, each beside the same controls.

    Args:
        data: the rows.
        base: (n, k) controls.
        predictors: (n, m) one per specification.
        clusters: (n,) codes of clusters, or None.
        groups: (n,) codes; shuffles stay inside (by default inside the effects).
        draws: of signs or shuffles.
        seed: of the draws.

    Raises:
        WorkError: a logit that does not converge.
    """
    efficient, rest, weights = restricted(data, np.column_stack([base, predictors[:, :1]]))
    root = np.sqrt(weights)
    # Held at 0, the slopes of all specifications leave one and the same fit.
    inner = [efficient]
    inner += [
        least_squares(predictors[:, j], base, data.codes, weights)["rest"]
        for j in range(1, predictors.shape[1])
    ]
    x = np.column_stack(inner)
    if clusters is None and not data.binary and len(data.y) <= MOST_SHUFFLED:
        basis = np.linalg.qr(root[:, None] * within(base, data.codes, weights))[0]
        statistic, largest = _freedman_lane(data, basis, root[:, None] * x, root, rest, groups, draws, seed)
        method = "Freedman-Lane"
    else:
        method = "row sign flips" if clusters is None else "cluster sign flips"
        scores = (x * (weights * rest)[:, None]).T
        if clusters is not None:
            scores = np.array([np.bincount(clusters, s) for s in scores])
        statistic, largest = _sign_flips(scores, draws, seed)
    beyond = (largest[None, :] >= np.abs(statistic)[:, None] * (1 - 1e-6)).sum(axis=1)
    return Family(statistic, (1 + beyond) / (1 + draws), method, draws)


def _sign_flips(scores: np.ndarray, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(t of each (m,), largest |t| of each draw) from scores (m, G)."""
    rng = np.random.default_rng(seed)
    g = scores.shape[1]
    largest = np.empty(draws)
    size = max(1, min(draws, _BATCH // g))
    squares = (scores**2).sum(axis=1)
    statistic = np.array([score_statistics(s, np.ones((g, 1)))[0] for s in scores])
    for start in range(0, draws, size):
        v = rng.integers(0, 2, size=(g, min(size, draws - start)), dtype=np.int8) * np.float32(
            2
        ) - np.float32(1)
        totals = scores.astype(np.float32) @ v
        # Signs leave the squares as they are; only the mean that is taken out moves.
        spread = np.maximum(squares[:, None] - totals.astype(np.float64) ** 2 / g, 1e-300)
        largest[start : start + v.shape[1]] = (np.abs(totals) / np.sqrt(spread)).max(axis=0)
    return statistic, largest


def _freedman_lane(
    data: Data,
    basis: np.ndarray,
    x: np.ndarray,
    root: np.ndarray,
    rest: np.ndarray,
    groups: np.ndarray | None,
    draws: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(t of each (m,), largest |t| of each draw): shuffled restricted residuals, refitted."""
    n, inside = len(rest), groups if groups is not None else data.effects
    totals = np.bincount(data.codes, root**2)
    levels = sparse.csr_matrix((root, (data.codes, np.arange(n))), shape=(len(totals), n))
    x = x / np.linalg.norm(x, axis=0)
    df = n - basis.shape[1] - len(totals) - 1
    scaled = root * rest

    def statistics(shuffled: np.ndarray) -> np.ndarray:
        """(n, B) residuals → (m, B) t."""
        score = x.T @ shuffled
        # What the controls and effects take of the shuffled residuals.
        left = (shuffled**2).sum(axis=0) - ((basis.T @ shuffled) ** 2).sum(axis=0)
        left -= ((levels @ shuffled) ** 2 / totals[:, None]).sum(axis=0)
        return np.asarray(score / np.sqrt(np.maximum(left - score**2, 1e-300) / df))

    largest = np.empty(draws)
    orders = orders_of(n, inside, draws, seed)
    size = max(1, min(64, _BATCH // n))
    for start in range(0, draws, size):
        batch = np.column_stack([scaled[next(orders)] for _ in range(min(size, draws - start))])
        largest[start : start + batch.shape[1]] = np.abs(statistics(batch)).max(axis=0)
    return statistics(scaled[:, None])[:, 0], largest


def by_fdr(p: np.ndarray) -> np.ndarray:
    """p-values adjusted for the false-discovery rate under any dependence; NaN stays NaN."""
    adjusted = np.full(len(p), np.nan)
    known = np.isfinite(p)
    if known.any():
        adjusted[known] = multipletests(p[known], method="fdr_by")[1]
    return adjusted
