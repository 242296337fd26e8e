"""Blocked random assignment of items to what is leaked of them, and its replay.

Every block holds each cell (a kind of variant × a dose) once and the untreated cell as often as asked, so an
assignment is one permutation per block; a replay draws these permutations anew. Items outside all blocks are
held back: no draw ever treats them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lmd3.errors import ParameterError

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

#: Kind of the untreated cell.
NONE = "none"


@dataclass(frozen=True, slots=True)
class Cell:
    """What happens to an item: `dose` texts of a kind are added to the training data."""

    kind: str
    dose: int

    def __str__(self) -> str:
        return NONE if self.dose == 0 else f"{self.kind} × {self.dose}"


def cells_of(kinds: Sequence[str], doses: Sequence[int], untreated: int) -> tuple[Cell, ...]:
    """The cells of one block: untreated ones first, then every kind with every dose above 0."""
    return (
        *(Cell(NONE, 0) for _ in range(untreated)),
        *(Cell(kind, dose) for kind in kinds for dose in sorted(set(doses)) if dose > 0),
    )


@dataclass(frozen=True)
class Design:
    """A blocked design over n items.

    Attributes:
        cells: the cells of one block, `NONE` as often as it stands there.
        block: (n,) number of each item's block, −1 where it is held back. Every block has as many items as
            there are cells.
    """

    cells: tuple[Cell, ...]
    block: Integers

    def __post_init__(self) -> None:
        inside = self.block[self.block >= 0]
        sizes = np.bincount(inside) if len(inside) else np.zeros(0, dtype=np.int64)
        if len(sizes) == 0 or (sizes != len(self.cells)).any():
            raise ParameterError(f"every block must hold {len(self.cells)} items, one for each cell")

    @cached_property
    def members(self) -> Integers:
        """(blocks, cells): the items of every block."""
        order = np.argsort(self.block, kind="stable")
        return order[(self.block < 0).sum() :].reshape(-1, len(self.cells))

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.members)

    @cached_property
    def doses(self) -> Integers:
        """(cells + 1,): dose by cell; the last entry, index −1, is that of items held back: 0."""
        return np.array([cell.dose for cell in self.cells] + [0], dtype=np.int64)

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kinds in the order of the cells, without the untreated one."""
        return tuple(dict.fromkeys(cell.kind for cell in self.cells if cell.dose))

    def draw(self, random: np.random.Generator, draws: int | None = None) -> Integers:
        """Random assignments: (n,), or (draws, n), of indices into `cells`, −1 where held back."""
        count = 1 if draws is None else draws
        positions = random.random((count, *self.members.shape)).argsort(axis=-1)
        assigned = np.full((count, len(self.block)), -1, dtype=np.int64)
        assigned[:, self.members.ravel()] = positions.reshape(count, -1)
        return assigned[0] if draws is None else assigned

    def redraw_treated(self, random: np.random.Generator, assigned: Integers, draws: int) -> Integers:
        """Assignments like `assigned` (n,), but for which treated item of a block got which treated cell.

        The items untreated in `assigned` stay so in every draw: they can be the focal units of a conditional
        randomisation test (Athey, Eckles and Imbens, 2018).
        """
        treated = self.doses[assigned] > 0
        inside = treated[self.members]
        per_block = int(inside[0].sum())
        members = self.members[inside].reshape(len(self.members), per_block)
        cells = assigned[members]
        order = random.random((draws, *members.shape)).argsort(axis=-1)
        out = np.repeat(assigned[None], draws, axis=0)
        out[:, members.ravel()] = np.take_along_axis(
            np.broadcast_to(cells, order.shape), order, axis=-1
        ).reshape(draws, -1)
        return out

    def kind_codes(self) -> Integers:
        """(cells + 1,): index of each cell's kind in `kinds`, −1 for the untreated and the held back."""
        index = {kind: number for number, kind in enumerate(self.kinds)}
        return np.array([index[c.kind] if c.dose else -1 for c in self.cells] + [-1], dtype=np.int64)


def block_items(
    log_density: Floats,
    groups: Sequence[str] | None,
    size: int,
    random: np.random.Generator,
    *,
    eligible: NDArray[np.bool_] | None = None,
    hold_back: float = 0.0,
) -> Integers:
    """Blocks of items of one group and like baseline density.

    Within each group a random share of the eligible items is held back, the others are sorted by density and
    cut into blocks; what is left over (drawn by lot) is held back too.

    Args:
        log_density: (n,) baseline log density.
        groups: (n,) labels, or None: one group.
        size: items of one block.
        random: source of the draws.
        eligible: (n,) items that may be treated; None: all.
        hold_back: share of each group's eligible items that stays out of the blocks.

    Returns:
        (n,) block numbers from 0, −1 where held back.
    """
    n = len(log_density)
    labels = np.asarray(["" if groups is None else str(g) for g in (groups or [""] * n)], dtype=object)
    may = np.ones(n, dtype=np.bool_) if eligible is None else eligible
    block = np.full(n, -1, dtype=np.int64)
    number = 0
    for label in sorted(set(labels[may])):
        inside = random.permutation(np.flatnonzero(may & (labels == label)))
        kept = inside[: len(inside) - round(hold_back * len(inside))]
        kept = kept[: len(kept) // size * size]
        kept = kept[np.lexsort((kept, log_density[kept]))]
        for start in range(0, len(kept), size):
            block[kept[start : start + size]] = number
            number += 1
    return block


@dataclass(frozen=True)
class Variants:
    """The texts that may be leaked: row v belongs to an item, has a kind and a rank among that item's texts
    of the kind.

    Attributes:
        item: (V,) index of the item.
        kind: (V,) index of the kind in `Design.kinds`.
    """

    item: Integers
    kind: Integers

    @cached_property
    def _ranks(self) -> tuple[Integers, Integers]:
        """Rank of each row among those of its item and kind, and their number."""
        key = self.item * (int(self.kind.max(initial=0)) + 1) + self.kind
        order = np.argsort(key, kind="stable")
        _, first, inverse, counts = np.unique(
            key[order], return_index=True, return_inverse=True, return_counts=True
        )
        rank, count = np.empty_like(key), np.empty_like(key)
        rank[order] = np.arange(len(key)) - first[inverse]
        count[order] = counts[inverse]
        return rank, count

    def multiplicity(self, design: Design, assigned: Integers) -> Integers:
        """How often each row is added: (V,) for one assignment (n,), (R, V) for (R, n).

        A dose above the number of an item's texts of a kind goes through them again from the first.
        """
        rank, count = self._ranks
        cell = assigned[..., self.item]
        dose = np.where(design.kind_codes()[cell] == self.kind, design.doses[cell], 0)
        return np.asarray(dose // count + (rank < dose % count), dtype=np.int64)


@dataclass(frozen=True)
class Exposure:
    """What every query's density owes to every text that may be leaked, for one kernel and bandwidth.

    Attributes:
        base: (n,) log of the kernel sum over the base texts.
        control: (S, n) log of the kernel sum over base and placebo texts, for every control arm.
        kernel: (n, V) log kernel of each query with each variant.
    """

    base: Floats
    control: Floats
    kernel: Floats

    @cached_property
    def _scale(self) -> Floats:
        """(n,) the largest logarithm of each query: sums are taken relative to it."""
        largest = self.kernel.max(axis=1, initial=-np.inf)
        scale: Floats = np.maximum(self.base, largest)
        return scale

    @cached_property
    def _relative(self) -> Floats:
        return np.exp(self.kernel - self._scale[:, None])

    def log_sums(self, multiplicity: Integers) -> Floats:
        """Log kernel sum over base and leaked texts: (n,) for (V,), (R, n) for (R, V)."""
        added = multiplicity.astype(np.float64) @ self._relative.T
        with np.errstate(divide="ignore"):
            sums: Floats = np.log(np.exp(self.base - self._scale) + added) + self._scale
        return sums

    def delta(self, multiplicity: Integers) -> Floats:
        """Change of log density, treatment against control: both corpora have the same size, so it is the
        difference of the log sums, meant over the control arms.
        """
        return np.asarray(self.log_sums(multiplicity) - self.control.mean(axis=0))

    def own(self, variants: Variants, multiplicity: Integers, items: Integers) -> Floats:
        """The part of `delta` (n,) that each query owes to its own item's variants.

        It is log f with all leaked texts − log f with all but its own; the rest is the others' part.

        Args:
            variants: the rows.
            multiplicity: (V,).
            items: (n,) the item of each query.
        """
        is_other = variants.item[None, :] != items[:, None]
        others = (self._relative * is_other) @ multiplicity.astype(np.float64)
        with np.errstate(divide="ignore"):
            without = np.log(np.exp(self.base - self._scale) + others) + self._scale
        return np.asarray(self.log_sums(multiplicity) - without)
