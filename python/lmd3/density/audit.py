"""The audit of an estimate: some queries scored exactly in any case show how good its standard errors are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmd3.density.estimated_sums import Sums
from lmd3.density.methods import AUDIT
from lmd3.density.scan import Pair, Scan

#: Ratio of the errors met in the audit to the standard errors: above the first these are widened, above the
#: second the method is given up, unless the errors met, and the widened standard errors, are so far within
#: the tolerance (shares of it, root mean squares) that it holds all the same.
WIDEN, GIVE_UP = 1.2, 2.0
WITHIN, WIDENED_WITHIN = 0.5, 1.25

#: Flag of estimates whose method the audit would have given up.
FAILED = 1 << 8

#: Error of the arithmetic in a log density, by the type of the rows that are read: no standard error is below
#: it. (What the copy in the index rounds is in the variance of a stage.)
ARITHMETIC = {"int8": 2e-4}
ARITHMETIC_FLOAT = 2e-5

#: Error of D² relative to ‖x‖² + ‖q‖², and the share of these below which D² is taken in double precision.
ARITHMETIC_SQ = {"int8": (5e-6, 0.1)}
ARITHMETIC_SQ_FLOAT = (1.5e-7, 0.02)


def audited(q: int, seed: int) -> NDArray[np.bool_]:
    """Which of Q queries are scored exactly to judge the others."""
    count = min(q, min(max(q // 32, AUDIT[0]), AUDIT[1]))
    chosen = np.zeros(q, bool)
    chosen[np.random.default_rng([seed, 31]).choice(q, count, replace=False)] = True
    return chosen


def arithmetic(
    queries: NDArray[np.float32], pairs: Sequence[Pair], dtype: str, sq_norm: float | None
) -> NDArray[np.float64]:
    """Error of the arithmetic in each log sum, (Q, B): what one of D² does to the kernel's logarithm.

    Args:
        queries: (Q, d).
        pairs: kernels with bandwidths.
        dtype: of the rows that are read.
        sq_norm: mean ‖x‖² of the rows; that of each query where it is not known.
    """
    least = ARITHMETIC.get(dtype, ARITHMETIC_FLOAT)
    error, near = ARITHMETIC_SQ.get(dtype, ARITHMETIC_SQ_FLOAT)
    own = (queries.astype(np.float64) ** 2).sum(axis=1)
    norms = own + (own if sq_norm is None else sq_norm)
    each = [
        error * norms / (2 * h * h) if kernel == "gaussian" else error * np.sqrt(norms / near) / (2 * h)
        for kernel, h in pairs
    ]
    errors: NDArray[np.float64] = np.maximum(least, np.stack(each, axis=1))
    return errors


def judge(
    judged: NDArray[np.int64],
    exact: NDArray[np.bool_],
    scan: Scan,
    sums: Sums,
    floor: NDArray[np.float64],
    target: float,
    facts: dict[str, Any],
    notice: Callable[[str], None],
) -> bool:
    """Compares the audited queries' estimates with their exact sums, and widens the standard errors by what
    that shows; whether the estimates are to be given up for exact sums of all queries.

    Args:
        judged: the audited queries that have an estimate.
        exact: (Q,) which queries were scored exactly.
        scan: of these, in their order.
        sums: the estimates, whose variances are changed.
        floor: (Q, B) variances that the arithmetic brings.
        target: the standard error aimed at.
        facts: takes the `audit`.
        notice: is told where estimates are given up.
    """
    sums.variance += floor
    if sums.groups is not None:
        sums.groups.variance += floor[:, None]
    if len(judged) < 3:
        facts["audit"] = {"ratio": None, "widened": False, "given_up": len(judged) == 0}
        # Without any nothing vouches for what is left.
        return len(judged) == 0 and not exact.all()
    within = np.cumsum(exact) - 1
    error = sums.log_sum[judged] - scan.total.log_sum[within[judged]]
    with np.errstate(invalid="ignore"):
        ratio = np.sqrt(np.mean(error**2 / sums.variance[judged], axis=0))
        met = np.sqrt(np.mean(error**2, axis=0))
    ratio, met = (np.where(np.isfinite(values), values, np.inf) for values in (ratio, met))
    widened = ratio * np.sqrt(np.mean(sums.variance[~exact], axis=0)) if not exact.all() else 0 * ratio
    failed = (ratio > GIVE_UP) & ~((met <= WITHIN * target) & (widened <= WIDENED_WITHIN * target))
    facts["audit"] = {
        "ratio": [float(r) if math.isfinite(r) else None for r in ratio],
        "error": [float(e) if math.isfinite(e) else None for e in met],
        "widened": bool(ratio[0] > WIDEN),
        "given_up": bool(failed[0]),
    }
    if failed[0] and not exact.all():
        notice(
            f"the estimates were given up: in {len(judged)} queries scored exactly their errors were "
            f"{ratio[0]:.1f} times their standard errors; all queries are scored exactly"
        )
        return True
    factor = np.where(ratio > WIDEN, np.minimum(ratio, 1e3), 1.0) ** 2
    sums.variance *= factor
    if sums.groups is not None:
        sums.groups.variance *= factor
    # At another bandwidth what was given up is marked only.
    sums.flags[:, failed] |= np.uint32(FAILED)
    return False
