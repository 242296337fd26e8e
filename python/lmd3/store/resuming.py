"""Writing a store over several runs: after each shard the writer's state is a few facts, from which another
process goes on."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmd3.errors import WorkError
from lmd3.store.documents import parquet_file
from lmd3.store.writing import StoreWriter


class ResumableStoreWriter(StoreWriter):
    """A `StoreWriter` that keeps what it wrote when it is left by an exception.

    Args:
        path: the folder to make.
        folder: where it is written before; on the same file system.
        settings: as `StoreWriter`.
    """

    def __init__(self, path: str | Path, folder: Path, **settings: Any) -> None:
        self._place = folder
        super().__init__(path, **settings)

    def _make_folder(self) -> Path:
        self._place.mkdir(exist_ok=True)
        return self._place

    def state(self) -> dict[str, Any]:
        """What has to be remembered after a shard was finished, as JSON values."""
        assert self._shard is None, "a shard is open"
        return {
            "rows": self._n,
            "d": self._d,
            "shards": self._shards,
            "groups": [[name, self._group_rows[name]] for name in self._groups],
            "group_counts": {name: dict(counts) for name, counts in self._group_counts.items()},
            "counts": self._counts,
            "rounding": self._rounding,
            "kept": None if self._kept is None else list(self._kept),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a state that `state` gave, with the shards that were finished by then in the folder.

        Raises:
            FileMissingError, FormatError: a shard is not there or damaged.
        """
        self._n, self._d, self._rounding = state["rows"], state["d"], state["rounding"]
        self._shards, self._counts = list(state["shards"]), dict(state["counts"])
        self._groups = {name: code for code, (name, _) in enumerate(state["groups"])}
        self._group_rows = Counter(dict(state["groups"]))
        self._group_counts = {name: Counter(counts) for name, counts in state["group_counts"].items()}
        self._kept = None if state["kept"] is None else tuple(state["kept"])
        for shard in self._shards:
            with parquet_file(self._folder / shard["documents"]["name"]) as file:
                for batch in file.iter_batches(columns=["id"]):
                    self._unique.add(batch.column(0).to_pylist())

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            with super()._failures():
                yield
        except WorkError as error:
            raise WorkError(
                error.message,
                file=error.file,
                remedy=error.remedy or "what was finished is kept: make room and run the same command again",
            ) from None

    def abandon(self) -> None:
        """Lets go of open files; nothing that was finished is removed."""
        if self._shard is not None:
            self._shard.abandon()
        if self._documents is not None:
            self._documents.abandon()
        if self._exact is not None:
            self._exact.abandon()
        self._shard = self._documents = self._exact = None
        self._lock.close()
