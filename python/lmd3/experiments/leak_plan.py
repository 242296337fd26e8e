"""The plan of a leak, before anything is trained: who gets what, which placebo stands in its place, what it
can find and what it costs.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lmd3.analysis.assignment import Cell, Design, Variants, block_items, cells_of
from lmd3.errors import ParameterError
from lmd3.experiment_files import ASSIGNMENT, SLOTS
from lmd3.experiments.leak_inputs import EXACT, Records, VariantTexts

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

#: Standardised effects whose power the plan tells; the effect that a plan must be able to find, and with
#: what power.
EFFECTS, LARGE, LEAST = (0.2, 0.5, 0.8), 1.0, 0.5


def choose_kinds(variants: VariantTexts, kinds: Sequence[str] | None) -> tuple[str, ...]:
    """The kinds of a design: those asked for, else all that there are, exact copies last.

    Raises:
        ParameterError: a kind asked for that no variant has.
    """
    there = dict.fromkeys(variants.kinds)
    if kinds is None:
        return tuple(kind for kind in there if kind != EXACT) + ((EXACT,) if EXACT in there else ())
    missing = [kind for kind in kinds if kind not in there]
    if missing:
        raise ParameterError(
            f"no variant is of the kind {missing[0]!r}", remedy=f"there are: {', '.join(there)}"
        )
    return tuple(dict.fromkeys(kinds))


def eligible_items(items: Records, variants: VariantTexts, kinds: Sequence[str]) -> NDArray[np.bool_]:
    """(n,) the items that have variants of all kinds: an assignment may give them any cell."""
    there = {(item, kind) for item, kind in zip(variants.items, variants.kinds, strict=True)}
    return np.array([all((item, kind) in there for kind in kinds) for item in items.ids], dtype=np.bool_)


def refuse_doses(
    items: Records,
    variants: VariantTexts,
    kinds: Sequence[str],
    doses: Sequence[int],
    eligible: NDArray[np.bool_],
) -> None:
    """Refuses a dose above the number of an item's variants of a kind, where copies are not allowed."""
    number: dict[tuple[str, str], int] = {}
    for item, kind in zip(variants.items, variants.kinds, strict=True):
        number[item, kind] = number.get((item, kind), 0) + 1
    for kind in kinds:
        fewest = min(
            (number[item, kind] for item, may in zip(items.ids, eligible, strict=True) if may), default=0
        )
        if max(doses) > fewest:
            raise ParameterError(
                f"a dose of {max(doses)} needs as many variants of every item, but one has {fewest} of the"
                f" kind {kind!r} and copies are not allowed",
                remedy="lower --dose, bring more variants, or leave --distinct out: then texts are repeated",
            )


@dataclass(frozen=True)
class Plan:
    """Who gets what.

    Attributes:
        design: blocks and cells.
        assigned: (n,) the cell of every item, −1 where held back.
        eligible: (n,) the items with variants of all kinds.
        rows: the rows of the variants' table that may be leaked: those of items in blocks, of the kinds
            chosen; `variants.item` and `.kind` describe them.
        variants: of these rows.
        copies: (rows,) how often each is leaked.
        placebos: for every control arm, (slots,) rows of the placebo records, in the order of the rows that
            are leaked.
    """

    design: Design
    assigned: Integers
    eligible: NDArray[np.bool_]
    rows: Integers
    variants: Variants
    copies: Integers
    placebos: tuple[Integers, ...]

    @property
    def slots(self) -> Integers:
        """The leaked rows, as positions in `rows`."""
        return np.flatnonzero(self.copies)

    @property
    def added(self) -> int:
        """Texts added to the base, copies counted."""
        return int(self.copies.sum())


def make_plan(
    items: Records,
    variants: VariantTexts,
    log_density: Floats,
    kinds: Sequence[str],
    doses: Sequence[int],
    *,
    untreated: int,
    hold_back: float,
    eligible: NDArray[np.bool_],
    placebo: Records,
    arms: int,
    seed: int,
) -> Plan:
    """Draws blocks, assignment and placebos.

    Args:
        items: n items.
        variants: all variants.
        log_density: (n,) under the base texts, at the primary bandwidth.
        kinds: of the design.
        doses: of the design; 0 is always there.
        untreated: untreated items of a block.
        hold_back: share of the eligible items that stays untreated outside all blocks.
        eligible: (n,) items that may be treated.
        placebo: texts for the control arms.
        arms: control arms; each gets placebo texts of its own where there are enough.
        seed: of all draws.

    Raises:
        ParameterError: a setting outside its range, too few items, too few placebo texts.
    """
    if untreated < 1:
        raise ParameterError("a block needs an untreated item: untreated is at least 1")
    if not 0 <= hold_back < 1:
        raise ParameterError(f"the share held back must be in [0, 1), not {hold_back:g}")
    if min(doses, default=0) < 0 or max(doses, default=0) < 1:
        raise ParameterError("doses are whole numbers, at least one of them above 0")
    cells = cells_of(kinds, doses, untreated)
    random = np.random.default_rng([seed, 0])
    blocks = block_items(
        log_density, items.groups, len(cells), random, eligible=eligible, hold_back=hold_back
    )
    found = int(blocks.max(initial=-1)) + 1
    needed = blocks_needed(len(cells), untreated)
    if found < needed:
        raise ParameterError(
            f"too few items for any power: {int(eligible.sum())} items with variants of all kinds make"
            f" {found} blocks of {len(cells)}; to find an effect of {LARGE:g} standard"
            f" deviation with a power of {LEAST:.0%} takes {needed}",
            remedy=f"bring at least {needed * len(cells)} such items (of one group), fewer doses or kinds,"
            " or hold fewer back",
        )
    design = Design(cells, blocks)
    assigned = design.draw(random)
    row_of = {item: row for row, item in enumerate(items.ids)}
    kind_of = {kind: number for number, kind in enumerate(design.kinds)}
    rows = np.array(
        [
            row
            for row, (item, kind) in enumerate(zip(variants.items, variants.kinds, strict=True))
            if kind in kind_of and blocks[row_of[item]] >= 0
        ],
        dtype=np.int64,
    )
    of_rows = Variants(
        np.array([row_of[variants.items[row]] for row in rows], dtype=np.int64),
        np.array([kind_of[variants.kinds[row]] for row in rows], dtype=np.int64),
    )
    copies = of_rows.multiplicity(design, assigned)
    lengths = np.array([len(variants.texts[row]) for row in rows[copies > 0]])
    placebos = draw_placebos(lengths, placebo, arms, np.random.default_rng([seed, 1]))
    return Plan(design, assigned, eligible, rows, of_rows, copies, placebos)


def draw_placebos(
    lengths: Integers, placebo: Records, arms: int, random: np.random.Generator
) -> tuple[Integers, ...]:
    """Placebo texts for every slot of every control arm, each as long as the text it stands for, or nearly.

    Arms share them where there are not enough for each.

    Raises:
        ParameterError: not enough for one arm.
    """
    slots = len(lengths)
    if len(placebo) < slots:
        raise ParameterError(
            f"{slots} texts are leaked, but there are {len(placebo)} placebo texts to stand in their place",
            remedy="bring more with --placebo, or leave it out: then they are taken from the base texts",
        )
    own = min(arms, len(placebo) // slots)
    sizes = np.array([len(text) for text in placebo.texts])
    order = random.permutation(len(sizes))
    free = sorted((int(sizes[row]), int(row)) for row in order)
    sets = []
    for _ in range(own):
        chosen = np.empty(slots, dtype=np.int64)
        for slot in random.permutation(slots):
            at = bisect.bisect_left(free, (int(lengths[slot]), -1))
            near = [i for i in (at - 1, at) if 0 <= i < len(free)]
            best = min(near, key=lambda i: abs(free[i][0] - int(lengths[slot])))
            chosen[slot] = free.pop(best)[1]
        sets.append(chosen)
    return tuple(sets[arm % own] for arm in range(arms))


def split_placebo(base: Records, slots: int, arms: int, seed: int) -> tuple[Integers, Integers]:
    """Rows of the base that stay, and rows set aside as placebo texts: one for each slot of each arm, but at
    most a fifth of the base.

    Raises:
        ParameterError: a fifth of the base is not enough for one arm.
    """
    most = len(base) // 5
    if most < slots:
        raise ParameterError(
            f"{slots} placebo texts are needed, more than a fifth of the {len(base)} base texts",
            remedy="name other texts of the kind with --placebo",
        )
    wanted = min(arms * slots, most)
    order = np.random.default_rng([seed, 2]).permutation(len(base))
    return np.sort(order[wanted:]), np.sort(order[:wanted])


# --- power ---


def power(
    blocks: int, size: int, untreated: int, effect: float, *, draws: int = 2000, seed: int = 0
) -> float:
    """Share of simulated experiments that reject "no effect" at 5 %, by the test that compares the treated
    with the untreated of their block (paired over blocks).

    Args:
        blocks: their number.
        size: items of one.
        untreated: of these.
        effect: of treatment, in standard deviations of the change of the outcome between untreated items.
        draws: experiments simulated.
        seed: of the simulation.
    """
    from scipy import stats

    if blocks < 2:
        return 0.0
    random = np.random.default_rng([seed, blocks, size])
    noise = random.standard_normal((draws, blocks, size))
    noise[:, :, untreated:] += effect
    gap = noise[:, :, untreated:].mean(axis=2) - noise[:, :, :untreated].mean(axis=2)
    statistic = gap.mean(axis=1) / (gap.std(axis=1, ddof=1) / np.sqrt(blocks))
    return float((np.abs(statistic) > stats.t.ppf(0.975, blocks - 1)).mean())


def blocks_needed(size: int, untreated: int, effect: float = LARGE, wanted: float = LEAST) -> int:
    """The fewest blocks that find an effect with a power of `wanted`."""
    blocks = 3
    while blocks < 10_000 and power(blocks, size, untreated, effect, draws=1000) < wanted:
        blocks += max(1, blocks // 8)
    return blocks


def cell_counts(plan: Plan) -> dict[str, int]:
    """Items of every cell, and those held back."""
    counts: dict[str, int] = {}
    for cell in dict.fromkeys(plan.design.cells):
        numbers = [number for number, other in enumerate(plan.design.cells) if other == cell]
        counts[str(cell)] = int(np.isin(plan.assigned, numbers).sum())
    return counts | {"held back": int((plan.assigned < 0).sum())}


def assignment_table(plan: Plan, items: Records, log_density: Floats) -> pa.Table:
    """`ASSIGNMENT` of a plan."""
    held = plan.assigned < 0
    cells = [Cell("none", 0) if cell < 0 else plan.design.cells[cell] for cell in plan.assigned]
    return pa.table(
        {
            "id": list(items.ids),
            "group": pa.nulls(len(items), pa.string()) if items.groups is None else list(items.groups),
            "block": pa.array(plan.design.block, mask=held),
            "cell": pa.array(plan.assigned, mask=held),
            "kind": [cell.kind for cell in cells],
            "dose": [cell.dose for cell in cells],
            "held_back": held,
            "base_log_density": log_density,
        },
        schema=ASSIGNMENT,
    )


def slots_table(plan: Plan, variants: VariantTexts, placebo: Records) -> pa.Table:
    """`SLOTS` of a plan."""
    rows = plan.rows[plan.slots]
    return pa.table(
        {
            "variant": rows,
            "item": [variants.items[row] for row in rows],
            "kind": [variants.kinds[row] for row in rows],
            "copies": plan.copies[plan.slots],
            "placebos": [
                [placebo.ids[arm[slot]] for arm in plan.placebos] for slot in range(len(plan.slots))
            ],
        },
        schema=SLOTS,
    )
