"""`lmd3 report`: a study on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmd3.cli import _common


def report(
    study: Annotated[
        Path,
        typer.Argument(
            help="Folder of `lmd3 analyze` or `study`, or of an experiment (`leak`, …).", metavar="DIR"
        ),
    ],
    out: _common.OutOption,
    corpus: Annotated[
        Path | None,
        typer.Option(
            "--corpus", help="Training texts (a store or a file), if not where the density run found them."
        ),
    ] = None,
    queries: Annotated[
        Path | None, typer.Option("--queries", help="Texts of the queries (a store or a file), likewise.")
    ] = None,
    text: _common.TextOption = "text",
    id: _common.IdOption = None,
    no_texts: Annotated[bool, typer.Option("--no-texts", help="Show no texts (private data).")] = False,
    latex: Annotated[
        Path | None,
        typer.Option("--latex", metavar="FILE", help="Write the main numbers as a LaTeX table too (.tex)."),
    ] = None,
    force: _common.ForceOption = False,
) -> None:
    """Write a study or an experiment as one HTML page that needs no network.

    The page holds the answer with its effect size, figures (each can be saved as SVG or PNG), a searchable
    table of up to 2,000 queries with their nearest training texts, and the commands that repeat the study.

    \b
    Examples:
      lmd3 report study -o report.html
      lmd3 report study -o report.html --corpus corpus.lmd3 --queries test.jsonl --text question
      lmd3 report study -o report.html --latex table.tex --no-texts
    """
    page = _common.prepare_output(out, force)
    if latex is not None:
        _common.prepare_output(latex, force)
    _common.existing(study)
    for place in (corpus, queries):
        if place is not None:
            _common.existing(place)

    from lmd3.errors import ParameterError
    from lmd3.report import latex_of, write_experiment, write_report
    from lmd3.report.experiment import is_experiment
    from lmd3.report.page import write_page

    if is_experiment(study):
        if latex is not None:
            raise ParameterError("--latex is for studies", file=str(study))
        write_experiment(study, page)
        _common.emit({"out": str(page), "bytes": page.stat().st_size}, text=f"Written to {page}")
        return
    write_report(study, page, corpus=corpus, queries=queries, text=text, id=id, show_texts=not no_texts)
    result = {"out": str(page), "bytes": page.stat().st_size}
    if latex is not None:
        result["latex"] = str(write_page(latex, latex_of(study)))
    written = page if latex is None else f"{page} and {latex}"
    _common.emit(result, text=f"Written to {written}")
