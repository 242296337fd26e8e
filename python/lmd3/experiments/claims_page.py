"""The page of results that `make claims` writes: what was found beside what was hoped for."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lmd3.experiments.claims_bars import Bar, Tables


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
        {
            "claim": b.claim,
            "": b.what,
            "bar": b.wanted,
            "found": b.found,
            "holds": "yes" if b.holds else "**no**",
        }
        for b in bars
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


#: What the three scores of subsets are, and which was chosen when.
SCORES_SAID = (
    "Three scores, all of them shown. `effects`: across the groups of a query, mean over queries; `effects"
    " pooled`: over all (query, group) pairs at once; `lds`: across the models, mean over queries (the"
    " linear datamodelling score). The first was taken for the verdict after all three had been seen on these"
    " data, because the level of chance of the pooled one is not 0: a query that one group does much to tends"
    " to have one group of high density, whichever, and a random predictor scores there too, as its row"
    " shows. `random` is each query's densities dealt to the groups by lot; its interval has the spread over"
    " deals in it."
)


#: The facts once more: in a word, and what was done.
FACTS_AGAIN = {
    "facts-seed": (
        "by another seed",
        "By another seed (names, values, assignment, initialisation), one pair of arms:",
    ),
    "facts-other": (
        "in other words",
        "By that seed and in other words: five other statements, two of which name the value before the"
        " person, and another question. They were written once and not adjusted:",
    ),
}


def mediation_said(leak: Tables) -> str:
    """The mediation of a leak in words."""
    found = leak.summary["mediation"]
    if "refused" in found:
        return f"refused, since {found['refused']}"
    low, high = found["indirect"][1:]
    return (
        f"indirect {found['indirect'][0]:+.3f} [{low:+.3f}, {high:+.3f}] of a total of"
        f" {found['total'][0]:+.3f}; it vanishes were the errors of the two models correlated by"
        f" {found['rho_zero']:+.2f}"
    )


def accuracy_table(facts: Tables) -> str:
    """Shares of right choices by kind and dose."""
    rows = facts["analysis/mcnemar"]
    rows = rows[rows["outcome"] == "correct"].groupby(["kind", "dose"], as_index=False)
    share = rows.agg(
        n=("n", "first"), control=("control", "mean"), treatment=("treatment", "mean"), p=("p_value", "max")
    )
    return markdown(share)


def slopes_table(leak: Tables, outcome: str) -> str:
    """Slopes on density and on dose, with what they explain."""
    rows = leak["analysis/slopes"]
    rows = rows[(rows["outcome"] == outcome) & rows["model"].isin(["overall", "dose", "dose and density"])]
    # A dose is the same at every bandwidth.
    rows = rows[(rows["model"] != "dose") | rows["primary"]].sort_values(["sample", "model"], kind="stable")
    names = {
        "sample": "sample",
        "model": "model",
        "term": "slope of",
        "bandwidth": "h",
        "estimate": "slope",
        "std_error": "standard error",
        "p_value": "p",
        "r_squared": "R² of the model",
        "seed_sd": "SD over pairs",
    }
    rows = rows[list(names)].rename(columns=names)
    return markdown(rows.assign(h=rows["h"].where(rows["slope of"] == "density")))


def tests_table(leak: Tables, outcomes: Sequence[str]) -> str:
    """Tests by replayed assignments, the placebo outcome last."""
    rows = leak["analysis/randomisation"]
    wanted = [*outcomes, *(f"placebo:{name}" for name in outcomes)]
    rows = rows[rows["outcome"].isin(wanted) & rows["test"].isin(["dose", "density"])]
    rows = rows[(rows["test"] == "density") | rows["primary"]]
    rows = rows.assign(order=[wanted.index(name) for name in rows["outcome"]])
    names = {"outcome": "outcome", "test": "test", "bandwidth": "h", "slope": "slope within blocks",
             "p_value": "p", "replays": "replays"}  # fmt: skip
    rows = rows.sort_values(["order", "test"], kind="stable")[list(names)].rename(columns=names)
    return markdown(rows.assign(h=rows["h"].where(rows["test"] == "density")))


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
    """Slopes within dose × kind, without and with the baseline of the item."""
    rows = leak["analysis/slopes"]
    rows = rows[(rows["outcome"] == outcome) & rows["model"].str.startswith("within cells")]
    rows = rows.assign(baseline=["yes" if "baseline" in model else "no" for model in rows["model"]])
    names = {
        "baseline": "baseline in the model",
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
        f" each: {about['core_minutes']:.0f} core-minutes of work (user and system time of all processes),"
        f" {about['minutes']:.0f} minutes by the clock, with whatever else the machine did"
        + (
            f", in {about['runs']} runs that went on where the one before had stopped."
            if about["runs"] > 1
            else "."
        )
        + f" Data: {about['data']}. Models: {model}; {about['seeds']} pairs of arms, seed {about['seed']}."
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
        "What predicts the prompt's Δ: Δ log density, the dose (log(1 + copies)) alone, and density beside"
        " the dose. Of the items in blocks, and of each kind alone:",
        slopes_table(questions, "prompt"),
        "Tests by replayed assignments, within blocks:",
        tests_table(questions, outcomes),
        "Within dose × kind: does density say more than the label? Slopes of the prompt's Δ on Δ log"
        " density:",
        within_table(questions, "prompt"),
        "With the baseline: the loss in another control arm and the log density under the base texts are in"
        " the model too. For exact copies of one dose the change of log density all but follows from the"
        " item's baseline density, so among them an effect of density can't be told from one of the baseline:"
        " what could speak for density beyond the label is the paraphrases' slope.",
        f"Mediation (how much of the dose's effect passes through density): {mediation_said(questions)}.",
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
    parts += [
        "## Accuracy: leaked facts about invented people",
        "Share of four-way choices by likelihood that are right, meant over the pairs; `p`: the larger"
        " of the exact McNemar tests. The statements of this task were chosen so that a paraphrase carries"
        " over to the question: it shows that accuracy can follow, not how often it does.",
        accuracy_table(tables["facts"]),
    ]
    for name, (_, text) in FACTS_AGAIN.items():
        if name in tables:
            parts += [text, accuracy_table(tables[name])]
    parts += [
        "## Claim C: density and perplexity",
        "\n".join(f"* **{name}**: {text}" for name, text in sentences.summary["verdicts"].items()),
        relations_table(sentences),
        "`error by group` is a sandwich over so few groups that it is rough. How much of the slope one group"
        " makes (h = the primary one, over length and word frequency alone):",
        without_table(sentences),
        "The slope inside each group at that h:",
        groups_table(sentences),
        "Groups trained on against groups that were not, slopes per standard deviation of the trained:",
        contrasts_table(sentences, "trained", "trained", "untrained"),
        "Finetuned against not, over texts of the groups that were left out, on the density under the"
        " finetuning texts:",
        contrasts_table(sentences, "finetuned", "after", "before"),
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
            "The seconds of log density are its queries' share of the scan, after all texts were embedded;"
            " the rivals look at the nearest texts that the scan found. One run over these queries:"
            " differences of a few thousandths are noise.",
        ]
    parts += [
        "## Subsets as ground truth",
        subsets.summary["verdicts"]["subsets"],
        SCORES_SAID,
        markdown(subsets["analysis/scores"].drop(columns=["rule", "n", "models", "primary"])),
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


def without_table(pretrain: Tables) -> str:
    """Slopes within trained groups, one of them left away."""
    rows = pretrain["analysis/relations"]
    rows = rows[
        rows["primary"]
        & (rows["effects"] == "within")
        & (rows["controls"] == "base")
        & rows["sample"].str.startswith("trained")
    ]
    names = {
        "sample": "groups",
        "estimate": "slope per SD",
        "std_error": "HC3 error",
        "p_value": "p",
        "delta_within": "ΔR² within",
        "n": "n",
    }
    return markdown(rows[list(names)].rename(columns=names))


def groups_table(pretrain: Tables) -> str:
    """The slope inside each group, without and with the largest cosine."""
    rows = pretrain["analysis/groups"]
    rows = rows[rows["primary"]].sort_values(["trained", "group"], ascending=[False, True], kind="stable")
    names = {
        "group": "group",
        "trained": "trained on",
        "controls": "beyond",
        "estimate": "slope per SD",
        "std_error": "HC3 error",
        "p_value": "p",
        "n": "n",
    }
    rows = rows.assign(trained=["yes" if trained else "no" for trained in rows["trained"]])
    return markdown(rows[list(names)].rename(columns=names))


def contrasts_table(pretrain: Tables, kind: str, first: str, second: str) -> str:
    """Slopes and their differences."""
    rows = pretrain["analysis/contrasts"]
    rows = rows[rows["contrast"].str.startswith(kind)]
    names = {
        "contrast": "contrast",
        "controls": "beyond",
        "bandwidth": "h",
        "first": first,
        "second": second,
        "difference": "difference",
        "std_error": "error",
        "p_value": "p",
    }
    return markdown(rows[list(names)].rename(columns=names))


def flat_groups(pretrain: Tables) -> str:
    """The groups trained on in which no slope is seen."""
    rows = pretrain["analysis/groups"]
    rows = rows[rows["primary"] & rows["trained"] & (rows["controls"] == "base")]
    return ", ".join(rows[(rows["p_value"] > 0.05) | (rows["estimate"] > 0)]["group"])


def _steeper(difference: float) -> str:
    return f": steeper in the {'trained' if difference < 0 else 'untrained'} groups"


def open_points(tables: Mapping[str, Tables]) -> list[str]:
    """What the bars do not ask for, and a reader should."""
    lines = []
    slopes = tables["questions"]["analysis/slopes"]
    rows = slopes[slopes["primary"] & (slopes["outcome"] == "prompt") & (slopes["sample"] == "all")]
    r_squared = rows.set_index("model")["r_squared"]
    if {"dose", "overall"} <= set(r_squared.index):
        dose, density = r_squared["dose"], r_squared["overall"]
        lines.append(
            f"* Dose alone explains {'more' if dose > density else 'less'} of the questions' Δ (R²"
            f" {dose:.2f}) than Δ log density alone (R² {density:.2f} at the primary bandwidth)."
        )
    if flat := flat_groups(tables["sentences"]):
        lines.append(
            f"* Claim C holds over the trained groups together; inside {flat} alone no slope below 0 is seen."
        )
    contrasts = tables["sentences"]["analysis/contrasts"]
    for row in contrasts[contrasts["primary"] & contrasts["contrast"].str.startswith("trained")].itertuples():
        clear = row.ci_low > 0 or row.ci_high < 0
        lines.append(
            f"* Trained against untrained groups, beyond {row.controls}: difference of slopes"
            f" {row.difference:+.3f} [{row.ci_low:+.3f}, {row.ci_high:+.3f}]"
            f"{_steeper(row.difference) if clear else ': not told apart'}."
        )
    pooled = contrasts[contrasts["primary"] & contrasts["contrast"].str.contains("pooled")]
    return lines + [
        f"* Without group effects the contrast of finetuning is {gap:+.3f}: "
        + ("it has the other sign, so group effects belong in it." if gap > 0 else "the same sign.")
        for gap in pooled["difference"]
    ]


def conclusions(tables: Mapping[str, Tables], bars: Sequence[Bar]) -> str:
    """The three lists at the end."""
    names = {
        "A": "density responds",
        "B": "performance follows",
        "facts": "accuracy follows",
        "C": "perplexity is explained",
        "subsets": "densities per group say which group matters",
        "calibration": "the tests reject a null outcome as often as they say",
    }
    lines = []
    for claim, what in names.items():
        of = [bar for bar in bars if bar.claim == claim]
        if of:
            missed = [bar.what for bar in of if not bar.holds]
            lines.append(
                f"* {f'Claim {claim}' if len(claim) == 1 else claim.capitalize()} ({what}):"
                f" {len(of) - len(missed)} of {len(of)} bars hold"
                + (f"; not: {'; '.join(missed)}." if missed else ".")
            )
    for name, (how, _) in FACTS_AGAIN.items():
        if name in tables:
            rows = tables[name]["analysis/mcnemar"]
            rows = rows[(rows["outcome"] == "correct") & (rows["dose"] == rows["dose"].max())]
            share = rows.groupby("kind")["treatment"].mean()
            below = [kind for kind, value in share.items() if value < 0.85]
            lines.append(
                f"* Accuracy of leaked facts, {how}: "
                + ", ".join(f"{kind} {value:.2f}" for kind, value in share.items())
                + " at the largest dose"
                + (f"; below .85: {' and '.join(below)}." if below else ".")
            )
    lines += open_points(tables)
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
