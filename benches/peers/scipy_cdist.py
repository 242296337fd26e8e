"""scipy: cdist and logsumexp in blocks of rows, one thread, float64, on few queries."""

from __future__ import annotations

import numpy as np
import scipy
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from scipy.special import logsumexp

from peers import Variant


def version() -> str:
    return f"scipy {scipy.__version__}"


class Distances:
    limit = (50_000, 32)

    def __init__(self, rows: NDArray[np.float32], threads: int, h: float) -> None:
        self.rows, self.h = np.ascontiguousarray(rows[: self.limit[0]]), h

    def variants(self, quick: bool) -> list[Variant]:
        return [{"rows": rows} for rows in ((4096,) if quick else (1024, 4096, 16384))]

    def log_sums(self, queries: NDArray[np.float32], variant: Variant, n: int) -> NDArray[np.float64]:
        block = variant["rows"]
        parts = [
            logsumexp(cdist(queries, self.rows[start : min(start + block, n)]) / -self.h, axis=1)
            for start in range(0, n, block)
        ]
        return np.asarray(logsumexp(np.array(parts), axis=0))


make = Distances
