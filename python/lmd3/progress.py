"""Progress of long work: what library functions call, and the console bar that the command line gives them.

A long function takes `progress: ProgressFactory | None` and runs

    with (progress or silent)("encoding", total, "texts") as bar:
        bar.update(done)

`done` is the absolute amount, so a caller may report as rarely as it likes.
"""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol, Self


class ProgressBar(Protocol):
    """What a running piece of work reports to."""

    def update(self, done: float) -> None:
        """Says how much is done, in the unit and out of the total given at the start."""


class ProgressFactory(Protocol):
    """Starts one bar: `label` says what is done, `total` how much of it (None: unknown) in which `unit`."""

    def __call__(
        self, label: str, total: float | None = None, unit: str = ""
    ) -> AbstractContextManager[ProgressBar]:
        """Starts the bar; leaving the context ends it."""


class _Silent:
    """A bar that shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def update(self, done: float) -> None:
        """Ignores the report."""


def silent(label: str, total: float | None = None, unit: str = "") -> AbstractContextManager[ProgressBar]:
    """The factory of bars that show nothing: the default of the library."""
    return _Silent()


class _Console:
    """One line on stderr: rewritten in place on a terminal, a fresh line now and then elsewhere."""

    def __init__(self, label: str, total: float | None, unit: str) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._terminal = sys.stderr.isatty()
        self._interval = 0.1 if self._terminal else 15.0
        self._start = self._last = time.monotonic()
        self._done = 0.0
        self._drawn = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._drawn:
            return
        if self._terminal:
            sys.stderr.write("\r\x1b[K")
        if kind is None:
            elapsed = duration(time.monotonic() - self._start)
            sys.stderr.write(f"{self._label}: {self._amount(self._done)} in {elapsed}\n")
        sys.stderr.flush()

    def update(self, done: float) -> None:
        """Draws the line where enough time has passed since the last one."""
        self._done = done
        now = time.monotonic()
        if now - self._last < self._interval:
            return
        self._last = now
        self._drawn = True
        text = f"{self._label}: {self._amount(done)}"
        elapsed = now - self._start
        if self._total and done > 0:
            left = elapsed * max(0.0, self._total - done) / done
            text += f" of {_count(self._total)}, {done / self._total:.0%}, {duration(left)} left"
        else:
            text += f", {duration(elapsed)}"
        sys.stderr.write(f"\r\x1b[K{text}" if self._terminal else f"{text}\n")
        sys.stderr.flush()

    def _amount(self, done: float) -> str:
        return f"{_count(done)} {self._unit}".rstrip()


def console(label: str, total: float | None = None, unit: str = "") -> AbstractContextManager[ProgressBar]:
    """The factory of bars on stderr, with the time left. Work that ends at once prints nothing."""
    return _Console(label, total, unit)


def duration(seconds: float) -> str:
    """Seconds in words short enough for one line: `8 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _count(amount: float) -> str:
    return f"{amount:,.0f}"
