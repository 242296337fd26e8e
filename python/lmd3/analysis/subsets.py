"""Which part of the training data performance depends on: densities per group of the corpus.

One pass gives the kernel sum of every group at every query; totals, shares and the density without a group
follow exactly from the sums, never as the difference of two estimates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import special, stats

from lmd3 import study_files as _files
from lmd3.analysis.few_clusters import FEW, effective_clusters
from lmd3.analysis.inference import decide, sandwich
from lmd3.analysis.multiplicity import by_fdr
from lmd3.analysis.slope import (
    Data,
    Slope,
    cluster_variance,
    full_covariance,
    heteroskedastic_variance,
    slope,
)
from lmd3.errors import WorkError

#: A group of a smaller mean share than this is not looked at: its shares are all but constant.
LEAST_SHARE = 1e-4
#: Draws of the bootstraps of few clusters.
DRAWS = 1_999
#: Groups looked at, those of the largest mean share.
MOST = 40


@dataclass(frozen=True)
class Sums:
    """Kernel sums by group of the corpus.

    Attributes:
        names: of the G groups.
        log_sums: (n, G) logarithms of kernel sums.
        rows: (G,) rows (or weight) of each group.
    """

    names: list[str]
    log_sums: np.ndarray
    rows: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """(n,) logarithm of the whole kernel sum."""
        return np.asarray(special.logsumexp(self.log_sums, axis=1))

    @property
    def shares(self) -> np.ndarray:
        """(n, G) share of each group in the kernel sum."""
        return np.asarray(np.exp(self.log_sums - self.total[:, None]))

    def without(self, group: int) -> np.ndarray:
        """(n,) log density of the corpus without one group, from the other groups' sums."""
        others = np.delete(np.arange(len(self.names)), group)
        sums = special.logsumexp(self.log_sums[:, others], axis=1)
        return np.asarray(sums - np.log(self.rows[others].sum()))

    @property
    def log_density(self) -> np.ndarray:
        """(n,) log density of the whole corpus."""
        return np.asarray(self.total - np.log(self.rows.sum()))


def sums_of(density: pd.DataFrame, ids: list[str], kernel: str, bandwidth: float) -> Sums | None:
    """The sums of a density table made with `--by-group`; None where it has fewer than two groups."""
    at = (density["kernel"] == kernel) & (density["bandwidth"] == bandwidth) & density["group"].notna()
    rows = density[at]
    names = sorted(rows["group"].unique())
    if len(names) < 2:
        return None
    wide = rows.pivot(index="id", columns="group", values="kernel_sum_log").reindex(ids)[names]
    values = wide.to_numpy(dtype=np.float64)
    if np.isnan(values).any():
        return None
    # log density = log sum − log weight (and the kernel's constant, which is the same for all).
    first = rows.drop_duplicates("group").set_index("group").loc[names]
    weight = first["kernel_sum_log"] - first["log_density"]
    sizes = np.exp(weight.to_numpy(dtype=np.float64))
    if not np.isfinite(sizes).all():
        sizes = first["rows_evaluated"].to_numpy(dtype=np.float64)
    return Sums(list(map(str, names)), values, sizes)


def _test(
    of: Slope, clusters: np.ndarray | None, scale: float = 1.0
) -> tuple[float, float, float, float, float]:
    """(estimate, error, p, low, high): t for least squares, the normal for a logit."""
    variance = heteroskedastic_variance(of) if clusters is None else cluster_variance(of, clusters)
    return _judged(of.estimate * scale, float(np.sqrt(variance)) * scale, of, clusters)


def _judged(
    estimate: float, error: float, of: Slope, clusters: np.ndarray | None
) -> tuple[float, float, float, float, float]:
    if of.data.binary:
        df = np.inf
    else:
        df = float(len(of.x) - of.parameters if clusters is None else int(clusters.max()))
    half = float(stats.t.ppf(0.975, df)) * error
    p = float(2 * stats.t.sf(abs(estimate) / error, df)) if error > 0 else float("nan")
    return estimate, error, p, estimate - half, estimate + half


def few(of: Slope, clusters: np.ndarray) -> bool:
    """Whether a bootstrap must judge this slope."""
    return effective_clusters(of, clusters) < FEW


def _by_rule(
    of: Slope, x: np.ndarray, clusters: np.ndarray, draws: int, seed: int
) -> tuple[float, float, float, float, float]:
    """(estimate, error, p, low, high) by the rule for few clusters, the interval from its critical value."""
    judged = decide(of, x, sandwich(of, clusters), clusters, draws, seed, intervals=False).estimate
    return judged.estimate, judged.std_error, judged.p_value, judged.ci_low, judged.ci_high


def _per_sd(x: np.ndarray) -> np.ndarray | None:
    sd = float(x.std(ddof=1))
    if not sd > 1e-12 * max(1.0, float(np.abs(x).max())):
        return None
    return np.asarray((x - x.mean()) / sd)


def evidence(
    data: Data,
    controls: np.ndarray,
    sums: Sums,
    clusters: np.ndarray | None,
    taken: int = MOST,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The ranked table of groups.

    Joint model: outcome on log total density, the shares of all groups but the largest, and the controls; a
    group's slope says what more of it, at the same total and less of the largest, goes with (the largest has
    no such slope). Per group a second model: outcome on log f₋g (the rest) and the change log f − log f₋g
    that the group makes.

    Args:
        data: the rows.
        controls: (n, k) standardised.
        sums: from `sums_of`, of the same rows.
        clusters: codes, or None.
        taken: groups looked at, at most.
        draws: of the bootstraps that judge a slope where clusters are few.
        seed: of the draws.
    """
    shares = sums.shares
    mean = shares.mean(axis=0)
    order = [int(g) for g in np.argsort(-mean) if mean[g] >= LEAST_SHARE][:taken]
    total = _per_sd(sums.total)
    rows: dict[int, dict[str, Any]] = {
        g: {"subset": sums.names[g], "mean_share": float(mean[g])} for g in order
    }
    facts: dict[str, Any] = {"groups": len(order), "left_out": len(sums.names) - len(order)}
    if total is not None and len(order) >= 2:
        facts["reference"] = sums.names[order[0]]
        columns: dict[int, np.ndarray] = {}
        for g in order[1:]:
            x = _per_sd(shares[:, g])
            if x is not None:
                columns[g] = x
        design = independent(data, [controls, total[:, None]], columns)
        try:
            joint = slope(data, np.column_stack([controls, total, *[columns[g] for g in design]]))
        except (WorkError, np.linalg.LinAlgError):
            joint, facts["joint"] = None, "the joint model does not converge"
        if joint is not None:
            x = np.column_stack([controls, total, *[columns[g] for g in design]])
            covariance = full_covariance(joint, x, clusters, True)
            start = controls.shape[1]
            facts["total_slope"] = float(joint.coefficients[start])
            facts["total_std_error"] = float(np.sqrt(covariance[start, start]))
            for at, g in enumerate(design, start + 1):
                found = _judged(
                    float(joint.coefficients[at]), float(np.sqrt(covariance[at, at])), joint, clusters
                )
                if clusters is not None and few(joint, clusters):
                    # The slope judged is that of the last column.
                    last = np.column_stack([np.delete(x, at, axis=1), x[:, at]])
                    found = _by_rule(slope(data, last), last, clusters, draws, seed)
                rows[g] |= dict(
                    zip(("estimate", "std_error", "p_value", "ci_low", "ci_high"), found, strict=True)
                )
    for g in order:
        rest, change = sums.without(g), sums.log_density - sums.without(g)
        rows[g]["mean_change"] = float(change.mean())
        others, x = _per_sd(rest), _per_sd(change)
        if others is None or x is None:
            continue
        base = np.column_stack([controls, others])
        if not independent(data, [base], {0: x}):
            continue
        try:
            of = slope(data, np.column_stack([base, x]))
            before = slope(data, base).quality
            if clusters is not None and few(of, clusters):
                found = _by_rule(of, np.column_stack([base, x]), clusters, draws, seed)
            else:
                found = _test(of, clusters)
        except (WorkError, np.linalg.LinAlgError):
            continue
        keys = ("estimate", "std_error", "p_value", "ci_low", "ci_high")
        rows[g] |= {f"change_{k}": v for k, v in zip(keys, found, strict=True)}
        rows[g]["r_squared_gain"] = max(0.0, of.quality - before)
    names = list(_files.SUBSETS.names)
    table = pd.DataFrame(list(rows.values())).reindex(columns=names)
    for column, p in (("p_by", "p_value"), ("change_p_by", "change_p_value")):
        table[column] = by_fdr(table[p].to_numpy(dtype=np.float64))
    table = table.sort_values("r_squared_gain", ascending=False, kind="stable", na_position="last")
    table["rank"] = np.arange(1, len(table) + 1)
    return table.reset_index(drop=True)[names], facts


def independent(data: Data, blocks: list[np.ndarray], columns: dict[int, np.ndarray]) -> list[int]:
    """Keys of the columns that are no combinations of the blocks and of those before them."""
    from lmd3.analysis.slope import within

    ones = np.ones(len(data.y))
    basis = np.linalg.qr(within(np.hstack(blocks), data.codes, ones))[0]
    kept = []
    for key, x in columns.items():
        rest = within(x, data.codes, ones)
        for _ in range(2):
            rest = rest - basis @ (basis.T @ rest)
        size = float(np.linalg.norm(rest))
        if size > 1e-6 * float(np.linalg.norm(x)):
            kept.append(key)
            basis = np.column_stack([basis, rest / size])
    return kept


def changes(sums: Sums, ids: list[str], taken: int = MOST) -> pd.DataFrame:
    """Per query and group: log density, share, log density without the group, change (`SUBSET_CHANGES`)."""
    shares, whole = sums.shares, sums.log_density
    order = np.argsort(-shares.mean(axis=0))[:taken]
    parts = []
    for g in order:
        rest = sums.without(int(g))
        parts.append(
            pd.DataFrame(
                {
                    "id": ids,
                    "subset": sums.names[g],
                    "log_density": sums.log_sums[:, g] - np.log(sums.rows[g]),
                    "share": shares[:, g],
                    "log_density_without": rest,
                    "change": whole - rest,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)
