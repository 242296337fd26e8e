"""scikit-learn's KernelDensity, one thread, float64, on few rows and queries."""

from __future__ import annotations

import numpy as np
import sklearn
from numpy.typing import NDArray
from sklearn.neighbors import KernelDensity

from peers import Variant


def version() -> str:
    return f"scikit-learn {sklearn.__version__}"


class Trees:
    limit = (20_000, 32)

    def __init__(self, rows: NDArray[np.float32], threads: int, h: float) -> None:
        self.rows, self.h = np.ascontiguousarray(rows[: self.limit[0]]), h
        self.fitted: dict[tuple[str, int], KernelDensity] = {}
        one = KernelDensity(bandwidth=h, kernel="exponential").fit(self.rows[:1])
        #: Log of the kernel's normalisation: its value at a single row.
        self.log_norm = float(one.score_samples(self.rows[:1])[0])

    def variants(self, quick: bool) -> list[Variant]:
        return [{"algorithm": name} for name in (("ball_tree",) if quick else ("ball_tree", "kd_tree"))]

    def log_sums(self, queries: NDArray[np.float32], variant: Variant, n: int) -> NDArray[np.float64]:
        # Kept: building the tree is not in the figure.
        key = (variant["algorithm"], n)
        if key not in self.fitted:
            model = KernelDensity(bandwidth=self.h, kernel="exponential", rtol=0, atol=0, **variant)
            self.fitted[key] = model.fit(self.rows[:n])
        return self.fitted[key].score_samples(queries) + np.log(n) - self.log_norm


make = Trees
