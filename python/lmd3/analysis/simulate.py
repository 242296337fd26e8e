"""Calibration: how often the tests of lmd3 reject a true null, cover the truth and find what is planted.

Every scenario draws data whose truth is known, runs the estimators that `lmd3 analyze` uses (`slope`,
`decide`, `calibrated`, `simex`, `max_t`, `support`) and beside them the easy test that a paper would use
without care.
`python -m lmd3.analysis.simulate` writes the table of docs/calibration.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from scipy import special, stats

from lmd3.analysis import few_clusters, measurement, multiplicity, support
from lmd3.analysis.inference import decide, sandwich
from lmd3.analysis.regression import Estimate
from lmd3.analysis.slope import Data, slope

REPLICATES = 2_000
#: Draws of the wild bootstraps inside a replicate (9,999 in a study).
DRAWS = 399
NOMINAL = 0.05
#: What must hold: type-I error, coverage, and the distance of power from its prediction.
TYPE_ONE, COVERAGE, POWER = (0.035, 0.065), (0.93, 0.97), 0.05


@dataclass(frozen=True)
class Draw:
    """One replicate.

    Attributes:
        data: the rows.
        controls: (n, k) of the headline model.
        x: (n,) the predictor.
        truth: the slope to cover.
        clusters: codes, or None.
        naive_x: (n, j) controls of the easy test.
    """

    data: Data
    controls: np.ndarray
    x: np.ndarray
    truth: float
    clusters: np.ndarray | None
    naive_x: np.ndarray


def _none(n: int) -> np.ndarray:
    return np.empty((n, 0))


def _groups(rng: np.random.Generator, count: int, n: int, unequal: bool) -> np.ndarray:
    if not unequal:
        return np.repeat(np.arange(count), n // count)
    share = rng.lognormal(0.0, 0.8, count)
    sizes = np.maximum(10, np.round(share / share.sum() * n).astype(int))
    return np.repeat(np.arange(count), sizes)


def _outcome(rng: np.random.Generator, linear: np.ndarray, binary: bool, noise: float = 1.0) -> np.ndarray:
    if binary:
        return np.asarray(rng.random(len(linear)) < special.expit(linear), dtype=np.float64)
    return linear + noise * rng.standard_normal(len(linear))


def intercepts(
    rng: np.random.Generator,
    count: int,
    n: int,
    binary: bool,
    within: bool,
    effect: float,
    unequal: bool = True,
) -> Draw:
    """Groups differ in level and in density (intraclass correlation .7 of the latent outcome)."""
    code = _groups(rng, count, n, unequal)
    rows = len(code)
    x = np.sqrt(0.5) * rng.standard_normal(count)[code] + np.sqrt(0.5) * rng.standard_normal(rows)
    noise = np.pi / np.sqrt(3) if binary else 1.0
    level = np.sqrt(0.7 / 0.3) * noise * rng.standard_normal(count)[code]
    y = _outcome(rng, level + effect * x, binary)
    if binary and within:
        keep = np.isin(code, [c for c in range(count) if 0 < y[code == c].mean() < 1])
        code, x, y = np.unique(code[keep], return_inverse=True)[1], x[keep], y[keep]
    data = Data(y, binary, None, code if within else None)
    return Draw(data, _none(len(y)), x, effect, code, _none(len(y)))


def slopes(rng: np.random.Generator, count: int, n: int, binary: bool) -> Draw:
    """Each group has a slope of its own, of mean zero."""
    code = _groups(rng, count, n, False)
    x = rng.standard_normal(len(code))
    own = 0.5 * rng.standard_normal(count)
    y = _outcome(rng, own[code] * x + 0.5 * rng.standard_normal(count)[code], binary)
    return Draw(Data(y, binary, None, code), _none(len(y)), x, 0.0, code, _none(len(y)))


def confounded(rng: np.random.Generator, n: int, binary: bool, how_alike: float, clusters: int) -> Draw:
    """The outcome depends on a control that density goes along with (length, typicality), not on density."""
    code = _groups(rng, clusters, n, False)
    rows = len(code)
    control = rng.standard_normal(rows)
    x = how_alike * control + np.sqrt(1 - how_alike**2) * rng.standard_normal(rows)
    y = _outcome(rng, 0.4 * control + 0.5 * rng.standard_normal(clusters)[code], binary)
    return Draw(Data(y, binary), control[:, None], x, 0.0, code, _none(rows))


def spillover(rng: np.random.Generator, count: int, n: int) -> Draw:
    """A leak lifts all items of a benchmark and, apart from that, their densities; density does nothing."""
    code = _groups(rng, count, n, False)
    dose = rng.integers(0, 3, count).astype(np.float64)
    x = 0.6 * dose[code] + 0.5 * rng.standard_normal(len(code))
    y = 0.4 * dose[code] + 0.5 * rng.standard_normal(count)[code] + rng.standard_normal(len(code))
    return Draw(Data(y, False, None, code), _none(len(y)), x, 0.0, code, _none(len(y)))


def heteroskedastic(rng: np.random.Generator, n: int, effect: float) -> Draw:
    """No groups; noise that grows with density."""
    x = rng.standard_normal(n)
    y = effect * x + (0.5 + 0.5 * np.abs(x)) * rng.standard_normal(n)
    return Draw(Data(y, False), _none(n), x, effect, None, _none(n))


# --- one replicate of each kind of scenario: (rejected, covered, naive rejected, estimate, error) ---


def _test(draw: Draw, seed: int) -> tuple[float, ...]:
    x = np.column_stack([draw.controls, draw.x])
    of = slope(draw.data, x)
    judged = decide(of, x, sandwich(of, draw.clusters), draw.clusters, DRAWS, seed, intervals=False)
    found = judged.estimate
    covered = found.ci_low <= draw.truth <= found.ci_high
    if judged.few and draw.clusters is not None:
        # An interval by inversion holds what is not rejected: one test instead of eighty.
        covered = (
            found.p_value
            if draw.truth == 0
            else few_clusters.p_value_at(draw.data, x, of, draw.clusters, draw.truth, DRAWS, seed)
        ) >= NOMINAL
    easy = slope(Data(draw.data.y, draw.data.binary), np.column_stack([draw.naive_x, draw.x]))
    naive = _model_based(easy)
    return (
        found.p_value < NOMINAL,
        covered,
        naive.p_value < NOMINAL,
        found.estimate,
        found.std_error,
        found.smallest_detectable / (found.std_error or 1.0),
    )


def _model_based(of: object) -> Estimate:
    from lmd3.analysis.slope import Slope

    assert isinstance(of, Slope)
    n = len(of.x)
    scale = 1.0 if of.data.binary else float(of.weights @ of.rest**2) / (n - of.parameters)
    error = float(np.sqrt(scale / of.information))
    t = of.estimate / error
    p = float(2 * stats.norm.sf(abs(t)))
    return Estimate(of.estimate, error, t, p, of.estimate - 1.96 * error, of.estimate + 1.96 * error, None)


def _noisy(
    rng: np.random.Generator, reliability: float, binary: bool, how: str, seed: int
) -> tuple[float, ...]:
    """Error in x: the partial reliability is `reliability`; the truth is .3."""
    n, clusters, effect = 800, 80, 0.3
    code = np.repeat(np.arange(clusters), n // clusters)
    control = rng.standard_normal(n)
    own = rng.standard_normal(n)
    x = 0.6 * control + 0.8 * own
    # Var(measured | control) = .64 + σ²; λ = .64 / (.64 + σ²).
    sigma = np.sqrt(0.64 * (1 - reliability) / reliability)
    # Errors differ between queries, as those of sampled densities do.
    errors = sigma * np.sqrt(rng.gamma(4.0, 0.25, n))
    y = _outcome(rng, effect * x + 0.3 * control + 0.4 * rng.standard_normal(clusters)[code], binary)
    data = Data(y, binary)
    design = np.column_stack([control, x + errors * rng.standard_normal(n)])
    of = slope(data, design)
    plain = sandwich(of, code)
    if how == "simex":
        found = measurement.simex(data, design, errors, code, 20, seed)[0]
    else:
        found = measurement.calibrated(of, design, errors, code)
    # A level of .4 in a logit that leaves it out shrinks the slope: the truth is the marginal one.
    truth = effect / np.sqrt(1 + 0.346 * 0.16) if binary else effect
    covered = found.ci_low <= truth <= found.ci_high
    naive = plain.ci_low <= truth <= plain.ci_high
    return (found.estimate / truth, covered, naive, plain.estimate / truth, found.std_error)


def _family(rng: np.random.Generator, clustered: bool, seed: int) -> tuple[float, ...]:
    """Sixteen looks at a null: any below .05 adjusted, any below .05 plain."""
    n, count = 400, 50
    code = np.repeat(np.arange(count), n // count)
    common = rng.standard_normal((n, 1))
    x = 0.8 * common + 0.6 * rng.standard_normal((n, 16))
    level = 0.7 * rng.standard_normal(count)[code] if clustered else 0.0
    data = Data(level + rng.standard_normal(n), False, None, code)
    base = rng.standard_normal((n, 1))
    clusters = code if clustered else None
    found = multiplicity.max_t(data, base, x, clusters, None, DRAWS, seed)
    plain = [sandwich(slope(data, np.column_stack([base, column])), clusters).p_value for column in x.T]
    return (found.p_max_t.min() < NOMINAL, min(plain) < NOMINAL)


def _flags(rng: np.random.Generator) -> tuple[float, ...]:
    """Queries like the training rows: the share with a conformal p-value of at most .05."""
    found = support.support(rng.standard_normal(200), rng.standard_normal(500))
    return (float((found.p_value <= NOMINAL).mean()), float(found.unsupported.any()))


@dataclass(frozen=True)
class Scenario:
    """A row of the table: `kind` is null, power, error, family or flags; `make` draws one replicate."""

    name: str
    kind: str
    make: Callable[[np.random.Generator, int], tuple[float, ...]]
    held: bool = True


def _of(
    function: Callable[..., Draw], *options: object
) -> Callable[[np.random.Generator, int], tuple[float, ...]]:
    def run(rng: np.random.Generator, seed: int) -> tuple[float, ...]:
        return _test(function(rng, *options), seed)

    return run


def scenarios() -> list[Scenario]:
    """All rows of the table."""
    found = [
        Scenario(
            "random intercepts, 57 unequal groups, ICC .7, pooled, continuous",
            "null",
            _of(intercepts, 57, 1500, False, False, 0.0),
        ),
        Scenario(
            "random intercepts, 57 unequal groups, ICC .7, pooled, binary",
            "null",
            _of(intercepts, 57, 1500, True, False, 0.0),
        ),
        Scenario(
            "random intercepts, 57 unequal groups, ICC .7, within, continuous",
            "null",
            _of(intercepts, 57, 1500, False, True, 0.0),
        ),
        Scenario(
            "random intercepts, 57 unequal groups, ICC .7, within, binary",
            "null",
            _of(intercepts, 57, 1500, True, True, 0.0),
        ),
        Scenario(
            "random intercepts, 100 equal groups, pooled, continuous",
            "null",
            _of(intercepts, 100, 1000, False, False, 0.0, False),
        ),
        Scenario(
            "random intercepts, 20 equal groups, pooled, continuous",
            "null",
            _of(intercepts, 20, 600, False, False, 0.0, False),
        ),
        Scenario(
            "random intercepts, 8 equal groups, pooled, continuous (Webb)",
            "null",
            _of(intercepts, 8, 400, False, False, 0.0, False),
        ),
        Scenario(
            "random intercepts, 20 equal groups, pooled, binary",
            "null",
            _of(intercepts, 20, 600, True, False, 0.0, False),
        ),
        Scenario(
            "random slopes of mean zero, 50 groups, within, continuous", "null", _of(slopes, 50, 1000, False)
        ),
        Scenario(
            "random slopes of mean zero, 50 groups, within, binary", "null", _of(slopes, 50, 1000, True)
        ),
        Scenario(
            "random slopes of mean zero, 10 groups, within, continuous (Webb)",
            "null",
            _of(slopes, 10, 500, False),
        ),
        Scenario(
            "length only (density correlates .6 with it), continuous",
            "null",
            _of(confounded, 800, False, 0.6, 80),
        ),
        Scenario(
            "length only (density correlates .6 with it), binary", "null", _of(confounded, 800, True, 0.6, 80)
        ),
        Scenario(
            "typicality only (density correlates .95 with it), continuous",
            "null",
            _of(confounded, 800, False, 0.95, 80),
        ),
        Scenario(
            "typicality only (density correlates .95 with it), binary",
            "null",
            _of(confounded, 800, True, 0.95, 80),
        ),
        Scenario("spillover only, 40 benchmarks, within, continuous", "null", _of(spillover, 40, 800)),
        Scenario("noise that grows with density, no groups, HC3", "null", _of(heteroskedastic, 300, 0.0)),
        Scenario(
            "planted .12, 100 groups, within, continuous",
            "power",
            _of(intercepts, 100, 1000, False, True, 0.12, False),
        ),
        Scenario(
            "planted .25, 60 groups, within, binary",
            "power",
            _of(intercepts, 60, 1500, True, True, 0.25, False),
        ),
        Scenario(
            "planted .5, 100 groups, pooled, continuous",
            "power",
            _of(intercepts, 100, 1000, False, False, 0.5, False),
        ),
        Scenario(
            "planted .2, no groups, noise that grows with density", "power", _of(heteroskedastic, 300, 0.2)
        ),
    ]
    for reliability in (0.98, 0.9, 0.7):
        for binary in (False, True):
            for how in ("calibration", "simex"):
                kind = "binary" if binary else "continuous"
                name = "regression calibration" if how == "calibration" else "SIMEX"

                def run(
                    rng: np.random.Generator,
                    seed: int,
                    r: float = reliability,
                    b: bool = binary,
                    h: str = how,
                ) -> tuple[float, ...]:
                    return _noisy(rng, r, b, h, seed)

                found.append(
                    Scenario(
                        f"error in x, λ = {reliability:g}, {kind}, {name}", "error", run, reliability > 0.7
                    )
                )
    found.append(
        Scenario(
            "16 correlated looks, 50 clusters, max-T by sign flips",
            "family",
            lambda rng, seed: _family(rng, True, seed),
        )
    )
    found.append(
        Scenario(
            "16 correlated looks, 50 groups, max-T by Freedman–Lane",
            "family",
            lambda rng, seed: _family(rng, False, seed),
        )
    )
    found.append(
        Scenario("conformal p-values of 200 supported queries", "flags", lambda rng, seed: _flags(rng))
    )
    return found


def replicate(number: int, start: int, count: int, seed: int) -> np.ndarray:
    """(count, …) results of some replicates of one scenario; replicate i is the same in any split."""
    scenario = scenarios()[number]
    rows = []
    for i in range(start, start + count):
        rng = np.random.default_rng([seed, number, i])
        rows.append(scenario.make(rng, i))
    return np.array(rows, dtype=np.float64)


@dataclass(frozen=True)
class Row:
    """A row of the table; NaN where a column does not apply. `fine`: within what must hold."""

    name: str
    kind: str
    replicates: int
    rejected: float
    coverage: float
    naive: float
    predicted: float
    bias: float
    fine: bool
    held: bool


def rates(scenario: Scenario, found: np.ndarray) -> dict[str, float]:
    """The rates of a scenario's replicates: fields of `Row`."""
    mean = [float(r) for r in found.mean(axis=0)]
    if scenario.kind == "null":
        of = {"rejected": mean[0], "coverage": mean[1], "naive": mean[2]}
    elif scenario.kind == "power":
        # What smallest_detectable promises: critical value and error of the replicate.
        errors, factor = found[:, 4], found[:, 5] - 0.8416
        predicted = float(stats.norm.cdf(abs(mean[3]) / errors - factor).mean())
        of = {"rejected": mean[0], "coverage": mean[1], "naive": mean[2], "predicted": predicted}
    elif scenario.kind == "error":
        of = {"bias": mean[0] - 1, "coverage": mean[1], "naive": mean[2]}
    else:
        of = {"rejected": mean[0], "naive": mean[1]}
    return of | {"replicates": len(found)}


def summarised(scenario: Scenario, found: dict[str, float]) -> Row:
    """A row of the table, and whether it is where it must be."""
    nan = float("nan")
    row = Row(
        name=scenario.name,
        kind=scenario.kind,
        replicates=int(found["replicates"]),
        rejected=found.get("rejected", nan),
        coverage=found.get("coverage", nan),
        naive=found.get("naive", nan),
        predicted=found.get("predicted", nan),
        bias=found.get("bias", nan),
        fine=False,
        held=scenario.held,
    )
    fine = True
    if scenario.kind in ("null", "power", "error"):
        fine = COVERAGE[0] <= row.coverage <= COVERAGE[1]
    if scenario.kind in ("null", "family"):
        fine &= TYPE_ONE[0] <= row.rejected <= TYPE_ONE[1]
    if scenario.kind == "flags":
        fine = row.rejected <= TYPE_ONE[1]
    if scenario.kind == "power":
        fine &= abs(row.rejected - row.predicted) <= POWER
    return replace(row, fine=bool(fine))


#: What decides the rows of a kind, beside this file: a kept row of other sources is made anew.
_SOURCES = {
    "null": ("slope", "few_clusters", "inference", "regression"),
    "power": ("slope", "few_clusters", "inference", "regression"),
    "error": ("slope", "measurement"),
    "family": ("slope", "few_clusters", "multiplicity", "ladder"),
    "flags": ("support",),
}


def _settings(scenario: Scenario, replicates: int, seed: int) -> dict[str, object]:
    """What a row was made with."""
    digest = hashlib.sha256()
    for name in _SOURCES[scenario.kind]:
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return {"replicates": replicates, "seed": seed, "draws": DRAWS, "sources": digest.hexdigest()[:16]}


def _kept(path: Path | None) -> Iterator[dict[str, object]]:
    """The lines of a file of rows; a line cut short by a kill is left out."""
    if path is not None and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue


def run(
    replicates: int = REPLICATES,
    seed: int = 0,
    workers: int = 1,
    chosen: list[int] | None = None,
    keep: Path | None = None,
) -> list[Row]:
    """Runs the scenarios (all, or those of these numbers).

    Args:
        replicates: of each scenario.
        seed: of the draws.
        workers: processes.
        chosen: numbers of scenarios, or None for all.
        keep: a file that takes every finished row; rows it holds under the same settings are not made again.
    """
    step = max(1, min(100, replicates))
    everything = scenarios()
    numbers = list(range(len(everything)) if chosen is None else chosen)
    settings = {n: _settings(everything[n], replicates, seed) for n in numbers}
    names = {everything[n].name: n for n in numbers}
    rows: dict[int, Row] = {}
    for line in _kept(keep):
        number = names.get(str(line.get("name")))
        if number is not None and line.get("settings") == settings[number]:
            rows[number] = summarised(everything[number], line["rates"])  # type: ignore[arg-type]
    with ProcessPoolExecutor(workers) as pool:
        jobs = {
            number: [
                pool.submit(replicate, number, start, min(step, replicates - start), seed)
                for start in range(0, replicates, step)
            ]
            for number in numbers
            if number not in rows
        }
        for number, parts in jobs.items():
            scenario = everything[number]
            found = rates(scenario, np.concatenate([part.result() for part in parts]))
            row = rows[number] = summarised(scenario, found)
            if keep is not None:
                with keep.open("a", encoding="utf-8") as file:
                    line = {"name": scenario.name, "settings": settings[number], "rates": found}
                    file.write("\n" + json.dumps(line) + "\n")  # behind what a kill may have cut
            print(f"{'ok ' if row.fine else 'OFF' if row.held else '-  '} {row}", file=sys.stderr, flush=True)
    return [rows[number] for number in numbers]


def page(rows: list[Row], seed: int, seconds: float, cpu: str) -> str:
    """The table as markdown."""

    def cell(x: float, digits: int = 1) -> str:
        return "" if np.isnan(x) else f"{100 * x:.{digits}f} %"

    def table(head: str, kinds: tuple[str, ...], *columns: str) -> list[str]:
        """Lines of a table of some kinds of rows; `columns` are attributes of `Row`."""
        lines = [head, "|---" * head.count(" | ") + "|---|"]
        for row in rows:
            if row.kind in kinds:
                cells = " | ".join(cell(getattr(row, column)) for column in columns)
                lines.append(f"| {row.name} | {cells} | {_mark(row)} |")
        return lines

    return "\n".join(
        [
            "# Calibration: do the tests keep their promises?",
            "",
            "Made by `make calibrate` (`lmd3/analysis/simulate.py`): data of known truth, the estimators of",
            f"`lmd3 analyze`, {rows[0].replicates:,} replicates a row, seed {seed}, bootstraps of {DRAWS}",
            f"draws (9,999 in a study). {datetime.now(UTC):%Y-%m-%d}, {cpu}, {seconds / 60:.0f} minutes.",
            "",
            "A rate of 5 % from 2,000 replicates has a standard error of 0.5 points. What must hold: a true",
            "null is rejected 3.5–6.5 % of the time at a nominal 5 %, intervals of 95 % cover the truth",
            "93–97 % of the time, and the power is within 5 points of what the smallest detectable effect",
            "promises. The naive test has model-based errors, no group effects and none of the controls.",
            "",
            "## A true null",
            "",
            *table(
                "| data | rejected | coverage | naive test rejects | holds |",
                ("null",),
                "rejected",
                "coverage",
                "naive",
            ),
            "",
            "## A planted effect",
            "",
            *table(
                "| data | found | predicted | coverage | holds |",
                ("power",),
                "rejected",
                "predicted",
                "coverage",
            ),
            "",
            "## Error in the densities",
            "",
            "Slope .3, 800 queries in 80 clusters; λ is the partial reliability. At λ = .7 figures are",
            "reported, not held to anything: lmd3 asks for exact scoring there.",
            "",
            *table(
                "| data and correction | bias | coverage | coverage uncorrected | holds |",
                ("error",),
                "bias",
                "coverage",
                "naive",
            ),
            "",
            "## Many looks, and support",
            "",
            *table(
                "| data | rejected | without adjustment | holds |", ("family", "flags"), "rejected", "naive"
            ),
            "",
            "For the conformal p-values the second figure is the share of replicates in which any of the 200",
            "queries was flagged at a false-discovery rate of 5 %.",
            "",
        ]
    )


def _mark(row: Row) -> str:
    return ("yes" if row.fine else "**no**") if row.held else "reported"


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return "unknown CPU"


def main() -> None:
    """Runs the suite and writes the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--replicates", type=int, default=REPLICATES)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*")
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    started = time.monotonic()
    # Finished rows lie beside the table until it is whole: a run that was stopped goes on.
    keep = None if options.out is None else options.out.with_name(options.out.name + ".rows")
    rows = run(options.replicates, options.seed, options.workers, options.only, keep)
    text = page(rows, options.seed, time.monotonic() - started, _cpu())
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text, encoding="utf-8")
        if keep is not None and options.only is None:
            keep.unlink(missing_ok=True)
    sys.exit(0 if all(row.fine or not row.held for row in rows) else 1)


if __name__ == "__main__":
    main()
