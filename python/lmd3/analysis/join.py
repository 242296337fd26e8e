"""Joins outcomes, densities and covariates on string ids; what does not join is counted and named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from lmd3 import tables
from lmd3.errors import ColumnError, FileMissingError, InputError, JoinError, ParameterError

#: How many ids are named where some do not join.
NAMED = 5


@dataclass(frozen=True)
class Specification:
    """One version of the predictor: a kernel and bandwidth of a density table, or a plain column.

    `kernel`, `bandwidth` and `rule` are None for a plain column.
    """

    predictor: str
    kernel: str | None = None
    bandwidth: float | None = None
    rule: str | None = None

    @property
    def column(self) -> str:
        """The name under which its values stand in `Joined.frame`."""
        return self.predictor if self.kernel is None else f"{self.predictor}:{self.kernel}:{self.bandwidth!r}"

    @property
    def setting(self) -> str:
        """Kernel and bandwidth as words; empty for a plain column."""
        if self.kernel is None:
            return ""
        rule = f" ({self.rule})" if self.rule and "=" in self.rule else ""
        return f"{self.kernel}, h = {self.bandwidth:.4g}{rule}"


@dataclass(frozen=True)
class Predictors:
    """The density side of a study.

    Attributes:
        frame: one row per query: `id`, one column per specification, and whatever is known of the queries.
        specifications: the first is the primary one.
        ess: effective sample size per specification, indexed by id; None where unknown.
        errors: standard error of the predictor per specification, likewise.
        density: rows per group of the corpus (`--by-group`), or None.
        neighbors: the neighbours' table, or None.
        run: settings of the density run.
        file: where it came from, for messages.
    """

    frame: pd.DataFrame
    specifications: list[Specification]
    ess: list[pd.Series[Any] | None]
    errors: list[pd.Series[Any] | None]
    density: pd.DataFrame | None
    neighbors: pd.DataFrame | None
    run: dict[str, Any]
    file: str | None


@dataclass
class Joined:
    """One row per query that has everything the study needs.

    Attributes:
        frame: `id`, `value`, one column per specification, controls, cluster and group columns.
        counts: rows read, joined and dropped, by reason.
        unmatched: up to five ids of each side that did not join.
    """

    frame: pd.DataFrame
    counts: dict[str, Any]
    unmatched: dict[str, list[str]] = field(default_factory=dict)


def read_predictors(
    density: Any,
    predictor: str = "log_density",
    bandwidth: Sequence[float | str] | None = None,
    id: str | None = None,
) -> Predictors:
    """The predictor, and what is known of the queries, from a density table or any other.

    Args:
        density: a `DensityTable` (anything with `density`, `queries`, `neighbors` and `run`), a folder of
            its files, or any table with an id and the predictor column.
        predictor: `log_density`, or a column of the queries' table or of the plain table.
        bandwidth: restricts a density table to these, numbers or rules as they stand in it; the first
            becomes the primary one.
        id: id column of a plain table; by default as `lmd3.tables.row_ids`.

    Raises:
        FileMissingError, ColumnError, DuplicateIdError, ParameterError.
    """
    file = str(density) if isinstance(density, (str, Path)) else None
    if file is not None and Path(file).is_dir():
        parts = _read_folder(Path(file))
    elif all(hasattr(density, name) for name in ("density", "queries", "neighbors", "run")):
        parts = {name: getattr(density, name) for name in ("density", "queries", "neighbors")}
        parts["run"] = density.run
    else:
        frame = tables.as_frame(density)
        if not {"id", "kernel", "bandwidth", "log_density"} <= set(frame.columns):
            return _plain(frame, predictor, bandwidth, id, file)
        parts = {"density": frame, "queries": None, "neighbors": None, "run": {}}
    return _of_density(parts, predictor, bandwidth, file)


def _read_folder(folder: Path) -> dict[str, Any]:
    import json

    def optional(name: str) -> pd.DataFrame | None:
        return tables.read_table(folder / name) if (folder / name).is_file() else None

    if not (folder / "density.parquet").is_file():
        raise FileMissingError(
            "no density.parquet in this folder", file=str(folder), remedy="make one with `lmd3 density`"
        )
    run: dict[str, Any] = {}
    if (folder / "run.json").is_file():
        try:
            run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"not valid JSON: {error}", file=str(folder / "run.json")) from None
    return {
        "density": optional("density.parquet"),
        "queries": optional("queries.parquet"),
        "neighbors": optional("neighbors.parquet"),
        "run": run,
    }


def _plain(
    frame: pd.DataFrame,
    predictor: str,
    bandwidth: Sequence[float | str] | None,
    id: str | None,
    file: str | None,
) -> Predictors:
    if bandwidth:
        raise ParameterError("a bandwidth can be chosen of a density table only", file=file)
    values = tables.numbers(tables.column(frame, predictor, file), predictor, file)
    ids = tables.row_ids(frame, id, file)
    tables.refuse_duplicates(ids, file)
    frame = frame.drop(columns=["id"], errors="ignore").assign(**{predictor: values})
    frame.insert(0, "id", ids)
    return Predictors(frame, [Specification(predictor)], [None], [None], None, None, {}, file)


def _of_density(
    parts: Mapping[str, Any], predictor: str, bandwidth: Sequence[float | str] | None, file: str | None
) -> Predictors:
    density = tables.as_frame(parts["density"])
    queries = None if parts["queries"] is None else tables.as_frame(parts["queries"])
    neighbors = None if parts["neighbors"] is None else tables.as_frame(parts["neighbors"])
    run = dict(parts["run"] or {})
    for name in ("id", "kernel", "bandwidth", "log_density"):
        tables.column(density, name, file)
    whole = density[density["group"].isna()] if "group" in density.columns else density
    ids = list(dict.fromkeys(_strings(whole["id"])))
    frame = pd.DataFrame({"id": ids})
    if queries is not None:
        queries = queries.assign(id=tables.row_ids(queries, "id", file))
        tables.refuse_duplicates(list(queries["id"]), file)
        frame = frame.merge(queries, on="id", how="left")
    if predictor != "log_density":
        if bandwidth:
            raise ParameterError(f"{predictor} does not depend on a bandwidth", file=file)
        values = tables.numbers(tables.column(frame, predictor, file), predictor, file)
        frame = frame.assign(**{predictor: values})
        return Predictors(frame, [Specification(predictor)], [None], [None], None, neighbors, run, file)

    specifications, ess, errors = [], [], []
    for kernel, h, rule in _order(whole, run, bandwidth, file):
        rows = whole[(whole["kernel"] == kernel) & (whole["bandwidth"] == h)]
        rows = rows.assign(id=_strings(rows["id"]))
        tables.refuse_duplicates(list(rows["id"]), file, f"at bandwidth {h:g}, id")
        specification = Specification(predictor, kernel, h, rule)
        by_id = rows.set_index("id")
        frame[specification.column] = by_id["log_density"].reindex(ids).to_numpy(dtype=np.float64)
        specifications.append(specification)
        ess.append(by_id["ess"] if "ess" in rows and rows["ess"].notna().any() else None)
        errors.append(by_id["std_error"] if "std_error" in rows and rows["std_error"].notna().any() else None)
    by_group = None
    if "group" in density.columns and {"kernel_sum_log", "rows_evaluated"} <= set(density.columns):
        by_group = density.assign(id=density["id"].astype(str))
        by_group = by_group if by_group["group"].notna().any() else None
    return Predictors(frame, specifications, ess, errors, by_group, neighbors, run, file)


def less_reference(of: Predictors, reference: Predictors, name: str | None = None) -> Predictors:
    """log density less that under a reference corpus, at the same kernels and bandwidths.

    Args:
        of: the densities.
        reference: those taken off.
        name: of the new predictor [that of the densities].

    Raises:
        ParameterError: the two were not made with the same numbers, or neither is a density table.
    """
    # A bandwidth of the query's own is another one under another corpus.
    fixed = [n for n, s in enumerate(of.specifications) if not str(s.rule).startswith("adaptive=")]
    of = replace(
        of,
        specifications=[of.specifications[n] for n in fixed],
        ess=[of.ess[n] for n in fixed],
        errors=[of.errors[n] for n in fixed],
    )
    theirs = {(s.kernel, s.bandwidth): s for s in reference.specifications}
    named = of.specifications if name is None else [replace(s, predictor=name) for s in of.specifications]
    frame, other = of.frame.copy(), reference.frame.set_index("id")
    errors: list[pd.Series[Any] | None] = []
    for s, own, new in zip(of.specifications, of.errors, named, strict=True):
        match = theirs.get((s.kernel, s.bandwidth))
        if s.kernel is None or match is None:
            raise ParameterError(
                f"the reference densities lack {s.setting or s.predictor}",
                file=reference.file,
                remedy="make both with one `bandwidth.json` (--bandwidth @bandwidth.json)",
            )
        under = other[match.column].reindex(frame["id"]).to_numpy(dtype=np.float64)
        frame[new.column] = frame[s.column].to_numpy(dtype=np.float64) - under
        its = reference.errors[reference.specifications.index(match)]
        both = own is not None and its is not None
        errors.append(np.hypot(own, its.reindex(own.index)) if both else None)  # type: ignore[union-attr,arg-type]
    return replace(of, frame=frame, specifications=named, errors=errors, density=None)


def _strings(values: pd.Series[Any]) -> list[str]:
    """Values as strings of Python: those of Arrow are slow one by one."""
    return [str(v) for v in values.to_numpy(dtype=object)]


def _order(
    whole: pd.DataFrame, run: Mapping[str, Any], wanted: Sequence[float | str] | None, file: str | None
) -> list[tuple[str, float, str | None]]:
    """(kernel, bandwidth, rule) of a density table, the primary one first."""
    has_rule = "rule" in whole.columns
    there: dict[tuple[str, float], str | None] = {}
    different = whole[["kernel", "bandwidth", *(["rule"] if has_rule else [])]].drop_duplicates()
    columns = [different["kernel"], different["bandwidth"], different["rule" if has_rule else "kernel"]]
    for kernel, h, rule in zip(*columns, strict=True):
        there.setdefault((str(kernel), float(h)), str(rule) if has_rule and not pd.isna(rule) else None)
    order = list(there)
    # The run's own order decides; its numbers and the table's are the same doubles.
    stated = [(str(b.get("kernel")), b.get("bandwidth")) for b in run.get("bandwidths", [])]
    order.sort(key=lambda key: stated.index(key) if key in stated else len(stated))
    if wanted:
        chosen: list[tuple[str, float]] = []
        for asked in wanted:
            found = [key for key in order if _matches(asked, key[1], there[key])]
            if not found:
                listed = ", ".join(
                    f"{h:.6g}" + (f" ({there[k, h]})" if there[k, h] else "") for k, h in order
                )
                raise ParameterError(f"no bandwidth {asked} in the density table", file=file, remedy=listed)
            chosen += [key for key in found if key not in chosen]
        order = chosen
    return [(kernel, h, there[kernel, h]) for kernel, h in order]


def _matches(asked: float | str, h: float, rule: str | None) -> bool:
    if isinstance(asked, str) and asked == rule:
        return True
    try:
        return bool(np.isclose(float(asked), h, rtol=1e-6, atol=0))
    except ValueError:
        return False


def join(
    outcome: pa.Table,
    predictors: Predictors,
    covariates: pd.DataFrame | None,
    *,
    files: Mapping[str, str | None] | None = None,
) -> Joined:
    """Joins one outcome with the predictors and covariates; see `Joined`.

    A column that several tables have is taken from the queries' table, else the covariates, else the
    outcomes.

    Raises:
        JoinError: no id joins; the message shows ids of both sides.
        DuplicateIdError: an id occurs twice among the covariates.
    """
    files = files or {}
    left = predictors.frame
    right = tables.as_frame(outcome)
    names = right["outcome"].iloc[0]
    right = right.drop(columns=["outcome", "kind"])
    asked, answered = _strings(left["id"]), _strings(right["id"])
    known, scored = set(asked), set(answered)
    unmatched = {
        "outcomes": [i for i in answered if i not in known],
        "queries": [i for i in asked if i not in scored],
    }
    if len(unmatched["outcomes"]) == len(right):
        raise JoinError(
            f"no id of outcome {names!r} is one of a query",
            file=files.get("outcomes"),
            remedy=f"ids of outcomes: {_some(right['id'])}; of queries: {_some(left['id'])}",
        )
    counts: dict[str, Any] = {
        "queries_read": len(left),
        "outcomes_read": len(right),
        "outcomes_without_query": len(unmatched["outcomes"]),
        "queries_without_outcome": len(unmatched["queries"]),
    }
    frame = left
    if covariates is not None:
        covariates = covariates.assign(id=tables.row_ids(covariates, None, files.get("covariates")))
        described_ids = _strings(covariates["id"])
        tables.refuse_duplicates(described_ids, files.get("covariates"))
        described = set(described_ids)
        unmatched["covariates"] = [i for i in asked if i in scored and i not in described]
        if not described & known & scored:
            raise JoinError(
                "no id of the covariates is one of a query with an outcome",
                file=files.get("covariates"),
                remedy=f"ids of covariates: {_some(covariates['id'])}; of queries: {_some(left['id'])}",
            )
        counts["without_covariates"] = len(unmatched["covariates"])
        new = ["id"] + [c for c in covariates.columns if c != "id" and c not in frame.columns]
        frame = frame.merge(covariates[new], on="id", how="inner" if unmatched["covariates"] else "left")
    # An empty standard column of the outcomes must not hide one of the same name elsewhere.
    extra = [c for c in right.columns if c not in frame.columns and not right[c].isna().all()]
    frame = frame.merge(right[["id", *(["value"] if "value" not in extra else []), *extra]], on="id")
    counts["joined"] = len(frame)
    missing = frame["value"].isna().to_numpy()
    counts["unscored"] = int(missing.sum())
    return Joined(
        frame[~missing].reset_index(drop=True),
        counts,
        {side: ids[:NAMED] for side, ids in unmatched.items() if ids},
    )


def _some(ids: Sequence[str] | pd.Series[Any], most: int = 3) -> str:
    shown = [repr(i) for i in list(ids)[:most]]
    return ", ".join(shown) + (", …" if len(ids) > most else "")


def labels(frame: pd.DataFrame, name: str, file: str | None = None) -> pd.Series[Any]:
    """A column of labels as strings, None where missing.

    Raises:
        ColumnError: no such column in any of the joined tables.
    """
    if name not in frame.columns:
        usable = [str(c) for c in frame.columns if ":" not in str(c) and c not in ("id", "value")]
        raise ColumnError(
            f"no column {name!r} in the outcomes, covariates or queries",
            file=file,
            remedy=f"there are: {', '.join(usable[:12])}",
        )
    values = frame[name]
    return pd.Series([None if pd.isna(v) else str(v) for v in values], index=frame.index, dtype=object)
