"""One writer at a time: a lock beside a store, with its owner's name."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lmd3.errors import OutputError

try:
    import fcntl
except ImportError:  # a system without: the lock is a file that exists
    fcntl = None  # type: ignore[assignment]


class WriterLock:
    """Held by the process that writes a store; use it as a context manager.

    The system lets go of it when the process ends, however that happens; where it has no such locks, a file
    left by a killed process has to be removed by hand.

    Args:
        path: the store.

    Raises:
        OutputError: another process holds it (it is named), or its file can't be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.store = Path(path)
        self.file = self.store.absolute().parent / f".{self.store.name}.lock"
        self._handle: Any = None
        self._made: list[Path] = []

    def __enter__(self) -> Self:
        try:
            self._made = [parent for parent in self.file.parents if not parent.exists()]
            self.file.parent.mkdir(parents=True, exist_ok=True)
            while True:
                self._handle = self.file.open("a+" if fcntl else "x+", encoding="utf-8")
                if fcntl is None:
                    break
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The owner before may have removed the file between opening and locking.
                with contextlib.suppress(FileNotFoundError):
                    if os.fstat(self._handle.fileno()).st_ino == self.file.stat().st_ino:
                        break
                self._handle.close()
        except (BlockingIOError, FileExistsError):
            raise self._taken() from None
        except OSError as error:
            raise OutputError(f"can't be written: {error.strerror or error}", file=str(self.store)) from None
        self._handle.truncate(0)
        self._handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._handle.flush()
        return self

    def _taken(self) -> OutputError:
        if self._handle is not None:
            self._handle.close()
        try:
            owner = self.file.read_text(encoding="utf-8").strip()
        except OSError:
            owner = ""
        remedy = "wait for it to end" if fcntl else f"wait for it to end, or remove {self.file} if it has"
        return OutputError(
            f"is being written by {owner or 'another process'}", file=str(self.store), remedy=remedy
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self.file.unlink()
        self._handle.close()
        with contextlib.suppress(OSError):
            # Folders that were made for nothing: not where something is in them by now.
            for parent in self._made:
                parent.rmdir()
