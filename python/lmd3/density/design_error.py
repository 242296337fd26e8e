"""The standard error of a density under a sampled store (`lmd3.store.sampling`), and its interval.

**Standard error.** Strata g of N_g texts, of which n_g were drawn, f_g = n_g / N_g, row weights w = N_g /
n_g. With A_g = Σ w k and B_g = Σ (w k)² over the rows of g, the kernel sum Z = Σ A_g is unbiased, and
(Cochran, *Sampling Techniques*, 1977, eq. 5.13)

    var Z = Σ_g (1 − f_g) · n_g / (n_g − 1) · (B_g − A_g² / n_g),      std_error = √var Z / Z  (of log f).

The weights add up to the texts exactly, so the density's denominator has no error. The density of one group
under a sample that was not drawn by group is that of a domain: the same formula with the rows of the group
for n_g.

**Interval.** A kernel sum is a sum of few large terms, and its normal interval covers too little (87 % at 95
% nominal where 50 rows count). The interval is that of Fay and Feuer (*Statistics in Medicine* 16, 1997,
791–801) for a weighted sum of rare counts: with v = var Z / Z² and ω the weight, relative to Z, of a row
that may have been missed,

    low = v/2 · χ²₂/ᵥ(α/2),     high = (v + ω²) / (2 (1 + ω)) · χ²(1 − α/2) with 2 (1 + ω)² / (v + ω²)
    degrees.

ω is the kernel half-way between the nearest row drawn, at r₁, and where the nearest row of all is expected,
r₁ · f^(1/m), m the local dimension by the ten nearest: a choice by simulation on real text
(`docs/sampling.md` says where it covers and where it can't).

**Flags.** `few_effective_rows`: fewer than 30 in the sample, or a bandwidth at which the median query has
fewer than 60: then the rows that decide may not have been drawn at all, and no interval can know them.

`near_rows_missed`, for all densities at a bandwidth: where single near rows decide (copies, close
variants), a sample that lacks them looks smooth. But each of them is drawn with its inclusion probability, so
those that were drawn tell how many were not. The nearest row drawn, of weight w and share s of the sum, adds
κ = s / (w (1 − s)) to the sum without it; where κ is above that sum's standard error, missing the row would
have put the interval off by that much, and for each such query w − 1 others are expected whose row was
missed. Where these make more than a tenth of the queries the bandwidth is flagged. The count is that of the
queries at hand: few queries (fewer than some 10 w) can hide it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmd3.density.scan import Estimate, Scan
from lmd3.kernels import log_kernel
from lmd3.store import Store
from lmd3.store.sampling import SampleDesign, Stratum

__all__ = ["DesignError", "Doubt", "design_of"]

#: Nearest rows that the local dimension is taken from.
NEAREST = 10

_LEAST_EFFECTIVE = 30

#: Share of queries whose deciding row was missed, above which a bandwidth is flagged.
_MOST_MISSED = 0.10
_ALPHA = 0.05
_EUCLIDEAN = ("exponential", "gaussian", "vmf", "tophat", "epanechnikov", "linear")


def design_of(store: Store) -> SampleDesign | None:
    """The design that a store's rows were drawn by; None where they are all there is."""
    described = store.manifest.get("sampling")
    return None if described is None else SampleDesign.restore(described)


@dataclass(frozen=True)
class Doubt:
    """Of Q log densities: standard errors, and what to add to them for the ends of the interval, (Q,) each;
    whether too few rows count, and whether rows that decide are expected to be missed."""

    std_error: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    few: NDArray[np.bool_]
    missed: NDArray[np.bool_]

    @classmethod
    def none(cls, count: int) -> Doubt:
        """That of sums over all rows there are."""
        no = np.zeros(count, np.bool_)
        return cls(np.zeros(count), np.zeros(count), np.zeros(count), no, no)

    def flags(self, zero: NDArray[np.bool_]) -> list[str]:
        """The flags of each density, given which are zero."""
        names = ["", "few_effective_rows", "near_rows_missed", "few_effective_rows,near_rows_missed"]
        found = np.array(names)[self.few + 2 * self.missed]
        return [str(flag) for flag in np.where(zero, "zero", found)]


class DesignError:
    """Standard errors and intervals of the densities of a scan.

    Args:
        design: how the rows were drawn.
        scan: the sums; by group where the sample was drawn by group.
        groups: names of the store's groups.
        weights: (Q,) of the nearest row of each query; None: the largest of the design.
    """

    def __init__(
        self,
        design: SampleDesign,
        scan: Scan,
        groups: list[str],
        weights: NDArray[np.float64] | None = None,
    ) -> None:
        self._design = design
        self._scan = scan
        self._groups = groups
        r = scan.neighbor_distances
        with np.errstate(divide="ignore", invalid="ignore"):
            dimension = -1.0 / np.log(r / r[:, -1:])[:, :-1].mean(axis=1)
        shares = [s.sampled / s.texts for s in design.strata.values() if s.sampled < s.texts]
        share = min(shares, default=1.0)
        # Without a local dimension (copies, or too few neighbours) a missed row may be a copy of the query.
        known = np.isfinite(dimension) & (dimension > 0)
        shrink = np.where(known, share ** (1 / np.where(known, dimension, 1.0)), 0.0)
        self._unseen = r[:, 0] * (1 + shrink) / 2
        self._nearest = r[:, 0]
        largest = max((s.weight for s in design.strata.values()), default=1.0)
        self._nearest_weight = np.full(len(r), largest) if weights is None else weights.astype(np.float64)
        reduced = [s.weight * np.sqrt(1 - s.sampled / s.texts) for s in design.strata.values()]
        self._weight = max(reduced)

    def of(self, kernel: str, bandwidth: float, column: int, group: int | None = None) -> Doubt:
        """The doubt of the densities at one bandwidth, in the whole or in one group (its code)."""
        estimate = self._scan.total if group is None else self._scan.groups[group]
        if group is None and self._design.by is not None:
            variance = self._total_variance(column)
        else:
            strata = self._design.strata
            name = None if group is None or self._design.by is None else self._groups[group]
            variance = self._variance(estimate, column, strata[name] if name else next(iter(strata.values())))
        few = estimate.ess[:, column] < _LEAST_EFFECTIVE
        few |= bool(np.median(estimate.ess[:, column]) < 2 * _LEAST_EFFECTIVE)
        missed = np.full(len(variance), self._missed_share(kernel, bandwidth, column) > _MOST_MISSED)
        taken_whole = variance <= 0
        low, high = _interval(variance, self._missed(kernel, bandwidth, estimate.log_sum[:, column]))
        return Doubt(
            np.sqrt(variance),
            np.where(taken_whole, 0.0, low),
            np.where(taken_whole, 0.0, high),
            few & ~taken_whole,
            missed & ~taken_whole,
        )

    def _total_variance(self, column: int) -> NDArray[np.float64]:
        """Relative variance of the sums over all rows."""
        estimate, design = self._scan.total, self._design
        if design.by is None:
            return self._variance(estimate, column, next(iter(design.strata.values())))
        variance = np.zeros(len(estimate.log_sum))
        for code, part in self._scan.groups.items():
            with np.errstate(invalid="ignore"):
                share = np.exp(part.log_sum[:, column] - estimate.log_sum[:, column])
            own = self._variance(part, column, design.strata[self._groups[code]])
            variance += np.where(share > 0, share**2 * own, 0.0)
        return variance

    def _missed_share(self, kernel: str, bandwidth: float, column: int) -> float:
        """The share of queries that a deciding near row was missed of, by those whose row was drawn."""
        exponent = _log_kernel(kernel, bandwidth, self._nearest)
        w = self._nearest_weight
        if exponent is None or not (w > 1).any():
            return 0.0
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            s = np.exp(np.minimum(exponent + np.log(w) - self._scan.total.log_sum[:, column], 0.0))
            # Of the sum without the row: what the row adds, and the standard error.
            added = s / (w * (1 - s))
            rest = (self._total_variance(column) - (1 - 1 / w) * s**2) / (1 - s) ** 2
            decides = (s >= 1) | (added > np.sqrt(np.maximum(rest, 0.0)))
        return float(((w - 1) * (decides & (w > 1))).sum() / len(w))

    def _variance(self, estimate: Estimate, column: int, stratum: Stratum) -> NDArray[np.float64]:
        """Relative variance of the sums of one stratum, or of a domain in it."""
        n = min(estimate.rows, stratum.sampled)
        if n < 2 or stratum.sampled == stratum.texts:
            return np.zeros(len(estimate.ess))
        share = stratum.sampled / stratum.texts
        with np.errstate(divide="ignore", invalid="ignore"):
            spread = 1.0 / estimate.ess[:, column] - 1.0 / n
        found: NDArray[np.float64] = (1 - share) * n / (n - 1) * np.maximum(spread, 0.0)
        return np.where(np.isfinite(found), found, 0.0)

    def _missed(self, kernel: str, bandwidth: float, log_sum: NDArray[np.float64]) -> NDArray[np.float64]:
        """ω: the largest term that may have been missed, relative to the kernel sum."""
        exponent = _log_kernel(kernel, bandwidth, self._unseen)
        if exponent is None:
            # Distances of another norm are not at hand: as if the nearest row made the whole sum.
            exponent = log_sum - np.log(self._weight) if self._weight > 0 else log_sum
        with np.errstate(over="ignore", invalid="ignore"):
            omega = self._weight * np.exp(np.minimum(exponent - log_sum, 200.0))
        return np.where(np.isfinite(omega), omega, 0.0)


def _log_kernel(kernel: str, bandwidth: float, distances: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Logarithms of a kernel at distances; None for a kernel of another norm."""
    if kernel not in _EUCLIDEAN:
        return None
    # The von Mises–Fisher kernel, scaled to 1 at the query, is the gaussian on the sphere.
    name = "gaussian" if kernel == "vmf" else kernel
    nothing = np.empty((len(distances), 0))
    found: NDArray[np.float64] = log_kernel(name, bandwidth, distances, nothing, nothing)
    return found


def _interval(
    variance: NDArray[np.float64], omega: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Logarithms of the ends of the interval relative to the estimate."""
    from scipy.stats import chi2

    v, omega = np.maximum(variance, 1e-300), np.minimum(omega, 1e100)
    wide = v + omega**2
    with np.errstate(divide="ignore"):
        low = np.log(v / 2) + np.log(chi2.ppf(_ALPHA / 2, 2 / v))
        high = np.log(wide / (2 * (1 + omega))) + np.log(
            chi2.ppf(1 - _ALPHA / 2, 2 * (1 + omega) ** 2 / wide)
        )
    # Hardly any doubt: the quantiles of so many degrees of freedom are those of the normal distribution.
    small = v < 1e-8
    half = 1.959963984540054 * np.sqrt(v)
    return np.where(small, -half, low), np.where(small, np.maximum(half, high), high)
