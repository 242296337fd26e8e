"""Densities under another sampling mixture of the groups, from the densities under each group.

f_π(q) = Σ_g π_g f_g(q), where f_g is the density under group g alone and π the mixture. The result is exact:
f_g is the group's sum over its weight, and the sums are those of the scan.

Where densities have errors (samples, estimates), those of the groups are independent, and the interval is
that of the groups' intervals (Zou and Donner, *Statistics in Medicine* 27, 2008, 1693-1702): with shares p_g
of the density and ends l_g, u_g relative to f_g,

    low = 1 − √Σ (p_g (1 − l_g))²,     high = 1 + √Σ (p_g (u_g − 1))².

A density is flagged as the groups that make a tenth of it are, and where fewer than 30 rows of a sample
count.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lmd3.errors import ColumnError, ParameterError
from lmd3.results import DENSITY, NEIGHBORS, QUERIES, DensityTable

__all__ = ["read_mix", "reweight"]

#: Flags that the groups decide: a mixture may rest on a group of which few rows were drawn.
_OF_GROUPS = ("few_effective_rows", "near_rows_missed")

#: Share of a density above which its groups' flags are its own, and rows that must count in a sample.
_SHARE, _LEAST_EFFECTIVE = 0.1, 30


def read_mix(value: Any, groups: list[str]) -> dict[str, float]:
    """A mixture as JSON gives it, {group: weight}, with weights that add up to 1.

    Raises:
        ParameterError: no object of weights ≥ 0, a group that the result has not, or one that is missing.
    """
    if not isinstance(value, Mapping) or not value:
        raise ParameterError('a mixture is an object of groups and their weights, such as {"web": 0.7}')
    for name, weight in value.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight < 0:
            raise ParameterError(f"the weight of {name!r} is not a finite number ≥ 0: {weight!r}")
    if unknown := [name for name in value if name not in groups]:
        raise ParameterError(
            f"the result has no group {unknown[0]!r}", remedy=f"its groups: {', '.join(groups[:20])}"
        )
    if missing := [name for name in groups if name not in value]:
        raise ParameterError(
            f"the mixture lacks the group {missing[0]!r}", remedy="give every group a weight; 0 leaves it out"
        )
    total = math.fsum(value.values())
    if total <= 0:
        raise ParameterError("all weights of the mixture are 0")
    return {name: weight / total for name, weight in value.items()}


def reweight(table: DensityTable, mix: Mapping[str, float]) -> DensityTable:
    """The densities of a result under another mixture of its groups.

    The rows of the whole corpus (group null) are replaced: log density, its error, the effective sample size
    and the kernel sum, at the corpus's total weight. Those of each group stay. What a mixture changes and
    group densities do not tell is null: the typicality, and the neighbours' shares.

    Args:
        table: with densities by group.
        mix: weight of every group, ≥ 0; only their ratios count.

    Raises:
        ColumnError: the result has no densities by group.
        ParameterError: see `read_mix`.
    """
    density = table.density
    groups = [name for name in pc.unique(density["group"]).to_pylist() if name is not None]
    if not groups:
        raise ColumnError("the result has no densities by group", remedy="run lmd3 density with --by-group")
    shares = read_mix(mix, groups)
    parts: list[pa.Table] = []
    for kernel, bandwidth, rule in dict.fromkeys(
        zip(*(density[name].to_pylist() for name in ("kernel", "bandwidth", "rule")), strict=True)
    ):
        own = density.filter(
            (pc.field("kernel") == kernel) & (pc.field("bandwidth") == bandwidth) & (pc.field("rule") == rule)
        )
        whole = own.filter(pc.field("group").is_null())
        by_group = {name: own.filter(pc.field("group") == name) for name in groups}
        parts += [_mixed(whole, by_group, shares), *by_group.values()]
    queries = _without(table.queries, "typicality", QUERIES)
    neighbors = _without(table.neighbors, "share", NEIGHBORS)
    run = {**table.run, "mix": shares}
    return dataclasses.replace(
        table, density=pa.concat_tables(parts), queries=queries, neighbors=neighbors, run=run
    )


def _mixed(whole: pa.Table, by_group: Mapping[str, pa.Table], shares: Mapping[str, float]) -> pa.Table:
    ids = whole["id"]
    used = [name for name, share in shares.items() if share > 0]
    for name in used:
        if not by_group[name]["id"].equals(ids):
            raise ColumnError(f"the densities under {name!r} are not those of the same queries")
    logs = np.stack([_floats(by_group[name], "log_density") + math.log(shares[name]) for name in used])
    errors = np.stack([_floats(by_group[name], "std_error") for name in used])
    ess = np.stack([_floats(by_group[name], "ess") for name in used])
    log_density, parts = _log_sum(logs)
    with np.errstate(divide="ignore", invalid="ignore"):
        # Σ(w k)² of a group is its sum squared over its effective sample size.
        squares = np.where(parts > 0, parts**2 / ess, 0.0).sum(axis=0)
        effective = np.where(squares > 0, 1.0 / squares, 0.0)
        # Groups are drawn apart, so their errors are independent (first order in each).
        error = np.sqrt(np.where(parts > 0, (parts * errors) ** 2, 0.0).sum(axis=0))
        weight = _floats(whole, "kernel_sum_log") - _floats(whole, "log_density")
        weight = np.where(np.isfinite(weight), weight, np.nan)
        low, high = (
            np.stack([_floats(by_group[name], end) for name in used]) for end in ("ci_low", "ci_high")
        )
        own = logs - np.log([[shares[name]] for name in used])
        down, up = (
            np.sqrt(np.where(parts > 0, (parts * np.expm1(end - own)) ** 2, 0.0).sum(axis=0))
            for end in (low, high)
        )
        kernel_sum = np.where(np.isneginf(log_density), -np.inf, log_density + weight)
    zero = np.isneginf(log_density)
    carried = _carried([by_group[name]["flags"].to_pylist() for name in used], parts)
    carried["few_effective_rows"] |= (error > 0) & (effective < _LEAST_EFFECTIVE)
    flags = [
        _flags(old, [name for name in _OF_GROUPS if carried[name][row]], bool(zero[row]))
        for row, old in enumerate(whole["flags"].to_pylist())
    ]
    columns = {name: whole[name] for name in DENSITY.names} | {
        "log_density": pa.array(log_density),
        "std_error": pa.array(error),
        "ci_low": pa.array(log_density + np.log1p(-np.minimum(down, 1 - 1e-300))),
        "ci_high": pa.array(log_density + np.log1p(up)),
        "kernel_sum_log": pa.array(kernel_sum, mask=np.isnan(kernel_sum)),
        "ess": pa.array(effective),
        "flags": pa.array(flags, pa.string()),
    }
    return pa.table(columns, schema=DENSITY)


def _carried(flags: list[list[str | None]], parts: NDArray[np.float64]) -> dict[str, NDArray[np.bool_]]:
    """Whether each of the groups' flags holds for groups that make a tenth of a density."""
    found = {}
    for name in _OF_GROUPS:
        has = np.array([[name in (flag or "").split(",") for flag in group] for group in flags])
        found[name] = np.where(has, parts, 0.0).sum(axis=0) > _SHARE
    return found


def _flags(old: str | None, carried: list[str], zero: bool) -> str:
    if zero:
        carried = ["zero"]
    dropped = ("", "zero", *_OF_GROUPS)
    kept = [flag for flag in (part.strip() for part in (old or "").split(",")) if flag not in dropped]
    return ",".join([*kept, *carried])


def _floats(table: pa.Table, name: str) -> NDArray[np.float64]:
    values: NDArray[np.float64] = table[name].to_numpy().astype(np.float64)
    return values


def _log_sum(logs: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(Q,) log of the sum of exponentials of (G, Q), and each term's share (G, Q)."""
    top = logs.max(axis=0)
    base = np.where(np.isneginf(top), 0.0, top)
    terms = np.exp(logs - base)
    total = terms.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return base + np.log(total), np.where(total > 0, terms / total, 0.0)


def _without(table: pa.Table, column: str, schema: pa.Schema) -> pa.Table:
    """A table whose column is null."""
    index = schema.get_field_index(column)
    return table.set_column(index, schema.field(index), pa.nulls(table.num_rows, schema.field(index).type))
