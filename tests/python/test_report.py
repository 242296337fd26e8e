"""The report: one offline page, everything on it escaped."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lmd3 import errors
from lmd3.analysis import regress
from lmd3.cli import main
from lmd3.report import figures, render, texts, write_report

HOSTILE = "</script><script>alert('x')</script>\"'&<b>"


class Tables:
    """A density table with neighbours, as the analysis takes it."""

    def __init__(self, n: int = 120, name: str = "q", folder: Path | None = None) -> None:
        rng = np.random.default_rng(0)
        self.ids = [f"{name}{i}" for i in range(n)]
        self.x = rng.normal(size=n)
        self.density = pd.concat(
            [
                pd.DataFrame(
                    {
                        "id": self.ids,
                        "kernel": "exponential",
                        "bandwidth": h,
                        "rule": rule,
                        "group": None,
                        "log_density": self.x + noise * rng.normal(size=n),
                        "ess": 50.0,
                    }
                )
                for h, rule, noise in ((0.05, "ess=1000", 0.0), (0.1, "0.1", 0.5))
            ]
        )
        self.queries = pd.DataFrame(
            {"id": self.ids, "max_cosine": rng.uniform(size=n), "typicality": rng.normal(size=n)}
        )
        self.neighbors = pd.DataFrame(
            {
                "id": np.repeat(self.ids, 3),
                "rank": np.tile([1, 2, 3], n),
                "neighbor_id": [f"c{i % 7}" for i in range(3 * n)],
                "neighbor_group": name,
                "distance": 0.4,
                "cosine": 0.92,
                "share": 0.01,
            }
        )
        self.run: dict[str, Any] = {"bandwidths": [{"kernel": "exponential", "bandwidth": 0.05}]}
        if folder is not None:
            for side, names in (("store", [f"c{i}" for i in range(7)]), ("queries", self.ids)):
                place = folder / f"{side}.lmd3"
                place.mkdir()
                (place / "manifest.json").write_text("{}")
                documents = {"id": names, "text": [f"{side} text of {i} {HOSTILE}" for i in names]}
                pq.write_table(pa.table(documents), place / "documents-00000.parquet", row_group_size=50)
                self.run[side] = {"path": str(place), "n": len(names), "encoder": {"model": "m"}}

    def outcome(self, name: str = "score", binary: bool = False) -> pd.DataFrame:
        rng = np.random.default_rng(1)
        y = self.x + rng.normal(size=len(self.x))
        frame = pd.DataFrame({"id": self.ids, name: (y > 0).astype(int) if binary else y})
        return frame.assign(topic=[f"t{i % 4}" for i in range(len(y))])


class Page(HTMLParser):
    """Collects the script elements and the visible text of a page, and refuses links to elsewhere."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self._inside: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            assert name not in ("src", "href", "srcset", "onload", "onerror"), (tag, name, value)
        if tag in ("script", "style"):
            self._inside.append(tag)
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if self._inside and tag == self._inside[-1]:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[-1] += data
        else:
            self.text.append(data)

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))


@pytest.mark.parametrize("binary", [False, True])
def test_page_answers_and_shows_everything(tmp_path: Path, binary: bool) -> None:
    tables = Tables(folder=tmp_path)
    study = regress(tables.outcome(binary=binary), tables, within="topic")
    page = Page(render(study))
    for sentence in study.facts["answer"]:
        assert re.sub(r"\s+", " ", sentence) in page.words
    for heading in (
        "What was measured",
        "score against log density",
        "What is left of the slope",
        "What each step explains",
        "Coefficients",
        "Bandwidth",
        "Densest and sparsest queries",
        "Settings and versions",
    ):
        assert heading in page.words
    densest = tables.ids[int(np.argmax(tables.x))]
    assert f"queries text of {densest}" in page.words
    assert "store text of c" in page.words
    names = {"binned", "panels", "slopes", "ladder", "bandwidths"}
    found = [s for s in page.scripts if s.startswith('{"data"')]
    assert len(found) == len(names)
    for figure in found:
        assert set(json.loads(figure)) == {"data", "layout"}


def test_hostile_text_is_shown_as_text(tmp_path: Path) -> None:
    tables = Tables(name=HOSTILE, folder=tmp_path)
    outcome = tables.outcome(name=HOSTILE).rename(columns={"topic": HOSTILE[::-1]})
    outcome[HOSTILE[::-1]] = [f"{HOSTILE}{i % 3}" for i in range(len(outcome))]
    study = regress(outcome, tables, within=HOSTILE[::-1], cluster=HOSTILE[::-1])
    html = render(study)
    page = Page(html)
    assert "<script>alert" not in html
    assert "alert('x')" in page.words
    ours = {"html", "head", "body", "main", "header", "section", "div", "p", "table", "tr", "td", "th"}
    ours |= {"script", "style", "title", "meta", "h1", "h2", "h3", "b", "span", "br", "ul", "li", "ol"}
    ours |= {"figure", "figcaption", "thead", "tbody", "small", "article", "blockquote", "footer"}
    assert set(page.tags) <= ours
    for script in page.scripts:
        if script.startswith('{"data"'):
            assert "<" not in script
            assert json.loads(script)


def test_the_page_from_files_is_that_from_memory(tmp_path: Path) -> None:
    tables = Tables(folder=tmp_path)
    study = regress(tables.outcome(), tables, within="topic")
    study.save(tmp_path / "s")
    assert write_report(tmp_path / "s", tmp_path / "a.html").read_text() == render(study)
    assert write_report(study, tables, tmp_path / "b.html").read_text() == render(study)
    assert (tmp_path / "a.html").stat().st_size < 10 * 1024 * 1024
    # The folder of a whole study holds that of its analysis.
    (tmp_path / "all").mkdir()
    (tmp_path / "s").rename(tmp_path / "all" / "analysis")
    assert write_report(tmp_path / "all", tmp_path / "c.html").read_text() == render(study)


def test_texts_can_be_left_out_or_named(tmp_path: Path) -> None:
    tables = Tables(folder=tmp_path)
    study = regress(tables.outcome(), tables)
    assert "text of q" not in render(study, show_texts=False)
    assert "text of c" not in render(study, show_texts=False)
    shutil.rmtree(tmp_path / "queries.lmd3")
    assert "queries text of" not in render(study)
    lines = [json.dumps({"key": i, "body": f"given {i}"}) for i in tables.ids]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    page = render(study, queries=tmp_path / "q.jsonl", text="body", id="key")
    assert f"given {tables.ids[int(np.argmin(tables.x))]}" in page
    assert "store text of" in page


def test_a_plain_table_has_a_page(tmp_path: Path) -> None:
    tables = Tables()
    frame = tables.outcome().assign(near=tables.x)
    study = regress(frame[["id", "score"]], frame, predictor="near", controls="none")
    page = Page(render(study))
    assert "Does “score” depend on near?" in page.words
    assert "Bandwidth" not in page.words


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = Tables(folder=tmp_path)
    regress(tables.outcome(), tables).save(tmp_path / "s")
    command = ["report", str(tmp_path / "s"), "-o", str(tmp_path / "r.html"), "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == (tmp_path / "r.html").stat().st_size
    assert main(command) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "OutputError"
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "x.html")]) == 2
    assert not (tmp_path / "x.html").exists()


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.FileMissingError, match=r"summary\.json"):
        write_report(tmp_path, tmp_path / "r.html")
    tables = Tables()
    folder = regress(tables.outcome(), tables).save(tmp_path / "s")
    (folder / "summary.json").write_text("{")
    with pytest.raises(errors.FormatError):
        write_report(folder, tmp_path / "r.html")


def test_json_in_a_script_cannot_leave_it() -> None:
    value = {"a": HOSTILE + "\u2028", "b": [float("nan"), np.float64(2.5), np.arange(2)]}
    text = figures.escape_json(value)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": HOSTILE + "\u2028", "b": [None, 2.5, [0, 1]]}


def test_shorten_cuts_at_a_word() -> None:
    assert texts.shorten("short") == "short"
    assert texts.shorten("one two three", 9) == "one two …"
    assert texts.shorten("x" * 50, 10) == "x" * 10 + " …"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
def test_browser_draws_every_figure_without_a_word_of_complaint(tmp_path: Path) -> None:
    tables = Tables(name=HOSTILE, folder=tmp_path)
    study = regress(tables.outcome(), tables, within="topic")
    page = write_report(study, tmp_path / "r.html")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += ["--virtual-time-budget=8000", "--dump-dom", page.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.count('class="main-svg"') >= 5
    assert "CONSOLE" not in run.stderr
