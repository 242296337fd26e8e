"""The analysis of a leak from its files: tables in `analysis/`, and each claim's verdict in one sentence.

cells.parquet           change of every outcome, and of the placebo outcome, by dose and kind
responses.parquet       claim A: change of log density by dose and kind, per bandwidth
slopes.parquet          Δ performance on Δ log density, per bandwidth, sample and model
randomisation.parquet   tests by replayed assignments, per bandwidth and outcome
nulls.parquet           their replays, for the primary bandwidth
spillover.parquet       among untreated items, with the naive p-value beside, named so
spillover_bins.parquet  the same as a curve, for the primary bandwidth
mcnemar.parquet         binary outcomes, where there are any
points.parquet          Δ density and Δ outcome of every item, at the primary bandwidth
summary.json            the verdicts, mediation, placebo

Schemas: `lmd3.experiment_files`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lmd3 import experiment_files as files
from lmd3.analysis import intervention
from lmd3.analysis.assignment import Cell, Design, Exposure, Variants
from lmd3.analysis.intervention import Outcome, Randomisation
from lmd3.analysis.words import p_value
from lmd3.experiments.leak_density import load_exposures
from lmd3.progress import ProgressFactory, silent
from lmd3.results import read_json, write_json, write_parquet

#: Outcomes by which the model gains where they fall.
_LOSSES = ("prompt", "answer")


class Loaded:
    """An experiment's files as the analysis takes them."""

    def __init__(self, folder: Path) -> None:
        self.plan = read_json(folder / "plan.json")
        settings = self.plan["settings"]
        assignment = pq.read_table(folder / "assignment.parquet").to_pandas()
        self.ids = assignment["id"].tolist()
        doses = [dose for dose in settings["doses"] if dose > 0]
        cells = [Cell("none", 0)] * settings["untreated"]
        cells += [Cell(kind, dose) for kind in self.plan["kinds"] for dose in sorted(set(doses))]
        block = assignment["block"].fillna(-1).to_numpy(dtype=np.int64)
        self.design = Design(tuple(cells), block)
        self.assigned = assignment["cell"].fillna(-1).to_numpy(dtype=np.int64)
        rows = pq.read_table(folder / "variants.parquet").to_pandas()
        row_of = {item: row for row, item in enumerate(self.ids)}
        kind_of = {kind: number for number, kind in enumerate(self.design.kinds)}
        self.variants = Variants(
            np.array([row_of[item] for item in rows["item"]], dtype=np.int64),
            np.array([kind_of[kind] for kind in rows["kind"]], dtype=np.int64),
        )
        self.copies = self.variants.multiplicity(self.design, self.assigned)
        self.exposures, self.bandwidths = load_exposures(folder / "exposure")
        self.outcomes = _outcomes(folder / "measures.parquet", self.ids)
        self.base_rows = int(self.plan["base_texts"])

    def deltas(self, exposure: Exposure) -> NDArray[np.float64]:
        """(n,) change of log density."""
        return exposure.delta(self.copies)

    def base(self, exposure: Exposure) -> NDArray[np.float64]:
        """(n,) baseline log density."""
        return np.asarray(exposure.base - np.log(self.base_rows))


def _outcomes(path: Path, ids: list[str]) -> list[Outcome]:
    frame = pq.read_table(path).to_pandas()
    found = []
    for name in dict.fromkeys(frame["outcome"]):
        rows = frame[frame["outcome"] == name]
        wide = rows.pivot(index=["arm", "seed"], columns="id", values="value")[ids]
        arms = [wide.loc[arm].sort_index().to_numpy(dtype=np.float64) for arm in ("control", "treatment")]
        found.append(Outcome(name, arms[0], arms[1], bool((rows["kind"] == "binary").all())))
    return found


def analyse(folder: Path, *, progress: ProgressFactory | None = None) -> dict[str, Any]:
    """Analyses an experiment's files, writes the tables and returns the summary."""
    loaded = Loaded(folder)
    out = folder / "analysis"
    out.mkdir(exist_ok=True)
    settings = loaded.plan["settings"]
    design, assigned = loaded.design, loaded.assigned
    seed, replays = int(settings["seed"]), int(settings["replays"])
    placebos = [o.placebo for o in loaded.outcomes if o.placebo is not None]
    cells = pd.concat([intervention.cell_effects(o, design, assigned) for o in [*loaded.outcomes, *placebos]])
    responses: list[pd.DataFrame] = []
    slopes: list[pd.DataFrame] = []
    points: list[pd.DataFrame] = []
    tests: list[dict[str, Any]] = []
    placebo: list[dict[str, Any]] = []
    spills: list[dict[str, Any]] = []
    nulls: list[tuple[str, str, float]] = []
    cell_of = [design.cells[cell] if cell >= 0 else Cell("none", 0) for cell in assigned]
    work = len(loaded.exposures) * len(loaded.outcomes)
    done = 0
    with (progress or silent)("analysing", work, "outcomes × bandwidths") as bar:
        for number, (exposure, entry) in enumerate(zip(loaded.exposures, loaded.bandwidths, strict=True)):
            at = {name: entry[name] for name in ("kernel", "bandwidth", "rule")} | {"primary": number == 0}
            delta, base = loaded.deltas(exposure), loaded.base(exposure)
            responses.append(intervention.density_responses(delta, design, assigned, seed=seed).assign(**at))
            for outcome in loaded.outcomes:
                slopes.append(intervention.slopes(outcome, delta, base, design, assigned).assign(**at))
                for of in (outcome, outcome.placebo):
                    if of is None:
                        continue
                    found = intervention.effect_tests(
                        of, exposure, loaded.variants, design, assigned, replays=replays, seed=seed
                    )
                    spilled = intervention.spillover(
                        of, exposure, loaded.variants, design, assigned, base, replays=replays, seed=seed
                    )
                    rows = [_row(of, name, test) | at for name, test in found.items()]
                    rows += [_row(of, f"spillover, {s.focal}", s.test) | at for s in spilled]
                    (tests if of is outcome else placebo).extend(rows)
                    if of is not outcome:
                        continue
                    spills += [
                        {
                            "outcome": of.name,
                            "focal": s.focal,
                            "n": s.test.n,
                            "slope": s.test.slope,
                            "p_value": s.test.p_value,
                            "naive_slope": s.naive_slope,
                            "naive_p_value": s.naive_p,
                            "null_mean_exposure": s.null_mean,
                        }
                        | at
                        for s in spilled
                    ]
                    if number == 0:
                        columns = {
                            "id": loaded.ids,
                            "outcome": of.name,
                            "kind": [cell.kind for cell in cell_of],
                            "dose": [cell.dose for cell in cell_of],
                            "held_back": assigned < 0,
                            "delta_density": delta,
                            "delta": of.delta,
                        }
                        points.append(pd.DataFrame(columns))
                        nulls += [(of.name, name, float(v)) for name, t in found.items() for v in t.null]
                        nulls += [
                            (of.name, f"spillover, {s.focal}", float(v)) for s in spilled for v in s.test.null
                        ]
                done += 1
                bar.update(done)
    frames = {
        "cells": cells,
        "points": pd.concat(points),
        "responses": pd.concat(responses),
        "slopes": pd.concat(slopes),
        "randomisation": pd.DataFrame(tests + placebo),
        "nulls": pd.DataFrame(nulls, columns=["outcome", "test", "statistic"]),
        "spillover": pd.DataFrame(spills),
        "spillover_bins": pd.concat(
            [
                intervention.spillover_bins(
                    outcome,
                    loaded.exposures[0],
                    loaded.variants,
                    design,
                    assigned,
                    loaded.base(loaded.exposures[0]),
                    replays=replays,
                    seed=seed,
                )
                for outcome in loaded.outcomes
            ]
        ),
    }
    binary = [o for o in loaded.outcomes if o.binary]
    if binary:
        frames["mcnemar"] = pd.concat([intervention.mcnemar_tests(o, design, assigned) for o in binary])
    for name, frame in frames.items():
        write_parquet(out / f"{name}.parquet", files.as_table(frame, getattr(files, name.upper())))
    primary = loaded.outcomes[0]
    delta = loaded.deltas(loaded.exposures[0])
    summary = {
        "primary_outcome": primary.name,
        "primary_bandwidth": loaded.bandwidths[0],
        "items": len(loaded.ids),
        "in_blocks": int((assigned >= 0).sum()),
        "blocks": design.blocks,
        "seeds": primary.seeds,
        "seeds_are": "fixed effects: intervals speak of these seeds"
        if primary.seeds < 3
        else "a sample: intervals speak of any seed",
        "replays": replays,
        "mediation": intervention.mediation(primary, delta, design, assigned, seed=seed),
        "monotone": {
            f"{entry['bandwidth']:.4g}": intervention.is_monotone(frame)
            for entry, frame in zip(loaded.bandwidths, responses, strict=True)
        },
        "answers_repeated": loaded.plan["answers_repeated"],
    }
    summary["verdicts"] = verdicts(frames, summary)
    write_json(out / "summary.json", _finite(summary))
    return summary


def _finite(value: Any) -> Any:
    """JSON values, null in the place of numbers that JSON lacks."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def _row(outcome: Outcome, name: str, test: Randomisation) -> dict[str, Any]:
    return {
        "outcome": outcome.name,
        "test": name,
        "statistic": test.statistic,
        "slope": test.slope,
        "p_value": test.p_value,
        "replays": len(test.null),
        "n": test.n,
    }


def _beyond_dose(slopes: pd.DataFrame) -> str | None:
    """What density says within dose × kind, judged with the baseline in the model where there is one."""

    def one(model: str, sample: str) -> Any:
        rows = slopes[(slopes["model"] == model) & (slopes["sample"] == sample)]
        return rows.iloc[0] if len(rows) else None

    plain, strict = one("within cells", "all"), one("within cells, baseline", "all")
    if plain is None:
        return None
    judge = plain if strict is None else strict
    more = judge["p_value"] <= 0.05 and judge["estimate"] < 0
    text = (
        f"Within dose × kind log density {'says' if more else 'is not seen to say'} more than the label:"
        f" {plain['estimate']:+.3f} [{plain['ci_low']:+.3f}, {plain['ci_high']:+.3f}],"
        f" {p_value(plain['p_value'])}"
    )
    if strict is not None:
        text += (
            f"; with the outcome of another control arm and the baseline density in the model"
            f" {strict['estimate']:+.3f} [{strict['ci_low']:+.3f}, {strict['ci_high']:+.3f}],"
            f" {p_value(strict['p_value'])}"
        )
    kinds = [kind for kind in dict.fromkeys(slopes["sample"]) if kind != "all"]
    parts = [(kind, one("within cells", kind)) for kind in kinds]
    alone = [
        f"{kind} {row['estimate']:+.3f} ({p_value(row['p_value'])})" for kind, row in parts if row is not None
    ]
    if len(alone) > 1:
        text += f"; of each kind alone: {', '.join(alone)}"
    return text + "."


def verdicts(frames: dict[str, pd.DataFrame], summary: dict[str, Any]) -> dict[str, str]:
    """Each claim's verdict in one plain sentence, at the primary bandwidth and outcome."""
    outcome = summary["primary_outcome"]
    responses = frames["responses"][frames["responses"]["primary"]]
    treated = responses[responses["dose"] > 0]
    worst = treated.sort_values("share_positive").iloc[0]
    h = summary["primary_bandwidth"]["bandwidth"]
    monotone = [name for name, kinds in summary["monotone"].items() if all(kinds.values())]
    said = {
        "A": f"Density responds: at h = {h:.3g} every cell's median log density rose; the least share of"
        f" items whose density rose is {worst['share_positive']:.0%} ({worst['kind']} × {worst['dose']});"
        f" medians rise with the dose at {len(monotone)} of {len(summary['monotone'])} bandwidths."
        if (treated["median"] > 0).all()
        else f"Density does not respond everywhere: at h = {h:.3g} the median change is not above 0 for"
        + " "
        + ", ".join(f"{r.kind} × {r.dose}" for r in treated[treated["median"] <= 0].itertuples())
        + "."
    }
    cells = frames["cells"][frames["cells"]["outcome"] == outcome]
    last = cells[cells["dose"] == cells["dose"].max()]
    tests = frames["randomisation"]
    tests = tests[tests["primary"]]
    p = tests[(tests["outcome"] == outcome) & (tests["test"] == "density")]["p_value"].iloc[0]
    slopes = frames["slopes"]
    slopes = slopes[slopes["primary"] & (slopes["outcome"] == outcome)]
    effects = "; ".join(
        f"{r.kind} × {r.dose} {r.effect:+.2f} [{r.effect_low:+.2f}, {r.effect_high:+.2f}]"
        for r in last.itertuples()
        if r.dose > 0
    )
    overall = slopes[(slopes["model"] == "overall") & (slopes["sample"] == "all")].iloc[0]
    follows = p <= 0.05
    said["B"] = (
        f"Performance {'follows' if follows else 'is not seen to follow'}: Δ {outcome} against the untreated"
        f" of the block is {effects}; {overall['estimate']:+.3f} [{overall['ci_low']:+.3f},"
        f" {overall['ci_high']:+.3f}] per unit of log density, R² {overall['r_squared']:.2f}; {p_value(p)} by"
        f" {summary['replays']} replayed assignments."
    )
    beyond = _beyond_dose(slopes)
    if beyond is not None:
        said["beyond dose"] = beyond
    spill = frames["spillover"]
    if len(spill):
        spill = spill[spill["primary"] & (spill["outcome"] == outcome)]
        s = spill.iloc[0]
        said["spillover"] = (
            f"Spillover {'is seen' if s['p_value'] <= 0.05 else 'is not seen'} among the {s['n']} items"
            f" {s['focal']}: {p_value(s['p_value'])} by replays (the naive p-value, which takes their"
            f" exposure for random, is {s['naive_p_value']:.2g})."
        )
    null = tests[tests["outcome"] == f"placebo:{outcome}"]
    if len(null):
        least = float(null["p_value"].min())
        calm = least * len(null) > 0.05
        said["placebo"] = (
            f"The placebo outcome (one control arm less another) shows {'nothing' if calm else 'something'}:"
            f" the smallest of {len(null)} p-values is {least:.3f}."
        )
    return said
