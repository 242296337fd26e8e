"""What the README shows: its commands and its library example run as they stand, its links exist."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lmd3 import cli

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    """The command lines of the README's shell blocks, continued lines joined."""
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    return [line.split("#")[0].strip() for line in text.splitlines() if line.startswith("lmd3 ")]


@pytest.fixture(scope="module")
def texts_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the README's examples name: texts of five topics, and results."""
    folder = tmp_path_factory.mktemp("readme")
    random = np.random.default_rng(0)
    words = np.array([f"{topic}{number}" for topic in "abcde" for number in range(60)]).reshape(5, 60)

    def text(topic: int) -> str:
        return " ".join(random.choice(words[topic], size=random.integers(6, 30)))

    def write(name: str, rows: list[dict[str, object]]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    shares = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    write("corpus.jsonl", [{"text": text(topic)} for topic in random.choice(5, size=4200, p=shares)])
    topics = random.integers(0, 5, size=200)
    write("queries.jsonl", [{"text": text(topic)} for topic in topics])
    right = random.random(200) < 0.2 + 1.5 * shares[topics]
    write("results.jsonl", [{"id": str(row), "value": int(value)} for row, value in enumerate(right)])
    return folder


@pytest.fixture
def inside(texts_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(texts_folder)
    yield texts_folder


def test_the_commands_run_in_their_order(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = commands()
    assert {line.split()[1] for line in lines} >= {
        "study", "encode", "density", "covariates", "perplexity", "analyze", "report",
    }  # fmt: skip
    for line in lines:
        status = cli.main(shlex.split(line)[1:])
        assert status == 0, f"{line}\n{capsys.readouterr().err}"
    for page in ("study/report.html", "report.html"):
        assert "<html" in (inside / page).read_text(encoding="utf-8")


def test_the_library_example_runs(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = blocks("python")
    exec(compile(program, "README.md", "exec"), {})
    assert "density" in capsys.readouterr().out
    assert (inside / "library.html").is_file()


def test_the_targets_and_files_it_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake ([a-z]+)", README))
    assert {"demo", "test", "wheel"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    links = re.findall(r"\]\(([^)]+)\)", README) + re.findall(r"`(docs/[^`]+)`", README)
    assert links and all((ROOT / link).is_file() for link in links)


def test_the_picture_is_small() -> None:
    picture = ROOT / "docs" / "report.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size <= 300_000
