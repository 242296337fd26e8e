"""Exact changes of density from sums: those of the base, and the kernels of every text that may be added."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lmd3.analysis.assignment import Exposure
from lmd3.experiment_files import CHANGES
from lmd3.experiments.leak_plan import Plan
from lmd3.kernels import log_kernel
from lmd3.results import read_json, write_json

Floats = NDArray[np.float64]
Vectors = NDArray[np.float32]

#: Pairs whose kernels are taken at once.
_PAIRS = 1 << 20


def log_kernels(kernel: str, bandwidth: float, queries: Vectors, rows: Vectors) -> Floats:
    """(q, r) log kernels of all pairs, in float64; distances of near pairs by differences."""
    left, right = queries.astype(np.float64), rows.astype(np.float64)
    out = np.empty((len(left), len(right)))
    norms = np.einsum("ij,ij->i", right, right)
    step = max(1, _PAIRS // max(1, len(right)))
    for start in range(0, len(left), step):
        part = left[start : start + step]
        square = np.einsum("ij,ij->i", part, part)[:, None] + norms - 2.0 * (part @ right.T)
        near = np.argwhere(square < 1e-4)
        difference = part[near[:, 0]] - right[near[:, 1]]
        square[near[:, 0], near[:, 1]] = np.einsum("ij,ij->i", difference, difference)
        distance = np.sqrt(np.maximum(square, 0.0))
        if kernel in ("exponential", "gaussian"):
            nothing = np.empty((0, left.shape[1]))
            out[start : start + step] = log_kernel(kernel, bandwidth, distance, nothing, nothing)
            continue
        for row in range(len(part)):
            repeated = np.broadcast_to(part[row], right.shape)
            out[start + row] = log_kernel(kernel, bandwidth, distance[row], right, repeated)
    return out


def log_sum(kernels: Floats, copies: NDArray[np.int64]) -> Floats:
    """(q,) log of the weighted sum of kernels (q, r)."""
    with np.errstate(divide="ignore"):
        weighted = kernels + np.log(copies.astype(np.float64))
    top = weighted.max(axis=1, initial=-np.inf)
    safe = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(np.exp(weighted - safe[:, None]).sum(axis=1)) + safe)


def base_sums(bandwidths: Sequence[Any], items: Vectors, base: Vectors) -> Floats:
    """(n, B) log kernel sums of items under the base, in double precision, in bounded memory."""
    out = np.empty((len(items), len(bandwidths)))
    step = max(1, 4 * _PAIRS // max(1, len(base)))
    ones = np.ones(len(base), dtype=np.int64)
    for start in range(0, len(items), step):
        part = slice(start, start + step)
        for number, entry in enumerate(bandwidths):
            out[part, number] = log_sum(log_kernels(entry.kernel, entry.bandwidth, items[part], base), ones)
    return out


def exposures(
    bandwidths: Sequence[Any], base: Floats, plan: Plan, items: Vectors, rows: Vectors, placebos: Vectors
) -> list[Exposure]:
    """The exposure of the items, for every bandwidth.

    Args:
        bandwidths: B of them, with `kernel` and `bandwidth`.
        base: (n, B) log kernel sums under the base texts.
        plan: what is leaked.
        items: (n, d).
        rows: (V, d) of the rows of the plan.
        placebos: (P, d) of all placebo texts.
    """
    out = []
    copies = plan.copies[plan.slots]
    for number, entry in enumerate(bandwidths):
        sums = base[:, number]
        kernels = log_kernels(entry.kernel, entry.bandwidth, items, rows)
        control: list[Floats] = []
        for arm, chosen in enumerate(plan.placebos):
            same = [other for other in range(arm) if plan.placebos[other] is chosen]
            if same:
                control.append(control[same[0]])
                continue
            placebo = log_sum(log_kernels(entry.kernel, entry.bandwidth, items, placebos[chosen]), copies)
            control.append(np.logaddexp(sums, placebo))
        out.append(Exposure(sums, np.array(control), kernels))
    return out


def save_exposures(folder: Path, found: Sequence[Exposure], bandwidths: Sequence[Any]) -> None:
    """Writes exposures as `.npy` files, the list of bandwidths last."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, exposure in enumerate(found):
        for name in ("base", "control", "kernel"):
            np.save(folder / f"{name}-{number}.npy", getattr(exposure, name))
    write_json(folder / "bandwidths.json", [entry.to_dict() for entry in bandwidths])


def load_exposures(folder: Path) -> tuple[list[Exposure], list[dict[str, Any]]]:
    """What `save_exposures` wrote."""
    entries: list[dict[str, Any]] = read_json(folder / "bandwidths.json")
    found = [
        Exposure(
            *(
                np.load(folder / f"{name}-{number}.npy", allow_pickle=False)
                for name in ("base", "control", "kernel")
            )
        )
        for number in range(len(entries))
    ]
    return found, entries


def changes_table(
    ids: Sequence[str],
    found: Sequence[Exposure],
    entries: Sequence[dict[str, Any]],
    plan: Plan,
    base_rows: int,
) -> pa.Table:
    """`CHANGES`: what the assignment did to the density of every item."""
    n = len(ids)
    items = np.arange(n)
    parts = []
    for exposure, entry in zip(found, entries, strict=True):
        sums = exposure.log_sums(plan.copies)
        control = exposure.control.mean(axis=0)
        own = exposure.own(plan.variants, plan.copies, items)
        after = np.log(base_rows + plan.added)
        columns = {
            "id": list(ids),
            "kernel": [entry["kernel"]] * n,
            "bandwidth": [entry["bandwidth"]] * n,
            "rule": [entry["rule"]] * n,
            "log_density_base": exposure.base - np.log(base_rows),
            "log_density_control": control - after,
            "log_density_treatment": sums - after,
            "delta": sums - control,
            "own": own,
            "others": sums - control - own,
            "delta_base": sums - after - exposure.base + np.log(base_rows),
        }
        parts.append(pa.table(columns, schema=CHANGES))
    return pa.concat_tables(parts)
