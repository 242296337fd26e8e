"""Bandwidth rules resolved on seeded samples of queries and rows; what a rule is: `lmd3.bandwidth`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lmd3.bandwidth import Bandwidth, Rule, resolve
from lmd3.density.leave_one_out import likeliest
from lmd3.density.scan import Asked, Scanner
from lmd3.progress import ProgressFactory
from lmd3.store import Store, open_store

#: Queries that a bandwidth rule looks at.
RULE_QUERIES = 1000

#: Rows that a rule looks at, at least (or all), and effective rows that must be left in the sample.
RULE_ROWS, RULE_EFFECTIVE = 1_000_000, 30


def resolve_rules(
    scanner: Scanner,
    kernels: Sequence[str],
    rules: Sequence[Rule],
    queries: NDArray[np.float32],
    asked: Asked,
    seed: int,
    progress: ProgressFactory,
    notices: list[str] | None = None,
) -> list[Bandwidth]:
    """The bandwidths of every kernel and rule, kernels outermost; `notices` takes what to know of them.

    Raises:
        ParameterError: a target that no bandwidth reaches.
    """
    generator = np.random.default_rng(seed)
    chosen = np.arange(len(queries))
    if len(queries) > RULE_QUERIES:
        chosen = np.sort(generator.choice(len(queries), RULE_QUERIES, replace=False))
    sample = np.ascontiguousarray(queries[chosen])
    own = None if asked.own is None else np.ascontiguousarray(asked.own[chosen])
    looked = Asked(own=own, exclude_within=asked.exclude_within)
    rows, share = _sampled(scanner, rules, generator, own is not None)
    scale = typical_distance(rows.store, sample, generator)
    resolved = []
    for kernel in kernels:

        def evaluate(
            grid: Sequence[float], kernel: str = kernel
        ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            scan = rows.scan(sample, [(kernel, float(h)) for h in grid], looked, progress, "bandwidth")
            return scan.total.log_sum, scan.total.ess

        # ‖x − q‖₁ is about √(2d/π) times the Euclidean distance.
        stretch = math.sqrt(2.0 * rows.store.d / math.pi) if kernel == "laplacian" else 1.0
        weights = scanner.weights if scanner.weights is not None else scanner.store.weights()
        if weights is not None and rows is not scanner:
            weights = rows.weights
        found = resolve(
            [rule for rule in rules if rule.kind != "loo"],
            kernel,
            evaluate,
            scale=stretch * scale,
            sampled_rows=rows.store.n,
            # Of a sampled store the rules look through to the texts that its rows stand for: their weights
            # do so for sums, not for effective sizes.
            row_share=share * scanner.store.n / scanner.store.population,
            mass_share=share,
            weight=None if weights is None else float(weights.sum(dtype=np.float64)),
        )
        for rule in rules:
            if rule.kind != "loo":
                resolved.append(found.pop(0))
                continue
            best, note = likeliest(
                rows,
                kernel,
                rule,
                scale=stretch * scale,
                weights=weights,
                exclude_within=asked.exclude_within,
                seed=seed,
                progress=progress,
            )
            resolved.append(best)
            if note is not None and notices is not None:
                notices.append(note)
    return resolved


def rule_rows(scanner: Scanner, rules: Sequence[Rule], all_rows: bool) -> int:
    """How many rows the rules look at.

    As many as leave `RULE_EFFECTIVE` of the smallest target in the sample, at least `RULE_ROWS`, at most all.
    """
    store = scanner.store
    # A density of mu is a kernel sum of mu times the rows.
    targets = [r.value * (store.n if r.kind == "mu" else 1) for r in rules if r.kind not in ("number", "loo")]
    smallest = min(targets, default=math.inf)
    rows = max(RULE_ROWS, math.ceil(store.n * RULE_EFFECTIVE / smallest))
    # A gathered sample must fit the memory allowed; weights and left-out rows need the whole.
    if all_rows or scanner.weights is not None or rows * store.d * 4 > scanner.memory:
        return store.n
    return min(rows, store.n)


def _sampled(
    scanner: Scanner, rules: Sequence[Rule], generator: np.random.Generator, all_rows: bool
) -> tuple[Scanner, float]:
    """A scanner of the rows that the rules look at, and their share of the corpus."""
    store = scanner.store
    rows = rule_rows(scanner, rules, all_rows)
    if rows == store.n:
        return scanner, 1.0
    chosen = np.sort(generator.choice(store.n, rows, replace=False))
    sample = open_store(store.rows(chosen))
    weights = store.weights()
    if weights is not None:
        weights = np.ascontiguousarray(weights[chosen])
    return dataclasses.replace(scanner, store=sample, weights=weights), rows / store.n


def typical_distance(store: Store, queries: NDArray[np.float32], generator: np.random.Generator) -> float:
    """Root mean squared distance of sampled queries and rows: the scale on which bandwidths are searched."""
    rows = store.rows(np.sort(generator.choice(store.n, min(store.n, 512), replace=False))).astype(np.float64)
    some = queries[:256].astype(np.float64)
    squared = (rows**2).sum(1).mean() + (some**2).sum(1).mean() - 2.0 * float(rows.mean(0) @ some.mean(0))
    return math.sqrt(max(squared, 1e-12)) or 1.0
