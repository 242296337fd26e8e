"""The queries that a reader can browse: the extremes, the largest residuals, and a sample of the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from lmd3.report import texts as _texts
from lmd3.report.files import StudyFiles

#: Queries of the table at most; those of each kind that are sure to be in it; nearest texts of each.
MOST, OF_A_KIND, NEAREST = 2000, 250, 3
#: Characters shown of texts, and bytes of all of them; longer ones are shortened until they fit.
LENGTHS = ((500, 260), (320, 160), (200, 100), (120, 60))
MOST_BYTES = 3_500_000

#: Why a query is in the table, in the order of the marks.
KINDS = (
    "densest",
    "sparsest",
    "above the fit",
    "below the fit",
    "unsupported",
    "influential",
    "drawn by chance",
)


def chosen(points: pd.DataFrame, most: int = MOST, seed: int = 0) -> tuple[np.ndarray, list[int]]:
    """Rows of `points.parquet` for the table, and for each the bits of `KINDS` that it has.

    All of them where there are no more than `most`. Otherwise the extremes of predictor, residual and
    influence, unsupported queries, and a seeded sample of the rest.
    """
    n = len(points)
    each = min(OF_A_KIND, max(1, n // 10))
    marks = np.zeros(n, dtype=np.int64)

    def mark(kind: str, rows: np.ndarray) -> None:
        marks[rows] |= 1 << KINDS.index(kind)

    order = np.argsort(points["predictor"].to_numpy(dtype=np.float64), kind="stable")
    mark("sparsest", order[:each])
    mark("densest", order[::-1][:each])
    residual = points["residual"].to_numpy(dtype=np.float64)
    known = np.flatnonzero(np.isfinite(residual))
    by_residual = known[np.argsort(residual[known], kind="stable")]
    mark("below the fit", by_residual[:each])
    mark("above the fit", by_residual[::-1][:each])
    if "unsupported" in points.columns:
        flags = points["unsupported"].fillna(False).to_numpy(dtype=bool)
        found = np.flatnonzero(flags)
        mark("unsupported", found[np.argsort(points["predictor"].to_numpy()[found], kind="stable")][:each])
    if "influence" in points.columns:
        influence = np.abs(points["influence"].to_numpy(dtype=np.float64))
        known = np.flatnonzero(np.isfinite(influence))
        mark("influential", known[np.argsort(-influence[known], kind="stable")][: min(50, each)])
    sure = np.flatnonzero(marks)
    rest = np.flatnonzero(marks == 0)
    room = max(0, most - len(sure))
    drawn = (
        rest if len(rest) <= room else np.sort(np.random.default_rng(seed).choice(rest, room, replace=False))
    )
    mark("drawn by chance", drawn)
    rows = np.sort(np.concatenate([sure[:most], drawn]))
    return rows, [int(marks[row]) for row in rows]


def table(
    parts: StudyFiles,
    *,
    corpus: Any = None,
    queries: Any = None,
    text: str = "text",
    id: str | None = None,
    show_texts: bool = True,
) -> dict[str, Any]:
    """The table as JSON values.

    `columns` are those of `rows`: id, group, predictor, value, fitted, residual, typicality, max_cosine,
    support_p, unsupported, marks (bits of `kinds`), the text (or None) and the nearest training rows
    [neighbour's id, group, cosine, share of the density]; `texts` holds those of the neighbours by id.
    """
    points = parts.tables["points"]
    rows, marks = chosen(points)
    shown = points.iloc[rows].reset_index(drop=True)
    ids = [str(i) for i in shown["id"]]
    near = parts.neighbors_of(ids, NEAREST)
    query_texts: dict[str, str] = {}
    corpus_texts: dict[str, str] = {}
    if show_texts:
        wanted = [str(n["neighbor_id"]) for found in near.values() for n in found]
        query_texts = _texts.look_up(queries or parts.place("queries"), ids, text, id)
        corpus_texts = _texts.look_up(corpus or parts.place("store"), wanted, text, id)
        if "text" in points.columns:
            known = {str(i): t for i, t in zip(shown["id"], shown["text"], strict=True) if isinstance(t, str)}
            query_texts = known | query_texts
    names = ("group", "predictor", "value", "fitted", "residual", "typicality", "max_cosine", "support_p")
    values = {name: _values(shown, name) for name in (*names, "unsupported")}
    out: dict[str, Any] = {
        "kinds": list(KINDS),
        "total": len(points),
        "columns": ["id", *names, "unsupported", "marks", "text", "near"],
    }
    for longest, longest_near in LENGTHS:
        out["texts"] = {i: _texts.shorten(t, longest_near) for i, t in corpus_texts.items()}
        out["rows"] = [
            [
                i,
                *(values[name][row] for name in names),
                values["unsupported"][row],
                marks[row],
                _texts.shorten(query_texts[i], longest) if i in query_texts else None,
                [
                    [
                        str(n["neighbor_id"]),
                        _text(n.get("neighbor_group")),
                        _round(n.get("cosine")),
                        _round(n.get("share")),
                    ]
                    for n in near.get(i, [])
                ],
            ]
            for row, i in enumerate(ids)
        ]
        if len(json.dumps(out, ensure_ascii=False).encode()) <= MOST_BYTES:
            break
    return out


def _values(frame: pd.DataFrame, name: str) -> list[Any]:
    if name not in frame.columns:
        return [None] * len(frame)
    column = frame[name]
    if name == "group":
        return [_text(v) for v in column]
    if name == "unsupported":
        return [None if pd.isna(v) else bool(v) for v in column]
    return [_round(v) for v in column]


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _round(value: Any) -> float | None:
    """Six significant digits: more than a reader sees, far fewer bytes."""
    if value is None or pd.isna(value):
        return None
    return float(f"{float(value):.6g}")


def examples(queries: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """The densest and the sparsest queries of the table with their nearest texts, for paper."""
    columns = queries["columns"]
    rows = [dict(zip(columns, row, strict=True)) for row in queries["rows"]]
    known = sorted((row for row in rows if row["predictor"] is not None), key=lambda row: row["predictor"])
    count = min(count, len(known) // 2)
    ends = [("densest", known[::-1][:count]), ("sparsest", known[:count])]
    names = ("neighbor_id", "neighbor_group", "cosine", "share")
    return [
        {
            "end": end,
            "rows": [
                row
                | {
                    "near": [
                        dict(zip(names, n, strict=True)) | {"text": queries["texts"].get(n[0])}
                        for n in row["near"]
                    ]
                }
                for row in of
            ],
        }
        for end, of in ends
    ]
