"""The answer of a study in plain words, and the cautions that its data call for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

#: A slope counts as explained away where its gain of R² falls to this part of what it was and the slope
#: itself at least halves (a control much like the predictor shrinks the gain of a true slope too) …
NEARLY_ALL, HALVED = 0.1, 0.5
#: … or where the gain falls to this part and the slope can't be told from zero.
MOST = 0.25
#: A slope that shrinks to this part of what it was counts as weakened.
WEAKENED = 0.7
#: Fewer clusters than this make the sandwich too small.
FEW_CLUSTERS = 40
NAMES = {
    "typicality": ("typicality", "the cosine to the corpus mean"),
    "max_cosine": ("the nearest training text", "the max cosine"),
}


def number(x: float | None, digits: int = 3) -> str:
    """A number to so many significant digits, with a true minus sign."""
    if x is None or x != x:
        return "unknown"
    if x != 0 and not 1e-4 <= abs(x) < 1e6:
        text = f"{x:.{digits - 1}e}"
    else:
        places = digits if abs(x) < 1 else max(0, digits - len(str(int(abs(x)))))
        if 0 < abs(x) < 0.0995:
            # Two significant digits below .1, so that 0.050 stands beside 0.139.
            places = max(digits, digits - 2 - math.floor(math.log10(abs(x))))
        text = f"{x:,.{places}f}"
    return text.replace("-", "−")


def signed(x: float) -> str:
    """`number` with its sign always shown."""
    return ("+" if x >= 0 else "") + number(x)


def share(x: float) -> str:
    """A share of variance, to four places below .01 and three above."""
    if x != x:
        return "unknown"
    if 1e-9 < abs(x) < 5e-5:
        return "under 0.0001"
    return f"{x:.4f}".replace("-", "−") if abs(x) < 0.01 else f"{x:.3f}".replace("-", "−")


def signed_share(x: float) -> str:
    """`share` with its sign always shown."""
    if abs(x) < 5e-5:
        return "0.0000"
    return ("+" if x > 0 else "") + share(x)


def p_value(p: float) -> str:
    """A p-value as `p = .0014` or `p < .0001`."""
    if p < 1e-4:
        return "p < .0001"
    text = f"{p:.4f}" if p < 0.01 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"
    return "p = " + text.removeprefix("0")


def name(column: str) -> str:
    """A column's name as words."""
    return column.replace("_", " ")


def setting(of: Mapping[str, Any]) -> str:
    """Kernel, bandwidth and rule of a specification, in words; empty for a plain column."""
    if of.get("kernel") is None:
        return ""
    rule = of.get("rule")
    asked = f", {rule}" if rule and "=" in str(rule) else ""
    return f"{of['kernel']} kernel, h = {of['bandwidth']:.4g}{asked}"


def listed(words: Sequence[str]) -> str:
    """Words joined by commas and `and`."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else ""


def explained(facts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What typicality and the max cosine leave of the slope.

    Per control known: the slope and its gain of R² without and with it, and a verdict: `explains` (what is
    left is ≤ 10 % of the gain of R² and ≤ 50 % of the slope, or ≤ 25 % of the gain and not to be told from
    zero), `weakens` (the slope is no longer to be told from zero, or falls below 70 %), `leaves`, or
    `nothing` where there was no slope before.
    """
    slopes = facts["bandwidths"][0]["slopes"]
    pairs = {
        "typicality": ("without_typicality", "headline")
        if "without_typicality" in slopes
        else ("headline", "with_typicality"),
        "max_cosine": ("headline", "with_max_cosine"),
    }
    out = {}
    for control, (without, with_it) in pairs.items():
        if without not in slopes or with_it not in slopes:
            continue
        before, after = slopes[without], slopes[with_it]
        left = after["r_squared_gain"] / max(before["r_squared_gain"], 1e-12)
        ratio = after["estimate"] / before["estimate"]
        lost = after["p_value"] >= 0.05
        if before["p_value"] >= 0.05:
            verdict = "nothing"
        elif (left <= NEARLY_ALL and ratio <= HALVED) or (left <= MOST and lost):
            verdict = "explains"
        elif lost or ratio < WEAKENED:
            verdict = "weakens"
        else:
            verdict = "leaves"
        out[control] = {
            "verdict": verdict,
            "without": before,
            "with": after,
            "r_squared_share_left": left,
            "correlation": facts["bandwidths"][0]["correlation"].get(control),
        }
    return out


def answer(facts: Mapping[str, Any], ladder: pd.DataFrame) -> list[str]:
    """The three sentences: the effect, what explains it, what it adds on rows not seen."""
    return [_effect(facts), _explanation(facts), _gain(facts, ladder)]


def _range(of: Mapping[str, Any]) -> str:
    return f"{signed(of['ci_low'])} to {signed(of['ci_high'])}"


def _effect(facts: Mapping[str, Any]) -> str:
    of = facts["primary"]
    what = name(of["predictor"])
    set_to = f" ({setting(of)})" if setting(of) else ""
    held = [name(c) for c in of["controls"]]
    if of["form"] == "within":
        held.append("group")
    given = f"with {listed(held)} held fixed" if held else "without controls"
    unit = "in the log odds of" if facts["kind"] == "binary" else "in"
    if of["p_value"] < 0.05:
        if facts["kind"] == "binary":
            points = 100 * of["average_marginal_effect"]
            meaning = f"; odds × {number(of['odds_ratio'])}, on average {points:+.1f} points".replace(
                "-", "−"
            )
        else:
            meaning = f"; {number(abs(of['estimate']) / facts['outcome_sd'], 2)} of its standard deviation"
        return (
            f"Over {of['n']:,} queries, one standard deviation more {what}{set_to} goes with "
            f"{signed(of['estimate'])} {unit} “{name(facts['outcome'])}” "
            f"(95 % interval {_range(of)}, {p_value(of['p_value'])}{meaning}), {given}."
        )
    unit = " log odds" if facts["kind"] == "binary" else ""
    alone = facts["bandwidths"][0]["slopes"].get("alone")
    bare = (
        f"; without any control it would seem {signed(alone['estimate'])}"
        if alone and of["controls"] and alone["p_value"] < 0.05
        else ""
    )
    return (
        f"Over {of['n']:,} queries, {given}, the data do not settle whether “{name(facts['outcome'])}” "
        f"depends on {what}{set_to}: the slope is {signed(of['estimate'])}{unit} per standard deviation "
        f"(95 % interval {_range(of)}, {p_value(of['p_value'])}{bare}); effects smaller than "
        f"{number(of['smallest_detectable_effect'])} would mostly have been missed (80 % power), those "
        f"beyond ± {number(of['equivalence_bound'])} are ruled out."
    )


def _explanation(facts: Mapping[str, Any]) -> str:
    what = name(facts["primary"]["predictor"])
    found = facts["explained_by"]
    if not found:
        return (
            f"Typicality (the cosine to the corpus mean) is not known here, so this can't tell "
            f"whether {what} only says how typical a query is."
        )
    order = {"explains": 0, "weakens": 1, "leaves": 2, "nothing": 3}
    kept = sorted(found, key=lambda c: order[found[c]["verdict"]])
    first = found[kept[0]]
    parts = []
    for control in kept:
        of = found[control]
        short, long = NAMES[control]
        slope = f"{signed(of['with']['estimate'])} ({_range(of['with'])})"
        gains = [share(of[side]["r_squared_gain"]) for side in ("without", "with")]
        match of["verdict"]:
            case "explains":
                alike = (
                    f"; the two correlate {number(of['correlation'])} and are nearly one quantity here"
                    if abs(of["correlation"] or 0) > 0.95
                    else ""
                )
                turned = (
                    of["with"]["estimate"] * of["without"]["estimate"] < 0 and of["with"]["p_value"] < 0.05
                )
                parts.append(
                    f"{short} explains what {what} seemed to show: with {long} in the model the slope "
                    f"{'turns round to' if turned else 'is'} {slope} and its part of R² falls "
                    f"from {gains[0]} to {gains[1]}{alike}"
                )
            case "weakens":
                lost = ", no longer to be told from zero" if of["with"]["p_value"] >= 0.05 else ""
                parts.append(f"{short} explains part of it: with {long} the slope is {slope}{lost}")
            case "leaves":
                parts.append(f"{short} does not explain it: with {long} the slope is {slope}")
            case _:
                before = (
                    "" if first["verdict"] != "nothing" else f", from {signed(of['without']['estimate'])}"
                )
                parts.append(f"with {long} in the model the slope is {slope}{before}")
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + "."


def _gain(facts: Mapping[str, Any], ladder: pd.DataFrame) -> str:
    what = name(facts["primary"]["predictor"])
    kind = "McFadden’s R²" if facts["kind"] == "binary" else "R²"
    unseen = {"rows": "queries", "clusters": "clusters", "groups": "groups"}[facts["ladder"]["left_out"]]
    steps = {str(row["step"]): row for row in ladder.to_dict("records")}
    # The step without max cosine first: max cosine is the same construct as a local density.
    shown = sorted((s for s in steps if s.endswith(f"+ {what}")), key=lambda step: step.startswith("M4"))
    parts: list[str] = []
    for step in shown:
        row = steps[step]
        terms = [name(t) for t in str(row["terms"]).split(", ")]
        beyond = [t for t in terms if t not in (what, "max cosine")]
        where = "with max cosine as well" if parts else f"beyond {listed(beyond) or 'the mean alone'}"
        of_kind = "" if parts else f" of {kind}"
        parts.append(
            f"{signed_share(row['out_of_group_delta'])}{of_kind} {where} "
            f"({signed_share(row['ci_low'])} to {signed_share(row['ci_high'])})"
        )
    low, high = steps[shown[0]]["ci_low"], steps[shown[0]]["ci_high"]
    adds = (
        "helps to predict" if low > 0 else "makes predictions worse" if high < 0 else "adds nothing certain"
    )
    return f"On {unseen} left out of the fit, {what} {adds}: " + ", ".join(parts) + "."


def cautions(facts: Mapping[str, Any]) -> list[str]:
    """What a reader should know of these data before believing the answer."""
    of, counts = facts["primary"], facts["counts"]
    what = name(of["predictor"])
    out = []
    if facts["controls_missing"]:
        out.append(
            f"Not controlled for, because not given: {listed([name(c) for c in facts['controls_missing']])}."
        )
    for control, why in facts["controls_left_out"].items():
        if why != "a linear combination of the other controls":
            out.append(f"{name(control)} was left out: {why}.")
    if of["clusters"] is None:
        out.append(
            "The errors take queries to be independent; if they come in tasks or topics, name the column "
            "(--cluster)."
        )
    elif of["clusters"] < FEW_CLUSTERS:
        out.append(
            f"There are only {of['clusters']} clusters; with fewer than {FEW_CLUSTERS}, clustered errors "
            "tend to be too small."
        )
    correlation = facts["bandwidths"][0]["correlation"].get("typicality")
    if correlation is not None and abs(correlation) > 0.9:
        out.append(
            f"At this bandwidth {what} is nearly typicality (correlation {number(correlation)}): a wide "
            "kernel measures how typical a text is, not how dense the data are around it."
        )
    lost = {
        "outcomes_without_query": "outcomes have no query of that id",
        "queries_without_outcome": "queries have no outcome",
        "without_covariates": "queries have no covariates",
        "unscored": "queries have an outcome without a value",
        "without_cluster": "queries have no cluster",
        "without_within": "queries have no group",
        "rows_in_groups_without_variation": "queries are alone in their group, or all of it has one outcome: "
        "fits with group effects leave them out",
    }
    for key, text in lost.items():
        if counts.get(key):
            out.append(f"{counts[key]:,} {text}.")
    for control, rows in counts["missing_controls"].items():
        out.append(f"{rows:,} queries have no {name(control)} and were left out.")
    for column, rows in counts.get("floored", {}).items():
        out.append(f"{rows:,} values of {column} were set to the floor.")
    return out


def page(facts: Mapping[str, Any], coefficients: pd.DataFrame, ladder: pd.DataFrame) -> str:
    """The study on one screen."""
    of = facts["primary"]
    lines = [*facts["answer"], ""]
    errors = f"{of['covariance']}" + (f", {of['clusters']:,} clusters" if of["clusters"] else "")
    lines.append(f"Headline model ({of['family']}, {of['form']}, {errors}, n = {of['n']:,}; {of['unit']})")
    shown = coefficients[coefficients["primary"]]
    width = max(len(str(t)) for t in shown["term"])
    lines += [
        f"  {row['term']:<{width}}  {signed(row['estimate']):>8}  SE {number(row['std_error']):>6}  "
        f"{p_value(row['p_value'])}"
        for row in shown.to_dict("records")
    ]
    lines += [
        "",
        "Ladder (gain of R² in sample | 95 % point when shuffled | on rows left out, with interval)",
    ]
    width = max(len(str(s)) for s in ladder["step"])
    for row in ladder.to_dict("records"):
        text = f"  {row['step']:<{width}}  R² {share(row['r_squared']):>6}"
        if row["delta"] == row["delta"]:
            text += (
                f"  {signed_share(row['delta']):>7} | {share(row['shuffle_null']):>6} | "
                f"{signed_share(row['out_of_group_delta']):>7} "
                f"({signed_share(row['ci_low'])} to {signed_share(row['ci_high'])})"
            )
        lines.append(text)
    if len(facts["bandwidths"]) > 1:
        lines += [
            "",
            "By bandwidth (slope | with typicality | with max cosine | correlation with typicality)",
        ]
        wide = max(len(setting(b)) for b in facts["bandwidths"])
        for b in facts["bandwidths"]:
            with_typicality = b["slopes"].get("with_typicality") or (
                b["slopes"].get("headline") if "typicality" in of["controls"] else None
            )
            cells = [b["slopes"].get("headline"), with_typicality, b["slopes"].get("with_max_cosine")]
            shown_cells = [signed(c["estimate"]) if c else "unknown" for c in cells]
            shown_cells.append(number(b["correlation"].get("typicality")))
            lines.append(f"  {setting(b):<{wide}}  " + " | ".join(f"{c:>7}" for c in shown_cells))
    if facts["notices"]:
        lines += ["", "Mind"] + [f"  * {note}" for note in facts["notices"]]
    return "\n".join(lines)
