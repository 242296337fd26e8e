"""Kernel sums as the stages of an estimate find them: with variances, joined and replaced query by query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmd3.executors.partials import Part


@dataclass
class Sums:
    """Estimates in progress: (Q, B), and (Q, G, B) by group."""

    log_sum: NDArray[np.float64]
    variance: NDArray[np.float64]
    df: NDArray[np.float64]
    ess: NDArray[np.float64]
    flags: NDArray[np.uint32]
    draws: NDArray[np.float64]
    rows: NDArray[np.float64]
    excluded: NDArray[np.float64]
    groups: Sums | None = None

    @classmethod
    def of(cls, found: dict[str, NDArray[Any]], queries: int, rows: float) -> Sums:
        """From what a native stage returned."""

        def take(prefix: str) -> Sums:
            log_sum, variance, df, ess, flags = (
                found[f"{prefix}{name}"] for name in ("log_sum", "variance", "df", "ess", "flags")
            )
            read = found.get("rows", np.full(queries, rows)).astype(np.float64)
            draws = found.get("draws", np.full(queries, rows)).astype(np.float64)
            excluded = found.get("excluded", np.zeros(queries))
            return cls(log_sum, variance, df, ess, flags, draws, read, excluded)

        sums = take("")
        if "group_log_sum" in found:
            sums.groups = take("group_")
        return sums

    def part(self) -> Part:
        """As a file keeps it; `of` reads it."""
        names = ("log_sum", "variance", "df", "ess", "flags")
        part = {name: getattr(self, name) for name in (*names, "draws", "rows", "excluded")}
        if self.groups is not None:
            part |= {f"group_{name}": getattr(self.groups, name) for name in names}
        return part

    def some(self, chosen: NDArray[np.int64]) -> Sums:
        """Those of some queries, by their numbers."""
        return Sums(
            self.log_sum[chosen],
            self.variance[chosen],
            self.df[chosen],
            self.ess[chosen],
            self.flags[chosen],
            self.draws[chosen],
            self.rows[chosen],
            self.excluded[chosen],
            None if self.groups is None else self.groups.some(chosen),
        )

    def put(self, chosen: NDArray[np.int64], other: Sums) -> None:
        """Puts estimates of some queries in their places."""
        for name in ("log_sum", "variance", "df", "ess", "flags", "draws", "rows", "excluded"):
            getattr(self, name)[chosen] = getattr(other, name)
        if self.groups is not None and other.groups is not None:
            self.groups.put(chosen, other.groups)

    def join(self, chosen: NDArray[np.int64], other: Sums) -> None:
        """Joins a second stage of some queries, each stage weighted by its draws (never by its variance,
        which would favour stages that missed what is large)."""
        shape = (-1, *[1] * (self.log_sum.ndim - 1))
        first, second = self.draws[chosen], other.draws
        a, b = ((part / (first + second)).reshape(shape) for part in (first, second))
        x, y = self.log_sum[chosen], other.log_sum
        with np.errstate(divide="ignore", invalid="ignore"):
            joint = np.logaddexp(x + np.log(a), y + np.log(b))
            u = (a * np.exp(x - joint)) ** 2 * self.variance[chosen]
            v = (b * np.exp(y - joint)) ** 2 * other.variance
            total = u + v
            df = total**2 / (u**2 / self.df[chosen] + v**2 / other.df)
        self.log_sum[chosen] = joint
        self.variance[chosen] = total
        self.df[chosen] = np.where(np.isfinite(df), df, self.df[chosen])
        self.ess[chosen] = a * self.ess[chosen] + b * other.ess
        # Whatever either stage doubts is doubtful, but for too few draws.
        self.flags[chosen] |= other.flags & ~np.uint32(16)
        self.flags[chosen] &= ~np.uint32(16) | other.flags
        self.draws[chosen] += other.draws
        self.rows[chosen] += other.rows
        if self.groups is not None and other.groups is not None:
            self.groups.join(chosen, other.groups)


def empty(q: int, b: int) -> Sums:
    """Sums of Q queries at B bandwidths of which nothing is known yet, without groups."""
    log_sum, variance, df, ess = (np.zeros((q, b)) for _ in range(4))
    flags = np.zeros((q, b), np.uint32)
    return Sums(log_sum, variance, df, ess, flags, np.zeros(q), np.zeros(q), np.zeros(q))
