"""The manners of the command line: exit statuses, `--json`, outputs, progress, help."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import typer

from lmd3 import cli, errors, progress
from lmd3.cli import _common

LMD3 = [sys.executable, "-m", "lmd3"]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], None]:
    """Adds a command `try` to the app for one test."""
    registered = list(cli.app.registered_commands)

    def add(function: Callable[..., None]) -> None:
        monkeypatch.setattr(cli.app, "registered_commands", list(registered))
        cli.app.command("try")(cli._with_manners(function))

    return add


def error_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The one JSON object on stdout, which must be an error's."""
    printed = json.loads(capsys.readouterr().out)
    assert list(printed) == ["error"]
    assert set(printed["error"]) == {"kind", "message", "file", "row", "remedy"}
    return dict(printed["error"])


# --- commands and help ---


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_exists_with_help_and_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0
    help_text = capsys.readouterr().out
    assert f"lmd3 {name}" in re.split("Examples?:", help_text)[1]
    for option in ("--json", "--quiet", "--debug"):
        assert option in help_text


def options_of(name: str) -> set[str]:
    command = importlib.import_module(f"lmd3.cli.{name}")
    hints = get_type_hints(getattr(command, name), include_extras=True)
    infos = [info for hint in hints.values() for info in getattr(hint, "__metadata__", ())]
    # Inside Annotated, typer keeps the first name where the default would stand.
    words = [word for info in infos for word in (getattr(info, "default", None), *(info.param_decls or ()))]
    return {word for word in words if isinstance(word, str) and word.startswith("--")}


def test_study_takes_every_option_of_its_parts() -> None:
    of_parts = options_of("encode") | options_of("density") | options_of("analyze")
    assert {"--model", "--kernel", "--cluster", "--bandwidth"} <= of_parts
    # A plan, a shard and an earlier result to extend are of one scan, the encoder of another store is of one
    # encoding; support comes from rows that a study holds out by itself; a paired outcome has two
    # runs (before and after an intervention), each of which is a study of its own.
    of_one_step = {"--plan", "--shard", "--rows", "--nodes", "--cores", "--disk-rate", "--rates", "--price"}
    of_one_step |= {"--extend", "--like", "--support"}
    of_one_step |= {"--before", "--density-before", "--dose"}
    assert of_parts - of_one_step <= options_of("study")


def test_help_alone_and_without_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    without = capsys.readouterr().out
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out.strip() == without.strip()
    assert all(f"\n  {name} " in without for name in cli.COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"lmd3 \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_info_names_versions_and_level(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["simd_level"] and facts["numpy"] == np.__version__
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))


# --- errors ---


@pytest.mark.parametrize("arguments", [["nope"], ["info", "--nope"], ["density"], ["info", "extra"]])
def test_usage_errors_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("lmd3: ") and printed.err.count("\n") == 1
    assert cli.main([*arguments, "--json"]) == 2
    assert error_of(capsys)["kind"] == "UsageError"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.ShapeError("17 columns", file="a.npy", row=3, remedy="encode again"), 2),
        (errors.MissingDependencyError("no torch", remedy="pip install 'lmd3[encode]'"), 2),
        (errors.WorkError("disk full"), 1),
    ],
)
def test_errors_are_one_line_or_one_object(
    error: errors.Lmd3Error, status: int, command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    command(fail)
    assert cli.main(["try"]) == status
    assert capsys.readouterr() == ("", f"lmd3: {error}\n")
    assert cli.main(["try", "--json"]) == status
    assert error_of(capsys) == error.to_dict()
    assert cli.main(["try", "--debug"]) == status
    assert "Traceback" in capsys.readouterr().err


def test_a_mistake_of_lmd3_itself_says_so(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise KeyError("x")

    command(fail)
    assert cli.main(["try"]) == 1
    assert "internal error: KeyError" in capsys.readouterr().err


def test_a_full_disk_is_a_failure_at_work(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        Path("/dev/full").write_text("x", encoding="utf-8")

    command(fail)
    assert cli.main(["try", "--json"]) == 1
    assert error_of(capsys)["kind"] == "WorkError"


def test_exit_status_of_a_command_is_kept(command: Any) -> None:
    def leave() -> None:
        raise typer.Exit(1)

    command(leave)
    assert cli.main(["try"]) == 1


def test_interruption_exits_with_130(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    command(stop)
    assert cli.main(["try", "--json"]) == 130
    assert error_of(capsys)["kind"] == "Interrupted"


def test_ctrl_c_from_outside() -> None:
    program = (
        "import sys, time, lmd3.cli as cli\n"
        "cli.app.command('wait')(lambda: time.sleep(60))\n"
        "print(1, flush=True)\n"
        "sys.exit(cli.main(['wait']))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        assert run.stdout is not None and run.stderr is not None
        run.stdout.readline()
        time.sleep(0.3)
        run.send_signal(signal.SIGINT)
        assert run.wait(10) == 130
        assert run.stderr.read() == b"lmd3: interrupted\n"


def test_a_closed_pipe_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        run = subprocess.run([*LMD3, "--help"], stdout=pipe, stderr=subprocess.PIPE, check=False)
    assert run.stderr == b""


# --- results ---


def test_emit_prints_json_that_any_reader_takes(capsys: pytest.CaptureFixture[str]) -> None:
    result = {
        "nan": float("nan"), "numpy": np.float32(0.5), "array": np.arange(3), "path": Path("a"), "none": None,
        "nested": {"infinity": [float("inf"), True]}, "text": "ü",
    }  # fmt: skip
    _common.emit(result, json=True)
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "nan": None, "numpy": 0.5, "array": [0, 1, 2], "path": "a", "none": None,
        "nested": {"infinity": [None, True]}, "text": "ü",
    }  # fmt: skip


def test_emit_prints_lines_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    _common.emit({"rows_read": 12345, "share": 0.25, "group": None, "ok": True}, json=False)
    assert capsys.readouterr().out == "rows read  12,345\nshare      0.25\ngroup      -\nok         yes\n"


# --- outputs ---


def test_outputs_that_exist_are_refused_without_force(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    assert _common.prepare_output(file) == file
    assert not file.exists()
    file.write_text("x", encoding="utf-8")
    with pytest.raises(errors.OutputError, match="exists"):
        _common.prepare_output(file)
    assert _common.prepare_output(file, force=True) == file
    with pytest.raises(errors.OutputError, match=r"x\.parquet"):
        _common.prepare_output(tmp_path)
    assert _common.prepare_output(tmp_path, results=["density.parquet"]) == tmp_path
    with pytest.raises(errors.OutputError, match="holds a result"):
        _common.prepare_output(tmp_path, results=["density.parquet", "x.parquet"])


@pytest.mark.parametrize("place", ["file/below", "/proc/nowhere/out", "/dev/null/out"])
def test_unwritable_outputs_are_refused(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(errors.OutputError):
        _common.prepare_output(tmp_path / place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --- texts and rows ---


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("a.jsonl", True), ("a.JSONL.gz", True), ("a.jsonl.zst", True), ("a.parquet", True), ("a.csv", True),
        ("a.txt", True), ("a.npy", False), ("store/manifest.json", False), ("folder/part-0.jsonl", True),
    ],
)  # fmt: skip
def test_texts_are_told_from_rows_by_name(name: str, texts: bool, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    assert _common.is_texts(path.parent if "/" in name else path) is texts


def test_a_path_that_is_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.FileMissingError):
        _common.is_texts(tmp_path / "nothing")


# --- progress ---


class Terminal(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_names_what_is_done_and_left(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sys, "stderr", Terminal(terminal))
    with progress.console("scan", 4000, "rows") as bar:
        for second in range(1, 31):
            clock[0] = second
            bar.update(100 * second)
    written = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert ("scan: 3,000 rows of 4,000, 75%, 10 s left" in written) and written.endswith(
        "3,000 rows in 30 s\n"
    )
    assert ("\r" in written) is terminal


def test_quiet_and_quick_work_show_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for quiet in (True, False):
        monkeypatch.setattr(_common.manners, "quiet", quiet)
        with _common.progress("scan", 10, "rows") as bar:
            bar.update(10)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(_common.manners, "quiet", True)
    _common.notice("nothing")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("seconds", "words"), [(0.2, "0 s"), (59.7, "1 min 00 s"), (3725, "1 h 02 min")])
def test_durations(seconds: float, words: str) -> None:
    assert progress.duration(seconds) == words
