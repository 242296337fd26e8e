"""Bandwidths of each query's own: h(q) = c·r_k(q), r_k the distance of the k-th nearest row (`--adaptive`).

A wide kernel where the rows are few, a narrow one where they are many: Breiman, Meisel and Purcell (1977), at
the query (Loftsgaarden and Quesenberry 1965). The kernel sum then hardly differs between queries; what
differs is the volume that it is taken over, h(q)^m for rows that fill m dimensions near the query. So
log density = log mean kernel − m·log(h(q)/h₀), with one m for all queries, the local dimension of the data
(Levina and Bickel 2005; inverses averaged as MacKay and Ghahramani propose), and h₀ the median h(q). With the
dimensions of the vectors (hundreds) the second part would be all there is.

Sums are taken on a grid of bandwidths and interpolated at h(q) in log–log: within 1e-5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lmd3.density.job import Job
from lmd3.density.scan import Asked, Scanner
from lmd3.density.tables import local_dimension
from lmd3.errors import ParameterError
from lmd3.kernels import FUSED
from lmd3.progress import ProgressFactory
from lmd3.results import DENSITY, DensityTable

#: Ratio of neighbouring bandwidths, and how many of them an interpolation takes.
STEP, POINTS = 2.0 ** (1 / 8), 8
#: Bandwidths of one scan.
_AT_ONCE = 16


@dataclass(frozen=True)
class Adaptive:
    """Densities with bandwidths of the queries' own.

    Attributes:
        factor: c.
        neighbors: k of r_k.
        dimension: m; NaN where the distances do not tell it (then the volume is left out).
        bandwidths: (Q,) h(q).
        log_sums: (Q,) log kernel sums.
        ess: (Q,) effective sample sizes.
        log_density: (Q,).
        rows: (Q,) rows evaluated.
    """

    factor: float
    neighbors: int
    dimension: float
    bandwidths: NDArray[np.float64]
    log_sums: NDArray[np.float64]
    ess: NDArray[np.float64]
    log_density: NDArray[np.float64]
    rows: NDArray[np.int64]

    @property
    def rule(self) -> str:
        """As the tables name it."""
        return f"adaptive={self.factor:g}"

    def facts(self) -> dict[str, Any]:
        """As in `run.json`."""
        low, middle, high = (float(v) for v in np.quantile(self.bandwidths, [0.0, 0.5, 1.0]))
        return {
            "factor": self.factor,
            "neighbors": self.neighbors,
            "dimension": None if np.isnan(self.dimension) else self.dimension,
            "bandwidth": middle,
            "smallest": low,
            "largest": high,
        }


def check_factor(factor: float, kernels: Sequence[str]) -> None:
    """Refuses what no densities can be made with.

    Raises:
        ParameterError: a factor that is not positive; a kernel whose sums do not interpolate.
    """
    if not (np.isfinite(factor) and factor > 0):
        raise ParameterError(f"adaptive={factor:g}: the factor of r_k is a positive number")
    for kernel in kernels:
        if kernel not in FUSED:
            raise ParameterError(
                f"no adaptive bandwidth for kernel {kernel}", remedy=f"choose one of {', '.join(FUSED)}"
            )


def adaptive(
    scanner: Scanner,
    queries: NDArray[np.float32],
    kernel: str,
    factor: float,
    distances: NDArray[np.float64],
    own: NDArray[np.int64] | None,
    exclude_within: float,
    progress: ProgressFactory,
) -> Adaptive:
    """Densities at h(q) = factor × the last of the query's nearest distances.

    Args:
        scanner: of the rows.
        queries: (Q, d).
        kernel: "exponential" or "gaussian".
        factor: c.
        distances: (Q, k) of the nearest rows, ascending, those left out not among them.
        own: (Q,) rows to leave out, or None.
        exclude_within: leave out rows nearer than this.
        progress: shows the pairs.

    Raises:
        ParameterError: k copies of a query: its r_k is 0.
    """
    last = distances[:, -1]
    bad = np.flatnonzero(~(np.isfinite(last) & (last > 1e-6)))
    if len(bad):
        raise ParameterError(
            f"adaptive={factor:g}: {len(bad)} queries have {distances.shape[1]} rows at no distance "
            f"(the first is query {bad[0]})",
            row=int(bad[0]),
            remedy="leave copies out (--exclude-within), or take more neighbours (--neighbors)",
        )
    local = local_dimension(distances)
    local = local[np.isfinite(local)]
    dimension = float(1.0 / np.mean(1.0 / local)) if len(local) else float("nan")
    h = factor * last
    u = np.log(h) / np.log(STEP)
    first = np.floor(u).astype(np.int64) - (POINTS // 2 - 1)
    sums, ess = np.full(len(h), np.nan), np.full(len(h), np.nan)
    density, rows = np.full(len(h), np.nan), np.zeros(len(h), dtype=np.int64)
    # Queries of neighbouring cells share a scan: their grids overlap.
    width = _AT_ONCE - POINTS + 1
    for start in range(int(first.min()), int(first.max()) + 1, width):
        at = np.flatnonzero((first >= start) & (first < start + width))
        if not len(at):
            continue
        steps = np.arange(start, int(first[at].max()) + POINTS)
        asked = Asked(own=None if own is None else own[at], exclude_within=exclude_within)
        pairs = [(kernel, float(STEP**s)) for s in steps]
        scan = scanner.scan(np.ascontiguousarray(queries[at]), pairs, asked, progress, "adaptive")
        chosen = (first[at] - start)[:, None] + np.arange(POINTS)[None]
        weights = _lagrange(u[at] - first[at])
        part = np.arange(len(at))[:, None]
        sums[at] = (weights * scan.total.log_sum[part, chosen]).sum(axis=1)
        ess[at] = np.exp((weights * np.log(scan.total.ess[part, chosen])).sum(axis=1))
        density[at] = (weights * scan.total.log_density[part, chosen]).sum(axis=1)
        rows[at] = scan.total.rows - scan.total.excluded.astype(np.int64)
    if np.isfinite(dimension):
        density = density - dimension * np.log(h / np.median(h))
    return Adaptive(factor, distances.shape[1], dimension, h, sums, ess, density, rows)


def _lagrange(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """(Q, POINTS) weights of values at 0 … POINTS − 1 for the polynomial through them at x (Q,)."""
    nodes = np.arange(POINTS, dtype=np.float64)
    weights = np.ones((len(x), POINTS))
    for i in range(POINTS):
        for j in range(POINTS):
            if i != j:
                weights[:, i] *= (x - nodes[j]) / (nodes[i] - nodes[j])
    return weights


def rows_of(found: Adaptive, kernel: str, ids: Sequence[str], precision: str) -> pa.Table:
    """The rows of `density.parquet`; their `bandwidth` is the median of h(q) = c·kth_distance."""
    q = len(ids)
    return pa.table(
        {
            "id": pa.array(ids, pa.string()),
            "kernel": pa.repeat(kernel, q),
            "bandwidth": pa.repeat(float(np.median(found.bandwidths)), q),
            "rule": pa.repeat(found.rule, q),
            "group": pa.nulls(q, pa.string()),
            "log_density": found.log_density,
            "std_error": np.zeros(q),
            "ci_low": found.log_density,
            "ci_high": found.log_density,
            "kernel_sum_log": found.log_sums,
            "ess": found.ess,
            "rows_evaluated": found.rows,
            "method": pa.repeat("exact", q),
            "precision": pa.repeat(precision, q),
            "flags": pa.array([""] * q, pa.string()),
        },
        schema=DENSITY,
    )


def beside(
    table: DensityTable,
    job: Job,
    kernels: Sequence[str],
    factor: float,
    distances: NDArray[np.float64],
    progress: ProgressFactory,
) -> DensityTable:
    """The table of a job with the rows of adaptive bandwidths behind the others.

    Args:
        table: of the job.
        job: its rows, queries, and what is left out.
        kernels: each gets its rows.
        factor: c.
        distances: (Q, k) of the nearest rows, ascending.
        progress: shows the pairs.

    Raises:
        ParameterError: k copies of a query.
    """
    parts, facts = [table.density], []
    ids = table.queries["id"].to_pylist()
    for kernel in kernels:
        own, within = job.asked.own, job.asked.exclude_within
        found = adaptive(job.scanner, job.queries, kernel, factor, distances, own, within, progress)
        parts.append(rows_of(found, kernel, ids, job.scanner.arithmetic))
        facts.append({"kernel": kernel, **found.facts()})
    run = table.run | {"adaptive": facts}
    return DensityTable(pa.concat_tables(parts), table.queries, table.neighbors, run)
