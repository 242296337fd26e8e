"""faiss Flat search, k = 10: exact neighbours and no sums, so a floor. `knn` is Flat over rows in place."""

from __future__ import annotations

import faiss
import numpy as np
from numpy.typing import NDArray

from peers import Variant

METRICS = {"L2": faiss.METRIC_L2, "inner product": faiss.METRIC_INNER_PRODUCT}


def version() -> str:
    return f"faiss {faiss.__version__}"


class Flat:
    limit = (None, None)

    def __init__(self, rows: NDArray[np.float32], threads: int, h: float) -> None:
        faiss.omp_set_num_threads(threads)
        self.rows = rows

    def variants(self, quick: bool) -> list[Variant]:
        # Block sizes (queries, rows) of faiss's product with a BLAS; its own are the first.
        blocks = ((4096, 1024),) if quick else ((4096, 1024), (1024, 1024), (1024, 4096), (256, 1024))
        return [{"metric": metric, "blocks": pair} for metric in METRICS for pair in blocks]

    def log_sums(self, queries: NDArray[np.float32], variant: Variant, n: int) -> None:
        faiss.cvar.distance_compute_blas_query_bs, faiss.cvar.distance_compute_blas_database_bs = variant[
            "blocks"
        ]
        faiss.knn(queries, self.rows[:n], 10, metric=METRICS[variant["metric"]])


make = Flat
