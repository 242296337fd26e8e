"""The look of all figures: plotly JSON as plain dictionaries, drawn by the page's own copy of plotly.js."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

INK, MUTED, GRID = "#1d2530", "#66707d", "#e7eaee"
BLUE, OCHRE, GREY, PALE = "#27598c", "#b8642b", "#a9b2bd", "#c9d6e4"
#: Colours of series that stand beside each other, told apart by most colour-blind eyes too.
SERIES = (BLUE, OCHRE, "#4a8a6f", "#8a5a8f", "#7a7f3a", MUTED)
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


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with its title."""
    base = {
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
    return base | more


def layout(height: int, **more: Any) -> dict[str, Any]:
    """The layout of a figure of a height in pixels; it is as wide as its place."""
    base = {
        "height": height,
        "margin": {"l": 64, "r": 16, "t": 16, "b": 52},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "color": INK},
        "showlegend": False,
        "modebar": {"bgcolor": "rgba(255,255,255,.8)", "color": GREY, "activecolor": INK},
        "hoverlabel": {"bgcolor": "#fff", "bordercolor": GREY, "font": {"color": INK, "size": 12}},
    }
    return base | more


def interval(low: ArrayLike, mid: ArrayLike, high: ArrayLike) -> dict[str, Any]:
    """Bars from low to high around mid, (m,) each."""
    mid_, low_, high_ = (np.asarray(x, dtype=np.float64) for x in (mid, low, high))
    return {
        "type": "data",
        "symmetric": False,
        "array": high_ - mid_,
        "arrayminus": mid_ - low_,
        "thickness": 1.6,
        "width": 0,
    }


#: A legend above the picture.
LEGEND = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 12}}


def with_legend(height: int, **more: Any) -> dict[str, Any]:
    """A layout with room for a legend above."""
    return layout(height, showlegend=True, legend=LEGEND, **more) | {
        "margin": {"l": 64, "r": 16, "t": 36, "b": 52}
    }


def zero_line(title: str, **more: Any) -> dict[str, Any]:
    """An axis whose zero is drawn."""
    return axis(title, zeroline=True, zerolinecolor=INK, zerolinewidth=1, **more)


def line(x: Sequence[float], y: Sequence[float], colour: str = INK, **more: Any) -> dict[str, Any]:
    """A plain line without marks or hover text."""
    return {
        "type": "scatter",
        "mode": "lines",
        "x": list(x),
        "y": list(y),
        "line": {"color": colour, "width": 1.2},
        "hoverinfo": "skip",
        "showlegend": False,
        **more,
    }


def note(text: str, **more: Any) -> dict[str, Any]:
    """An annotation in the corner of the picture."""
    base = {
        "text": text,
        "xref": "paper",
        "yref": "paper",
        "x": 1,
        "y": 1,
        "xanchor": "right",
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"size": 12, "color": MUTED},
    }
    return base | more
