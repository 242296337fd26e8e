"""Kernel density of a corpus at queries: scikit-learn's manners outside, the fused scan inside.

Kernels and their normalising constants are those of `lmd3.kernels`; densities are always computed in log
space. One subject a module: the two `sides` of the question, the native `scan`, bandwidth `rules`, the `job`
whose finished segments are kept, the `tables`, the `plan`, and the `estimator` in front of them. Where sums
are estimated: the `methods`, one stage of each (`estimation`), its `rounds` over ranges of queries, the
`stages` with their `audit`, and what they come to (`approximate`).
"""

from __future__ import annotations

from lmd3.density.estimator import KernelDensity
from lmd3.density.parameters import PRECISIONS
from lmd3.density.tables import local_dimension
from lmd3.kernels import log_normalizer

__all__ = ["PRECISIONS", "KernelDensity", "local_dimension", "log_normalizer"]
