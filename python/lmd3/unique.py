"""Proof that ids are unique, for any number of them in bounded memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from lmd3.errors import DuplicateIdError

#: Ids whose hashes are sorted in memory; more are sorted on disk, in runs of so many.
RUN = 1 << 22

#: Repeated hashes that are looked up at a time.
_SUSPECTS = 1 << 14

_ENTRY = np.dtype([("hash", "<u8"), ("row", "<u8")])


class UniqueIds:
    """Proves that ids are unique by an external sort of their 64-bit hashes: equal hashes are looked up, the
    rest can't be equal.

    Up to 2²² ids take 8 bytes each in memory; more go to a temporary file, 16 bytes each, and about 250 MB of
    memory are taken whatever their number. Use it as a context manager, or let it go: the file has no name.

    Args:
        folder: where the temporary file lies; None: the system's place for such.
        run: ids sorted in memory.
    """

    def __init__(self, folder: str | Path | None = None, *, run: int = RUN) -> None:
        self._folder = folder
        self._run = run
        self._hashes: list[NDArray[np.uint64]] = []
        self._waiting = 0
        self._file: IO[bytes] | None = None
        self._runs: list[tuple[int, int]] = []
        self._n = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, ids: Sequence[str]) -> None:
        """Takes the next ids."""
        if not len(ids):
            return
        from pandas.util import hash_array

        values = np.empty(len(ids), dtype=object)
        values[:] = ids
        self._hashes.append(hash_array(values, categorize=False))
        self._waiting += len(ids)
        if self._waiting >= self._run:
            self._spill()

    def _spill(self) -> None:
        """Sorts what waits and writes it to the file as one run."""
        hashes = np.concatenate(self._hashes)
        self._hashes, self._waiting = [], 0
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix=".lmd3-ids.", dir=self._folder)  # noqa: SIM115
        order = np.argsort(hashes, kind="stable")
        entries = np.empty(len(hashes), _ENTRY)
        entries["hash"] = hashes[order]
        entries["row"] = order.astype(np.uint64) + np.uint64(self._n)
        self._runs.append((self._file.seek(0, 2), len(entries)))
        entries.tofile(self._file)
        self._n += len(hashes)

    def check(
        self,
        look_up: Callable[[list[int]], list[str]],
        *,
        file: str | None = None,
        place: Callable[[int], tuple[str | None, int]] | None = None,
    ) -> None:
        """Refuses equal ids.

        Args:
            look_up: the ids of the given positions, which are sorted.
            file: the file to name.
            place: file and row of a position, for messages.

        Raises:
            DuplicateIdError: names the first id that occurs again, and both rows.
        """
        done = -1
        # Kept from one lot to the next: where hashes of different ids agree, equal ids may lie in two lots.
        seen: dict[str, int] = {}
        while True:
            suspects, last = self._suspects(done)
            if not suspects:
                return
            self._refuse_equal(suspects, seen, look_up, file, place)
            if last is None:
                return
            done = last

    def _refuse_equal(
        self,
        suspects: list[tuple[int, int]],
        seen: dict[str, int],
        look_up: Callable[[list[int]], list[str]],
        file: str | None,
        place: Callable[[int], tuple[str | None, int]] | None,
    ) -> None:
        wanted = sorted({row for pair in suspects for row in pair})
        for second, name in zip(wanted, look_up(wanted), strict=True):
            first = seen.setdefault(name, second)
            if first != second:
                first_file, first_row = (file, first) if place is None else place(first)
                second_file, second_row = (file, second) if place is None else place(second)
                other = "" if first_file == second_file else f" of {first_file}"
                raise DuplicateIdError(
                    f"the id {name!r} occurs twice: in row {first_row}{other} and in row {second_row}",
                    file=second_file,
                    row=second_row,
                    remedy="make ids unique, or name another column of ids",
                )

    def _suspects(self, after: int) -> tuple[list[tuple[int, int]], int | None]:
        """Pairs of rows of equal hashes whose second row is above `after`, those of the lowest second rows;
        and the last of these where there may be more.
        """
        found: list[tuple[int, int]] = []
        more = False
        for hashes, rows in self._parts():
            same = np.flatnonzero(hashes[1:] == hashes[:-1]) + 1
            if not same.size:
                continue
            # Rows of equal hashes ascend, so each is paired with the first of them.
            starts = np.r_[True, hashes[1:] != hashes[:-1]]
            firsts = np.maximum.accumulate(np.where(starts, np.arange(len(hashes)), 0))
            pairs = zip(rows[firsts[same]].tolist(), rows[same].tolist(), strict=True)
            found += [pair for pair in pairs if pair[1] > after]
            if len(found) > _SUSPECTS:
                found = sorted(found, key=lambda pair: pair[1])[:_SUSPECTS]
                more = True
        return found, max(pair[1] for pair in found) if more and found else None

    def _parts(self) -> Iterator[tuple[NDArray[np.uint64], NDArray[Any]]]:
        """All hashes with their rows, sorted by both, in parts of different hashes."""
        if self._file is None:
            if self._hashes:
                hashes = np.concatenate(self._hashes)
                order = np.argsort(hashes, kind="stable")
                yield hashes[order], order
            return
        if self._hashes:
            self._spill()
        self._file.flush()
        buckets = -(-self._n // (self._run // 2 or 1))
        starts = [0] * len(self._runs)
        for bucket in range(buckets):
            bound = None if bucket == buckets - 1 else np.uint64(((bucket + 1) << 64) // buckets)
            parts = []
            for number, (place, count) in enumerate(self._runs):
                start = starts[number]
                end = count if bound is None else self._below(place, start, count, bound)
                self._file.seek(place + start * _ENTRY.itemsize)
                parts.append(np.fromfile(self._file, _ENTRY, end - start))
                starts[number] = end
            # Runs follow each other in rows, so a stable sort by hash keeps rows ascending.
            entries = np.concatenate(parts)
            order = np.argsort(entries["hash"], kind="stable")
            yield entries["hash"][order], entries["row"][order]

    def _below(self, place: int, low: int, high: int, bound: np.uint64) -> int:
        """The first entry of a run, from `low` on, whose hash is not below a bound."""
        assert self._file is not None
        while low < high:
            middle = (low + high) // 2
            self._file.seek(place + middle * _ENTRY.itemsize)
            (value,) = np.fromfile(self._file, "<u8", 1)
            if value < bound:
                low = middle + 1
            else:
                high = middle
        return low
