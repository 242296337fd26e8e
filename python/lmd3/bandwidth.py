"""The choice of the bandwidth: rules, and their resolution to numbers once per job (method: bandwidth
decides what
"density" means, so every later scan must take the same number)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lmd3.errors import FormatError, ParameterError
from lmd3.results import read_json

#: What the command line takes where nothing is said; the first is the primary one.
DEFAULT_RULES = ("ess=1000", "ess=10", "ess=100", "ess=10000")

#: How near the median density of `mu=` must come to its target, relatively, and rounds that may take.
MU_TOLERANCE, MU_ROUNDS = 0.01, 12

#: A target of effective rows above this share of the corpus is no local density.
LARGEST_SHARE = 0.25

#: Where bandwidths are looked for first, relative to the typical distance.
COARSE_GRID = np.geomspace(2e-3, 50.0, 36)

Evaluate = Callable[[Sequence[float]], tuple[NDArray[np.float64], NDArray[np.float64]]]


@dataclass(frozen=True)
class Rule:
    """How a bandwidth is found.

    Attributes:
        kind: "number" (h itself), "ess" (median effective sample size over the queries), "mass" (median
            kernel sum), "mu" (median density, the mean of the kernel over the rows: the rule of DEANN,
            arXiv 2107.02736), "loo" (largest leave-one-out likelihood of the corpus).
        value: the number or target; of "loo" the dimension of the likelihood, 0 for that of the rows.
        text: as the user wrote it.
    """

    kind: Literal["number", "ess", "mass", "mu", "loo"]
    value: float
    text: str


@dataclass(frozen=True)
class Bandwidth:
    """A bandwidth as it is used.

    Attributes:
        kernel: name of the kernel.
        bandwidth: h, in units of the distance between embeddings.
        rule: as asked for.
        achieved: median over the sampled queries of what the rule names; of `loo` the mean log density of
            rows left out; None for a number.
        achieved_low: lower end of its 95 % interval (order statistics over the sampled queries; for the mean
            by the normal).
        achieved_high: upper end.
        sampled_queries: queries the median was taken over, or rows left out.
        sampled_rows: rows it was taken over.
        curve: of `loo`: (h, mean log density, its standard error, median effective sample size), by h.
    """

    kernel: str
    bandwidth: float
    rule: str
    achieved: float | None = None
    achieved_low: float | None = None
    achieved_high: float | None = None
    sampled_queries: int | None = None
    sampled_rows: int | None = None
    curve: tuple[tuple[float, float, float, float], ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As `bandwidth.json` and `run.json` hold it."""
        found = asdict(self)
        if self.curve is None:
            del found["curve"]
        return found


def parse_rule(text: str | float) -> Rule:
    """The rule of `0.2`, `ess=1000`, `mass=10`, `mu=0.01`, `loo` or `loo=20`.

    Raises:
        ParameterError: not such a rule, or a number that is not finite and positive.
    """
    label = text if isinstance(text, str) else f"{float(text):.15g}"
    if label == "loo":
        return Rule("loo", 0.0, label)
    kind, _, value = label.partition("=") if "=" in label else ("number", "", label)
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if kind not in ("number", "ess", "mass", "mu", "loo") or not (math.isfinite(number) and number > 0):
        raise ParameterError(
            f"bandwidth {label!r} is no positive number, ess=N, mass=N, mu=X or loo",
            remedy="for example 0.1, ess=1000, mass=10, loo or @bandwidth.json",
        )
    if kind == "ess" and number <= 1:
        raise ParameterError(f"bandwidth {label!r}: an effective sample size is above 1")
    if kind == "mu" and number >= 1:
        raise ParameterError(f"bandwidth {label!r}: a median density of kernels of height 1 is below 1")
    return Rule(kind, number, label)  # type: ignore[arg-type]


def read_bandwidths(path: str | Path) -> list[Bandwidth]:
    """The resolved bandwidths of a `bandwidth.json`.

    Raises:
        FileMissingError, FormatError: not there, or not such a file.
    """
    path = Path(path)
    value = read_json(path)
    try:
        if value["format"] != 1:
            raise FormatError(f"bandwidths of format {value['format']}, not 1", file=str(path))
        known = Bandwidth.__dataclass_fields__
        found = [
            Bandwidth(**{key: entry[key] for key in entry if key in known}) for entry in value["bandwidths"]
        ]
        for entry in found:
            parse_rule(float(entry.bandwidth))
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"not a file of bandwidths: {error}", file=str(path)) from None
    if not found:
        raise FormatError("no bandwidths in it", file=str(path))
    return found


def split_rules(
    rules: Sequence[str | float], kernels: Sequence[str], rows: int, *, defaults: bool
) -> tuple[list[Rule], list[str]]:
    """The rules that this corpus allows, and notices of what was dropped.

    Args:
        rules: as asked for.
        kernels: names of the kernels (for messages).
        rows: rows of the corpus.
        defaults: whether the rules are the default grid, of which too large targets are dropped; asked for
        by name
            they are refused.

    Raises:
        ParameterError: a target above a quarter of the rows was asked for, or none remains.
    """
    parsed = [parse_rule(rule) for rule in rules]
    largest = rows * LARGEST_SHARE
    large = [rule for rule in parsed if rule.kind == "ess" and rule.value > largest]
    if not large:
        return parsed, []
    if not defaults:
        raise ParameterError(
            f"bandwidth {large[0].text}: a quarter of the corpus's {rows} rows is {largest:g}; wider kernels "
            "have no local meaning",
            remedy=f"give ess={math.floor(largest)} or less, or a number"
            if largest >= 2
            else "give a number",
        )
    kept = [rule for rule in parsed if rule not in large]
    if not kept:
        raise ParameterError(
            f"the corpus has {rows} rows: too few for the default bandwidths",
            remedy="give --bandwidth a number",
        )
    dropped = ", ".join(rule.text for rule in large)
    primary = max(kept, key=lambda rule: rule.value)
    notice = f"{dropped} dropped: more than a quarter of the corpus's {rows} rows; primary: "
    if parsed[0] in large:
        kept = [primary, *(rule for rule in kept if rule is not primary)]
    return kept, [notice + kept[0].text]


def resolve(
    rules: Sequence[Rule],
    kernel: str,
    evaluate: Evaluate,
    *,
    scale: float,
    sampled_rows: int,
    row_share: float = 1.0,
    mass_share: float | None = None,
    weight: float | None = None,
) -> list[Bandwidth]:
    """Turns rules into numbers.

    The median over the sampled queries of the effective sample size (or of the kernel sum) grows with h; it
    is computed on a wide grid, on a fine grid around each target, and interpolated in log-log; a last
    evaluation at the bandwidths found gives the value achieved. `mu` is refined until it is within 1 %.

    Args:
        rules: the rules.
        kernel: name of the kernel.
        evaluate: bandwidths (B,) → (log kernel sums (Q, B), effective sample sizes (Q, B)) over the sampled
        rows.
        scale: a typical distance between a query and a row.
        sampled_rows: rows of the sample.
        row_share: share of the corpus's rows in the sample: effective sizes are divided by it.
        mass_share: share of the corpus's weight in the sample: sums are divided by it; None: as `row_share`.
        weight: weight of the sampled rows, of which a density is the kernel sum's share; None where each
            weighs 1.

    Raises:
        ParameterError: a target that no bandwidth reaches.
    """
    wanted = [rule for rule in rules if rule.kind != "number"]
    solved: dict[Rule, Bandwidth] = {}
    if wanted:
        coarse = scale * COARSE_GRID
        total = sampled_rows if weight is None else weight
        mass_share = row_share if mass_share is None else mass_share
        tables = _medians(evaluate, coarse, row_share, mass_share, total)
        brackets = {rule: _bracket(coarse, tables[rule.kind], rule) for rule in wanted}
        fine = np.unique(np.concatenate([np.geomspace(low, high, 7) for low, high in brackets.values()]))
        tables = _medians(evaluate, fine, row_share, mass_share, total)
        found = [_interpolate(fine, tables[rule.kind], rule) for rule in wanted]
        found = [
            _refine(evaluate, fine, tables["mu"], rule, total) if rule.kind == "mu" else h
            for rule, h in zip(wanted, found, strict=True)
        ]
        log_sums, ess = evaluate(found)
        for column, (rule, h) in enumerate(zip(wanted, found, strict=True)):
            if rule.kind == "ess":
                values = ess[:, column] / row_share
            else:
                values = np.exp(log_sums[:, column]) / (mass_share if rule.kind == "mass" else total)
            low, middle, high = _median_interval(values)
            solved[rule] = Bandwidth(kernel, h, rule.text, middle, low, high, len(values), sampled_rows)
    return [
        Bandwidth(kernel, rule.value, rule.text) if rule.kind == "number" else solved[rule] for rule in rules
    ]


def _medians(
    evaluate: Evaluate, grid: NDArray[np.float64], row_share: float, mass_share: float, total: float
) -> dict[str, NDArray[np.float64]]:
    """Logarithms of the medians of the quantities at each h."""
    log_sums, ess = evaluate([float(h) for h in grid])
    with np.errstate(divide="ignore"):
        return {
            "ess": np.log(np.median(ess, axis=0) / row_share),
            "mass": np.median(log_sums, axis=0) - math.log(mass_share),
            "mu": _log_median(log_sums) - math.log(total),
        }


def _log_median(log_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logarithm of the median of exp(values) (Q, B) over Q: between two middle values the mean is of exp."""
    ordered = np.sort(log_values, axis=0)
    n = len(ordered)
    middle: NDArray[np.float64] = np.logaddexp(ordered[(n - 1) // 2], ordered[n // 2]) - math.log(2.0)
    return middle


def _refine(
    evaluate: Evaluate,
    grid: NDArray[np.float64],
    values: NDArray[np.float64],
    rule: Rule,
    total: float,
) -> float:
    """The h whose median density is within 1 % of the target: finer grids around it until it is met.

    Raises:
        ParameterError: the median steps over the target, as it does for the tophat kernel and few rows.
    """
    for _ in range(MU_ROUNDS):
        low, high = _bracket(grid, values, rule)
        guess = _interpolate(grid, values, rule)
        grid = np.unique([*np.geomspace(low, high, 7), guess])
        medians = _medians(evaluate, grid, 1.0, 1.0, total)["mu"]
        nearest = int(np.argmin(np.abs(medians - math.log(rule.value))))
        if abs(math.exp(medians[nearest]) / rule.value - 1.0) <= MU_TOLERANCE:
            return float(grid[nearest])
        values = medians
    raise ParameterError(
        f"bandwidth {rule.text}: the median density steps over it; the nearest is "
        f"{math.exp(values[nearest]):.4g}",
        remedy="ask for another target, or take a kernel without an edge",
    )


def _bracket(grid: NDArray[np.float64], values: NDArray[np.float64], rule: Rule) -> tuple[float, float]:
    target = math.log(rule.value)
    above = np.flatnonzero(values >= target)
    if len(above) == 0 or above[0] == 0:
        reached = math.exp(values[-1]) if len(above) == 0 else math.exp(values[0])
        raise ParameterError(
            f"bandwidth {rule.text}: no bandwidth reaches it; the median of the sampled queries "
            f"{'never exceeds' if len(above) == 0 else 'is never below'} {reached:.4g}",
            remedy="ask for another target, or look for repeated texts (near-copies set a floor)",
        )
    return float(grid[above[0] - 1]), float(grid[above[0]])


def _interpolate(grid: NDArray[np.float64], values: NDArray[np.float64], rule: Rule) -> float:
    target = math.log(rule.value)
    at = int(np.flatnonzero(values >= target)[0])
    if at == 0:
        return float(grid[0])
    if values[at - 1] == -math.inf:
        # The sum of a compact kernel sets in between the two.
        return float(grid[at])
    share = (target - values[at - 1]) / (values[at] - values[at - 1])
    return float(grid[at - 1] * (grid[at] / grid[at - 1]) ** share)


def _median_interval(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """A median with its 95 % interval by order statistics (normal approximation to the binomial)."""
    ordered = np.sort(values)
    n = len(ordered)
    half = 0.98 * math.sqrt(n)
    low = ordered[max(0, math.floor(n / 2 - half))]
    high = ordered[min(n - 1, math.ceil(n / 2 + half))]
    return float(low), float(np.median(ordered)), float(high)
