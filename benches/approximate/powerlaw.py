"""The open risk: mixtures with power-law cluster scales, 54 dimensions, where one or a few rows decide a sum.

True failures (|log error| above three standard errors) must be sent to exact by flag or audit, and not much
else.
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
from lmd3.density.approximate import DRAW_COST, SLACK, Estimation, keys_of, parse_tolerance
from lmd3.density.scan import Asked, Scanner
from lmd3.index import Index
from lmd3.progress import silent
from lmd3.store import open_store

D, CLUSTERS = 54, 400


def mixture(n: int, seed: int) -> NDArray[np.float32]:
    """Rows of clusters whose scales and sizes follow power laws."""
    shape = np.random.default_rng(5)
    centres = shape.normal(size=(CLUSTERS, D))
    scales = 0.02 * (1 - shape.random(CLUSTERS)) ** -0.8
    share = (1 - shape.random(CLUSTERS)) ** -1.0
    rng = np.random.default_rng(seed)
    which = rng.choice(CLUSTERS, size=n, p=share / share.sum())
    return (centres[which] + scales[which, None] * rng.normal(size=(n, D))).astype(np.float32)


def run(n: int = 100_000, q: int = 1000, tolerance: float = 0.05, seeds: int = 2) -> list[dict[str, Any]]:
    rows, queries = mixture(n, 0), mixture(q, 1)
    store = open_store(rows)
    out = []
    with tempfile.TemporaryDirectory() as folder:
        index = Index.build(store, Path(folder) / "i")
        ids = index.native.ids.astype(np.int64)
        ends = np.concatenate([[0], np.cumsum(index.native.sizes)]).astype(int)
        lists = [ids[a:b] for a, b in pairwise(ends)]
        near = index.native.nearest_lists(queries, index.lists)
        wide, norms = rows.astype(np.float64), (rows.astype(np.float64) ** 2).sum(1)
        for mu in (1e-3, 1e-4, 1e-5):
            kde = KernelDensity(kernel="gaussian", bandwidth=f"mu={mu:g}").fit(store)
            h = kde.resolve(queries)[0].bandwidth
            truth = KernelDensity(kernel="gaussian", bandwidth=h, normalize=False).fit(store).score_samples(
                queries
            ) + np.log(n)
            need = np.zeros(q, bool)
            for i, query in enumerate(queries.astype(np.float64)):
                squared = np.maximum(norms + query @ query - 2 * wide @ query, 0)
                # Relative to the largest, so that nothing underflows.
                k = np.exp(-(squared - squared.min()) / (2 * h * h))
                error = rivals.oracle(
                    k, squared, lists, near[i][near[i] >= 0], int(n / DRAW_COST) + index.lists
                )
                need[i] = error > SLACK * tolerance
            for seed in range(seeds):
                job = Estimation(
                    Scanner(store, None, "auto", None, 2_000_000_000),
                    index,
                    "stratified",
                    parse_tolerance(tolerance),
                    queries,
                    keys_of(open_store(queries)),
                    [("gaussian", h)],
                    Asked(),
                    seed,
                    automatic=True,
                )
                sums, facts, _, exact = job.run(lambda line: None, silent)
                error = np.abs(sums.log_sum[:, 0] - truth)
                # The raw standard error: what the audit added is taken off again.
                ratio = facts["audit"].get("ratio") or [1.0]
                widened = (
                    max(ratio[0] or 1.0, 1.0)
                    if facts["audit"].get("widened") and not facts["audit"].get("given_up")
                    else 1.0
                )
                raw = np.sqrt(sums.variance[:, 0]) / widened
                failed = ~(error <= 3 * np.maximum(raw, 1e-4))
                final = np.where(exact, 0.0, error)
                out.append(
                    {
                        "mu": mu,
                        "h": h,
                        "seed": seed,
                        "failures": int(failed.sum()),
                        "caught": int((failed & exact).sum()),
                        "exact": int(exact.sum()),
                        "need": int(need.sum()),
                        "beyond_need": float((exact & ~need).sum() / max(1, (~need).sum())),
                        "audited": facts["audited"],
                        "audit_ratio": ratio[0],
                        "given_up": facts["audit"].get("given_up"),
                        "reasons": facts["exact"],
                        "final_wrong": int((~exact & ~(error <= 3 * widened * raw)).sum()),
                        "final_worst": float(np.nanmax(final)),
                        "final_rms": float(np.sqrt(np.mean(final[~exact] ** 2))) if (~exact).any() else 0.0,
                    }
                )
    return out
