"""Densities that are estimated instead of summed over all rows: estimated and exact results put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lmd3.density.audit import FAILED
from lmd3.density.estimated_sums import Sums
from lmd3.density.estimation import Estimation
from lmd3.density.groups import group_slots
from lmd3.density.rounds import Rounds
from lmd3.density.stages import Stages
from lmd3.progress import ProgressFactory

#: Bits of the native flags and their names in the tables.
FLAGS = {1: "not_positive", 2: "few_rows", 4: "model", 8: "own_row", 16: "few_draws"}


@dataclass(frozen=True)
class Guesses:
    """Log densities of Q queries at B bandwidths with their doubt, under all rows or one group.

    Attributes:
        log_density, log_sum, std_error, ci_low, ci_high, ess: (Q, B); intervals of 95 %, by t with the
            degrees of freedom of the standard error. NaN where there is no estimate.
        rows: (Q,) rows read.
        excluded: (Q,) rows left out.
        methods: (Q, B) how it was computed.
        flags: (Q, B) names of what is doubtful, joined by commas.
    """

    log_density: NDArray[np.float64]
    log_sum: NDArray[np.float64]
    std_error: NDArray[np.float64]
    ci_low: NDArray[np.float64]
    ci_high: NDArray[np.float64]
    ess: NDArray[np.float64]
    rows: NDArray[np.int64]
    excluded: NDArray[np.uint64]
    methods: NDArray[np.object_]
    flags: NDArray[np.object_]


@dataclass(frozen=True)
class Approximation:
    """What an approximate job found; stands in for a scan where tables are made.

    Attributes:
        total, groups: under all rows, and by group code.
        neighbor_rows, neighbor_distances, duplicates, max_projection, row_sum: as those of a scan, found by
            the index.
        level: SIMD level.
        facts: for `run.json`: method, tolerance, target, audit, how many queries went exact and why.
    """

    total: Guesses
    groups: dict[int, Guesses]
    neighbor_rows: NDArray[np.int64]
    neighbor_distances: NDArray[np.float64]
    duplicates: NDArray[np.uint64]
    max_projection: NDArray[np.float64]
    row_sum: NDArray[np.float64]
    level: str
    rows: int
    facts: dict[str, Any] = field(default_factory=dict)


def approximate(
    job: Estimation,
    notice: Callable[[str], None],
    progress: ProgressFactory,
    rounds: Rounds | None = None,
) -> Approximation:
    """Runs a job, in `rounds` where they are given, and puts estimated and exact results together."""
    stages = Stages(job, rounds)
    sums, facts, scan, exact = stages.run(notice, progress)
    store, q, b = job.scanner.store, len(job.queries), len(job.pairs)
    weight = float(scan.total.weight)
    left_out = np.where(exact, 0.0, sums.excluded)
    total = _guesses(job, sums, exact, weight - left_out)
    _fill(total, scan.total, exact, scan.rows)
    groups = {}
    if job.asked.by_group and sums.groups is not None:
        slot_of = {code: slot for slot, code in enumerate(group_slots(store, job.asked.groups)[1])}
        for code, part in sorted(scan.groups.items()):
            pick = {
                name: getattr(sums.groups, name)[:, slot_of[code]]
                for name in ("log_sum", "variance", "df", "ess", "flags")
            }
            found = replace(sums.groups, **pick, groups=None)
            guesses = _guesses(job, found, exact, np.full(q, float(part.weight)))
            few = ((pick["flags"] & 16) > 0) & ~exact[:, None]
            for name in ("log_density", "log_sum", "std_error", "ci_low", "ci_high", "ess"):
                getattr(guesses, name)[few] = np.nan
            _fill(guesses, part, exact, part.rows)
            groups[code] = guesses
    rows, distances, duplicates, cosines = stages.neighbors(max(job.asked.neighbors, 1))
    total.excluded[~exact] = (sums.excluded > 0)[~exact]
    mean = job.index.mean if job.index is not None else np.zeros(store.d)
    assert total.log_sum.shape == (q, b)
    return Approximation(
        total, groups, rows, distances, duplicates, cosines, mean, job.scanner.level, store.n, facts
    )


def _guesses(job: Estimation, sums: Sums, exact: NDArray[np.bool_], weight: NDArray[np.float64]) -> Guesses:
    """The estimates as log densities with intervals."""
    q, b = sums.log_sum.shape
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.sqrt(sums.variance)
        log_sum = np.where(np.isneginf(sums.log_sum), np.nan, sums.log_sum)
        log_density = log_sum - np.log(weight)[:, None]
        t = np.where(
            np.isfinite(sums.df), stats.t.ppf(0.975, np.where(np.isfinite(sums.df), sums.df, 1)), 1.96
        )
    error = np.where(np.isfinite(log_sum), error, np.nan)
    names = np.empty((q, b), dtype=object)
    flags = sums.flags.astype(np.int64)
    for value in np.unique(flags):
        parts = [name for bit, name in FLAGS.items() if value & bit]
        parts += ["audit_failed"] if value & FAILED else []
        parts += ["lower_bound"] if job.method == "knn" else []
        names[flags == value] = ",".join(parts)
    methods = np.full((q, b), job.method, dtype=object)
    return Guesses(
        log_density,
        log_sum.copy(),
        error,
        log_density - t * error,
        log_density + t * error,
        sums.ess.copy(),
        sums.rows.astype(np.int64),
        np.zeros(q, np.uint64),
        methods,
        names,
    )


def _fill(guesses: Guesses, part: Any, exact: NDArray[np.bool_], rows: int) -> None:
    """Puts the exact results in their places."""
    for name in ("log_density", "log_sum", "ess"):
        getattr(guesses, name)[exact] = getattr(part, name)
    guesses.ci_low[exact] = guesses.ci_high[exact] = part.log_density
    guesses.std_error[exact] = 0.0
    guesses.rows[exact] = np.int64(rows) - part.excluded.astype(np.int64)
    guesses.excluded[exact] = part.excluded
    guesses.methods[exact] = "exact"
    guesses.flags[exact] = np.where(np.isneginf(part.log_density), "zero", "")
