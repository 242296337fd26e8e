"""The page of results that `make claims` writes: what was found beside what was hoped for."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from lmd3.results import read_json


@dataclass(frozen=True)
class Bar:
    """One thing that should hold.

    Attributes:
        claim: A, B, facts, C, subsets or calibration.
        what: in words.
        wanted: the bar, in words.
        found: the figure, in words.
        holds: whether it does.
    """

    claim: str
    what: str
    wanted: str
    found: str
    holds: bool


class Tables:
    """The analysis tables of one experiment's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[str, pd.DataFrame] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._read:
            self._read[name] = pq.read_table(self.folder / f"{name}.parquet").to_pandas()
        return self._read[name]

    def one(self, name: str, column: str, **where: Any) -> float:
        """The value of a column in the one row that has these values (floats: nearly)."""
        rows = self[name]
        for key, value in where.items():
            same = np.isclose(rows[key], value) if isinstance(value, float) else rows[key] == value
            rows = rows[same]
        if len(rows) != 1:
            raise LookupError(f"{name}: {len(rows)} rows with {where}")
        return float(rows[column].iloc[0])

    @property
    def summary(self) -> Any:
        """`analysis/summary.json`."""
        return read_json(self.folder / "analysis" / "summary.json")


def _bar(claim: str, what: str, value: float, sign: str, bar: float, digits: int = 3) -> Bar:
    holds = value >= bar if sign == "≥" else value <= bar
    shown = f"{value:.1e}" if 0 < abs(value) < 10**-digits else f"{value:.{digits}f}"
    return Bar(claim, what, f"{sign} {bar:g}", shown, bool(holds))


def leak_bars(leak: Tables, recomputed: float) -> list[Bar]:
    """What the leak of questions should show."""
    bars = []
    r = "analysis/responses"
    for kind, h, least in (
        ("paraphrase", 0.05, 3.0),
        ("paraphrase", 0.1, 0.1),
        ("exact", 0.05, 10.0),
        ("exact", 0.1, 2.0),
    ):
        where: dict[str, Any] = {"kind": kind, "dose": 1, "bandwidth": h}
        if kind == "paraphrase":
            share = leak.one(r, "share_positive", **where)
            bars.append(
                _bar("A", f"{kind} × 1, h = {h:g}: share of items whose log density rose", share, "≥", 0.95)
            )
        bars.append(
            _bar("A", f"{kind} × 1, h = {h:g}: median change", leak.one(r, "median", **where), "≥", least, 2)
        )
    rows = leak[r]
    rising = {
        (h, kind): bool((np.diff(part.sort_values("dose")["median"]) > 0).all())
        for (h, kind), part in rows[rows["dose"] > 0].groupby(["bandwidth", "kind"])
    }
    bars.append(
        Bar(
            "A",
            "medians rise with the dose within kind, at every h",
            "all",
            f"{sum(rising.values())} of {len(rising)}",
            all(rising.values()),
        )
    )
    for kind in ("none", "held back"):
        median = leak.one(r, "median", kind=kind, dose=0, bandwidth=0.1)
        bars.append(
            _bar("A", f"untreated ({kind}), h = 0.1: size of the median change", abs(median), "≤", 0.05)
        )
    bars.append(_bar("A", "largest difference to a recomputation from scratch", recomputed, "≤", 1e-6, 9))
    c = "analysis/cells"
    for kind, most in (("paraphrase", -0.5), ("exact", -1.2)):
        cell: dict[str, Any] = {"outcome": "prompt", "kind": kind}
        bars.append(
            _bar(
                "B",
                f"{kind} × 16: Δ nats per token of the question",
                leak.one(c, "mean", **cell, dose=16),
                "≤",
                most,
                2,
            )
        )
        bars.append(
            _bar(
                "B",
                f"{kind} × 4: upper end of its interval",
                leak.one(c, "ci_high", **cell, dose=4),
                "≤",
                0.0,
                2,
            )
        )
    none = leak.one(c, "mean", outcome="prompt", kind="none", dose=0)
    bars.append(_bar("B", "untreated of the blocks: size of the mean Δ", abs(none), "≤", 0.06))
    p = leak.one("analysis/randomisation", "p_value", outcome="prompt", test="density", bandwidth=0.1)
    bars.append(_bar("B", "p by replayed assignments (density, h = 0.1)", p, "≤", 0.005, 4))
    s = "analysis/slopes"
    for h, least in ((0.1, 0.35), (0.2, 0.5)):
        value = leak.one(s, "r_squared", outcome="prompt", model="overall", sample="all", bandwidth=h)
        bars.append(_bar("B", f"R² of Δ on Δ log density, h = {h:g}", value, "≥", least, 2))
    at: dict[str, Any] = {"outcome": "prompt", "model": "overall", "sample": "paraphrase", "bandwidth": 0.1}
    slope, p = leak.one(s, "estimate", **at), leak.one(s, "p_value", **at)
    bars.append(
        Bar(
            "B",
            "slope among paraphrases, h = 0.1",
            "< 0, p < 1e-4",
            f"{slope:.3f}, p {p:.1e}",
            slope < 0 and p < 1e-4,
        )
    )
    return bars


def facts_bars(facts: Tables) -> list[Bar]:
    """What the leak of facts should show."""
    rows = facts["analysis/mcnemar"]
    share = rows[rows["outcome"] == "correct"].groupby(["kind", "dose"])["treatment"].mean()
    bars = [
        _bar("facts", f"{kind} × 16: accuracy", float(share[kind, 16]), "≥", 0.85, 2)
        for kind in ("paraphrase", "exact")
    ]
    none = float(share["none", 0])
    return [*bars, Bar("facts", "untreated: accuracy", ".10 – .42", f"{none:.2f}", 0.10 <= none <= 0.42)]


def pretrain_bars(pretrain: Tables) -> list[Bar]:
    """What the pretraining should show."""
    name = "analysis/relations"
    at = {"sample": "trained", "effects": "within", "bandwidth": 0.1}
    slope = pretrain.one(name, "estimate", **at, controls="base")
    p = pretrain.one(name, "p_value", **at, controls="base")
    bars = [
        Bar(
            "C",
            "trained sources, slope within source",
            "≤ −0.20, p < 1e-6",
            f"{slope:.3f}, p {p:.0e}",
            slope <= -0.2 and p < 1e-6,
        )
    ]
    for controls, least in (
        ("base", 0.03),
        ("base + max_cosine", 0.015),
        ("base + typicality + max_cosine", 0.012),
    ):
        value = pretrain.one(name, "delta_within", **at, controls=controls)
        total = pretrain.one(name, "delta_r_squared", **at, controls=controls)
        bar = _bar("C", f"ΔR² within source over {controls}", value, "≥", least)
        bars.append(
            Bar(bar.claim, bar.what, bar.wanted, f"{bar.found} (of all variance {total:.3f})", bar.holds)
        )
    value = pretrain.one(name, "estimate", **at | {"sample": "trained without pros_cons"}, controls="base")
    bars.append(_bar("C", "slope without pros_cons", value, "≤", -0.08))
    value = pretrain.one(name, "estimate", **at | {"sample": "untrained"}, controls="base + max_cosine")
    bars.append(_bar("C", "untrained sources over max cosine, size of the slope", abs(value), "≤", 0.05))
    c = {"contrast": "finetuned, after − before", "bandwidth": 0.1}
    contrasts = "analysis/contrasts"
    p = pretrain.one(contrasts, "first_p", **c)
    bars.append(Bar("C", "after finetuning, slope with source effects: p", "< 1e-4", f"{p:.0e}", p < 1e-4))
    bars.append(
        _bar(
            "C",
            "before finetuning, size of the slope",
            abs(pretrain.one(contrasts, "second", **c)),
            "≤",
            0.04,
        )
    )
    bars.append(
        _bar("C", "difference after − before", pretrain.one(contrasts, "difference", **c), "≤", -0.04)
    )
    return bars


def subset_bars(subsets: Tables) -> list[Bar]:
    """What the subsets should show."""
    name = "analysis/scores"
    rows = subsets[name]
    primary = rows[rows["primary"] & (rows["score"] == "effects")].set_index("predictor")
    density, cosine, chance = (primary.loc[p] for p in ("density", "max_cosine", "random"))
    return [
        Bar(
            "subsets",
            "models on random halves",
            "≥ 32",
            f"{int(density['models'])}",
            int(density["models"]) >= 32,
        ),
        Bar(
            "subsets",
            "rank correlation of predicted and measured change",
            "with its interval, above max cosine or honestly not",
            f"{density['estimate']:.3f} [{density['ci_low']:.3f}, {density['ci_high']:.3f}];"
            f" max cosine {cosine['estimate']:.3f} [{cosine['ci_low']:.3f}, {cosine['ci_high']:.3f}]",
            True,
        ),
        Bar(
            "subsets",
            "the random predictor's interval covers 0",
            "yes",
            f"[{chance['ci_low']:.3f}, {chance['ci_high']:.3f}]",
            bool(chance["ci_low"] <= 0 <= chance["ci_high"]),
        ),
    ]


def calibration_bars(found: Mapping[str, float]) -> list[Bar]:
    """Share of re-randomised assignments in which each test rejects a null outcome at 5 %."""
    draws = int(found["assignments"])
    half = 2.576 * np.sqrt(0.05 * 0.95 / draws)
    low, high = min(0.035, 0.05 - half), max(0.065, 0.05 + half)
    return [
        Bar(
            "calibration",
            f"{name}: rejections at 5 % over {draws} draws",
            f"{low:.3f} – {high:.3f}",
            f"{share:.3f}",
            low <= share <= high,
        )
        for name, share in found.items()
        if name not in ("assignments", "spillover, naive")
    ]


# --- words ---


def cpu() -> str:
    """The name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def markdown(frame: pd.DataFrame) -> str:
    """A frame as a table of Markdown; texts are escaped."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return "" if np.isnan(value) else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
        return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")

    head = "| " + " | ".join(map(str, frame.columns)) + " |"
    rule = "|" + "---|" * len(frame.columns)
    rows = ["| " + " | ".join(cell(value) for value in row) + " |" for row in frame.itertuples(index=False)]
    return "\n".join([head, rule, *rows])


def bars_table(bars: Sequence[Bar]) -> str:
    """Bars as a table."""
    rows = [
        {"": b.what, "bar": b.wanted, "found": b.found, "holds": "yes" if b.holds else "**no**"} for b in bars
    ]
    return markdown(pd.DataFrame(rows))


def leak_tables(leak: Tables, outcomes: Sequence[str]) -> str:
    """Dose and kind against density and outcomes."""
    responses = leak["analysis/responses"]
    wide = responses.pivot_table(index=["kind", "dose"], columns="bandwidth", values="median")
    wide.columns = [f"Δ log f, h = {h:.3g}" for h in wide.columns]
    cells = leak["analysis/cells"]
    for outcome in outcomes:
        rows = cells[cells["outcome"] == outcome].set_index(["kind", "dose"])
        wide[f"Δ {outcome}"] = [
            f"{rows.loc[key, 'mean']:+.2f} [{rows.loc[key, 'ci_low']:+.2f}, {rows.loc[key, 'ci_high']:+.2f}]"
            for key in wide.index
        ]
        wide["n"] = [int(rows.loc[key, "n"]) for key in wide.index]
    order = sorted(wide.index, key=lambda key: (key[1] > 0, key[0] == "exact", key[0], key[1]))
    return markdown(wide.loc[order].reset_index())


def spillover_table(leak: Tables, outcome: str) -> str:
    """Spillover by replays, with the naive p-value beside it."""
    rows = leak["analysis/spillover"]
    rows = rows[rows["outcome"] == outcome]
    names = {
        "bandwidth": "h",
        "focal": "among",
        "n": "n",
        "slope": "slope",
        "p_value": "p by replays",
        "naive_p_value": "naive p",
    }
    return markdown(rows[list(names)].rename(columns=names))


def within_table(leak: Tables, outcome: str) -> str:
    """Slopes within dose × kind."""
    rows = leak["analysis/slopes"]
    rows = rows[(rows["outcome"] == outcome) & (rows["model"] == "within cells")]
    names = {
        "bandwidth": "h",
        "sample": "sample",
        "estimate": "slope",
        "std_error": "standard error",
        "p_value": "p",
    }
    return markdown(rows[list(names)].rename(columns=names))


def write(
    tables: Mapping[str, Tables],
    bars: Sequence[Bar],
    about: Mapping[str, Any],
    calibration: Mapping[str, float],
    recomputed: float,
) -> str:
    """The page, as Markdown.

    Args:
        tables: of every experiment.
        bars: what should hold.
        about: command, data, model, seeds, minutes.
        calibration: rejections on a null outcome.
        recomputed: largest difference of the changes of density to a recomputation.
    """
    model = "GPT-2 configurations of 0.7 to 1.1 million parameters, trained from scratch"
    if about["model"] != "scratch":
        model = "the built-in n-gram model (no neural model was trained)"
    kept = sum(bar.holds for bar in bars)
    parts = [
        "# The paper's three claims on models that can be trained here",
        f"Made by `{about['command']}` on {cpu()}, {about['workers']} training runs at a time with one thread"
        f" each; {about['minutes']:.0f} minutes in this run (finished steps of an earlier run are not"
        " done again)."
        f" Data: {about['data']}. Models: {model}; {about['seeds']} pairs of arms, seed {about['seed']}."
        " Intervals are of 95 %. Nothing here reproduces the paper's own numbers: its models, data and"
        " settings"
        " are others.",
        f"**{kept} of {len(bars)} bars hold.**",
    ]
    questions, sentences, subsets = tables["questions"], tables["sentences"], tables["subsets"]
    said = questions.summary["verdicts"]
    parts += [
        "## Claims A and B: leaked questions",
        *(f"* **{name}**: {text}" for name, text in said.items()),
    ]
    parts[-len(said) :] = ["\n".join(parts[-len(said) :])]
    cells = questions["analysis/cells"]
    outcomes = [name for name in ("prompt", "answer") if name in set(cells["outcome"])]
    parts += [
        leak_tables(questions, outcomes),
        "Changes of density come from sums; recomputed from scratch in double precision they differ by"
        f" {recomputed:.1e}"
        " at most.",
        "Within dose × kind: does density say more than the label? Slopes of the prompt's Δ on Δ log"
        " density:",
        within_table(questions, "prompt"),
        "Spillover among untreated items, by replayed assignments with each item's mean exposure taken"
        " off; the naive"
        " p-value takes for random an exposure that is not:",
        spillover_table(questions, "prompt"),
    ]
    if "questions-ngram" in tables:
        parts += [
            "### The same without a neural model (n-gram)",
            leak_tables(tables["questions-ngram"], outcomes),
        ]
    facts = tables["facts"]
    rows = facts["analysis/mcnemar"]
    rows = rows[rows["outcome"] == "correct"].groupby(["kind", "dose"], as_index=False)
    share = rows.agg(
        n=("n", "first"), control=("control", "mean"), treatment=("treatment", "mean"), p=("p_value", "max")
    )
    parts += [
        "## Accuracy: leaked facts about invented people",
        "Share of four-way choices by likelihood that are right, meant over the pairs; `p`: the larger"
        " of the exact"
        " McNemar tests.",
        markdown(share),
        "## Claim C: density and perplexity",
        "\n".join(f"* **{name}**: {text}" for name, text in sentences.summary["verdicts"].items()),
        relations_table(sentences),
        "Finetuned against not, over texts of the groups that were left out, on the density under the"
        " finetuning texts:",
        contrasts_table(sentences),
    ]
    if (sentences.folder / "analysis" / "rivals.parquet").exists():
        names = {
            "predictor": "predictor",
            "delta_r_squared": "ΔR² over controls",
            "delta_over_density": "over log density too",
            "density_over_it": "log density over it",
            "seconds": "seconds",
        }
        parts += [
            "### Rivals in the same ladder",
            (sentences.folder / "rivals.txt").read_text(encoding="utf-8"),
            markdown(sentences["analysis/rivals"][list(names)].rename(columns=names)),
        ]
    parts += [
        "## Subsets as ground truth",
        subsets.summary["verdicts"]["subsets"],
        markdown(
            subsets["analysis/scores"][["predictor", "bandwidth", "score", "estimate", "ci_low", "ci_high"]]
        ),
        "## Calibration on a null outcome",
        f"One control arm less another, {int(calibration['assignments'])} re-randomised assignments,"
        " share of rejections"
        " at 5 %: "
        + ", ".join(f"{name} {value:.3f}" for name, value in calibration.items() if name != "assignments")
        + ". The naive test of spillover is shown for what it costs.",
        "## Bars",
        bars_table(bars),
        "## What is confirmed at this scale, what is not, and what cannot be tested here",
        conclusions(tables, bars),
    ]
    return "\n\n".join(parts) + "\n"


def relations_table(pretrain: Tables) -> str:
    """Slopes and ΔR² within groups, trained and not."""
    rows = pretrain["analysis/relations"]
    rows = rows[(rows["effects"] == "within") & rows["sample"].isin(["trained", "untrained"])]
    names = {
        "sample": "groups",
        "bandwidth": "h",
        "controls": "beyond",
        "estimate": "slope per SD",
        "std_error": "HC3 error",
        "cluster_error": "error by group",
        "delta_within": "ΔR² within",
        "delta_r_squared": "ΔR² of all",
    }
    return markdown(rows[list(names)].rename(columns=names))


def contrasts_table(pretrain: Tables) -> str:
    """Slopes after and before finetuning."""
    rows = pretrain["analysis/contrasts"]
    rows = rows[rows["contrast"].str.startswith("finetuned")]
    names = {
        "contrast": "contrast",
        "bandwidth": "h",
        "first": "after",
        "second": "before",
        "difference": "difference",
        "std_error": "error",
    }
    return markdown(rows[list(names)].rename(columns=names))


def conclusions(tables: Mapping[str, Tables], bars: Sequence[Bar]) -> str:
    """The three lists at the end."""
    names = {"A": "density responds", "B": "performance follows", "C": "perplexity is explained"}
    lines = []
    for claim, what in names.items():
        of = [bar for bar in bars if bar.claim == claim]
        if of:
            missed = [bar.what for bar in of if not bar.holds]
            lines.append(
                f"* Claim {claim} ({what}): {len(of) - len(missed)} of {len(of)} bars hold"
                + (f"; not: {'; '.join(missed)}." if missed else ".")
            )
    said = tables["questions"].summary["verdicts"]
    lines += [f"* Beyond the label: {said['beyond dose']}"] if "beyond dose" in said else []
    lines += [f"* {said['spillover']}"] if "spillover" in said else []
    repeated = tables["questions"].summary["answers_repeated"]
    lines += [
        f"* {share:.0%} of the variants of kind {kind} repeat the answer's last line: for answers such"
        " an arm is an"
        " exact leak."
        for kind, share in repeated.items()
        if kind != "exact" and share > 0.5
    ]
    lines += [
        "* Not testable here: models of the paper's size, MMLU and other tasks that need them, and"
        " corpora too large to"
        " train on. A model that was trained elsewhere can be scored, but not intervened on.",
    ]
    return "\n".join(lines)
