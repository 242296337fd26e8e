"""`lmd3 analyze`: outcome against density."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmd3.cli import _common

if TYPE_CHECKING:
    from lmd3.store import Store

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
    draws: Annotated[
        int,
        typer.Option("--draws", min=199, help="Draws of the wild bootstraps (few clusters) and of max-T."),
    ] = 9_999,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--also",
            metavar="NAME",
            help="Fit too: mixed, mixed_slopes, conditional_logit, gee, quantile, gam; repeatable.",
        ),
    ] = None,
    contrast: Annotated[
        Path | None,
        typer.Option(
            "--contrast", metavar="FILE", help="Another model's outcomes on the same queries: the difference."
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference",
            metavar="DENSITY",
            help="Densities under a corpus the model never saw, at the same bandwidths: taken off.",
        ),
    ] = None,
    support: Annotated[
        Path | None,
        typer.Option(
            "--support",
            metavar="DENSITY",
            help="Densities of training rows with themselves left out: flags unsupported queries.",
        ),
    ] = None,
    queries: Annotated[
        Path | None,
        typer.Option(
            "--queries",
            metavar="ROWS",
            help="Vectors of the queries: clusters of near queries where none are named, Moran's I [default: "
            "where the density run says they are].",
        ),
    ] = None,
    adjust: Annotated[
        Path | None,
        typer.Option(
            "--adjust",
            metavar="FILE",
            help="A causal graph (lines `a -> b`) or a list of controls: mediators and colliders are named.",
        ),
    ] = None,
    before: Annotated[
        Path | None,
        typer.Option(
            "--before",
            metavar="FILE",
            help="Outcomes of the same queries before an intervention: the study is of the change.",
        ),
    ] = None,
    density_before: Annotated[
        Path | None,
        typer.Option(
            "--density-before",
            metavar="DENSITY",
            help="Densities before it, at the same bandwidths: the predictor is their change.",
        ),
    ] = None,
    dose: Annotated[
        str | None,
        typer.Option(
            "--dose",
            metavar="COL",
            help="With --before: the column of the outcomes that says how often a query was leaked (or 0/1).",
        ),
    ] = None,
    force: _common.ForceOption = False,
    seed: _common.SeedOption = 0,
) -> None:
    """Relate performance to density: slopes per standard deviation, the ladder, the answer in words.

    Continuous outcomes are fitted by least squares (HC3 or clustered errors), binary ones by a logit. With
    fewer than 40 effective clusters a wild bootstrap decides. All that is found is in the folder's tables.

    \b
    Examples:
      lmd3 analyze density results.jsonl -o study --outcome-id doc_id --outcome-value correct
      lmd3 analyze density loss.parquet -o study --covariates covariates.parquet --within group
      lmd3 analyze table.csv table.csv -o study --predictor max_cosine --outcome-value correct --cluster task
      lmd3 analyze density tuned.jsonl -o study --outcome-value correct --contrast base.jsonl
      lmd3 analyze density-after after.jsonl -o study --before before.jsonl --density-before density-before \
        --dose copies --within subject
    """
    folder = _common.prepare_output(out, force, results=_RESULTS)
    _common.existing(density)
    for path in (covariates, contrast, reference, support, queries, adjust, before, density_before):
        if path is not None:
            _common.existing(path)

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
        draws=draws,
        models=models or (),
        contrast=None
        if contrast is None
        else _common.read_outcomes(str(contrast), id=outcome_id, value=outcome_value, outcome=None),
        reference=reference,
        support=support,
        queries=_vectors(queries, density),
        adjust=adjust,
        before=None
        if before is None
        else _common.read_outcomes(str(before), id=outcome_id, value=outcome_value, outcome=outcome),
        density_before=density_before,
        dose=dose,
        seed=seed,
        id=id,
        files={"outcomes": str(outcomes)}
        | ({} if contrast is None else {"contrast": str(contrast)})
        | ({} if before is None else {"before": str(before)}),
    )
    study.run["arguments"] = list(_common.manners.arguments)
    study.save(folder)
    _common.emit({**study.facts, "out": str(folder)}, text=f"{study.summary()}\n\nWritten to {folder}")


def _vectors(given: Path | None, density: Path) -> Store | None:
    """The rows named, else those that the density run names and that are still what they were."""
    from lmd3.errors import Lmd3Error
    from lmd3.results import read_json
    from lmd3.store import open_store

    if given is not None:
        return open_store(given)
    if not (density / "run.json").is_file():
        return None
    try:
        of = read_json(density / "run.json").get("queries") or {}
        if not of.get("path") or not Path(of["path"]).exists():
            return None
        store = open_store(of["path"])
        return store if store.fingerprint == of.get("fingerprint") else None
    except (Lmd3Error, OSError, AttributeError):
        return None
