"""Figures of interventions and training runs, from plain frames; reusable beyond any one experiment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from lmd3.analysis import words
from lmd3.report.figures.style import (
    BLUE,
    GREY,
    MOST_POINTS,
    MUTED,
    OCHRE,
    PALE,
    SERIES,
    Figure,
    axis,
    interval,
    label,
    line,
    note,
    with_legend,
    zero_line,
)


def dose_curve(
    rows: pd.DataFrame, title: str, *, baseline: Mapping[str, float] | None = None
) -> Figure | None:
    """An outcome's change against the number of copies, one line per kind.

    Args:
        rows: `kind`, `dose` (copies; untreated rows have dose 0 and any kind), `estimate`, `ci_low`,
            `ci_high`, perhaps `n`.
        title: of the vertical axis, with its unit.
        baseline: `ci_low` and `ci_high` of the untreated, drawn as a band; by default those of dose 0.
    """
    rows = rows[rows["estimate"].notna()]
    treated, none = rows[rows["dose"] > 0], rows[rows["dose"] == 0]
    if treated.empty:
        return None
    doses = sorted({float(dose) for dose in treated["dose"]})
    data: list[dict[str, Any]] = []
    kinds = sorted(set(treated["kind"].astype(str)))
    for number, kind in enumerate(kinds):
        of = treated[treated["kind"] == kind].sort_values("dose", kind="stable")
        colour = SERIES[number % len(SERIES)]
        # A little apart, so that intervals do not hide each other.
        shift = 1 + 0.03 * (number - (len(kinds) - 1) / 2)
        trace: dict[str, Any] = {
            "type": "scatter",
            "mode": "markers+lines",
            "name": label(kind),
            "x": of["dose"].to_numpy(dtype=np.float64) * shift,
            "y": of["estimate"].to_numpy(),
            "error_y": interval(of["ci_low"], of["estimate"], of["ci_high"]) | {"color": colour},
            "marker": {"size": 8, "color": colour},
            "line": {"color": colour, "width": 1.4},
            "hovertemplate": f"{label(kind)}: %{{y:.3f}}<extra></extra>",
        }
        if "n" in of.columns:
            trace["customdata"] = of["n"].to_numpy()
            trace["hovertemplate"] = f"{label(kind)}: %{{y:.3f}} over %{{customdata}} items<extra></extra>"
        data.append(trace)
    band = baseline
    if band is None and len(none):
        band = {"ci_low": float(none["ci_low"].min()), "ci_high": float(none["ci_high"].max())}
    drawn = with_legend(
        320,
        xaxis=axis(
            "copies leaked", type="log", tickvals=doses, ticktext=[f"{d:g}" for d in doses],
            range=[float(np.log10(doses[0] / 1.4)), float(np.log10(doses[-1] * 1.4))],
        ),
        yaxis=zero_line(title),
    )  # fmt: skip
    if band is not None:
        drawn["shapes"] = [
            {
                "type": "rect",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": band["ci_low"],
                "y1": band["ci_high"],
                "fillcolor": PALE,
                "opacity": 0.5,
                "line": {"width": 0},
                "layer": "below",
            }
        ]
        drawn["annotations"] = [note("shaded: items that were not leaked, 95 %")]
    return {"data": data, "layout": drawn}


def two_changes(
    points: pd.DataFrame, x_title: str, y_title: str, *, slope: float | None = None, intercept: float = 0.0
) -> Figure | None:
    """The change of an outcome against the change of density, a mark per item.

    Args:
        points: `x`, `y`, and as far as known `kind`, `dose`, `id`. Untreated items (dose 0) are grey.
        x_title, y_title: of the axes, with their units.
        slope, intercept: of a fitted line to draw.
    """
    points = points[np.isfinite(points["x"]) & np.isfinite(points["y"])]
    if len(points) < 2:
        return None
    if len(points) > 2 * MOST_POINTS:
        points = points.sample(2 * MOST_POINTS, random_state=0)
    doses = points["dose"].to_numpy(dtype=np.float64) if "dose" in points.columns else np.ones(len(points))
    kinds = points["kind"].astype(str) if "kind" in points.columns else pd.Series("items", index=points.index)
    data: list[dict[str, Any]] = []
    untreated = doses == 0
    treated = sorted(set(kinds[~untreated]))
    groups = [("not leaked", untreated, GREY)] + [
        (kind, (~untreated) & (kinds == kind).to_numpy(), SERIES[i % len(SERIES)])
        for i, kind in enumerate(treated)
    ]
    for name, at, colour in groups:
        if not at.any():
            continue
        of = points[at]
        names = of["id"] if "id" in of.columns else [""] * len(of)
        size = 4 + 2 * np.log2(np.maximum(doses[at], 1))
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": label(name),
                "x": of["x"].to_numpy(),
                "y": of["y"].to_numpy(),
                "marker": {"size": size, "color": colour, "opacity": 0.55},
                "text": [f"{label(i)} × {d:g}" for i, d in zip(names, doses[at], strict=True)],
                "hovertemplate": "%{text}<br>%{x:.3g}, %{y:.3g}<extra></extra>",
            }
        )
    if slope is not None:
        ends = [float(points["x"].min()), float(points["x"].max())]
        data.append(line(ends, [intercept + slope * x for x in ends]))
    return {"data": data, "layout": with_legend(380, xaxis=zero_line(x_title), yaxis=zero_line(y_title))}


def spillover_curve(bins: pd.DataFrame, x_title: str, y_title: str) -> Figure | None:
    """Untreated items: the change of an outcome in bins of the exposure that they got by chance.

    Args:
        bins: `x`, `estimate`, `ci_low`, `ci_high`; with `null_low` and `null_high`, the range of the same
            bin's mean under replayed assignments, drawn as a band: what is no more than that is no spillover.
        x_title, y_title: of the axes.
    """
    bins = bins[bins["estimate"].notna()].sort_values("x", kind="stable")
    if len(bins) < 2:
        return None
    x = bins["x"].to_numpy(dtype=np.float64)
    data: list[dict[str, Any]] = []
    if {"null_low", "null_high"} <= set(bins.columns):
        low, high = bins["null_low"].to_numpy(), bins["null_high"].to_numpy()
        data.append(
            line([*x, *x[::-1]], [*high, *low[::-1]], PALE, fill="toself", fillcolor="rgba(169,178,189,.35)",
                 line={"width": 0}, showlegend=True, name="replayed assignments, 95 %")
        )  # fmt: skip
    data.append(
        {
            "type": "scatter",
            "mode": "markers+lines",
            "name": "as assigned, 95 % interval",
            "x": x,
            "y": bins["estimate"].to_numpy(),
            "error_y": interval(bins["ci_low"], bins["estimate"], bins["ci_high"]) | {"color": BLUE},
            "marker": {"size": 8, "color": BLUE},
            "line": {"color": BLUE, "width": 1, "dash": "dot"},
            "hovertemplate": "%{x:.3g}: %{y:.3f}<extra></extra>",
        }
    )
    return {"data": data, "layout": with_legend(320, xaxis=axis(x_title), yaxis=zero_line(y_title))}


def draws_against(draws: ArrayLike, found: float, title: str, p_value: float | None = None) -> Figure | None:
    """The randomisation distribution: a statistic under replayed assignments, and the one found.

    Args:
        draws: (R,) the statistic under R replays.
        found: the statistic of the assignment that was.
        title: of the horizontal axis.
        p_value: shown beside it.
    """
    values = np.asarray(draws, dtype=np.float64)
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return None
    said = f"found: {words.signed(found)}" + (f", {words.p_value(p_value)}" if p_value is not None else "")
    drawn = with_legend(
        260,
        bargap=0.03,
        xaxis=zero_line(title),
        yaxis=axis("replays"),
        shapes=[
            {
                "type": "line",
                "x0": found,
                "x1": found,
                "yref": "paper",
                "y0": 0,
                "y1": 1,
                "line": {"color": OCHRE, "width": 2.4},
            }
        ],
        annotations=[
            note(
                f" {said} ",
                x=found,
                xref="x",
                y=0.98,
                yanchor="top",
                xanchor="left",
                font={"size": 12, "color": OCHRE},
            ),
        ],
    )
    data = [
        {
            "type": "histogram",
            "name": f"{len(values):,} replayed assignments",
            "x": values,
            "nbinsx": 40,
            "marker": {"color": PALE},
            "hovertemplate": "%{x}: %{y}<extra></extra>",
        }
    ]
    drawn["showlegend"] = False
    return {"data": data, "layout": drawn}


def _beside(said: str, found: float) -> dict[str, Any]:
    return note(
        f" {said} ",
        x=found,
        xref="x",
        y=0.98,
        yanchor="top",
        xanchor="left",
        font={"size": 12, "color": OCHRE},
    )


def loss_curves(rows: pd.DataFrame, title: str = "nats per token", *, x: str = "step") -> Figure | None:
    """Losses while training, a line per run.

    Args:
        rows: the column named by `x`, `loss`, and what tells runs apart: `arm`, `seed`, `split` as far as
            there.
        title: of the vertical axis.
        x: the horizontal one: `step`, `tokens` or `seconds`.
    """
    rows = rows[rows["loss"].notna()]
    keys = [name for name in ("arm", "seed", "split") if name in rows.columns and rows[name].nunique() > 1]
    if rows.empty:
        return None
    runs = list(rows.groupby(keys, sort=False)) if keys else [((), rows)]
    arms = list(dict.fromkeys(rows[keys[0]])) if keys else [None]
    data = []
    for key, of in runs:
        parts = key if isinstance(key, tuple) else (key,)
        of = of.sort_values(x, kind="stable")
        colour = SERIES[arms.index(parts[0]) % len(SERIES)] if keys else MUTED
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": label(" ".join(map(str, parts)) or "loss"),
                "x": of[x].to_numpy(),
                "y": of["loss"].to_numpy(),
                "line": {"color": colour, "width": 1.4},
                "hovertemplate": "%{x:,}: %{y:.3f}<extra></extra>",
            }
        )
    return {"data": data, "layout": with_legend(300, xaxis=axis(words.name(x)), yaxis=axis(title))}
