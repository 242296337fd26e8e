"""The peers that `benches/scan.py` compares with, each in a file of its own and run in a process of its own.

Every peer computes log Σ exp(−‖x − q‖ / h) over unit rows x for each unit query q, so ‖x − q‖² = 2 − 2⟨x, q⟩;
faiss alone finds the ten nearest and sums nothing. A peer that takes square roots of 2 − 2⟨x, q⟩ in single
precision adds `SLACK` to it: cheaper than a maximum with 0, and without effect on sums at 1e-3.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

#: Added to 2 − 2⟨x, q⟩, which rounding may take below 0.
SLACK = 1e-6

#: One setting of a peer: what tuning chooses from.
Variant = dict[str, Any]


class Peer(Protocol):
    """Made from (rows, threads, h): `rows` is a mapped float32 (n, d)."""

    #: Rows and queries it is given at most: slow peers get less, and their speed is extrapolated.
    limit: tuple[int | None, int | None]

    def variants(self, quick: bool) -> list[Variant]:
        """Settings to try."""
        ...

    def log_sums(self, queries: NDArray[np.float32], variant: Variant, n: int) -> NDArray[np.float64] | None:
        """Log sums over the first n rows, (Q,); None from a peer that computes none."""
        ...
