"""What a job would read, compute and take, by the rates of a short probe on the same rows and queries."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmd3.bandwidth import COARSE_GRID, Rule
from lmd3.density.rules import RULE_QUERIES, rule_rows, typical_distance
from lmd3.density.scan import Asked, Pair, Scanner
from lmd3.executors.partials import Part
from lmd3.store import Store
from lmd3.system import cores


def plan_density(
    scanner: Scanner,
    queries: NDArray[np.float32],
    kernels: Sequence[str],
    pairs: Sequence[Pair],
    rules: Sequence[Rule],
    asked: Asked,
    seed: int,
    seconds: float,
) -> dict[str, Any]:
    """The plan of a job; see `KernelDensity.plan` for what it holds.

    Args:
        scanner: of the corpus.
        queries: (Q, d).
        kernels: names.
        pairs: kernels with resolved bandwidths; empty where rules are to be resolved first.
        rules: that are to be resolved; empty where `pairs` are given.
        asked: what is asked beside.
        seed: of the samples.
        seconds: how long each probe runs.
    """
    corpus = scanner.store
    scale = typical_distance(corpus, queries, np.random.default_rng(seed))
    probed = list(pairs) if not rules else [(kernel, 0.1 * scale) for kernel in kernels for _ in rules]
    rate = _probe(scanner, queries, probed, asked, seconds)
    bandwidth_seconds = 0.0
    if wanted := sum(rule.kind != "number" for rule in rules):
        sample = queries[: min(len(queries), RULE_QUERIES)]
        part = None if asked.own is None else np.ascontiguousarray(asked.own[: len(sample)])
        looked = Asked(own=part, exclude_within=asked.exclude_within)
        grid = [(kernels[0], float(h)) for h in scale * COARSE_GRID]
        coarse = 1 / _probe(scanner, sample, grid, looked, seconds / 2)
        few = min(1 / rate, coarse)
        # A fine grid of 7 around each target, and a last look at what was found, lie between the two.
        fine = few + (coarse - few) * min(1.0, 7 * wanted / len(grid))
        each = rule_rows(scanner, rules, asked.own is not None) * len(sample)
        bandwidth_seconds = len(kernels) * each * (coarse + fine + few)
    lengths = scanner.segments()
    per_pair = 2.0 * corpus.d
    groups = _groups_of_segments(corpus, lengths) if asked.by_group else len(lengths)
    # Three numbers per group and kernel; row and distance of each neighbour; cosine, count.
    sums, found = groups * len(probed) * 24, len(lengths) * (asked.neighbors * 16 + 8)
    scan_seconds = float(corpus.n) * len(queries) / rate
    return {
        "rows": corpus.n,
        "queries": len(queries),
        "dimensions": corpus.d,
        "segments": len(lengths),
        "bytes": corpus.n * scanner.row_bytes,
        "passes": 1,
        "operations": per_pair * corpus.n * len(queries),
        "operations_per_second": per_pair * rate,
        "bandwidth_seconds": bandwidth_seconds,
        "scan_seconds": scan_seconds,
        "seconds": bandwidth_seconds + scan_seconds,
        "partial_bytes": len(queries) * (sums + found) + len(lengths) * corpus.d * 8,
        "simd": scanner.level,
        "threads": scanner.threads or cores(),
    }


def _probe(
    scanner: Scanner, queries: NDArray[np.float32], kernels: Sequence[Pair], asked: Asked, seconds: float
) -> float:
    """Pairs of rows and queries per second, by scanning for about so long."""

    class Enough(Exception):
        pass

    started = time.perf_counter()
    reached = [(started, 0)]

    def report(done: int, total: int) -> None:
        now = time.perf_counter()
        if done > reached[-1][1]:
            reached.append((now, done))
        # At least two looks at work that has begun, else a few blocks decide.
        if now - started > seconds and len(reached) > 2:
            raise Enough

    def drop(part: Part) -> None:
        pass

    total = scanner.store.n * len(queries)
    try:
        scanner.scan_parts(queries, kernels, 0, len(scanner.segments()), drop, asked, report)
    except Enough:
        # From the first look on: packing the queries is not part of the rate.
        (first, before), (last, done) = reached[1], reached[-1]
        return (done - before) / (last - first)
    return total / max(time.perf_counter() - started, 1e-9)


def _groups_of_segments(corpus: Store, lengths: Sequence[int]) -> int:
    """The number of groups present in each segment, summed."""
    codes = corpus.group_codes()
    if codes is None:
        return len(lengths)
    ends = np.cumsum(lengths)
    return sum(len(np.unique(codes[end - n : end])) for n, end in zip(lengths, ends.tolist(), strict=True))
