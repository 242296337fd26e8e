"""Steps of a job that leave results in one folder: what is done and unchanged is not done again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmd3.cli._common import manners, notice
from lmd3.errors import FormatError, InputError, OutputError

#: The file that says which steps are done, and with which settings.
RECORD = "study.json"
_FORMAT = 1


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: what it does, in two or three words.
        result: what it leaves, relative to the folder; a step without it is not done.
        settings: everything that its result depends on, as JSON values; files by `fingerprint`.
        work: does it.
        after: the names of the steps whose results it reads.
    """

    name: str
    result: str
    settings: Mapping[str, Any]
    work: Callable[[], None]
    after: tuple[str, ...] = field(default=())


def fingerprint(path: str | Path) -> dict[str, Any]:
    """What tells a file or folder from another or a changed one: its place, sizes and times."""
    path = Path(path).absolute()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    facts = [(file.relative_to(path).as_posix(), file.stat()) for file in files if file.is_file()]
    text = json.dumps([(name, status.st_size, status.st_mtime_ns) for name, status in facts])
    return {"path": str(path), "state": hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}


class Steps:
    """The steps of one folder.

    Args:
        folder: where results and the record are.
        steps: in the order of the work.
        force: whether results of other settings may be replaced.

    Raises:
        OutputError: the folder holds results of other settings, and `force` is not given.
        FormatError: the record can't be read.
    """

    def __init__(self, folder: Path, steps: list[Step], *, force: bool = False) -> None:
        self.folder = folder
        self.steps = steps
        self._record = self._read()
        self._waiting: set[str] = set()
        for step in steps:
            entry = self._record.get(step.name)
            settings = _plain(step.settings)
            there = (folder / step.result).exists()
            if there and not force and (entry is None or entry["settings"] != settings):
                raise OutputError(
                    f"holds {step.result} of other settings{_difference(entry, settings)}",
                    file=str(folder),
                    remedy="name another -o, or give --force to replace it",
                )
            done = there and entry is not None and entry["done"] and entry["settings"] == settings
            if not done or not self._waiting.isdisjoint(step.after):
                self._waiting.add(step.name)

    @property
    def waiting(self) -> list[str]:
        """The names of the steps to be done."""
        return [step.name for step in self.steps if step.name in self._waiting]

    def run(self) -> list[str]:
        """Does what is not done yet, records every step that has finished, and returns the names of these.

        Where the first step refuses its input, no trace of the job is left.
        """
        is_new = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._work()
        except InputError:
            if is_new and {path.name for path in self.folder.iterdir()} == {RECORD}:
                (self.folder / RECORD).unlink()
                self.folder.rmdir()
            raise
        return self.waiting

    def _work(self) -> None:
        for step in self.steps:
            if step.name not in self._waiting:
                notice(f"{step.name}: done before ({step.result})")
                continue
            notice(f"{step.name} ...")
            # Written down before too: what an interrupted step leaves is its own and may be replaced.
            self._note(step, done=False)
            step.work()
            self._note(step, done=True)

    def _note(self, step: Step, *, done: bool) -> None:
        self._record[step.name] = {"settings": _plain(step.settings), "done": done}
        path = self.folder / RECORD
        temporary = path.with_suffix(".tmp")
        record: dict[str, Any] = {"format": _FORMAT}
        if manners.arguments:
            record["arguments"] = list(manners.arguments)
        text = json.dumps(record | {"steps": self._record}, indent=1, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(path)

    def _read(self) -> dict[str, Any]:
        path = self.folder / RECORD
        if not path.exists():
            return {}
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["format"] == _FORMAT:
                return {
                    name: {"settings": e["settings"], "done": e["done"]}
                    for name, e in record["steps"].items()
                }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        raise FormatError(
            "not a record of steps that this version reads", file=str(path), remedy="name another -o"
        )


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they come back from JSON."""
    return dict(json.loads(json.dumps(dict(settings), default=str)))


def _difference(entry: Any, settings: dict[str, Any]) -> str:
    """The first setting that changed, in words."""
    before = entry["settings"] if entry else {}
    for name, new in settings.items():
        old = before.get(name)
        if before and old != new:
            return f" ({name} has changed)" if isinstance(new, dict) else f" ({name}: {old} then, {new} now)"
    return ""
