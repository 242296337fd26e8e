"""The answer of a study in plain words, and the cautions that its data call for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
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
    taken = _taken(facts)
    if not found:
        before = f"{taken[0].upper()}{taken[1:]}. " if taken else ""
        return (
            f"{before}Typicality (the cosine to the corpus mean) is not known here, so this can't tell "
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
    text = "; ".join([taken, *parts] if taken else parts)
    return text[0].upper() + text[1:] + "."


def _taken(facts: Mapping[str, Any]) -> str:
    """Which controls but typicality leave nothing of a slope that there is without any; empty: none do."""
    path = facts.get("by_controls") or []
    if facts["primary"]["p_value"] < 0.05 or not path or path[0]["added"] or path[0]["p_value"] >= 0.05:
        return ""
    what = name(facts["primary"]["predictor"])
    for before, after in pairwise(path):
        gone = after["p_value"] >= 0.05 or after["estimate"] * before["estimate"] < 0
        if gone:
            if after["added"] == ["typicality"]:
                return ""
            verb, they = ("explain", "them") if len(after["added"]) > 1 else ("explains", "it")
            added = listed([name(c) for c in after["added"]])
            return (
                f"{added} {verb} what {what} seemed to show: without {they} the slope is "
                f"{signed(before['estimate'])} ({_range(before)}), with {they} {signed(after['estimate'])} "
                f"({_range(after)})"
            )
    return ""


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
    empty = [c for c, why in facts["controls_left_out"].items() if why == "no values"]
    absent = list(dict.fromkeys([*facts["controls_missing"], *empty]))
    if absent:
        out.append(f"Not controlled for, because not given: {listed([name(c) for c in absent])}.")
    for control, why in facts["controls_left_out"].items():
        if control == "duplicates" and why == "the same for all queries":
            continue  # no query has a copy in the corpus: nothing to mind
        if why not in ("a linear combination of the other controls", "no values"):
            out.append(f"{name(control)} was left out: {why}.")
    if of["clusters"] is None:
        out.append(
            "The errors take queries to be independent; if they come in tasks or topics, name the column "
            "(--cluster)."
        )
    if facts.get("independent") and facts["clusters"]["source"] == "kmeans":
        out.append(_near(facts))
    if facts.get("inference", {}).get("few"):
        out.append(_few(facts))
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


def _few(facts: Mapping[str, Any]) -> str:
    """What decides where clusters are few, and what stands beside."""
    of, found = facts["primary"], facts["inference"]
    text = (
        f"The {of['clusters']} clusters count as {number(found['effective_clusters'], 2)} of equal weight "
        f"(fewer than {FEW_CLUSTERS}), so p-value and interval are those of a {of['inference']}; the plain "
        f"clustered errors would say {p_value(found['sandwich']['p_value'])}"
    )
    if found["cr2"] is not None and facts["kind"] == "continuous":
        text += f", CR2 with Satterthwaite’s df {p_value(found['cr2']['p_value'])}"
    check = found["linear_probability"]
    if check is not None:
        agree = (check["p_value"] < 0.05) == (of["p_value"] < 0.05)
        text += (
            f"; a linear-probability model with a restricted bootstrap "
            f"{'agrees' if agree else 'does not agree'} ({p_value(check['p_value'])})"
        )
    return text + "."


def _near(facts: Mapping[str, Any]) -> str:
    """That clusters are near queries, and what errors of independent queries would say."""
    of, other = facts["primary"], facts["independent"]
    return (
        f"No group is named, so near queries (k-means, {of['clusters']} clusters) are taken together; errors "
        f"that take queries as independent ({other['covariance']}) would say {p_value(other['p_value'])}."
    )


def findings(facts: Mapping[str, Any]) -> list[str]:
    """What the tables beside the headline say, as far as they were made."""
    of, out = facts["primary"], []
    what = name(of["predictor"])
    many = facts.get("multiplicity")
    if many and many["looks"] > 1:
        out.append(
            f"Of {many['specifications']} specifications {100 * many['share_of_same_sign']:.0f} % have the "
            f"sign of the primary one, {100 * many['share_below_05']:.0f} % are below .05; allowing for all "
            f"{many['looks']} looks (max-T by {many['method']}, {many['draws']:,} draws) the primary one has "
            f"{p_value(many['p_max_t'])}."
        )
    shuffle = facts.get("negative_controls", {}).get("shuffle")
    if shuffle:
        out.append(
            f"Shuffled {what} ({shuffle['draws']} times, within groups where there are any) gives slopes "
            f"from {signed(shuffle['low'])} to {signed(shuffle['high'])} (95 % of them)."
        )
    noise = facts.get("negative_controls", {}).get("random_embedding")
    if noise:
        out.append(
            f"Densities among vectors that mean nothing ({noise['draws']} draws) give slopes from "
            f"{signed(noise['low'])} to {signed(noise['high'])}."
        )
    other = facts.get("contrast")
    if other:
        unit = "log odds" if other["scale"] == "log odds" else other["scale"]
        out.append(
            f"Slope of {other['side']}: {signed(other['estimate'])} {unit} per standard deviation "
            f"({_range(other)}, {p_value(other['p_value'])}), {other['covariance']}."
        )
    out += _changed(facts)
    apart = facts.get("heterogeneity")
    if apart and apart.get("groups", 0) > 1:
        out.append(
            f"Between {apart['groups']} groups slopes differ by a standard deviation of "
            f"{number(apart['tau'])} (I² {100 * apart['i_squared']:.0f} %, {p_value(apart['p_value'])}); "
            f"their mean is {signed(apart['mean'])} ({_range(apart)})."
        )
    measured = facts.get("measurement")
    if measured and not measured["exact"]:
        fixed = measured.get("regression_calibration")
        text = f"Partial reliability of {what}: {number(measured['reliability'])}"
        if fixed and measured["reliability"] < 0.98:
            text += f"; corrected for it the slope is {signed(fixed['estimate'])} ({_range(fixed)})"
        out.append(f"{text}: {measured['advice']}.")
    parts = facts.get("subsets")
    if parts and parts.get("first"):
        first = parts["first"]
        sure = "is sure" if first["p_by"] < 0.05 else "is not sure"
        out.append(
            f"Of the corpus’s groups the outcome goes most with what “{first['subset']}” adds to the density "
            f"({signed(first['estimate'])} per standard deviation); allowing for all groups this {sure} "
            f"({p_value(first['p_by'])})."
        )
    held = facts.get("support")
    if held:
        out.append(
            f"{held['unsupported']:,} queries lie outside the training data’s support (sparser than "
            f"training rows, at a false-discovery rate of {100 * held['alpha']:.0f} %)."
        )
    moran = facts.get("moran")
    if moran and moran["p_value"] < 0.05:
        out.append(
            f"Residuals of near queries are alike (Moran’s I {number(moran['value'])}, "
            f"{p_value(moran['p_value'])}): errors that take queries as independent are too small."
        )
    bent = facts.get("curvature")
    if bent and bent["p_curvature"] < 0.01:
        out.append(f"The effect of {what} is not a straight line ({p_value(bent['p_curvature'])}).")
    return out


def _changed(facts: Mapping[str, Any]) -> list[str]:
    """What the tests of a study of changes say."""
    of = facts.get("paired")
    if not of:
        return []
    mean = of["mean_change"]
    out = [
        f"The outcome went from {number(mean['before'])} to {number(mean['after'])} on average: "
        f"{signed(mean['estimate'])} ({_range(mean)}, {p_value(mean['p_value'])} by sign flips)."
    ]
    if "mcnemar" in of:
        m = of["mcnemar"]
        out.append(
            f"{m['gained']:,.0f} queries turned right and {m['lost']:,.0f} wrong (McNemar’s exact test, "
            f"{p_value(m['p_value'])}, which takes queries as independent)."
        )
    if "randomisation" in of:
        r = of["randomisation"]
        out.append(
            f"If doses were assigned at random within groups, that none matters has {p_value(r['p_value'])} "
            f"({r['permutations']:,} permutations)."
        )
    through = of.get("mediation")
    if through and "refused" in through:
        out.append(f"Mediation is not estimated: {through['refused']}.")
    elif through:
        value, low, high = through["indirect"]
        out.append(
            f"Of the dose’s effect {signed(value)} ({signed(low)} to {signed(high)}) passes through density, "
            f"{signed(through['direct'][0])} does not; an error correlation of "
            f"{number(through['rho_zero'], 2)} would explain the first away."
        )
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
    beside = findings(facts)
    if beside:
        lines += ["", "Beside"] + [f"  * {text}" for text in beside]
    if facts["notices"]:
        lines += ["", "Mind"] + [f"  * {note}" for note in facts["notices"]]
    return "\n".join(lines)
