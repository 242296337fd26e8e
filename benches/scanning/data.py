"""Rows on disk in each format, the sums over them in float64, and queries."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lmd3 import _lmd3
from lmd3.store import StoreWriter, open_store

CENTRES = 256
#: Rows of one block of the reference.
BLOCK = 1 << 14


@dataclass
class Corpus:
    """A source of rows on disk."""

    path: Path
    n: int
    d: int
    #: Bytes of one row that a scan reads.
    row_bytes: int
    native: _lmd3.Store = field(init=False)

    def __post_init__(self) -> None:
        native = open_store(self.path).native
        assert native is not None
        self.native = native

    def reference(self, queries: NDArray[np.float32], bandwidths: list[float]) -> NDArray[np.float64]:
        """log Σ exp(−‖x − q‖ / h) over the rows as stored, in float64: (Q, B)."""
        wide = queries.astype(np.float64)
        own = np.einsum("qd,qd->q", wide, wide)
        sums = np.zeros((len(queries), len(bandwidths)))
        for start in range(0, self.n, BLOCK):
            rows = self.native.read_rows(np.arange(start, min(start + BLOCK, self.n))).astype(np.float64)
            squares = np.einsum("nd,nd->n", rows, rows)[:, None] + own - 2 * rows @ wide.T
            distances = np.sqrt(np.maximum(squares, 0))
            for index, h in enumerate(bandwidths):
                sums[:, index] += np.exp(-distances / h).sum(axis=0)
        return np.log(sums)


class Vectors:
    """Unit vectors around the same centres, for rows and queries of one dimension."""

    def __init__(self, d: int, seed: int) -> None:
        self.d = d
        self.rng = np.random.default_rng([seed, d])
        self.centres = np.random.default_rng(d).standard_normal((CENTRES, d), dtype=np.float32)

    def draw(self, count: int) -> NDArray[np.float32]:
        rows = self.rng.standard_normal((count, self.d), dtype=np.float32)
        rows += self.centres[self.rng.integers(CENTRES, size=count)]
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return rows


def write_float32(folder: Path, n: int, d: int) -> Corpus:
    """A bare `.npy` file."""
    path = folder / f"float32-{d}.npy"
    rows = np.lib.format.open_memmap(path, "w+", np.float32, (n, d))
    vectors = Vectors(d, seed=1)
    for start in range(0, n, BLOCK):
        rows[start : start + BLOCK] = vectors.draw(min(BLOCK, n - start))
    rows.flush()
    return Corpus(path, n, d, 4 * d)


def write_float16(folder: Path, source: Corpus) -> Corpus:
    path = folder / "float16.npy"
    rows = np.lib.format.open_memmap(path, "w+", np.float16, (source.n, source.d))
    for start in range(0, source.n, BLOCK):
        rows[start : start + BLOCK] = source.native.read_rows(np.arange(start, min(start + BLOCK, source.n)))
    rows.flush()
    return Corpus(path, source.n, source.d, 2 * source.d)


def write_store(path: Path, source: Corpus, dtype: str, groups: NDArray[np.int64] | None = None) -> Corpus:
    with StoreWriter(path, dtype=dtype) as writer:
        for start in range(0, source.n, BLOCK):
            numbers = np.arange(start, min(start + BLOCK, source.n))
            names = None if groups is None else [f"g{code}" for code in groups[numbers]]
            writer.append(source.native.read_rows(numbers), [str(number) for number in numbers], names)
        writer.close()
    # An int8 row has its scale and its sum beside it.
    row_bytes = source.d + 8 if dtype == "int8" else source.d * np.dtype(dtype).itemsize
    return Corpus(path, source.n, source.d, row_bytes)
