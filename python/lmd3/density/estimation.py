"""What is to be estimated, and what one stage of each method finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmd3.density.estimated_sums import Sums, empty
from lmd3.density.groups import group_slots
from lmd3.density.methods import WHOLE_COST, Tolerance, choose
from lmd3.density.nearest import nearest
from lmd3.density.scan import Asked, Pair, Scanner
from lmd3.errors import ParameterError
from lmd3.executors.partials import Part
from lmd3.index import Index, default_path, draw_keys, neighbor_sums, sample_rows
from lmd3.store import Store

#: Neighbours that DEANN sums exactly, and that the method knn sums alone.
NEAR = 100

#: Numbers of the rounds that are no stage to be joined: of the neighbours, and of more draws, once and again.
NEIGHBORS, MORE = 3, (4, 5)


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

    def stage(
        self,
        chosen: NDArray[np.int64],
        rows: NDArray[np.float64],
        stage: int,
        target: float,
        aims: NDArray[np.float64] | None = None,
    ) -> Sums:
        """Estimates of the chosen queries from about so many rows each, or from no more than bring the
        variance that the index predicts of the primary sum down to e^`aims`."""
        queries, keys = np.ascontiguousarray(self.queries[chosen]), self.keys[chosen]
        threads = self.scanner.threads
        if self.method == "stratified":
            assert self.index is not None
            # The nearest lists are read in any case.
            near = WHOLE_COST * 2.0 * self.index.n / self.index.lists
            own = None if self.asked.own is None else np.ascontiguousarray(self.asked.own[chosen])
            slots = None
            if self.asked.by_group:
                slots = group_slots(self.scanner.store, self.asked.groups)[0]
            found = self.index.stage(
                queries,
                keys,
                self.pairs,
                np.ceil(rows + near).astype(np.uint64),
                own=own,
                aims=aims,
                whole_cost=WHOLE_COST,
                target=target,
                by_group=self.asked.by_group,
                group_map=slots,
                seed=self.seed,
                stage=stage,
                threads=threads,
            )
            found["rows"] = found["rows"] + np.uint64(self.index.lists)
            return Sums.of(found, len(chosen), 0.0)
        store = self.scanner.store
        if self.method == "knn":
            near_rows, distances = self._provider().query(queries, min(NEAR, store.n))
            weights = store.weights()
            near_weights = None if weights is None else weights[np.maximum(near_rows, 0)]
            return Sums.of(neighbor_sums(distances, self.pairs, near_weights), len(chosen), NEAR)
        found_near = None
        if self.method == "deann":
            found_near = self._provider().query(queries, min(NEAR, store.n // 2))[0]
        moments = None
        if self.method == "sample" and self.index is not None:
            moments = (self.index.mean, float(self.index.manifest["sq_norm"]))
        parts: list[tuple[NDArray[np.int64], Sums]] = []
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
            parts.append((here, Sums.of(found, len(here), float(size) + (0 if found_near is None else NEAR))))
        whole = empty(len(chosen), len(self.pairs))
        for here, part in parts:
            whole.put(here, part)
        return whole

    def round(
        self,
        number: int,
        chosen: NDArray[np.int64],
        rows: NDArray[np.float64],
        target: float,
        aims: NDArray[np.float64] | None = None,
    ) -> Part:
        """What a round finds for the chosen queries, as a file keeps it (see `lmd3.density.rounds`)."""
        if number == NEIGHBORS:
            return self.near(chosen, int(rows[0]))
        return self.stage(chosen, rows, number, target, aims).part()

    def near(self, chosen: NDArray[np.int64], k: int) -> Part:
        """What the index finds near the chosen queries (see `lmd3.density.nearest`)."""
        assert self.index is not None
        queries = np.ascontiguousarray(self.queries[chosen])
        own = None if self.asked.own is None else self.asked.own[chosen]
        return nearest(self.index, self.scanner.store, queries, k, own, self.scanner.threads)

    def _provider(self) -> Any:
        provider = self.provider or self.index
        if provider is None:
            raise ParameterError(
                f"method {self.method!r} needs an index", remedy="build it: lmd3 index STORE"
            )
        return provider


def open_index(store: Store, path: str | Path | None = None) -> Index | None:
    """The index of a store, where there is one; by its path it must be there."""
    if path is not None:
        return Index(path, store)
    if store.path is None or not default_path(store).exists():
        return None
    return Index(default_path(store), store)


def estimation_of(
    method: str,
    tolerance: Tolerance,
    scanner: Scanner,
    index: Index | None,
    store: Store,
    queries: NDArray[np.float32],
    pairs: Sequence[Pair],
    asked: Asked,
    seed: int,
    notice: Callable[[str], None],
) -> Estimation | None:
    """What is to be estimated by a method as asked for, or None where all rows are to be read.

    Args:
        method: of `METHODS`.
        tolerance: how exact.
        scanner: of the corpus.
        index: of its store, where there is one.
        store: the queries.
        queries: their vectors (Q, d).
        pairs: kernels with bandwidths, the primary one first.
        asked: what is asked beside.
        seed: of the draws.
        notice: is told why "auto" reads all rows, where another reason than their number decides.

    Raises:
        ParameterError: a method by name that this job can't take.
    """
    chosen, reason = choose(method, scanner, index, len(queries), pairs, asked)
    if chosen == "exact":
        if reason is not None:
            notice(f"all rows are read: {reason}")
        return None
    keys = keys_of(store)
    automatic = method == "auto"
    return Estimation(scanner, index, chosen, tolerance, queries, keys, pairs, asked, seed, automatic)


def keys_of(queries: Store) -> NDArray[np.uint64]:
    """What the draws of each query depend on."""
    return draw_keys(queries.ids())
