"""The index of a store: rows in lists of near ones, for nearest rows and for estimates of kernel sums.

An index is a folder beside the store that can always be built again. It belongs to the store by its
fingerprint: once the store has been appended to, converted or encoded anew it is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmd3 import _lmd3
from lmd3.errors import DtypeError, OutputError, ParameterError, ShapeError, StaleIndexError, WorkError
from lmd3.executors import Executor
from lmd3.progress import ProgressFactory, silent
from lmd3.store import Store, open_store

__all__ = ["FaissNeighbors", "Index", "NeighborProvider", "UsearchNeighbors", "default_path"]

#: Element types of the copy of the rows.
DTYPES = ("float32", "float16", "int8")

#: The element type that keeps rows of another one bit for bit (bytes of 0 to 255 are exact in float16).
_EXACT = {"float16": "float16", "int8": "int8", "uint8": "float16"}

_STAGES = ("train", "assign", "spread", "gather", "measure")


class NeighborProvider(Protocol):
    """Whoever finds near rows: an `Index`, or another library behind an adapter."""

    def query(self, q: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Row numbers (Q, k) int64, −1 for none, and distances (Q, k) of near rows of queries (Q, d)."""


def default_path(store: Store) -> Path:
    """Where the index of a store is looked for: beside it, with `.index` appended to its name.

    Raises:
        ParameterError: a store in memory has no place.
    """
    if store.path is None:
        raise ParameterError("rows in memory have no place for an index", remedy="name its folder")
    return store.path.with_name(store.path.name + ".index")


class Index:
    """An open index.

    Args:
        path: its folder.
        store: the store that it must belong to; its rows then rank neighbours and give the distances. Without
            it the copy in the index does.

    Attributes:
        path: its folder.
        store: as given.
        manifest: what `index.json` says.
        native: the native index.

    Raises:
        FileMissingError, FormatError, VerificationError: not there, damaged, of another version.
        StaleIndexError: of another store, or of this one before it was changed.
    """

    def __init__(self, path: str | Path, store: Store | None = None) -> None:
        self.path = Path(path)
        self.native = _lmd3.Index(self.path)
        self.manifest: dict[str, Any] = json.loads(self.native.manifest)
        self.store = store
        if store is not None:
            self.check(store)

    def check(self, store: Store) -> None:
        """Refuses a store that this is not the index of.

        Raises:
            StaleIndexError: another store.
        """
        if self.manifest["store"] != store.fingerprint:
            raise StaleIndexError(
                "the index is of other rows: the store was changed since, or is another one",
                file=str(self.path),
                remedy="build it again: lmd3 index STORE --force",
            )

    @classmethod
    def build(
        cls,
        store: str | Path | Store | NDArray[Any],
        path: str | Path | None = None,
        *,
        lists: int | None = None,
        dtype: str | None = None,
        seed: int = 0,
        threads: int | None = None,
        max_memory: int = 1_500_000_000,
        force: bool = False,
        executor: Executor | None = None,
        notice: Callable[[str], None] | None = None,
        progress: ProgressFactory | None = None,
    ) -> Index:
        """Builds the index of a store, or continues a build that was killed.

        Args:
            store: the rows.
            path: the folder to make; by default beside the store (`default_path`).
            lists: number of lists; by default √(2n).
            dtype: element type of its copy of the rows: "float32", "float16" or "int8"; by default that of
                the store (float32 for bfloat16), so that the copy holds the store's very numbers. A smaller
                type takes half or a quarter of the space; what it rounds enters the standard errors.
            seed: seed of all draws.
            threads: None takes all cores.
            max_memory: bytes to hold to beside the page cache.
            force: replace an index that is there.
            executor: where rows are assigned to their lists, which is most of the work [in this process];
                the bytes do not depend on it. Other than here it needs a store and a place that all workers
                see under the same paths.
            notice: takes lines on what was damaged and what ran where.
            progress: shows progress.

        Raises:
            OutputError: an index is there already, or the place can't be written.
            NotFiniteError: a row with NaN or infinity.
            DtypeError, ParameterError: options out of range.
            WorkError: tasks of the executor failed; each is named.
        """
        options = (lists, dtype, seed, threads, max_memory, force)
        opened, target = _check_build(store, path, dtype, lists, force)
        if not _build(
            opened, target, *options, executor=executor, pause=False, notice=notice, progress=progress
        ):
            raise WorkError("the build stopped where rows are to be assigned", file=str(target))
        return cls(target, opened)

    @classmethod
    def prepare(
        cls,
        store: str | Path | Store | NDArray[Any],
        path: str | Path | None = None,
        *,
        lists: int | None = None,
        dtype: str | None = None,
        seed: int = 0,
        threads: int | None = None,
        max_memory: int = 1_500_000_000,
        force: bool = False,
        notice: Callable[[str], None] | None = None,
        progress: ProgressFactory | None = None,
    ) -> Index | None:
        """As `build`, but stops where rows are to be assigned to lists (after the training on a sample, and
        where lists had to be split): `lmd3.index_lists.assign_shard` does that on as many machines as there
        are. The same call goes on when all have ended.

        Returns:
            The index, or None where rows are to be assigned.
        """
        options = (lists, dtype, seed, threads, max_memory, force)
        opened, target = _check_build(store, path, dtype, lists, force)
        done = _build(opened, target, *options, executor=None, pause=True, notice=notice, progress=progress)
        return cls(target, opened) if done else None

    @property
    def n(self) -> int:
        """Rows."""
        return int(self.manifest["n"])

    @property
    def d(self) -> int:
        """Dimensions."""
        return int(self.manifest["d"])

    @property
    def lists(self) -> int:
        """Number of lists."""
        return int(self.manifest["lists"])

    @property
    def probes(self) -> int:
        """Lists that are looked in by default: they held .96 of the 10 nearest rows in a trial on the rows
        themselves."""
        return int(self.manifest["probes"])

    @property
    def mean(self) -> NDArray[np.float64]:
        """The mean row, (d,) float64."""
        weights = self.native.moments[:, 0]
        mean: NDArray[np.float64] = weights @ self.native.means.astype(np.float64) / weights.sum()
        return mean

    def __repr__(self) -> str:
        return f"<Index {self.path}: {self.n:,} × {self.d} in {self.lists:,} lists>"

    def verify(self) -> None:
        """Checks all checksums.

        Raises:
            VerificationError: names the first damaged file.
        """
        self.native.verify()

    def kneighbors(
        self,
        queries: ArrayLike,
        n_neighbors: int = 10,
        *,
        probes: int | None = None,
        rerank: bool = True,
        threads: int | None = None,
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Near rows of queries (Q, d): distances (Q, k) float64 and row numbers (Q, k) int64, nearest first;
        NaN and −1 where the lists looked in hold fewer.

        Candidates are ranked again in double precision: by the finer copy that the store keeps
        (`Store.exact`), or by its own rows, where it keeps none or with `rerank=False`. Recall depends on
        `probes`, the lists looked in.

        Raises:
            ParameterError: no neighbours or no probes asked for.
            ShapeError: other dimensions than the rows.
        """
        matrix = self._matrix(queries)
        probes = self.probes if probes is None else probes
        if n_neighbors < 1 or probes < 1:
            raise ParameterError(f"n_neighbors={n_neighbors} and probes={probes} must be 1 or more")
        rows, distances = self.native.search(
            matrix, min(n_neighbors, self.n), probes, self._source(rerank), threads=threads or 0
        )
        return distances, rows

    def query(self, q: ArrayLike, k: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """`kneighbors` as a `NeighborProvider` of densities, which are those of the rows as stored."""
        distances, rows = self.kneighbors(q, k, rerank=False)
        return rows, distances

    def _matrix(self, queries: ArrayLike) -> NDArray[np.float32]:
        matrix = np.ascontiguousarray(queries, dtype=np.float32)
        if matrix.ndim != 2 or matrix.shape[1] != self.d:
            raise ShapeError(f"queries of shape {matrix.shape} for rows of {self.d} dimensions")
        return matrix

    def _source(self, rerank: bool) -> Any:
        if self.store is None:
            return None
        if rerank and (exact := self.store.exact) is not None:
            return exact.native
        return self.store.array if self.store.native is None else self.store.native

    def stage(
        self,
        queries: NDArray[np.float32],
        keys: NDArray[np.uint64],
        kernels: Sequence[tuple[str, float]],
        rows: NDArray[np.uint64],
        *,
        own: NDArray[np.int64] | None = None,
        aims: NDArray[np.float64] | None = None,
        whole_cost: float = 1.0,
        target: float = 0.01,
        by_group: bool = False,
        group_map: NDArray[np.uint32] | None = None,
        seed: int = 0,
        stage: int = 1,
        threads: int | None = None,
    ) -> dict[str, NDArray[Any]]:
        """One stage of stratified sampling (the estimator behind `KernelDensity(method="stratified")`).

        Args:
            queries: (Q, d).
            keys: (Q,): draws depend on a query's key, the seed and the stage alone (`draw_keys`).
            kernels: (name, h), the primary one first; exponential or gaussian.
            rows: (Q,) rows to read for each query, centroids not counted, in rows drawn at random.
            own: (Q,) row of the store to leave out, −1 for none.
            aims: (Q,) logarithm of a variance of the primary sum: no more rows are read than bring what the
                index predicts of it down to that; None: as many as `rows` say.
            whole_cost: what a row of a list read whole costs, in rows drawn, above 0: 1 where rows are
                counted, less where time is.
            target: wanted relative error of a sum: the sampled part may rest on few rows where it is smaller.
            by_group: sums of each group of rows too.
            group_map: with `by_group`, the group from 0 that each of the store's codes counts to, uint32; by
                default every code is a group of its own.
            seed: seed of the draws.
            stage: number of the stage: each draws anew.
            threads: None takes all cores.

        Returns:
            `log_sum`, `variance` (of the log sum), `df`, `ess`, `flags` (Q, B); with groups the same with
            `group_` before their names (Q, G, B); the part of the variance that the index `predicted` (Q, B);
            `rows` read, random `draws` and the weight `excluded` (Q,).
        """
        groups = None
        if by_group:
            codes = int(self.manifest["groups"])
            if codes == 0:
                raise ParameterError("the rows have no groups")
            groups = np.arange(codes, dtype=np.uint32) if group_map is None else group_map
        return self.native.stage(
            queries,
            keys,
            list(kernels),
            rows,
            own=own,
            aims=aims,
            whole_cost=whole_cost,
            target=target,
            group_map=groups,
            group_count=0 if groups is None else int(groups.max()) + 1,
            seed=seed,
            stage=stage,
            threads=threads or 0,
        )


def _check_build(
    store: str | Path | Store | NDArray[Any],
    path: str | Path | None,
    dtype: str | None,
    lists: int | None,
    force: bool,
) -> tuple[Store, Path]:
    """The store and the place of its index, refused before work where they can't be."""
    opened = open_store(store)
    target = default_path(opened) if path is None else Path(path)
    if dtype is not None and dtype not in DTYPES:
        raise DtypeError(f"an index keeps no {dtype} copy", remedy=f"choose {' or '.join(DTYPES)}")
    if lists is not None and lists < 1:
        raise ParameterError(f"an index has at least one list, not {lists}")
    if target.exists():
        if not force:
            raise OutputError("exists already", file=str(target), remedy="give --force to build it anew")
        if target.is_dir() and not (target / "index.json").exists() and any(target.iterdir()):
            raise OutputError("is no index: it is not replaced", file=str(target))
    elif not target.absolute().parent.is_dir():
        raise OutputError("its folder does not exist", file=str(target))
    return opened, target


def _build(
    store: Store,
    target: Path,
    lists: int | None,
    dtype: str | None,
    seed: int,
    threads: int | None,
    max_memory: int,
    force: bool,
    *,
    executor: Executor | None,
    pause: bool,
    notice: Callable[[str], None] | None,
    progress: ProgressFactory | None,
) -> bool:
    """Builds, or goes on; False where it stopped because rows are to be assigned."""
    from lmd3.executors.local import LocalExecutor
    from lmd3.index_lists import Lists

    elsewhere = executor is not None and not executor.in_process
    if elsewhere and store.path is None:
        raise ParameterError("workers elsewhere need a store in a file", remedy="save the rows first")
    source = store.array if store.native is None else store.native
    assert source is not None
    while True:
        waiting = Lists.open(store, target, notice or (lambda line: None))
        # Without an executor what other processes have begun is ended here.
        if waiting is not None and (elsewhere or waiting.begun) and not (pause and waiting.missing()):
            waiting.assign(executor or LocalExecutor(threads), progress or silent)
            waiting.join()
        # Assignment, spreading and gathering each see every row; training and the trials are short.
        with (progress or silent)("index", 3.0 * store.n, "rows") as bar:
            done = _lmd3.build_index(
                source,
                target,
                fingerprint=store.fingerprint,
                lists=lists or 0,
                dtype=dtype or _EXACT.get(store.dtype, "float32"),
                seed=seed,
                groups=len(store.groups),
                threads=threads or 0,
                memory=max_memory,
                pause=pause or elsewhere,
                progress=lambda stage, rows: bar.update(
                    float(min(max(stage - 1, 0), 3) * store.n + (rows if 1 <= stage <= 3 else 0))
                ),
            )
        if done or pause:
            return done


def route_rows(
    store: Store, partial: Path, start: int, end: int, threads: int | None = None
) -> NDArray[np.uint64]:
    """The routes of rows [start, end) of a store by the tree of an unfinished build, (end − start,) uint64:
    the centroid, and in the upper half the bits of the squared distance to it in single precision."""
    source = store.array if store.native is None else store.native
    assert source is not None
    return _lmd3.route_rows(source, partial, start, end, threads or 0)


def draw_keys(ids: Sequence[str]) -> NDArray[np.uint64]:
    """What the draws of a query depend on: a hash of its id, (Q,) uint64."""
    return _lmd3.draw_keys(list(ids))


def sample_rows(
    store: Store,
    queries: NDArray[np.float32],
    keys: NDArray[np.uint64],
    kernels: Sequence[tuple[str, float]],
    rows: int,
    *,
    near: NDArray[np.int64] | None = None,
    permuted: bool = False,
    moments: tuple[NDArray[np.float64], float] | None = None,
    weights: NDArray[np.float32] | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> dict[str, NDArray[Any]]:
    """Kernel sums from random rows of a store: plain, with the control variate, or by DEANN.

    Args:
        store: the rows.
        queries, keys, kernels, seed, threads: as in `Index.stage`.
        rows: random rows per query.
        near: (Q, k) rows of near neighbours, −1 for none: DEANN with them.
        permuted: the store's rows lie in random order, so one run of them is a random sample.
        moments: mean row (d,) and mean squared norm of all rows: use the control variate that they allow.
        weights: (n,) weights of an array's rows.

    Returns:
        As `Index.stage`, without groups.
    """
    source = store.array if store.native is None else store.native
    assert source is not None
    mean, sq_norm = moments if moments is not None else (None, 0.0)
    return _lmd3.sample_rows(
        source,
        queries,
        keys,
        list(kernels),
        rows,
        near=near,
        permuted=permuted,
        mean=mean,
        sq_norm=sq_norm,
        weights=weights,
        seed=seed,
        threads=threads or 0,
    )


def neighbor_sums(
    distances: NDArray[np.float64],
    kernels: Sequence[tuple[str, float]],
    weights: NDArray[np.float32] | None = None,
) -> dict[str, NDArray[Any]]:
    """Kernel sums over neighbours alone (distances (Q, k), NaN for none): a lower bound without an error."""
    return _lmd3.neighbor_sums(np.ascontiguousarray(distances), list(kernels), weights)


class FaissNeighbors:
    """A faiss index (of squared Euclidean distances) as a `NeighborProvider`.

    Args:
        index: a trained and filled `faiss.Index` of metric L2 whose ids are row numbers of the store.
    """

    def __init__(self, index: Any) -> None:
        self.index = index

    def query(self, q: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Rows and distances of near rows."""
        squared, rows = self.index.search(np.ascontiguousarray(q, np.float32), k)
        return rows.astype(np.int64), np.sqrt(np.maximum(squared, 0.0)).astype(np.float64)


class UsearchNeighbors:
    """A usearch index (of squared Euclidean distances) as a `NeighborProvider`.

    Args:
        index: a filled `usearch.index.Index` of metric "l2sq" whose keys are row numbers of the store.
    """

    def __init__(self, index: Any) -> None:
        self.index = index

    def query(self, q: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Rows and distances of near rows."""
        found = self.index.search(np.ascontiguousarray(q, np.float32), k)
        rows = np.atleast_2d(np.asarray(found.keys)).astype(np.int64)
        squared = np.atleast_2d(np.asarray(found.distances)).astype(np.float64)
        return rows, np.sqrt(np.maximum(squared, 0.0))


def describe(index: Index) -> dict[str, Any]:
    """What `lmd3 index` reports."""
    sizes = index.native.sizes
    size = sum(file["bytes"] for file in index.manifest["files"])
    return {
        "index": str(index.path),
        "rows": index.n,
        "dimensions": index.d,
        "lists": index.lists,
        "largest_list": int(sizes.max()),
        "dtype": index.manifest["dtype"],
        "bytes": size,
        "group_moments": bool(index.manifest["group_moments"]),
        "probes": index.probes,
        "recall": round(float(index.manifest["recall"]), 4),
        "seconds": round(float(index.manifest["seconds"]), 1),
    }


def remove_unfinished(path: str | Path) -> None:
    """Removes what a killed build left, so that the next one starts anew."""
    path = Path(path)
    shutil.rmtree(path.with_name(path.name + ".partial"), ignore_errors=True)
