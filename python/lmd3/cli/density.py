"""`lmd3 density`: densities of queries under a corpus."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from lmd3.cli import _common
from lmd3.cli._common import (
    BandwidthOption,
    ForceOption,
    GroupOption,
    IdOption,
    KernelOption,
    SeedOption,
    TextOption,
    ThreadsOption,
)
from lmd3.cli._density import (
    AdaptiveOption,
    AddressOption,
    AnyEncoderOption,
    CorpusArgument,
    ExcludeSelfOption,
    ExcludeWithinOption,
    ExecutorOption,
    GroupsOption,
    IndexOption,
    IoOption,
    MemoryOption,
    MethodOption,
    PrecisionOption,
    QueriesArgument,
    ToleranceOption,
)
from lmd3.errors import ParameterError

#: What this version computes with; the options exist so that scripts need not change later.
PRECISIONS = ("auto", "float32", "int16", "int8")
METHODS = ("exact", "auto", "stratified", "sample", "deann", "knn")


def density(
    corpus: CorpusArgument,
    queries: QueriesArgument,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The folder that is written.", show_default=False)
    ] = None,
    kernel: KernelOption = None,
    bandwidth: BandwidthOption = None,
    neighbors: Annotated[int, typer.Option("--neighbors", min=0, help="Nearest rows listed per query.")] = 10,
    by_group: Annotated[bool, typer.Option("--by-group", help="Also the density under each group.")] = False,
    groups: GroupsOption = None,
    exclude_self: ExcludeSelfOption = False,
    exclude_within: ExcludeWithinOption = 0.0,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Divide by the kernel's integral over the whole space.")
    ] = False,
    precision: PrecisionOption = "auto",
    any_encoder: AnyEncoderOption = False,
    method: MethodOption = "exact",
    tolerance: ToleranceOption = None,
    index: IndexOption = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only say what the job would read, compute and take.")
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard", metavar="i/n", help="Do only the i-th of n ranges, from 0; lmd3 merge ends the job."
        ),
    ] = None,
    extend: Annotated[
        Path | None,
        typer.Option(
            "--extend",
            metavar="DIR",
            help="An earlier result over this store, before lmd3 append: only the new rows are scanned.",
        ),
    ] = None,
    rows: Annotated[
        str | None, typer.Option("--rows", metavar="N", help="Plan for so many rows of this kind, e.g. 1e9.")
    ] = None,
    nodes: Annotated[
        int | None, typer.Option("--nodes", min=1, metavar="N", help="Plan for N machines like this one.")
    ] = None,
    node_cores: Annotated[
        int | None, typer.Option("--cores", min=1, metavar="C", help="Of each [default: as many as here].")
    ] = None,
    disk_rate: Annotated[
        str | None, typer.Option("--disk-rate", metavar="R", help="Bytes a second each reads, e.g. 1GB.")
    ] = None,
    rates: Annotated[
        Path | None,
        typer.Option(
            "--rates",
            metavar="FILE",
            help="Plan by the rates of a machine, of lmd3 info --measure -o FILE there [a probe here].",
        ),
    ] = None,
    price: Annotated[
        float | None, typer.Option("--price", metavar="P", help="Of a node for an hour, in any currency.")
    ] = None,
    adaptive: AdaptiveOption = None,
    executor: ExecutorOption = "local",
    address: AddressOption = None,
    max_memory: MemoryOption = "2GB",
    io: IoOption = "mmap",
    text: TextOption = "text",
    id: IdOption = None,
    group: GroupOption = None,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    force: ForceOption = False,
) -> None:
    """Kernel density of the corpus at every query: exactly, or estimated with standard errors.

    Writes a folder: density.parquet (one row per query, kernel, bandwidth and group), queries.parquet
    (typicality,
    nearest row, duplicates), neighbors.parquet, bandwidth.json and run.json. A bandwidth rule is resolved
    once, on
    these queries; to compare two corpora give the second one --bandwidth @first/bandwidth.json.
    Finished segments of the corpus are kept in partials/ on the way: the same command continues after a kill.

    \b
    Examples:
      lmd3 density corpus.lmd3 questions.jsonl --text question -o density/
      lmd3 density corpus.lmd3 queries.npy --bandwidth 0.1 --bandwidth ess=100 --by-group -o density/
      lmd3 density corpus.lmd3 corpus.lmd3 --exclude-self -o self/
      lmd3 density corpus.lmd3 questions.jsonl --adaptive 0.2 --neighbors 100 -o density/
      lmd3 density corpus.lmd3 questions.jsonl --plan
      lmd3 density corpus.lmd3 questions.jsonl --extend density/ -o density-after-append/
      lmd3 density corpus.lmd3 questions.jsonl --method auto --tolerance reliability=0.99 -o density/
      lmd3 density corpus.lmd3 queries.npy --executor ray --address auto -o /shared/density/
      lmd3 density corpus.lmd3 queries.npy --bandwidth @bandwidth.json --shard $SLURM_ARRAY_TASK_ID/64 -o d/
    """
    from lmd3.cli._density import estimating, estimator, open_sides, parse_bytes, parse_shard, report_density
    from lmd3.density.plan import Cluster
    from lmd3.density.rates import read_rates
    from lmd3.executors import in_lines, make_executor
    from lmd3.executors.jobs import is_unfinished
    from lmd3.executors.partials import FOLDER
    from lmd3.results import DENSITY_FILES
    from lmd3.system import cores

    if out is not None and not plan:
        _common.prepare_output(out, force or is_unfinished(out), results=DENSITY_FILES)
    elif out is None and not plan:
        raise ParameterError("no -o/--out given", remedy="name the folder to write, or ask for --plan")
    for name, value, known in (("precision", precision, PRECISIONS), ("method", method, METHODS)):
        if value not in known:
            raise ParameterError(f"unknown {name} {value!r}", remedy=f"choose one of {', '.join(known)}")
    part = None if shard is None else parse_shard(shard)
    if part is not None and executor != "local":
        raise ParameterError("--shard is for processes that know of no others: it goes with no --executor")
    if extend is not None and bandwidth is None and kernel is None:
        bandwidth = [f"@{_common.existing(extend) / 'bandwidth.json'}"]
    if extend is not None and part is not None:
        raise ParameterError("--extend is for a whole job, not for a --shard of one")
    if method != "exact" and extend is not None:
        raise ParameterError(f"--method {method} takes no --extend", remedy="kept segments are exact sums")
    if adaptive is not None and part is not None:
        raise ParameterError("--adaptive is for a whole job, not for a --shard of one")
    chosen = estimating(method, tolerance, index)
    kde = estimator(kernel, bandwidth, threads, seed, precision, max_memory, any_encoder, io)
    kde.set_params(**chosen)
    kde.check_params()  # before anything is opened
    store, asked = open_sides(corpus, queries, text, id, group)
    if out is None or plan:
        cluster = None
        if any(value is not None for value in (nodes, node_cores, disk_rate, price)):
            rate = None if disk_rate is None else parse_bytes(disk_rate.removesuffix("/s"))
            cluster = Cluster(nodes or 1, node_cores or threads or cores(), rate, price)
            cluster.check()
        found = kde.fit(store).plan(
            asked,
            neighbors,
            by_group,
            groups=groups,
            exclude_self=exclude_self,
            exclude_within=exclude_within,
            rows=None if rows is None else _row_count(rows),
            cluster=cluster,
            rates=None if rates is None else read_rates(rates),
        )
        _common.emit(found, text="\n".join(_plan(found)))
        return
    if force and part is None:
        # Anew; and what is killed from here on must not look complete.
        shutil.rmtree(out / FOLDER, ignore_errors=True)
        (out / "run.json").unlink(missing_ok=True)
    options: dict[str, Any] = {
        "neighbors": neighbors,
        "by_group": by_group,
        "groups": groups,
        "normalize": normalize,
        "exclude_self": exclude_self,
        "exclude_within": exclude_within,
        "folder": out,
        "notice": _common.notice,
        "progress": _common.progress,
    }
    if part is not None:
        _report_shard(kde.fit(store).scan_shard(asked, part, **options), part, out)
        return
    runs = make_executor(executor, threads=threads, address=address)
    table = kde.fit(store).density(asked, **options, extend=extend, executor=runs, adaptive=adaptive)
    for notice in table.run["notices"]:
        _common.notice(notice)
    if table.run["zero_densities"]:
        _common.notice(f"{table.run['zero_densities']} densities are zero (-inf)")
    table.save(out)
    if asked.chunked:
        from lmd3.density.by_document import by_document
        from lmd3.results import write_parquet

        write_parquet(out / "documents.parquet", by_document(table.density, asked))
        _common.notice(f"densities by document: {out / 'documents.parquet'}")
    if not runs.in_process:
        for line in in_lines(table.run["work"]):
            _common.notice(line)
    report_density(table, out)


def _report_shard(found: dict[str, Any], shard: tuple[int, int], out: Path) -> None:
    """Says what a shard has done and what is to come."""
    from lmd3.executors.jobs import in_words

    if "queries" in found:
        start, end = found["queries"]
        line = f"shard {shard[0]} of {shard[1]}: {end - start:,} of {found['of']:,} queries are estimated"
        rest = "when all are: the same command without --shard"
        _common.emit({**found, "out": str(out), "shard": list(shard)}, text=f"{line}\n  {rest}")
        return
    (start, end), missing = found["segments"], found["missing"]
    line = f"shard {shard[0]} of {shard[1]}: {end - start:,} of {found['of']:,} segments are in {out}"
    if missing:
        rest = f"still missing there: {in_words(missing)}; when all are there: lmd3 merge {out} -o {out}"
    else:
        rest = f"all are there now: lmd3 merge {out} -o {out}"
    _common.emit({**found, "out": str(out), "shard": list(shard)}, text=f"{line}\n  {rest}")


def _plan(plan: dict[str, Any]) -> list[str]:
    """A plan in words."""
    from lmd3.progress import duration

    rate = f"{plan['operations_per_second'] / 1e9:,.1f} GFLOP/s, {plan['rates']}"
    lines = [
        f"{plan['queries']:,} queries × {plan['rows']:,} rows of {plan['dimensions']:,} dimensions",
        f"  reads      {_bytes(plan['bytes'])} in {plan['segments']:,} segments, {plan['passes']} pass",
        f"  computes   {plan['operations']:.3g} operations ({rate}, {plan['simd']}, "
        f"{plan['threads']} threads)",
        f"  partials   {_bytes(plan['partial_bytes'])} at most",
        f"  result     {_bytes(plan['result_bytes'])} in memory",
    ]
    if plan["bandwidth_seconds"]:
        lines.append(f"  bandwidths {duration(plan['bandwidth_seconds'])}")
    lines += [f"  scan       {duration(plan['scan_seconds'])}", f"  expected   {duration(plan['seconds'])}"]
    return lines + (_cluster(plan["cluster"]) if "cluster" in plan else [])


def _cluster(found: dict[str, Any]) -> list[str]:
    """A prediction in words."""
    from lmd3.progress import duration

    disk = f"{duration(found['disk_seconds'])}" if found["disk_seconds"] else "not limited"
    node_hours = found["node_hours_per_billion_rows"]
    lines = [
        f"on {found['nodes']:,} nodes of {found['cores']:,} cores like these",
        f"  arithmetic {duration(found['compute_seconds'])}",
        f"  disk       {disk} ({_bytes(found['read_bytes_per_node'])} per node)",
        f"  start      {duration(found['start_seconds'])}",
        f"  merging    {duration(found['merge_seconds'])} ({_bytes(found['network_bytes'])} of network)",
        f"  expected   {duration(found['seconds'])}; the bottleneck is {found['bottleneck']}",
        f"  cost       {found['node_hours']:.3g} node-hours, {node_hours:.3g} per 10⁹ rows",
    ]
    if found["cost"] is not None:
        lines.append(f"             {found['cost']:.4g}, {found['cost_per_billion_rows']:.4g} per 10⁹ rows")
    return lines


def _row_count(text: str) -> int:
    """Rows of `1e9` or `1000000`."""
    try:
        count = int(float(text.replace(",", "").replace("_", "")))
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise ParameterError(f"--rows {text!r} is no number of rows", remedy="for example 1e9")
    return count


def _bytes(count: float) -> str:
    """Bytes in the unit that fits: `1.5 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
