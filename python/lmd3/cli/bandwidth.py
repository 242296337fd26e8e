"""`lmd3 bandwidth`: resolve bandwidth rules once, for many jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmd3.cli import _common
from lmd3.cli._common import (
    BandwidthOption,
    ForceOption,
    GroupOption,
    IdOption,
    KernelOption,
    OutOption,
    SeedOption,
    TextOption,
    ThreadsOption,
)
from lmd3.cli._density import CorpusArgument, ExcludeSelfOption, ExcludeWithinOption, QueriesArgument

if TYPE_CHECKING:
    from lmd3.bandwidth import Bandwidth


def bandwidth(
    corpus: CorpusArgument,
    queries: QueriesArgument,
    out: OutOption,
    kernel: KernelOption = None,
    bandwidth: BandwidthOption = None,
    exclude_self: ExcludeSelfOption = False,
    exclude_within: ExcludeWithinOption = 0.0,
    text: TextOption = "text",
    id: IdOption = None,
    group: GroupOption = None,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    force: ForceOption = False,
) -> None:
    """Turns bandwidth rules into numbers, on a sample of the queries, and writes them down.

    Every later job takes them with --bandwidth @bandwidth.json: shards, appended rows, interventions and
    reference
    corpora must share one set of numbers to be comparable.

    \b
    Example:
      lmd3 bandwidth corpus.lmd3 questions.jsonl --bandwidth ess=1000 -o bandwidth.json
      lmd3 bandwidth corpus.lmd3 questions.jsonl --bandwidth loo -o bandwidth.json
    """
    from lmd3.cli._density import estimator, open_sides
    from lmd3.results import write_json

    _common.prepare_output(out, force)
    kde = estimator(kernel, bandwidth, threads, seed)
    kde.check_params()  # before anything is opened
    store, asked = open_sides(corpus, queries, text, id, group)
    kde.fit(store)
    found = kde.resolve(
        asked, exclude_self=exclude_self, exclude_within=exclude_within, progress=_common.progress
    )
    for notice in kde.notices_:
        _common.notice(notice)
    entries = [entry.to_dict() for entry in found]
    result = {
        "format": 1,
        "bandwidths": entries,
        "seed": seed,
        "store": store.fingerprint,
        "queries": asked.fingerprint,
        "notices": kde.notices_,
    }
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    _common.emit({**result, "out": str(out)}, text="\n".join(_line(entry) for entry in found))


def _line(entry: Bandwidth) -> str:
    line = f"{entry.kernel} {entry.rule}: h = {entry.bandwidth:.6g}"
    if entry.achieved is None:
        return line
    interval = f"95 % interval {entry.achieved_low:.4g} to {entry.achieved_high:.4g}"
    if entry.curve is not None:
        line += (
            f"  (mean log density of {entry.sampled_queries} rows left out {entry.achieved:.4f}, {interval})"
        )
        shown = entry.curve[:: max(1, len(entry.curve) // 24)]
        steps = [
            f"    h = {h:<10.4g} {mean:>12.3f} ± {error:<8.3f} ess {ess:.4g}" for h, mean, error, ess in shown
        ]
        return "\n".join([line, *steps])
    sample = f"{entry.sampled_queries} queries, {entry.sampled_rows:,} rows"
    return f"{line}  (median {entry.achieved:.4g}, {interval}, {sample})"
