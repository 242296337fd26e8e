"""Outcomes from the logs of evaluation harnesses: lm-evaluation-harness, lighteval, inspect."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lmd3.errors import FileMissingError, FormatError, Lmd3Error, ParameterError
from lmd3.performance import inspect_logs, lighteval, lm_eval, samples
from lmd3.performance.samples import Log

__all__ = ["files_of", "from_eval_logs", "from_inspect", "from_lighteval", "from_lm_eval", "harness_of"]

_PATTERNS = {
    lm_eval.HARNESS: ("samples_*.jsonl", "samples_*.jsonl.gz", "samples_*.jsonl.zst"),
    lighteval.HARNESS: ("details_*.parquet",),
    inspect_logs.HARNESS: ("*.eval",),
}


def from_eval_logs(
    files: str | Path | Sequence[str | Path],
    *,
    metric: str | None = None,
    filter: str | None = None,
    repeats: str = "refuse",
    text: str | None = None,
    group: str | None = None,
) -> pa.Table:
    """The outcomes that evaluation logs hold, whatever harness wrote them.

    Args:
        files: logs of one harness, or folders of such; patterns (`samples_*.jsonl`) are allowed.
        metric: one metric only; by default all of them, an outcome each. Log-probabilities give
            `gold_log_probability` (nats, of the right answer) and `margin` (over the best wrong one).
        filter: answers taken by this filter only (lm-evaluation-harness). Where a metric has several, its
            outcomes are named `metric,filter`.
        repeats: of several values of one document that are not epochs: `refuse` differing ones, take the
            `last`, or their `mean` with the number of trials. Equal ones are one.
        text, group: fields of the document to carry, such as `question` and `subject`.

    Returns:
        The outcome table. Ids are `doc_id` for one task and `task/doc_id` for several (then the group is the
        task). Behind it stand `doc_hash` and `text` where known. The schema's metadata holds JSON under
        `lmd3`: harness, tasks, metrics that have no value per document, notices, counts.

    Raises:
        FileMissingError: no such file; a folder without logs.
        FormatError, TextFormatError: not a log, or a broken one.
        DuplicateIdError: one id, two documents; or two values and `repeats="refuse"`.
        ParameterError: no such metric or filter; logs of several harnesses.
    """
    return samples.outcomes(_read(files, text, group), metric, filter, repeats)


def from_lm_eval(
    files: str | Path | Sequence[str | Path], *, metric: str | None = None, filter: str | None = None
) -> pa.Table:
    """`from_eval_logs` of lm-evaluation-harness's `samples_*.jsonl`."""
    return samples.outcomes(_read(files, None, None, lm_eval.HARNESS), metric, filter)


def from_lighteval(files: str | Path | Sequence[str | Path], *, metric: str | None = None) -> pa.Table:
    """`from_eval_logs` of lighteval's `details_*.parquet`."""
    return samples.outcomes(_read(files, None, None, lighteval.HARNESS), metric)


def from_inspect(files: str | Path | Sequence[str | Path], *, metric: str | None = None) -> pa.Table:
    """`from_eval_logs` of inspect's logs."""
    return samples.outcomes(_read(files, None, None, inspect_logs.HARNESS), metric)


def harness_of(path: str | Path) -> str | None:
    """Which harness wrote a file, or None for any other file: told from its first record.

    Raises:
        FileMissingError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileMissingError("no such file", file=str(path))
    name = path.name.lower()
    if name.endswith(".eval"):
        return inspect_logs.HARNESS
    if name.endswith(".parquet"):
        try:
            columns = set(pq.read_schema(path).names)
        except (pa.ArrowException, OSError):
            return None
        if lighteval.is_details(columns):
            return lighteval.HARNESS
        return inspect_logs.HARNESS if inspect_logs.is_table(columns) else None
    if name.endswith(".csv"):
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            return (
                inspect_logs.HARNESS
                if inspect_logs.is_table(set(file.readline().strip().split(",")))
                else None
            )
    if not name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst", ".json")):
        return None
    try:
        first = next((value for _, value in lm_eval.records(path)), None)
    except (Lmd3Error, UnicodeDecodeError, OSError, EOFError, pa.ArrowException):
        first = _whole(path)
    if lm_eval.is_sample(first):
        return lm_eval.HARNESS
    return inspect_logs.HARNESS if inspect_logs.is_log(first) else None


def _whole(path: Path) -> object:
    """A file of one indented JSON object."""
    if path.suffix != ".json":
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return None


def _read(
    files: str | Path | Sequence[str | Path], text: str | None, group: str | None, harness: str | None = None
) -> Log:
    paths = files_of(files)
    log: Log | None = None
    for path in paths:
        found = harness_of(path)
        if found is None:
            raise FormatError("not an evaluation log that lmd3 knows", file=str(path), remedy=_remedy(path))
        if harness is not None and found != harness:
            raise ParameterError(f"a log of {found}, not of {harness}", file=str(path))
        harness = found
        part = _reader(path, found)(path, text, group)
        if log is None:
            log = part
        else:
            log.extend(part)
    assert log is not None
    return log


def _reader(path: Path, harness: str) -> Callable[[Path, str | None, str | None], Log]:
    if harness == lm_eval.HARNESS:
        return lm_eval.read
    if harness == lighteval.HARNESS:
        return lighteval.read
    return inspect_logs.read if path.suffix in (".eval", ".json") else inspect_logs.read_table


def _remedy(path: Path) -> str:
    if path.name.startswith("results"):
        return "this looks like the summary of a run: give the samples (lm_eval --log_samples)"
    return (
        "give samples_*.jsonl of lm-evaluation-harness (--log_samples), details_*.parquet of lighteval "
        "(--save-details) or *.eval of inspect"
    )


def files_of(files: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files meant: those named, those of a pattern, those in a folder.

    Raises:
        FileMissingError: nothing of that name.
    """
    out: list[Path] = []
    for name in [files] if isinstance(files, (str, Path)) else files:
        path = Path(name)
        if path.is_file():
            out.append(path)
        elif path.is_dir():
            patterns = [pattern for of in _PATTERNS.values() for pattern in of]
            inside = sorted({found for pattern in patterns for found in path.rglob(pattern)})
            if not inside:
                raise FileMissingError(
                    "no evaluation logs in this folder", file=str(path), remedy=_remedy(path)
                )
            out += inside
        else:
            found = sorted(path.parent.glob(path.name)) if any(c in path.name for c in "*?[") else []
            if not found:
                raise FileMissingError("no such file", file=str(path))
            out += found
    if not out:
        raise ParameterError("no files")
    return list(dict.fromkeys(out))
