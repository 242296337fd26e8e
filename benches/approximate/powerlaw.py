"""The open risk: mixtures with power-law cluster scales, 54 dimensions, where one or a few rows decide a sum.

True failures (|log error| above three standard errors) must be sent to exact by flag or audit, and not much
else. Whole jobs show whether any estimate that is reported has failed. Since none does, failures are made:
one stage of few rows, judged by its draws alone; and it is looked at what the rules of a job do with these.
"""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from benches.approximate import rivals
from numpy.typing import NDArray

from lmd3.density import KernelDensity
from lmd3.density.estimation import Estimation, keys_of
from lmd3.density.methods import DRAW_COST, PILOT, parse_tolerance
from lmd3.density.scan import Asked, Scanner
from lmd3.density.stages import DOUBTFUL, SLACK, Stages
from lmd3.index import Index
from lmd3.progress import silent
from lmd3.store import open_store

D, CLUSTERS = 54, 400

#: No error counts below this: single precision.
ARITHMETIC = 1e-3


def mixture(n: int, seed: int) -> NDArray[np.float32]:
    """Rows of clusters whose scales and sizes follow power laws."""
    shape = np.random.default_rng(5)
    centres = shape.normal(size=(CLUSTERS, D))
    scales = 0.02 * (1 - shape.random(CLUSTERS)) ** -0.8
    share = (1 - shape.random(CLUSTERS)) ** -1.0
    rng = np.random.default_rng(seed)
    which = rng.choice(CLUSTERS, size=n, p=share / share.sum())
    return (centres[which] + scales[which, None] * rng.normal(size=(n, D))).astype(np.float32)


def run(
    n: int = 100_000, q: int = 500, tolerance: float = 0.05, seeds: int = 20, threads: int | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Densities of fresh queries (seed 101; the estimator was made on others), one row per bandwidth and
    seed; and the guard."""
    rows, queries = mixture(n, 0), mixture(q, 101)
    store = open_store(rows)
    out, guarded = [], []
    with tempfile.TemporaryDirectory() as folder:
        index = Index.build(store, Path(folder) / "i", threads=threads)
        ids = index.native.ids.astype(np.int64)
        ends = np.concatenate([[0], np.cumsum(index.native.sizes)]).astype(int)
        lists = [ids[a:b] for a, b in pairwise(ends)]
        near = index.native.nearest_lists(queries, index.lists)
        wide, norms = rows.astype(np.float64), (rows.astype(np.float64) ** 2).sum(1)

        def needs(chosen: NDArray[np.int64], h: float) -> NDArray[np.bool_]:
            """Which of the queries the oracle can't do either with as many rows as "auto" may take."""
            need = np.zeros(q, bool)
            for i in chosen:
                query = queries[i].astype(np.float64)
                squared = np.maximum(norms + query @ query - 2 * wide @ query, 0)
                # Relative to the largest, so that nothing underflows.
                k = np.exp(-(squared - squared.min()) / (2 * h * h))
                budget = int(n / DRAW_COST) + index.lists
                error = rivals.oracle(k, squared, lists, near[i][near[i] >= 0], budget)
                need[i] = error > SLACK * tolerance
            return need

        for mu in (1e-3, 1e-4, 1e-5):
            kde = KernelDensity(kernel="gaussian", bandwidth=f"mu={mu:g}", threads=threads).fit(store)
            h = kde.resolve(queries[:200])[0].bandwidth
            scanner = Scanner(store, None, "auto", threads, 2_000_000_000)
            pairs = [("gaussian", h)]
            truth = scanner.scan(queries, pairs).total.log_sum[:, 0]
            guarded.append({"mu": mu, **guard(index, queries, h, truth, tolerance, seeds)})
            for seed in range(seeds):
                job = Estimation(
                    scanner,
                    index,
                    "stratified",
                    parse_tolerance(tolerance),
                    queries,
                    keys_of(open_store(queries)),
                    pairs,
                    Asked(),
                    seed,
                    automatic=True,
                )
                pilot = job.stage(np.arange(q), np.full(q, float(PILOT)), 0, tolerance)
                first = _failed(pilot.log_sum[:, 0] - truth, np.sqrt(pilot.variance[:, 0]))
                sums, facts, _, exact = Stages(job).run(lambda line: None, silent)
                error = sums.log_sum[:, 0] - truth
                # The raw standard error: what the audit added is taken off again.
                ratio = (facts["audit"].get("ratio") or [None])[0]
                gave_up = bool(facts["audit"].get("given_up"))
                widened = max(ratio or 1.0, 1.0) if facts["audit"].get("widened") and not gave_up else 1.0
                failed = _failed(error, np.sqrt(sums.variance[:, 0]) / widened)
                need = needs(np.flatnonzero(exact), h)
                estimated = ~exact
                out.append(
                    {
                        "mu": mu,
                        "h": h,
                        "seed": seed,
                        "pilot_failures": int(first.sum()),
                        "of_these_exact": int((first & exact).sum()),
                        "of_these_estimated_well": int((first & estimated & ~failed).sum()),
                        "failures": int(failed.sum()),
                        "caught": int((failed & exact).sum()),
                        "wrong_answers": int((failed & estimated).sum()),
                        "exact": int(exact.sum()),
                        "need": int(need.sum()),
                        "beyond_need": float((exact & ~need).sum() / max(1, q - need.sum())),
                        "audited": facts["audited"],
                        "audit_ratio": ratio,
                        "given_up": gave_up,
                        "reasons": facts["exact"],
                        "worst": float(np.abs(error[estimated]).max()) if estimated.any() else 0.0,
                        "rms": float(np.sqrt(np.mean(error[estimated] ** 2))) if estimated.any() else 0.0,
                        "rows": float(sums.rows[estimated].mean()) if estimated.any() else 0.0,
                    }
                )
    return {"guard": guarded, "jobs": out}


def guard(
    index: Index,
    queries: NDArray[np.float32],
    h: float,
    truth: NDArray[np.float64],
    tolerance: float,
    seeds: int,
    rows: int = 1000,
) -> dict[str, Any]:
    """One stage of so many rows, its standard errors taken from the draws alone: failures, and how many of
    these, and of all, a job would send to the exact sums, by a flag or for the width of what it reports."""
    keys, budget = keys_of(open_store(queries)), np.full(len(queries), rows, np.uint64)
    counts = dict.fromkeys(
        ("estimates", "failures", "sent_exact", "failures_kept", "wrong_answers", "all_sent"), 0
    )
    for seed in range(seeds):
        found = index.stage(queries, keys, [("gaussian", h)], budget, target=tolerance, seed=seed)
        reported = np.sqrt(found["variance"][:, 0])
        drawn = np.sqrt(np.maximum(found["variance"][:, 0] - found["predicted"][:, 0], 0))
        error = found["log_sum"][:, 0] - truth
        failed = _failed(error, drawn)
        sent = ((found["flags"][:, 0] & DOUBTFUL) > 0) | ~(reported <= 1.5 * SLACK * tolerance)
        counts["estimates"] += len(queries)
        counts["failures"] += int(failed.sum())
        counts["sent_exact"] += int((failed & sent).sum())
        counts["failures_kept"] += int((failed & ~sent).sum())
        # A wrong answer is off by more than three of the standard errors that it is reported with.
        counts["wrong_answers"] += int((_failed(error, reported) & ~sent).sum())
        counts["all_sent"] += int(sent.sum())
    return {"rows": rows, **counts}


def _failed(error: NDArray[np.float64], spread: NDArray[np.float64]) -> NDArray[np.bool_]:
    """|log error| above three standard errors, or no estimate."""
    with np.errstate(invalid="ignore"):
        return ~(np.abs(error) <= 3 * np.maximum(spread, ARITHMETIC / 3))
