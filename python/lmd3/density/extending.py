"""A result over a store before rows were appended to it, taken into one over all rows: its segment sums are
adopted, so that no old row is scanned again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lmd3.errors import FormatError, ParameterError
from lmd3.executors.jobs import Partials, files_of, owners, parts_of
from lmd3.executors.partials import FOLDER, differences, read_configuration
from lmd3.store import Store

#: What may differ: the rows, and how the bandwidths were asked for (their numbers are in `kernels`).
_FREE = ("store", "segments", "bandwidths", "seed")


def adopt(
    earlier: Path, files: Partials, store: Store, rows: list[int], notice: Callable[[str], None]
) -> int:
    """Copies the parts of an earlier result whose rows the store still begins with.

    Args:
        earlier: the folder of that result, with its `partials/`.
        files: of the new result; segments that it has already are left alone.
        store: with the rows that were appended.
        rows: of each of its segments.
        notice: takes a line on what was adopted.

    Returns:
        Rows that need no scan.

    Raises:
        ParameterError: the result is of another store, other queries or other settings, which are named.
        FormatError: it keeps no partial files.
        VerificationError: a damaged file.
    """
    folder = earlier / FOLDER
    found = files_of(folder) if folder.is_dir() else []
    if not found:
        raise FormatError(
            "no result with its segment sums", file=str(earlier), remedy="give the folder of lmd3 density"
        )
    then = read_configuration(found[0].path)
    now: Mapping[str, Any] = files.configuration
    appended = store.manifest.get("appended") or []
    before = [entry for entry in appended if entry.get("fingerprint") == then.get("store")]
    if not before:
        raise ParameterError(
            "a result over another store than this one was before an append", file=str(earlier)
        )
    ignored = dict.fromkeys(_FREE)
    if other := differences({**then, **ignored}, {**now, **ignored}):
        raise ParameterError(
            f"a result of other settings: {'; '.join(other)}",
            file=str(earlier),
            remedy=f"repeat its settings, and its bandwidths by --bandwidth @{earlier}/bandwidth.json",
        )
    segments = int(then["segments"])
    # Shards end segments, so the old segments are the first of the new ones.
    if sum(rows[:segments]) != before[0]["rows"]:
        raise ParameterError("its segments are not those that the store begins with", file=str(earlier))
    done = 0
    for start, end in files.missing():
        if start >= segments:
            break
        with files.writer() as writer:
            for part in parts_of(owners(found)):
                if start <= int(part["place"][0]) < min(end, segments):
                    writer.add(part)
        done += sum(rows[start : min(end, segments)])
    notice(f"adopted from {earlier}: the sums of {done:,} rows, which are not scanned again")
    return done
