"""The estimator: scikit-learn's manners in front of scan, bandwidth rules, partial files and tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmd3.bandwidth import Bandwidth, Rule, split_rules
from lmd3.density.adaptive import beside as adaptive_beside
from lmd3.density.adaptive import check_factor
from lmd3.density.approximate import Approximation, approximate
from lmd3.density.design_error import design_of
from lmd3.density.estimation import Estimation, estimation_of, open_index
from lmd3.density.extending import adopt
from lmd3.density.job import Job, identity, note_job
from lmd3.density.methods import parse_tolerance
from lmd3.density.parameters import check_method, check_precision, parse_bandwidths, parse_kernels
from lmd3.density.plan import Cluster, check_memory, plan_density
from lmd3.density.ranking import ranked_again
from lmd3.density.rounds import Rounds, asked_before, asked_of_estimate
from lmd3.density.rules import resolve_rules
from lmd3.density.scan import Asked, Pair, Scan, Scanner
from lmd3.density.settings import asked_of, settings_of
from lmd3.density.sides import Source, as_source, describe, own_rows, query_matrix
from lmd3.density.stages import Stages
from lmd3.density.tables import table_of
from lmd3.errors import ParameterError, ShapeError
from lmd3.executors import Executor
from lmd3.executors.jobs import files_of, gaps, owners, read_job, read_record
from lmd3.executors.local import LocalExecutor
from lmd3.executors.partials import FOLDER, canonical
from lmd3.kernels import log_normalizer
from lmd3.progress import ProgressFactory, silent
from lmd3.results import DensityTable
from lmd3.store import Store

if TYPE_CHECKING:
    from lmd3.density.rates import Rates


class KernelDensity:
    """Kernel density estimation over embeddings, exact, at the speed of the hardware.

    Follows the manners of `sklearn.neighbors.KernelDensity`; rows and queries are float32 or float16
    (float64 arrays
    are rounded to float32).

    Args:
        kernel: "exponential" (exp(−D/h)) or "gaussian" (exp(−D²/2h²)), the fast ones; or, slower, "vmf"
            (von Mises–Fisher, exp((⟨x,q⟩ − 1)/h²), for unit vectors only), "laplacian" (exp(−‖x − q‖₁/h)),
            "tophat", "epanechnikov" or "linear" (zero from distance h on); or a list of them.
        bandwidth: h, or a rule ("ess=1000": the h whose median effective sample size over the queries is
            1000; "mass=10": whose median kernel sum is 10; "mu=0.01": whose median density is 0.01; "loo": of
            the largest leave-one-out likelihood of the rows, duplicates left out with a row), or
            "@bandwidth.json", or a list of these; the first is the primary one. A rule is resolved by
            `fit(…, queries=…)`, else by the first scoring call, and kept.
        normalize: whether `score_samples` divides by the kernel's integral over ℝᵈ. (`density` does
            not by default: on a sphere the constant of ℝᵈ means nothing.)
        threads: threads; None takes all cores.
        precision: arithmetic of the dot products: "float32"; "int16" (rows and queries as 16-bit integers:
            the log density within 5e-4 of its size, 1e-4 for bandwidths from .2 of the norms; rows near a
            query are exact); "int8" (both as 8-bit integers, within 5e-3 for bandwidths from .1; where the
            CPU has AVX-512 with VNNI); "auto": int16 for int8 rows, else float32.
        seed: seed of the samples that rules look at.
        max_memory: bytes that sums in flight may take beside the page cache.
        any_encoder: score queries of another model, prompt or revision than the corpus's, which is refused
            otherwise.
        io: how rows of files come into memory: "mmap"; or "pread", read block by block, for file systems
            whose maps are slow. The result is the same to the bit.
        method: "exact"; "auto": estimates by an index where that is cheaper, else exact; "stratified" (by the
            index), "sample" (random rows), "deann" (neighbours and random rows), "knn" (neighbours alone: a
            lower bound). Estimates bring their standard errors, are checked against exact sums of 32 to 64 of
            the queries, and fall back to exact sums query by query.
        tolerance: for estimates: the relative error of a kernel sum (0.01), or "reliability=0.99" of the log
            density over the queries; held at the primary bandwidth.
        index: folder of the index; by default beside the store.

    Attributes:
        store_: the fitted rows.
        bandwidths_: the resolved `Bandwidth`s, after a rule was resolved; every kernel with every bandwidth.
        bandwidth_: the number of the primary one.
        notices_: what was dropped or should be known about the resolution.
    """

    def __init__(
        self,
        *,
        kernel: str | Sequence[str] = "exponential",
        bandwidth: str | float | Sequence[str | float] = "ess=1000",
        normalize: bool = True,
        threads: int | None = None,
        seed: int = 0,
        max_memory: int = 2_000_000_000,
        precision: str = "auto",
        any_encoder: bool = False,
        io: str = "mmap",
        method: str = "exact",
        tolerance: str | float = 0.01,
        index: str | Path | None = None,
    ) -> None:
        self.kernel = kernel
        self.bandwidth = bandwidth
        self.normalize = normalize
        self.threads = threads
        self.io = io
        self.seed = seed
        self.max_memory = max_memory
        self.precision = precision
        self.any_encoder = any_encoder
        self.method = method
        self.tolerance = tolerance
        self.index = index

    # --- scikit-learn's manners ---

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's parameters."""
        names = (
            "kernel",
            "bandwidth",
            "normalize",
            "threads",
            "seed",
            "max_memory",
            "precision",
            "any_encoder",
            "io",
            "method",
            "tolerance",
            "index",
        )
        return {name: getattr(self, name) for name in names}

    def set_params(self, **params: Any) -> Self:
        """Sets parameters of the constructor.

        Raises:
            ParameterError: an unknown name.
        """
        for name, value in params.items():
            if name not in self.get_params():
                raise ParameterError(f"KernelDensity has no parameter {name!r}")
            setattr(self, name, value)
        return self

    def check_params(self) -> None:
        """Checks the parameters as `fit` does, without data.

        Raises:
            ParameterError: an unknown kernel or precision, a bandwidth that is none.
            FileMissingError, FormatError: a file of bandwidths that can't be read.
        """
        self._kernels()
        self._rules()
        check_precision(self.precision, self.io)
        check_method(self.method, self.tolerance)

    def __repr__(self) -> str:
        return f"KernelDensity({', '.join(f'{name}={value!r}' for name, value in self.get_params().items())})"

    def fit(
        self,
        X: Source | ArrayLike,
        y: object = None,
        sample_weight: ArrayLike | None = None,
        *,
        queries: Source | ArrayLike | None = None,
        progress: ProgressFactory | None = None,
    ) -> Self:
        """Takes the rows of a corpus: a store, a path, or a matrix (n, d).

        Args:
            X: the rows.
            y: ignored.
            sample_weight: (n,) weights ≥ 0 of an array's rows.
            queries: resolve bandwidth rules on these at once.
            progress: shows progress.

        Raises:
            InputError: and its kinds: whatever is wrong with the rows, the kernel or the bandwidth.
        """
        kernels = self._kernels()
        rules, _ = self._rules()
        check_precision(self.precision, self.io)
        check_method(self.method, self.tolerance)
        store = as_source(X, "rows")
        weights = None
        if sample_weight is not None:
            weights = np.asarray(sample_weight, dtype=np.float32)
            if store.array is None:
                raise ParameterError("sample_weight is for arrays: a store brings its own weights")
            if weights.shape != (store.n,):
                raise ShapeError(f"{weights.shape} weights for {store.n} rows")
            if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
                raise ParameterError("weights must be finite, not negative, and not all zero")
        self.store_ = store
        self._weights = weights
        self.notices_: list[str] = []
        self.__dict__.pop("bandwidths_", None)
        self.__dict__.pop("bandwidth_", None)
        if isinstance(rules, list) and all(isinstance(rule, Bandwidth) for rule in rules):
            self._keep([rule for rule in rules if isinstance(rule, Bandwidth)])
        elif all(isinstance(rule, Rule) and rule.kind == "number" for rule in rules):
            self._keep([Bandwidth(k, r.value, r.text) for k in kernels for r in rules if isinstance(r, Rule)])
        elif queries is not None:
            self._resolve(self._query_matrix(as_source(queries, "queries")), Asked(), progress or silent)
        return self

    def score_samples(self, X: Source | ArrayLike) -> NDArray[np.float64]:
        """Log density of each query: (Q,) for one kernel and bandwidth, else (Q, B), kernels outermost."""
        store = as_source(X, "queries")
        queries = self._query_matrix(store)
        self._resolve(queries, Asked(), silent)
        estimation = self._estimation(store, queries, Asked(neighbors=1))
        if estimation is not None:
            scores = approximate(estimation, self.notices_.append, silent).total.log_density
        else:
            scores = self._scanner().scan(queries, self._pairs()).total.log_density
        if self.normalize:
            d = self.store_.d
            scores = scores - np.array([log_normalizer(b.kernel, d, b.bandwidth) for b in self.bandwidths_])
        return scores[:, 0] if scores.shape[1] == 1 else scores

    def score(self, X: Source | ArrayLike, y: object = None) -> float:
        """Total log density of the queries at the primary kernel and bandwidth."""
        scores = self.score_samples(X)
        return float((scores if scores.ndim == 1 else scores[:, 0]).sum())

    def kneighbors(
        self, X: Source | ArrayLike, n_neighbors: int = 5, return_distance: bool = True
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]] | NDArray[np.int64]:
        """The nearest rows of each query: distances (Q, k) float64 and row numbers (Q, k) int64, nearest
        first. Where the store keeps a finer copy (`Store.exact`), twice as many and 16 are ranked by it.

        Raises:
            ParameterError: more neighbours than rows, or none.
        """
        self._check_fitted()
        if not 1 <= n_neighbors <= self.store_.n:
            raise ParameterError(f"n_neighbors={n_neighbors}, but the corpus has {self.store_.n} rows")
        queries = self._query_matrix(as_source(X, "queries"))
        exact = self.store_.exact
        wide = n_neighbors if exact is None else min(2 * n_neighbors + 16, self.store_.n)
        scan = self._scanner().scan(queries, [], Asked(neighbors=wide))
        distances, rows = scan.neighbor_distances, scan.neighbor_rows
        if exact is not None:
            distances, rows = ranked_again(exact, queries, rows, n_neighbors)
        return (distances, rows) if return_distance else rows

    # --- the tables ---

    def resolve(
        self,
        queries: Source | ArrayLike,
        *,
        exclude_self: bool = False,
        exclude_within: float = 0.0,
        progress: ProgressFactory | None = None,
    ) -> list[Bandwidth]:
        """Resolves the bandwidth rules on these queries (once: later calls return the same numbers)."""
        self._check_fitted()
        store = as_source(queries, "queries")
        matrix = self._query_matrix(store)
        own = own_rows(self.store_, store, matrix) if exclude_self else None
        self._resolve(matrix, Asked(own=own, exclude_within=exclude_within), progress or silent)
        return self.bandwidths_

    def density(
        self,
        queries: Source | ArrayLike,
        neighbors: int = 10,
        by_group: bool = False,
        *,
        groups: str | Path | Sequence[str] | None = None,
        normalize: bool = False,
        exclude_self: bool = False,
        exclude_within: float = 0.0,
        folder: str | Path | None = None,
        extend: str | Path | None = None,
        executor: Executor | None = None,
        adaptive: float | None = None,
        notice: Callable[[str], None] | None = None,
        progress: ProgressFactory | None = None,
    ) -> DensityTable:
        """Densities, neighbours and typicality of queries as tables (see `lmd3.results`).

        Args:
            queries: a store, a path or a matrix (Q, d). Ids are the store's, else row numbers from 0.
            neighbors: nearest rows listed per query (at least one is found for `max_cosine`).
            by_group: also the density under each group of rows.
            groups: with `by_group`, the groups kept apart: "top:K", a file of names, or names; the others
                are taken together as "(other)".
            normalize: subtract the kernel's constant of ℝᵈ.
            exclude_self: leave a query's own row out: the row of the same id, whose vector must agree.
            exclude_within: leave out rows nearer than this; their number is in `excluded`.
            folder: the folder that the result is to be saved in. Finished segments are kept in its
                `partials/` as the scan goes, and what an earlier, killed run of the same job left there is
                not computed again: the result is the same to the byte.
            extend: the folder of an earlier result of the same queries, bandwidths and settings over this
                store before rows were appended: its segment sums are taken, only new rows are scanned.
            executor: where the segments are scanned (`lmd3.executors.make_executor`) [in this process]; the
                bytes do not depend on it. Other than in this process it needs a `folder` and a corpus that
                all workers see under the same path.
            adaptive: also densities with a bandwidth of each query's own, this times the distance of the
                last of its nearest rows (`lmd3.density.adaptive`); rule `adaptive=C` of the table.
            notice: takes lines on what is continued and what was damaged.
            progress: shows progress.

        Raises:
            InputError: and its kinds: whatever is wrong with the queries or options.
            OtherJobError: `folder` holds partials of another configuration.
            WorkError: tasks of the executor failed; each is named.
        """
        started = time.time()
        told = notice or (lambda line: self.notices_.append(line))
        settings = settings_of(
            neighbors, by_group, groups, normalize, exclude_self, exclude_within, self.seed
        )
        partials = None if folder is None else Path(folder) / FOLDER
        if extend is not None and partials is None:
            raise ParameterError("to extend an earlier result takes a folder", remedy="give folder=")
        if executor is not None and not executor.in_process:
            self._check_fitted()
            if partials is None or self.store_.path is None:
                raise ParameterError(
                    "workers elsewhere need files: a corpus with a path, and a folder for what they find",
                    remedy="save the rows to a file or store, and give folder=",
                )
        if adaptive is not None:
            self._check_adaptive(adaptive, executor)
        store, job = self._job(queries, settings, partials, progress or silent)
        estimation = self._estimation(store, job.queries, job.asked)
        chosen = executor or LocalExecutor(self.threads)
        facts: dict[str, Any] = {}
        work = None
        scan: Scan | Approximation
        if estimation is not None:
            rounds = None
            if partials is not None:
                rounds = self._rounds(store, job, settings, partials, estimation, chosen, told, progress)
            scan = approximate(estimation, told, progress or silent, rounds)
            facts = {"method": scan.facts["method"], "approximate": scan.facts}
            work = None if rounds is None else rounds.summary
        elif partials is None:
            scan = job.scanner.scan(job.queries, job.pairs, job.asked, progress or silent)
        else:
            self._note(store, job, settings, partials)
            files = job.partials(partials, told)
            if extend is not None:
                adopt(Path(extend), files, self.store_, job.scanner.segments(), told)
            work = job.scan(files, chosen, told, progress or silent)
            scan = job.fold(files)
        ids, described = store.ids(), describe(store)
        table = table_of(job, self.bandwidths_, ids, described, scan, settings, self.notices_)
        table.run.update(facts, settings=settings, seconds=round(time.time() - started, 3))
        if work is not None:
            table.run["work"] = work.to_dict() | {"executor": chosen.name}
        if adaptive is not None:
            distances = scan.neighbor_distances
            table = adaptive_beside(table, job, self._kernels(), adaptive, distances, progress or silent)
            table.run["seconds"] = round(time.time() - started, 3)
        return table

    def _check_adaptive(self, factor: float, executor: Executor | None) -> None:
        """Refuses densities of bandwidths of the queries' own where they can't be made, before any work."""
        self._check_fitted()
        check_factor(factor, self._kernels())
        if self.method != "exact" or (executor is not None and not executor.in_process):
            raise ParameterError(
                "adaptive bandwidths are for exact sums in this process",
                remedy="leave the method and executor out",
            )
        if design_of(self.store_) is not None:
            raise ParameterError("the corpus is a sample: no standard error is known of adaptive densities")

    def scan_shard(
        self,
        queries: Source | ArrayLike,
        shard: tuple[int, int],
        folder: str | Path,
        neighbors: int = 10,
        by_group: bool = False,
        *,
        groups: str | Path | Sequence[str] | None = None,
        normalize: bool = False,
        exclude_self: bool = False,
        exclude_within: float = 0.0,
        notice: Callable[[str], None] | None = None,
        progress: ProgressFactory | None = None,
    ) -> dict[str, Any]:
        """Scans the i-th of n ranges of the corpus's segments into partial files; `merge` makes the tables.

        The processes of the n ranges need not know of each other. They may share the folder.

        Args:
            queries: as for `density`, and so are the others.
            shard: (i, n), i from 0.
            folder: of the result; the files go to its `partials/`.
            neighbors: see `density`.
            by_group: see `density`.
            groups: see `density`.
            normalize: see `density`.
            exclude_self: see `density`.
            exclude_within: see `density`.
            notice: see `density`.
            progress: see `density`.

        Returns:
            `segments` [start, end) of the range, `of` all, `missing` ranges of all that no file covers yet,
            and what `Summary.to_dict` gives. Of estimates the shard is a range of the queries: `queries`
            [start, end), `of` all; `density` with the same folder ends the job.

        Raises:
            ParameterError: no such shard, or a bandwidth that is a rule: it must be resolved once for all.
            Others as `density`.
        """
        index, count = shard
        if not 0 <= index < count:
            raise ParameterError(
                f"no shard {index} of {count}", remedy="shards are counted from 0: 0/8 … 7/8"
            )
        self._check_fitted()
        if not hasattr(self, "bandwidths_"):
            raise ParameterError(
                "a bandwidth rule with a shard: every shard would have to find the same number",
                remedy="run `lmd3 bandwidth … -o bandwidth.json` once, then give --bandwidth @bandwidth.json",
            )
        told = notice or (lambda line: self.notices_.append(line))
        settings = settings_of(
            neighbors, by_group, groups, normalize, exclude_self, exclude_within, self.seed
        )
        partials = Path(folder) / FOLDER
        store, job = self._job(queries, settings, partials, progress or silent)
        estimation = self._estimation(store, job.queries, job.asked)
        if estimation is not None:
            chosen = LocalExecutor(self.threads)
            rounds = self._rounds(store, job, settings, partials, estimation, chosen, told, progress)
            part = Stages(estimation, rounds).shard(index, count)
            return {"queries": part, "of": store.n, **rounds.summary.to_dict()}
        self._note(store, job, settings, partials)
        segments = len(job.scanner.segments())
        within = (index * segments // count, (index + 1) * segments // count)
        files = job.partials(partials, told, within)
        summary = job.scan(files, LocalExecutor(self.threads), told, progress or silent)
        missing = gaps(owners(files_of(partials)), 0, segments)
        return {"segments": within, "of": segments, "missing": missing, **summary.to_dict()}

    def plan(
        self,
        queries: Source | ArrayLike,
        neighbors: int = 10,
        by_group: bool = False,
        *,
        groups: str | Path | Sequence[str] | None = None,
        exclude_self: bool = False,
        exclude_within: float = 0.0,
        rows: int | None = None,
        cluster: Cluster | None = None,
        rates: Rates | None = None,
        seconds: float = 1.0,
    ) -> dict[str, Any]:
        """What `density` would read, compute and take, by the rates of a probe on the same rows and queries.

        Args:
            queries: as for `density`, and so are the next four.
            neighbors: see above.
            by_group: see above.
            groups: see above.
            exclude_self: see above.
            exclude_within: see above.
            rows: plan for so many rows of this kind, whatever the corpus has.
            cluster: machines like this one, on which it would run.
            rates: of the machine it would run on (`lmd3.density.rates`), instead of a probe on this one.
            seconds: how long each probe runs.

        Returns:
            `rows`, `queries`, `dimensions`, `segments`; `bytes` of the rows read, in how many `passes`;
            `operations` (2 per row, query and dimension); `operations_per_second` of the probe;
            `bandwidth_seconds` to resolve rules and `scan_seconds`, together `seconds`; `partial_bytes` that
            the partial files take at most; `result_bytes` of memory that the result takes; `simd`, `threads`;
            with a cluster `cluster` (see `predict`).

        Raises:
            InputError: and its kinds: whatever `density` would refuse before its work.
        """
        self._check_fitted()
        store = as_source(queries, "queries")
        matrix = self._query_matrix(store)
        asked = asked_of(
            self.store_, store, matrix, neighbors, by_group, groups, exclude_self, exclude_within
        )
        resolved = hasattr(self, "bandwidths_")
        return plan_density(
            self._scanner(),
            matrix,
            self._kernels(),
            self._pairs() if resolved else [],
            [] if resolved else self._allowed_rules()[0],
            asked,
            self.seed,
            seconds,
            rows,
            cluster,
            rates,
        )

    # --- inside ---

    def _estimation(self, store: Store, queries: NDArray[np.float32], asked: Asked) -> Estimation | None:
        """What is to be estimated, or None where all rows are to be read."""
        if self.method == "exact":
            return None
        return estimation_of(
            self.method,
            parse_tolerance(self.tolerance),
            self._scanner(),
            open_index(self.store_, self.index),
            store,
            queries,
            self._pairs(),
            asked,
            self.seed,
            self.notices_.append,
        )

    def _rounds(
        self,
        store: Store,
        job: Job,
        settings: dict[str, Any],
        partials: Path,
        estimation: Estimation,
        executor: Executor,
        notice: Callable[[str], None],
        progress: ProgressFactory | None,
    ) -> Rounds:
        """The rounds of an estimate, kept in the folder of partials; the job is noted there."""
        asked = {**job.identified, "estimate": asked_of_estimate(estimation)}
        index = estimation.index
        work = {"index": None if index is None else str(index.path.absolute())}
        self._note(store, replace(job, identified=asked), settings, partials, work)
        asked = {**asked, "kernels": self._pairs()}
        return Rounds(partials, canonical(asked), executor, notice, progress or silent)

    def _kernels(self) -> list[str]:
        return parse_kernels(self.kernel)

    def _rules(self) -> tuple[list[Rule] | list[Bandwidth], bool]:
        return parse_bandwidths(self.bandwidth)

    def _keep(self, bandwidths: list[Bandwidth]) -> None:
        self.bandwidths_ = bandwidths
        self.bandwidth_ = bandwidths[0].bandwidth

    def _pairs(self) -> list[Pair]:
        return [(entry.kernel, entry.bandwidth) for entry in self.bandwidths_]

    def _pairs_or_rules(self) -> list[Any]:
        """As many as there will be kernels with bandwidths."""
        if hasattr(self, "bandwidths_"):
            return self._pairs()
        return [(kernel, rule) for kernel in self._kernels() for rule in self._allowed_rules()[0]]

    def _check_fitted(self) -> None:
        if not hasattr(self, "store_"):
            raise ParameterError("not fitted", remedy="call fit(corpus) first")

    def _allowed_rules(self) -> tuple[list[Rule], list[str]]:
        """The rules that the corpus allows, and notices on those that were dropped."""
        parsed, defaults = self._rules()
        texts = [rule.text for rule in parsed if isinstance(rule, Rule)]
        return split_rules(texts, self._kernels(), self.store_.population, defaults=defaults)

    def _scanner(self) -> Scanner:
        self._check_fitted()
        return Scanner(self.store_, self._weights, self.precision, self.threads, self.max_memory, self.io)

    def _job(
        self,
        queries: Source | ArrayLike,
        settings: dict[str, Any],
        partials: Path | None,
        progress: ProgressFactory,
    ) -> tuple[Store, Job]:
        """The queries and the job that settings ask for, with the bandwidths that the job of a folder of
        partials has found before.

        Raises:
            OtherJobError: the folder holds another job.
        """
        self._check_fitted()
        neighbors, by_group = settings["neighbors"], settings["by_group"]
        if neighbors < 0:
            raise ParameterError(f"neighbors={neighbors} is negative")
        store = as_source(queries, "queries")
        matrix = self._query_matrix(store)
        asked = asked_of(
            self.store_,
            store,
            matrix,
            neighbors,
            by_group,
            settings.get("groups"),
            settings["exclude_self"],
            settings["exclude_within"],
        )
        scanner = self._scanner()
        identified = identity(scanner, store, self._chosen(), asked)
        kept = None if partials is None else self._read(partials, identified)
        if kept is not None and not hasattr(self, "bandwidths_"):
            self.notices_ = self._allowed_rules()[1]
            self._keep([Bandwidth(**entry) for entry in kept])
        check_memory(scanner, len(matrix), len(self._pairs_or_rules()), asked)
        self._resolve(matrix, asked, progress)
        return store, Job(scanner, matrix, self._pairs(), asked, identified)

    def _read(self, partials: Path, identified: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """The bandwidths of the job of a folder; that of an estimate holds more than what identifies a scan.

        Raises:
            OtherJobError: it is another job.
        """
        record = read_record(partials)
        then = (record.asked if record is not None else {}).get("estimate")
        if self.method == "exact" or then is None:
            return read_job(partials, identified)
        asked = asked_before(then, self.method, parse_tolerance(self.tolerance), self.seed)
        return read_job(partials, {**identified, "estimate": asked})

    def _note(
        self,
        store: Store,
        job: Job,
        settings: dict[str, Any],
        partials: Path,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        """Notes a job in the folder of its partials."""
        noted = settings | {"notices": self.notices_}
        note_job(partials, store, job, self.bandwidths_, noted, more or {})

    def _query_matrix(self, store: Store) -> NDArray[np.float32]:
        """All queries as float32 (Q, d)."""
        self._check_fitted()
        return query_matrix(self.store_, store, self.max_memory, self.any_encoder)

    def _chosen(self) -> dict[str, Any]:
        """The bandwidths as far as they are known before the work: what identifies a job."""
        if hasattr(self, "bandwidths_"):
            return {"bandwidths": [[b.kernel, b.bandwidth, b.rule] for b in self.bandwidths_]}
        rules = [rule.text for rule in self._rules()[0] if isinstance(rule, Rule)]
        return {"kernels": self._kernels(), "bandwidths": rules, "seed": self.seed}

    def _resolve(self, queries: NDArray[np.float32], asked: Asked, progress: ProgressFactory) -> None:
        """Resolves rules where that has not happened yet."""
        if hasattr(self, "bandwidths_"):
            return
        kernels = self._kernels()
        rules, self.notices_ = self._allowed_rules()
        notices: list[str] = []
        found = resolve_rules(self._scanner(), kernels, rules, queries, asked, self.seed, progress, notices)
        self.notices_ += notices
        self._keep(found)
