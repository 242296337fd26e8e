"""Puts a study on one self-contained page that needs no network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lmd3 import tables
from lmd3.analysis import words
from lmd3.errors import FileMissingError, FormatError, OutputError, ParameterError
from lmd3.report import figures
from lmd3.report import texts as _texts

if TYPE_CHECKING:
    from lmd3.analysis import Study

#: Queries shown at each end of the predictor, and nearest training texts of each.
SHOWN, NEAREST = 5, 3

_MODELS = {
    "headline": "headline model",
    "headline_pooled": "without group effects",
    "headline_within": "with group effects",
    "alone": "without any control",
    "without_typicality": "without typicality",
    "with_typicality": "with typicality",
    "with_max_cosine": "with max cosine",
    "naive": "headline, model-based errors",
}


@dataclass(frozen=True)
class _Parts:
    """What a page is made of."""

    facts: dict[str, Any]
    coefficients: pd.DataFrame
    ladder: pd.DataFrame
    points: pd.DataFrame
    bins: pd.DataFrame
    neighbors: pd.DataFrame | None
    run: dict[str, Any]
    folder: Path | None

    @classmethod
    def of(cls, study: Study | str | Path) -> _Parts:
        if isinstance(study, (str, Path)):
            return cls.read(Path(study))
        # Through JSON, so that a page from memory and one from files are the same.
        facts, run = (json.loads(json.dumps(_plain(x))) for x in (study.facts, study.run))
        return cls(
            facts, study.coefficients, study.ladder, study.points, study.bins, study.neighbors, run, None
        )

    @classmethod
    def read(cls, folder: Path) -> _Parts:
        if not (folder / "summary.json").is_file() and (folder / "analysis" / "summary.json").is_file():
            folder = folder / "analysis"
        if not (folder / "summary.json").is_file():
            raise FileMissingError(
                "no summary.json in this folder", file=str(folder), remedy="make one with `lmd3 analyze`"
            )
        frames = [
            tables.read_table(folder / f"{name}.parquet")
            for name in ("coefficients", "ladder", "points", "bins")
        ]
        near = folder / "neighbors.parquet"
        neighbors = tables.read_table(near) if near.is_file() else None
        jsons = []
        for name in ("summary.json", "run.json"):
            try:
                jsons.append(json.loads((folder / name).read_text(encoding="utf-8")))
            except FileNotFoundError:
                raise FileMissingError("no such file", file=str(folder / name)) from None
            except ValueError as error:
                raise FormatError(f"not valid JSON: {error}", file=str(folder / name)) from None
        coefficients, ladder, points, bins = frames
        return cls(jsons[0], coefficients, ladder, points, bins, neighbors, jsons[1], folder)


def _plain(value: Any) -> Any:
    from lmd3.analysis.study import plain

    return plain(value)


def write_report(
    study: Study | str | Path,
    *places: Any,
    corpus: str | Path | None = None,
    queries: str | Path | None = None,
    text: str = "text",
    id: str | None = None,
    show_texts: bool = True,
) -> Path:
    """Writes the report: `write_report(study, out)` or `write_report(study, density, out)`.

    Args:
        study: a `Study`, or the folder of one (also that of a whole `lmd3 study`).
        *places: the path of the page; before it, if you like, the study's density table.
        corpus: where the training texts are, if not in the store that the density run names: a store's
            folder or a file of texts.
        queries: the same for the texts of the queries.
        text: the text column, where these are files.
        id: their id column.
        show_texts: False leaves all texts out (private data).

    Returns:
        The path of the page.

    Raises:
        FileMissingError, FormatError: not the folder of a study.
        OutputError: the page can't be written.
    """
    if not 1 <= len(places) <= 2:
        raise ParameterError("write_report takes a study, perhaps its density table, and a path")
    out = Path(places[-1])
    page = render(study, corpus=corpus, queries=queries, text=text, id=id, show_texts=show_texts)
    temporary = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OutputError(f"can't be written: {reason}", file=str(out)) from None
    return out


def render(
    study: Study | str | Path,
    *,
    corpus: str | Path | None = None,
    queries: str | Path | None = None,
    text: str = "text",
    id: str | None = None,
    show_texts: bool = True,
) -> str:
    """The page as a string; arguments as of `write_report`."""
    from plotly.offline import get_plotlyjs

    parts = _Parts.of(study)
    facts, run = parts.facts, parts.run
    slope_rows = _slope_rows(facts)
    drawn = {
        "binned": figures.binned(facts, parts.points, parts.bins),
        "panels": figures.panels(facts, parts.bins),
        "slopes": figures.slopes(facts, slope_rows) if len(slope_rows) > 1 else None,
        "ladder": figures.ladder(facts, parts.ladder),
        "bandwidths": figures.bandwidths(facts, facts["bandwidths"]),
    }
    examples = _examples(parts, corpus, queries, text, id, show_texts)
    environment = Environment(
        loader=PackageLoader("lmd3.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": words.number,
        "signed": words.signed,
        "share": words.share,
        "signed_share": words.signed_share,
        "p_value": lambda p: words.p_value(p).removeprefix("p = ").removeprefix("p "),
        "name": words.name,
        "setting": words.setting,
        "short_setting": lambda b: _short_setting(b, facts),
        "percent": _percent,
        "cosine": lambda x: f"{x:.3f}".replace("-", "−"),
        "count": lambda n: f"{n:,}",
    }
    return environment.get_template("report.html").render(
        facts=facts,
        primary=facts["primary"],
        run=run,
        density=run.get("density") or {},
        title=_title(facts),
        figures={name: Markup(figures.escape_json(f)) for name, f in drawn.items() if f is not None},
        ladder=_records(parts.ladder),
        coefficients=_coefficients(parts.coefficients, facts),
        examples=examples,
        measured=_measured(facts, run),
        settings=_settings(run),
        # The library's own code: the only mark-up that is not escaped, beside the figures' JSON.
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
        missing=lambda x: x is None or x != x,
    )


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as dictionaries."""
    return [{str(k): v for k, v in row.items()} for row in table.to_dict("records")]


def _title(facts: Mapping[str, Any]) -> str:
    what = words.name(facts["primary"]["predictor"])
    what = "training density" if what == "log density" else what
    return f"Does “{words.name(facts['outcome'])}” depend on {what}?"


def _slope_rows(facts: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    found = facts["bandwidths"][0]["slopes"]
    shown = [m for m in _MODELS if m in found]
    if found.get("naive", {}).get("std_error") == found["headline"]["std_error"]:
        shown.remove("naive")
    return [(_MODELS[m], found[m]) for m in shown]


def _percent(share: float) -> str:
    """A share as a percentage that fits any size."""
    percent = 100 * share
    return "under 0.1 %" if percent < 0.1 else f"{percent:.1f} %" if percent < 10 else f"{percent:.0f} %"


def _short_setting(of: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The bandwidth alone where all have one kernel."""
    full = words.setting(of)
    one = len({b["kernel"] for b in facts["bandwidths"]}) == 1
    return full.removeprefix(f"{of['kernel']} kernel, ") if one else full


def _coefficients(table: pd.DataFrame, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The headline model in full, then the predictor alone in the other models and at other bandwidths."""
    first = table[table["primary"]]
    rows = _records(first)
    others = table[~table["primary"] & (table["term"] == first["term"].iloc[0])]
    same = others["bandwidth"].isna()
    if facts["primary"]["kernel"] is not None:
        same = (others["kernel"] == facts["primary"]["kernel"]) & (
            others["bandwidth"] == facts["primary"]["bandwidth"]
        )
    # The other models of other bandwidths stand in the table of bandwidths.
    others = others[same | (others["model"] == "headline")]
    rows += _records(others)
    for row in rows:
        row["model_name"] = _MODELS.get(row["model"], row["model"])
        elsewhere = isinstance(row["kernel"], str) and not (
            row["kernel"] == facts["primary"]["kernel"] and row["bandwidth"] == facts["primary"]["bandwidth"]
        )
        row["setting"] = _short_setting(row, facts) if elsewhere else ""
        row["term_name"] = "intercept" if row["term"] == "const" else words.name(row["term"])
        row["clusters"] = None if pd.isna(row["clusters"]) else int(row["clusters"])
    return rows


def _examples(
    parts: _Parts,
    corpus: str | Path | None,
    queries: str | Path | None,
    text: str,
    id: str | None,
    show_texts: bool,
) -> list[dict[str, Any]]:
    """The densest and the sparsest queries, each with its nearest training rows and their texts."""
    order = parts.points.sort_values("predictor", kind="stable")
    count = min(SHOWN, len(order) // 2)
    ends = [("densest", order.iloc[::-1].head(count)), ("sparsest", order.head(count))]
    chosen = [str(i) for _, rows in ends for i in rows["id"]]
    near: dict[str, list[dict[str, Any]]] = {}
    if parts.neighbors is not None:
        kept = parts.neighbors[parts.neighbors["id"].astype(str).isin(chosen)]
        for row in _records(kept.sort_values(["id", "rank"])):
            near.setdefault(str(row["id"]), []).append(row)
    near = {i: rows[:NEAREST] for i, rows in near.items()}
    query_texts, corpus_texts = {}, {}
    if show_texts:
        density = parts.run.get("density") or {}
        query_place = queries or _place(density, "queries", parts.folder)
        corpus_place = corpus or _place(density, "store", parts.folder)
        wanted = [str(r["neighbor_id"]) for rows in near.values() for r in rows]
        query_texts = _texts.look_up(query_place, chosen, text, id)
        corpus_texts = _texts.look_up(corpus_place, wanted, text, id)
        if "text" in parts.points.columns:
            known = dict(zip(parts.points["id"].astype(str), parts.points["text"], strict=True))
            query_texts = {i: known[i] for i in chosen if isinstance(known[i], str)} | query_texts
    return [
        {
            "end": end,
            "rows": [
                {
                    **row,
                    "text": _texts.shorten(query_texts[str(row["id"])])
                    if str(row["id"]) in query_texts
                    else None,
                    "near": [
                        {
                            **n,
                            "text": _texts.shorten(corpus_texts[str(n["neighbor_id"])], _texts.LONGEST_NEAR)
                            if str(n["neighbor_id"]) in corpus_texts
                            else None,
                        }
                        for n in near.get(str(row["id"]), [])
                    ],
                }
                for row in _records(rows)
            ],
        }
        for end, rows in ends
    ]


def _place(density: Mapping[str, Any], side: str, folder: Path | None) -> Path | None:
    """Where the density run says a side's store is, or a folder of that name near the study."""
    stated = (density.get(side) or {}).get("path")
    if not stated:
        return None
    places = [Path(stated)]
    if folder is not None:
        places += [folder.parent / Path(stated).name, folder / Path(stated).name]
    return next((place for place in places if place.exists()), None)


def _measured(facts: Mapping[str, Any], run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was measured, as (label, words)."""
    of, counts = facts["primary"], facts["counts"]
    density = run.get("density") or {}
    rows = []
    if facts["kind"] == "binary":
        rows.append(
            ("Outcome", f"{words.name(facts['outcome'])}: 1 or 0, {100 * facts['outcome_mean']:.1f} % are 1")
        )
    else:
        rows.append(
            (
                "Outcome",
                f"{words.name(facts['outcome'])}: mean {words.number(facts['outcome_mean'])}, "
                f"standard deviation {words.number(facts['outcome_sd'])}",
            )
        )
    what = f"{words.name(of['predictor'])}, standard deviation {words.number(of['sd'])}"
    rows.append(("Predictor", f"{what}; {words.setting(of)}" if words.setting(of) else what))
    ess = facts["bandwidths"][0]["ess_median"]
    if ess is not None:
        rows.append(
            ("Rows that decide a density", f"{words.number(ess)} (median effective sample size per query)")
        )
    for c in facts["bandwidths"][0]["correlation"]:
        value = facts["bandwidths"][0]["correlation"][c]
        rows.append((f"Correlation with {words.name(c)}", words.number(value)))
    store = density.get("store") or {}
    if store.get("n"):
        encoder = store.get("encoder") or {}
        model = f", encoded by {encoder.get('model') or encoder.get('kind')}" if encoder else ""
        rows.append(("Training data", f"{store['n']:,} texts{model}"))
    held = [words.name(c) for c in of["controls"]] + (["group effects"] if of["form"] == "within" else [])
    rows.append(("Held fixed", words.listed(held) or "nothing"))
    errors = {"HC3": "robust to unequal variance (HC3)", "HC0": "robust (HC0)", "nonrobust": "model-based"}
    if of["clusters"]:
        column = of["covariance"].partition(":")[2]
        rows.append(("Errors", f"clustered by {words.name(column)} ({of['clusters']:,} clusters)"))
    else:
        rows.append(("Errors", errors.get(of["covariance"], of["covariance"])))
    rows.append(
        (
            "Queries",
            f"{of['n']:,} in the model, of {counts['queries_read']:,} with a density and "
            f"{counts['outcomes_read']:,} with an outcome",
        )
    )
    return rows


def _settings(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Settings and versions, flat, as (name, value)."""
    rows: list[tuple[str, str]] = []

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                walk(f"{prefix} {key}".strip().replace("_", " "), item)
        elif isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
            for number, item in enumerate(value, 1):
                walk(f"{prefix} {number}", item)
        elif value not in (None, "", [], {}):
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            rows.append((prefix, f"{value:.6g}" if isinstance(value, float) else shown))

    walk("", run)
    return rows
