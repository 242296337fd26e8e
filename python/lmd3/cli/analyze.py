"""`lmd3 analyze`: outcome against density."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmd3.cli import _common

#: Files of a study folder that are never overwritten without `--force`.
_RESULTS = ("summary.json", "coefficients.parquet", "ladder.parquet")


def analyze(
    density: Annotated[
        Path, typer.Argument(help="Folder of `lmd3 density`, or any table with an id and the predictor.")
    ],
    outcomes: Annotated[
        Path, typer.Argument(help="Table of (id, value): .csv, .jsonl or .parquet; or an evaluation log.")
    ],
    out: _common.OutOption,
    outcome: Annotated[
        str | None, typer.Option("--outcome", metavar="NAME", help="Which outcome, of a table with several.")
    ] = None,
    bandwidth: Annotated[
        list[str] | None,
        typer.Option(
            "--bandwidth",
            metavar="B",
            help="Only these of the density table, by number or rule; repeatable, the first is the primary "
            "one [default: all].",
        ),
    ] = None,
    predictor: Annotated[
        str, typer.Option("--predictor", metavar="COL", help="Column whose slope is asked for.")
    ] = "log_density",
    controls: Annotated[
        str,
        typer.Option(
            "--controls",
            help="`default` (typicality and all of --covariates), `none`, or names joined by commas.",
        ),
    ] = "default",
    covariates: Annotated[
        Path | None, typer.Option("--covariates", metavar="FILE", help="Table of `lmd3 covariates`.")
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option("--cluster", metavar="COL", help="Column of clusters: changes the errors only."),
    ] = None,
    within: Annotated[
        str | None, typer.Option("--within", metavar="COL", help="Column of groups that get an effect each.")
    ] = None,
    id: Annotated[
        str | None,
        typer.Option("--id", metavar="COL", help="Id column of DENSITY, where it is a plain table."),
    ] = None,
    outcome_id: _common.OutcomeIdOption = None,
    outcome_value: _common.OutcomeValueOption = None,
    floor: Annotated[
        float | None,
        typer.Option("--floor", help="Log density to put where it is lower (−inf); refused without."),
    ] = None,
    shuffles: Annotated[int, typer.Option("--shuffles", min=200, help="Draws of the shuffle null.")] = 200,
    force: _common.ForceOption = False,
    seed: _common.SeedOption = 0,
) -> None:
    """Relate performance to density: slopes per standard deviation, the ladder, the answer in words.

    Continuous outcomes are fitted by least squares (HC3 or clustered errors), binary ones by a logit.

    \b
    Examples:
      lmd3 analyze density results.jsonl -o study --outcome-id doc_id --outcome-value correct
      lmd3 analyze density loss.parquet -o study --covariates covariates.parquet --within group
      lmd3 analyze table.csv table.csv -o study --predictor max_cosine --outcome-value correct --cluster task
    """
    folder = _common.prepare_output(out, force, results=_RESULTS)
    _common.existing(density)
    if covariates is not None:
        _common.existing(covariates)

    from lmd3.analysis import regress

    study = regress(
        _common.read_outcomes(str(outcomes), id=outcome_id, value=outcome_value, outcome=outcome),
        density,
        covariates,
        cluster=cluster,
        within=within,
        controls=controls,
        predictor=predictor,
        bandwidth=bandwidth,
        outcome_name=outcome,
        floor=floor,
        shuffles=shuffles,
        seed=seed,
        id=id,
        files={"outcomes": str(outcomes)},
    )
    study.run["arguments"] = list(_common.manners.arguments)
    study.save(folder)
    _common.emit({**study.facts, "out": str(folder)}, text=f"{study.summary()}\n\nWritten to {folder}")
