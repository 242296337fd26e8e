"""Outcome tables: what a model achieved on every query, as (id, value) and what is known beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from lmd3 import tables
from lmd3.errors import ColumnError, InputError, NotFiniteError

#: Columns of every outcome table, in this order; what a source lacks is null.
OUTCOME_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("outcome", pa.string(), nullable=False),
        pa.field("value", pa.float64()),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("trials", pa.int64()),
        pa.field("weight", pa.float64()),
        pa.field("tokens", pa.int64()),
        pa.field("bytes", pa.int64()),
        pa.field("group", pa.string()),
    ]
)
KINDS = ("continuous", "binary")


def read_outcomes(
    source: str | Path | pa.Table | pd.DataFrame,
    id: str | None = None,
    value: str | None = None,
    outcome: str | None = None,
) -> pa.Table:
    """Reads a table of outcomes: CSV, JSONL or parquet, or one already in memory.

    Args:
        source: path or table.
        id: the id column; by default `id`, else `doc_id`, else the row's number counted from 0.
        value: the value column; by default `value`, else the only column of numbers besides the id.
        outcome: which outcome to take where the table names several in a column `outcome`; for a table
            without that column, the name to give (by default that of the value column).

    Returns:
        A table with the columns of `OUTCOME_SCHEMA` and behind them the source's other columns as they are.
        `value` is null where the source has none (the analysis counts those). `kind` is the source's own
        where it has one, else `binary` where all values are 0 or 1, true or false, or whole numbers of
        successes over the row's `trials`; else `continuous`.

    Raises:
        FileMissingError, FormatError, TextFormatError: as `lmd3.tables.read_table`.
        ColumnError: a column is missing, not numeric, or the value column can't be told.
        DuplicateIdError: an id occurs twice for one outcome.
        NotFiniteError: an infinite value.
        InputError: no rows; an outcome that the table lacks.
    """
    file = str(source) if isinstance(source, (str, Path)) else None
    frame = tables.as_frame(source)
    if frame.empty:
        raise InputError("an outcome table without rows", file=file)
    ids = tables.row_ids(frame, id, file)
    value = _value_column(frame, value, id, file)
    values = tables.numbers(frame[value], value, file)
    infinite = np.flatnonzero(np.isinf(values))
    if len(infinite):
        raise NotFiniteError(f"an infinite value in column {value!r}", file=file, row=int(infinite[0]))
    if "outcome" in frame.columns and value != "outcome":
        names = [str(name) for name in frame["outcome"]]
    else:
        names = [outcome or (value if value != "value" else "outcome")] * len(ids)
    for name in dict.fromkeys(names):
        of_name = [row for row, found in enumerate(names) if found == name]
        chosen = ids if len(of_name) == len(ids) else [ids[row] for row in of_name]
        tables.refuse_duplicates(chosen, file)

    kinds = _kinds(frame, names, values, value, file)
    columns: dict[str, Any] = {
        "id": ids,
        "outcome": names,
        "value": pa.array(_counted(frame, kinds, values, file), pa.float64(), from_pandas=True),
        "kind": kinds,
    }
    for field in OUTCOME_SCHEMA:
        if field.name not in columns:
            columns[field.name] = _optional(frame, field, {id, value}, file)
    table = pa.table(columns, schema=OUTCOME_SCHEMA)
    for name in frame.columns:
        if name not in table.column_names and name not in (id, value):
            table = table.append_column(str(name), _carried(frame[name]))
    if outcome is not None and "outcome" in frame.columns and value != "outcome":
        table = choose_outcome(table, outcome, file)
    return table


def choose_outcome(table: pa.Table, outcome: str | None, file: str | None = None) -> pa.Table:
    """The rows of one outcome of a table; `None` stands for the only one there is.

    Raises:
        InputError: the table lacks it, or holds several and none is named.
    """
    there = list(dict.fromkeys(table["outcome"].to_pylist()))
    if outcome is None and len(there) == 1:
        return table
    if outcome is None:
        raise InputError("several outcomes in one table", file=file, remedy=f"name one of {_list(there)}")
    if outcome not in there:
        raise InputError(f"no outcome {outcome!r}", file=file, remedy=f"there are: {_list(there)}")
    return table.filter(pc.equal(table["outcome"], outcome))


def _list(names: list[str], most: int = 8) -> str:
    return ", ".join(map(repr, names[:most])) + (", …" if len(names) > most else "")


def _value_column(frame: pd.DataFrame, value: str | None, id: str | None, file: str | None) -> str:
    if value is not None:
        tables.column(frame, value, file)
        return value
    if "value" in frame.columns:
        return "value"
    taken = {id, "id", "doc_id", *OUTCOME_SCHEMA.names}
    found = [str(n) for n in frame.columns if n not in taken and tables.is_numeric(frame[n])]
    if len(found) == 1:
        return found[0]
    raise ColumnError(
        "no column 'value'",
        file=file,
        remedy=f"name the value column (--outcome-value): {_list(found or list(map(str, frame.columns)))}",
    )


def _kinds(
    frame: pd.DataFrame, names: list[str], values: np.ndarray, value: str, file: str | None
) -> list[str]:
    """Kind of every row: the same for all rows of an outcome."""
    stated = frame["kind"] if "kind" in frame.columns and value != "kind" else None
    kinds: dict[str, str] = {}
    for name in dict.fromkeys(names):
        rows = np.array([found == name for found in names])
        known = values[rows & ~np.isnan(values)]
        is_binary = len(known) > 0 and bool(np.isin(known, (0.0, 1.0)).all())
        kinds[name] = "binary" if is_binary else "continuous"
        if stated is None:
            if "trials" in frame.columns and kinds[name] == "continuous" and len(known):
                shares = _is_share(frame, values, file)[rows & ~np.isnan(values)]
                several = (tables.numbers(frame["trials"], "trials", file)[rows] > 1).any()
                kinds[name] = "binary" if several and shares.all() else "continuous"
            continue
        told = set(stated[rows].dropna().astype(str))
        if not told <= set(KINDS) or len(told) > 1:
            raise ColumnError(f"kind of outcome {name!r} must be one of continuous, binary", file=file)
        if told == {"binary"} and not is_binary and len(known):
            bad = np.flatnonzero(rows & ~np.isnan(values) & ~_is_share(frame, values, file))
            if len(bad):
                row = int(bad[0])
                raise ColumnError(
                    f"outcome {name!r} is said to be binary but has the value {values[row]:g}",
                    file=file,
                    row=row,
                    remedy="a share of successes needs its number of trials in a column `trials`",
                )
        if told:
            kinds[name] = told.pop()
    return [kinds[name] for name in names]


def _is_share(frame: pd.DataFrame, values: np.ndarray, file: str | None) -> np.ndarray:
    """Whether every value is 0, 1, or a whole number of successes over the row's trials."""
    whole = np.isin(values, (0.0, 1.0))
    if "trials" not in frame.columns:
        return whole
    trials = tables.numbers(frame["trials"], "trials", file)
    successes = values * trials
    with np.errstate(invalid="ignore"):
        # Files hold shares to three digits and more.
        allowed = np.clip(6e-4 * trials, 1e-6, 0.05)
        counted = np.abs(successes - np.round(successes)) <= allowed
        shares: np.ndarray = whole | (counted & (values >= 0) & (values <= 1))
    return shares


def _counted(frame: pd.DataFrame, kinds: list[str], values: np.ndarray, file: str | None) -> np.ndarray:
    """Values, shares of a binary outcome's trials freed of the rounding that their file has."""
    shares = (np.array(kinds) == "binary") & ~np.isin(values, (0.0, 1.0)) & ~np.isnan(values)
    if not shares.any():
        return values
    trials = tables.numbers(frame["trials"], "trials", file)
    return np.where(shares, np.round(values * trials) / trials, values)


def _optional(frame: pd.DataFrame, field: pa.Field, used: set[str | None], file: str | None) -> pa.Array:
    if field.name not in frame.columns or field.name in used:
        return pa.nulls(len(frame), field.type)
    if pa.types.is_string(field.type):
        return pa.array([None if pd.isna(v) else str(v) for v in frame[field.name]], pa.string())
    found = pa.array(tables.numbers(frame[field.name], field.name, file), pa.float64(), from_pandas=True)
    try:
        return found.cast(field.type)
    except pa.ArrowInvalid:
        raise ColumnError(f"column {field.name!r} must hold whole numbers", file=file) from None


def _carried(values: pd.Series[Any]) -> pa.Array:
    """A column that is only passed on: with its own type where Arrow has one for it, else as strings."""
    try:
        return pa.array(values, from_pandas=True)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if v is None else str(v) for v in values], pa.string())
