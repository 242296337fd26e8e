"""numpy in place: all queries at once against blocks of rows, threads left to the BLAS."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from peers import SLACK, Variant
from peers.numpy_tiled import sum_tile, version

__all__ = ["make", "version"]


class InPlace:
    limit = (None, None)

    def __init__(self, rows: NDArray[np.float32], threads: int, h: float) -> None:
        self.rows, self.h = rows, h
        self.limits = threadpool_limits(threads, user_api="blas")

    def variants(self, quick: bool) -> list[Variant]:
        return [{"rows": rows} for rows in ((4096,) if quick else (1024, 4096, 16384))]

    def log_sums(self, queries: NDArray[np.float32], variant: Variant, n: int) -> NDArray[np.float64]:
        block = variant["rows"]
        scaled = np.ascontiguousarray(queries.T) * np.float32(-2 / self.h**2)
        buffer = np.empty(block * len(queries), np.float32)
        sums = np.zeros(len(queries))
        for start in range(0, n, block):
            rows = self.rows[start : min(start + block, n)]
            sums += sum_tile(rows, scaled, (2 + SLACK) / self.h**2, buffer)
        return np.log(sums)


make = InPlace
