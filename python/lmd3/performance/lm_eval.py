"""Reads the samples that lm-evaluation-harness writes with `--log_samples`.

What differs between its versions, and what misleads, is dealt with here:

* One line per document *and filter*; before 0.4.3 one indented JSON array, named `.jsonl` all the same;
  `filter`, `metrics` and hashes may be absent; runs are appended to files and ranks concatenated unsorted.
* Numbers and booleans of `filtered_resps` may be strings.
* `perplexity` of a log-likelihood task is the raw log-likelihood: it is read as `gold_log_probability`.
* `word_perplexity`, `byte_perplexity` and `bits_per_byte` are pairs (log-likelihood, count): they are read as
  `nats_per_word`, `nats_per_byte` and `bits_per_byte`. Other metrics that are no number have no value per
  document, and are named.
* The right answer of a multiple choice may be written as an index or as a text. Which one a task means is
  proven on `acc`; where neither reading agrees with it, no log-probability is derived.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lmd3.errors import FormatError, TextFormatError
from lmd3.performance.samples import Log, Sample, number

HARNESS = "lm-evaluation-harness"

#: What a line holds beside its metrics, where it does not list them.
_KNOWN = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"}
_KNOWN |= {"doc_hash", "prompt_hash", "target_hash", "task_name"}
_RATES = {
    "word_perplexity": "nats_per_word",
    "byte_perplexity": "nats_per_byte",
    "bits_per_byte": "bits_per_byte",
}
_NAME = re.compile(r"^samples_(?P<task>.+?)(?:_\d{4}-\d\d-\d\dT[\d.:+-]+)?$")


def is_sample(record: Any) -> bool:
    """Whether a JSON object is a line of such a file."""
    return (
        isinstance(record, dict) and "doc_id" in record and bool({"resps", "filtered_resps"} & record.keys())
    )


def read(path: Path, text: str | None = None, group: str | None = None) -> Log:
    """The samples of one file.

    Args:
        path: `.jsonl`, also `.gz` and `.zst`.
        text, group: fields of the document to carry, with dots for fields inside fields.

    Raises:
        TextFormatError: a broken line.
        FormatError: not such a file.
    """
    log = Log(HARNESS)
    task = task_of(path)
    choices: list[_Choice] = []
    for row, record in records(path):
        if not is_sample(record):
            raise FormatError("no line of lm-evaluation-harness's samples", file=str(path), row=row)
        sample = Sample(
            task,
            str(record["doc_id"]),
            {},
            filter=record.get("filter"),
            hash=record.get("doc_hash"),
            text=_field(record, text, path, row),
            group=_field(record, group, path, row),
            file=str(path),
            row=row,
        )
        log.samples.append(sample)
        answers = _answers(record.get("filtered_resps"))
        _scores(record, sample, answers, log, path, row)
        if answers and "acc_mutual_info" not in sample.scores:
            choices.append(_Choice.of(record, sample, answers))
    _derive(choices, task, log)
    return log


def task_of(path: Path) -> str:
    """The task, from the file's name."""
    name = path.name
    for suffix in (".gz", ".zst"):
        name = name.removesuffix(suffix)
    name = name.removesuffix(".jsonl").removesuffix(".json")
    found = _NAME.match(name)
    return found["task"] if found else name


def records(path: Path) -> Iterator[tuple[int, Any]]:
    """(row, value) of a JSONL file or of JSON arrays, one after another; rows are counted from 0."""
    with _open(path) as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        if start != "[":
            yield from _lines(start, file, path)
            return
        # Arrays, indented over many lines; appended to, so there may be several.
        rest, row, decoder = start + file.read(), 0, json.JSONDecoder()
        position = 0
        while position < len(rest):
            try:
                values, position = decoder.raw_decode(rest, position)
            except ValueError as error:
                raise TextFormatError(f"broken JSON: {error}", file=str(path), row=row) from None
            for value in values if isinstance(values, list) else [values]:
                yield row, value
                row += 1
            while position < len(rest) and rest[position].isspace():
                position += 1


def _lines(start: str, file: IO[str], path: Path) -> Iterator[tuple[int, Any]]:
    for row, line in enumerate(file):
        text = start + line if row == 0 else line
        if not text.strip():
            continue
        try:
            yield row, json.loads(text)
        except ValueError as error:
            raise TextFormatError(
                f"broken JSON line: {error}", file=str(path), row=row, remedy="was the run cut off?"
            ) from None


def _open(path: Path) -> IO[str]:
    import io

    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8", errors="strict")
    if path.name.endswith(".zst"):
        import pyarrow as pa

        return io.TextIOWrapper(pa.CompressedInputStream(str(path), "zstd"), encoding="utf-8")
    return path.open(encoding="utf-8-sig")


def _field(record: dict[str, Any], name: str | None, path: Path, row: int) -> str | None:
    if name is None:
        return None
    value: Any = record if name.startswith(("doc.", "arguments.")) else record.get("doc")
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if value is None:
        there = ", ".join(record["doc"]) if isinstance(record.get("doc"), dict) else "none"
        raise FormatError(
            f"the document has no field {name!r}", file=str(path), row=row, remedy=f"there are: {there}"
        )
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _answers(responses: Any) -> list[float] | None:
    """The log-likelihood of every answer, where responses are pairs (log-likelihood, is it greedy)."""
    if not isinstance(responses, list) or not responses:
        return None
    out = []
    for pair in responses:
        if not isinstance(pair, list) or len(pair) != 2 or isinstance(pair[0], (bool, list)):
            return None
        if str(pair[1]).strip().lower() not in ("true", "false"):
            return None
        try:
            out.append(number(pair[0]))
        except ValueError:
            return None
    return out


def _scores(
    record: dict[str, Any], sample: Sample, answers: list[float] | None, log: Log, path: Path, row: int
) -> None:
    stated = record.get("metrics")
    names = stated if isinstance(stated, list) else [key for key in record if key not in _KNOWN]
    for name in names:
        if name not in record:
            sample.scores[name] = math.nan
            continue
        value = record[name]
        if name in _RATES and isinstance(value, list) and len(value) == 2:
            logs, count = number(value[0]), number(value[1])
            scale = math.log(2) if name == "bits_per_byte" else 1.0
            sample.scores[_RATES[name]] = -logs / count / scale if count > 0 else math.nan
            if name != "word_perplexity":
                sample.bytes = int(count)
            continue
        try:
            found = number(value)
        except ValueError:
            log.skipped.setdefault(name, "no number for each document")
            continue
        if name == "perplexity" and answers is not None and len(answers) == 1 and found == answers[0]:
            notice = "“perplexity” is a raw log-likelihood in these files: it stands as gold_log_probability."
            if notice not in log.notices:
                log.notices.append(notice)
            continue
        if math.isinf(found):
            raise FormatError(f"an infinite value of {name}", file=str(path), row=row)
        sample.scores[name] = found


class _Choice:
    """The answers of a document, and which is right by either reading of `target`."""

    __slots__ = ("answers", "by_index", "by_text", "sample", "sizes")

    def __init__(
        self,
        sample: Sample,
        answers: list[float],
        by_index: int | None,
        by_text: int | None,
        sizes: list[int],
    ) -> None:
        self.sample, self.answers, self.sizes = sample, answers, sizes
        self.by_index, self.by_text = by_index, by_text

    @classmethod
    def of(cls, record: dict[str, Any], sample: Sample, answers: list[float]) -> _Choice:
        target, texts = str(record.get("target", "")), _continuations(record.get("arguments"))
        by_index = by_text = None
        if re.fullmatch(r"\d+", target.strip()) and int(target) < len(answers):
            by_index = int(target)
        found = [i for i, text in enumerate(texts) if text.strip() == target.strip()]
        if len(found) == 1 and len(texts) == len(answers):
            by_text = found[0]
        return cls(sample, answers, by_index, by_text, [len(text.encode()) for text in texts])


def _continuations(arguments: Any) -> list[str]:
    """What each request was to continue with."""
    if isinstance(arguments, dict):
        keys = sorted(arguments, key=lambda key: int(re.sub(r"\D", "", key) or 0))
        arguments = [list(arguments[key].values()) for key in keys if isinstance(arguments[key], dict)]
    if not isinstance(arguments, list):
        return []
    return [str(a[1]) for a in arguments if isinstance(a, list) and len(a) >= 2]


def _derive(choices: list[_Choice], task: str, log: Log) -> None:
    """Adds `gold_log_probability` and `margin` where it is certain which answer is right."""
    single = [c for c in choices if len(c.answers) == 1]
    for choice in single:
        _add(choice, 0)
    several = [c for c in choices if len(c.answers) > 1]
    if not several:
        return
    for reading in ("by_index", "by_text"):
        golds = [getattr(c, reading) for c in several]
        if all(gold is not None for gold in golds) and all(
            _agrees(c, gold) for c, gold in zip(several, golds, strict=True)
        ):
            for choice, gold in zip(several, golds, strict=True):
                _add(choice, gold)
            return
    log.notices.append(
        f"Task {task}: which answer is right can't be told for certain from target and acc: no "
        "log-probability of it is derived."
    )


def _agrees(choice: _Choice, gold: int) -> bool:
    """Whether `acc` says what this right answer would make it; the best answers may tie."""
    accuracy = choice.sample.scores.get("acc", math.nan)
    if math.isnan(accuracy):
        return True
    best = max(choice.answers)
    tied = choice.answers.count(best) > 1 and choice.answers[gold] == best
    return tied or (choice.answers[gold] == best) == (accuracy == 1)


def _add(choice: _Choice, gold: int) -> None:
    right = choice.answers[gold]
    if math.isinf(right):
        # An answer of probability zero has no finite logarithm; there is nothing to compare.
        choice.sample.scores["gold_log_probability"] = math.nan
        return
    choice.sample.scores["gold_log_probability"] = right
    others = [value for i, value in enumerate(choice.answers) if i != gold and not math.isinf(value)]
    if others:
        choice.sample.scores["margin"] = right - max(others)
    if len(choice.sizes) > gold:
        choice.sample.bytes = choice.sizes[gold]
