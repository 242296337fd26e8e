"""What `make claims` holds its figures to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from lmd3.results import read_json


@dataclass(frozen=True)
class Bar:
    """One thing that should hold.

    Attributes:
        claim: A, B, facts, C, subsets or calibration.
        what: in words.
        wanted: the bar, in words.
        found: the figure, in words.
        holds: whether it does.
    """

    claim: str
    what: str
    wanted: str
    found: str
    holds: bool


class Tables:
    """The analysis tables of one experiment's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[str, pd.DataFrame] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._read:
            self._read[name] = pq.read_table(self.folder / f"{name}.parquet").to_pandas()
        return self._read[name]

    def one(self, name: str, column: str, **where: Any) -> float:
        """The value of a column in the one row that has these values (floats: nearly)."""
        rows = self[name]
        for key, value in where.items():
            same = np.isclose(rows[key], value) if isinstance(value, float) else rows[key] == value
            rows = rows[same]
        if len(rows) != 1:
            raise LookupError(f"{name}: {len(rows)} rows with {where}")
        return float(rows[column].iloc[0])

    @property
    def summary(self) -> Any:
        """`analysis/summary.json`."""
        return read_json(self.folder / "analysis" / "summary.json")


def _bar(claim: str, what: str, value: float, sign: str, bar: float, digits: int = 3) -> Bar:
    holds = value >= bar if sign == "≥" else value <= bar
    shown = f"{value:.1e}" if 0 < abs(value) < 10**-digits else f"{value:.{digits}f}"
    return Bar(claim, what, f"{sign} {bar:g}", shown, bool(holds))


def leak_bars(leak: Tables, recomputed: float) -> list[Bar]:
    """What the leak of questions should show."""
    bars = []
    r = "analysis/responses"
    for kind, h, least in (
        ("paraphrase", 0.05, 3.0),
        ("paraphrase", 0.1, 0.1),
        ("exact", 0.05, 10.0),
        ("exact", 0.1, 2.0),
    ):
        where: dict[str, Any] = {"kind": kind, "dose": 1, "bandwidth": h}
        if kind == "paraphrase":
            share = leak.one(r, "share_positive", **where)
            bars.append(
                _bar("A", f"{kind} × 1, h = {h:g}: share of items whose log density rose", share, "≥", 0.95)
            )
        bars.append(
            _bar("A", f"{kind} × 1, h = {h:g}: median change", leak.one(r, "median", **where), "≥", least, 2)
        )
    rows = leak[r]
    rising = {
        (h, kind): bool((np.diff(part.sort_values("dose")["median"]) > 0).all())
        for (h, kind), part in rows[rows["dose"] > 0].groupby(["bandwidth", "kind"])
    }
    bars.append(
        Bar(
            "A",
            "medians rise with the dose within kind, at every h",
            "all",
            f"{sum(rising.values())} of {len(rising)}",
            all(rising.values()),
        )
    )
    for kind in ("none", "held back"):
        median = leak.one(r, "median", kind=kind, dose=0, bandwidth=0.1)
        bars.append(
            _bar("A", f"untreated ({kind}), h = 0.1: size of the median change", abs(median), "≤", 0.05)
        )
    bars.append(_bar("A", "largest difference to a recomputation from scratch", recomputed, "≤", 1e-6, 9))
    c = "analysis/cells"
    for kind, most in (("paraphrase", -0.5), ("exact", -1.2)):
        cell: dict[str, Any] = {"outcome": "prompt", "kind": kind}
        bars.append(
            _bar(
                "B",
                f"{kind} × 16: Δ nats per token of the question",
                leak.one(c, "mean", **cell, dose=16),
                "≤",
                most,
                2,
            )
        )
        bars.append(
            _bar(
                "B",
                f"{kind} × 4: upper end of its interval",
                leak.one(c, "ci_high", **cell, dose=4),
                "≤",
                0.0,
                2,
            )
        )
    none = leak.one(c, "mean", outcome="prompt", kind="none", dose=0)
    bars.append(_bar("B", "untreated of the blocks: size of the mean Δ", abs(none), "≤", 0.06))
    p = leak.one("analysis/randomisation", "p_value", outcome="prompt", test="density", bandwidth=0.1)
    bars.append(_bar("B", "p by replayed assignments (density, h = 0.1)", p, "≤", 0.005, 4))
    s = "analysis/slopes"
    for h, least in ((0.1, 0.35), (0.2, 0.5)):
        value = leak.one(s, "r_squared", outcome="prompt", model="overall", sample="all", bandwidth=h)
        bars.append(_bar("B", f"R² of Δ on Δ log density, h = {h:g}", value, "≥", least, 2))
    at: dict[str, Any] = {"outcome": "prompt", "model": "overall", "sample": "paraphrase", "bandwidth": 0.1}
    slope, p = leak.one(s, "estimate", **at), leak.one(s, "p_value", **at)
    bars.append(
        Bar(
            "B",
            "slope among paraphrases, h = 0.1",
            "< 0, p < 1e-4",
            f"{slope:.3f}, p {p:.1e}",
            slope < 0 and p < 1e-4,
        )
    )
    return bars


def facts_bars(facts: Tables) -> list[Bar]:
    """What the leak of facts should show."""
    rows = facts["analysis/mcnemar"]
    share = rows[rows["outcome"] == "correct"].groupby(["kind", "dose"])["treatment"].mean()
    bars = [
        _bar("facts", f"{kind} × 16: accuracy", float(share[kind, 16]), "≥", 0.85, 2)
        for kind in ("paraphrase", "exact")
    ]
    none = float(share["none", 0])
    return [*bars, Bar("facts", "untreated: accuracy", ".10 – .42", f"{none:.2f}", 0.10 <= none <= 0.42)]


def pretrain_bars(pretrain: Tables) -> list[Bar]:
    """What the pretraining should show."""
    name = "analysis/relations"
    at = {"sample": "trained", "effects": "within", "bandwidth": 0.1}
    slope = pretrain.one(name, "estimate", **at, controls="base")
    p = pretrain.one(name, "p_value", **at, controls="base")
    bars = [
        Bar(
            "C",
            "trained sources, slope within source",
            "≤ −0.20, p < 1e-6",
            f"{slope:.3f}, p {p:.0e}",
            slope <= -0.2 and p < 1e-6,
        )
    ]
    for controls, least in (
        ("base", 0.03),
        ("base + max_cosine", 0.015),
        ("base + typicality + max_cosine", 0.012),
    ):
        value = pretrain.one(name, "delta_within", **at, controls=controls)
        total = pretrain.one(name, "delta_r_squared", **at, controls=controls)
        bar = _bar("C", f"ΔR² within source over {controls}", value, "≥", least)
        bars.append(
            Bar(bar.claim, bar.what, bar.wanted, f"{bar.found} (of all variance {total:.3f})", bar.holds)
        )
    value = pretrain.one(name, "estimate", **at | {"sample": "trained without pros_cons"}, controls="base")
    bars.append(_bar("C", "slope without pros_cons", value, "≤", -0.08))
    value = pretrain.one(name, "estimate", **at | {"sample": "untrained"}, controls="base + max_cosine")
    bars.append(_bar("C", "untrained sources over max cosine, size of the slope", abs(value), "≤", 0.05))
    c = {"contrast": "finetuned, after − before", "bandwidth": 0.1}
    contrasts = "analysis/contrasts"
    p = pretrain.one(contrasts, "first_p", **c)
    bars.append(Bar("C", "after finetuning, slope with source effects: p", "< 1e-4", f"{p:.0e}", p < 1e-4))
    bars.append(
        _bar(
            "C",
            "before finetuning, size of the slope",
            abs(pretrain.one(contrasts, "second", **c)),
            "≤",
            0.04,
        )
    )
    bars.append(
        _bar("C", "difference after − before", pretrain.one(contrasts, "difference", **c), "≤", -0.04)
    )
    return bars


def subset_bars(subsets: Tables) -> list[Bar]:
    """What the subsets should show."""
    name = "analysis/scores"
    rows = subsets[name]
    primary = rows[rows["primary"] & (rows["score"] == "effects")].set_index("predictor")
    density, cosine, chance = (primary.loc[p] for p in ("density", "max_cosine", "random"))
    return [
        Bar(
            "subsets",
            "models on random halves",
            "≥ 32",
            f"{int(density['models'])}",
            int(density["models"]) >= 32,
        ),
        Bar(
            "subsets",
            "rank correlation of predicted and measured change",
            "with its interval, above max cosine or honestly not",
            f"{density['estimate']:.3f} [{density['ci_low']:.3f}, {density['ci_high']:.3f}];"
            f" max cosine {cosine['estimate']:.3f} [{cosine['ci_low']:.3f}, {cosine['ci_high']:.3f}]",
            True,
        ),
        Bar(
            "subsets",
            "the random predictor's interval covers 0",
            "yes",
            f"[{chance['ci_low']:.3f}, {chance['ci_high']:.3f}]",
            bool(chance["ci_low"] <= 0 <= chance["ci_high"]),
        ),
    ]


def calibration_bars(found: Mapping[str, float]) -> list[Bar]:
    """Share of re-randomised assignments in which each test rejects a null outcome at 5 %: 3.5 to 6.5 %, and
    with fewer draws than 2,000 what chance allows of 5 %.
    """
    draws = int(found["assignments"])
    half = 2.576 * np.sqrt(0.05 * 0.95 / draws)
    low, high = min(0.035, 0.05 - half), max(0.065, 0.05 + half)
    return [
        Bar(
            "calibration",
            f"{name}: rejections at 5 % over {draws} draws",
            f"{low:.3f} – {high:.3f}",
            f"{share:.3f}",
            low <= share <= high,
        )
        for name, share in found.items()
        if name not in ("assignments", "spillover, naive")
    ]


def cost_bar(core_minutes: float) -> Bar:
    """45 minutes on two cores."""
    return _bar("cost", "core-minutes in all (45 minutes on 2 cores)", core_minutes, "≤", 90, 0)
