"""The native scan of a corpus: its arguments in one place, whole or by segments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lmd3 import _lmd3
from lmd3.density.groups import group_map
from lmd3.executors.partials import Part
from lmd3.progress import ProgressFactory, silent
from lmd3.store import Store
from lmd3.store.layout import ITEM_BYTES

#: The results of the native scan.
Scan: TypeAlias = _lmd3.Scan
Estimate: TypeAlias = _lmd3.Estimate

#: A kernel with its bandwidth.
Pair: TypeAlias = tuple[str, float]


@dataclass(frozen=True)
class Asked:
    """What is asked about the queries beside sums of kernels.

    Attributes:
        neighbors: nearest rows found per query.
        by_group: whether the sums of each group of rows are kept apart.
        groups: codes of those that are, the others being taken together; None: all.
        own: (Q,) row of the corpus to leave out for each query, −1 for none.
        exclude_within: leave out rows nearer than this.
        tables: whether the largest cosine and the mean row are found too.
    """

    neighbors: int = 0
    by_group: bool = False
    groups: tuple[int, ...] | None = None
    own: NDArray[np.int64] | None = None
    exclude_within: float = 0.0
    tables: bool = False


@dataclass(frozen=True)
class Scanner:
    """Scans a corpus.

    Attributes:
        store: the rows.
        weights: (n,) float32 weights of an array's rows; a store brings its own.
        precision: arithmetic of the dot products as asked for, or "auto".
        threads: None takes all cores.
        memory: bytes that sums in flight may take.
        io: how rows of files come: "mmap", or "pread", block by block. The sums are the same to the bit.
    """

    store: Store
    weights: NDArray[np.float32] | None
    precision: str
    threads: int | None
    memory: int
    io: str = "mmap"

    @property
    def arithmetic(self) -> str:
        """The arithmetic that is used: "auto" follows the rows' type, never the CPU."""
        if self.precision != "auto":
            return self.precision
        return "int16" if self.store.dtype == "int8" else "float32"

    @property
    def level(self) -> str:
        """The SIMD level that scans run at."""
        return _lmd3.simd_level()

    @property
    def row_bytes(self) -> int:
        """Bytes of a stored row."""
        scale = 4 if self.store.dtype == "int8" else 0
        return self.store.d * ITEM_BYTES[self.store.dtype] + scale

    def segments(self) -> list[int]:
        """Rows of each segment, in order."""
        return _lmd3.segments(self._source())

    def scan(
        self,
        queries: NDArray[np.float32],
        kernels: Sequence[Pair],
        asked: Asked | None = None,
        progress: ProgressFactory = silent,
        label: str = "density",
    ) -> Scan:
        """Sums over all rows."""
        with progress(label, float(self.store.n) * len(queries), "pairs") as bar:
            return _lmd3.scan(
                self._source(),
                queries,
                list(kernels),
                **self._options(asked or Asked()),
                progress=lambda done, total: bar.update(float(done)),
            )

    def scan_parts(
        self,
        queries: NDArray[np.float32],
        kernels: Sequence[Pair],
        start: int,
        end: int,
        sink: Callable[[Part], None],
        asked: Asked,
        report: Callable[[int, int], None],
    ) -> None:
        """Gives the parts of segments [start, end) to `sink`; see `_lmd3.scan_parts`."""
        _lmd3.scan_parts(
            self._source(),
            queries,
            list(kernels),
            start,
            end,
            sink,
            **self._options(asked),
            progress=report,
        )

    def _source(self) -> Any:
        return self.store.array if self.store.native is None else self.store.native

    def _options(self, asked: Asked) -> dict[str, Any]:
        """The arguments of the native scan beside rows, queries and kernels."""
        return {
            "neighbors": asked.neighbors,
            "by_group": asked.by_group,
            "group_map": None if asked.groups is None else group_map(self.store, asked.groups),
            "exclude_rows": asked.own,
            "exclude_within": asked.exclude_within,
            "row_rounding": self.store.rounding,
            "precision": self.arithmetic,
            "max_cosine": asked.tables,
            "row_sum": asked.tables,
            "weights": self.weights,
            "threads": self.threads or 0,
            "memory": max(1, self.memory // 2),
            "io": self.io,
        }


def fold(
    parts: Iterable[Part], queries: int, kernels: int, neighbors: int, level: str
) -> tuple[Scan, tuple[int, int]]:
    """The result of all parts in order, and the (segment, query) that would have come next."""
    folded = _lmd3.Fold(queries, kernels, neighbors, level)
    for part in parts:
        folded.add(part)
    after = folded.next
    return folded.finish(), after


def version() -> str:
    """The version of the native core."""
    return _lmd3.__version__
