"""A study's further evidence: groups, specifications, negative controls, the fit, subsets, measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lmd3.analysis import words
from lmd3.report.figures.style import (
    BLUE,
    GREY,
    MUTED,
    OCHRE,
    PALE,
    SERIES,
    Figure,
    axis,
    interval,
    label,
    layout,
    line,
    note,
    with_legend,
    zero_line,
)

#: Groups of a forest at most (the largest), specifications of a curve, names of a ranked list.
MOST_GROUPS, MOST_SPECIFICATIONS, MOST_NAMES = 40, 400, 24


def _unit(facts: Mapping[str, Any]) -> str:
    return "log odds" if facts["kind"] == "binary" else label(words.name(facts["outcome"]))


def _slope_axis(facts: Mapping[str, Any]) -> dict[str, Any]:
    return zero_line(f"slope: {_unit(facts)} per standard deviation")


def _fit(values: pd.DataFrame, drawn: dict[str, Any], side: str = "xaxis") -> None:
    """Intervals of tiny groups run out of the picture, so that the others can be read."""
    low, high = values["ci_low"].dropna(), values["ci_high"].dropna()
    if len(low) < 8:
        return
    a = min(float(low.quantile(0.03)), float(values["estimate"].min()), 0.0)
    b = max(float(high.quantile(0.97)), float(values["estimate"].max()), 0.0)
    drawn[side]["range"] = [a - 0.05 * (b - a), b + 0.05 * (b - a)]


def _marks(
    rows: pd.DataFrame, names: list[str], estimate: str, low: str, high: str, **more: Any
) -> dict[str, Any]:
    """A dot with its interval per name, beside each other on a horizontal axis."""
    colour = more.pop("colour", BLUE)
    return {
        "type": "scatter",
        "mode": "markers",
        "x": rows[estimate].to_numpy(),
        "y": names,
        "error_x": interval(rows[low], rows[estimate], rows[high]) | {"color": colour},
        "marker": {"size": 8, "color": colour} | more.pop("marker", {}),
        "hovertemplate": "%{y}: %{x:.3f}<extra></extra>",
        **more,
    }


def _names_axis(names: list[str]) -> dict[str, Any]:
    return axis(
        "", autorange="reversed", categoryorder="array", categoryarray=names, ticks="", showgrid=False
    )


def forest(facts: Mapping[str, Any], table: pd.DataFrame) -> Figure | None:
    """The slope inside every group (the largest ones), their mean, and where a new group's would lie."""
    groups = table[(table["kind"] == "group") & table["estimate"].notna()]
    if groups.empty:
        return None
    groups = groups.sort_values("n", ascending=False, kind="stable").head(MOST_GROUPS)
    groups = groups.sort_values("estimate", ascending=False, kind="stable")
    names = [f"{label(g, 32)} ({int(n):,})" for g, n in zip(groups["group"], groups["n"], strict=True)]
    data = [
        _marks(groups, names, "estimate", "ci_low", "ci_high", name="group, 95 % interval"),
        {
            "type": "scatter",
            "mode": "markers",
            "name": "drawn towards the mean",
            "x": groups["shrunken"].to_numpy(),
            "y": names,
            "marker": {"size": 9, "color": "#fff", "line": {"color": OCHRE, "width": 1.6}},
            "hovertemplate": "%{y}: %{x:.3f} drawn towards the mean<extra></extra>",
        },
    ]
    shown = [*names]
    for kind, name, colour in (
        ("random effects", "mean over groups", BLUE),
        ("prediction", "a new group (95 %)", MUTED),
    ):
        row = table[table["kind"] == kind]
        if len(row) and np.isfinite(row["ci_low"].iloc[0]):
            mark = {"symbol": "diamond" if colour == BLUE else "line-ns", "size": 12}
            data.append(
                _marks(
                    row, [name], "estimate", "ci_low", "ci_high", colour=colour, marker=mark, showlegend=False
                )
            )
            shown.append(name)
    drawn = with_legend(120 + 24 * len(shown), xaxis=_slope_axis(facts), yaxis=_names_axis(shown))
    _fit(groups, drawn)
    return {"data": data, "layout": drawn}


def left_out(facts: Mapping[str, Any], table: pd.DataFrame) -> Figure | None:
    """The headline slope with one cluster left out: those that change it most."""
    if len(table) < 3:
        return None
    rows = table.reindex(table["change"].abs().sort_values(ascending=False, kind="stable").index).head(12)
    rows = rows.sort_values("estimate", ascending=False, kind="stable")
    names = [f"without {label(name, 40)}" for name in rows["name"]]
    of = facts["primary"]
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "markers",
            "x": rows["estimate"].to_numpy(),
            "y": names,
            "marker": {"size": 8, "color": BLUE},
            "hovertemplate": "%{y}: %{x:.4f}<extra></extra>",
        }
    ]
    shapes = [
        _band(of["ci_low"], of["ci_high"]),
        {
            "type": "line",
            "x0": of["estimate"],
            "x1": of["estimate"],
            "yref": "paper",
            "y0": 0,
            "y1": 1,
            "line": {"color": OCHRE, "width": 1.4},
        },
    ]
    drawn = layout(100 + 24 * len(names), xaxis=_slope_axis(facts), yaxis=_names_axis(names), shapes=shapes)
    ends = [of["ci_low"], of["ci_high"], float(rows["estimate"].min()), float(rows["estimate"].max()), 0.0]
    pad = 0.05 * (max(ends) - min(ends))
    drawn["xaxis"]["range"] = [min(ends) - pad, max(ends) + pad]
    return {"data": data, "layout": drawn}


def _band(low: float, high: float) -> dict[str, Any]:
    return {
        "type": "rect",
        "x0": low,
        "x1": high,
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "fillcolor": PALE,
        "opacity": 0.35,
        "line": {"width": 0},
        "layer": "below",
    }


def specifications(facts: Mapping[str, Any], table: pd.DataFrame) -> Figure | None:
    """Slopes of all specifications in order, and below each what it is made of."""
    rows = table[table["estimate"].notna()]
    if len(rows) < 3:
        return None
    if len(rows) > MOST_SPECIFICATIONS:
        kept = rows[rows["primary"].astype(bool)]
        rest = rows[~rows["primary"].astype(bool)]
        rows = pd.concat([kept, rest.sample(MOST_SPECIFICATIONS - len(kept), random_state=0)])
    rows = rows.sort_values("estimate", kind="stable").reset_index(drop=True)
    x = np.arange(1, len(rows) + 1)
    primary = rows["primary"].fillna(False).to_numpy(dtype=bool)
    clear = ((rows["ci_low"] > 0) | (rows["ci_high"] < 0)).to_numpy()
    data: list[dict[str, Any]] = []
    for name, at, colour, size in (
        ("interval holds 0", ~clear & ~primary, GREY, 5),
        ("interval without 0", clear & ~primary, BLUE, 5),
        ("declared primary", primary, OCHRE, 10),
    ):
        if not at.any():
            continue
        of = rows[at]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "x": x[at],
                "y": of["estimate"].to_numpy(),
                "error_y": interval(of["ci_low"], of["estimate"], of["ci_high"])
                | {"color": colour, "thickness": 1},
                "marker": {"size": size, "color": colour},
                "text": [_specification(row) for row in of.to_dict("records")],
                "hovertemplate": "%{y:.3f}<br>%{text}<extra></extra>",
            }
        )
    choices = _choices(rows)
    names, heights = [], []
    for title, values in choices:
        names += [(title, value) for value in dict.fromkeys(values)]
    for position, (title, value) in enumerate(names):
        at = np.array([v == value for v in dict(choices)[title]])
        heights.append(f"{title}: {value}")
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": x[at],
                "y": [position] * int(at.sum()),
                "yaxis": "y2",
                "marker": {
                    "symbol": "line-ns",
                    "size": 9,
                    "line": {"width": 1.6, "color": [OCHRE if p else MUTED for p in primary[at]]},
                },
                "hoverinfo": "skip",
                "showlegend": False,
            }
        )
    below = 24 * len(names) + 10
    height = 300 + below
    share = below / (height - 60)
    drawn = with_legend(
        height,
        xaxis=axis(
            "specifications, by slope", showticklabels=False, ticks="", showgrid=False, anchor="y2",
            range=[0, len(rows) + 1],
        ),
        yaxis=zero_line(f"slope ({_unit(facts)} per SD)", domain=[min(0.9, share + 0.03), 1]),
        yaxis2=axis(
            "", domain=[0, share], tickvals=list(range(len(names))), ticktext=[label(h, 44) for h in heights],
            autorange="reversed", ticks="", range=[len(names) - 0.5, -0.5],
        ),
    )  # fmt: skip
    drawn["yaxis2"].pop("autorange")
    return {"data": data, "layout": drawn}


def _text(value: Any, nothing: str) -> str:
    return nothing if value is None or value != value else str(value)


def _choices(rows: pd.DataFrame) -> list[tuple[str, list[str]]]:
    """What specifications differ in: (title, the value of each)."""
    of: list[tuple[str, list[str]]] = []
    several = rows["kernel"].nunique() > 1
    settings = [
        ("" if not several else f"{row['kernel']} ")
        + (_text(row["rule"], "") or f"h = {row['bandwidth']:.3g}")
        if row["bandwidth"] == row["bandwidth"] and row["bandwidth"] is not None
        else "none"
        for row in rows.to_dict("records")
    ]
    of.append(("bandwidth", settings))
    for title, column, nothing in (
        ("controls", "controls", "none"),
        ("form", "form", "pooled"),
        ("density of", "subset", "all of the corpus"),
    ):
        of.append((title, [_text(v, nothing).replace("_", " ") for v in rows[column]]))
    return [(title, values) for title, values in of if len(set(values)) > 1]


def _specification(row: Mapping[Any, Any]) -> str:
    parts = [words.setting(row), f"controls: {row['controls']}", str(row["form"])]
    if _text(row.get("subset"), ""):
        parts.append(f"density of {row['subset']}")
    return label("; ".join(part for part in parts if part), 160)


def shuffles(facts: Mapping[str, Any], table: pd.DataFrame) -> Figure | None:
    """Slopes under negative controls, and the slope itself."""
    if table.empty:
        return None
    data = []
    for number, (control, of) in enumerate(table.groupby("control", sort=False)):
        data.append(
            {
                "type": "histogram",
                "name": label(f"{control} ({len(of):,} draws)"),
                "x": of["estimate"].to_numpy(),
                "marker": {"color": SERIES[number] if number else PALE},
                "opacity": 0.75 if number else 1.0,
                "nbinsx": 40,
                "hovertemplate": "%{x}: %{y}<extra></extra>",
            }
        )
    return {"data": data, "layout": _observed(facts["primary"]["estimate"], _slope_axis(facts))}


def _observed(value: float, x: dict[str, Any]) -> dict[str, Any]:
    """The layout of draws with the value found among them."""
    return with_legend(
        280,
        barmode="overlay",
        bargap=0.03,
        xaxis=x,
        yaxis=axis("draws"),
        shapes=[
            {
                "type": "line",
                "x0": value,
                "x1": value,
                "yref": "paper",
                "y0": 0,
                "y1": 1,
                "line": {"color": OCHRE, "width": 2.4},
            }
        ],
        annotations=[
            note(
                f" found: {words.signed(value)} ",
                x=value,
                xref="x",
                y=0.98,
                yanchor="top",
                xanchor="left",
                font={"size": 12, "color": OCHRE},
            )
        ],
    )


def _chart(table: pd.DataFrame, name: str) -> pd.DataFrame | None:
    of = table[table["chart"] == name]
    return of if len(of) > 2 else None


def qq(table: pd.DataFrame) -> Figure | None:
    """Quantiles of the residuals against those of a normal distribution."""
    of = _chart(table, "qq")
    if of is None:
        return None
    low = float(max(of["x"].min(), of["y"].min()))
    high = float(min(of["x"].max(), of["y"].max()))
    data = [
        line([low, high], [low, high], OCHRE),
        {
            "type": "scatter",
            "mode": "markers",
            "x": of["x"].to_numpy(),
            "y": of["y"].to_numpy(),
            "marker": {"size": 5, "color": BLUE},
            "hovertemplate": "%{x:.2f}, %{y:.2f}<extra></extra>",
        },
    ]
    return {"data": data, "layout": layout(300, xaxis=axis("normal quantile"), yaxis=axis("residual (SD)"))}


def _with_bars(of: pd.DataFrame, colour: str = BLUE) -> dict[str, Any]:
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "markers+lines",
        "x": of["x"].to_numpy(),
        "y": of["y"].to_numpy(),
        "marker": {"size": 7, "color": colour},
        "line": {"color": colour, "width": 1, "dash": "dot"},
        "hovertemplate": "%{x:.3g}, %{y:.3g}<extra></extra>",
    }
    if of["ci_low"].notna().all():
        trace["error_y"] = interval(of["ci_low"], of["y"], of["ci_high"]) | {"color": colour}
    return trace


def scale_location(table: pd.DataFrame) -> Figure | None:
    """How the size of the residuals goes with the fitted value."""
    of = _chart(table, "scale_location")
    if of is None:
        return None
    drawn = layout(300, xaxis=axis("fitted value"), yaxis=axis("√|residual| (SD)", rangemode="tozero"))
    return {"data": [_with_bars(of)], "layout": drawn}


def calibration(table: pd.DataFrame) -> Figure | None:
    """Share observed against probability predicted."""
    of = _chart(table, "calibration")
    if of is None:
        return None
    ends = [float(min(of["x"].min(), of["y"].min())), float(max(of["x"].max(), of["y"].max()))]
    data = [line(ends, ends, OCHRE), _with_bars(of)]
    percent = {"tickformat": ".0%"}
    drawn = layout(
        320, xaxis=axis("predicted", **percent), yaxis=axis("observed: share of queries", **percent)
    )
    return {"data": data, "layout": drawn}


def smooth(facts: Mapping[str, Any], table: pd.DataFrame) -> Figure | None:
    """A spline of the predictor beside the controls: is the slope a straight line?"""
    of = _chart(table, "smooth")
    if of is None:
        return None
    of = of.sort_values("x", kind="stable")
    x = of["x"].to_numpy()
    data: list[dict[str, Any]] = []
    if of["ci_low"].notna().all():
        data.append(
            line(
                [*x, *x[::-1]],
                [*of["ci_high"], *of["ci_low"].to_numpy()[::-1]],
                fill="toself",
                fillcolor="rgba(39,89,140,.14)",
                line={"width": 0},
            )
        )
    data.append(
        {
            "type": "scatter",
            "mode": "lines",
            "x": x,
            "y": of["y"].to_numpy(),
            "line": {"color": BLUE, "width": 2},
            "hovertemplate": "%{x:.3g}: %{y:.3g}<extra></extra>",
        }
    )
    what = words.name(facts["primary"]["predictor"])
    return {
        "data": data,
        "layout": layout(300, xaxis=axis(what), yaxis=zero_line(f"effect ({_unit(facts)})")),
    }


def subsets(facts: Mapping[str, Any], table: pd.DataFrame) -> Figure | None:
    """Groups of the training data in the order of what performance depends on."""
    rows = table.sort_values("rank", kind="stable").head(MOST_NAMES)
    if rows.empty:
        return None
    names = [label(name, 36) for name in rows["subset"]]
    data = []
    for title, prefix, colour, shift in (
        ("leaving it out", "change_", BLUE, -0.16),
        ("its share, all in one model", "", OCHRE, 0.16),
    ):
        trace = _marks(
            rows, names, f"{prefix}estimate", f"{prefix}ci_low", f"{prefix}ci_high", colour=colour, name=title
        )
        # Numbers rather than names for the places, so that the two stand side by side.
        trace |= {"y": np.arange(len(names)) + shift, "text": names}
        data.append(trace | {"hovertemplate": "%{text}: %{x:.3f}<extra></extra>"})
    places = axis("", tickvals=list(range(len(names))), ticktext=names, ticks="", showgrid=False)
    places["range"] = [len(names) - 0.5, -0.5]
    drawn = with_legend(120 + 38 * len(names), xaxis=_slope_axis(facts), yaxis=places)
    return {"data": data, "layout": drawn}


def estimates(rows: pd.DataFrame, names: Sequence[str], title: str) -> Figure:
    """Estimates with their intervals, one under the other.

    Args:
        rows: `estimate`, `ci_low`, `ci_high`.
        names: one for each.
        title: of the axis, with its unit.
    """
    shown = [label(name, 52) for name in names]
    # One category must not hold two rows.
    shown = [name if shown.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(shown)]
    data = [_marks(rows, shown, "estimate", "ci_low", "ci_high", showlegend=False)]
    drawn = layout(90 + 26 * len(shown), xaxis=zero_line(title), yaxis=_names_axis(shown))
    return {"data": data, "layout": drawn}


def contrasts(table: pd.DataFrame) -> Figure | None:
    """Slopes of the two sides of a contrast, and their difference."""
    rows = table[table["estimate"].notna()]
    if rows.empty:
        return None
    scale = label(", ".join(dict.fromkeys(map(str, rows["scale"]))))
    several = rows["scale"].nunique() > 1
    names = [
        f"{s} ({scale})" if several else str(s) for s, scale in zip(rows["side"], rows["scale"], strict=True)
    ]
    return estimates(rows, names, f"slope ({scale})")


def paired(facts: Mapping[str, Any], table: pd.DataFrame) -> Figure | None:
    """Mean change of the outcome, of all queries and by dose."""
    rows = table[(table["test"] == "mean change") & table["ci_low"].notna()]
    if rows.empty:
        return None
    names = [f"{label(part, 40)} ({int(n):,})" for part, n in zip(rows["part"], rows["n"], strict=True)]
    return estimates(rows, names, label(words.name(facts["outcome"])))


def simex(facts: Mapping[str, Any], table: pd.DataFrame) -> Figure | None:
    """The slope as error in the density grows, and back to where there would be none."""
    if len(table) < 3:
        return None
    rows = table.sort_values("added", kind="stable")
    grown = rows[~rows["extrapolation"].astype(bool)]
    found = rows[rows["extrapolation"].astype(bool)]
    ends = {"type": "data", "width": 0}
    data = [
        {
            "type": "scatter",
            "mode": "markers+lines",
            "name": "with error added",
            "x": grown["added"].to_numpy(),
            "y": grown["estimate"].to_numpy(),
            "error_y": ends | {"array": 1.96 * grown["std_error"].to_numpy(), "color": BLUE},
            "marker": {"size": 7, "color": BLUE},
            "line": {"color": BLUE, "width": 1},
        },
        {
            "type": "scatter",
            "mode": "markers",
            "name": "without error (extrapolated)",
            "x": found["added"].to_numpy(),
            "y": found["estimate"].to_numpy(),
            "error_y": ends | {"array": 1.96 * found["std_error"].to_numpy(), "color": OCHRE},
            "marker": {"size": 9, "color": OCHRE},
        },
    ]
    drawn = with_legend(
        300,
        xaxis=axis("variance of the error added (as it is: 0)"),
        yaxis=zero_line(f"slope ({_unit(facts)} per SD)"),
    )
    return {"data": data, "layout": drawn}
