"""Puts a study on one self-contained page that needs no network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lmd3.analysis import words
from lmd3.errors import OutputError, ParameterError
from lmd3.report import commands, figures, latex, queries
from lmd3.report.files import StudyFiles

if TYPE_CHECKING:
    from lmd3.analysis import Study

#: Queries printed in full at each end of the predictor.
SHOWN = 3

_MODELS = {
    "headline": "headline model",
    "headline_sandwich": "… with sandwich errors",
    "headline_cr2": "… with CR2 errors",
    "headline_cr2_linear": "… as a linear probability, CR2 errors",
    "headline_hc": "… with errors of single queries",
    "headline_clustered": "… clustered by group",
    "headline_linear": "… as a linear probability",
    "headline_pooled": "without group effects",
    "headline_within": "with group effects",
    "alone": "without any control",
    "without_typicality": "without typicality",
    "with_typicality": "with typicality",
    "with_max_cosine": "with max cosine",
    "naive": "headline, model-based errors",
    "mixed": "mixed model, random intercepts",
    "mixed_slopes": "mixed model, random slopes",
    "conditional_logit": "conditional logit",
    "gee": "GEE",
    "gam": "GAM, linear part",
}
#: Blocks of the ladder of another kind than a figure's caption can say.
_LEFT_OUT = {"rows": "drawn by chance", "clusters": "whole clusters", "groups": "whole groups"}
_SHUFFLED = {
    "whole sample": "over the whole sample",
    "groups": "inside groups",
    "clusters": "inside clusters",
}


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
        *places: the path of the page; before it, if you like, the study's density table, whose neighbours
            stand beside every query.
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
    density = places[0] if len(places) == 2 else None
    page = render(study, density, corpus=corpus, queries=queries, text=text, id=id, show_texts=show_texts)
    return write_page(Path(places[-1]), page)


def write_page(out: Path, page: str) -> Path:
    """Writes a file whole or not at all.

    Raises:
        OutputError: it can't be written.
    """
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
    density: Any = None,
    *,
    corpus: str | Path | None = None,
    queries: str | Path | None = None,
    text: str = "text",
    id: str | None = None,
    show_texts: bool = True,
) -> str:
    """The page as a string; arguments as of `write_report`."""
    parts = StudyFiles.of(study, density)
    facts, run = parts.facts, parts.run
    browsed = _browsed(parts, corpus, queries, text, id, show_texts)
    cut = commands.truncation(parts)
    return environment(facts).get_template("report.html").render(
        facts=facts,
        primary=facts["primary"],
        title=_title(facts),
        figures=embedded(_figures(parts)),
        gain=_gain(parts.tables["ladder"], facts),
        ladder=records(parts.tables["ladder"]),
        coefficients=_coefficients(parts.tables["coefficients"], facts),
        specifications=_count(parts.table("specifications")),
        subsets=_some(parts.table("subsets"), 24),
        contrasts=_some(parts.table("contrasts"), 12),
        paired=_some(parts.table("paired"), 40),
        hubs=_some(parts.table("hubs"), 5),
        browsed=Markup(figures.escape_json(browsed)),
        shown=len(browsed["rows"]),
        total=browsed["total"],
        examples=_examples(browsed),
        has_texts=show_texts and any(row[-2] for row in browsed["rows"]),
        truncation=cut,
        cautions=_cautions(parts, cut),
        measured=_measured(facts, run),
        support=facts.get("support"),
        commands=commands.commands(parts),
        versions=commands.versions(parts),
        settings=flat({k: v for k, v in run.items() if k not in ("versions", "arguments")}),
        latex=latex_of(parts),
        sources=sorted(parts.tables),
        left_out=_LEFT_OUT.get(facts["ladder"]["left_out"], facts["ladder"]["left_out"]),
        shuffled=_SHUFFLED.get(facts["ladder"]["shuffled_within"], facts["ladder"]["shuffled_within"]),
    )  # fmt: skip


def environment(facts: Mapping[str, Any] | None = None) -> Environment:
    """Templates with the report's filters; everything they are given is escaped."""
    from plotly.offline import get_plotlyjs

    found = Environment(
        loader=PackageLoader("lmd3.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "number": words.number,
        "signed": words.signed,
        "share": words.share,
        "signed_share": words.signed_share,
        "p_value": lambda p: words.p_value(p).removeprefix("p = ").removeprefix("p "),
        "p_words": words.p_value,
        "name": words.name,
        "setting": words.setting,
        "short_setting": lambda b: _short_setting(b, facts or {"bandwidths": []}),
        "percent": _percent,
        "cosine": lambda x: f"{x:.3f}".replace("-", "−"),
        "count": lambda n: f"{n:,}",
        "figure": lambda x: f"{int(x):,}" if float(x).is_integer() and abs(x) < 1e15 else words.number(x),
    }
    found.globals |= {
        "missing": lambda x: x is None or x != x,
        # The library's own code: the only mark-up that is not escaped, beside the figures' JSON.
        "plotly": Markup(get_plotlyjs().replace("</script", "<\\/script")),
    }
    return found


def embedded(drawn: Mapping[str, Any]) -> dict[str, Markup]:
    """Figures as JSON for script elements; those that are None are left out."""
    return {name: Markup(figures.escape_json(f)) for name, f in drawn.items() if f is not None}


def latex_of(study: StudyFiles | Study | str | Path) -> str:
    """The study's LaTeX table."""
    parts = study if isinstance(study, StudyFiles) else StudyFiles.of(study)
    return latex.table(parts.facts, _slope_rows(parts.facts), parts.tables["ladder"])


def _figures(parts: StudyFiles) -> dict[str, Any]:
    facts, tables = parts.facts, parts.tables
    slope_rows = _slope_rows(facts)
    kind = "McFadden’s R²" if facts["kind"] == "binary" else "R²"
    drawn: dict[str, Any] = {
        "binned": figures.binned(facts, tables["points"], tables["bins"]),
        "panels": figures.panels(facts, tables["bins"]),
        "added": figures.added_variable(facts, tables["points"]),
        "slopes": figures.slopes(facts, slope_rows) if len(slope_rows) > 1 else None,
        "ladder": figures.ladder(facts, tables["ladder"]),
        "bandwidths": figures.bandwidths(facts, facts["bandwidths"]),
    }
    further: dict[str, Any] = {
        "shapley": ("shapley", lambda t: figures.shapley(t, kind)),
        "forest": ("forest", lambda t: figures.forest(facts, t)),
        "left_out": ("left_out", lambda t: figures.left_out(facts, t)),
        "specifications": ("specifications", lambda t: figures.specifications(facts, t)),
        "shuffles": ("shuffles", lambda t: figures.shuffles(facts, t)),
        "qq": ("checks", figures.qq),
        "scale_location": ("checks", figures.scale_location),
        "calibration": ("checks", figures.calibration),
        "smooth": ("checks", lambda t: figures.smooth(facts, t)),
        "subsets": ("subsets", lambda t: figures.subsets(facts, t)),
        "contrasts": ("contrasts", figures.contrasts),
        "simex": ("simex", lambda t: figures.simex(facts, t)),
        "paired": ("paired", lambda t: figures.paired(facts, t)),
    }
    for name, (source, draw) in further.items():
        table = parts.table(source)
        drawn[name] = None if table is None or (name == "shapley" and len(table) < 2) else draw(table)
    return drawn


def _browsed(
    parts: StudyFiles, corpus: Any, asked: Any, text: str, id: str | None, show_texts: bool
) -> dict[str, Any]:
    return queries.table(parts, corpus=corpus, queries=asked, text=text, id=id, show_texts=show_texts)


def _examples(browsed: Mapping[str, Any]) -> list[dict[str, Any]]:
    return queries.examples(browsed, SHOWN)


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as dictionaries."""
    return [{str(k): v for k, v in row.items()} for row in table.to_dict("records")]


def _some(table: pd.DataFrame | None, most: int) -> list[dict[str, Any]]:
    return [] if table is None else records(table.head(most))


def _count(table: pd.DataFrame | None) -> int:
    return 0 if table is None else len(table)


def _title(facts: Mapping[str, Any]) -> str:
    what = words.name(facts["primary"]["predictor"])
    what = "training density" if what == "log density" else what
    return f"Does “{words.name(facts['outcome'])}” depend on {what}?"


def _slope_rows(facts: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    found = facts["bandwidths"][0]["slopes"]
    shown = [m for m in _MODELS if m in found]
    for same in ("naive", "headline_sandwich"):
        if same in shown and found[same]["std_error"] == found["headline"]["std_error"]:
            shown.remove(same)
    return [(_MODELS[m], found[m]) for m in shown]


def _gain(ladder: pd.DataFrame, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """The step of the predictor beyond the controls, without max cosine where there is such a step."""
    what = words.name(facts["primary"]["predictor"])
    steps = [row for row in records(ladder) if str(row["step"]).endswith(f"+ {what}")]
    steps.sort(key=lambda row: str(row["step"]).startswith("M4"))
    return steps[0] if steps and steps[0]["delta"] == steps[0]["delta"] else None


def _percent(share: float) -> str:
    """A share as a percentage that fits any size."""
    percent = 100 * share
    if percent == 0:
        return "0\u00a0%"
    if percent < 0.1:
        return "under 0.1\u00a0%"
    return f"{percent:.1f}\u00a0%" if percent < 10 else f"{percent:.0f}\u00a0%"


def _short_setting(of: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The bandwidth alone where all have one kernel."""
    full = words.setting(of)
    one = len({b["kernel"] for b in facts["bandwidths"]}) == 1
    return full.removeprefix(f"{of['kernel']} kernel, ") if one else full


def _coefficients(table: pd.DataFrame, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The headline model in full, then the predictor alone in the other models and at other bandwidths."""
    first = table[table["primary"]]
    rows = records(first)
    others = table[~table["primary"] & (table["term"] == first["term"].iloc[0])]
    same = others["bandwidth"].isna()
    if facts["primary"]["kernel"] is not None:
        same = (others["kernel"] == facts["primary"]["kernel"]) & (
            others["bandwidth"] == facts["primary"]["bandwidth"]
        )
    # The other models of other bandwidths stand in the table of bandwidths.
    others = others[same | (others["model"] == "headline")]
    rows += records(others)
    for row in rows:
        row["model_name"] = _MODELS.get(row["model"], words.name(str(row["model"])))
        elsewhere = isinstance(row["kernel"], str) and not (
            row["kernel"] == facts["primary"]["kernel"] and row["bandwidth"] == facts["primary"]["bandwidth"]
        )
        row["setting"] = _short_setting(row, facts) if elsewhere else ""
        row["term_name"] = "intercept" if row["term"] == "const" else words.name(row["term"])
        row["clusters"] = None if pd.isna(row["clusters"]) else int(row["clusters"])
        row["inference"] = row.get("inference") if isinstance(row.get("inference"), str) else ""
    return rows


def _cautions(parts: StudyFiles, cut: list[dict[str, Any]]) -> list[str]:
    """What the page itself has to warn of, beside the study's own notices."""
    out = []
    for side in cut:
        share = side["truncated"] / max(side["rows"] or 1, 1)
        if share > 0.01:
            out.append(
                f"{_percent(share)} of the {side['what']} ({side['truncated']:,}) were longer than what the "
                "encoder reads: their density is that of their beginnings."
            )
    encoder = ((parts.run.get("density") or {}).get("store") or {}).get("encoder") or {}
    if encoder.get("kind") == "hashing":
        out.append(
            "The built-in encoder sees words and word pairs, not meaning: this density is a lexical one."
        )
    said = " ".join(parts.facts["notices"])
    support = parts.facts.get("support") or {}
    if support.get("unsupported") and "unsupported" not in said:
        out.append(
            f"{support['unsupported']:,} queries are unlike any held-out training text (“unsupported”): what "
            "the fit says of them is an extrapolation."
        )
    return out


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
    logs = [words.name(c) for c in counts.get("log_counts", []) if c in of["controls"]]
    note = f" ({words.listed(logs)} as log(1 + count))" if logs else ""
    rows.append(("Held fixed", (words.listed(held) or "nothing") + note))
    rows.append(("Errors", _errors(facts)))
    rows.append(
        (
            "Queries",
            f"{of['n']:,} in the model, of {counts['queries_read']:,} with a density and "
            f"{counts['outcomes_read']:,} with an outcome",
        )
    )
    return rows


def _errors(facts: Mapping[str, Any]) -> str:
    of = facts["primary"]
    plain = {"HC3": "robust to unequal variance (HC3)", "HC0": "robust (HC0)", "nonrobust": "model-based"}
    if not of["clusters"]:
        return str(plain.get(of["covariance"], of["covariance"]))
    column = of["covariance"].partition(":")[2]
    effective = of.get("effective_clusters")
    like = f", like {words.number(effective)} equal ones" if effective else ""
    inference = of.get("inference")
    by = f"; inference: {inference}" if inference and inference != "normal" else ""
    return f"clustered by {words.name(column)} ({of['clusters']:,} clusters{like}){by}"


def flat(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Settings, flat, as (name, value)."""
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
