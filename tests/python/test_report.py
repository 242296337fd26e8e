"""The report: one offline page, everything on it escaped."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
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
from lmd3.report import figures, latex, latex_of, queries, render, texts, write_report

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
            assert name not in ("src", "srcset", "onload", "onerror"), (tag, name, value)
            assert name != "href" or str(value).startswith("#"), (tag, value)
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
    html = render(study)
    page = Page(html)
    for sentence in study.facts["answer"]:
        assert re.sub(r"\s+", " ", sentence) in page.words
    for heading in (
        "What was measured",
        "score against log density",
        "What is left of the slope",
        "What each step explains",
        "Coefficients",
        "Bandwidth",
        "Diagnostics",
        "Queries",
        "The densest",
        "Repeat it",
    ):
        assert heading in page.words
    densest = tables.ids[int(np.argmax(tables.x))]
    assert f"queries text of {densest}" in page.words
    assert "store text of c" in page.words
    found = [s for s in page.scripts if s.startswith('{"data"')]
    names = [
        "binned",
        "panels",
        "added",
        "slopes",
        "ladder",
        "bandwidths",
        "forest",
        "specifications",
        "shuffles",
    ]
    assert len(found) >= len(names)
    for name in names:
        assert f'data-figure="{name}"' in html and f'id="figure-{name}"' in html
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
    ours |= {"nav", "a", "pre", "details", "summary", "noscript"}
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
    assert write_report(study, tables, tmp_path / "b.html").read_text() == render(study, tables)
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


def rows_of(page: str) -> dict[str, Any]:
    """The data of the page's table of queries."""
    found = re.search(r'<script type="application/json" id="data-queries">(.*?)</script>', page, re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_table_of_queries_holds_extremes_residuals_and_neighbours(tmp_path: Path) -> None:
    tables = Tables(n=2600, folder=tmp_path)
    study = regress(tables.outcome(), tables)
    data = rows_of(render(study, tables))
    assert len(data["rows"]) == 2000 and data["total"] == 2600
    at = {name: place for place, name in enumerate(data["columns"])}
    rows = {row[at["id"]]: row for row in data["rows"]}
    assert len(rows) == 2000

    def of_kind(name: str) -> set[str]:
        bit = data["kinds"].index(name)
        return {i for i, row in rows.items() if row[at["marks"]] >> bit & 1}

    points = study.points.assign(id=study.points["id"].astype(str)).set_index("id")
    each = queries.OF_A_KIND
    assert of_kind("densest") == set(points["predictor"].nlargest(each).index)
    assert of_kind("sparsest") == set(points["predictor"].nsmallest(each).index)
    assert of_kind("below the fit") == set(points["residual"].nsmallest(each).index)
    assert len(of_kind("drawn by chance")) > 500
    for i, row in list(rows.items())[:50]:
        assert row[at["value"]] == pytest.approx(points.loc[i, "value"], rel=1e-5)
        assert row[at["text"]].startswith(f"queries text of {i}")
        assert [n[0] for n in row[at["near"]]] == list(
            tables.neighbors[tables.neighbors["id"] == i]["neighbor_id"]
        )
        assert all(n[0] in data["texts"] for n in row[at["near"]])
    # The same draw every time, and fewer words where they would be too many.
    assert rows_of(render(study, tables)) == data


def test_long_texts_are_cut_until_the_page_is_small(tmp_path: Path) -> None:
    tables = Tables(n=2100)
    study = regress(tables.outcome(), tables)
    lines = [json.dumps({"id": i, "text": "wörter " * 400}) for i in tables.ids]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    (tmp_path / "c.jsonl").write_text(
        "\n".join(json.dumps({"id": f"c{i}", "text": "x " * 900}) for i in range(7))
    )
    page = render(study, tables, queries=tmp_path / "q.jsonl", corpus=tmp_path / "c.jsonl")
    assert len(page.encode()) < 10_000_000
    at = rows_of(page)["columns"].index("text")
    assert 100 < max(len(row[at]) for row in rows_of(page)["rows"]) <= 520


def test_neighbours_come_from_the_density_run_where_it_is_the_same(tmp_path: Path) -> None:
    tables = Tables(n=300, folder=tmp_path)
    folder = regress(tables.outcome(), tables).save(tmp_path / "all" / "analysis")
    density = tmp_path / "all" / "density"
    density.mkdir()
    tables.neighbors.to_parquet(density / "neighbors.parquet")
    (density / "run.json").write_text(json.dumps(tables.run))
    near = rows_of(render(folder))["columns"].index("near")
    assert all(len(row[near]) == 3 for row in rows_of(render(tmp_path / "all"))["rows"])
    # A density run with other settings is not this study's.
    (density / "run.json").write_text(json.dumps(tables.run | {"bandwidths": []}))
    assert sum(len(row[near]) == 3 for row in rows_of(render(folder))["rows"]) == 20


def test_commands_to_repeat_it(tmp_path: Path) -> None:
    tables = Tables(folder=tmp_path)
    study = regress(tables.outcome(), tables, within="topic")
    page = Page(render(study))
    assert f"lmd3 density {tmp_path}/store.lmd3 {tmp_path}/queries.lmd3 -o density" in page.words
    assert "--within topic" in page.words and "lmd3 report analysis -o report.html" in page.words
    study.run["arguments"] = ["analyze", "a b", "o.csv", "-o", "x"]
    assert "lmd3 analyze 'a b' o.csv -o x" in Page(render(study)).words


def test_latex_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        latex.escape("a_b & 5% \\x{}^~")
        == r"a\_b \& 5\% \textbackslash{}x\{\}\textasciicircum{}\textasciitilde{}"
    )
    tables = Tables()
    study = regress(tables.outcome(name="50%_score"), tables)
    text = latex_of(study)
    assert r"50\% score" in text and text.count("{") == text.count("}")
    estimate = study.facts["primary"]["estimate"]
    assert f"headline model & ${estimate:+.3f}$" in text
    for line in text.splitlines():
        if line.endswith(r"\\"):
            assert len(re.findall(r"(?<!\\)&", line)) == 4, line
    study.save(tmp_path / "s")
    command = [
        "report",
        str(tmp_path / "s"),
        "-o",
        str(tmp_path / "r.html"),
        "--latex",
        str(tmp_path / "t.tex"),
    ]
    assert main([*command, "--json"]) == 0
    assert (tmp_path / "t.tex").read_text() == text
    assert json.loads(capsys.readouterr().out)["latex"] == str(tmp_path / "t.tex")


#: Works the page as a reader would, and writes what came of it where the dump shows it.
DRIVER = """
<script>
window.addEventListener("error", e => { window.failed = String(e.message); });
document.addEventListener("securitypolicyviolation", e => { window.violated = e.blockedURI; });
window.addEventListener("load", () => setTimeout(() => {
  const said = {}, body = () => [...document.querySelectorAll("#browser tbody tr")];
  said.plots = document.querySelectorAll(".main-svg").length;
  said.first = body().length;
  const search = document.querySelector("#browser input");
  search.value = "q117 alert"; search.dispatchEvent(new Event("input"));
  said.found = body().map(r => r.querySelector(".open").textContent);
  body()[0].click();
  said.details = document.querySelector(".details").textContent;
  said.marked_up = document.querySelectorAll("#browser script, #browser b, article script").length;
  search.value = "no such query"; search.dispatchEvent(new Event("input"));
  said.none = body().length;
  search.value = ""; search.dispatchEvent(new Event("input"));
  const kind = document.querySelector("#browser select");
  kind.value = "0"; kind.dispatchEvent(new Event("change"));
  said.densest = document.querySelector("#browser .count").textContent;
  kind.value = ""; kind.dispatchEvent(new Event("change"));
  const heads = [...document.querySelectorAll("#browser th button")];
  heads.find(b => b.textContent === "score").click();
  said.sorted = body().slice(0, 3).map(r => r.children[3].textContent);
  document.querySelector("#browser .pages").lastChild.click();
  said.page = document.querySelector("#browser .pages span").textContent;
  said.alerted = window.alerted || 0;
  said.requests = performance.getEntriesByType("resource").map(e => e.name);
  said.violated = window.violated || null;
  said.failed = window.failed || null;
  const out = document.createElement("pre");
  out.id = "said"; out.textContent = JSON.stringify(said); document.body.append(out);
}, 1500));
</script>
"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
def test_in_a_browser(tmp_path: Path) -> None:
    tables = Tables(n=150, name=HOSTILE + "q", folder=tmp_path)
    study = regress(tables.outcome(), tables, within="topic")
    page = tmp_path / "r.html"
    ear = "<script>window.alert = () => { window.alerted = 1; };</script>"
    html = render(study, tables).replace("<head>", f"<head>{ear}")
    page.write_text(html.replace("</body>", DRIVER + "</body>"))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += ["--disable-background-networking", "--disable-component-update", "--no-first-run"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={tmp_path / 'net.json'}"]
    command += ["--virtual-time-budget=8000", "--dump-dom", page.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in run.stderr
    found = re.search(r'<pre id="said">(.*?)</pre>', run.stdout, re.DOTALL)
    assert found, run.stderr[-2000:]
    said = json.loads(unescape(found[1]))
    assert said["plots"] >= 5 and said["first"] == 20
    # Hostile ids and texts are words like any other.
    assert said["found"] == [f"{HOSTILE}q117"] and said["marked_up"] == 0 and said["alerted"] == 0
    assert f"queries text of {HOSTILE}q117 {HOSTILE}" in said["details"]
    assert "store text of" in said["details"]
    assert said["none"] == 0 and said["densest"] == "15 queries" and said["page"] == "2 of 8"
    values = sorted(study.points["value"], reverse=True)[:3]
    assert [float(v.replace("−", "-")) for v in said["sorted"]] == pytest.approx(values, abs=5e-4)
    assert said["failed"] is None and said["violated"] is None and said["requests"] == []
    # No request of the page left the machine (the browser's own have no page for their origin).
    log = (tmp_path / "net.json").read_text().splitlines()
    events = [line for line in log if re.search(r'"url":"(?:https?|wss?):', line)]
    origins = [re.search(r'"initiator":"([^"]*)"', line) for line in events]
    assert not [
        line for line, origin in zip(events, origins, strict=True) if origin and origin[1] != "not an origin"
    ]


def test_what_was_cut_is_shown_by_group(tmp_path: Path) -> None:
    tables = Tables(folder=tmp_path)
    groups: list[dict[str, Any]] = [
        {"name": f"g{i}", "rows": 100, "tokens": 1000, "truncated": i, "tokens_left_out": 10 * i}
        for i in range(15)
    ]
    groups.append(
        {"name": f"law {HOSTILE}", "rows": 40, "tokens": 600, "truncated": 30, "tokens_left_out": 200}
    )
    counts = {"rows": 1540, "tokens": 15600, "truncated": 135, "tokens_left_out": 1250}
    manifest = {"counts": counts, "groups": groups, "source": {"empty": 3}}
    (tmp_path / "store.lmd3" / "manifest.json").write_text(json.dumps(manifest))
    page = Page(render(regress(tables.outcome(), tables)))
    assert "135 of 1,540 (8.8 %); 1,250 tokens left out; 3 empty ones left out" in page.words
    assert "Training texts that were cut, by group" in page.words
    # The one that lost most comes first, then 11 of the 14 others.
    first = page.words.index(f"law {HOSTILE} 40 30 75 % 200 25 %")
    assert first < page.words.index("g14 100 14 14 % 140 12 %") < page.words.index("g4 100 4 4.0 % 40 3.8 %")
    assert "g3 100 3" not in page.words
    assert "3 more groups lost less. 1 lost nothing." in page.words
    # Nothing of it where no text was cut.
    for group in groups:
        group["truncated"] = 0
    (tmp_path / "store.lmd3" / "manifest.json").write_text(json.dumps(manifest))
    assert "by group" not in Page(render(regress(tables.outcome(), tables))).words
