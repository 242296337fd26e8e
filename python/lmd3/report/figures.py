"""The report's figures as plotly JSON: plain dictionaries, drawn by the page's own copy of plotly.js."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from lmd3.analysis import words

INK, MUTED, GRID = "#1d2530", "#66707d", "#e7eaee"
BLUE, OCHRE, GREY = "#27598c", "#b8642b", "#a9b2bd"
#: Points drawn behind the bins at most.
MOST_POINTS = 1500
#: Groups with a picture each.
MOST_PANELS = 12

Figure = dict[str, Any]


def escape_json(value: Any) -> str:
    """JSON that can stand inside a script element: no `<`, `>` or `&`, and no bare line separators."""
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _finite(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def label(text: Any, longest: int = 48) -> str:
    """Text for plotly, which reads a little HTML: shown as it is, not as mark-up."""
    text = str(text)
    return html.escape(text if len(text) <= longest else text[: longest - 1] + "…", quote=False)


def _axis(title: str, **more: Any) -> dict[str, Any]:
    axis = {
        "title": {"text": title, "font": {"size": 13, "color": MUTED}, "standoff": 12},
        "gridcolor": GRID,
        "zeroline": False,
        "linecolor": GREY,
        "tickcolor": GREY,
        "ticks": "outside",
        "ticklen": 4,
        "tickfont": {"size": 12, "color": INK},
        "automargin": True,
    }
    return axis | more


def _layout(height: int, **more: Any) -> dict[str, Any]:
    layout = {
        "height": height,
        "margin": {"l": 64, "r": 16, "t": 16, "b": 52},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "color": INK},
        "showlegend": False,
        "modebar": {"bgcolor": "rgba(255,255,255,.8)", "color": GREY, "activecolor": INK},
        "hoverlabel": {"bgcolor": "#fff", "bordercolor": GREY, "font": {"color": INK, "size": 12}},
    }
    return layout | more


def _interval(low: ArrayLike, mid: ArrayLike, high: ArrayLike) -> dict[str, Any]:
    mid_, low_, high_ = (np.asarray(x, dtype=np.float64) for x in (mid, low, high))
    return {
        "type": "data",
        "symmetric": False,
        "array": high_ - mid_,
        "arrayminus": mid_ - low_,
        "thickness": 1.6,
        "width": 0,
    }


def predictor_title(facts: Mapping[str, Any]) -> str:
    """The predictor with its unit, for an axis."""
    name = words.name(facts["primary"]["predictor"])
    return f"{name} (nats)" if facts["primary"]["predictor"] == "log_density" else name


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
    y = _axis(outcome_title(facts))
    if facts["kind"] == "continuous":
        low, high = points["value"].quantile([0.01, 0.99])
        low, high = min(low, overall["ci_low"].min()), max(high, overall["ci_high"].max())
        y["range"] = [low - 0.04 * (high - low), high + 0.04 * (high - low)]
    else:
        y["tickformat"] = ".0%"
    # A long tail of single queries must not squeeze the bins.
    x = overall["predictor"].iloc[[0, -1]].to_numpy()
    pad = 0.06 * (x[1] - x[0])
    x_axis = _axis(predictor_title(facts), range=[x[0] - pad, x[1] + pad])
    return {"data": data, "layout": _layout(400, xaxis=x_axis, yaxis=y)}


def _bin_trace(bins: pd.DataFrame, colour: str, size: int, **more: Any) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers+lines",
        "x": bins["predictor"].to_numpy(),
        "y": bins["mean"].to_numpy(),
        "error_y": _interval(bins["ci_low"], bins["mean"], bins["ci_high"]) | {"color": colour},
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
    layout = _layout(70 + 170 * rows)
    layout["margin"] = {"l": 60, "r": 10, "t": 26, "b": 52}
    gap_x, gap_y = 0.03, min(0.35, 44 / max(170 * rows, 1))
    width, height = (1 - gap_x * (columns - 1)) / columns, (1 - gap_y * (rows - 1)) / rows
    shown = bins[bins["group"].isin(names)]
    limits = {}
    for axis, low, high in (("x", "predictor", "predictor"), ("y", "ci_low", "ci_high")):
        # Bins of few rows have huge intervals; letting a few run out of the picture keeps the rest readable.
        near = 0.02 if axis == "y" else 0.0
        a = min(float(shown[low].quantile(near)), float(shown["mean" if near else low].min()))
        b = max(float(shown[high].quantile(1 - near)), float(shown["mean" if near else high].max()))
        limits[axis] = [a - 0.06 * (b - a), b + 0.06 * (b - a)]
    if facts["kind"] == "binary":
        limits["y"] = [-0.03, 1.03]
    data, annotations = [], []
    for number, name in enumerate(names):
        row, column = divmod(number, columns)
        tag = "" if number == 0 else str(number + 1)
        left, top = column * (width + gap_x), 1 - row * (height + gap_y)
        last = number + columns >= len(names)
        layout[f"xaxis{tag}"] = _axis(
            "",
            domain=[left, left + width],
            anchor=f"y{tag}",
            range=limits["x"],
            nticks=4,
            showticklabels=last,
        )
        layout[f"yaxis{tag}"] = _axis(
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
    return {"data": data, "layout": layout | {"annotations": annotations}}


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
            "error_x": _interval([of["ci_low"]], [of["estimate"]], [of["ci_high"]]) | {"color": colour},
            "marker": {"size": 10, "color": colour},
            "hovertemplate": f"{words.signed(of['estimate'])} ({words.signed(of['ci_low'])} to "
            f"{words.signed(of['ci_high'])})<extra></extra>",
        }
        for (name, of), colour in zip(rows, colours, strict=True)
    ]
    unit = "log odds" if facts["kind"] == "binary" else label(words.name(facts["outcome"]))
    what = words.name(facts["primary"]["predictor"])
    y = _axis("", autorange="reversed", categoryorder="array", categoryarray=names, ticks="", showgrid=False)
    ends = [0.0, *(float(of[end]) for _, of in rows for end in ("ci_low", "ci_high"))]
    pad = 0.05 * (max(ends) - min(ends))
    x = _axis(
        f"slope: {unit} per standard deviation of {what}", zeroline=True, zerolinecolor=INK, zerolinewidth=1
    )
    x["range"] = [min(ends) - pad, max(ends) + pad]
    return {"data": data, "layout": _layout(90 + 34 * len(rows), xaxis=x, yaxis=y)}


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
            "marker": {"color": "#c9d6e4"},
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
            "name": "on rows left out, 95 % interval",
            "y": names,
            "x": steps["out_of_group_delta"].to_numpy(),
            "error_x": _interval(steps["ci_low"], steps["out_of_group_delta"], steps["ci_high"])
            | {"color": BLUE},
            "marker": {"size": 8, "color": BLUE},
            "hovertemplate": "left out %{x:.4f}<extra></extra>",
        },
    ]
    kind = "McFadden’s R²" if facts["kind"] == "binary" else "R²"
    layout = _layout(
        120 + 38 * len(names),
        xaxis=_axis(f"gain of {kind}", zeroline=True, zerolinecolor=INK, zerolinewidth=1),
        yaxis=_axis("", autorange="reversed", ticks="", showgrid=False),
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 12}},
        bargap=0.45,
    )
    layout["margin"] = {"l": 64, "r": 16, "t": 36, "b": 52}
    return {"data": data, "layout": layout}


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
                "error_y": _interval(
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
    ticks = sorted({float(r["bandwidth"]) for r in rows})
    layout = _layout(
        330,
        xaxis=_axis(
            "bandwidth h (distance)", type="log", tickvals=ticks, ticktext=[f"{h:.3g}" for h in ticks]
        ),
        yaxis=_axis("slope per standard deviation", zeroline=True, zerolinecolor=INK, zerolinewidth=1),
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 12}},
    )
    layout["margin"] = {"l": 64, "r": 16, "t": 36, "b": 52}
    return {"data": data, "layout": layout}
