"""Densities that are estimated instead of summed over all rows: how much to read, and when not to trust it.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lmd3.density.design_error import design_of
from lmd3.density.groups import OTHER_CODE
from lmd3.density.rounds import MORE, NEIGHBORS, Rounds, range_length
from lmd3.density.scan import Asked, Pair, Scan, Scanner
from lmd3.errors import ParameterError
from lmd3.executors.partials import Part
from lmd3.index import Index, draw_keys, neighbor_sums, sample_rows
from lmd3.progress import ProgressFactory, silent
from lmd3.store import Store

#: What densities can be computed by; "auto" takes what costs least.
METHODS = ("exact", "auto", "stratified", "sample", "deann", "knn")

#: Kernels whose sums can be estimated.
ESTIMATED = ("exponential", "gaussian")

#: Rows of the pilot, and the fewest of the main stage.
PILOT, FEWEST = 600, 300

#: A row drawn costs so many times one that a scan reads: beyond n over this all rows are read.
DRAW_COST = 20

#: Rows of a store that is always summed over by "auto".
SMALL = 300_000

#: A standard error up to so many times the target passes.
SLACK = 1.25

#: Queries scored exactly to judge the standard errors: at least, and at most.
AUDIT = (32, 64)

#: Ratio of the errors met in the audit to the standard errors: above the first these are widened, above the
#: second the method is given up.
WIDEN, GIVE_UP = 1.2, 2.0

#: Error of the arithmetic in a log density, by the type of the rows that are read: no standard error is below
#: it. (What the copy in the index rounds is in the variance of a stage.)
ARITHMETIC = {"int8": 2e-4}
ARITHMETIC_FLOAT = 2e-5

#: Error of D² relative to ‖x‖² + ‖q‖², and the share of these below which D² is taken in double precision.
ARITHMETIC_SQ = {"int8": (5e-6, 0.1)}
ARITHMETIC_SQ_FLOAT = (1.5e-7, 0.02)

#: Bits of the native flags and their names in the tables.
FLAGS = {1: "not_positive", 2: "few_rows", 4: "model", 8: "own_row", 16: "few_draws"}

#: Of these, those that send a query to the exact sums. (Where the variance is the model's the standard error,
#: which counts most of it, decides.)
DOUBTFUL = 1 | 2 | 8
FEW_ROWS = 2

#: Estimates of groups' sums that are held in memory at most (40 bytes each).
GROUP_SUMS = 50_000_000

#: Neighbours that DEANN sums exactly, and that the method knn sums alone.
NEAR = 100


@dataclass(frozen=True)
class Tolerance:
    """How exact an estimate must be.

    Attributes:
        kind: "error" (relative standard error of a kernel sum, which is the standard error of a log density)
            or "reliability" (of the log density over the job's queries: 1 − mean SE²/variance).
        value: the number.
    """

    kind: str
    value: float


def parse_tolerance(text: str | float) -> Tolerance:
    """The tolerance of `.01` or `reliability=.99`.

    Raises:
        ParameterError: neither, or a number outside (0, 1).
    """
    label = str(text)
    kind, _, number = label.partition("=") if "=" in label else ("error", "", label)
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if kind not in ("error", "reliability") or not 0 < value < 1:
        raise ParameterError(
            f"tolerance {label!r} is no number between 0 and 1",
            remedy="give a relative error such as 0.01, or reliability=0.99",
        )
    return Tolerance(kind, value)


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


@dataclass
class _Sums:
    """Estimates in progress: (Q, B), and (Q, G, B) by group."""

    log_sum: NDArray[np.float64]
    variance: NDArray[np.float64]
    df: NDArray[np.float64]
    ess: NDArray[np.float64]
    flags: NDArray[np.uint32]
    draws: NDArray[np.float64]
    rows: NDArray[np.float64]
    excluded: NDArray[np.float64]
    groups: _Sums | None = None

    @classmethod
    def of(cls, found: dict[str, NDArray[Any]], queries: int, rows: float) -> _Sums:
        """From what a native stage returned."""

        def take(prefix: str) -> _Sums:
            log_sum, variance, df, ess, flags = (
                found[f"{prefix}{name}"] for name in ("log_sum", "variance", "df", "ess", "flags")
            )
            read = found.get("rows", np.full(queries, rows)).astype(np.float64)
            draws = found.get("draws", np.full(queries, rows)).astype(np.float64)
            excluded = found.get("excluded", np.zeros(queries))
            return cls(log_sum, variance, df, ess, flags, draws, read, excluded)

        sums = take("")
        if "group_log_sum" in found:
            sums.groups = take("group_")
        return sums

    def part(self) -> Part:
        """As a file keeps it; `of` reads it."""
        names = ("log_sum", "variance", "df", "ess", "flags")
        part = {name: getattr(self, name) for name in (*names, "draws", "rows", "excluded")}
        if self.groups is not None:
            part |= {f"group_{name}": getattr(self.groups, name) for name in names}
        return part

    def put(self, chosen: NDArray[np.int64], other: _Sums) -> None:
        """Puts estimates of some queries in their places."""
        for name in ("log_sum", "variance", "df", "ess", "flags", "draws", "rows", "excluded"):
            getattr(self, name)[chosen] = getattr(other, name)
        if self.groups is not None and other.groups is not None:
            self.groups.put(chosen, other.groups)

    def join(self, chosen: NDArray[np.int64], other: _Sums) -> None:
        """Joins a second stage of some queries, each stage weighted by its draws (never by its variance,
        which would favour stages that missed what is large)."""
        shape = (-1, *[1] * (self.log_sum.ndim - 1))
        first, second = self.draws[chosen], other.draws
        a, b = ((part / (first + second)).reshape(shape) for part in (first, second))
        x, y = self.log_sum[chosen], other.log_sum
        with np.errstate(divide="ignore", invalid="ignore"):
            joint = np.logaddexp(x + np.log(a), y + np.log(b))
            u = (a * np.exp(x - joint)) ** 2 * self.variance[chosen]
            v = (b * np.exp(y - joint)) ** 2 * other.variance
            total = u + v
            df = total**2 / (u**2 / self.df[chosen] + v**2 / other.df)
        self.log_sum[chosen] = joint
        self.variance[chosen] = total
        self.df[chosen] = np.where(np.isfinite(df), df, self.df[chosen])
        self.ess[chosen] = a * self.ess[chosen] + b * other.ess
        # Whatever either stage doubts is doubtful, but for too few draws.
        self.flags[chosen] |= other.flags & ~np.uint32(16)
        self.flags[chosen] &= ~np.uint32(16) | other.flags
        self.draws[chosen] += other.draws
        self.rows[chosen] += other.rows
        if self.groups is not None and other.groups is not None:
            self.groups.join(chosen, other.groups)


@dataclass(frozen=True)
class Estimation:
    """What is to be estimated, and by what.

    Attributes:
        scanner: reads all rows where that is needed.
        index: of the store; None where there is none.
        method: of `METHODS`, resolved: not "exact" nor "auto".
        tolerance: as asked for.
        queries: (Q, d).
        keys: (Q,) what the draws of each depend on.
        pairs: kernels with bandwidths, the primary one first.
        asked: groups, rows to leave out.
        seed: of the draws.
        automatic: whether the method was left to "auto": then an estimate must also be cheap.
        provider: who finds the neighbours that DEANN and knn sum; the index where None.
        rounds: runs the rounds over ranges of queries and keeps what they find; None: all at once, here.
    """

    scanner: Scanner
    index: Index | None
    method: str
    tolerance: Tolerance
    queries: NDArray[np.float32]
    keys: NDArray[np.uint64]
    pairs: Sequence[Pair]
    asked: Asked
    seed: int
    automatic: bool = False
    provider: Any = None
    rounds: Rounds | None = None

    # --- one stage of each method ---

    def stage(self, chosen: NDArray[np.int64], rows: NDArray[np.float64], stage: int, target: float) -> _Sums:
        """Estimates of the chosen queries from about so many rows each."""
        queries, keys = np.ascontiguousarray(self.queries[chosen]), self.keys[chosen]
        threads = self.scanner.threads
        if self.method == "stratified":
            assert self.index is not None
            # The nearest lists are read in any case.
            near = 2.0 * self.index.n / self.index.lists
            own = None if self.asked.own is None else np.ascontiguousarray(self.asked.own[chosen])
            found = self.index.stage(
                queries,
                keys,
                self.pairs,
                np.ceil(rows + near).astype(np.uint64),
                own=own,
                target=target,
                by_group=self.asked.by_group,
                group_map=group_slots(self.scanner.store, self.asked)[0],
                seed=self.seed,
                stage=stage,
                threads=threads,
            )
            found["rows"] = found["rows"] + np.uint64(self.index.lists)
            return _Sums.of(found, len(chosen), 0.0)
        store = self.scanner.store
        if self.method == "knn":
            near_rows, distances = self._provider().query(queries, min(NEAR, store.n))
            weights = store.weights()
            near_weights = None if weights is None else weights[np.maximum(near_rows, 0)]
            return _Sums.of(neighbor_sums(distances, self.pairs, near_weights), len(chosen), NEAR)
        found_near = None
        if self.method == "deann":
            found_near = self._provider().query(queries, min(NEAR, store.n // 2))[0]
        moments = None
        if self.method == "sample" and self.index is not None:
            moments = (self.index.mean, float(self.index.manifest["sq_norm"]))
        parts: list[tuple[NDArray[np.int64], _Sums]] = []
        sizes = np.minimum(2.0 ** np.ceil(np.log2(rows)), store.n).astype(np.int64)
        for size in np.unique(sizes):
            here = np.flatnonzero(sizes == size)
            found = sample_rows(
                store,
                np.ascontiguousarray(queries[here]),
                keys[here],
                self.pairs,
                int(size),
                near=None if found_near is None else np.ascontiguousarray(found_near[here]),
                moments=moments,
                weights=self.scanner.weights,
                seed=self.seed + 1_000_003 * stage,
                threads=threads,
            )
            parts.append(
                (here, _Sums.of(found, len(here), float(size) + (0 if found_near is None else NEAR)))
            )
        whole = _empty(len(chosen), len(self.pairs), 0)
        for here, part in parts:
            whole.put(here, part)
        return whole

    def round(self, number: int, chosen: NDArray[np.int64], rows: NDArray[np.float64], target: float) -> Part:
        """What a round finds for the chosen queries, as a file keeps it (see `lmd3.density.rounds`)."""
        if number == NEIGHBORS:
            return _near(self, chosen, int(rows[0]))
        return self.stage(chosen, rows, number, target).part()

    def _stage(
        self, chosen: NDArray[np.int64], rows: NDArray[np.float64], stage: int, target: float
    ) -> _Sums:
        """`stage`, by ranges of queries where that is asked for."""
        if self.rounds is None:
            return self.stage(chosen, rows, stage, target)
        part = self.rounds.run(self, stage, chosen, rows, target)
        shape = (len(chosen), len(self.pairs))
        found = {
            name: array[:, 0] if name in ("draws", "rows", "excluded") else array.reshape(shape)
            for name, array in part.items()
            if not name.startswith("group_")
        }
        groups = {name: array for name, array in part.items() if name.startswith("group_")}
        found |= {name: array.reshape(len(chosen), -1, len(self.pairs)) for name, array in groups.items()}
        return _Sums.of(found, len(chosen), 0.0)

    def _provider(self) -> Any:
        provider = self.provider or self.index
        if provider is None:
            raise ParameterError(
                f"method {self.method!r} needs an index", remedy="build it: lmd3 index STORE"
            )
        return provider

    # --- the whole job ---

    def run(
        self, notice: Callable[[str], None], progress: ProgressFactory
    ) -> tuple[_Sums, dict[str, Any], Scan, NDArray[np.bool_]]:
        """The estimates, facts on the run, the exact scan, and which queries it answered (in their order)."""
        q = len(self.queries)
        audited = self._audited(q)
        sums, target, exact, reasons = self._estimates(np.arange(q), progress)
        estimated = ~exact
        exact |= audited
        scan = self._exact(exact, progress)
        facts: dict[str, Any] = {
            "method": self.method,
            "tolerance": {"kind": self.tolerance.kind, "value": self.tolerance.value},
            "target": None if math.isnan(target) else target,
            "audited": int((audited & estimated).sum()),
            "exact": reasons,
            "rows_estimated": float(sums.rows.sum()),
        }
        if self.index is not None:
            facts["index"] = {
                "path": str(self.index.path),
                "lists": self.index.lists,
                "dtype": self.index.manifest["dtype"],
                "rounding": self.index.manifest["rounding"],
            }
        judged = np.flatnonzero(audited & estimated)
        if self.method != "knn":
            exact, scan = self._judge(judged, exact, scan, sums, facts, notice, progress)
        else:
            within = np.cumsum(exact) - 1
            loss = scan.total.log_sum[within[judged]] - sums.log_sum[judged]
            facts["audit"] = {"median_missing_log": np.median(loss, axis=0).tolist() if len(judged) else None}
            notice("the sums over neighbours alone are lower bounds: what they lack is in run.json (audit)")
        facts["queries_exact"] = int(exact.sum())
        facts["queries_estimated"] = int((~exact).sum())
        return sums, facts, scan, exact

    def _estimates(
        self, chosen: NDArray[np.int64], progress: ProgressFactory
    ) -> tuple[_Sums, float, NDArray[np.bool_], dict[str, int]]:
        """All rounds for the chosen queries: estimates, the standard error aimed at, which queries are to be
        scored exactly, and why."""
        q, n = len(chosen), self.scanner.store.n
        cap = n / DRAW_COST if self.automatic else n / 4
        if self.method == "knn":
            return self._stage(chosen, np.full(q, float(NEAR)), 1, 0.0), math.nan, np.zeros(q, bool), {}
        # With rounds every one has its own bar.
        with (progress if self.rounds is None else silent)("estimate", float(q), "queries") as bar:
            pilot = self._stage(chosen, np.full(q, float(PILOT)), 0, self._guess_target())
            bar.update(q * 0.2)
            target = self._target(pilot)
            error = np.sqrt(pilot.variance[:, 0])
            error = np.where(np.isfinite(error), error, 10 * target)
            first_error, draws = error, np.clip(pilot.draws, 1, None)
            # Errors fall with the root of the draws or, as near lists are read whole, much faster.
            # The pilot plans as if with the draws; the top-up knows better.
            wanted = np.maximum(1.2 * draws * error / target, FEWEST)
            dear = wanted > cap
            # Half of what is allowed is tried all the same: a sum that near lists decide needs far fewer rows
            # than its pilot, which did not read them, makes believe.
            sums = self._stage(chosen, np.where(dear, cap / 2, wanted), 1, target)
            bar.update(q * 0.8)
            error = np.sqrt(sums.variance[:, 0])
            doubtful = (sums.flags[:, 0] & DOUBTFUL) > 0
            short = ~dear & ~doubtful & (error > SLACK * target)
            more = _top_up(draws, first_error, sums.draws, error, target)
            again = np.flatnonzero(short & (more <= cap))
            if len(again):
                sums.join(again, self._stage(chosen[again], np.maximum(more[again], FEWEST), 2, target))
            # Where few draws decide, several times as many are taken in the place of the first.
            few = np.flatnonzero(((sums.flags[:, 0] & DOUBTFUL) == FEW_ROWS) & (4 * sums.draws <= cap))
            if len(few):
                sums.put(few, self._stage(chosen[few], 4 * sums.draws[few], MORE, target))
            error = np.sqrt(sums.variance[:, 0])
            doubtful = (sums.flags[:, 0] & DOUBTFUL) > 0
            missed = ~doubtful & ~(error <= 1.5 * SLACK * target)
        reasons = {
            "too_many_rows": int((missed & dear).sum()),
            "flagged": int(doubtful.sum()),
            "tolerance_missed": int((missed & ~dear).sum()),
        }
        return sums, target, doubtful | missed, reasons

    def shard(self, index: int, count: int) -> tuple[int, int]:
        """Does the rounds of the i-th of n runs of ranges of queries into files, and no more: these queries
        [start, end).

        Raises:
            ParameterError: a reliability, which only all queries together show.
        """
        assert self.rounds is not None
        if self.tolerance.kind != "error" and self.method != "knn":
            raise ParameterError(
                "a reliability with a shard: it takes the spread of all queries' densities",
                remedy="give a relative error: --tolerance 0.01",
            )
        q = len(self.queries)
        length = range_length(q)
        ranges = -(-q // length)
        start, end = (min(i * ranges // count * length, q) for i in (index, index + 1))
        chosen = np.arange(start, end)
        if len(chosen):
            self._estimates(chosen, silent)
            if self.index is not None:
                self.rounds.run(
                    self, NEIGHBORS, chosen, np.full(len(chosen), float(max(self.asked.neighbors, 1))), 0.0
                )
        return start, end

    def _audited(self, q: int) -> NDArray[np.bool_]:
        count = min(q, min(max(q // 32, AUDIT[0]), AUDIT[1]))
        audited = np.zeros(q, bool)
        audited[np.random.default_rng([self.seed, 31]).choice(q, count, replace=False)] = True
        return audited

    def _guess_target(self) -> float:
        return self.tolerance.value if self.tolerance.kind == "error" else 0.1

    def _target(self, pilot: _Sums) -> float:
        """The standard error of a log density that the tolerance asks for."""
        if self.tolerance.kind == "error":
            return self.tolerance.value
        log_sum, variance = pilot.log_sum[:, 0], pilot.variance[:, 0]
        good = np.isfinite(log_sum) & np.isfinite(variance) & (variance < 1)
        if good.sum() < 3:
            raise ParameterError(
                "a reliability needs the spread of at least 3 queries' densities",
                remedy="give a relative error: --tolerance 0.01",
            )
        spread = float(log_sum[good].var(ddof=1) - variance[good].mean())
        # The spread itself is uncertain: a fifth less, so that the reliability holds.
        return math.sqrt((1 - self.tolerance.value) * max(0.8 * spread, 1e-6))

    def _exact(self, chosen: NDArray[np.bool_], progress: ProgressFactory) -> Scan:
        own = None if self.asked.own is None else np.ascontiguousarray(self.asked.own[chosen])
        queries = np.ascontiguousarray(self.queries[chosen])
        if self.rounds is not None:
            return self.rounds.scan(
                self,
                queries,
                Asked(by_group=self.asked.by_group, groups=self.asked.groups, own=own, tables=True),
            )
        asked = Asked(by_group=self.asked.by_group, groups=self.asked.groups, own=own)
        return self.scanner.scan(queries, self.pairs, asked, progress, "exact")

    def _arithmetic(self, dtype: str) -> NDArray[np.float64]:
        """Error of the arithmetic in each log sum, (Q, B): what one of D² does to the kernel's logarithm."""
        least = ARITHMETIC.get(dtype, ARITHMETIC_FLOAT)
        error, near = ARITHMETIC_SQ.get(dtype, ARITHMETIC_SQ_FLOAT)
        own = (self.queries.astype(np.float64) ** 2).sum(axis=1)
        norms = own + (own if self.index is None else float(self.index.manifest["sq_norm"]))
        each = [
            error * norms / (2 * h * h) if kernel == "gaussian" else error * np.sqrt(norms / near) / (2 * h)
            for kernel, h in self.pairs
        ]
        errors: NDArray[np.float64] = np.maximum(least, np.stack(each, axis=1))
        return errors

    def _judge(
        self,
        judged: NDArray[np.int64],
        exact: NDArray[np.bool_],
        scan: Scan,
        sums: _Sums,
        facts: dict[str, Any],
        notice: Callable[[str], None],
        progress: ProgressFactory,
    ) -> tuple[NDArray[np.bool_], Scan]:
        """Compares the audited queries' estimates with their exact sums; widens errors or gives up."""
        copy = self.scanner.store.dtype
        if self.method == "stratified" and self.index is not None:
            copy = self.index.manifest["dtype"]
        floor = self._arithmetic(copy) ** 2
        sums.variance += floor
        if sums.groups is not None:
            sums.groups.variance += floor[:, None]
        if len(judged) < 3:
            facts["audit"] = {"ratio": None, "widened": False, "given_up": len(judged) == 0}
            if exact.all():
                return exact, scan
            if len(judged) == 0:
                # Nothing vouches for what is left.
                exact = np.ones_like(exact)
                return exact, self._exact(exact, progress)
            return exact, scan
        within = np.cumsum(exact) - 1
        error = sums.log_sum[judged] - scan.total.log_sum[within[judged]]
        with np.errstate(invalid="ignore"):
            ratio = np.sqrt(np.mean(error**2 / sums.variance[judged], axis=0))
        ratio = np.where(np.isfinite(ratio), ratio, np.inf)
        facts["audit"] = {
            "ratio": [float(r) if math.isfinite(r) else None for r in ratio],
            "widened": bool(ratio[0] > WIDEN),
            "given_up": bool(ratio[0] > GIVE_UP),
        }
        if ratio[0] > GIVE_UP and not exact.all():
            notice(
                f"the estimates were given up: in {len(judged)} queries scored exactly their errors were "
                f"{ratio[0]:.1f} times their standard errors; all queries are scored exactly"
            )
            exact = np.ones_like(exact)
            return exact, self._exact(exact, progress)
        factor = np.where(ratio > WIDEN, np.minimum(ratio, 1e3), 1.0) ** 2
        sums.variance *= factor
        if sums.groups is not None:
            sums.groups.variance *= factor
        # At another bandwidth what was given up is marked only.
        sums.flags[:, ratio > GIVE_UP] |= np.uint32(1 << 8)
        return exact, scan


def _top_up(
    pilot_draws: NDArray[np.float64],
    pilot_error: NDArray[np.float64],
    draws: NDArray[np.float64],
    error: NDArray[np.float64],
    target: float,
) -> NDArray[np.float64]:
    """Further draws that should bring an error to the target, by how it fell from the pilot to the main
    stage: with the draws to the power of −½ where all is left to chance, more steeply where whole lists
    join."""
    with np.errstate(divide="ignore", invalid="ignore"):
        power = np.log(pilot_error / error) / np.log(np.maximum(draws, 2) / pilot_draws)
    power = np.clip(np.where(np.isfinite(power), power, 0.5), 0.5, 1.5)
    total = 1.2 * draws * np.maximum(error / target, 1.0) ** (1 / power)
    # Where errors fall as chance has it the first stage counts as much as its draws; else it is soon outdone.
    return np.where(power < 0.7, total - draws, total)


def _empty(q: int, b: int, groups: int) -> _Sums:
    def make(shape: tuple[int, ...]) -> _Sums:
        a, b, c, d = (np.zeros(shape) for _ in range(4))
        return _Sums(a, b, c, d, np.zeros(shape, np.uint32), np.zeros(q), np.zeros(q), np.zeros(q))

    sums = make((q, b))
    if groups:
        sums.groups = make((q, groups, b))
    return sums


def choose(
    method: str, scanner: Scanner, index: Index | None, queries: int, pairs: Sequence[Pair], asked: Asked
) -> tuple[str, str | None]:
    """The method to take, and why it is the exact one where "auto" might have been another.

    Raises:
        ParameterError: a method by name that this job can't take.
    """
    if method == "exact":
        return method, None
    obstacles = []
    kernels = sorted({kernel for kernel, _ in pairs} - set(ESTIMATED))
    if kernels:
        obstacles.append(f"sums of the {', '.join(kernels)} kernel are not estimated")
    if design_of(scanner.store) is not None:
        obstacles.append("the rows are a sample, whose own error an estimate would leave out")
    if asked.exclude_within > 0:
        obstacles.append("rows left out by distance are known to a scan only")
    if method in ("sample", "deann", "knn") and (asked.by_group or asked.own is not None):
        obstacles.append(f"method {method!r} knows no groups and leaves no rows out")
    if method in ("auto", "stratified"):
        if index is None:
            obstacles.append("there is no index (lmd3 index STORE makes one)")
        elif scanner.weights is not None:
            obstacles.append("weights given beside the rows are not in the index")
        elif asked.by_group and queries * len(group_slots(scanner.store, asked)[1]) * len(pairs) > GROUP_SUMS:
            obstacles.append("so many groups, queries and bandwidths have more estimates than fit in memory")
    if obstacles:
        if method != "auto":
            raise ParameterError(f"method {method!r}: {obstacles[0]}", remedy="take --method auto or exact")
        return "exact", obstacles[0]
    if method != "auto":
        return method, None
    assert index is not None
    n = scanner.store.n
    if n < SMALL:
        return "exact", None
    # In units of a row read by a scan. A list costs its centroid, its mean and a prediction per bandwidth.
    estimate = index.lists * (6 + 40 * len(pairs)) + DRAW_COST * (PILOT + 4 * n / index.lists + 2000)
    if queries * estimate + AUDIT[0] * n > 0.7 * n * queries:
        return "exact", None
    return "stratified", None


def group_slots(store: Store, asked: Asked) -> tuple[NDArray[np.uint32] | None, list[int]]:
    """For each code of the store the number of the group that it counts to, and the codes of these groups as
    an exact scan gives them; None and nothing where groups are not asked for."""
    if not asked.by_group:
        return None, []
    if asked.groups is None:
        return np.arange(len(store.groups), dtype=np.uint32), list(range(len(store.groups)))
    kept = list(asked.groups)
    slots = np.full(len(store.groups), len(kept), np.uint32)
    slots[kept] = np.arange(len(kept))
    return slots, [*kept, OTHER_CODE] if len(kept) < len(store.groups) else kept


def approximate(job: Estimation, notice: Callable[[str], None], progress: ProgressFactory) -> Approximation:
    """Runs a job and puts estimated and exact results together."""
    sums, facts, scan, exact = job.run(notice, progress)
    store, q, b = job.scanner.store, len(job.queries), len(job.pairs)
    weight = float(scan.total.weight)
    left_out = np.where(exact, 0.0, sums.excluded)
    total = _guesses(job, sums, exact, weight - left_out)
    _fill(total, scan.total, exact, scan.rows)
    groups = {}
    if job.asked.by_group and sums.groups is not None:
        slot_of = {code: slot for slot, code in enumerate(group_slots(store, job.asked)[1])}
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
    rows, distances, duplicates, cosines = _neighbors(job, max(job.asked.neighbors, 1))
    total.excluded[~exact] = (sums.excluded > 0)[~exact]
    mean = job.index.mean if job.index is not None else np.zeros(store.d)
    assert total.log_sum.shape == (q, b)
    return Approximation(
        total, groups, rows, distances, duplicates, cosines, mean, job.scanner.level, store.n, facts
    )


def _guesses(job: Estimation, sums: _Sums, exact: NDArray[np.bool_], weight: NDArray[np.float64]) -> Guesses:
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
        parts += ["audit_failed"] if value & (1 << 8) else []
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


def _neighbors(
    job: Estimation, k: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.uint64], NDArray[np.float64]]:
    """Nearest rows by the index: rows, distances (Q, k), copies counted among at most 256, and the largest
    ⟨x, q⟩/‖x‖, NaN where rows are not unit vectors."""
    everyone = np.arange(len(job.queries))
    if job.index is None:
        asked = replace(job.asked, neighbors=k, tables=True)
        if job.rounds is not None:
            scan = job.rounds.scan(replace(job, pairs=[]), job.queries, asked)
        else:
            scan = job.scanner.scan(job.queries, [], asked)
        return (
            scan.neighbor_rows,
            scan.neighbor_distances,
            scan.duplicates,
            scan.max_projection.astype(np.float64),
        )
    if job.rounds is None:
        part = _near(job, everyone, k)
        return part["near"], part["distances"], part["duplicates"], part["cosines"]
    part = job.rounds.run(job, NEIGHBORS, everyone, np.full(len(everyone), float(k)), 0.0)
    return part["near"], part["distances"], part["duplicates"][:, 0], part["cosines"][:, 0]


def _near(job: Estimation, chosen: NDArray[np.int64], k: int) -> Part:
    """What the index finds near the chosen queries: see `_neighbors`."""
    assert job.index is not None
    store, queries = job.scanner.store, np.ascontiguousarray(job.queries[chosen])
    own = None if job.asked.own is None else job.asked.own[chosen]
    extra = 0 if own is None else 1
    norms = np.linalg.norm(queries.astype(np.float64), axis=1)
    radius = np.maximum(1e-3, 2 * store.rounding) * norms
    wide = min(k + extra, store.n)
    distances, rows = job.index.kneighbors(queries, wide, rerank=False, threads=job.scanner.threads)
    # Where all that were found are copies there may be more.
    crowded = np.flatnonzero((distances < radius[:, None]).all(axis=1))
    if len(crowded) and wide < min(256, store.n):
        more, more_rows = job.index.kneighbors(
            queries[crowded], min(256, store.n), rerank=False, threads=job.scanner.threads
        )
    else:
        more, more_rows = np.empty((0, 0)), np.empty((0, 0), np.int64)
        crowded = crowded[:0]
    with np.errstate(invalid="ignore"):
        close = distances < radius[:, None]
        if own is not None:
            close &= rows != own[:, None]
        duplicates = close.sum(axis=1).astype(np.uint64)
        if len(crowded):
            near = more < radius[crowded][:, None]
            if own is not None:
                near &= more_rows != own[crowded][:, None]
            duplicates[crowded] = near.sum(axis=1)
    if own is not None:
        keep = np.argsort(rows == own[:, None], axis=1, kind="stable")
        rows, distances = np.take_along_axis(rows, keep, 1), np.take_along_axis(distances, keep, 1)
    rows, distances = rows[:, :k], distances[:, :k]
    cosines = np.full(len(queries), np.nan)
    if store.normalised:
        present = np.flatnonzero(rows[:, 0] >= 0)
        for start in range(0, len(present), 4096):
            part = present[start : start + 4096]
            vectors = store.rows(rows[part, 0]).astype(np.float64)
            dots = np.einsum("ij,ij->i", vectors, queries[part].astype(np.float64))
            cosines[part] = dots / np.linalg.norm(vectors, axis=1)
    return {"near": rows, "distances": distances, "duplicates": duplicates, "cosines": cosines}


def keys_of(queries: Store) -> NDArray[np.uint64]:
    """What the draws of each query depend on."""
    return draw_keys(queries.ids())
