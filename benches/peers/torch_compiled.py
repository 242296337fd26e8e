"""torch.compile: product, kernel and sum of a block of rows as one compiled function."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from peers import SLACK, Variant
from peers.torch_inplace import as_tensor, version

__all__ = ["make", "version"]


class Compiled:
    limit = (None, None)

    def __init__(self, rows: NDArray[np.float32], threads: int, h: float) -> None:
        torch.set_num_threads(threads)
        # Every tile size is a shape of its own.
        torch._dynamo.config.cache_size_limit = 64
        self.rows, self.h = as_tensor(rows), h
        self.constant = (2 + SLACK) / h**2
        self.compiled: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {}

    def block(self, rows: torch.Tensor, scaled: torch.Tensor) -> torch.Tensor:
        return torch.exp(-torch.sqrt(rows @ scaled + self.constant)).sum(0)

    def variants(self, quick: bool) -> list[Variant]:
        if quick:
            return [{"rows": 4096, "queries": 1024, "mode": "default"}]
        return [
            {"rows": rows, "queries": queries, "mode": mode}
            for mode in ("default", "max-autotune-no-cudagraphs")
            for rows in (1024, 4096, 16384)
            for queries in (128, 1024)
        ]

    @torch.inference_mode()
    def log_sums(self, queries: NDArray[np.float32], variant: Variant, n: int) -> NDArray[np.float64]:
        r, q, mode = variant["rows"], variant["queries"], variant["mode"]
        if mode not in self.compiled:
            self.compiled[mode] = torch.compile(self.block, mode=mode, dynamic=False, fullgraph=True)
        compiled = self.compiled[mode]
        scaled = torch.from_numpy(queries).T * (-2 / self.h**2)
        parts = [scaled[:, start : start + q].contiguous() for start in range(0, len(queries), q)]
        sums = torch.zeros(len(queries), dtype=torch.float64)
        for start in range(0, n, r):
            rows = self.rows[start : min(start + r, n)]
            # The last rows are fewer: not worth a compilation.
            block = compiled if len(rows) == r else self.block
            for index, part in enumerate(parts):
                sums[index * q : (index + 1) * q] += block(rows, part)
        return sums.log().numpy()


make = Compiled
