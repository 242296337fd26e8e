"""A sample of texts drawn before they are encoded: by a hash of the id, so that it needs no memory, does not
depend on the order of the input, and only grows when the rate is raised.

**Design.** A text of stratum g is taken where the 64-bit hash of its id under the seed lies below a
threshold: the rate, or, where that takes fewer, what takes `LEAST` texts of the stratum (or all). Given how
many texts n_g of the N_g were taken, every set of n_g texts is equally likely: stratified simple random
sampling (Cochran, *Sampling Techniques*, 1977, chapter 5). Each row taken stands for N_g / n_g texts, its
weight, so that the weights add up to the texts and weighted sums are unbiased.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmd3 import _lmd3
from lmd3.errors import ParameterError

__all__ = ["LEAST", "SampleCounter", "SampleDesign", "Stratum"]

#: Texts of a stratum that are taken at least, or all where there are fewer.
LEAST = 32

_WHOLE = ""


@dataclass(frozen=True)
class Stratum:
    """A stratum: how many texts it has, how many are taken, and the largest hash taken."""

    texts: int
    sampled: int
    threshold: int

    @property
    def weight(self) -> float:
        """Texts that a row taken stands for."""
        return self.texts / self.sampled


@dataclass(frozen=True)
class SampleDesign:
    """Which texts are taken.

    Attributes:
        rate: as asked for, in (0, 1).
        seed: of the hashes.
        by: "group", or None: one stratum.
        strata: by the group's name; by "" where there is one.
    """

    rate: float
    seed: int
    by: str | None
    strata: Mapping[str, Stratum]

    def keep(self, ids: Sequence[str], groups: Sequence[str] | None) -> NDArray[np.bool_]:
        """Whether each of m texts is taken, (m,)."""
        hashes = _lmd3.hash_ids(list(ids), self.seed)
        if self.by is None:
            limits: Any = np.uint64(self.strata[_WHOLE].threshold)
        else:
            limits = np.array([self._stratum(name).threshold for name in groups or ()], np.uint64)
        taken: NDArray[np.bool_] = hashes <= limits
        return taken

    def weights(self, count: int, groups: Sequence[str] | None) -> NDArray[np.float32]:
        """The weights of `count` rows taken, (count,)."""
        if self.by is None:
            return np.full(count, self.strata[_WHOLE].weight, np.float32)
        return np.array([self._stratum(name).weight for name in groups or ()], np.float32)

    def _stratum(self, name: str) -> Stratum:
        # A group that was not there when strata were counted can only come from a changed input.
        return self.strata.get(name) or Stratum(1, 1, 2**64 - 1)

    @property
    def texts(self) -> int:
        """Texts in all."""
        return sum(stratum.texts for stratum in self.strata.values())

    @property
    def sampled(self) -> int:
        """Texts taken."""
        return sum(stratum.sampled for stratum in self.strata.values())

    def describe(self) -> dict[str, Any]:
        """As JSON values, for the manifest; thresholds are hexadecimal."""
        strata = [
            {"name": name, "texts": s.texts, "sampled": s.sampled, "threshold": f"{s.threshold:016x}"}
            for name, s in self.strata.items()
        ]
        return {
            "rate": self.rate,
            "seed": self.seed,
            "by": self.by,
            "texts": self.texts,
            "sampled": self.sampled,
            "strata": strata,
        }

    @classmethod
    def restore(cls, description: Mapping[str, Any]) -> SampleDesign:
        """The design that `describe` wrote down."""
        strata = {
            entry["name"]: Stratum(entry["texts"], entry["sampled"], int(entry["threshold"], 16))
            for entry in description["strata"]
        }
        return cls(description["rate"], description["seed"], description["by"], strata)


@dataclass
class _Tally:
    texts: int = 0
    below: int = 0
    #: The smallest hashes, negated: a heap whose root is the largest of them.
    least: list[int] = field(default_factory=list)


class SampleCounter:
    """Counts the strata in one pass, in memory of the number of strata.

    Raises:
        ParameterError: a rate outside (0, 1), or strata by anything but "group".
    """

    def __init__(self, rate: float, seed: int = 0, by: str | None = None) -> None:
        if not 0 < rate < 1:
            raise ParameterError(f"a sample takes more than 0 and less than all of the texts, not {rate:g}")
        if by not in (None, "group"):
            raise ParameterError(f"samples are stratified by group, not by {by!r}")
        self._rate, self._seed, self._by = rate, seed, by
        self._threshold = int(rate * 2**64)
        self._tallies: dict[str, _Tally] = {}

    def describe(self) -> dict[str, Any]:
        """What was asked for, as JSON values."""
        return {"rate": self._rate, "seed": self._seed, "by": self._by}

    def add(self, ids: Sequence[str], groups: Sequence[str] | None) -> None:
        """Counts the next texts.

        Raises:
            ParameterError: strata by group where there are none.
        """
        if self._by is not None and groups is None:
            raise ParameterError("a sample by group needs groups", remedy="name their column: --group COL")
        hashes = _lmd3.hash_ids(list(ids), self._seed)
        if self._by is None:
            self._count(_WHOLE, hashes)
            return
        names, codes = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
        for code, name in enumerate(names.tolist()):
            self._count(name, hashes[codes == code])

    def _count(self, name: str, hashes: NDArray[np.uint64]) -> None:
        tally = self._tallies.setdefault(name, _Tally())
        tally.texts += len(hashes)
        tally.below += int(np.count_nonzero(hashes <= np.uint64(self._threshold)))
        smallest = np.partition(hashes, LEAST - 1)[:LEAST] if len(hashes) > LEAST else hashes
        for value in smallest.tolist():
            if len(tally.least) < LEAST:
                heapq.heappush(tally.least, -value)
            elif -tally.least[0] > value:
                heapq.heapreplace(tally.least, -value)

    def finish(self) -> SampleDesign:
        """The design for what was counted."""
        strata = {}
        for name, tally in self._tallies.items():
            if tally.below >= len(tally.least):
                strata[name] = Stratum(tally.texts, tally.below, self._threshold)
            else:
                strata[name] = Stratum(tally.texts, len(tally.least), -tally.least[0])
        return SampleDesign(self._rate, self._seed, self._by, strata)
