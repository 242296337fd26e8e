"""The stages of an estimate: how much to read for each query, and when not to trust what was found.

```
pilot     some hundred rows per query: how variable its sum is; used to plan, then thrown away
main      as many rows as the tolerance asks for; one top-up where that fell short
exact     queries that few rows decide, that would need too many rows, or whose estimate is not positive
audit     32 to 64 of the queries scored exactly in any case: standard errors are widened by what they
          show, and the method is given up for the job where they were far too small
```
An estimate's error is independent from query to query: draws depend on the query's id and the seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmd3.density import audit
from lmd3.density.estimated_sums import Sums
from lmd3.density.estimation import MORE, NEAR, NEIGHBORS, Estimation
from lmd3.density.methods import DRAW_COST, FEWEST, PILOT, WHOLE_COST
from lmd3.density.rounds import Rounds, range_length
from lmd3.density.scan import Asked, Scan
from lmd3.errors import ParameterError
from lmd3.progress import ProgressFactory, silent

#: A standard error up to so many times the target passes.
SLACK = 1.25

#: Where a reliability is asked for, single standard errors up to so many times the target pass, as long as
#: the mean of their squares is that of the target.
LARGE = 2.5

#: Part of the variance wanted that is left to what the index predicts; the draws add their own. A reliability
#: is a matter of the mean.
PREDICTED = {"error": 0.5, "reliability": 1.0}

#: Of these, those that send a query to the exact sums. (Where the variance is the model's the standard error,
#: which counts most of it, decides.)
DOUBTFUL = 1 | 2 | 8
FEW_ROWS = 2


@dataclass(frozen=True)
class Stages:
    """The stages of a job.

    Attributes:
        job: what is to be estimated.
        rounds: runs the rounds over ranges of queries and keeps what they find; None: all at once, here.
    """

    job: Estimation
    rounds: Rounds | None = None

    def run(
        self, notice: Callable[[str], None], progress: ProgressFactory
    ) -> tuple[Sums, dict[str, Any], Scan, NDArray[np.bool_]]:
        """The estimates, facts on the run, the exact scan, and which queries it answered (in their order)."""
        q = len(self.job.queries)
        audited = audit.audited(q, self.job.seed)
        sums, target, exact, reasons = self._estimates(np.arange(q), progress)
        estimated = ~exact
        exact |= audited
        scan = self._exact(exact, progress)
        facts: dict[str, Any] = {
            "method": self.job.method,
            "tolerance": {"kind": self.job.tolerance.kind, "value": self.job.tolerance.value},
            "target": None if math.isnan(target) else target,
            "audited": int((audited & estimated).sum()),
            "exact": reasons,
            "rows_estimated": float(sums.rows.sum()),
        }
        if self.job.index is not None:
            facts["index"] = {
                "path": str(self.job.index.path),
                "lists": self.job.index.lists,
                "dtype": self.job.index.manifest["dtype"],
                "rounding": self.job.index.manifest["rounding"],
            }
        judged = np.flatnonzero(audited & estimated)
        if self.job.method != "knn":
            if audit.judge(judged, exact, scan, sums, self._floor(), target, facts, notice):
                exact = np.ones_like(exact)
                scan = self._exact(exact, progress)
        else:
            within = np.cumsum(exact) - 1
            loss = scan.total.log_sum[within[judged]] - sums.log_sum[judged]
            facts["audit"] = {"median_missing_log": np.median(loss, axis=0).tolist() if len(judged) else None}
            notice("the sums over neighbours alone are lower bounds: what they lack is in run.json (audit)")
        facts["queries_exact"] = int(exact.sum())
        facts["queries_estimated"] = int((~exact).sum())
        return sums, facts, scan, exact

    def shard(self, index: int, count: int) -> tuple[int, int]:
        """Does the rounds of the i-th of n runs of ranges of queries into files, and no more: these queries
        [start, end).

        Raises:
            ParameterError: a reliability, which only all queries together show.
        """
        assert self.rounds is not None
        if self.job.tolerance.kind != "error" and self.job.method != "knn":
            raise ParameterError(
                "a reliability with a shard: it takes the spread of all queries' densities",
                remedy="give a relative error: --tolerance 0.01",
            )
        q = len(self.job.queries)
        length = range_length(q)
        ranges = -(-q // length)
        start, end = (min(i * ranges // count * length, q) for i in (index, index + 1))
        chosen = np.arange(start, end)
        if len(chosen):
            self._estimates(chosen, silent)
            if self.job.index is not None:
                self.rounds.run(
                    self.job,
                    NEIGHBORS,
                    chosen,
                    np.full(len(chosen), float(max(self.job.asked.neighbors, 1))),
                    0.0,
                )
        return start, end

    def neighbors(
        self, k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.uint64], NDArray[np.float64]]:
        """Nearest rows of all queries by the index, or by a scan: rows, distances (Q, k), copies, the largest
        ⟨x, q⟩/‖x‖ (see `lmd3.density.nearest`)."""
        job, everyone = self.job, np.arange(len(self.job.queries))
        if job.index is None:
            asked = replace(job.asked, neighbors=k, tables=True)
            if self.rounds is not None:
                scan = self.rounds.scan(replace(job, pairs=[]), job.queries, asked)
            else:
                scan = job.scanner.scan(job.queries, [], asked)
            return (
                scan.neighbor_rows,
                scan.neighbor_distances,
                scan.duplicates,
                scan.max_projection.astype(np.float64),
            )
        if self.rounds is None:
            part = job.near(everyone, k)
            return part["near"], part["distances"], part["duplicates"], part["cosines"]
        part = self.rounds.run(job, NEIGHBORS, everyone, np.full(len(everyone), float(k)), 0.0)
        return part["near"], part["distances"], part["duplicates"][:, 0], part["cosines"][:, 0]

    def _estimates(
        self, chosen: NDArray[np.int64], progress: ProgressFactory
    ) -> tuple[Sums, float, NDArray[np.bool_], dict[str, int]]:
        """All rounds for the chosen queries: estimates, the standard error aimed at, which queries are to be
        scored exactly, and why."""
        q, n = len(chosen), self.job.scanner.store.n
        cap = n / DRAW_COST if self.job.automatic else n / 4
        if self.job.method == "knn":
            return self._stage(chosen, np.full(q, float(NEAR)), 1, 0.0), math.nan, np.zeros(q, bool), {}
        # With rounds every one has its own bar.
        with (progress if self.rounds is None else silent)("estimate", float(q), "queries") as bar:
            pilot = self._stage(chosen, np.full(q, float(PILOT)), 0, self._guess_target())
            bar.update(q * 0.2)
            target = self._target(pilot)
            if self.job.method == "stratified":
                sums, dear = self._main(chosen, pilot, target, cap)
            else:
                sums, dear = self._drawn(chosen, pilot, target, cap)
            bar.update(q * 0.8)
            error = np.sqrt(sums.variance[:, 0])
            doubtful = (sums.flags[:, 0] & DOUBTFUL) > 0
            missed = ~doubtful & ~(error <= self._passes(target, error[~doubtful], q))
        reasons = {
            "too_many_rows": int((missed & dear).sum()),
            "flagged": int(doubtful.sum()),
            "tolerance_missed": int((missed & ~dear).sum()),
        }
        return sums, target, doubtful | missed, reasons

    def _main(
        self, chosen: NDArray[np.int64], pilot: Sums, target: float, cap: float
    ) -> tuple[Sums, NDArray[np.bool_]]:
        """Estimates by the index, and which queries have had as many rows as they may.

        The index predicts what a number of rows leaves of the variance; the pilot says how large the sum is.
        Rows are counted as rows drawn: those of a list read whole cost less.
        """
        log_sum = pilot.log_sum[:, 0]
        with np.errstate(invalid="ignore"):
            aims = 2 * (log_sum + math.log(target)) + math.log(PREDICTED[self.job.tolerance.kind])
        # Where the pilot found nothing, half of what is allowed is tried.
        aims = np.where(np.isfinite(aims), aims, -np.inf)
        sums = self._stage(chosen, np.full(len(chosen), cap / 2), 1, target, aims)
        # Where few draws decide, several times as many are taken in the place of the first.
        for number in MORE:
            few = np.flatnonzero(((sums.flags[:, 0] & DOUBTFUL) == FEW_ROWS) & (4 * _cost(sums) <= cap))
            if len(few):
                sums.put(few, self._stage(chosen[few], 4 * _cost(sums)[few], number, target))
        first, error, cost = np.sqrt(pilot.variance[:, 0]), np.sqrt(sums.variance[:, 0]), _cost(sums)
        dear = cost >= 0.95 * cap / 2
        doubtful = (sums.flags[:, 0] & DOUBTFUL) > 0
        short = ~dear & ~doubtful & (error > self._tops_up(target, error))
        more, alone = _top_up(_cost(pilot), first, cost, error, target)
        again = np.flatnonzero(short & (more <= cap))
        if len(again):
            further = self._stage(chosen[again], np.maximum(more[again], FEWEST), 2, target)
            _add(sums, again, further, alone[again])
        return sums, dear

    def _drawn(
        self, chosen: NDArray[np.int64], pilot: Sums, target: float, cap: float
    ) -> tuple[Sums, NDArray[np.bool_]]:
        """Estimates by random rows, whose errors fall with the root of their number, and which queries need
        more of them than they may have."""
        error = np.sqrt(pilot.variance[:, 0])
        error = np.where(np.isfinite(error), error, 10 * target)
        draws = np.clip(pilot.draws, 1, None)
        wanted = np.maximum(1.2 * draws * (error / target) ** 2, FEWEST)
        dear = wanted > cap
        sums = self._stage(chosen, np.where(dear, cap / 2, wanted), 1, target)
        first, error = error, np.sqrt(sums.variance[:, 0])
        doubtful = (sums.flags[:, 0] & DOUBTFUL) > 0
        short = ~dear & ~doubtful & (error > SLACK * target)
        more, alone = _top_up(draws, first, sums.draws, error, target)
        again = np.flatnonzero(short & (more <= cap))
        if len(again):
            further = self._stage(chosen[again], np.maximum(more[again], FEWEST), 2, target)
            _add(sums, again, further, alone[again])
        return sums, dear

    def _tops_up(self, target: float, error: NDArray[np.float64]) -> float:
        """The standard error above which more rows are taken. A reliability is a matter of the mean of their
        squares: where that holds only single large ones are brought down."""
        if self.job.tolerance.kind == "reliability" and float(np.mean(error**2)) <= target**2:
            return LARGE * target
        return SLACK * target

    def _passes(self, target: float, error: NDArray[np.float64], q: int) -> float:
        """The largest standard error that is reported. With a reliability the largest ones go exact, and have
        none, until the mean of the squares over all Q queries is that of the target."""
        if self.job.tolerance.kind != "reliability":
            return 1.5 * SLACK * target
        ordered = np.sort(error[error <= LARGE * target])
        within = np.cumsum(ordered**2) <= q * target**2
        return float(ordered[within][-1]) if within.any() else 0.0

    def _stage(
        self,
        chosen: NDArray[np.int64],
        rows: NDArray[np.float64],
        stage: int,
        target: float,
        aims: NDArray[np.float64] | None = None,
    ) -> Sums:
        """A stage of the method, by ranges of queries where that is asked for."""
        if self.rounds is None:
            return self.job.stage(chosen, rows, stage, target, aims)
        part = self.rounds.run(self.job, stage, chosen, rows, target, aims)
        shape = (len(chosen), len(self.job.pairs))
        found = {
            name: array[:, 0] if name in ("draws", "rows", "excluded") else array.reshape(shape)
            for name, array in part.items()
            if not name.startswith("group_")
        }
        groups = {name: array for name, array in part.items() if name.startswith("group_")}
        found |= {name: array.reshape(len(chosen), -1, len(self.job.pairs)) for name, array in groups.items()}
        return Sums.of(found, len(chosen), 0.0)

    def _guess_target(self) -> float:
        return self.job.tolerance.value if self.job.tolerance.kind == "error" else 0.1

    def _target(self, pilot: Sums) -> float:
        """The standard error of a log density that the tolerance asks for."""
        if self.job.tolerance.kind == "error":
            return self.job.tolerance.value
        log_sum, variance = pilot.log_sum[:, 0], pilot.variance[:, 0]
        good = np.isfinite(log_sum) & np.isfinite(variance) & (variance < 1)
        if good.sum() < 3:
            raise ParameterError(
                "a reliability needs the spread of at least 3 queries' densities",
                remedy="give a relative error: --tolerance 0.01",
            )
        spread = float(log_sum[good].var(ddof=1) - variance[good].mean())
        # The spread itself is uncertain: a fifth less, so that the reliability holds.
        return math.sqrt((1 - self.job.tolerance.value) * max(0.8 * spread, 1e-6))

    def _exact(self, chosen: NDArray[np.bool_], progress: ProgressFactory) -> Scan:
        own = None if self.job.asked.own is None else np.ascontiguousarray(self.job.asked.own[chosen])
        queries = np.ascontiguousarray(self.job.queries[chosen])
        if self.rounds is not None:
            return self.rounds.scan(
                self.job,
                queries,
                Asked(by_group=self.job.asked.by_group, groups=self.job.asked.groups, own=own, tables=True),
            )
        asked = Asked(by_group=self.job.asked.by_group, groups=self.job.asked.groups, own=own)
        return self.job.scanner.scan(queries, self.job.pairs, asked, progress, "exact")

    def _floor(self) -> NDArray[np.float64]:
        """Variances that the arithmetic brings, (Q, B)."""
        job, copy, sq_norm = self.job, self.job.scanner.store.dtype, None
        if job.index is not None:
            sq_norm = float(job.index.manifest["sq_norm"])
            if job.method == "stratified":
                copy = job.index.manifest["dtype"]
        return audit.arithmetic(job.queries, job.pairs, copy, sq_norm) ** 2


def _cost(sums: Sums) -> NDArray[np.float64]:
    """What was read for each query, in rows drawn; centroids count as rows of a list."""
    cost: NDArray[np.float64] = sums.draws + WHOLE_COST * (sums.rows - sums.draws)
    return cost


def _add(sums: Sums, chosen: NDArray[np.int64], further: Sums, alone: NDArray[np.bool_]) -> None:
    """Adds a further stage of some queries: in the place of the first where it is to stand alone, or drew
    nothing because it read all; else joined to it."""
    alone = alone | (further.draws == 0)
    put, join = np.flatnonzero(alone), np.flatnonzero(~alone)
    sums.put(chosen[put], further.some(put))
    sums.join(chosen[join], further.some(join))


def _top_up(
    first_cost: NDArray[np.float64],
    first_error: NDArray[np.float64],
    cost: NDArray[np.float64],
    error: NDArray[np.float64],
    target: float,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """What is to be spent further to bring an error to the target, by how it fell from the pilot to the main
    stage: with the draws to the power of −½ where all is left to chance, more steeply where whole lists join.

    Returns:
        The cost, and whether that stage is to stand alone: where errors fall as chance has it the main stage
        counts as much as its draws, else it is soon outdone.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        power = np.log(first_error / error) / np.log(np.maximum(cost, 2) / first_cost)
    power = np.clip(np.where(np.isfinite(power), power, 0.5), 0.5, 1.5)
    total = 1.2 * cost * np.maximum(error / target, 1.0) ** (1 / power)
    alone = power >= 0.7
    return np.where(alone, total, total - cost), alone
