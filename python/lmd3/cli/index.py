"""`lmd3 index`: the index of a store, for estimates of kernel sums and for nearest rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmd3.cli._common import ForceOption, SeedOption, ThreadsOption, emit, existing, notice, progress


def index(
    store: Annotated[
        Path, typer.Argument(metavar="STORE", help="A store, or bare vectors (.npy, .safetensors).")
    ],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="The folder that is written [default: STORE.index]."),
    ] = None,
    lists: Annotated[
        int | None, typer.Option("--lists", min=1, help="Number of lists [default: the root of 2 × rows].")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="float16|int8",
            help="Element type of its copy of the rows [default: that of STORE, else float16].",
        ),
    ] = None,
    max_memory: Annotated[
        float, typer.Option("--max-memory", metavar="GB", min=0.05, help="Memory to hold to, in GB.")
    ] = 1.5,
    check: Annotated[
        bool, typer.Option("--check", help="Build nothing: verify the index that is there, to the last byte.")
    ] = False,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    force: ForceOption = False,
) -> None:
    """Builds the index of a store: its rows, copied, in lists of near ones with exact moments.

    `lmd3 density --method auto` uses it where it is cheaper than reading all rows. It costs about as much as
    2·√lists exact queries, takes the disk space of the rows once more (twice while it is built), and can
    always be built again. Killed, the same command continues.

    \b
    Examples:
      lmd3 index corpus.lmd3
      lmd3 index corpus.lmd3 -o /fast/disk/corpus.index --dtype int8
      lmd3 index corpus.lmd3 --check
    """
    from lmd3.index import Index, default_path, describe, remove_unfinished
    from lmd3.store import open_store

    opened = open_store(existing(store))
    target = out or default_path(opened)
    if check:
        found = Index(target, opened)
        found.verify()
        emit({**describe(found), "verified": True})
        return
    if force:
        remove_unfinished(target)
    elif target.with_name(target.name + ".partial").exists():
        notice("an unfinished build is there: it is continued if it is of the same rows and options")
    found = Index.build(
        opened,
        target,
        lists=lists,
        dtype=dtype,
        seed=seed,
        threads=threads,
        max_memory=int(max_memory * 1e9),
        force=force,
        progress=progress,
    )
    emit(describe(found))
