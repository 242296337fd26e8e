"""The main numbers of a study as a LaTeX table (booktabs), for a paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from lmd3.analysis import words

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def escape(text: Any) -> str:
    """Text as LaTeX shows it: no character of it is a command."""
    cleaned = "".join(c if c.isprintable() else " " for c in str(text))
    return "".join(_SPECIAL.get(c, c) for c in cleaned)


def _number(value: float, signed: bool = False) -> str:
    """In mathematics, with a true minus sign."""
    if value is None or value != value:
        return "--"
    shown = (words.signed(value) if signed else words.number(value)).replace("−", "-").replace(",", "{,}")
    if "e" in shown:
        mantissa, exponent = shown.split("e")
        return rf"${mantissa} \times 10^{{{int(exponent)}}}$"
    return f"${shown}$"


def _p(value: float) -> str:
    if value is None or value != value:
        return "--"
    return f"${words.p_value(value).removeprefix('p ').removeprefix('= ')}$"


def table(facts: Mapping[str, Any], models: list[tuple[str, Mapping[str, Any]]], ladder: pd.DataFrame) -> str:
    """The slope under each model with its interval, then the ladder.

    Args:
        facts: `summary.json`.
        models: (name, slope) of the primary specification, the headline first.
        ladder: `ladder.parquet`.
    """
    of = facts["primary"]
    what, outcome = escape(words.name(of["predictor"])), escape(words.name(facts["outcome"]))
    unit = "log odds" if facts["kind"] == "binary" else "units of the outcome"
    kind = "McFadden's $R^2$" if facts["kind"] == "binary" else "$R^2$"
    setting = escape(words.setting(of))
    clusters = f", {of['clusters']:,} clusters" if of.get("clusters") else ""
    controls = escape(words.listed([words.name(c) for c in of["controls"]]) or "none")
    lines = [
        "% needs \\usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        r"\begin{tabular}{lrrrr}",
        r"\toprule",
        r"Model & Estimate & SE & 95\,\% interval & $p$ \\",
        r"\midrule",
    ]
    for name, slope in models:
        interval = f"{_number(slope['ci_low'], True)} to {_number(slope['ci_high'], True)}"
        lines.append(
            f"{escape(name)} & {_number(slope['estimate'], True)} & {_number(slope['std_error'])} & "
            f"{interval} & {_p(slope['p_value'])} \\\\"
        )
    lines += [r"\midrule", rf"Step & {kind} & Gain & Gain, left out & 95\,\% interval \\", r"\midrule"]
    for row in ladder.to_dict("records"):
        cells = [escape(row["step"]), _number(row["r_squared"])]
        if row["delta"] is None or row["delta"] != row["delta"]:
            cells += ["--", "--", "--"]
        else:
            cells += [_number(row["delta"], True), _number(row["out_of_group_delta"], True)]
            cells.append(f"{_number(row['ci_low'], True)} to {_number(row['ci_high'], True)}")
        lines.append(" & ".join(cells) + r" \\")
    given = f" ({setting})" if setting else ""
    lines += [
        r"\bottomrule",
        r"\end{tabular}",
        rf"\caption{{Slope of {outcome} on {what}{given}, in {unit} per standard "
        rf"deviation; {of['n']:,} queries{clusters}; errors: {escape(of['covariance'])}; "
        rf"controls: {controls}. The gain on what was left out of the fit may be negative.}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"
