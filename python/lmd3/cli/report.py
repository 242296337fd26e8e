"""`lmd3 report`: a study on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmd3.cli import _common


def report(
    study: Annotated[
        Path, typer.Argument(help="Folder of `lmd3 analyze` or of `lmd3 study`.", metavar="DIR")
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
    force: _common.ForceOption = False,
) -> None:
    """Write a study as one HTML page that needs no network.

    \b
    Examples:
      lmd3 report study -o report.html
      lmd3 report study -o report.html --corpus corpus.lmd3 --queries test.jsonl --text question
    """
    page = _common.prepare_output(out, force)
    _common.existing(study)
    for place in (corpus, queries):
        if place is not None:
            _common.existing(place)

    from lmd3.report import write_report

    write_report(study, page, corpus=corpus, queries=queries, text=text, id=id, show_texts=not no_texts)
    _common.emit({"out": str(page), "bytes": page.stat().st_size}, text=f"Written to {page}")
