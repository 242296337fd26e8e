"""A study's main figures: outcome against density, slopes by model and bandwidth, the ladder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lmd3.analysis import words
from lmd3.report.figures.style import (
    BLUE,
    GREY,
    LEGEND,
    MOST_PANELS,
    MOST_POINTS,
    MUTED,
    OCHRE,
    PALE,
    Figure,
    axis,
    interval,
    label,
    layout,
    line,
    with_legend,
    zero_line,
)


def predictor_title(facts: Mapping[str, Any]) -> str:
    """The predictor with its unit, for an axis."""
    name = words.name(facts["primary"]["predictor"])
    return f"{name} (nats)" if "log_density" in str(facts["primary"]["predictor"]) else name


def outcome_title(facts: Mapping[str, Any]) -> str:
    """The outcome with its unit, for an axis."""
    name = label(words.name(facts["outcome"]))
    return f"{name}: share of queries" if facts["kind"] == "binary" else f"mean {name}"


def binned(facts: Mapping[str, Any], points: pd.DataFrame, bins: pd.DataFrame) -> Figure:
    """Outcome against predictor over all rows: bins of equal counts, with points behind where continuous."""
    overall = bins[bins["group"].isna()]
    data = []
    if facts["kind"] == "continuous":
        shown = points.sample(MOST_POINTS, random_state=0) if len(points) > MOST_POINTS else points
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": shown["predictor"].to_numpy(),
                "y": shown["value"].to_numpy(),
                "marker": {"size": 4, "color": GREY, "opacity": 0.35},
                "text": [label(i) for i in shown["id"]],
                "hovertemplate": "%{text}<br>%{x:.4g}, %{y:.4g}<extra></extra>",
            }
        )
    data.append(_bin_trace(overall, BLUE, 9))
    y = axis(outcome_title(facts))
    if facts["kind"] == "continuous":
        low, high = points["value"].quantile([0.01, 0.99])
        low, high = min(low, overall["ci_low"].min()), max(high, overall["ci_high"].max())
        y["range"] = [low - 0.04 * (high - low), high + 0.04 * (high - low)]
    else:
        y["tickformat"] = ".0%"
    # A long tail of single queries must not squeeze the bins.
    x = overall["predictor"].iloc[[0, -1]].to_numpy()
    pad = 0.06 * (x[1] - x[0])
    x_axis = axis(predictor_title(facts), range=[x[0] - pad, x[1] + pad])
    return {"data": data, "layout": layout(400, xaxis=x_axis, yaxis=y)}


def _bin_trace(bins: pd.DataFrame, colour: str, size: int, **more: Any) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers+lines",
        "x": bins["predictor"].to_numpy(),
        "y": bins["mean"].to_numpy(),
        "error_y": interval(bins["ci_low"], bins["mean"], bins["ci_high"]) | {"color": colour},
        "marker": {"size": size, "color": colour},
        "line": {"color": colour, "width": 1, "dash": "dot"},
        "customdata": bins[["n", "low", "high"]].to_numpy(),
        "hovertemplate": "%{y:.4g} over %{customdata[0]} queries<br>"
        "from %{customdata[1]:.4g} to %{customdata[2]:.4g}<extra></extra>",
        **more,
    }


def panels(facts: Mapping[str, Any], bins: pd.DataFrame) -> Figure | None:
    """Small pictures, one per group (the largest first), on the same axes; None without groups."""
    names = list(bins["group"].dropna().unique())[:MOST_PANELS]
    if not names:
        return None
    columns = min(3 if max(map(len, names)) > 16 else 4, len(names))
    rows = -(-len(names) // columns)
    drawn = layout(70 + 170 * rows)
    drawn["margin"] = {"l": 60, "r": 10, "t": 26, "b": 52}
    gap_x, gap_y = 0.03, min(0.35, 44 / max(170 * rows, 1))
    width, height = (1 - gap_x * (columns - 1)) / columns, (1 - gap_y * (rows - 1)) / rows
    shown = bins[bins["group"].isin(names)]
    limits = {}
    for side, low, high in (("x", "predictor", "predictor"), ("y", "ci_low", "ci_high")):
        # Bins of few rows have huge intervals; letting a few run out of the picture keeps the rest readable.
        near = 0.02 if side == "y" else 0.0
        a = min(float(shown[low].quantile(near)), float(shown["mean" if near else low].min()))
        b = max(float(shown[high].quantile(1 - near)), float(shown["mean" if near else high].max()))
        limits[side] = [a - 0.06 * (b - a), b + 0.06 * (b - a)]
    if facts["kind"] == "binary":
        limits["y"] = [-0.03, 1.03]
    data, annotations = [], []
    for number, name in enumerate(names):
        row, column = divmod(number, columns)
        tag = "" if number == 0 else str(number + 1)
        left, top = column * (width + gap_x), 1 - row * (height + gap_y)
        last = number + columns >= len(names)
        drawn[f"xaxis{tag}"] = axis(
            "",
            domain=[left, left + width],
            anchor=f"y{tag}",
            range=limits["x"],
            nticks=4,
            showticklabels=last,
        )
        drawn[f"yaxis{tag}"] = axis(
            "",
            domain=[top - height, top],
            anchor=f"x{tag}",
            range=limits["y"],
            nticks=4,
            showticklabels=column == 0,
            tickformat=".0%" if facts["kind"] == "binary" else "",
        )
        of = bins[bins["group"] == name]
        data.append(_bin_trace(of, BLUE, 6, xaxis=f"x{tag}", yaxis=f"y{tag}"))
        annotations.append(
            {
                "text": f"{label(name, 28)} <span style='color:{MUTED}'>({int(of['n'].sum()):,})</span>",
                "x": left,
                "y": top,
                "xref": "paper",
                "yref": "paper",
                "xanchor": "left",
                "yanchor": "bottom",
                "showarrow": False,
                "font": {"size": 12},
            }
        )
    annotations.append(
        {
            "text": predictor_title(facts),
            "x": 0.5,
            "y": 0,
            "xref": "paper",
            "yref": "paper",
            "yanchor": "top",
            "yshift": -28,
            "showarrow": False,
            "font": {"size": 13, "color": MUTED},
        }
    )
    return {"data": data, "layout": drawn | {"annotations": annotations}}


def slopes(facts: Mapping[str, Any], rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Figure:
    """The slope under one model after another, with 95 % intervals; the headline one in colour."""
    names = [name for name, _ in rows]
    colours = [BLUE if number == 0 else MUTED for number in range(len(rows))]
    data = [
        {
            "type": "scatter",
            "mode": "markers",
            "x": [of["estimate"]],
            "y": [name],
            "error_x": interval([of["ci_low"]], [of["estimate"]], [of["ci_high"]]) | {"color": colour},
            "marker": {"size": 10, "color": colour},
            "hovertemplate": f"{words.signed(of['estimate'])} ({words.signed(of['ci_low'])} to "
            f"{words.signed(of['ci_high'])})<extra></extra>",
        }
        for (name, of), colour in zip(rows, colours, strict=True)
    ]
    unit = "log odds" if facts["kind"] == "binary" else label(words.name(facts["outcome"]))
    what = words.name(facts["primary"]["predictor"])
    y = axis("", autorange="reversed", categoryorder="array", categoryarray=names, ticks="", showgrid=False)
    ends = [0.0, *(float(of[end]) for _, of in rows for end in ("ci_low", "ci_high"))]
    pad = 0.05 * (max(ends) - min(ends))
    x = zero_line(f"slope: {unit} per standard deviation of {what}")
    x["range"] = [min(ends) - pad, max(ends) + pad]
    return {"data": data, "layout": layout(90 + 34 * len(rows), xaxis=x, yaxis=y)}


def ladder(facts: Mapping[str, Any], table: pd.DataFrame) -> Figure:
    """Gain of R² by step: in sample (bar), when shuffled (tick), on rows left out (point with interval)."""
    steps = table[table["delta"].notna()]
    names = list(steps["step"])
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": "in sample",
            "y": names,
            "x": steps["delta"].to_numpy(),
            "marker": {"color": PALE},
            "hovertemplate": "in sample %{x:.4f}<extra></extra>",
        },
        {
            "type": "scatter",
            "mode": "markers",
            "name": "in sample when shuffled (95 % point)",
            "y": names,
            "x": steps["shuffle_null"].to_numpy(),
            "marker": {"symbol": "line-ns", "size": 16, "line": {"width": 2, "color": OCHRE}},
            "hovertemplate": "shuffled %{x:.4f}<extra></extra>",
        },
        {
            "type": "scatter",
            "mode": "markers",
            "name": "on what was left out, 95 % interval",
            "y": names,
            "x": steps["out_of_group_delta"].to_numpy(),
            "error_x": interval(steps["ci_low"], steps["out_of_group_delta"], steps["ci_high"])
            | {"color": BLUE},
            "marker": {"size": 8, "color": BLUE},
            "hovertemplate": "left out %{x:.4f}<extra></extra>",
        },
    ]
    kind = "McFadden’s R²" if facts["kind"] == "binary" else "R²"
    drawn = with_legend(
        120 + 38 * len(names),
        xaxis=zero_line(f"gain of {kind}"),
        yaxis=axis("", autorange="reversed", ticks="", showgrid=False),
        bargap=0.45,
    )
    return {"data": data, "layout": drawn}


def bandwidths(facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Slope against bandwidth: headline and with max cosine; None with fewer than two bandwidths."""
    if len(rows) < 2:
        return None
    data = []
    # A little apart, so that intervals do not hide each other.
    for key, name, colour, shift in (
        ("headline", "headline model", BLUE, 1.0),
        ("with_typicality", "with typicality", OCHRE, 1.015),
        ("with_max_cosine", "with max cosine", MUTED, 1.03),
    ):
        of = sorted((r["bandwidth"], r["slopes"][key]) for r in rows if key in r["slopes"])
        if not of:
            continue
        data.append(
            {
                "type": "scatter",
                "mode": "markers+lines",
                "name": name,
                "x": [h * shift for h, _ in of],
                "y": [s["estimate"] for _, s in of],
                "error_y": interval(
                    [s["ci_low"] for _, s in of],
                    [s["estimate"] for _, s in of],
                    [s["ci_high"] for _, s in of],
                )
                | {"color": colour},
                "marker": {"size": 8, "color": colour},
                "line": {"color": colour, "width": 1.2},
                "hovertemplate": "h = %{x:.4g}: %{y:.3f}<extra></extra>",
            }
        )
    seen = {float(r["bandwidth"]): r.get("ess_median") for r in rows}
    ticks = sorted(seen)
    under = [f"{h:.3g}" + (f"<br>ess {words.number(seen[h])}" if seen[h] else "") for h in ticks]
    drawn = with_legend(
        350,
        xaxis=axis("bandwidth h (distance), median ess", type="log", tickvals=ticks, ticktext=under),
        yaxis=zero_line("slope per standard deviation"),
    )
    return {"data": data, "layout": drawn}


def added_variable(facts: Mapping[str, Any], points: pd.DataFrame) -> Figure | None:
    """What the controls leave of the outcome against what they leave of the predictor, and the slope."""
    if not {"predictor_residual", "outcome_residual"} <= set(points.columns):
        return None
    known = points[points["predictor_residual"].notna() & points["outcome_residual"].notna()]
    if len(known) < 3:
        return None
    shown = known.sample(MOST_POINTS, random_state=0) if len(known) > MOST_POINTS else known
    x, y = shown["predictor_residual"].to_numpy(), shown["outcome_residual"].to_numpy()
    slope = float(facts["primary"]["estimate"])
    # Far points must not squeeze the rest; they stay in the table.
    limits = [[float(v) for v in np.quantile(of, [0.005, 0.995])] for of in (x, y)]
    pads = [0.08 * (high - low) for low, high in limits]
    (left, right), (low, high) = limits
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "markers",
            "x": x,
            "y": y,
            "marker": {"size": 4, "color": GREY, "opacity": 0.4},
            "text": [label(i) for i in shown["id"]],
            "hovertemplate": "%{text}<br>%{x:.3g}, %{y:.3g}<extra></extra>",
        },
        line([left, right], [slope * left, slope * right], BLUE, line={"color": BLUE, "width": 2.4}),
    ]
    what = words.name(facts["primary"]["predictor"])
    of = "working residual" if facts["kind"] == "binary" else label(words.name(facts["outcome"]))
    drawn = layout(
        360,
        xaxis=axis(f"{what} left by the controls (SD)", range=[left - pads[0], right + pads[0]]),
        yaxis=axis(f"{of} left by the controls", range=[low - pads[1], high + pads[1]]),
    )
    return {"data": data, "layout": drawn}


def shapley(table: pd.DataFrame, kind: str) -> Figure:
    """R² of the full model, split among blocks of terms."""
    shades = (PALE, "#9fb9d3", "#6f95bb", BLUE, OCHRE, MUTED, GREY)
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": label(words.name(str(row["block"]))),
            "x": [row["r_squared"]],
            "y": [""],
            "marker": {"color": OCHRE if "density" in str(row["block"]) else shades[number % 4]},
            "hovertemplate": f"{label(row['block'])}: %{{x:.4f}}<extra></extra>",
        }
        for number, row in enumerate(table.to_dict("records"))
    ]
    drawn = layout(
        130,
        barmode="relative",
        xaxis=axis(kind),
        yaxis=axis("", showticklabels=False, ticks="", showgrid=False),
        showlegend=True,
        legend=LEGEND | {"traceorder": "normal"},
    )
    drawn["margin"] = {"l": 16, "r": 16, "t": 34, "b": 48}
    return {"data": data, "layout": drawn}
