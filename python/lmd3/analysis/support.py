"""Is a query inside the training data's support? Conformal p-values of its log density.

Held-out training rows (or rows scored with themselves left out) are what a supported text looks like. The
p-value of a query is the share of them that are as sparse: (1 + #{calibration ≤ query}) / (1 + #calibration)
(Vovk et al. 2005; Bates et al. 2023). Under exchangeability it is at most α with probability α. Flags hold
the false-discovery rate (Benjamini and Hochberg) at α.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from statsmodels.stats.multitest import multipletests

from lmd3.errors import ParameterError

ALPHA = 0.05
#: Fewer calibration rows than this can't flag anything at α = .05.
LEAST = 20


@dataclass(frozen=True)
class Support:
    """Conformal p-values (n,) of queries, and which are flagged as unsupported."""

    p_value: np.ndarray
    unsupported: np.ndarray
    alpha: float
    calibration: int


def support(queries: np.ndarray, calibration: np.ndarray, alpha: float = ALPHA) -> Support:
    """Flags queries that are sparser than the training rows.

    Args:
        queries: (n,) log densities.
        calibration: (m,) log densities of training rows, each left out of its own density.
        alpha: false-discovery rate of the flags.

    Raises:
        ParameterError: fewer than 20 calibration rows; NaN.
    """
    if len(calibration) < LEAST:
        raise ParameterError(
            f"{len(calibration)} calibration rows are too few", remedy=f"take at least {LEAST}"
        )
    if np.isnan(calibration).any() or np.isnan(queries).any():
        raise ParameterError("NaN among the log densities")
    ordered = np.sort(calibration)
    p = (1 + np.searchsorted(ordered, queries, side="right")) / (1 + len(ordered))
    flagged = multipletests(p, alpha=alpha, method="fdr_bh")[0] if len(p) else np.zeros(0, dtype=bool)
    return Support(p, np.asarray(flagged, dtype=bool), alpha, len(ordered))
