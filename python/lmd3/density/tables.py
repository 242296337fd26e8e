"""From the sums of a scan to the columns of the tables (see `lmd3.results`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lmd3.bandwidth import Bandwidth
from lmd3.density.approximate import Approximation, Guesses
from lmd3.density.design_error import DesignError, Doubt, design_of
from lmd3.density.groups import group_name
from lmd3.density.job import Job
from lmd3.density.scan import Estimate, Scan, Scanner, version
from lmd3.density.sides import describe
from lmd3.kernels import FUSED, log_kernel, log_normalizer
from lmd3.results import DENSITY, NEIGHBORS, QUERIES, DensityTable

#: Rows (or names) handled at once where all would take too much memory.
_STEP = 1 << 16


class Tables:
    """Turns a scan into tables.

    Args:
        scanner: what was scanned.
        bandwidths: as in the scan, the primary one first.
        ids: of the queries.
        matrix: their vectors.
        scan: the sums.
        precision: what the sums were computed with [the scanner's].
    """

    def __init__(
        self,
        scanner: Scanner,
        bandwidths: Sequence[Bandwidth],
        ids: Sequence[str],
        matrix: NDArray[np.float32],
        scan: Scan | Approximation,
        precision: str | None = None,
    ) -> None:
        self.precision = precision or scanner.arithmetic
        self.scanner = scanner
        self.bandwidths = bandwidths
        self.corpus = scanner.store
        self.scan = scan
        self.ids = ids
        self.matrix = matrix
        self.norms = _by_steps(lambda rows: np.linalg.norm(rows, axis=1), matrix)
        self.rows = scan.neighbor_rows
        self.distances = scan.neighbor_distances

    def all(self, neighbors: int, by_group: bool, normalize: bool) -> DensityTable:
        """The three tables, with an empty run."""
        return DensityTable(self.density(by_group, normalize), self.queries(), self.neighbors(neighbors), {})

    def density(self, by_group: bool, normalize: bool) -> pa.Table:
        """The table of densities; `normalize` subtracts the kernel's constant of ℝᵈ."""
        found: dict[int, Any] = dict(self.scan.groups) if by_group else {}
        parts: list[tuple[int | None, Estimate | Guesses]] = [(None, self.scan.total), *sorted(found.items())]
        # Estimates are made of whole stores only, so they never meet a design.
        design = design_of(self.corpus)
        doubts = None
        if design is not None and not isinstance(self.scan, Approximation):
            nearest = self._weights(np.maximum(self.rows[:, 0], 0))
            doubts = DesignError(design, self.scan, self.corpus.groups, nearest)
        tables = []
        for b, bandwidth in enumerate(self.bandwidths):
            constant = (
                log_normalizer(bandwidth.kernel, self.corpus.d, bandwidth.bandwidth) if normalize else 0.0
            )
            for code, estimate in parts:
                q = len(self.ids)
                group = None if code is None else group_name(self.corpus, code)
                log_density = estimate.log_density[:, b] - constant
                doubt = Doubt.none(q)
                if doubts is not None:
                    doubt = doubts.of(bandwidth.kernel, bandwidth.bandwidth, b, code)
                columns = {
                    "id": pa.array(self.ids, pa.string()),
                    "kernel": _constant(bandwidth.kernel, q),
                    "bandwidth": _constant(bandwidth.bandwidth, q),
                    "rule": _constant(bandwidth.rule, q),
                    "group": pa.array([group] * q, pa.string()),
                    "log_density": _present(log_density),
                    **_doubt(estimate, b, log_density, constant, doubt),
                    "kernel_sum_log": _present(estimate.log_sum[:, b]),
                    "ess": _present(estimate.ess[:, b]),
                    "precision": _constant(self.precision if bandwidth.kernel in FUSED else "float64", q),
                }
                tables.append(pa.table(columns, schema=DENSITY))
        return pa.concat_tables(tables)

    def queries(self) -> pa.Table:
        """What does not depend on the bandwidth."""
        mean = self.scan.row_sum
        mean_norm = float(np.linalg.norm(mean))
        with np.errstate(divide="ignore", invalid="ignore"):
            # einsum: the same bytes for any number of threads, unlike a matrix product.
            dots = _by_steps(lambda rows: np.einsum("ij,j->i", rows, mean), self.matrix)
            typicality = dots / (self.norms * mean_norm)
            max_cosine = np.minimum(self.scan.max_projection.astype(np.float64) / self.norms, 1.0)
        nearest = self.rows[:, 0]
        columns = {
            "id": pa.array(self.ids, pa.string()),
            "max_cosine": _nullable(max_cosine),
            "typicality": _nullable(typicality),
            "nearest_id": self._names(nearest),
            "nearest_distance": _nullable(self.distances[:, 0]),
            "kth_distance": _nullable(self.distances[:, -1]),
            "local_dimension": _nullable(local_dimension(self.distances)),
            "duplicates": self.scan.duplicates.astype(np.int64),
            "excluded": self.scan.total.excluded.astype(np.int64),
        }
        return pa.table(columns, schema=QUERIES)

    def neighbors(self, k: int) -> pa.Table:
        """The k nearest rows of each query."""
        k = min(k, self.rows.shape[1])
        rows, distances = self.rows[:, :k], self.distances[:, :k]
        present = rows >= 0
        flat, query = rows[present], np.repeat(np.arange(len(rows)), k).reshape(rows.shape)[present]
        cosine, exponent = np.empty(len(flat)), np.empty(len(flat))
        primary = self.bandwidths[0]
        for start in range(0, len(flat), 1 << 14):
            part = slice(start, start + (1 << 14))
            vectors = self.corpus.rows(flat[part]).astype(np.float64)
            own = self.matrix[query[part]].astype(np.float64)
            exponent[part] = log_kernel(
                primary.kernel, primary.bandwidth, distances[present][part], vectors, own
            )
            with np.errstate(divide="ignore", invalid="ignore"):
                dots = np.einsum("ij,ij->i", vectors, own)
                cosine[part] = dots / (np.linalg.norm(vectors, axis=1) * self.norms[query[part]])
        with np.errstate(invalid="ignore"):
            # NaN, so null, where the density is zero.
            share = self._weights(flat) * np.exp(exponent - self.scan.total.log_sum[query, 0])
        rank = np.tile(np.arange(1, k + 1, dtype=np.int32), (len(rows), 1))[present]
        columns = {
            "id": pa.array(self.ids, pa.string()).take(pa.array(query)),
            "rank": rank,
            "neighbor_id": self._names(flat),
            "neighbor_group": self._groups(flat),
            "distance": distances[present],
            "cosine": _nullable(cosine),
            "share": _nullable(share),
        }
        return pa.table(columns, schema=NEIGHBORS)

    def _names(self, rows: NDArray[np.int64]) -> pa.Array:
        """Ids of rows, null where the row is −1."""
        chunks = []
        for start in range(0, max(1, len(rows)), _STEP):  # lists of strings are large
            part = rows[start : start + _STEP]
            present = np.flatnonzero(part >= 0)
            names: list[str | None] = [None] * len(part)
            for at, name in zip(present, self.corpus.ids(part[present]), strict=True):
                names[at] = name
            chunks.append(pa.array(names, pa.string()))
        return pa.concat_arrays(chunks)

    def _groups(self, rows: NDArray[np.int64]) -> pa.Array:
        codes = self.corpus.group_codes()
        if codes is None or not self.corpus.groups:
            return pa.nulls(len(rows), pa.string())
        return pa.array(self.corpus.groups, pa.string()).take(pa.array(codes[rows]))

    def _weights(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        given = self.scanner.weights
        weights = self.corpus.weights() if given is None else given
        return np.ones(len(rows)) if weights is None else weights[rows].astype(np.float64)


def table_of(
    job: Job,
    bandwidths: Sequence[Bandwidth],
    ids: Sequence[str],
    queries: Mapping[str, Any],
    scan: Scan | Approximation,
    settings: Mapping[str, Any],
    notices: Sequence[str],
    precision: str | None = None,
) -> DensityTable:
    """The tables of a job with their run, to which settings and seconds are to be added.

    Args:
        job: the job.
        bandwidths: the primary one first.
        ids: of the queries.
        queries: described.
        scan: the job's result.
        settings: how many `neighbors`, whether `by_group` and to `normalize`.
        notices: what should be known about the bandwidths.
        precision: what the sums were computed with [the scanner's].
    """
    builder = Tables(job.scanner, bandwidths, ids, job.queries, scan, precision)
    table = builder.all(settings["neighbors"], settings["by_group"], settings["normalize"])
    table.run.update(_run_of(job, bandwidths, queries, scan, table, notices))
    return table


def _run_of(
    job: Job,
    bandwidths: Sequence[Bandwidth],
    queries: Mapping[str, Any],
    scan: Scan | Approximation,
    table: DensityTable,
    notices: Sequence[str],
) -> dict[str, Any]:
    """What `run.json` says of a job; settings and seconds are to be added.

    Args:
        job: the job.
        bandwidths: the primary one first.
        queries: described.
        scan: its result.
        table: its tables.
        notices: what should be known about the bandwidths.
    """
    kernels = list(dict.fromkeys(entry.kernel for entry in bandwidths))
    return {
        "kind": "density",
        "version": version(),
        "kernels": kernels,
        "bandwidths": [entry.to_dict() for entry in bandwidths],
        "store": describe(job.scanner.store),
        "queries": dict(queries),
        "method": "exact",
        "precision": job.scanner.arithmetic,
        "simd": scan.level,
        "notices": list(notices),
        "rows": scan.rows,
        "zero_densities": int(np.isneginf(table.density["log_density"].to_numpy()).sum()),
    }


def _present(values: NDArray[np.float64]) -> pa.Array:
    """Floats with null for what was not estimated; a density of zero is −inf."""
    return pa.array(values, mask=np.isnan(values))


def _doubt(
    estimate: Estimate | Guesses, b: int, log_density: NDArray[np.float64], constant: float, doubt: Doubt
) -> dict[str, Any]:
    """What the table says on how sure a column of densities is, and how it came about; `doubt` is that of
    exact sums over a sampled store."""
    if not isinstance(estimate, Guesses):
        return {
            "std_error": doubt.std_error,
            "ci_low": log_density + doubt.low,
            "ci_high": log_density + doubt.high,
            "rows_evaluated": np.int64(estimate.rows) - estimate.excluded.astype(np.int64),
            "method": _constant("exact", len(log_density)),
            "flags": pa.array(doubt.flags(np.isneginf(log_density)), pa.string()),
        }
    return {
        "std_error": _present(estimate.std_error[:, b]),
        "ci_low": _present(estimate.ci_low[:, b] - constant),
        "ci_high": _present(estimate.ci_high[:, b] - constant),
        "rows_evaluated": estimate.rows,
        "method": pa.array(estimate.methods[:, b].tolist(), pa.string()),
        "flags": pa.array(estimate.flags[:, b].tolist(), pa.string()),
    }


def local_dimension(distances: NDArray[np.float64]) -> NDArray[np.float64]:
    """Local intrinsic dimension by Hill's estimator from the k nearest distances (Q, k), ascending.

    −[mean log(r_i/r_k)]⁻¹ over r_i > 1e-6, i < k; NaN where fewer than two distances remain or all are equal.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(distances > 1e-6, np.log(distances / distances[:, -1:]), np.nan)[:, :-1]
        counts = np.isfinite(ratios).sum(axis=1)
        means = np.nansum(ratios, axis=1) / counts
        return np.where((counts > 0) & (means < 0), -1.0 / means, np.nan)


def _by_steps(
    function: Callable[[NDArray[np.float64]], NDArray[np.float64]], rows: NDArray[np.float32]
) -> NDArray[np.float64]:
    """A value per row, computed in double precision a few rows at a time."""
    steps = [
        function(rows[start : start + _STEP // 8].astype(np.float64))
        for start in range(0, len(rows), _STEP // 8)
    ]
    return np.concatenate(steps) if steps else np.empty(0)


def _constant(value: str | float, n: int) -> pa.Array:
    return pa.repeat(value, n)


def _nullable(values: NDArray[np.float64]) -> pa.Array:
    """Floats with null for what is not finite."""
    return pa.array(values, mask=~np.isfinite(values))
