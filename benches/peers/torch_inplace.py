"""torch in place: one matrix product into a buffer per block of rows, everything after it in that buffer."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from numpy.typing import NDArray

from peers import SLACK, Variant


def version() -> str:
    return f"torch {torch.__version__}"


def as_tensor(array: NDArray[np.float32]) -> torch.Tensor:
    """A tensor over the same memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mapped rows can't be written, and nothing here does
        return torch.from_numpy(array)


class InPlace:
    limit = (None, None)

    def __init__(self, rows: NDArray[np.float32], threads: int, h: float) -> None:
        torch.set_num_threads(threads)
        self.rows, self.h = as_tensor(rows), h

    def variants(self, quick: bool) -> list[Variant]:
        return [
            {"rows": rows, "queries": queries}
            for rows in ((1024,) if quick else (512, 1024, 2048, 4096, 16384))
            for queries in ((256,) if quick else (128, 256, 1024))
        ]

    @torch.inference_mode()
    def log_sums(self, queries: NDArray[np.float32], variant: Variant, n: int) -> NDArray[np.float64]:
        r, q = variant["rows"], variant["queries"]
        constant = (2 + SLACK) / self.h**2
        scaled = torch.from_numpy(queries).T * (-2 / self.h**2)
        parts = [scaled[:, start : start + q].contiguous() for start in range(0, len(queries), q)]
        buffer = torch.empty(r * q)
        sums = torch.zeros(len(queries), dtype=torch.float64)
        for start in range(0, n, r):
            rows = self.rows[start : min(start + r, n)]
            for index, part in enumerate(parts):
                tile = buffer[: len(rows) * part.shape[1]].view(len(rows), part.shape[1])
                torch.mm(rows, part, out=tile)
                sums[index * q : (index + 1) * q] += tile.add_(constant).sqrt_().neg_().exp_().sum(0)
        return sums.log().numpy()


make = InPlace
