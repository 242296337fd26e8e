"""The methods that densities can be computed by, which of them a job can take, and how exact it must be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lmd3.density.design_error import design_of
from lmd3.density.groups import group_slots
from lmd3.density.scan import Asked, Pair, Scanner
from lmd3.errors import ParameterError
from lmd3.index import Index

#: What densities can be computed by; "auto" takes what costs least.
METHODS = ("exact", "auto", "stratified", "sample", "deann", "knn")

#: Kernels whose sums can be estimated.
ESTIMATED = ("exponential", "gaussian")

#: Rows of the pilot, and the fewest of the main stage.
PILOT, FEWEST = 600, 300

#: A row drawn costs so many times one that a scan reads: beyond n over this all rows are read.
DRAW_COST = 20

#: A row of a list read whole costs so much of one drawn: it is converted once for all queries, meets them in
#: panels and follows the row before it in memory.
WHOLE_COST = 1 / 16

#: Rows of a store that is always summed over by "auto".
SMALL = 300_000

#: Queries scored exactly to judge the standard errors: at least, and at most.
AUDIT = (32, 64)

#: Estimates of groups' sums that are held in memory at most (40 bytes each).
GROUP_SUMS = 50_000_000


@dataclass(frozen=True)
class Tolerance:
    """How exact an estimate must be.

    Attributes:
        kind: "error" (relative standard error of a kernel sum, which is the standard error of a log density)
            or "reliability" (of the log density over the job's queries: 1 − mean SE²/variance).
        value: the number.
    """

    kind: str
    value: float


def parse_tolerance(text: str | float) -> Tolerance:
    """The tolerance of `.01` or `reliability=.99`.

    Raises:
        ParameterError: neither, or a number outside (0, 1).
    """
    label = str(text)
    kind, _, number = label.partition("=") if "=" in label else ("error", "", label)
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if kind not in ("error", "reliability") or not 0 < value < 1:
        raise ParameterError(
            f"tolerance {label!r} is no number between 0 and 1",
            remedy="give a relative error such as 0.01, or reliability=0.99",
        )
    return Tolerance(kind, value)


def choose(
    method: str, scanner: Scanner, index: Index | None, queries: int, pairs: Sequence[Pair], asked: Asked
) -> tuple[str, str | None]:
    """The method to take, and why it is the exact one where "auto" might have been another.

    Raises:
        ParameterError: a method by name that this job can't take.
    """
    if method == "exact":
        return method, None
    obstacles = []
    kernels = sorted({kernel for kernel, _ in pairs} - set(ESTIMATED))
    if kernels:
        obstacles.append(f"sums of the {', '.join(kernels)} kernel are not estimated")
    if design_of(scanner.store) is not None:
        obstacles.append("the rows are a sample, whose own error an estimate would leave out")
    if asked.exclude_within > 0:
        obstacles.append("rows left out by distance are known to a scan only")
    if method in ("sample", "deann", "knn") and (asked.by_group or asked.own is not None):
        obstacles.append(f"method {method!r} knows no groups and leaves no rows out")
    if method in ("auto", "stratified"):
        if index is None:
            obstacles.append("there is no index (lmd3 index STORE makes one)")
        elif scanner.weights is not None:
            obstacles.append("weights given beside the rows are not in the index")
        elif (
            asked.by_group
            and queries * len(group_slots(scanner.store, asked.groups)[1]) * len(pairs) > GROUP_SUMS
        ):
            obstacles.append("so many groups, queries and bandwidths have more estimates than fit in memory")
    if obstacles:
        if method != "auto":
            raise ParameterError(f"method {method!r}: {obstacles[0]}", remedy="take --method auto or exact")
        return "exact", obstacles[0]
    if method != "auto":
        return method, None
    assert index is not None
    n = scanner.store.n
    if n < SMALL:
        return "exact", None
    # In units of a row read by a scan. A list costs its centroid, its mean and a prediction per bandwidth.
    estimate = index.lists * (6 + 40 * len(pairs)) + DRAW_COST * (PILOT + 4 * n / index.lists + 2000)
    if queries * estimate + AUDIT[0] * n > 0.7 * n * queries:
        return "exact", None
    return "stratified", None
