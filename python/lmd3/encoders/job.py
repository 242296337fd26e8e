"""An encoding under way: what is finished of it on disk, so that it goes on after a kill.

Beside the store to be, in the hidden folder `.NAME.encoding`:

    job.json       what is encoded and how, with fingerprints of input and encoder; what the first pass found
    state/         the fitted state of the encoder, frozen
    window-….arrow one file for each finished window: vectors, ids, texts, …; written aside, synced, renamed
    progress.json  after each finished shard: the writer's state and the windows that it holds
    draft/         the store being written, shard by shard; renamed at the end

A window is never split between two shards. Its files are removed once the shard that holds it is finished and
`progress.json` says so; a kill between any two of these steps repeats work and changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lmd3.errors import FormatError, OutputError, WorkError
from lmd3.store.files import sync_folder

__all__ = ["Job"]

_WINDOW = re.compile(r"window-(\d{9})\.arrow")


class Job:
    """The folder of one encoding; use it as a context manager, by the holder of the store's `WriterLock`.

    Leaving it by an exception keeps the folder if a window was finished, else removes it.

    Args:
        out: the store to be.
        key: what the result depends on, as JSON values.
        force: discard an unfinished encoding of another key.

    Raises:
        OutputError: an unfinished encoding with another key (what differs is named), or a place that can't be
            written.
    """

    def __init__(self, out: Path, key: Mapping[str, Any], force: bool = False) -> None:
        self.out = out
        self.folder = out.absolute().parent / f".{out.name}.encoding"
        self._key = json.loads(json.dumps(key))
        self._force = force
        self._made: list[Path] = []
        #: What the first pass found; None before `begin`.
        self.facts: dict[str, Any] | None = None
        #: The writer's state after the last finished shard.
        self.state: dict[str, Any] | None = None
        #: Where the input goes on, and the number of the next window.
        self.position: list[int] = [0, 0]
        self.next_window = 0
        #: Finished windows that no shard holds yet.
        self.waiting: list[int] = []

    @property
    def draft(self) -> Path:
        """The store being written."""
        return self.folder / "draft"

    @property
    def encoder_state(self) -> Path:
        """The folder of the encoder's frozen state."""
        return self.folder / "state"

    def __enter__(self) -> Self:
        try:
            parents = self.out.absolute().parents
            self._made = [parent for parent in parents if not parent.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"can't be written: {error.strerror or error}", file=str(self.out)) from None
        self._load()
        return self

    def _load(self) -> None:
        path = self.folder / "job.json"
        if not path.exists():
            return
        found = _read(path)
        if found.get("key") != self._key:
            if not self._force:
                what = ", ".join(_differences(found.get("key") or {}, self._key))
                raise OutputError(
                    f"an encoding of other settings or input is unfinished there; different: {what}",
                    file=str(self.out),
                    remedy="repeat its settings to go on, or give --force to discard it",
                )
            self._clear()
            return
        self.facts = found["facts"]
        if (
            self.facts is not None
            and self.facts.get("sealing")
            and not (self.draft.exists() or self.out.exists())
        ):
            # It was put in its place, and is no longer there: from the beginning.
            self.facts = None
            self._clear()
            return
        progress = self.folder / "progress.json"
        if progress.exists():
            found = _read(progress)
            self.state, self.position = found["state"], found["position"]
            self.next_window = found["next_window"]
        self._find_windows()

    def _find_windows(self) -> None:
        """The finished windows in a row from the one that is next; others are of shards that hold them
        already."""
        numbers = []
        for path in self.folder.glob("window-*"):
            match = _WINDOW.fullmatch(path.name)
            if match is None or int(match[1]) < self.next_window:
                with self._failures():
                    path.unlink()
            else:
                numbers.append(int(match[1]))
        numbers.sort()
        if numbers != list(range(self.next_window, self.next_window + len(numbers))):
            raise FormatError(
                "a window is missing", file=str(self.folder), remedy="give --force to start anew"
            )
        self.waiting = numbers
        self.next_window += len(numbers)
        if numbers:
            schema = pa.ipc.open_file(pa.memory_map(str(self._window(numbers[-1])))).schema
            self.position = json.loads(schema.metadata[b"position"])

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Writes down what the first pass found: from here on the job can be continued."""
        self.facts = dict(facts)
        self._write_json("job.json", {"key": self._key, "facts": self.facts})

    def _window(self, number: int) -> Path:
        return self.folder / f"window-{number:09}.arrow"

    def keep_window(self, table: pa.Table, vectors: NDArray[Any], position: tuple[int, int]) -> None:
        """Makes the next window durable.

        Args:
            table: a row per vector.
            vectors: (m, d) float32 or float16.
            position: where the input goes on.

        Raises:
            WorkError: the disk is full, or the like.
        """
        table = _with_vectors(table, vectors, {"position": position})
        path = self._window(self.next_window)
        partial = path.with_suffix(".partial")
        with self._failures():
            with partial.open("wb") as file:
                with pa.ipc.new_file(file, table.schema) as writer:
                    writer.write_table(table)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
            sync_folder(self.folder)
        self.waiting.append(self.next_window)
        self.next_window += 1
        self.position = list(position)

    def take_over(self, path: Path, content: bytes) -> int:
        """Makes a file of `pack_window` the next window, and returns its rows.

        Raises:
            WorkError: it can't be renamed.
        """
        with pa.ipc.open_file(content) as file:
            position = json.loads(file.schema.metadata[b"position"])
            rows = len(file.read_all())
        with self._failures():
            path.rename(self._window(self.next_window))
            sync_folder(self.folder)
        self.waiting.append(self.next_window)
        self.next_window += 1
        self.position = list(position)
        return rows

    def read_window(self, number: int) -> tuple[pa.Table, NDArray[Any]]:
        """A finished window: the table and the vectors of `keep_window`."""
        with pa.memory_map(str(self._window(number))) as source:
            table = pa.ipc.open_file(source).read_all().combine_chunks()
        vectors = table["vector"].chunk(0)
        rows = vectors.flatten().to_numpy(zero_copy_only=True).reshape(len(vectors), -1)
        return table.drop_columns(["vector"]), rows

    def finish_shard(self, state: Mapping[str, Any]) -> None:
        """Notes that a finished shard holds the waiting windows, and removes them.

        Raises:
            WorkError: the disk is full, or the like.
        """
        self.state = dict(state)
        note = {"state": self.state, "position": self.position, "next_window": self.next_window}
        self._write_json("progress.json", note)
        with self._failures():
            for number in self.waiting:
                self._window(number).unlink()
        self.waiting = []

    def _write_json(self, name: str, value: Any) -> None:
        partial = self.folder / f"{name}.partial"
        with self._failures():
            with partial.open("w", encoding="utf-8") as file:
                json.dump(value, file, ensure_ascii=False)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(self.folder / name)
            sync_folder(self.folder)

    @contextlib.contextmanager
    def _failures(self) -> Any:
        try:
            yield
        except OSError as error:
            raise WorkError(
                error.strerror or str(error),
                file=str(self.out),
                remedy="what was finished is kept: make room and run the same command again",
            ) from None

    def published(self) -> bool:
        """Whether the store was put in its place and only this folder is left."""
        return self.facts is not None and not self.draft.exists() and self.facts.get("sealing", False)

    def seal(self) -> None:
        """Notes that the draft is complete but for its manifest."""
        assert self.facts is not None
        self.begin({**self.facts, "sealing": True})

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        begun = self.waiting or self.state or any(self.folder.glob("done-*"))
        if kind is None or self.facts is None or not begun:
            self.remove()
            if kind is not None:
                with contextlib.suppress(OSError):
                    for parent in self._made:
                        parent.rmdir()


def _with_vectors(table: pa.Table, vectors: NDArray[Any], metadata: Mapping[str, Any]) -> pa.Table:
    """A window's table as its file holds it."""
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    table = table.append_column("vector", pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]))
    return table.replace_schema_metadata({name: json.dumps(value) for name, value in metadata.items()})


def pack_window(table: pa.Table, vectors: NDArray[Any], metadata: Mapping[str, Any]) -> bytes:
    """The bytes of a window's file, for a process that does not hold the job; `metadata` has `position`."""
    table = _with_vectors(table, vectors, metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def read_key(folder: Path) -> dict[str, Any]:
    """What the result of the encoding in a folder depends on.

    Raises:
        FormatError: no encoding was begun there.
    """
    return dict(_read(folder / "job.json")["key"])


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise FormatError("not readable", file=str(path), remedy="give --force to start anew")
    return found


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs, as `name (before, now)`."""
    found = []
    for name in dict.fromkeys([*old, *new]):
        before, now = old.get(name), new.get(name)
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            found += [f"{name} {inner}" for inner in _differences(before, now)]
        else:
            found.append(f"{name} ({before} before, {now} now)")
    return found
