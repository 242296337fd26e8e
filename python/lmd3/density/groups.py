"""Which groups' sums are kept apart, where a corpus has more than memory and disk have room for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lmd3.errors import FileMissingError, ParameterError, TextFormatError
from lmd3.store import Store

#: What the groups that are not kept apart are called together.
OTHER = "(other)"

#: Their code: no group's, also after rows of new groups were appended.
OTHER_CODE = 2**32 - 1


def choose_groups(store: Store, chosen: str | Path | Sequence[str]) -> tuple[int, ...]:
    """Codes of the groups to keep apart, ascending.

    Args:
        store: the corpus.
        chosen: "top:K" (the K groups with most rows), a file of names, one a line, or a list of names.

    Raises:
        ParameterError: no such groups, or none.
        FileMissingError, TextFormatError: the file is not there, or not UTF-8.
    """
    codes = {name: code for code, name in enumerate(store.groups)}
    if isinstance(chosen, str) and chosen.startswith("top:"):
        count = chosen.removeprefix("top:")
        if not count.isdecimal() or int(count) < 1:
            raise ParameterError(f"--groups {chosen!r}: no number of groups", remedy="for example top:50")
        rows = _rows(store)
        # Of equal groups the one that came first.
        top = np.argsort(-rows, kind="stable")[: int(count)]
        return tuple(sorted(int(code) for code in top))
    if isinstance(chosen, (str, Path)):
        path = Path(chosen)
        try:
            names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except FileNotFoundError:
            raise FileMissingError(
                "no such file of group names",
                file=str(path),
                remedy="give top:K, or a file with a name a line",
            ) from None
        except UnicodeDecodeError:
            raise TextFormatError("not UTF-8", file=str(path)) from None
    else:
        path, names = None, list(chosen)
    unknown = [name for name in names if name not in codes]
    if unknown or not names:
        what = f"no group {unknown[0]!r} in the corpus" if unknown else "no group named"
        some = ", ".join(store.groups[:5])
        raise ParameterError(
            what, file=None if path is None else str(path), remedy=f"its groups are {some} …"
        )
    return tuple(sorted({codes[name] for name in names}))


def group_map(store: Store, kept: Sequence[int]) -> NDArray[np.uint32]:
    """New codes of all groups: kept ones keep theirs, all others get `OTHER_CODE`."""
    codes = np.full(len(store.groups), OTHER_CODE, np.uint32)
    codes[list(kept)] = kept
    return codes


def group_slots(store: Store, kept: Sequence[int] | None) -> tuple[NDArray[np.uint32], list[int]]:
    """For each code of the store the number of the group that it counts to, and the codes of these groups as
    an exact scan gives them; all groups are kept apart where `kept` is None."""
    if kept is None:
        return np.arange(len(store.groups), dtype=np.uint32), list(range(len(store.groups)))
    slots = np.full(len(store.groups), len(kept), np.uint32)
    slots[list(kept)] = np.arange(len(kept))
    return slots, [*kept, OTHER_CODE] if len(kept) < len(store.groups) else list(kept)


def group_name(store: Store, code: int) -> str:
    """The name of a code of a scan."""
    return OTHER if code == OTHER_CODE else store.groups[code]


def _rows(store: Store) -> NDArray[np.int64]:
    """Rows of each group."""
    noted = store.manifest.get("groups", [])
    if noted and all("rows" in group for group in noted):
        return np.array([group["rows"] for group in noted], np.int64)
    codes = store.group_codes()
    assert codes is not None  # it has groups
    return np.bincount(codes, minlength=len(store.groups)).astype(np.int64)
