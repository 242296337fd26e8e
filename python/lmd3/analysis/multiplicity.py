"""Many looks at one question: the specification curve, and p-values adjusted for all of them.

One specification is declared primary. The family is every kernel × bandwidth × subset of the corpus under the
headline's controls and form. Its p-values are adjusted by the maximum of |t|: under cluster sign flips where
there are clusters; else by Freedman and Lane's (1983) shuffles of the restricted residuals, the same shuffle
for all specifications, within groups; rows flip signs where the outcome is binary or there are more than
20,000 rows. Benjamini and Yekutieli's false-discovery rate stands beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from statsmodels.stats.multitest import multipletests

from lmd3.analysis.few_clusters import restricted, score_statistics
from lmd3.analysis.ladder import orders_of
from lmd3.analysis.slope import Data, within

DRAWS = 1_999
#: More rows than this flip signs instead of being shuffled.
MOST_SHUFFLED = 20_000
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
    designs: Sequence[np.ndarray],
    clusters: np.ndarray | None,
    groups: np.ndarray | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Family:
    """Adjusts the slopes of the last columns of several designs (n, k) over the same rows.

    Args:
        data: the rows.
        designs: one per specification.
        clusters: (n,) codes of clusters, or None.
        groups: (n,) codes; shuffles stay inside.
        draws: of signs or shuffles.
        seed: of the draws.

    Raises:
        WorkError: a logit that does not converge.
    """
    parts = [restricted(data, x) for x in designs]
    if clusters is None and not data.binary and len(data.y) <= MOST_SHUFFLED:
        statistic, largest = _freedman_lane(data, designs, parts, groups, draws, seed)
        method = "Freedman-Lane"
    else:
        method = "row sign flips" if clusters is None else "cluster sign flips"
        scores = [weights * x * rest for x, rest, weights in parts]
        if clusters is not None:
            scores = [np.bincount(clusters, s) for s in scores]
        statistic, largest = _sign_flips(np.array(scores), draws, seed)
    beyond = (largest[None, :] >= np.abs(statistic)[:, None] * (1 - 1e-9)).sum(axis=1)
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
    designs: Sequence[np.ndarray],
    parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    groups: np.ndarray | None,
    draws: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    root = np.sqrt(parts[0][2])
    inside = groups if groups is not None else data.effects
    bases, predictors, rests = [], [], []
    n = len(root)
    for x, (efficient, rest, weights) in zip(designs, parts, strict=True):
        basis = np.linalg.qr(root[:, None] * within(x[:, :-1], data.codes, weights))[0]
        bases.append(basis)
        predictors.append(root * efficient / np.linalg.norm(root * efficient))
        rests.append(root * rest)
    totals = np.bincount(data.codes, root**2)

    def statistics(order: np.ndarray) -> np.ndarray:
        found = np.empty(len(designs))
        for s, (basis, x, rest) in enumerate(zip(bases, predictors, rests, strict=True)):
            e = rest[order]
            # What the controls and effects take of the shuffled residuals.
            level = np.bincount(data.codes, root * e)
            left = float(e @ e) - float(((basis.T @ e) ** 2).sum()) - float((level**2 / totals).sum())
            score = float(x @ e)
            df = n - basis.shape[1] - len(totals) - 1
            found[s] = score / np.sqrt(max(left - score**2, 1e-300) / df)
        return found

    statistic = statistics(np.arange(n))
    largest = np.array([np.abs(statistics(order)).max() for order in orders_of(n, inside, draws, seed)])
    return statistic, largest


def by_fdr(p: np.ndarray) -> np.ndarray:
    """p-values adjusted for the false-discovery rate under any dependence; NaN stays NaN."""
    adjusted = np.full(len(p), np.nan)
    known = np.isfinite(p)
    if known.any():
        adjusted[known] = multipletests(p[known], method="fdr_by")[1]
    return adjusted
