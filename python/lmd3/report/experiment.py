"""The page of an experiment: a leak, a training run on groups, or trained subsets; panels of files not there
are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lmd3 import tables
from lmd3.analysis import words
from lmd3.errors import FileMissingError
from lmd3.report import figures
from lmd3.report.files import read_object
from lmd3.report.page import embedded, environment, records, write_page

#: Tables of an experiment's `analysis` folder that the page can draw.
TABLES = (
    "cells", "responses", "slopes", "randomisation", "nulls", "spillover", "spillover_bins", "mcnemar",
    "points", "relations", "groups", "contrasts", "rivals", "scores", "effects",
)  # fmt: skip
#: Rows of a table at most.
MOST_ROWS = 40
#: Outcomes of one control arm less another.
PLACEBO = "placebo:"

_TITLES = {
    "leak": "What does leaking texts into training do?",
    "pretrain": "Does density explain the loss of what a model was trained on?",
    "subsets": "Does density say which part of the training data matters?",
}
_CLAIMS = {
    "A": "Density responds",
    "B": "Performance follows",
    "C": "Loss is explained",
    "beyond dose": "Beyond dose",
    "spillover": "Spillover",
    "placebo": "Placebo",
}

#: Tables that stand on the page: title and columns.
_SHOWN = {
    "cells": ("Changes by cell", "outcome kind dose n mean effect effect_low effect_high"),
    "slopes": ("Slopes", "outcome model sample term estimate ci_low ci_high p_value r_squared n"),
    "randomisation": ("Tests by replayed assignments", "outcome test slope p_value replays n"),
    "spillover": ("Spillover", "outcome focal n slope p_value naive_slope naive_p_value"),
    "mcnemar": ("McNemar", "outcome kind dose seed n control treatment gained lost p_value"),
    "relations": ("Relations", "sample effects controls estimate ci_low ci_high p_value delta_r_squared n"),
    "contrasts": ("Contrasts", "contrast controls first second difference ci_low ci_high p_value n"),
    "rivals": (
        "Rivals",
        "predictor outcome effects estimate p_value delta_r_squared delta_over_density density_over_it"
        " seconds n",
    ),
    "scores": (
        "Scores",
        "predictor score estimate ci_low ci_high over_max_cosine over_low over_high n models",
    ),
}


@dataclass(frozen=True)
class Experiment:
    """An experiment's files.

    Attributes:
        folder: of the experiment.
        summary: `analysis/summary.json`, whose `verdicts` say each claim's outcome in a sentence.
        run: `run.json`, or empty.
        plan: `plan.json`, or empty.
        tables: by name; `loss` is that of the training runs.
    """

    folder: Path
    summary: dict[str, Any]
    run: dict[str, Any]
    plan: dict[str, Any]
    tables: dict[str, pd.DataFrame]

    @classmethod
    def read(cls, folder: Path) -> Experiment:
        """Reads an experiment's folder.

        Raises:
            FileMissingError, FormatError: not an experiment.
        """
        if not is_experiment(folder):
            raise FileMissingError(
                "no experiment in this folder", file=str(folder), remedy="make one with `lmd3 leak`"
            )
        parts = [folder / name for name in ("run.json", "plan.json")]
        run, plan = (read_object(path) if path.is_file() else {} for path in parts)
        places = {name: folder / "analysis" / f"{name}.parquet" for name in TABLES}
        places["loss"] = folder / "loss.parquet"
        found = {name: tables.read_table(path) for name, path in places.items() if path.is_file()}
        return cls(folder, read_object(folder / "analysis" / "summary.json"), run, plan, found)

    def primary(self, name: str) -> pd.DataFrame | None:
        """The rows of a table at the primary bandwidth, or None."""
        table = self.tables.get(name)
        if table is not None and "primary" in table.columns:
            table = table[table["primary"].fillna(False).astype(bool)]
        return None if table is None or table.empty else table


def is_experiment(folder: Path) -> bool:
    """Whether a folder holds an experiment that was analysed."""
    path = folder / "analysis" / "summary.json"
    return path.is_file() and "verdicts" in read_object(path)


def write_experiment(folder: str | Path, out: str | Path) -> Path:
    """Writes an experiment's page; returns its path.

    Raises:
        FileMissingError, FormatError: not an experiment.
        OutputError: the page can't be written.
    """
    return write_page(Path(out), render_experiment(folder))


def render_experiment(folder: str | Path) -> str:
    """The page of an experiment as a string."""
    of = Experiment.read(Path(folder))
    command = str(of.run.get("command") or "experiment")
    drawn = {**_changes(of), **_relations(of), **_scores(of), **_losses(of)}
    shown = of.summary | {"verdicts": None}
    return (
        environment()
        .get_template("experiment.html")
        .render(
            title=_TITLES.get(command, "What does training data do?"),
            verdicts=[(_CLAIMS.get(k, words.name(k)), v) for k, v in of.summary["verdicts"].items()],
            figures=embedded({name: figure for name, (figure, _, _) in drawn.items()}),
            captions=[(n, c, s) for n, (f, c, s) in drawn.items() if f is not None],
            tables=_tables(of),
            settings=_flat({"summary": shown, "plan": of.plan, "run": of.run}),
            sources=sorted(of.tables),
        )
    )


#: A figure (None: nothing to draw), its caption, and the file of its numbers.
Drawn = dict[str, tuple[Any, str, str]]


def _outcomes(table: pd.DataFrame, summary: Mapping[str, Any]) -> list[str]:
    names = [str(name) for name in dict.fromkeys(table["outcome"])]
    first = summary.get("primary_outcome")
    return sorted(names, key=lambda name: name != first)


def _changes(of: Experiment) -> Drawn:
    """The figures of a leak."""
    out: Drawn = {}
    responses, cells = of.primary("responses"), of.primary("cells")
    h = (of.summary.get("primary_bandwidth") or {}).get("bandwidth")
    at = f" at h = {h:.3g}" if isinstance(h, float) else ""
    if responses is not None:
        rows = responses.rename(columns={"median": "estimate"})
        figure = figures.dose_curve(rows, "median change of log density")
        out["response"] = (
            figure,
            f"Claim A: log density{at} by copies leaked, 95 % intervals.",
            "responses.parquet",
        )
    if cells is not None:
        for name in _outcomes(cells, of.summary):
            if name.startswith(PLACEBO) or not _varies(cells, name, "mean"):
                continue
            text = f"Change of {words.name(name)} against the untreated of the same block."
            out[f"dose-{name}"] = (_effects(cells, name), text, "cells.parquet")
    points = of.tables.get("points")
    if points is not None and {"delta_density", "delta"} <= set(points.columns):
        for name in _outcomes(points, of.summary):
            if not _varies(points, name, "delta"):
                continue
            text = f"Claim B: an item each; size: copies. Line: {words.name(name)} on log density."
            out[f"changes-{name}"] = (_pairs(of, points, name, at), text, "points.parquet")
    bins = of.tables.get("spillover_bins")
    if bins is not None and len(bins):
        name = _outcomes(bins, of.summary)[0]
        rows = bins[bins["outcome"] == name]
        focal = str(rows["focal"].iloc[0])
        text = (
            f"Spillover: {words.name(name)} of the items {focal}, less what their baseline says, by the"
            " exposure that this draw gave them beyond its mean over replayed draws. Band: what replays show."
        )
        figure = figures.spillover_curve(
            rows, f"change of log density beyond its mean{at}", f"change of {figures.label(words.name(name))}"
        )
        out["spillover"] = (figure, text, "spillover_bins.parquet")
    if cells is not None:
        first = _outcomes(cells, of.summary)[0]
        if f"{PLACEBO}{first}" in set(cells["outcome"]):
            text = (
                f"Placebo: {words.name(first)} of one control arm less that of another, by what the treatment"
                " arm leaked: nothing can have changed it."
            )
            out["placebo"] = (_effects(cells, f"{PLACEBO}{first}"), text, "cells.parquet")
    nulls, tests = of.tables.get("nulls"), of.primary("randomisation")
    if nulls is not None and tests is not None:
        for row in records(tests):
            draws = nulls[(nulls["outcome"] == row["outcome"]) & (nulls["test"] == row["test"])]["statistic"]
            if len(draws) > 1 and str(row["outcome"]) == _outcomes(tests, of.summary)[0]:
                title = f"statistic of {figures.label(str(row['test']))}"
                figure = figures.draws_against(draws, float(row["statistic"]), title, float(row["p_value"]))
                text = f"{words.name(str(row['outcome']))}, {row['test']}: under replayed assignments."
                out[f"null-{row['test']}"] = (figure, text, "nulls.parquet")
    return out


def _losses(of: Experiment) -> Drawn:
    """The loss curves of the training runs."""
    loss = of.tables.get("loss")
    if loss is None or not {"step", "loss"} <= set(loss.columns):
        return {}
    return {"loss": (figures.loss_curves(loss), "Loss while training, a line per run.", "loss.parquet")}


def _varies(table: pd.DataFrame, name: str, column: str) -> bool:
    """Whether an outcome changed anywhere: nothing is drawn of one that did not."""
    return bool((table.loc[table["outcome"] == name, column].fillna(0.0) != 0).any())


def _effects(cells: pd.DataFrame, name: str) -> Any:
    """Effects of an outcome by dose, over the interval of the untreated."""
    rows = cells[cells["outcome"] == name]
    none = rows[rows["kind"] == "none"]
    band = None if none.empty else {k: float(none[k].iloc[0]) for k in ("ci_low", "ci_high")}
    rows = rows[rows["dose"] > 0].drop(columns=["ci_low", "ci_high"])
    renamed = {"effect": "estimate", "effect_low": "ci_low", "effect_high": "ci_high"}
    title = f"change of {figures.label(words.name(name))}"
    return figures.dose_curve(rows.rename(columns=renamed), title, baseline=band)


def _pairs(of: Experiment, points: pd.DataFrame, name: str, at: str, with_line: bool = True) -> Any:
    """An outcome's change against that of density, with the slope over all items in blocks."""
    rows = points[points["outcome"] == name].rename(columns={"delta_density": "x", "delta": "y"})
    slopes, slope, centre = of.primary("slopes"), None, 0.0
    if slopes is not None and with_line:
        first = (slopes["outcome"] == name) & (slopes["model"] == "overall") & (slopes["sample"] == "all")
        if first.any():
            slope = float(slopes[first]["estimate"].iloc[0])
            inside = rows
            if "held_back" in rows.columns:
                inside = rows[~rows["held_back"].fillna(False).astype(bool)]
            centre = float(inside["y"].mean() - slope * inside["x"].mean())
    title = f"change of {figures.label(words.name(name))}"
    return figures.two_changes(rows, f"change of log density{at}", title, slope=slope, intercept=centre)


def _estimates(
    table: pd.DataFrame | None,
    title: str,
    name: Callable[[Mapping[str, Any]], str],
    estimate: str = "estimate",
) -> Any:
    """Estimates with their intervals, a line each."""
    if table is None or estimate not in table.columns:
        return None
    rows = table[table[estimate].notna()].head(MOST_ROWS).rename(columns={estimate: "estimate"})
    if rows.empty:
        return None
    if "ci_low" not in rows.columns and "std_error" in rows.columns:
        half = 1.96 * rows["std_error"]
        rows = rows.assign(ci_low=rows["estimate"] - half, ci_high=rows["estimate"] + half)
    return figures.estimates(rows, [name(row) for row in records(rows)], title)


def _relations(of: Experiment) -> Drawn:
    """The figures of a training run on groups."""
    out: Drawn = {}
    relations = of.tables.get("relations")
    if relations is not None:
        first = relations["primary"].fillna(False).astype(bool)
        # Of the samples without one group a line each: the table has the rest.
        first &= ~relations["sample"].str.startswith("trained without") | (relations["controls"] == "base")
        figure = _estimates(
            relations[first], "slope: nats per token per standard deviation",
            lambda row: f"{row['sample']}, {row['effects']}, {row['controls']}",
        )  # fmt: skip
        out["relations"] = (
            figure,
            "Claim C: loss on log density, by sample, effects and controls.",
            "relations.parquet",
        )
    groups = of.primary("groups")
    figure = _estimates(
        groups, "slope inside the group",
        lambda row: f"{row['group']}{'' if row['trained'] else ' (not trained on)'}, {row['controls']}",
    )  # fmt: skip
    out["group-slopes"] = (figure, "The slope inside each group, with 95 % intervals.", "groups.parquet")
    figure = _estimates(
        of.primary("contrasts"), "difference of slopes",
        lambda row: f"{row['contrast']}, {row['controls']}", "difference",
    )  # fmt: skip
    out["contrasts"] = (figure, "Differences of slopes.", "contrasts.parquet")
    figure = _estimates(
        of.primary("rivals"), "slope per standard deviation",
        lambda row: f"{words.name(str(row['predictor']))}, on {words.name(str(row['outcome']))}",
    )  # fmt: skip
    out["rivals"] = (figure, "Other predictors in the place of log density.", "rivals.parquet")
    return out


def _scores(of: Experiment) -> Drawn:
    """The figures of trained subsets."""
    figure = _estimates(
        of.primary("scores"), "rank correlation of predicted with measured change",
        lambda row: f"{words.name(str(row['predictor']))}: {row['score']}",
    )  # fmt: skip
    return {
        "scores": (figure, "How well each predictor ranks what a group does for a query.", "scores.parquet")
    }


def _tables(of: Experiment) -> list[dict[str, Any]]:
    """The tables that stand on the page, as rows of words."""
    out = _assignment(of.plan)
    for name, (title, columns) in _SHOWN.items():
        table = of.primary(name)
        if table is None:
            continue
        there = [c for c in columns.split() if c in table.columns and table[c].notna().any()]
        rows = [[_cell(c, row[c]) for c in there] for row in records(table[there].head(MOST_ROWS))]
        out.append(
            {
                "title": title,
                "columns": [words.name(c) for c in there],
                "rows": rows,
                "left_out": len(table) - len(rows),
                "source": f"{name}.parquet",
            }
        )
    return out


def _assignment(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Who got what, from a leak's plan."""
    cells = plan.get("cells")
    if not isinstance(cells, Mapping):
        return []
    blocks = f"{plan.get('blocks', 0):,} blocks of {plan.get('block_size', 0):,}"
    return [
        {
            "title": f"Assignment by lot: {blocks}",
            "columns": ["leaked", "items"],
            "rows": [[str(name), f"{int(count):,}"] for name, count in cells.items()],
            "left_out": 0,
            "source": "plan.json, assignment.parquet",
        }
    ]


def _cell(column: str, value: Any) -> str:
    if value is None or value != value:
        return ""
    if isinstance(value, str):
        return value
    if column.endswith("p_value"):
        return words.p_value(float(value)).removeprefix("p = ").removeprefix("p ")
    if float(value).is_integer() and column in ("n", "dose", "seed", "replays", "gained", "lost", "models"):
        return f"{int(value):,}"
    return words.number(float(value))


def _flat(value: Mapping[str, Any]) -> list[tuple[str, str]]:
    from lmd3.report.page import flat

    return flat(value)
