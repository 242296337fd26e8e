"""What an intervention did: effects by cell, slopes on the change of density, and tests that replay the draw.

The outcome of item i is Δ_i = treatment − control, meant over the pairs of arms; pairs share initialisation
and order, so with a balanced number of pairs an effect for each pair drops out of that mean. Density enters
as the change of log density (`Exposure.delta`).

* Randomisation tests (Fisher): under the sharp null that no assignment changes any Δ_i, every assignment that
  could have been drawn is as likely as the one that was; the statistic is taken again for each replay, with
  the density that this assignment would have had. p = (1 + #{|t*| ≥ |t|})/(R + 1).
* Spillover: the exposure of an untreated item is not random even where the assignment is: some items lie near
  many others whatever the draw. Its mean over the replays is taken off first (Borusyak and Hull, 2023), and
  the focal items are untreated in every replay: those held back, or, with the draw conditioned on who is
  untreated, all untreated ones (Athey, Eckles and Imbens, 2018).
* Intervals of coefficients are by HC3, with the variance between pairs of arms added where there are three
  or more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from lmd3.analysis.assignment import NONE, Design, Exposure, Variants
from lmd3.analysis.regression import Estimate, fit
from lmd3.errors import ParameterError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

#: Replays held in memory at once.
_CHUNK = 250

#: Pairs of arms from which on they are a sample of all seeds; fewer are fixed effects.
FEWEST_SEEDS = 3

#: Ties count as reached: a replay of the very assignment must not miss by rounding.
_TIE = 1 - 1e-12


@dataclass(frozen=True)
class Outcome:
    """An outcome of n items in S pairs of arms.

    Attributes:
        name: of the outcome.
        control: (S, n), NaN where an item has none.
        treatment: (S, n).
        binary: whether its values are 0 and 1.
    """

    name: str
    control: Floats
    treatment: Floats
    binary: bool = False

    @property
    def seeds(self) -> int:
        """Number of pairs."""
        return len(self.control)

    @property
    def delta(self) -> Floats:
        """(n,) treatment − control, meant over the pairs."""
        return np.asarray((self.treatment - self.control).mean(axis=0))

    @property
    def known(self) -> NDArray[np.bool_]:
        """(n,) whether an item has a value in every arm."""
        return np.asarray(np.isfinite(self.control).all(axis=0) & np.isfinite(self.treatment).all(axis=0))

    @property
    def placebo(self) -> Outcome | None:
        """Two control arms as treatment and control: an outcome that nothing can have changed."""
        if self.seeds < 2:
            return None
        return Outcome(f"placebo:{self.name}", self.control[1:2], self.control[:1], self.binary)

    @property
    def baseline(self) -> Floats | None:
        """(S, n) the control value of another pair: a baseline that is not part of the difference."""
        return None if self.seeds < 2 else np.roll(self.control, -1, axis=0)


# --- effects by cell ---


def _mean_interval(values: Floats, per_seed: Floats | None) -> dict[str, float]:
    """Mean with a t interval: over items, and over pairs of arms too where there are three or more.

    With three pairs or more the variance between the pairs' means (beyond what items' noise explains) is
    added and the interval speaks of any seed; with fewer, of the seeds there are.
    """
    n = len(values)
    variance = values.var(ddof=1) / n if n > 1 else np.nan
    freedom = float(n - 1)
    if per_seed is not None and len(per_seed) >= FEWEST_SEEDS and n > 1:
        seeds = len(per_seed)
        # Deviations from the mean over pairs have (S − 1)/S of the noise of one pair.
        within = (per_seed - values).var(axis=1, ddof=1).mean() / n * seeds / (seeds - 1)
        variance, freedom = _with_seeds(variance, freedom, per_seed.mean(axis=1), within)
    error = float(np.sqrt(variance))
    half = float(stats.t.ppf(0.975, freedom)) * error if n > 1 else np.nan
    mean = float(values.mean())
    return {"mean": mean, "std_error": error, "ci_low": mean - half, "ci_high": mean + half}


def _with_seeds(variance: float, freedom: float, per_seed: Floats, within: float) -> tuple[float, float]:
    """Variance and degrees of freedom (Satterthwaite's) of a mean over pairs of arms, the variance between
    pairs added.

    Args:
        variance, freedom: over items alone.
        per_seed: (S,) the estimates of the pairs.
        within: how much of their variance the items' noise explains.
    """
    seeds = len(per_seed)
    between = max(0.0, float(per_seed.var(ddof=1)) - within) / seeds
    total = variance + between
    parts = variance**2 / freedom + between**2 / (seeds - 1)
    return total, float(total**2 / parts) if parts > 0 else freedom


def rows_of_cells(design: Design, assigned: Integers) -> dict[tuple[str, int], NDArray[np.bool_]]:
    """(n,) masks by (kind, dose): the untreated of the blocks, every treated cell, and those held back."""
    found: dict[tuple[str, int], NDArray[np.bool_]] = {}
    for cell in dict.fromkeys(design.cells):
        numbers = [number for number, other in enumerate(design.cells) if other == cell]
        found[cell.kind, cell.dose] = np.isin(assigned, numbers)
    if (assigned < 0).any():
        found["held back", 0] = assigned < 0
    return found


def cell_effects(outcome: Outcome, design: Design, assigned: Integers) -> pd.DataFrame:
    """Mean change of an outcome by cell, and its difference to the untreated of the same blocks.

    Returns:
        outcome, kind, dose, n, mean, std_error, ci_low, ci_high, effect, effect_error, effect_low,
        effect_high (effect: null for cells without a block).
    """
    difference = outcome.treatment - outcome.control
    delta, known = outcome.delta, outcome.known
    untreated = (design.doses[assigned] == 0) & (assigned >= 0) & known
    blocks = np.where(design.block < 0, 0, design.block)
    count = np.bincount(blocks[untreated], minlength=design.blocks)
    with np.errstate(invalid="ignore", divide="ignore"):
        levels = np.array(
            [
                np.bincount(blocks[untreated], of[untreated], minlength=design.blocks) / count
                for of in difference
            ]
        )
    rows = []
    for (kind, dose), mask in rows_of_cells(design, assigned).items():
        mask = mask & known
        if mask.sum() < 2:
            continue
        entry: dict[str, Any] = {"outcome": outcome.name, "kind": kind, "dose": dose, "n": int(mask.sum())}
        entry |= _mean_interval(delta[mask], difference[:, mask])
        per_seed = difference[:, mask] - levels[:, blocks[mask]]
        per_seed = per_seed[:, np.isfinite(per_seed).all(axis=0)]
        gaps = per_seed.mean(axis=0)
        if dose and len(gaps) > 1:
            found = _mean_interval(gaps, per_seed)
            entry |= {
                "effect": found["mean"],
                "effect_error": found["std_error"],
                "effect_low": found["ci_low"],
                "effect_high": found["ci_high"],
            }
        rows.append(entry)
    return pd.DataFrame(rows)


def density_responses(
    delta: Floats, design: Design, assigned: Integers, *, draws: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Claim A: median change of log density by cell with its bootstrap interval, and the share that rose.

    Returns:
        kind, dose, n, median, ci_low, ci_high, share_positive.
    """
    random = np.random.default_rng(seed)
    rows = []
    for (kind, dose), mask in rows_of_cells(design, assigned).items():
        values = delta[mask]
        medians = np.median(values[random.integers(len(values), size=(draws, len(values)))], axis=1)
        low, high = np.quantile(medians, [0.025, 0.975])
        rows.append(
            {
                "kind": kind,
                "dose": dose,
                "n": len(values),
                "median": float(np.median(values)),
                "ci_low": float(low),
                "ci_high": float(high),
                "share_positive": float((values > 0).mean()),
            }
        )
    return pd.DataFrame(rows)


# --- slopes ---


def _interval(estimate: float, variance: float, freedom: float) -> dict[str, float]:
    """Error, t statistic, p-value and interval of an estimate."""
    error = float(np.sqrt(variance))
    statistic = estimate / error if error > 0 else np.nan
    half = float(stats.t.ppf(0.975, freedom)) * error
    return {
        "std_error": error,
        "statistic": statistic,
        "p_value": float(2 * stats.t.sf(abs(statistic), freedom)),
        "ci_low": estimate - half,
        "ci_high": estimate + half,
    }


def slopes(
    outcome: Outcome, delta_density: Floats, base_density: Floats, design: Design, assigned: Integers
) -> pd.DataFrame:
    """Slopes of Δ performance on Δ log density, by sample and model.

    Models: `overall`; `dose`: on log(1 + dose) alone, for scale; `within cells`: an effect for each dose ×
    kind, which asks whether density says more than the label; `within cells, baseline`: with the outcome of
    another control arm and the baseline log density too. Samples: all items of the blocks, and each kind
    alone.

    Returns:
        outcome, model, sample, term, estimate, std_error, statistic, p_value, ci_low, ci_high, r_squared, n,
        covariance, seed_sd (standard deviation of the estimate over the pairs of arms; of three pairs or
        more its variance, beyond what the items' noise explains, is part of the standard error).
    """
    inside = (assigned >= 0) & outcome.known & np.isfinite(delta_density)
    cells = np.where(assigned >= 0, assigned, 0)
    labels = np.array([str(cell) for cell in design.cells], dtype=object)[cells]
    kinds = np.array([cell.kind for cell in design.cells], dtype=object)[cells]
    dose = np.log1p(design.doses[assigned].astype(np.float64))
    samples: dict[str, NDArray[np.bool_]] = {"all": inside}
    samples |= {kind: inside & (kinds == kind) for kind in design.kinds}
    rows: list[dict[str, Any]] = []

    def add(
        model: str, sample: str, term: str, terms: list[str], frame: pd.DataFrame, **options: Any
    ) -> None:
        if frame["value"].nunique() < 2:
            return
        try:
            found = fit(frame, terms, binary=False, **options)
        except ParameterError:
            return
        entry = found[term].to_dict()
        covariance, seed_sd = found.covariance, None
        if outcome.seeds > 1 and "clusters" not in options:
            pairs = (outcome.treatment - outcome.control)[:, samples[sample]]

            def of(values: Floats) -> Estimate:
                return fit(frame.assign(value=values), terms, binary=False, **options)[term]

            per_seed = np.array([of(p).estimate if np.ptp(p) > 0 else 0.0 for p in pairs])
            seed_sd = float(per_seed.std(ddof=1))
            if outcome.seeds >= FEWEST_SEEDS:
                seeds = outcome.seeds
                deviations = [p - pairs.mean(axis=0) for p in pairs]
                noise = [of(d).std_error ** 2 for d in deviations if np.ptp(d) > 0]
                within = float(np.mean(noise)) * seeds / (seeds - 1) if noise else 0.0
                entry |= _interval(
                    found[term].estimate,
                    *_with_seeds(
                        found[term].std_error ** 2, float(found[term].df or np.inf), per_seed, within
                    ),
                )
                covariance = f"{covariance} + seeds"
        rows.append(
            {
                "outcome": outcome.name,
                "model": model,
                "sample": sample,
                "term": term,
                **entry,
                "r_squared": found.r_squared,
                "n": found.n,
                "covariance": covariance,
                "seed_sd": seed_sd,
            }
        )

    for sample, mask in samples.items():
        frame = pd.DataFrame(
            {"value": outcome.delta[mask], "density": delta_density[mask], "dose": dose[mask]}
        ).reset_index(drop=True)
        effects = pd.Series(labels[mask], name="cell")
        add("overall", sample, "density", ["density"], frame)
        add("dose", sample, "dose", ["dose"], frame)
        add("dose and density", sample, "density", ["dose", "density"], frame)
        add("within cells", sample, "density", ["density"], frame, effects=effects)
        if outcome.baseline is not None:
            seeds = outcome.seeds
            long = pd.DataFrame(
                {
                    "value": (outcome.treatment - outcome.control)[:, mask].ravel(),
                    "density": np.tile(delta_density[mask], seeds),
                    "baseline": outcome.baseline[:, mask].ravel(),
                    "base_density": np.tile(base_density[mask], seeds),
                }
            )
            pair = np.repeat(np.arange(seeds), int(mask.sum()))
            both = pd.Series(
                [f"{c}, {p}" for c, p in zip(np.tile(labels[mask], seeds), pair, strict=True)], name="cell"
            )
            clusters = pd.Series(np.tile(np.flatnonzero(mask), seeds), name="item")
            terms = ["density", "baseline", "base_density"]
            add("within cells, baseline", sample, "density", terms, long, effects=both, clusters=clusters)
    return pd.DataFrame(rows)


# --- randomisation inference ---


@dataclass(frozen=True)
class Randomisation:
    """A test by replays.

    Attributes:
        statistic: of the assignment that was drawn.
        p_value: two-sided.
        null: (R,) of the replays.
        slope: Σxy/Σx² of the assignment that was drawn.
        n: items.
    """

    statistic: float
    p_value: float
    null: Floats
    slope: float
    n: int


def _centred(values: Floats, block: Integers | None) -> Floats:
    """Values (…, n) less their block's mean (None: one block)."""
    if block is None:
        return np.asarray(values - values.mean(axis=-1, keepdims=True))
    codes = np.unique(block, return_inverse=True)[1]
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    sums = np.add.reduceat(values[..., order], starts, axis=-1)
    return np.asarray(values - (sums / np.bincount(codes))[..., codes])


def replay_test(observed: Floats, replays: Floats, values: Floats, block: Integers | None) -> Randomisation:
    """Tests the correlation of an exposure with an outcome, block by block, by replays of the exposure.

    Args:
        observed: (n,) exposure under the assignment drawn.
        replays: (R, n) under replayed ones.
        values: (n,) outcome.
        block: (n,) or None.
    """
    y = _centred(values, block)
    if np.linalg.norm(y) <= 1e-12 * np.linalg.norm(values):
        # An outcome without variation says nothing; its rounding must not be taken for a signal.
        return Randomisation(0.0, 1.0, np.zeros(len(replays)), 0.0, len(values))

    def correlation(x: Floats) -> Floats:
        norm = np.sqrt(np.einsum("...i,...i->...", x, x))
        with np.errstate(invalid="ignore", divide="ignore"):
            found = (x @ y) / (norm * np.linalg.norm(y))
        return np.asarray(np.where(norm > 0, found, 0.0))

    x = _centred(observed, block)
    statistic = float(correlation(x))
    null = correlation(_centred(replays, block))
    reached = int((np.abs(null) >= abs(statistic) * _TIE).sum())
    size = float(x @ x)
    return Randomisation(
        statistic,
        (1 + reached) / (len(null) + 1),
        null,
        float(x @ y) / size if size > 0 else np.nan,
        len(values),
    )


def replayed_deltas(
    exposure: Exposure, variants: Variants, design: Design, draws: Integers, columns: Integers | None = None
) -> Floats:
    """(R, n) change of log density under each of `draws` (R, n); `columns`: of these items only."""
    if columns is not None:
        exposure = Exposure(exposure.base[columns], exposure.control[:, columns], exposure.kernel[columns])
    parts = [
        exposure.delta(variants.multiplicity(design, draws[start : start + _CHUNK]))
        for start in range(0, len(draws), _CHUNK)
    ]
    return np.concatenate(parts)


def effect_tests(
    outcome: Outcome,
    exposure: Exposure,
    variants: Variants,
    design: Design,
    assigned: Integers,
    *,
    replays: int = 2000,
    seed: int = 0,
) -> dict[str, Randomisation]:
    """Claim B by replays: `dose` (log(1 + dose)) and `density` (change of log density), within blocks."""
    rows = np.flatnonzero((assigned >= 0) & outcome.known)
    draws = design.draw(np.random.default_rng([seed, 11]), replays)
    return _effect_tests(outcome.delta[rows], rows, exposure, variants, design, assigned, draws)


def _effect_tests(
    values: Floats,
    rows: Integers,
    exposure: Exposure,
    variants: Variants,
    design: Design,
    assigned: Integers,
    draws: Integers,
) -> dict[str, Randomisation]:
    block = design.block[rows]
    doses = np.log1p(design.doses.astype(np.float64))
    both = np.concatenate([assigned[None], draws])
    density = replayed_deltas(exposure, variants, design, both, rows)
    return {
        "dose": replay_test(doses[assigned[rows]], doses[draws[:, rows]], values, block),
        "density": replay_test(density[0], density[1:], values, block),
    }


@dataclass(frozen=True)
class Spillover:
    """Whether untreated items whose density rose gained.

    Attributes:
        focal: "held back" or "untreated".
        test: by replays, of the exposure less its mean over them.
        naive_slope: of least squares on the exposure as it is.
        naive_p: its p-value (HC3), which takes an exposure for random that is not.
        null_mean: mean over items of the mean exposure over the replays.
    """

    focal: str
    test: Randomisation
    naive_slope: float
    naive_p: float
    null_mean: float


def spillover(
    outcome: Outcome,
    exposure: Exposure,
    variants: Variants,
    design: Design,
    assigned: Integers,
    base_density: Floats,
    *,
    replays: int = 2000,
    seed: int = 0,
    fewest: int = 30,
) -> list[Spillover]:
    """Tests of spillover: among the items held back (if there are `fewest`), and among all untreated ones."""
    found = []
    random = np.random.default_rng([seed, 12])
    held = np.flatnonzero((assigned < 0) & outcome.known)
    if len(held) >= fewest:
        draws = design.draw(random, replays)
        values = adjusted(outcome, base_density, held)
        found.append(_spillover("held back", held, values, exposure, variants, design, assigned, draws))
    untreated = np.flatnonzero((design.doses[assigned] == 0) & outcome.known)
    if len(untreated) >= fewest:
        draws = design.redraw_treated(random, assigned, replays)
        values = adjusted(outcome, base_density, untreated)
        found.append(_spillover("untreated", untreated, values, exposure, variants, design, assigned, draws))
    return found


def adjusted(outcome: Outcome, base_density: Floats, rows: Integers) -> Floats:
    """(rows,) Δ less what baseline log density and the outcome of another control arm say of it, from these
    items alone: nothing that another draw would have changed enters, so the test by replays stays exact.
    """
    difference = (outcome.treatment - outcome.control)[:, rows]
    residuals = np.empty_like(difference)
    for pair in range(outcome.seeds):
        columns = [np.ones(len(rows)), base_density[rows]]
        if outcome.baseline is not None:
            columns.append(outcome.baseline[pair, rows])
        design = np.column_stack(columns)
        residuals[pair] = difference[pair] - design @ np.linalg.lstsq(design, difference[pair], rcond=None)[0]
    # What is left of an outcome that the regression explains wholly is rounding, no signal.
    residuals[np.abs(residuals) <= 1e-12 * np.abs(difference).max(initial=0.0)] = 0.0
    return np.asarray(residuals.mean(axis=0))


def _spillover(
    focal: str,
    rows: Integers,
    values: Floats,
    exposure: Exposure,
    variants: Variants,
    design: Design,
    assigned: Integers,
    draws: Integers,
) -> Spillover:
    deltas = replayed_deltas(exposure, variants, design, np.concatenate([assigned[None], draws]), rows)
    # The draw itself belongs to the mean: under the null it is one of them.
    mean = deltas.mean(axis=0)
    test = replay_test(deltas[0] - mean, deltas[1:] - mean, values, None)
    if np.ptp(values) <= 1e-12 * np.abs(values).max():
        return Spillover(focal, test, 0.0, 1.0, float(mean.mean()))
    frame = pd.DataFrame({"value": values, "density": deltas[0]})
    naive = fit(frame, ["density"], binary=False)["density"]
    return Spillover(focal, test, naive.estimate, naive.p_value, float(mean.mean()))


def spillover_bins(
    outcome: Outcome,
    exposure: Exposure,
    variants: Variants,
    design: Design,
    assigned: Integers,
    base_density: Floats,
    *,
    replays: int = 2000,
    seed: int = 0,
    bins: int = 6,
    fewest: int = 30,
) -> pd.DataFrame:
    """The first of the tests of `spillover` as a curve: untreated items in bins of equal number by their
    exposure less its mean over the replays, and what the same bins show under replayed assignments.

    Returns:
        outcome, focal, x (mean exposure of the bin), estimate (mean of the outcome, adjusted), ci_low,
        ci_high, null_low, null_high (95 % of the replays), n; no rows with fewer than `fewest` items.
    """
    random = np.random.default_rng([seed, 12])
    focal, rows = "held back", np.flatnonzero((assigned < 0) & outcome.known)
    if len(rows) >= fewest:
        draws = design.draw(random, replays)
    else:
        focal, rows = "untreated", np.flatnonzero((design.doses[assigned] == 0) & outcome.known)
        if len(rows) < fewest:
            return pd.DataFrame()
        draws = design.redraw_treated(random, assigned, replays)
    values = adjusted(outcome, base_density, rows)
    deltas = replayed_deltas(exposure, variants, design, np.concatenate([assigned[None], draws]), rows)
    deltas -= deltas.mean(axis=0)
    edges = np.linspace(0, len(rows), bins + 1).astype(np.int64)
    order = np.argsort(deltas, axis=1, kind="stable")
    means = np.array([[values[row[low:high]].mean() for low, high in pairwise(edges)] for row in order])
    low_band, high_band = np.quantile(means[1:], [0.025, 0.975], axis=0)
    found = []
    for number, (low, high) in enumerate(pairwise(edges)):
        inside = order[0, low:high]
        about = _mean_interval(values[inside], None)
        found.append(
            {
                "outcome": outcome.name,
                "focal": focal,
                "x": float(deltas[0, inside].mean()),
                "estimate": about["mean"],
                "ci_low": about["ci_low"],
                "ci_high": about["ci_high"],
                "null_low": float(low_band[number]),
                "null_high": float(high_band[number]),
                "n": len(inside),
            }
        )
    return pd.DataFrame(found)


# --- binary outcomes ---


def mcnemar_tests(outcome: Outcome, design: Design, assigned: Integers) -> pd.DataFrame:
    """Exact McNemar tests of a binary outcome by cell and pair of arms.

    Returns:
        outcome, kind, dose, seed, n, control (share right), treatment, gained, lost, p_value.
    """
    from statsmodels.stats.contingency_tables import mcnemar

    rows = []
    for (kind, dose), mask in rows_of_cells(design, assigned).items():
        mask = mask & outcome.known
        for seed in range(outcome.seeds):
            before, after = outcome.control[seed, mask] > 0.5, outcome.treatment[seed, mask] > 0.5
            if not len(before):
                continue
            table = [
                [int((before & after).sum()), int((before & ~after).sum())],
                [int((~before & after).sum()), int((~before & ~after).sum())],
            ]
            rows.append(
                {
                    "outcome": outcome.name,
                    "kind": kind,
                    "dose": dose,
                    "seed": seed,
                    "n": len(before),
                    "control": float(before.mean()),
                    "treatment": float(after.mean()),
                    "gained": table[1][0],
                    "lost": table[0][1],
                    "p_value": float(mcnemar(table, exact=True).pvalue),
                }
            )
    return pd.DataFrame(rows)


# --- mediation ---


def mediation(
    outcome: Outcome,
    delta_density: Floats,
    design: Design,
    assigned: Integers,
    *,
    draws: int = 2000,
    seed: int = 0,
    most: float = 0.9,
) -> dict[str, Any]:
    """How much of the effect of log(1 + dose) passes through density, by linear models (Imai, Keele and
    Yamamoto, 2010): indirect = a·b, a of dose on density, b of density on the outcome given dose.

    Block effects are taken out; intervals are by bootstrap over blocks. With linear models the simulation
    of `statsmodels.stats.mediation` has this limit. `sensitivity` is the indirect effect were the errors of
    the two models correlated by ρ, and `rho_zero` the ρ at which it vanishes.

    Returns:
        `refused` (why) where dose and kind all but determine density; else `indirect`, `direct`, `total`,
        each [estimate, low, high], `share`, `rho_zero`, `sensitivity` {ρ: indirect}.
    """
    inside = (assigned >= 0) & outcome.known & np.isfinite(delta_density)
    rows = np.flatnonzero(inside)
    block = design.block[rows]
    labels = pd.Series([str(design.cells[cell]) for cell in assigned[rows]], name="cell")
    m = delta_density[rows]
    means = pd.Series(m).groupby(labels).transform("mean").to_numpy()
    share = 1 - float(((m - means) ** 2).sum() / ((m - m.mean()) ** 2).sum())
    if share > most:
        return {
            "refused": f"dose and kind explain {share:.0%} of the change of log density: its effect can't be"
            " told from theirs",
            "explained": share,
        }
    t = _centred(np.log1p(design.doses[assigned[rows]].astype(np.float64)), block)
    m, y = _centred(m, block), _centred(outcome.delta[rows], block)

    def paths(w: Floats) -> Floats:
        tt, tm, ty = (w * t * t).sum(), (w * t * m).sum(), (w * t * y).sum()
        mm, my = (w * m * m).sum(), (w * m * y).sum()
        a, total = tm / tt, ty / tt
        b = (my - tm * ty / tt) / (mm - tm * tm / tt)
        return np.array([a * b, total - a * b, total])

    estimate = paths(np.ones(len(rows)))
    random = np.random.default_rng([seed, 13])
    codes = np.unique(block, return_inverse=True)[1]
    count = int(codes.max()) + 1
    boot = np.array(
        [
            paths(np.bincount(random.integers(count, size=count), minlength=count)[codes].astype(np.float64))
            for _ in range(draws)
        ]
    )
    low, high = np.quantile(boot, [0.025, 0.975], axis=0)
    a = float((t @ m) / (t @ t))
    e_m, e_y = m - a * t, y - estimate[2] * t
    rho_hat = float(np.corrcoef(e_m, e_y)[0, 1])
    ratio = float(e_y.std() / e_m.std())

    def at(rho: float) -> float:
        return float(a * ratio * (rho_hat - rho * np.sqrt((1 - rho_hat**2) / (1 - rho**2))))

    names = ("indirect", "direct", "total")
    result: dict[str, Any] = {
        name: [float(estimate[i]), float(low[i]), float(high[i])] for i, name in enumerate(names)
    }
    return result | {
        "explained": share,
        "share": float(estimate[0] / estimate[2]) if estimate[2] else None,
        "rho_zero": rho_hat,
        "sensitivity": {f"{step / 10:+.1f}": at(step / 10) for step in range(-8, 9, 2)},
    }


# --- calibration ---


def calibrate(
    values: Floats,
    exposure: Exposure,
    variants: Variants,
    design: Design,
    *,
    assignments: int = 2000,
    replays: int = 199,
    seed: int = 0,
) -> dict[str, float]:
    """Share of re-randomised assignments in which each test rejects at 5 % on an outcome that none of them
    changed: the tests of claim B and of spillover must reject 5 %, the naive one shows what it would have
    cost.

    Args:
        values: (n,) a null outcome, such as the difference of two control arms.
        exposure, variants, design: of the experiment.
        assignments: how many are drawn.
        replays: of each test.
        seed: of the draws.
    """
    random = np.random.default_rng([seed, 14])
    known = np.isfinite(values)
    rows = np.flatnonzero((design.block >= 0) & known)
    held = np.flatnonzero((design.block < 0) & known)
    rejected: dict[str, int] = {}

    def note(name: str, p: float) -> None:
        rejected[name] = rejected.get(name, 0) + (p <= 0.05)

    for _ in range(assignments):
        assigned = design.draw(random)
        draws = design.draw(random, replays)
        if len(rows):
            tests = _effect_tests(values[rows], rows, exposure, variants, design, assigned, draws)
            for name, test in tests.items():
                note(name, test.p_value)
        if len(held) >= 10:
            found = _spillover("held back", held, values[held], exposure, variants, design, assigned, draws)
            note("spillover, held back", found.test.p_value)
            note("spillover, naive", found.naive_p)
        untreated = np.flatnonzero((design.doses[assigned] == 0) & known)
        conditional = design.redraw_treated(random, assigned, replays)
        found = _spillover(
            "untreated", untreated, values[untreated], exposure, variants, design, assigned, conditional
        )
        note("spillover, untreated", found.test.p_value)
    return {name: count / assignments for name, count in rejected.items()} | {"assignments": assignments}


def mean_change(frame: pd.DataFrame, kind: str, dose: int, column: str) -> float:
    """A number of one cell of a table of cells."""
    chosen = frame[(frame["kind"] == kind) & (frame["dose"] == dose)]
    return float(chosen[column].iloc[0])


def is_monotone(responses: pd.DataFrame) -> dict[str, bool]:
    """By kind: whether medians rise with the dose, from the untreated on."""
    none = responses[responses["kind"] == NONE]["median"].tolist()
    found: dict[str, bool] = {}
    for kind in dict.fromkeys(responses["kind"]):
        if kind in (NONE, "held back"):
            continue
        rows = responses[responses["kind"] == kind].sort_values("dose")
        medians: Sequence[float] = [*none, *rows["median"]]
        found[kind] = bool(np.all(np.diff(medians) > 0))
    return found
