"""`lmd3 demo`: see it work, offline, on the documentation that every installation has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmd3.cli._common import ForceOption, SeedOption, ThreadsOption, emit, notice, prepare_output, progress


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the texts, tables and report.")] = Path(
        "lmd3-demo"
    ),
    force: ForceOption = False,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
) -> None:
    """See lmd3 work, offline, in two minutes.

    Trains an n-gram model on the documentation of installed packages, relates its loss on held-out
    paragraphs to the density of its training text, and leaks some of them to see what follows.

    \b
    Examples:
      lmd3 demo
      lmd3 demo -o /tmp/lmd3-demo --seed 1
    """
    from lmd3.experiments.demo import run_demo

    prepare_output(out, force, results=["summary.txt"])
    result = run_demo(out, seed=seed, threads=threads, progress=progress, say=notice)
    emit(result.to_dict(), text="\n" + result.summary())
