"""Whole jobs on queries that chose no constant: how often the intervals that are reported cover the truth.

Cells look at single stages of so many rows; what a user sees has been through pilot, top-up, flags and audit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lmd3.density.estimation import Estimation
from lmd3.density.methods import parse_tolerance
from lmd3.density.scan import Asked, Scanner
from lmd3.density.stages import Stages
from lmd3.index import Index, draw_keys
from lmd3.progress import silent
from lmd3.store import Store

TOLERANCES = ("0.05", "0.01", "reliability=0.99")

#: Bandwidths of about these ess for either set of queries.
BANDWIDTHS = {
    "gsm": {100: 0.0450, 1000: 0.0648, 10_000: 0.1037},
    "held out": {100: 0.0431, 1000: 0.0552, 10_000: 0.0736},
}


def run(
    store: Store,
    index: Index,
    sets: dict[str, tuple[NDArray[np.float32], NDArray[np.int64] | None]],
    seeds: int,
) -> list[dict[str, Any]]:
    """A row per set of queries, bandwidth and tolerance. Queries scored exactly (the audited among them)
    count for nothing, nor do jobs whose estimates were given up."""
    scanner = Scanner(store, None, "float32", None, 2_000_000_000)
    out = []
    for name, (queries, own) in sets.items():
        keys = draw_keys([f"{name} {i}" for i in range(len(queries))])
        for ess, h in BANDWIDTHS[name].items():
            truth = scanner.scan(queries, [("exponential", h)], Asked(own=own)).total.log_sum[:, 0]
            for tolerance in TOLERANCES:
                jobs = []
                for seed in range(seeds):
                    job = Estimation(
                        scanner,
                        index,
                        "stratified",
                        parse_tolerance(tolerance),
                        queries,
                        keys,
                        [("exponential", h)],
                        Asked(own=own),
                        seed,
                    )
                    sums, facts, _, exact = Stages(job).run(lambda line: None, silent)
                    if not facts["audit"]["given_up"]:
                        jobs.append(_judged(sums, truth, ~exact) | {"audit": facts["audit"]["ratio"][0]})
                found = {key: float(np.mean([job[key] for job in jobs])) for key in jobs[0]} if jobs else {}
                out.append(
                    {
                        "queries": name,
                        "ess": ess,
                        "h": h,
                        "tolerance": tolerance,
                        **found,
                        "jobs": seeds,
                        "given_up": seeds - len(jobs),
                    }
                )
                print(out[-1], flush=True)
    return out


def _judged(sums: Any, truth: NDArray[np.float64], estimated: NDArray[np.bool_]) -> dict[str, float]:
    """Coverage of the intervals of 95 %, errors, standard errors and rows of the estimated queries."""
    error = (sums.log_sum[:, 0] - truth)[estimated]
    spread, df = np.sqrt(sums.variance[estimated, 0]), sums.df[estimated, 0]
    t = stats.t.ppf(0.975, np.where(np.isfinite(df), df, 1e9))
    return {
        "coverage": float((np.abs(error) <= t * spread).mean()),
        "rms": float(np.sqrt((error**2).mean())),
        "std_error": float(np.sqrt((spread**2).mean())),
        "rows": float(sums.rows[estimated].mean()),
        "exact": float(1 - estimated.mean()),
    }
