"""The steps of a study: nothing is done twice, nothing of other settings is replaced silently."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lmd3.cli._steps import RECORD, Step, Steps, fingerprint
from lmd3.errors import FormatError, OutputError


class Job:
    """Two steps, the second on the first; `ran` lists what was worked on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ran: list[str] = []
        self.fails = ""

    def steps(self, first: int = 1, second: int = 1, *, force: bool = False) -> Steps:
        def work(name: str) -> Callable[[], None]:
            def do() -> None:
                self.ran.append(name)
                (self.folder / name).write_text("x", encoding="utf-8")
                if name == self.fails:
                    raise KeyboardInterrupt

            return do

        return Steps(
            self.folder,
            [
                Step("one", "a", {"value": first}, work("a")),
                Step("two", "b", {"value": second}, work("b"), after=("one",)),
            ],
            force=force,
        )


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path / "study")


def test_finished_steps_are_not_done_again(job: Job) -> None:
    assert job.steps().run() == ["one", "two"]
    assert job.steps().run() == []
    assert job.ran == ["a", "b"]


def test_only_the_missing_step_is_done(job: Job) -> None:
    job.steps().run()
    (job.folder / "b").unlink()
    assert job.steps().run() == ["two"]


def test_a_step_follows_those_it_reads(job: Job) -> None:
    job.steps().run()
    (job.folder / "a").unlink()
    assert job.steps().run() == ["one", "two"]


def test_other_settings_are_refused_and_forced(job: Job) -> None:
    job.steps().run()
    with pytest.raises(OutputError, match=r"b of other settings \(value: 1 then, 2 now\)"):
        job.steps(second=2)
    assert job.steps(second=2, force=True).run() == ["two"]
    assert job.steps(second=2).run() == []
    assert job.steps(first=2, second=2, force=True).run() == ["one", "two"]


def test_an_interrupted_step_is_done_again_without_force(job: Job) -> None:
    job.fails = "b"
    with pytest.raises(KeyboardInterrupt):
        job.steps().run()
    job.fails = ""
    assert job.steps().waiting == ["two"]
    assert job.steps().run() == ["two"]


def test_files_of_others_are_not_replaced(job: Job) -> None:
    job.folder.mkdir()
    (job.folder / "b").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError):
        job.steps()
    assert (job.folder / "b").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("content", ["", "[]", "{", json.dumps({"format": 2, "steps": {}})])
def test_a_record_that_is_none_is_refused(job: Job, content: str) -> None:
    job.folder.mkdir()
    (job.folder / RECORD).write_text(content, encoding="utf-8")
    with pytest.raises(FormatError):
        job.steps()


def test_fingerprints_tell_changed_files(tmp_path: Path) -> None:
    file = tmp_path / "a" / "texts.jsonl"
    file.parent.mkdir()
    file.write_text("one", encoding="utf-8")
    of_file, of_folder = fingerprint(file), fingerprint(file.parent)
    assert fingerprint(file) == of_file
    file.write_text("other", encoding="utf-8")
    assert fingerprint(file) != of_file and fingerprint(file.parent) != of_folder
