"""Every number of a report is in the study's files."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from lmd3.analysis import regress
from lmd3.report import render

#: Numbers of the page's own words: levels, powers, counts of neighbours.
FIXED = {0.05, 0.0001, 0.5}


class World:
    """A density table with all that a study can be made of."""

    def __init__(self, n: int = 240) -> None:
        rng = np.random.default_rng(20)
        self.ids = [f"q{i}" for i in range(n)]
        self.task = np.repeat(np.arange(12), n // 12)
        x = rng.normal(size=n)
        rows = []
        for h, rule, noise in ((0.05, "ess=100", 0.0), (0.1, "ess=1000", 0.5)):
            parts = {"web": rng.normal(size=n) + x, "books": rng.normal(size=n)}
            parts["code"] = rng.normal(size=n) - 1
            log_sum = np.logaddexp.reduce(list(parts.values()))
            for group, values in ({None: log_sum + noise * rng.normal(size=n)} | parts).items():
                rows.append(
                    pd.DataFrame(
                        {
                            "id": self.ids, "kernel": "exponential", "bandwidth": h, "rule": rule,
                            "group": group, "log_density": values - (4.0 if group else 5.0),
                            "std_error": 0.3, "ess": 50.0 + rng.uniform(size=n), "kernel_sum_log": values,
                            "rows_evaluated": 100,
                        }
                    )
                )  # fmt: skip
        self.density = pd.concat(rows, ignore_index=True)
        self.queries = pd.DataFrame(
            {
                "id": self.ids, "max_cosine": rng.uniform(size=n), "typicality": 0.4 * x + rng.normal(size=n),
                "local_dimension": rng.uniform(5, 9, n), "duplicates": rng.poisson(0.1, n),
            }
        )  # fmt: skip
        self.neighbors = pd.DataFrame(
            {
                "id": np.repeat(self.ids, 3), "rank": np.tile([1, 2, 3], n),
                "neighbor_id": [f"c{i}" for i in rng.integers(0, 40, 3 * n)], "neighbor_group": "web",
                "distance": 0.4, "cosine": 0.92, "share": 0.01,
            }
        )  # fmt: skip
        self.run: dict[str, Any] = {"bandwidths": [{"kernel": "exponential", "bandwidth": 0.05}]}
        level = rng.normal(size=12)[self.task]
        self.y = 0.4 * x + level + rng.normal(size=n)
        self.vectors = rng.normal(size=(n, 8))
        held_out = rng.normal(-5, 1, 60)
        self.support = pd.DataFrame(
            {
                "id": [f"t{i}" for i in range(60)],
                "kernel": "exponential",
                "bandwidth": 0.05,
                "log_density": held_out,
            }
        )

    def study(self, binary: bool) -> Any:
        y = (self.y > 0).astype(float) if binary else self.y
        outcome = pd.DataFrame({"id": self.ids, "value": y, "task": [f"t{c}" for c in self.task]})
        other = outcome.assign(value=np.roll(y, 3))
        vectors = (self.ids, self.vectors)
        return regress(
            outcome, self, within="task", cluster="task", draws=199, queries=vectors,
            corpus=np.random.default_rng(1).normal(size=(80, 8)), support=self.support, contrast=other,
        )  # fmt: skip


class Words(HTMLParser):
    """The visible text of the sections that state findings (not the queries' table, nor settings)."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self._silent: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        if tag in ("script", "style") or (tag == "section" and named.get("id") in ("queries", "repeat")):
            self._silent.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._silent and tag == self._silent[-1]:
            self._silent.pop()

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.text.append(data)


def numbers_in(value: Any) -> list[float]:
    """All numbers of a JSON value."""
    if isinstance(value, dict):
        return [n for item in value.values() for n in numbers_in(item)]
    if isinstance(value, list):
        return [n for item in value for n in numbers_in(item)]
    if isinstance(value, bool) or value is None:
        return []
    return [float(value)] if isinstance(value, (int, float)) else []


def read(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(numbers of the files that state findings, numbers of all files)."""
    few = numbers_in(json.loads((folder / "summary.json").read_text()))
    every = list(few)
    for path in folder.glob("*.parquet"):
        frame = pq.read_table(path).to_pandas()
        found = [
            float(v)
            for c in frame.columns
            if frame[c].dtype.kind in "iuf"
            for v in frame[c].dropna().to_numpy()
        ]
        every += found
        if path.stem not in ("points", "shuffles", "subset_changes", "neighbors"):
            few += found
    return np.unique(few), np.unique(every)


def stated(html: str) -> list[tuple[str, float, int]]:
    """(token, value, decimals) of the numbers on the page that have decimals, percentages as shares."""
    text = re.sub(r"\s+", " ", " ".join(Words(html).text)).replace("\u00a0", " ")
    found = []
    for match in re.finditer(r"([+−-]?)(\d[\d,]*\.\d+|(?<![\w.])\.\d+)(e[+−-]\d+)?( %)?", text):
        sign, digits, power, percent = match.groups()
        before = text[max(0, match.start() - 2) : match.start()]
        if "< " in before or "under" in text[max(0, match.start() - 7) : match.start()]:
            continue
        value = float(digits.replace(",", ""))
        decimals = len(digits.partition(".")[2])
        if power:
            shift = int(power[1:].replace("−", "-"))
            value, decimals = value * 10.0**shift, decimals - shift
        if percent:
            value, decimals = value / 100, decimals + 2
        found.append((match[0], -value if sign in ("−", "-") else value, decimals))
    return found


def unknown(html: str, pool: np.ndarray) -> list[str]:
    """The numbers of a page that no number of the files rounds to."""
    both = np.concatenate([pool, -pool])
    return [
        token
        for token, value, decimals in stated(html)
        if value not in FIXED and not (np.abs(both - value) <= 0.500001 * 10.0**-decimals).any()
    ]


@pytest.mark.parametrize("binary", [False, True])
def test_every_number_on_the_page_is_in_a_file(tmp_path: Path, binary: bool) -> None:
    study = World().study(binary)
    folder = study.save(tmp_path / "study")
    few, every = read(folder)
    html = render(folder)
    assert len(stated(html)) > 150
    assert unknown(html, few) == []
    # A number that is nowhere is seen: most of such are.
    rng = np.random.default_rng(0)
    made_up = [f"+{v:.4f}" for v in rng.uniform(3, 40, 20)]
    seen = unknown(html.replace("</h1>", "</h1><p>" + " ".join(made_up) + "</p>"), few)
    assert len(seen) >= 18
    # The figures hold the files' own numbers, to the last digit.
    strange: dict[tuple[str, str, str], list[float]] = {}
    drawn = figures_of(html)
    assert len(drawn) >= 12
    for name, figure in drawn.items():
        for trace in figure["data"]:
            for side in ("x", "y"):
                values = [v for v in trace.get(side) or [] if isinstance(v, float)]
                lost = [v for v in values if not known(v, every)]
                if lost:
                    strange[name, str(trace.get("name")), side] = lost[:4]
    assert {key: v for key, v in strange.items() if key[:2] not in COMPUTED} == {}
    (line,) = [t for t in drawn["added"]["data"] if len(t["x"]) == 2]
    slope = (line["y"][1] - line["y"][0]) / (line["x"][1] - line["x"][0])
    assert slope == pytest.approx(study.facts["primary"]["estimate"], rel=1e-6)


#: What figures compute: the ends of the added-variable line, and places beside each other.
COMPUTED = {
    ("added", "None"),
    ("bandwidths", "with max cosine"),
    ("subsets", "its share, all in one model"),
    ("subsets", "leaving it out"),
}


def known(value: float, pool: np.ndarray) -> bool:
    """Whether a file has this number, its percentage or its negative."""
    for v in (value, -value, value / 100, -value / 100):
        at = int(np.searchsorted(pool, v))
        for near in pool[max(0, at - 1) : at + 1]:
            if abs(near - v) <= 1e-6 * max(abs(v), 1e-3):
                return True
    return False


def figures_of(html: str) -> dict[str, Any]:
    """The figures' JSON by name."""
    found = re.findall(r'<script type="application/json" id="figure-([\w-]+)">(.*?)</script>', html, re.S)
    return {name: json.loads(text) for name, text in found}
