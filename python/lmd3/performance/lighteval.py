"""Reads the details that lighteval writes with `--save-details`.

Columns are `doc`, `metric`, `model_response` (also spelled `__doc__` …); older versions have `example`,
`metrics`, `predictions`, `choices`, `gold_index`, and no id. Documents are shuffled before they are scored,
so a row's number is not its place in the data set: the id is `doc.id`, and where there is none, a notice says
that ids are row numbers.
"""

from __future__ import annotations

import ast
import json
import math
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lmd3.errors import FormatError
from lmd3.performance.samples import Log, Sample, number

HARNESS = "lighteval"

_NEW = ({"doc", "metric"}, {"__doc__", "__metric__"})
_OLD = {"example", "metrics"}
_RESPONSES = ("model_response", "__model_response__", "predictions", "choices", "gold_index", "specifics")
_COLUMNS = ("doc", "metric", "__doc__", "__metric__", "example", "metrics", *_RESPONSES)


def is_details(columns: set[str]) -> bool:
    """Whether these are the columns of such a file."""
    return any(names <= columns for names in (*_NEW, _OLD))


def read(path: Path, text: str | None = None, group: str | None = None) -> Log:
    """The samples of one parquet file; arguments as of `lmd3.performance.lm_eval.read`.

    Raises:
        FormatError: not such a file.
    """
    log = Log(HARNESS)
    task = _task_of(path)
    try:
        file = pq.ParquetFile(path)
        names = set(file.schema_arrow.names)
    except (pa.ArrowException, OSError) as error:
        raise FormatError(f"not a readable parquet file: {error}", file=str(path)) from None
    if not is_details(names):
        raise FormatError("not the details of lighteval", file=str(path))
    wanted = [name for name in _COLUMNS if name in names]
    row = 0
    with file:
        for batch in file.iter_batches(batch_size=1024, columns=wanted):
            for record in batch.to_pylist():
                log.samples.append(_sample(record, path, row, task, text, group, log))
                row += 1
    ids = [sample.doc for sample in log.samples]
    if any(not i for i in ids) or len(set(ids)) < len(ids):
        for number_, sample in enumerate(log.samples):
            sample.doc = str(number_)
        log.notices.append(
            f"Task {task}: its documents have no ids of their own: ids are row numbers of the file, in the "
            "order of scoring, which may not be that of the data set."
        )
    return log


def _task_of(path: Path) -> str:
    found = re.match(r"^details_(?P<task>.+?)(?:_\d{4}-\d\d-\d\dT[\d.:+-]+)?$", path.stem)
    return found["task"] if found else path.stem


def _sample(
    record: dict[str, Any],
    path: Path,
    row: int,
    task: str,
    text: str | None,
    group: str | None,
    log: Log,
) -> Sample:
    if "example" in record and "doc" not in record and "__doc__" not in record:
        doc = {"query": record["example"], **{k: _plain(record.get(k)) for k in ("choices", "gold_index")}}
        doc |= {"specific": _plain(record.get("specifics"))}
        scores, answers = _plain(record["metrics"]), _plain(record.get("predictions"))
    else:
        doc = _plain(record.get("doc", record.get("__doc__"))) or {}
        scores = _plain(record.get("metric", record.get("__metric__")))
        response = _plain(record.get("model_response", record.get("__model_response__"))) or {}
        answers = response.get("logprobs")
    if not isinstance(doc, dict) or not isinstance(scores, dict):
        raise FormatError("no document or no metrics in this row", file=str(path), row=row)
    sample = Sample(str(doc.get("task_name") or task), str(doc.get("id") or ""), {}, file=str(path), row=row)
    sample.text, sample.group = _field(doc, text, path, row), _field(doc, group, path, row)
    for name, value in scores.items():
        try:
            sample.scores[name] = number(value)
        except ValueError:
            log.skipped.setdefault(name, "no number for each document")
    _gold(sample, doc, answers)
    return sample


def _gold(sample: Sample, doc: dict[str, Any], answers: Any) -> None:
    """Log-probability of the right answer and its margin, where every choice has one."""
    choices, gold = doc.get("choices"), doc.get("gold_index")
    gold = gold[0] if isinstance(gold, list) and len(gold) == 1 else gold
    if not isinstance(answers, list) or not isinstance(choices, list) or len(answers) != len(choices):
        return
    logs = [pair[0] if isinstance(pair, (list, tuple)) and len(pair) == 2 else pair for pair in answers]
    if not isinstance(gold, int) or not 0 <= gold < len(logs) or len(logs) < 2:
        return
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in logs):
        return
    if not all(math.isfinite(value) for value in logs):
        return
    others = [float(value) for i, value in enumerate(logs) if i != gold]
    sample.scores["gold_log_probability"] = float(logs[gold])
    sample.scores["margin"] = float(logs[gold]) - max(others)
    sample.bytes = len(str(choices[gold]).encode())


def _plain(value: Any) -> Any:
    """A value that some versions write as its own spelling in a string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return value


def _field(doc: dict[str, Any], name: str | None, path: Path, row: int) -> str | None:
    if name is None:
        return None
    value: Any = doc
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if value is None:
        raise FormatError(
            f"the document has no field {name!r}",
            file=str(path),
            row=row,
            remedy=f"there are: {', '.join(map(str, doc))}",
        )
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
