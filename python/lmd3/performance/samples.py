"""What an evaluation harness says of one document, and the outcome table of many such."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from lmd3.errors import DuplicateIdError, InputError, ParameterError
from lmd3.outcomes import OUTCOME_SCHEMA

#: What to do with several values of one document that were not declared as repeated measures.
REPEATS = ("refuse", "last", "mean")


@dataclass(slots=True)
class Sample:
    """The scores of one document under one filter.

    Attributes:
        task, doc: the document: its task and its id there.
        scores: by metric; NaN where it was not scored.
        filter: how answers were taken from what the model wrote, or None.
        epoch: number of a declared repetition, or None.
        hash: of the document, to tell it from another of the same id.
        text, group: fields of the document that were asked for.
        bytes: UTF-8 bytes of the right answer, where a log-probability of it is among the scores.
        file, row: where it stands.
    """

    task: str
    doc: str
    scores: dict[str, float]
    filter: str | None = None
    epoch: str | None = None
    hash: str | None = None
    text: str | None = None
    group: str | None = None
    bytes: int | None = None
    file: str = ""
    row: int = 0


@dataclass
class Log:
    """The samples of some files, and what a reader should know of them.

    Attributes:
        harness: `lm-evaluation-harness`, `lighteval` or `inspect`.
        samples: in the order of the files.
        skipped: metric → why it has no value per document.
        notices: more, in whole sentences.
    """

    harness: str
    samples: list[Sample] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def extend(self, other: Log) -> None:
        """Takes the samples and remarks of another file."""
        self.samples += other.samples
        self.skipped |= other.skipped
        self.notices += [notice for notice in other.notices if notice not in self.notices]


def number(value: Any) -> float:
    """A score as a number: numbers, booleans and their spellings; NaN for none. Else `ValueError`."""
    if value is None:
        return math.nan
    if isinstance(value, str):
        word = value.strip().lower()
        if word in ("true", "false"):
            return float(word == "true")
        return math.nan if word in ("", "none", "null") else float(word)
    if isinstance(value, (bool, int, float)):
        return float(value)
    raise ValueError(f"no number: {value!r}")


def outcomes(
    log: Log, metric: str | None = None, filter: str | None = None, repeats: str = "refuse"
) -> pa.Table:
    """The outcome table of a log; see `lmd3.performance.eval_logs.from_eval_logs`."""
    if repeats not in REPEATS:
        raise ParameterError(f"unknown repeats {repeats!r}", remedy=f"choose one of {', '.join(REPEATS)}")
    if not log.samples:
        raise InputError("no samples in these files")
    samples = _of_filter(log.samples, filter)
    _check_hashes(samples)
    names = _names(samples)
    wanted = _of_metric(names, metric, log)
    several_tasks = len({s.task for s in samples}) > 1
    values: dict[tuple[str, str], dict[str, list[tuple[Sample, float]]]] = {}
    for sample in samples:
        for score, value in sample.scores.items():
            name = names[score, sample.filter]
            if name in wanted:
                key = (sample.task, sample.doc)
                values.setdefault(key, {}).setdefault(name, []).append((sample, value))
    order = _order(list(values))
    rows: list[dict[str, Any]] = []
    counts = {"repeated_lines": 0, "unscored": 0}
    singles: dict[str, set[float]] = {}
    for key in order:
        for name, found in values[key].items():
            row = _row(key, name, found, repeats, several_tasks, counts, singles)
            rows.append(row)
    binary = {name for name, seen in singles.items() if seen and seen <= {0.0, 1.0}}
    repeated = {row["outcome"] for row in rows if row["trials"] > 1}
    for row in rows:
        row["kind"] = "binary" if row["outcome"] in binary else "continuous"
        if row["outcome"] not in repeated:
            row["trials"] = None
    rows.sort(key=lambda row: list(wanted).index(row["outcome"]))
    columns = {name: [row.get(name) for row in rows] for name in OUTCOME_SCHEMA.names}
    table = pa.table(columns, schema=OUTCOME_SCHEMA)
    for name in ("doc_hash", "text"):
        if any(row[name] is not None for row in rows):
            table = table.append_column(name, pa.array([row[name] for row in rows], pa.string()))
    facts = {
        "harness": log.harness,
        "tasks": list(dict.fromkeys(s.task for s in samples)),
        "documents": len(order),
        "outcomes": list(wanted),
        "filters": sorted({s.filter for s in samples if s.filter is not None}),
        "skipped_metrics": log.skipped,
        "notices": [*log.notices, *_notices(samples, counts)],
        **counts,
    }
    return table.replace_schema_metadata({"lmd3": json.dumps(facts)})


def _of_filter(samples: list[Sample], filter: str | None) -> list[Sample]:
    if filter is None:
        return samples
    kept = [s for s in samples if s.filter == filter]
    if not kept:
        there = ", ".join(sorted({s.filter or "none" for s in samples}))
        raise ParameterError(f"no filter {filter!r} in these files", remedy=f"there are: {there}")
    return kept


def _names(samples: list[Sample]) -> dict[tuple[str, str | None], str]:
    """The outcome's name of a metric under a filter: with the filter where a metric has several."""
    filters: dict[str, dict[str | None, None]] = {}
    for sample in samples:
        for score in sample.scores:
            filters.setdefault(score, {})[sample.filter] = None
    return {
        (score, f): score if len(found) == 1 or f is None else f"{score},{f}"
        for score, found in filters.items()
        for f in found
    }


def _of_metric(names: Mapping[tuple[str, str | None], str], metric: str | None, log: Log) -> dict[str, None]:
    wanted = {name: None for (score, _), name in names.items() if metric is None or metric in (score, name)}
    if not names:
        skipped = "; ".join(f"{score}: {why}" for score, why in list(log.skipped.items())[:3])
        raise ParameterError(
            "no sample has a score" + (f" ({skipped})" if skipped else ""),
            remedy="the run failed or was cut off before anything was scored: " + " ".join(log.notices)
            if log.notices
            else "look at the log for why nothing was scored",
        )
    if not wanted:
        why = f" ({log.skipped[metric]})" if metric in log.skipped else ""
        there = ", ".join(dict.fromkeys(names.values())) or "none"
        raise ParameterError(f"no values of metric {metric!r}{why}", remedy=f"there are: {there}")
    return wanted


def _check_hashes(samples: Iterable[Sample]) -> None:
    """One id is one document: files of different versions of a task don't go together."""
    seen: dict[tuple[str, str], Sample] = {}
    for sample in samples:
        first = seen.setdefault((sample.task, sample.doc), sample)
        if first.hash is not None and sample.hash is not None and first.hash != sample.hash:
            raise DuplicateIdError(
                f"doc_id {sample.doc} of task {sample.task} is another document than in row {first.row} of "
                f"{first.file} (their hashes differ)",
                file=sample.file,
                row=sample.row,
                remedy="give files of one version of the task",
            )


def _order(keys: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Tasks as they come, documents by number where all ids of the task are numbers: ranks write unsorted."""
    by_task: dict[str, list[str]] = {}
    for task, doc in keys:
        by_task.setdefault(task, []).append(doc)
    for docs in by_task.values():
        if all(doc.isdigit() for doc in docs):
            docs.sort(key=int)
    return [(task, doc) for task, docs in by_task.items() for doc in docs]


def _row(
    key: tuple[str, str],
    name: str,
    found: list[tuple[Sample, float]],
    repeats: str,
    several_tasks: bool,
    counts: dict[str, int],
    singles: dict[str, set[float]],
) -> dict[str, Any]:
    by_epoch: dict[str | None, list[tuple[Sample, float]]] = {}
    for sample, value in found:
        by_epoch.setdefault(sample.epoch, []).append((sample, value))
    taken: list[float] = []
    for same in by_epoch.values():
        first, value = same[0]
        different = [s for s, v in same[1:] if v != value and not (math.isnan(v) and math.isnan(value))]
        if different and repeats == "refuse":
            again = different[0]
            raise DuplicateIdError(
                f"doc_id {again.doc} of task {again.task} has two values of {name}: the first stands in row "
                f"{first.row} of {first.file}",
                file=again.file,
                row=again.row,
                remedy="give the files of one run, or say --repeats last (an appended file) or mean "
                "(repeated measures)",
            )
        if different and repeats == "mean":
            taken += [v for _, v in same]
        else:
            counts["repeated_lines"] += len(same) - 1
            taken.append(same[-1][1])
    scored = [v for v in taken if not math.isnan(v)]
    if not scored:
        counts["unscored"] += 1
    known = singles.setdefault(name, set())
    if len(known) < 3:
        # Three different values are enough to know that it is not 0 or 1.
        known.update(scored)
    last = found[-1][0]
    return {
        "id": f"{key[0]}/{key[1]}" if several_tasks else key[1],
        "outcome": name,
        "value": float(np.mean(scored)) if scored else None,
        "trials": max(len(scored), 1),
        "bytes": last.bytes if name.startswith(("gold_", "margin", "nats_", "bits_")) else None,
        "group": last.group if last.group is not None else key[0] if several_tasks else None,
        "doc_hash": last.hash,
        "text": last.text,
    }


def _notices(samples: list[Sample], counts: Mapping[str, int]) -> list[str]:
    out = []
    if counts["repeated_lines"]:
        out.append(f"{counts['repeated_lines']:,} lines repeat a value that was there already.")
    if counts["unscored"]:
        out.append(f"{counts['unscored']:,} values are missing: these documents were not scored.")
    documents = {(s.task, s.hash): s.doc for s in samples if s.hash is not None}
    repeated = len({(s.task, s.doc) for s in samples if s.hash is not None}) - len(documents)
    if repeated:
        out.append(f"{repeated:,} documents are the copy of another (same hash, other doc_id).")
    return out
