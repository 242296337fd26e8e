"""`lmd3 index`: the index of a store, for estimates of kernel sums and for nearest rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lmd3.cli._common import ForceOption, SeedOption, ThreadsOption, emit, existing, notice, progress
from lmd3.cli._density import AddressOption, ExecutorOption, parse_shard
from lmd3.errors import ParameterError


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
            metavar="float32|float16|int8",
            help="Element type of its copy of the rows [default: that of STORE, bit for bit].",
        ),
    ] = None,
    max_memory: Annotated[
        float, typer.Option("--max-memory", metavar="GB", min=0.05, help="Memory to hold to, in GB.")
    ] = 1.5,
    check: Annotated[
        bool, typer.Option("--check", help="Build nothing: verify the index that is there, to the last byte.")
    ] = False,
    pause: Annotated[
        bool,
        typer.Option("--pause", help="Stop where rows are to be assigned to lists: --shard does that."),
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            metavar="i/n",
            help="Assign only the i-th of n ranges of rows, from 0, after --pause; then without, to end.",
        ),
    ] = None,
    executor: ExecutorOption = "local",
    address: AddressOption = None,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    force: ForceOption = False,
) -> None:
    """Builds the index of a store: its rows, copied, in lists of near ones with exact moments.

    `lmd3 density --method auto` uses it where it is cheaper than reading all rows. It costs as much time as
    thousands of exact queries in a batch (10 million rows: three minutes on two cores, 8,300 queries), takes
    the disk space of the rows once more (twice while it is built), and can always be built again. Killed,
    the same command continues. Most of it is to assign every row to its list,
    which other machines can do: the tasks of --executor ray, or --shard i/n in a batch system after --pause.
    The index is the same to the byte.

    \b
    Examples:
      lmd3 index corpus.lmd3
      lmd3 index corpus.lmd3 -o /fast/disk/corpus.index --dtype int8
      lmd3 index corpus.lmd3 --check
      lmd3 index corpus.lmd3 --executor ray --address auto
      lmd3 index corpus.lmd3 --pause; lmd3 index corpus.lmd3 --shard $TASK/64; lmd3 index corpus.lmd3
    """
    from lmd3.executors import make_executor
    from lmd3.index import Index, default_path, describe, remove_unfinished
    from lmd3.index_lists import assign_shard
    from lmd3.store import open_store

    opened = open_store(existing(store))
    target = out or default_path(opened)
    if check:
        found = Index(target, opened)
        found.verify()
        emit({**describe(found), "verified": True})
        return
    if shard is not None:
        if executor != "local" or pause or force:
            raise ParameterError("--shard goes with none of --executor, --pause and --force")
        part = parse_shard(shard)
        _report_shard(
            assign_shard(opened, part, out, threads=threads, notice=notice, progress=progress), part
        )
        return
    if pause and executor != "local":
        raise ParameterError("--pause is for --shard: an executor does it all")
    runs = make_executor(executor, threads=threads, address=address)
    if force:
        remove_unfinished(target)
    elif target.with_name(target.name + ".partial").exists():
        notice("an unfinished build is there: it is continued if it is of the same rows and options")
    options: dict[str, Any] = {
        "lists": lists,
        "dtype": dtype,
        "seed": seed,
        "threads": threads,
        "max_memory": int(max_memory * 1e9),
        "force": force,
        "notice": notice,
        "progress": progress,
    }
    if pause:
        prepared = Index.prepare(opened, target, **options)
        if prepared is None:
            text = f"the lists of {target} are there; now every row is to be assigned: --shard 0/n … n-1/n"
            emit({"index": str(target), "rows": opened.n, "finished": False}, text=text)
            return
        found = prepared
    else:
        found = Index.build(opened, target, **options, executor=runs)
    emit(describe(found))


def _report_shard(found: dict[str, Any], shard: tuple[int, int]) -> None:
    """Says what a shard has done and what is to come."""
    (start, end), missing = found["rows"], found["missing"]
    line = f"shard {shard[0]} of {shard[1]}: {end - start:,} of {found['of']:,} rows are assigned"
    rows = sum(last - first for first, last in missing)
    rest = f"{rows:,} rows are still missing" if missing else "all are there: lmd3 index STORE ends the build"
    emit({**found, "shard": list(shard)}, text=f"{line}\n  {rest}")
