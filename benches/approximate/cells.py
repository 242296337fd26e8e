"""Error, bias and coverage at equal rows: our estimator, an oracle of it, and the rivals, cell by cell."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from benches.approximate import rivals
from numpy.typing import NDArray
from scipy import stats

from lmd3.density import audit
from lmd3.density.stages import DOUBTFUL
from lmd3.index import Index, draw_keys, sample_rows
from lmd3.store import Store

#: Bounds of the root mean square error of the shared study (default regime: 2 × its oracle).
HELD_TO = {
    ("gsm", "ess=100", 2000): 0.036,
    ("gsm", "ess=1000", 2000): 0.024,
    ("gsm", "ess=10000", 2000): 0.010,
    ("gsm", "ess=100", 10000): 0.004,
    ("gsm", "ess=1000", 10000): 0.003,
    ("gsm", "ess=10000", 10000): 0.002,
    ("held out", "ess=100", 2000): 0.09,
    ("held out", "ess=1000", 2000): 0.056,
    ("held out", "ess=10000", 2000): 0.028,
    ("held out", "ess=100", 10000): 0.02,
    ("held out", "ess=1000", 10000): 0.016,
    ("held out", "ess=10000", 10000): 0.010,
}


class Cell:
    """One query set under one kernel, with the truth in float64."""

    def __init__(
        self,
        store: Store,
        index: Index,
        name: str,
        queries: NDArray[np.float32],
        own: NDArray[np.int64] | None,
        kernel: str,
        h: float,
    ) -> None:
        self.store, self.index, self.name = store, index, name
        self.queries, self.own, self.kernel, self.h = queries, own, kernel, h
        ids = index.native.ids.astype(np.int64)
        ends = np.concatenate([[0], np.cumsum(index.native.sizes)]).astype(int)
        self.lists = [ids[a:b] for a, b in pairwise(ends)]
        rows = store.rows(np.arange(store.n)).astype(np.float64)
        norms = (rows**2).sum(1)
        self.squared = np.empty((len(queries), store.n))
        for i, q in enumerate(queries.astype(np.float64)):
            self.squared[i] = np.maximum(norms + q @ q - 2 * rows @ q, 0)
            near = np.flatnonzero(self.squared[i] < 1e-3)
            self.squared[i, near] = ((rows[near] - q) ** 2).sum(1)
        distance = np.sqrt(self.squared)
        self.k = np.exp(-distance / h if kernel == "exponential" else -self.squared / (2 * h * h))
        if own is not None:
            self.k[np.arange(len(own)), own] = 0
        self.z = self.k.sum(1)
        self.ess = float(np.median(self.z**2 / (self.k**2).sum(1)))

    def ours(self, rows: int, seeds: int) -> dict[str, Any]:
        q = len(self.queries)
        keys = draw_keys([f"{self.name} {i}" for i in range(q)])
        budget = np.full(q, rows - self.index.lists, np.uint64)
        found = [
            self.index.stage(self.queries, keys, [(self.kernel, self.h)], budget, own=self.own, seed=seed)
            for seed in range(seeds)
        ]
        z, variance, df, flags = (
            np.array([f[name][..., 0] for f in found]) for name in ("log_sum", "variance", "df", "flags")
        )
        relative = np.exp(z) / self.z - 1
        width = stats.t.ppf(0.975, df) * np.sqrt(variance)
        # The intervals that results carry are those of the log density.
        with np.errstate(invalid="ignore", divide="ignore"):
            covered = np.abs(z - np.log(self.z)) <= width
        after = [self._audited(z[s], variance[s], df[s], flags[s], s) for s in range(seeds)]
        # Marks of the model send nothing to the exact sums.
        unflagged = (flags & 3) == 0
        spread = np.sqrt((relative.var(axis=0, ddof=1) / seeds).sum()) / q
        return {
            **_errors(relative),
            "rows": float(np.mean([f["rows"].mean() for f in found]) + self.index.lists),
            "bias_z": float(relative.mean() / spread),
            "coverage": float(covered.mean()),
            "coverage_in_a_job": _coverage(after),
            "given_up": float(np.mean([part is None for part in after])),
            "coverage_unflagged": float(covered[unflagged].mean()) if unflagged.any() else None,
            "flagged": float(1 - unflagged.mean()),
            "rms_z": float(np.sqrt(np.mean(((z - np.log(self.z)) ** 2 / variance)[np.isfinite(z)]))),
            "se": float(np.median(np.sqrt(variance))),
        }

    def _audited(
        self,
        z: NDArray[np.float64],
        variance: NDArray[np.float64],
        df: NDArray[np.float64],
        flags: NDArray[np.uint32],
        seed: int,
    ) -> NDArray[np.bool_] | None:
        """Which intervals cover the truth as a job reports them: of queries that neither the audit nor a flag
        sends to the exact sums. None where the audit gives the estimates up."""
        error = z - np.log(self.z)
        chosen = audit.audited(len(z), seed)
        doubtful = (flags & DOUBTFUL) > 0
        judged = chosen & ~doubtful & np.isfinite(error)
        ratio = float(np.sqrt(np.mean(error[judged] ** 2 / variance[judged])))
        if ratio > audit.GIVE_UP:
            return None
        width = stats.t.ppf(0.975, df) * np.sqrt(variance) * (ratio if ratio > audit.WIDEN else 1.0)
        covered: NDArray[np.bool_] = (np.abs(error) <= width)[~chosen & ~doubtful]
        return covered

    def oracle(self, rows: int) -> dict[str, dict[str, Any]]:
        """What the estimator could do at best."""
        near = self.index.native.nearest_lists(self.queries, self.index.lists)
        found = np.array(
            [
                rivals.oracle(self.k[i], self.squared[i], self.lists, near[i][near[i] >= 0], rows)
                for i in range(len(self.queries))
            ]
        )
        return {
            "oracle": {
                "rms": float(np.sqrt((found**2).mean())),
                "median": float(np.median(found)),
                "p90": float(np.quantile(found, 0.9)),
            }
        }

    def rivals(self, rows: int, seeds: int) -> dict[str, dict[str, Any]]:
        q, n = len(self.queries), self.store.n
        order = np.random.default_rng(17).permutation(n)
        near = self.index.native.nearest_lists(self.queries, self.index.lists)
        found: dict[str, NDArray[np.float64]] = {
            name: np.empty((seeds, q)) for name in ("RS", "RS permuted", "RS+CV", "levels")
        }
        deann: dict[int, NDArray[np.float64]] = {}
        truncated = np.empty((1, q))
        for i in range(q):
            k, squared, lists = self.k[i], self.squared[i], near[i][near[i] >= 0]
            truncated[0, i] = np.sort(k)[-rows:].sum()
            for seed in range(seeds):
                rng = np.random.default_rng([seed, i])
                found["RS"][seed, i] = rivals.sampling(k, rows, rng)
                found["RS permuted"][seed, i] = rivals.permuted(k, order, rows, rng)
                found["RS+CV"][seed, i] = rivals.with_variate(k, squared, rows, rng)
                found["levels"][seed, i] = rivals.levels(k, squared, rows, rng)
                for count, members, left in rivals.deann_parameters(self.lists, lists, rows):
                    deann.setdefault(count, np.full((seeds, q), np.nan))[seed, i] = rivals.deann(
                        k, members, left, rng
                    )
        out = {name: _errors(z / self.z - 1) for name, z in found.items()}
        out["kNN"] = _errors(truncated / self.z - 1)
        tried = {count: _errors(z / self.z - 1) for count, z in deann.items() if np.isfinite(z).all()}
        if tried:
            best = min(tried, key=lambda count: tried[count]["rms"])
            out["DEANN best"] = {**tried[best], "lists": best}
        return {**out, **self.oracle(rows)}


def _coverage(parts: list[NDArray[np.bool_] | None]) -> float | None:
    """The mean over all parts; None where there is none."""
    kept = [part for part in parts if part is not None]
    return float(np.concatenate(kept).mean()) if kept else None


def _errors(relative: NDArray[np.float64]) -> dict[str, float]:
    """RMS over everything, and over the queries the median and 90th percentile of the RMS over seeds."""
    per_query = np.sqrt((relative**2).mean(axis=0))
    return {
        "rms": float(np.sqrt((relative**2).mean())),
        "median": float(np.median(per_query)),
        "p90": float(np.quantile(per_query, 0.9)),
        "p99": float(np.quantile(np.abs(relative), 0.99)),
    }


def check_sampling(cell: Cell, rows: int, seeds: int) -> tuple[float, float]:
    """Our own RS+CV against the simulated one: the two errors must be alike."""
    q = len(cell.queries)
    keys = draw_keys([f"{cell.name} {i}" for i in range(q)])
    moments = (cell.index.mean, float(cell.index.manifest["sq_norm"]))
    z = [
        sample_rows(
            cell.store, cell.queries, keys, [(cell.kernel, cell.h)], rows, moments=moments, seed=seed
        )["log_sum"][:, 0]
        for seed in range(seeds)
    ]
    ours = np.exp(np.array(z)) / cell.z - 1
    theirs = np.array(
        [
            [
                rivals.with_variate(cell.k[i], cell.squared[i], rows, np.random.default_rng([seed, i]))
                for i in range(q)
            ]
            for seed in range(seeds)
        ]
    )
    return _errors(ours)["rms"], _errors(theirs / cell.z - 1)["rms"]
