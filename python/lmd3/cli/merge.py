"""`lmd3 merge`: partial files from anywhere into one result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmd3.cli import _common
from lmd3.cli._common import ForceOption, OutOption


def merge(
    folders: Annotated[list[Path], typer.Argument(help="Results of lmd3 density, or folders of partials.")],
    out: OutOption,
    corpus: Annotated[
        Path | None, typer.Option("--corpus", help="Where the rows are now [default: where they were].")
    ] = None,
    queries: Annotated[
        Path | None, typer.Option("--queries", help="Where the queries are now [default: where they were].")
    ] = None,
    allow_mixed: Annotated[
        bool, typer.Option("--allow-mixed", help="Also of different SIMD levels or precisions.")
    ] = False,
    force: ForceOption = False,
) -> None:
    """Merges the partial files of a job into its tables, the same to the byte as a run in one process.

    Every segment is counted once. Files of different configurations are refused; of different SIMD levels or
    precisions too, unless --allow-mixed.

    \b
    Examples:
      lmd3 merge density/ -o density/                    after lmd3 density --shard 0/8 … 7/8 -o density/
      lmd3 merge node1/ node2/ node3/ -o density/
    """
    from lmd3.cli._density import report_density
    from lmd3.density.merge import merge as merge_folders
    from lmd3.results import DENSITY_FILES

    _common.prepare_output(out, force, results=[name for name in DENSITY_FILES if name != "bandwidth.json"])
    table = merge_folders(
        folders,
        corpus=corpus,
        queries=queries,
        allow_mixed=allow_mixed,
        notice=_common.notice,
        progress=_common.progress,
    )
    table.save(out)
    report_density(table, out)
