"""What a job would read, compute and take: by a short probe on the same rows and queries, or by the rates of
a machine that were measured before (`lmd3.density.rates`)."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lmd3.bandwidth import COARSE_GRID, Rule
from lmd3.density.rules import RULE_QUERIES, rule_rows, typical_distance
from lmd3.density.scan import Asked, Pair, Scanner
from lmd3.errors import ParameterError
from lmd3.executors import TASKS_PER_SLOT
from lmd3.executors.partials import Part
from lmd3.store import Store
from lmd3.system import cores

if TYPE_CHECKING:
    from lmd3.density.rates import Rates


def plan_density(
    scanner: Scanner,
    queries: NDArray[np.float32],
    kernels: Sequence[str],
    pairs: Sequence[Pair],
    rules: Sequence[Rule],
    asked: Asked,
    seed: int,
    seconds: float,
    rows: int | None = None,
    cluster: Cluster | None = None,
    rates: Rates | None = None,
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
        rows: plan for so many rows of this kind [those of the corpus].
        cluster: on which it would run.
        rates: of the machine that it would run on [a probe on this one].

    Raises:
        ParameterError: the result would take more than the memory allowed.
    """
    corpus = scanner.store
    count = len(pairs) or len(rules) * len(kernels)
    result = check_memory(scanner, len(queries), count, asked)
    scale = typical_distance(corpus, queries, np.random.default_rng(seed))
    probed = list(pairs) if not rules else [(kernel, 0.1 * scale) for kernel in kernels for _ in rules]
    if rates is None:
        rate = _probe(scanner, queries, probed, asked, seconds)
    else:
        sizes = (len(queries), corpus.d, scanner.row_bytes, scanner.arithmetic)
        rate = 1e6 * len(queries) / rates.scan_seconds(1e6, *sizes)
    bandwidth_seconds = 0.0
    if wanted := sum(rule.kind != "number" for rule in rules):
        sample = queries[: min(len(queries), RULE_QUERIES)]
        part = None if asked.own is None else np.ascontiguousarray(asked.own[: len(sample)])
        looked = Asked(own=part, exclude_within=asked.exclude_within)
        grid = [(kernels[0], float(h)) for h in scale * COARSE_GRID]
        coarse = 1 / (rate if rates is not None else _probe(scanner, sample, grid, looked, seconds / 2))
        few = min(1 / rate, coarse)
        # A fine grid of 7 around each target, and a last look at what was found, lie between the two.
        fine = few + (coarse - few) * min(1.0, 7 * wanted / len(grid))
        each = rule_rows(scanner, rules, asked.own is not None) * len(sample)
        bandwidth_seconds = len(kernels) * each * (coarse + fine + few)
    lengths = scanner.segments()
    n = rows or corpus.n
    scale_up = n / corpus.n
    segments = len(lengths) if rows is None else max(1, round(len(lengths) * scale_up))
    per_pair = 2.0 * corpus.d
    groups = (_groups_of_segments(corpus, lengths) if asked.by_group else len(lengths)) * scale_up
    if asked.groups is not None:
        groups = min(groups, segments * (len(asked.groups) + 1.0))
    # Three numbers per group and kernel; row and distance of each neighbour; cosine, count.
    sums, found = groups * len(probed) * 24, segments * (asked.neighbors * 16 + 8)
    scan_seconds = float(n) * len(queries) / rate
    plan = {
        "rows": n,
        "queries": len(queries),
        "dimensions": corpus.d,
        "segments": segments,
        "bytes": n * scanner.row_bytes,
        "passes": 1,
        "operations": per_pair * n * len(queries),
        "operations_per_second": per_pair * rate,
        "bandwidth_seconds": bandwidth_seconds,
        "scan_seconds": scan_seconds,
        "seconds": bandwidth_seconds + scan_seconds,
        "partial_bytes": round(len(queries) * (sums + found) + segments * corpus.d * 8),
        "result_bytes": result,
        "simd": scanner.level if rates is None else rates.simd,
        "threads": (scanner.threads or cores()) if rates is None else rates.threads,
        "rates": "a probe" if rates is None else "measured before",
    }
    if cluster is not None:
        if rates is None:
            from lmd3.density.rates import measure_rates

            # What a probe on these rows does not show.
            rates = measure_rates(scanner.threads, 0.0)
        plan["cluster"] = predict(plan, cluster, rates)
    return plan


#: Bytes of memory per row of the density table (sums, estimate, columns) and of the table of neighbours.
_TABLE_ROW, _NEIGHBOR_ROW = 260, 180


def check_memory(scanner: Scanner, queries: int, pairs: int, asked: Asked) -> int:
    """Bytes of memory that a result takes: its sums of all groups, and its tables.

    Raises:
        ParameterError: it is by groups, and they take more than the memory allowed.
    """
    groups = len(scanner.store.groups) if asked.groups is None else len(asked.groups) + 1
    cells = 1 + (groups if asked.by_group else 0)
    needed = queries * (pairs * cells * _TABLE_ROW + asked.neighbors * _NEIGHBOR_ROW)
    if asked.by_group and needed > scanner.memory:
        fit = (scanner.memory // queries - asked.neighbors * _NEIGHBOR_ROW) // (pairs * _TABLE_ROW) - 2
        raise ParameterError(
            f"the sums of {groups:,} groups, {queries:,} queries and {pairs} bandwidths take "
            f"{needed / 1e9:.3g} GB, more than the {scanner.memory / 1e9:.3g} GB of --max-memory",
            remedy=f"keep fewer apart (--groups top:{max(1, fit)} or a file of names), ask fewer queries at "
            "once, or raise --max-memory",
        )
    return needed


# --- many machines ---


@dataclass(frozen=True)
class Cluster:
    """Machines like this one.

    Attributes:
        nodes: how many.
        cores: of each that compute.
        disk_rate: bytes per second that a node reads of the rows, from its own disk or its share of a common
            one; None: never what is waited for.
        price: of a node for an hour, in any currency.
    """

    nodes: int
    cores: int
    disk_rate: float | None = None
    price: float | None = None

    def check(self) -> None:
        """Refuses what no cluster is.

        Raises:
            ParameterError: a number that is not positive.
        """
        for name in ("nodes", "cores", "disk_rate", "price"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ParameterError(f"{name}={value} is not positive")


def predict(plan: Mapping[str, Any], cluster: Cluster, rates: Rates) -> dict[str, Any]:
    """The time and cost of a planned job on a cluster, from the plan's rate per thread.

    The nodes read and compute at once, so the slower of the two decides; one process folds the partial files
    at the end. Threads are taken to do as much as those of the probe.

    Args:
        plan: of `plan_density`, with the rate of `threads` threads.
        cluster: the machines.
        rates: how fast a process folds, and what workers and tasks take to start.

    Returns:
        `compute_seconds`, `disk_seconds`, `start_seconds`, `merge_seconds`, `seconds` of all; `bottleneck`
        ("arithmetic", "disk", "start" or "merge"); `network_bytes`: partial files to the common folder and
        back to the process that merges; `read_bytes_per_node`; `node_hours` and `cost` (None without a
        price), each for the job and per 10⁹ rows.
    """
    cluster.check()
    workers = cluster.nodes * cluster.cores
    per_thread = plan["operations_per_second"] / plan["threads"]
    # The last wave of tasks leaves some nodes idle: half a task's time on average.
    waves = 1.0 + 0.5 / TASKS_PER_SLOT if cluster.nodes > 1 else 1.0
    compute = waves * plan["operations"] / (per_thread * workers)
    disk = 0.0 if cluster.disk_rate is None else waves * plan["bytes"] / (cluster.disk_rate * cluster.nodes)
    start = rates.start + TASKS_PER_SLOT * rates.task if cluster.nodes > 1 else 0.0
    merge = plan["partial_bytes"] / rates.fold
    parts = {"arithmetic": compute, "disk": disk, "start": start, "merge": merge}
    seconds = max(compute, disk) + start + merge + plan["bandwidth_seconds"]
    node_hours = cluster.nodes * seconds / 3600
    billion = 1e9 / plan["rows"]
    return {
        "nodes": cluster.nodes,
        "cores": cluster.cores,
        "compute_seconds": compute,
        "disk_seconds": disk,
        "start_seconds": start,
        "merge_seconds": merge,
        "seconds": seconds,
        "bottleneck": max(parts, key=lambda name: parts[name]),
        "network_bytes": 2 * plan["partial_bytes"],
        "read_bytes_per_node": plan["bytes"] / cluster.nodes,
        "node_hours": node_hours,
        "node_hours_per_billion_rows": node_hours * billion,
        "cost": None if cluster.price is None else node_hours * cluster.price,
        "cost_per_billion_rows": None if cluster.price is None else node_hours * cluster.price * billion,
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
