"""Interventions: assignments and their replay, exact changes of density, and what the analysis recovers."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmd3.analysis import intervention
from lmd3.analysis.assignment import Design, Exposure, Variants, block_items, cells_of
from lmd3.analysis.intervention import Outcome
from lmd3.errors import ParameterError
from lmd3.experiments.leak_density import log_kernels, log_sum


def make_design(blocks: int, held: int, kinds=("paraphrase", "exact"), doses=(0, 1, 4, 16)) -> Design:
    cells = cells_of(kinds, doses, 2)
    block = np.concatenate([np.repeat(np.arange(blocks), len(cells)), np.full(held, -1)])
    return Design(cells, np.random.default_rng(5).permutation(block).astype(np.int64))


class World:
    """Items, base and variants as points near a sphere, with the exposure at one bandwidth."""

    def __init__(self, blocks: int = 20, held: int = 60, h: float = 0.15, d: int = 12, seed: int = 0) -> None:
        random = np.random.default_rng(seed)

        def unit(x: np.ndarray) -> np.ndarray:
            return x / np.linalg.norm(x, axis=1, keepdims=True)

        self.design = make_design(blocks, held)
        n = len(self.design.block)
        self.items = unit(random.normal(size=(n, d)) + 0.8)
        self.base_rows = unit(random.normal(size=(800, d)) + 0.8)
        inside = np.flatnonzero(self.design.block >= 0)
        self.variants = Variants(np.tile(inside, 2), np.repeat([0, 1], len(inside)))
        near = unit(self.items[inside] + 0.1 * random.normal(size=(len(inside), d)))
        self.rows = np.concatenate([near, self.items[inside]])
        self.placebos = unit(random.normal(size=(len(inside), d)) + 0.8)
        self.h = h
        base = log_sum(
            log_kernels("exponential", h, self.items, self.base_rows), np.ones(800, dtype=np.int64)
        )
        placebo = log_sum(
            log_kernels("exponential", h, self.items, self.placebos), np.full(len(inside), 4, dtype=np.int64)
        )
        kernel = log_kernels("exponential", h, self.items, self.rows)
        self.exposure = Exposure(base, np.logaddexp(base, placebo)[None], kernel)
        self.base_density = base - np.log(800)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


# --- assignments ---


@given(st.integers(1, 8), st.integers(0, 9), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_every_block_holds_every_cell_once(blocks: int, held: int, seed: int) -> None:
    design = make_design(blocks, held)
    for assigned in design.draw(np.random.default_rng(seed), 3):
        assert ((assigned < 0) == (design.block < 0)).all()
        for number in range(blocks):
            assert sorted(assigned[design.block == number]) == list(range(len(design.cells)))


def test_draws_are_uniform() -> None:
    design = make_design(3, 4)
    draws = design.draw(np.random.default_rng(0), 20000)
    for item in np.flatnonzero(design.block >= 0):
        share = np.bincount(draws[:, item], minlength=8) / len(draws)
        assert np.abs(share - 1 / 8).max() < 0.012


def test_redraws_keep_the_untreated() -> None:
    design = make_design(6, 3)
    random = np.random.default_rng(1)
    assigned = design.draw(random)
    redrawn = design.redraw_treated(random, assigned, 500)
    untreated = design.doses[assigned] == 0
    assert (redrawn[:, untreated] == assigned[untreated]).all()
    assert (design.doses[redrawn[:, ~untreated]] > 0).all()
    for draw in redrawn[:20]:
        for number in range(6):
            assert sorted(draw[design.block == number]) == list(range(8))
    assert len({tuple(draw) for draw in redrawn}) > 490


def test_blocks_are_of_one_group_and_like_density() -> None:
    random = np.random.default_rng(0)
    density = random.normal(size=100)
    groups = ["a"] * 41 + ["b"] * 59
    may = random.random(100) < 0.9
    block = block_items(density, groups, 8, random, eligible=may, hold_back=0.1)
    assert (block[~may] == -1).all()
    for number in range(block.max() + 1):
        inside = np.flatnonzero(block == number)
        assert len(inside) == 8 and len({groups[i] for i in inside}) == 1
    first = [density[block == number] for number in range(block.max() + 1) if (block == number)[:41].any()]
    for low, high in itertools.pairwise(first):
        assert low.max() <= high.min()


def test_an_uneven_block_is_refused() -> None:
    with pytest.raises(ParameterError, match="every block"):
        Design(cells_of(["exact"], [1], 1), np.array([0, 0, 1]))


@pytest.mark.parametrize(
    ("dose", "expected"), [(1, [1, 0, 0]), (3, [1, 1, 1]), (4, [2, 1, 1]), (8, [3, 3, 2])]
)
def test_doses_go_through_the_variants_in_turn(dose: int, expected: list[int]) -> None:
    design = Design(cells_of(["p"], [dose], 1), np.array([0, 0]))
    variants = Variants(np.array([1, 1, 1, 0, 0]), np.zeros(5, dtype=np.int64))
    assert variants.multiplicity(design, np.array([0, 1])).tolist() == [*expected, 0, 0]


# --- density from sums ---


def test_changes_equal_a_recomputation_from_scratch(world: World) -> None:
    from sklearn.neighbors import KernelDensity

    assigned = world.design.draw(np.random.default_rng(3))
    copies = world.variants.multiplicity(world.design, assigned)
    treated = np.concatenate([world.base_rows, np.repeat(world.rows, copies, axis=0)])
    control = np.concatenate([world.base_rows, np.repeat(world.placebos, 4, axis=0)])

    def sums(rows: np.ndarray) -> np.ndarray:
        kde = KernelDensity(kernel="exponential", bandwidth=world.h, atol=0, rtol=0).fit(rows)
        constant = KernelDensity(kernel="exponential", bandwidth=world.h).fit(np.zeros((1, rows.shape[1])))
        return (
            kde.score_samples(world.items)
            - constant.score_samples(np.zeros((1, rows.shape[1])))
            + np.log(len(rows))
        )

    expected = sums(treated) - sums(control)
    np.testing.assert_allclose(world.exposure.delta(copies), expected, atol=1e-6)
    own = world.exposure.own(world.variants, copies, np.arange(len(world.items)))
    for item in (0, 7, 100):
        rest = np.where(world.variants.item == item, 0, copies)
        without = world.exposure.log_sums(rest)[item]
        assert own[item] == pytest.approx(world.exposure.log_sums(copies)[item] - without, abs=1e-9)


def test_many_assignments_at_once_are_those_one_by_one(world: World) -> None:
    draws = world.design.draw(np.random.default_rng(3), 5)
    together = intervention.replayed_deltas(world.exposure, world.variants, world.design, draws)
    for draw, found in zip(draws, together, strict=True):
        alone = world.exposure.delta(world.variants.multiplicity(world.design, draw))
        np.testing.assert_allclose(found, alone, atol=1e-10)


def test_tiny_bandwidths_do_not_overflow() -> None:
    world = World(blocks=4, held=5, h=0.001)
    copies = world.variants.multiplicity(world.design, world.design.draw(np.random.default_rng(0)))
    assert np.isfinite(world.exposure.delta(copies)).all()
    assert (world.exposure.delta(copies)[world.design.block >= 0] > 50).any()


# --- planted truth ---


def planted(
    world: World, random: np.random.Generator, slope: float, direct: dict[str, float], noise: float = 0.2
):
    assigned = world.design.draw(random)
    delta = world.exposure.delta(world.variants.multiplicity(world.design, assigned))
    labels = [str(world.design.cells[cell]) if cell >= 0 else "none" for cell in assigned]
    effect = np.array([direct.get(label, 0.0) for label in labels])
    n = len(assigned)
    control = 3.0 + 0.3 * random.normal(size=(2, n))
    change = slope * delta + effect
    treatment = control + change + noise * random.normal(size=(2, n))
    return assigned, delta, Outcome("loss", control, treatment)


DIRECT = {"paraphrase × 1": -0.1, "paraphrase × 16": -0.5, "exact × 4": -0.4, "exact × 16": -0.9}


def _recovered(world: World, seed: int) -> tuple[bool, list[bool]]:
    random = np.random.default_rng([7, seed])
    assigned, delta, outcome = planted(world, random, -0.2, DIRECT)
    table = intervention.slopes(outcome, delta, world.base_density, world.design, assigned)
    row = table[(table["model"] == "within cells") & (table["sample"] == "all")].iloc[0]
    frame = pd.DataFrame({"value": outcome.delta, "density": delta})[assigned >= 0].reset_index(drop=True)
    labels = pd.Series([str(world.design.cells[c]) for c in assigned[assigned >= 0]], name="cell")
    terms = []
    for label in DIRECT:
        frame[label] = (labels == label).astype(float)
        terms.append(label)
    found = intervention.fit(frame, ["density", *terms], binary=False)
    direct = [found[t].ci_low <= DIRECT[t] <= found[t].ci_high for t in terms]
    return bool(row["ci_low"] <= -0.2 <= row["ci_high"]), direct


def test_planted_effects_are_recovered(world: World) -> None:
    found = [_recovered(world, seed) for seed in range(12)]
    assert sum(density for density, _ in found) >= 9
    assert sum(sum(direct) for _, direct in found) >= 40


@pytest.mark.slow
def test_planted_effects_are_covered(world: World) -> None:
    found = [_recovered(world, seed) for seed in range(500)]
    density = np.mean([hit for hit, _ in found])
    direct = np.mean([hit for _, hits in found for hit in hits])
    print(f"coverage over 500 replicates: density-borne {density:.3f}, direct {direct:.3f}")
    assert 0.92 <= density <= 0.98
    assert 0.92 <= direct <= 0.98


def test_cells_show_the_planted_effects(world: World) -> None:
    random = np.random.default_rng(1)
    assigned, _, outcome = planted(world, random, 0.0, {"exact × 16": -1.0}, noise=0.1)
    cells = intervention.cell_effects(outcome, world.design, assigned)
    assert intervention.mean_change(cells, "exact", 16, "effect") == pytest.approx(-1.0, abs=0.12)
    assert abs(intervention.mean_change(cells, "none", 0, "mean")) < 0.05
    assert abs(intervention.mean_change(cells, "held back", 0, "mean")) < 0.05
    tests = intervention.effect_tests(
        outcome, world.exposure, world.variants, world.design, assigned, replays=999
    )
    assert tests["dose"].p_value == 0.001
    assert len(tests["dose"].null) == 999


def test_three_seeds_widen_the_interval() -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=(3, 50)) * 0.01 + np.array([[-0.5], [0.0], [0.5]])
    narrow = intervention._mean_interval(values.mean(axis=0), None)
    wide = intervention._mean_interval(values.mean(axis=0), values)
    assert wide["std_error"] == pytest.approx(0.5 / np.sqrt(3), rel=0.01)
    assert narrow["std_error"] < 0.01


def test_three_seeds_widen_slopes_and_effects_by_what_items_do_not_explain(world: World) -> None:
    random = np.random.default_rng(0)
    assigned, delta, _ = planted(world, random, 0.0, {})
    n = len(assigned)
    treated = world.design.doses[assigned] > 0

    def errors(gain: list[float]) -> tuple[float, float]:
        """Of the overall slope and of a cell's effect, where seed s gains that much by leaked texts."""
        noise = np.random.default_rng(1).normal(size=(len(gain), n)) * 0.1
        change = noise + np.array(gain)[:, None] * np.where(treated, delta, 0.0)
        outcome = Outcome("loss", np.zeros((len(gain), n)), change)
        table = intervention.slopes(outcome, delta, world.base_density, world.design, assigned)
        row = table[(table["model"] == "overall") & (table["sample"] == "all")].iloc[0]
        cells = intervention.cell_effects(outcome, world.design, assigned)
        return float(row["std_error"]), intervention.mean_change(cells, "exact", 16, "effect_error")

    alike, apart = errors([-0.3] * 3), errors([-0.5, -0.3, -0.1])
    # The seeds' slopes have a standard deviation of 0.2, that of their mean is 0.2/√3.
    assert alike[0] < 0.02 and apart[0] == pytest.approx(0.2 / np.sqrt(3), rel=0.1)
    assert apart[1] > 3 * alike[1]


def test_spillover_that_is_there_is_found() -> None:
    world = World(blocks=30, held=300, h=0.25)
    random = np.random.default_rng(2)
    assigned, _, outcome = planted(world, random, -3.0, {}, noise=0.01)
    found = intervention.spillover(
        outcome, world.exposure, world.variants, world.design, assigned, world.base_density, replays=999
    )
    assert [s.focal for s in found] == ["held back", "untreated"]
    assert found[0].test.p_value < 0.01
    assert found[0].test.slope == pytest.approx(-3.0, abs=0.8)


def test_bins_show_spillover_beyond_what_replays_do() -> None:
    world = World(blocks=30, held=300, h=0.25)
    for slope, random in ((-3.0, np.random.default_rng(2)), (0.0, np.random.default_rng(3))):
        assigned, _, outcome = planted(world, random, slope, {}, noise=0.01)
        bins = intervention.spillover_bins(
            outcome, world.exposure, world.variants, world.design, assigned, world.base_density, replays=999
        )
        assert (bins["n"] == 50).all() and (np.diff(bins["x"]) > 0).all()
        beyond = (bins["estimate"] < bins["null_low"]) | (bins["estimate"] > bins["null_high"])
        if slope:
            assert beyond.iloc[[0, -1]].all() and bins["estimate"].iloc[0] > bins["estimate"].iloc[-1]
        else:
            assert beyond.sum() <= 1


def test_exposure_alone_is_no_spillover(world: World) -> None:
    # An outcome that follows an item's mean exposure, whatever the draw: the naive test is fooled.
    draws = world.design.draw(np.random.default_rng(9), 400)
    mean = intervention.replayed_deltas(world.exposure, world.variants, world.design, draws).mean(axis=0)
    random = np.random.default_rng(4)
    noise = random.normal(size=len(mean))
    outcome = Outcome("loss", np.zeros((1, len(mean))), (20 * (mean - mean.mean()) + 0.3 * noise)[None])
    assigned = world.design.draw(random)
    found = intervention.spillover(
        outcome, world.exposure, world.variants, world.design, assigned, 0 * mean, replays=999
    )[0]
    assert found.naive_p < 1e-4
    assert found.test.p_value > 0.01


def test_replays_give_fishers_p_value() -> None:
    # Ten items in one block of two cells have C(10, 5)-like many draws: here all are listed by hand.
    x = np.array([1.0, 0.0])
    test = intervention.replay_test(x, np.array([[1.0, 0.0], [0.0, 1.0]] * 50), np.array([2.0, 1.0]), None)
    assert test.p_value == 1.0
    random = np.random.default_rng(0)
    y = np.arange(8.0)
    observed = (y > 3).astype(float)
    replays = np.array([random.permutation(observed) for _ in range(19999)])
    test = intervention.replay_test(observed, replays, y, None)
    assert test.p_value == pytest.approx(2 / 70, abs=0.005)


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_an_outcome_without_variation_shows_nothing(world: World, value: float) -> None:
    n = len(world.items)
    outcome = Outcome("extracted", np.zeros((2, n)), np.full((2, n), value))
    assigned = world.design.draw(np.random.default_rng(0))
    arguments = (outcome, world.exposure, world.variants, world.design, assigned)
    tests = intervention.effect_tests(*arguments, replays=99)
    assert {test.p_value for test in tests.values()} == {1.0}
    for found in intervention.spillover(*arguments, world.base_density, replays=99):
        assert (found.test.p_value, found.naive_p) == (1.0, 1.0)
    assert intervention.slopes(outcome, world.base_density, world.base_density, world.design, assigned).empty


def test_mcnemar_counts_pairs() -> None:
    design = Design(cells_of(["exact"], [1], 1), np.repeat(np.arange(20), 2))
    assigned = np.tile([0, 1], 20)
    control = np.zeros((1, 40))
    treatment = np.where(assigned == 1, 1.0, 0.0)[None].copy()
    control[0, :4] = 1.0
    treatment[0, 0] = 0.0
    table = intervention.mcnemar_tests(Outcome("correct", control, treatment, True), design, assigned)
    row = table[table["kind"] == "exact"].iloc[0]
    assert (row["gained"], row["lost"], row["n"]) == (18, 0, 20)
    assert row["p_value"] == pytest.approx(2 * 0.5**18)


def test_mediation_matches_statsmodels_and_refuses_a_copy(world: World) -> None:
    import statsmodels.api as sm
    from statsmodels.stats.mediation import Mediation

    random = np.random.default_rng(3)
    assigned, _, _ = planted(world, random, 0.0, {})
    dose = np.log1p(world.design.doses[assigned].astype(float))
    density = 0.5 * dose + random.normal(size=len(dose))
    change = -0.3 * density - 0.1 * dose + 0.3 * random.normal(size=len(dose))
    outcome = Outcome("loss", np.zeros((1, len(dose))), change[None])
    found = intervention.mediation(outcome, density, world.design, assigned)
    inside = assigned >= 0
    block = world.design.block[inside]

    def centred(x: np.ndarray) -> np.ndarray:
        return x - pd.Series(x).groupby(block).transform("mean").to_numpy()

    t, m, y = (centred(x[inside]) for x in (dose, density, change))
    frame = pd.DataFrame({"t": t, "m": m, "y": y})
    np.random.seed(0)
    peer = Mediation(
        sm.OLS.from_formula("y ~ t + m", frame), sm.OLS.from_formula("m ~ t", frame), "t", "m"
    ).fit(n_rep=100)
    summary = peer.summary()
    assert found["indirect"][0] == pytest.approx(summary.loc["ACME (average)", "Estimate"], abs=0.03)
    assert found["direct"][0] == pytest.approx(summary.loc["ADE (average)", "Estimate"], abs=0.03)
    assert found["indirect"][1] < -0.15 < found["indirect"][2]
    assert found["sensitivity"]["+0.0"] == pytest.approx(found["indirect"][0], abs=1e-9)
    refused = intervention.mediation(outcome, dose * 1.0, world.design, assigned)
    assert "can't be told from theirs" in refused["refused"]


# --- calibration ---


@pytest.mark.slow
def test_rejections_of_a_null_outcome() -> None:
    world = World(blocks=12, held=80)
    # Related to the items' place and density, as real outcomes are, but to no assignment.
    values = (
        world.items[:, 0] + 0.3 * world.base_density + np.random.default_rng(6).normal(size=len(world.items))
    )
    found = intervention.calibrate(values, world.exposure, world.variants, world.design)
    print(found)
    for name in ("dose", "density", "spillover, held back", "spillover, untreated"):
        assert 0.035 <= found[name] <= 0.065, name


def test_calibration_counts_rejections() -> None:
    world = World(blocks=6, held=30)
    values = np.random.default_rng(6).normal(size=len(world.items))
    found = intervention.calibrate(
        values, world.exposure, world.variants, world.design, assignments=60, replays=39
    )
    assert found["assignments"] == 60
    for name in ("dose", "density", "spillover, held back", "spillover, untreated"):
        assert found[name] <= 0.15
