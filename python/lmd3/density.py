"""Kernel density of a corpus at queries: scikit-learn's manners outside, the fused scan inside.

Kernels and their normalising constants are those of `lmd3.kernels`; densities are always computed in log
space.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from lmd3 import _lmd3
from lmd3.bandwidth import (
    COARSE_GRID,
    DEFAULT_RULES,
    Bandwidth,
    Rule,
    parse_rule,
    read_bandwidths,
    resolve,
    split_rules,
)
from lmd3.errors import (
    JoinError,
    ModelError,
    NotFiniteError,
    ParameterError,
    ShapeError,
    VerificationError,
)
from lmd3.executors.partials import FOLDER, Part, Partials, read_job, write_job
from lmd3.kernels import FUSED, KERNELS, log_kernel, log_normalizer, unknown_kernel
from lmd3.progress import ProgressFactory, silent
from lmd3.results import DENSITY, NEIGHBORS, QUERIES, DensityTable, write_json
from lmd3.store import Store, open_store, xxh3
from lmd3.system import cores

#: Queries that a bandwidth rule looks at.
RULE_QUERIES = 1000

#: Rows that a rule looks at, at least (or all), and effective rows that must be left in the sample.
RULE_ROWS, RULE_EFFECTIVE = 1_000_000, 30

#: Arithmetic of the dot products; "auto" is float32, and int16 for int8 rows.
PRECISIONS = ("auto", "float32", "int16")

#: Rows (or names) handled at once where all would take too much memory.
_STEP = 1 << 16

#: Bytes of an element.
_ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}

Source = str | Path | NDArray[Any] | Store


def _as_source(source: Source | ArrayLike, what: str) -> Store:
    """A store of whatever was given; float64 arrays are rounded to float32 here and nowhere else."""
    if isinstance(source, (str, Path, Store)):
        store = open_store(source)
    else:
        array = np.asarray(source)
        if array.dtype == np.float64:
            if not np.isfinite(array).all():
                row = int(np.flatnonzero(~np.isfinite(array).all(axis=tuple(range(1, array.ndim))))[0])
                raise NotFiniteError(f"{what} hold NaN or infinity", row=row)
            array = array.astype(np.float32)
        store = open_store(np.ascontiguousarray(array))
    return store


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
            1000; "mass=10": whose median kernel sum is 10; "mu=0.01": whose median density is 0.01), or
            "@bandwidth.json", or a list of these; the first is the primary one. A rule is resolved by
            `fit(…, queries=…)`, else by the first scoring call, and kept.
        normalize: whether `score_samples` divides by the kernel's integral over ℝᵈ. (`density` does
            not by default: on a sphere the constant of ℝᵈ means nothing.)
        threads: threads; None takes all cores.
        precision: arithmetic of the dot products: "float32"; "int16" (rows and queries as 16-bit integers:
            the log density within 5e-4 of its size, 1e-4 for bandwidths from .2 of the norms; rows near a
            query are exact); "auto": int16 for int8 rows, else float32.
        seed: seed of the samples that rules look at.
        max_memory: bytes that sums in flight may take beside the page cache.

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
    ) -> None:
        self.kernel = kernel
        self.bandwidth = bandwidth
        self.normalize = normalize
        self.threads = threads
        self.seed = seed
        self.max_memory = max_memory
        self.precision = precision

    # --- scikit-learn's manners ---

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's parameters."""
        names = ("kernel", "bandwidth", "normalize", "threads", "seed", "max_memory", "precision")
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
        self._check_precision()

    def _check_precision(self) -> None:
        if self.precision not in PRECISIONS:
            raise ParameterError(
                f"unknown precision {self.precision!r}", remedy=f"choose one of {', '.join(PRECISIONS)}"
            )

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
        self._check_precision()
        store = _as_source(X, "rows")
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
            self._resolve(self._query_matrix(_as_source(queries, "queries")), None, progress or silent)
        return self

    def score_samples(self, X: Source | ArrayLike) -> NDArray[np.float64]:
        """Log density of each query: (Q,) for one kernel and bandwidth, else (Q, B), kernels outermost."""
        queries = self._query_matrix(_as_source(X, "queries"))
        self._resolve(queries, None, silent)
        scores = self._scan(queries, self._pairs()).total.log_density
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
        first.

        Raises:
            ParameterError: more neighbours than rows, or none.
        """
        self._check_fitted()
        if not 1 <= n_neighbors <= self.store_.n:
            raise ParameterError(f"n_neighbors={n_neighbors}, but the corpus has {self.store_.n} rows")
        scan = self._scan(self._query_matrix(_as_source(X, "queries")), [], neighbors=n_neighbors)
        return (scan.neighbor_distances, scan.neighbor_rows) if return_distance else scan.neighbor_rows

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
        store = _as_source(queries, "queries")
        matrix = self._query_matrix(store)
        own = self._own_rows(store, matrix) if exclude_self else None
        self._resolve(matrix, own, progress or silent, exclude_within)
        return self.bandwidths_

    def density(
        self,
        queries: Source | ArrayLike,
        neighbors: int = 10,
        by_group: bool = False,
        *,
        normalize: bool = False,
        exclude_self: bool = False,
        exclude_within: float = 0.0,
        folder: str | Path | None = None,
        notice: Callable[[str], None] | None = None,
        progress: ProgressFactory | None = None,
    ) -> DensityTable:
        """Densities, neighbours and typicality of queries as tables (see `lmd3.results`).

        Args:
            queries: a store, a path or a matrix (Q, d). Ids are the store's, else row numbers from 0.
            neighbors: nearest rows listed per query (at least one is found for `max_cosine`).
            by_group: also the density under each group of rows.
            normalize: subtract the kernel's constant of ℝᵈ.
            exclude_self: leave a query's own row out: the row of the same id, whose vector must agree.
            exclude_within: leave out rows nearer than this; their number is in `excluded`.
            folder: the folder that the result is to be saved in. Finished segments are kept in its
                `partials/` as the scan goes, and what an earlier, killed run of the same job left there is
                not computed again: the result is the same to the byte.
            notice: takes lines on what is continued and what was damaged.
            progress: shows progress.

        Raises:
            InputError: and its kinds: whatever is wrong with the queries or options.
            OutputError: `folder` holds partials of another configuration.
        """
        started = time.time()
        self._check_fitted()
        if neighbors < 0:
            raise ParameterError(f"neighbors={neighbors} is negative")
        store = _as_source(queries, "queries")
        if by_group and not self.store_.groups:
            raise ParameterError(
                "the corpus has no groups", remedy="encode it with --group, or leave --by-group out"
            )
        matrix = self._query_matrix(store)
        own = self._own_rows(store, matrix) if exclude_self else None
        k = min(max(neighbors, 1), self.store_.n)
        partials = None if folder is None else Path(folder) / FOLDER
        asked = self._asked(store, k, by_group, own, exclude_within)
        kept = None if partials is None else read_job(partials, asked)
        if kept is not None and not hasattr(self, "bandwidths_"):
            self.notices_ = self._allowed_rules()[1]
            self._keep([Bandwidth(**entry) for entry in kept])
        self._resolve(matrix, own, progress or silent, exclude_within)
        options: dict[str, Any] = {
            "neighbors": k,
            "by_group": by_group,
            "own": own,
            "exclude_within": exclude_within,
            "tables": True,
        }
        if partials is None:
            scan = self._scan(matrix, self._pairs(), **options, progress=progress or silent)
        else:
            bandwidths = [entry.to_dict() for entry in self.bandwidths_]
            write_job(partials, asked, bandwidths)
            write_json(partials.parent / "bandwidth.json", {"format": 1, "bandwidths": bandwidths})
            scan = self._scan_in_parts(
                matrix, partials, asked, options, notice or self.notices_.append, progress or silent
            )
        builder = _Tables(self, store, matrix, scan)
        table = DensityTable(
            builder.density(by_group, normalize), builder.queries(), builder.neighbors(neighbors), {}
        )
        table.run.update(self._run(store, scan, table))
        table.run.update(
            settings={
                "neighbors": neighbors,
                "by_group": by_group,
                "normalize": normalize,
                "exclude_self": exclude_self,
                "exclude_within": exclude_within,
                "seed": self.seed,
            },
            seconds=round(time.time() - started, 3),
        )
        return table

    def plan(
        self,
        queries: Source | ArrayLike,
        neighbors: int = 10,
        by_group: bool = False,
        *,
        exclude_self: bool = False,
        exclude_within: float = 0.0,
        seconds: float = 1.0,
    ) -> dict[str, Any]:
        """What `density` would read, compute and take, by the rates of a probe on the same rows and queries.

        Args:
            queries: as for `density`, and so are the next four.
            neighbors: see above.
            by_group: see above.
            exclude_self: see above.
            exclude_within: see above.
            seconds: how long each probe runs.

        Returns:
            `rows`, `queries`, `dimensions`, `segments`; `bytes` of the rows read, in how many `passes`;
            `operations` (2 per row, query and dimension); `operations_per_second` of the probe;
            `bandwidth_seconds` to resolve rules and `scan_seconds`, together `seconds`; `partial_bytes` that
            the partial files take at most; `simd`, `threads`.

        Raises:
            InputError: and its kinds: whatever `density` would refuse before its work.
        """
        self._check_fitted()
        corpus = self.store_
        store = _as_source(queries, "queries")
        matrix = self._query_matrix(store)
        own = self._own_rows(store, matrix) if exclude_self else None
        k = min(max(neighbors, 1), corpus.n)
        generator = np.random.default_rng(self.seed)
        scale = _typical_distance(corpus, matrix, generator)
        rules = [] if hasattr(self, "bandwidths_") else self._allowed_rules()[0]
        kernels = self._kernels()
        pairs = self._pairs() if not rules else [(kernel, 0.1 * scale) for kernel in kernels for _ in rules]
        rate = self._probe(
            matrix,
            pairs,
            seconds,
            neighbors=k,
            by_group=by_group,
            own=own,
            exclude_within=exclude_within,
            tables=True,
        )
        bandwidth_seconds = 0.0
        if wanted := sum(rule.kind != "number" for rule in rules):
            sample = matrix[: min(len(matrix), RULE_QUERIES)]
            part = None if own is None else np.ascontiguousarray(own[: len(sample)])
            grid = [(kernels[0], float(h)) for h in scale * COARSE_GRID]
            coarse = 1 / self._probe(sample, grid, seconds / 2, own=part, exclude_within=exclude_within)
            few = min(1 / rate, coarse)
            # A fine grid of 7 around each target, and a last look at what was found, lie between the two.
            fine = few + (coarse - few) * min(1.0, 7 * wanted / len(grid))
            each = self._rule_sample(rules, own is not None) * len(sample)
            bandwidth_seconds = len(kernels) * each * (coarse + fine + few)
        lengths = _lmd3.segments(self._source())
        per_pair = 2.0 * corpus.d
        size = corpus.d * _ELEMENT_BYTES.get(corpus.dtype, 4) + (4 if corpus.dtype == "int8" else 0)
        groups = self._groups_of_segments(lengths) if by_group else len(lengths)
        # Three numbers per group and kernel; row and distance of each neighbour; cosine, count.
        sums, found = groups * len(pairs) * 24, len(lengths) * (k * 16 + 8)
        scan_seconds = float(corpus.n) * len(matrix) / rate
        return {
            "rows": corpus.n,
            "queries": len(matrix),
            "dimensions": corpus.d,
            "segments": len(lengths),
            "bytes": corpus.n * size,
            "passes": 1,
            "operations": per_pair * corpus.n * len(matrix),
            "operations_per_second": per_pair * rate,
            "bandwidth_seconds": bandwidth_seconds,
            "scan_seconds": scan_seconds,
            "seconds": bandwidth_seconds + scan_seconds,
            "partial_bytes": len(matrix) * (sums + found) + len(lengths) * corpus.d * 8,
            "simd": _lmd3.simd_level(),
            "threads": self.threads or cores(),
        }

    # --- inside ---

    def _probe(
        self, queries: NDArray[np.float32], kernels: list[tuple[str, float]], seconds: float, **options: Any
    ) -> float:
        """Pairs of rows and queries per second, by scanning for about so long."""

        class Enough(Exception):
            pass

        started = time.perf_counter()
        reached = [(started, 0)]

        def report(done: int, total: int) -> None:
            now = time.perf_counter()
            if done > reached[-1][1]:
                reached.append((now, done))
            # At least two looks at work that has begun, else a few blocks decide.
            if now - started > seconds and len(reached) > 2:
                raise Enough

        def drop(part: Part) -> None:
            pass

        source = self._source()
        total = self.store_.n * len(queries)
        try:
            _lmd3.scan_parts(
                source,
                queries,
                kernels,
                0,
                len(_lmd3.segments(source)),
                drop,
                **self._options(**options),
                progress=report,
            )
        except Enough:
            # From the first look on: packing the queries is not part of the rate.
            (first, before), (last, done) = reached[1], reached[-1]
            return (done - before) / (last - first)
        return total / max(time.perf_counter() - started, 1e-9)

    def _groups_of_segments(self, lengths: Sequence[int]) -> int:
        """The number of groups present in each segment, summed."""
        codes = self.store_.group_codes()
        if codes is None:
            return len(lengths)
        ends = np.cumsum(lengths)
        return sum(
            len(np.unique(codes[end - n : end])) for n, end in zip(lengths, ends.tolist(), strict=True)
        )

    def _kernels(self) -> list[str]:
        kernels = [self.kernel] if isinstance(self.kernel, str) else list(self.kernel)
        if not kernels:
            raise ParameterError("no kernel given")
        for kernel in kernels:
            if kernel not in KERNELS:
                raise unknown_kernel(kernel)
        if len(set(kernels)) < len(kernels):
            raise ParameterError("a kernel was given twice")
        return kernels

    def _rules(self) -> tuple[list[Rule] | list[Bandwidth], bool]:
        """The parsed rules (or the content of a file), and whether they are the default grid."""
        given = self.bandwidth
        rules = (
            [given]
            if isinstance(given, (str, float, int)) or not isinstance(given, Sequence)
            else list(given)
        )
        if not rules:
            raise ParameterError("no bandwidth given")
        files = [rule for rule in rules if isinstance(rule, str) and rule.startswith("@")]
        if files:
            if len(rules) > 1:
                raise ParameterError("a file of bandwidths stands alone: it is the whole set")
            resolved = read_bandwidths(files[0][1:])
            for entry in resolved:
                if entry.kernel not in KERNELS:
                    raise unknown_kernel(entry.kernel)
            return resolved, False
        parsed = [parse_rule(rule) for rule in rules]
        if len({rule.text for rule in parsed}) < len(parsed):
            raise ParameterError("a bandwidth was given twice")
        return parsed, tuple(rules) == DEFAULT_RULES

    def _keep(self, bandwidths: list[Bandwidth]) -> None:
        self.bandwidths_ = bandwidths
        self.bandwidth_ = bandwidths[0].bandwidth

    def _pairs(self) -> list[tuple[str, float]]:
        return [(entry.kernel, entry.bandwidth) for entry in self.bandwidths_]

    def _check_fitted(self) -> None:
        if not hasattr(self, "store_"):
            raise ParameterError("not fitted", remedy="call fit(corpus) first")

    def _query_matrix(self, store: Store) -> NDArray[np.float32]:
        """All queries as float32 (Q, d)."""
        self._check_fitted()
        if store.d != self.store_.d:
            raise ShapeError(f"queries have {store.d} dimensions, the corpus has {self.store_.d}")
        _check_same_encoder(self.store_, store)
        if store.array is not None and store.array.dtype == np.float32:
            return store.array
        if store.n * store.d * 4 <= self.max_memory // 4:
            return store.rows(np.arange(store.n))
        # Beyond a quarter of the memory allowed they lie in a file that the page cache holds.
        with tempfile.TemporaryFile() as file:
            spooled = np.memmap(file, np.float32, "w+", shape=(store.n, store.d))
        for start in range(0, store.n, _STEP):
            end = min(start + _STEP, store.n)
            spooled[start:end] = store.rows(np.arange(start, end))
        return np.asarray(spooled)

    def _precision(self) -> str:
        """The arithmetic that is used: it follows the rows' type, never the CPU."""
        if self.precision != "auto":
            return self.precision
        return "int16" if self.store_.dtype == "int8" else "float32"

    def _own_rows(self, queries: Store, matrix: NDArray[np.float32]) -> NDArray[np.int64]:
        """Row of the corpus that each query is, by id; −1 for none. Vectors must agree."""
        corpus = self.store_
        own = np.full(queries.n, -1, dtype=np.int64)
        same = queries is corpus or (queries.path is not None and queries.path == corpus.path)
        if same:
            own = np.arange(corpus.n, dtype=np.int64)
        else:
            wanted = {identifier: row for row, identifier in enumerate(queries.ids())}
            step = 1 << 16
            for start in range(0, corpus.n, step):
                rows = np.arange(start, min(start + step, corpus.n))
                for row, identifier in zip(rows, corpus.ids(rows), strict=True):
                    if identifier in wanted:
                        own[wanted[identifier]] = row
        found = np.flatnonzero(own >= 0)
        if len(found) == 0:
            raise JoinError("no query has the id of a row of the corpus", remedy="leave --exclude-self out")
        for start in range(0, len(found), 4096):
            part = found[start : start + 4096]
            vectors = matrix[part].astype(np.float64)
            distance = np.linalg.norm(vectors - corpus.rows(own[part]), axis=1)
            allowed = max(1e-3, 2 * corpus.rounding) * np.linalg.norm(vectors, axis=1)
            # A zero row equals itself.
            other = (distance >= allowed) & (distance > 0)
            if other.any():
                bad = int(part[np.flatnonzero(other)[0]])
                name = queries.ids(np.array([bad]))[0]
                raise JoinError(
                    f"query {name!r} has the id of row {own[bad]} of the corpus but another vector",
                    row=bad,
                    remedy="these ids name different things: leave --exclude-self out, or give other ids",
                )
        return own

    def _scan(
        self,
        queries: NDArray[np.float32],
        kernels: list[tuple[str, float]],
        *,
        neighbors: int = 0,
        by_group: bool = False,
        own: NDArray[np.int64] | None = None,
        exclude_within: float = 0.0,
        tables: bool = False,
        progress: ProgressFactory = silent,
        label: str = "density",
    ) -> _lmd3.Scan:
        with progress(label, float(self.store_.n) * len(queries), "pairs") as bar:
            return _lmd3.scan(
                self._source(),
                queries,
                kernels,
                **self._options(neighbors, by_group, own, exclude_within, tables),
                progress=lambda done, total: bar.update(float(done)),
            )

    def _source(self) -> Any:
        store = self.store_
        return store.array if store.native is None else store.native

    def _options(
        self,
        neighbors: int = 0,
        by_group: bool = False,
        own: NDArray[np.int64] | None = None,
        exclude_within: float = 0.0,
        tables: bool = False,
    ) -> dict[str, Any]:
        """The arguments of the native scan beside rows, queries and kernels."""
        return {
            "neighbors": neighbors,
            "by_group": by_group,
            "exclude_rows": own,
            "exclude_within": exclude_within,
            "row_rounding": self.store_.rounding,
            "precision": self._precision(),
            "max_cosine": tables,
            "row_sum": tables,
            "weights": self._weights,
            "threads": self.threads or 0,
            "memory": max(1, self.max_memory // 2),
        }

    def _asked(
        self, queries: Store, k: int, by_group: bool, own: NDArray[np.int64] | None, exclude_within: float
    ) -> dict[str, Any]:
        """Everything that the bytes of a job's sums depend on, but for what bandwidth rules come to."""
        if hasattr(self, "bandwidths_"):
            chosen: dict[str, Any] = {
                "bandwidths": [[b.kernel, b.bandwidth, b.rule] for b in self.bandwidths_]
            }
        else:
            rules = [rule.text for rule in self._rules()[0] if isinstance(rule, Rule)]
            chosen = {"kernels": self._kernels(), "bandwidths": rules, "seed": self.seed}
        return {
            "store": self.store_.fingerprint,
            "queries": queries.fingerprint,
            **chosen,
            "neighbors": k,
            "by_group": by_group,
            "exclude_self": None if own is None else xxh3(own.tobytes()),
            "exclude_within": exclude_within,
            "weights": None if self._weights is None else xxh3(self._weights.tobytes()),
            "precision": self._precision(),
            "rounding": self.store_.rounding,
            "simd": _lmd3.simd_level(),
        }

    def _scan_in_parts(
        self,
        queries: NDArray[np.float32],
        folder: Path,
        asked: dict[str, Any],
        options: dict[str, Any],
        notice: Callable[[str], None],
        progress: ProgressFactory,
    ) -> _lmd3.Scan:
        """The scan whose finished segments are kept in files, less the segments that are there already."""
        source = self._source()
        rows = _lmd3.segments(source)
        pairs = self._pairs()
        configuration = {**asked, "kernels": pairs, "segments": len(rows), "query_count": len(queries)}
        partials = Partials(folder, configuration, len(rows), len(queries), notice)
        missing = partials.missing()
        left = sum(sum(rows[start:end]) for start, end in missing)
        if left < self.store_.n:
            notice(f"continued: {self.store_.n - left:,} of {self.store_.n:,} rows were done before")
        before = 0
        with progress("density", float(left) * len(queries), "pairs") as bar:
            for start, end in missing:

                def report(done: int, total: int, before: int = before) -> None:
                    bar.update(float(before + done))

                with partials.writer() as writer:
                    _lmd3.scan_parts(
                        source,
                        queries,
                        pairs,
                        start,
                        end,
                        writer.add,
                        **self._options(**options),
                        progress=report,
                    )
                before += sum(rows[start:end]) * len(queries)
        fold = _lmd3.Fold(len(queries), len(pairs), options["neighbors"], _lmd3.simd_level())
        for part in partials.parts():
            fold.add(part)
        if fold.next != (len(rows), 0):
            raise VerificationError("partial files went missing during the work", file=str(folder))
        return fold.finish()

    def _resolve(
        self,
        queries: NDArray[np.float32],
        own: NDArray[np.int64] | None,
        progress: ProgressFactory,
        exclude_within: float = 0.0,
    ) -> None:
        """Resolves rules where that has not happened yet."""
        if hasattr(self, "bandwidths_"):
            return
        kernels = self._kernels()
        rules, self.notices_ = self._allowed_rules()
        generator = np.random.default_rng(self.seed)
        chosen = np.arange(len(queries))
        if len(queries) > RULE_QUERIES:
            chosen = np.sort(generator.choice(len(queries), RULE_QUERIES, replace=False))
        sample = np.ascontiguousarray(queries[chosen])
        own_sample = None if own is None else np.ascontiguousarray(own[chosen])
        estimator, share = self._rule_rows(rules, generator, own is not None)
        scale = _typical_distance(estimator.store_, sample, generator)
        resolved = []
        for kernel in kernels:

            def evaluate(
                grid: Sequence[float], kernel: str = kernel
            ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
                scan = estimator._scan(
                    sample,
                    [(kernel, float(h)) for h in grid],
                    own=own_sample,
                    exclude_within=exclude_within,
                    progress=progress,
                    label="bandwidth",
                )
                return scan.total.log_sum, scan.total.ess

            # ‖x − q‖₁ is about √(2d/π) times the Euclidean distance.
            stretch = math.sqrt(2.0 * self.store_.d / math.pi) if kernel == "laplacian" else 1.0
            resolved += resolve(
                rules,
                kernel,
                evaluate,
                scale=stretch * scale,
                sampled_rows=estimator.store_.n,
                row_share=share,
                weight=None if self._weights is None else float(self._weights.sum(dtype=np.float64)),
            )
        self._keep(resolved)

    def _allowed_rules(self) -> tuple[list[Rule], list[str]]:
        """The rules that the corpus allows, and notices on those that were dropped."""
        parsed, defaults = self._rules()
        texts = [rule.text for rule in parsed if isinstance(rule, Rule)]
        return split_rules(texts, self._kernels(), self.store_.n, defaults=defaults)

    def _rule_rows(
        self, rules: Sequence[Rule], generator: np.random.Generator, all_rows: bool
    ) -> tuple[KernelDensity, float]:
        """An estimator over the rows that the rules look at, and their share of the corpus.

        As many rows as leave `RULE_EFFECTIVE` of the smallest target in the sample, at least `RULE_ROWS`,
        at most all.
        """
        store = self.store_
        rows = self._rule_sample(rules, all_rows)
        if rows == store.n:
            return self, 1.0
        chosen = np.sort(generator.choice(store.n, rows, replace=False))
        sample = KernelDensity(threads=self.threads, max_memory=self.max_memory, precision=self.precision)
        sample.store_ = open_store(store.rows(chosen))
        sample._weights = None
        return sample, rows / store.n

    def _rule_sample(self, rules: Sequence[Rule], all_rows: bool) -> int:
        """How many rows the rules look at."""
        store = self.store_
        # A density of mu is a kernel sum of mu times the rows.
        targets = [r.value * (store.n if r.kind == "mu" else 1) for r in rules if r.kind != "number"]
        smallest = min(targets, default=1.0)
        rows = max(RULE_ROWS, math.ceil(store.n * RULE_EFFECTIVE / smallest))
        # A gathered sample must fit the memory allowed; weights and left-out rows need the whole.
        if all_rows or self._weights is not None or rows * store.d * 4 > self.max_memory:
            return store.n
        return min(rows, store.n)

    def _run(self, queries: Store, scan: _lmd3.Scan, table: DensityTable) -> dict[str, Any]:
        store = self.store_
        return {
            "kind": "density",
            "version": _lmd3.__version__,
            "kernels": self._kernels(),
            "bandwidths": [entry.to_dict() for entry in self.bandwidths_],
            "store": _describe(store),
            "queries": _describe(queries),
            "method": "exact",
            "precision": self._precision(),
            "simd": scan.level,
            "notices": list(self.notices_),
            "rows": scan.rows,
            "zero_densities": int(np.isneginf(table.density["log_density"].to_numpy()).sum()),
        }


def _describe(store: Store) -> dict[str, Any]:
    return {
        "path": None if store.path is None else str(store.path),
        "fingerprint": store.fingerprint,
        "n": store.n,
        "d": store.d,
        "dtype": store.dtype,
        "normalised": store.normalised,
        "groups": list(store.groups),
        "encoder": store.encoder,
    }


def _check_same_encoder(corpus: Store, queries: Store) -> None:
    """Refuses queries that another model (or another state of it) has encoded.

    Raises:
        ModelError: both sides name their encoder and the names differ.
    """
    if corpus.encoder is None or queries.encoder is None:
        return
    for key in ("kind", "model", "revision", "prompt", "dim", "fingerprint"):
        mine, other = corpus.encoder.get(key), queries.encoder.get(key)
        if key in corpus.encoder and key in queries.encoder and mine != other:
            raise ModelError(
                f"queries were encoded otherwise than the corpus: {key} {other!r}, not {mine!r}",
                file=None if queries.path is None else str(queries.path),
                remedy="encode the queries with the corpus's own model: give their texts to lmd3 density",
            )


def _typical_distance(store: Store, queries: NDArray[np.float32], generator: np.random.Generator) -> float:
    """Root mean squared distance of sampled queries and rows: the scale on which bandwidths are searched."""
    rows = store.rows(np.sort(generator.choice(store.n, min(store.n, 512), replace=False))).astype(np.float64)
    some = queries[:256].astype(np.float64)
    squared = (rows**2).sum(1).mean() + (some**2).sum(1).mean() - 2.0 * float(rows.mean(0) @ some.mean(0))
    return math.sqrt(max(squared, 1e-12)) or 1.0


class _Tables:
    """Turns a scan into the columns of the tables."""

    def __init__(
        self, kde: KernelDensity, queries: Store, matrix: NDArray[np.float32], scan: _lmd3.Scan
    ) -> None:
        self.kde = kde
        self.corpus = kde.store_
        self.scan = scan
        self.ids = queries.ids()
        self.matrix = matrix
        self.norms = _by_steps(lambda rows: np.linalg.norm(rows, axis=1), matrix)
        self.rows = scan.neighbor_rows
        self.distances = scan.neighbor_distances

    def density(self, by_group: bool, normalize: bool) -> pa.Table:
        parts: list[tuple[str | None, _lmd3.Estimate]] = [(None, self.scan.total)]
        if by_group:
            parts += [(self.corpus.groups[code], part) for code, part in sorted(self.scan.groups.items())]
        tables = []
        for b, bandwidth in enumerate(self.kde.bandwidths_):
            constant = (
                log_normalizer(bandwidth.kernel, self.corpus.d, bandwidth.bandwidth) if normalize else 0.0
            )
            for group, estimate in parts:
                q = len(self.ids)
                log_density = estimate.log_density[:, b] - constant
                columns = {
                    "id": pa.array(self.ids, pa.string()),
                    "kernel": _constant(bandwidth.kernel, q),
                    "bandwidth": _constant(bandwidth.bandwidth, q),
                    "rule": _constant(bandwidth.rule, q),
                    "group": pa.array([group] * q, pa.string()),
                    "log_density": log_density,
                    "std_error": np.zeros(q),
                    "ci_low": log_density,
                    "ci_high": log_density,
                    "kernel_sum_log": estimate.log_sum[:, b],
                    "ess": estimate.ess[:, b],
                    "rows_evaluated": np.int64(estimate.rows) - estimate.excluded.astype(np.int64),
                    "method": _constant("exact", q),
                    "precision": _constant(
                        self.kde._precision() if bandwidth.kernel in FUSED else "float64", q
                    ),
                    "flags": pa.array(np.where(np.isneginf(log_density), "zero", "").tolist(), pa.string()),
                }
                tables.append(pa.table(columns, schema=DENSITY))
        return pa.concat_tables(tables)

    def queries(self) -> pa.Table:
        mean = self.scan.row_sum
        mean_norm = float(np.linalg.norm(mean))
        with np.errstate(divide="ignore", invalid="ignore"):
            # einsum: the same bytes for any number of threads, unlike a matrix product.
            dots = _by_steps(lambda rows: np.einsum("ij,j->i", rows, mean), self.matrix)
            typicality = dots / (self.norms * mean_norm)
            max_cosine = np.minimum(self.scan.max_projection.astype(np.float64) / self.norms, 1.0)
        nearest = self.rows[:, 0]
        columns = {
            "id": pa.array(self.ids, pa.string()),
            "max_cosine": _nullable(max_cosine),
            "typicality": _nullable(typicality),
            "nearest_id": self._names(nearest),
            "nearest_distance": _nullable(self.distances[:, 0]),
            "kth_distance": _nullable(self.distances[:, -1]),
            "local_dimension": _nullable(local_dimension(self.distances)),
            "duplicates": self.scan.duplicates.astype(np.int64),
            "excluded": self.scan.total.excluded.astype(np.int64),
        }
        return pa.table(columns, schema=QUERIES)

    def neighbors(self, k: int) -> pa.Table:
        k = min(k, self.rows.shape[1])
        rows, distances = self.rows[:, :k], self.distances[:, :k]
        present = rows >= 0
        flat, query = rows[present], np.repeat(np.arange(len(rows)), k).reshape(rows.shape)[present]
        cosine, exponent = np.empty(len(flat)), np.empty(len(flat))
        primary = self.kde.bandwidths_[0]
        for start in range(0, len(flat), 1 << 14):
            part = slice(start, start + (1 << 14))
            vectors = self.corpus.rows(flat[part]).astype(np.float64)
            own = self.matrix[query[part]].astype(np.float64)
            exponent[part] = log_kernel(
                primary.kernel, primary.bandwidth, distances[present][part], vectors, own
            )
            with np.errstate(divide="ignore", invalid="ignore"):
                dots = np.einsum("ij,ij->i", vectors, own)
                cosine[part] = dots / (np.linalg.norm(vectors, axis=1) * self.norms[query[part]])
        with np.errstate(invalid="ignore"):
            # NaN, so null, where the density is zero.
            share = self._weights(flat) * np.exp(exponent - self.scan.total.log_sum[query, 0])
        rank = np.tile(np.arange(1, k + 1, dtype=np.int32), (len(rows), 1))[present]
        columns = {
            "id": pa.array(self.ids, pa.string()).take(pa.array(query)),
            "rank": rank,
            "neighbor_id": self._names(flat),
            "neighbor_group": self._groups(flat),
            "distance": distances[present],
            "cosine": _nullable(cosine),
            "share": _nullable(share),
        }
        return pa.table(columns, schema=NEIGHBORS)

    def _names(self, rows: NDArray[np.int64]) -> pa.Array:
        """Ids of rows, null where the row is −1."""
        chunks = []
        for start in range(0, max(1, len(rows)), _STEP):  # lists of strings are large
            part = rows[start : start + _STEP]
            present = np.flatnonzero(part >= 0)
            names: list[str | None] = [None] * len(part)
            for at, name in zip(present, self.corpus.ids(part[present]), strict=True):
                names[at] = name
            chunks.append(pa.array(names, pa.string()))
        return pa.concat_arrays(chunks)

    def _groups(self, rows: NDArray[np.int64]) -> pa.Array:
        codes = self.corpus.group_codes()
        if codes is None or not self.corpus.groups:
            return pa.nulls(len(rows), pa.string())
        return pa.array(self.corpus.groups, pa.string()).take(pa.array(codes[rows]))

    def _weights(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        weights = self.corpus.weights() if self.kde._weights is None else self.kde._weights
        return np.ones(len(rows)) if weights is None else weights[rows].astype(np.float64)


def local_dimension(distances: NDArray[np.float64]) -> NDArray[np.float64]:
    """Local intrinsic dimension by Hill's estimator from the k nearest distances (Q, k), ascending.

    −[mean log(r_i/r_k)]⁻¹ over r_i > 1e-6, i < k; NaN where fewer than two distances remain or all are equal.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(distances > 1e-6, np.log(distances / distances[:, -1:]), np.nan)[:, :-1]
        counts = np.isfinite(ratios).sum(axis=1)
        means = np.nansum(ratios, axis=1) / counts
        return np.where((counts > 0) & (means < 0), -1.0 / means, np.nan)


def _by_steps(
    function: Callable[[NDArray[np.float64]], NDArray[np.float64]], rows: NDArray[np.float32]
) -> NDArray[np.float64]:
    """A value per row, computed in double precision a few rows at a time."""
    steps = [
        function(rows[start : start + _STEP // 8].astype(np.float64))
        for start in range(0, len(rows), _STEP // 8)
    ]
    return np.concatenate(steps) if steps else np.empty(0)


def _constant(value: str | float, n: int) -> pa.Array:
    return pa.repeat(value, n)


def _nullable(values: NDArray[np.float64]) -> pa.Array:
    """Floats with null for what is not finite."""
    return pa.array(values, mask=~np.isfinite(values))
