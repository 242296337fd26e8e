"""Unique ids, in memory and by an external sort."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lmd3.unique
from lmd3.errors import DuplicateIdError
from lmd3.unique import UniqueIds


def prove(ids: Sequence[str], run: int, step: int = 3) -> None:
    with UniqueIds(run=run) as unique:
        for start in range(0, len(ids), step):
            unique.add(ids[start : start + step])
        unique.check(lambda rows: [ids[row] for row in rows], file="f")


@settings(max_examples=150, deadline=None)
@given(
    ids=st.lists(st.text(st.sampled_from("ab"), max_size=4), max_size=40),
    run=st.sampled_from([1, 2, 5, 16, 1000]),
    step=st.integers(1, 7),
)
def test_the_first_repeated_id_is_found(ids: list[str], run: int, step: int) -> None:
    seen: dict[str, int] = {}
    expected = None
    for row, name in enumerate(ids):
        if name in seen:
            expected = (name, seen[name], row)
            break
        seen[name] = row
    if expected is None:
        prove(ids, run, step)
        return
    name, first, second = expected
    with pytest.raises(DuplicateIdError) as caught:
        prove(ids, run, step)
    assert caught.value.message == f"the id {name!r} occurs twice: in row {first} and in row {second}"
    assert (caught.value.file, caught.value.row) == ("f", second)


@pytest.mark.parametrize("run", [4, 1000])
def test_equal_hashes_are_not_equal_ids(run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas.util

    def same(values: Any, categorize: bool) -> Any:
        return np.full(len(values), 7, np.uint64)

    monkeypatch.setattr(pandas.util, "hash_array", same)
    monkeypatch.setattr(lmd3.unique, "_SUSPECTS", 5)
    prove([f"n{i}" for i in range(30)], run)
    with pytest.raises(DuplicateIdError, match="'n3' occurs twice: in row 3 and in row 12"):
        prove([f"n{i}" for i in range(12)] + ["n3"], 1000)


def test_many_runs() -> None:
    ids = [str(i) for i in range(20_000)]
    prove(ids, 1024, 4096)
    ids[19_999] = "17"
    with pytest.raises(DuplicateIdError, match="'17' occurs twice: in row 17 and in row 19999"):
        prove(ids, 1024, 4096)
