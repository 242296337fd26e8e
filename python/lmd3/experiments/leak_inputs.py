"""What a leak reads: base texts, items and their variants, as records with the text trained on and the text
embedded.

A record has a `text`, or a `prompt` and an `answer` (any names, by options). The text trained on is the
prompt and the answer with a line break between them, the text embedded the prompt alone: a question is what
is asked of a corpus, and what its neighbours are found by. Without an answer both are the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmd3 import tables
from lmd3.analysis.assignment import NONE
from lmd3.errors import ColumnError, InputError, JoinError, ParameterError, ShapeError

Vectors = NDArray[np.float32]

#: Stands between a prompt and its answer in what is trained on and scored.
BREAK = "\n"

#: The kind of variant that every item has by itself: the item as it is.
EXACT = "exact"


@dataclass(frozen=True)
class Records:
    """m texts.

    Attributes:
        ids: (m,).
        prompts: (m,) what comes first; the whole text where there is no answer.
        answers: (m,) or None.
        groups: (m,) or None.
        vectors: (m, d) float32 embeddings, or None: to be made.
        separator: what stands between a prompt and its answer: white space.
    """

    ids: tuple[str, ...]
    prompts: tuple[str, ...]
    answers: tuple[str, ...] | None = None
    groups: tuple[str, ...] | None = None
    vectors: Vectors | None = None
    separator: str = BREAK

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def texts(self) -> list[str]:
        """(m,) what is trained on."""
        if self.answers is None:
            return list(self.prompts)
        return [
            whole(prompt, answer, self.separator)
            for prompt, answer in zip(self.prompts, self.answers, strict=True)
        ]

    @property
    def contexts(self) -> list[str]:
        """(m,) what an answer is scored after. A single space belongs to the answer: models put it there."""
        return list(self.prompts) if self.separator == " " else [p + self.separator for p in self.prompts]

    def take(self, rows: Iterable[int]) -> Records:
        """Some of the records, in the order named."""
        chosen = list(rows)

        def of(values: tuple[str, ...] | None) -> tuple[str, ...] | None:
            return None if values is None else tuple(values[row] for row in chosen)

        vectors = None if self.vectors is None else self.vectors[chosen]
        return Records(
            of(self.ids) or (),
            of(self.prompts) or (),
            of(self.answers),
            of(self.groups),
            vectors,
            self.separator,
        )


def whole(prompt: str, answer: str, separator: str = BREAK) -> str:
    """A prompt with its answer, as trained on."""
    return prompt + separator + answer if answer else prompt


@dataclass(frozen=True)
class VariantTexts:
    """Variants: row v is a text of a kind that belongs to an item.

    Attributes:
        items: (V,) ids of the items.
        kinds: (V,).
        prompts: (V,) what is embedded.
        texts: (V,) what is trained on.
        vectors: (V, d) float32, or None: to be made.
    """

    items: tuple[str, ...]
    kinds: tuple[str, ...]
    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    vectors: Vectors | None = None


@dataclass(frozen=True)
class Columns:
    """Names of the columns of one table; None: the usual names where the table has them."""

    id: str | None = None
    text: str | None = None
    prompt: str | None = None
    answer: str | None = None
    group: str | None = None


def read_records(
    source: Any, columns: Columns = Columns(), vectors: Any = None, separator: str = BREAK
) -> Records:
    """Records of a table (a path, an Arrow table or a frame).

    Prompts are the column named, else `prompt`, `question` or `text`; answers the column named, else
    `answer` where the prompts are not `text`.

    Raises:
        InputError: and its kinds: a table that can't be read, a column that is missing or holds no text, an
            id that occurs twice, vectors of another number of rows.
    """
    file = str(source) if isinstance(source, str | Path) else None
    frame = tables.as_frame(source)
    ids = tables.row_ids(frame, columns.id, file)
    tables.refuse_duplicates(ids, file)
    there = set(map(str, frame.columns))
    prompt = columns.prompt or columns.text
    if prompt is None:
        prompt = next((name for name in ("prompt", "question", "text") if name in there), "text")
    answer = columns.answer
    if answer is None and prompt != "text" and columns.text is None and "answer" in there:
        answer = "answer"
    prompts = _texts(frame, prompt, file)
    empty = [row for row, text in enumerate(prompts) if not text.strip()]
    if empty:
        raise InputError(f"an empty text in column {prompt!r}", file=file, row=empty[0])
    return Records(
        tuple(ids),
        prompts,
        None if answer is None else _texts(frame, answer, file),
        None if columns.group is None else _texts(frame, columns.group, file),
        None if vectors is None else read_vectors(vectors, len(ids)),
        separator,
    )


def _texts(frame: Any, name: str, file: str | None) -> tuple[str, ...]:
    values = tables.column(frame, name, file)
    out = []
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise ColumnError(f"column {name!r} holds no text but {type(value).__name__}", file=file, row=row)
        out.append(value)
    return tuple(out)


def read_vectors(source: Any, rows: int) -> Vectors:
    """Embeddings as float32: an array, or the path of an `.npy` file.

    Raises:
        ShapeError: not one row per text.
        InputError: not finite.
    """
    file = str(source) if isinstance(source, str | Path) else None
    array = np.load(source, allow_pickle=False) if file else np.asarray(source)
    if array.ndim != 2 or len(array) != rows:
        raise ShapeError(f"vectors of shape {array.shape} for {rows} texts", file=file)
    if not np.isfinite(array).all():
        raise InputError("vectors hold NaN or infinity", file=file)
    return np.ascontiguousarray(array, dtype=np.float32)


def read_choices(
    source: Any, column: str, label: str = "label"
) -> tuple[tuple[tuple[str, ...], ...], tuple[int, ...]]:
    """The choices of every item, and the number of the right one.

    Args:
        source: the items' table.
        column: a column of lists of texts (or of JSON that is one).
        label: the column of the right choice: its number from 0, or its text.

    Raises:
        ColumnError: a cell that is no list of texts, or a right choice that is none of them.
    """
    file = str(source) if isinstance(source, str | Path) else None
    frame = tables.as_frame(source)
    choices: list[tuple[str, ...]] = []
    right: list[int] = []
    for row, (cell, answer) in enumerate(
        zip(tables.column(frame, column, file), tables.column(frame, label, file), strict=True)
    ):
        try:
            options = json.loads(cell) if isinstance(cell, str) else list(cell)
        except (ValueError, TypeError):
            options = []
        if len(options) < 2 or not all(isinstance(option, str) for option in options):
            raise ColumnError(f"column {column!r} holds no list of choices", file=file, row=row)
        if isinstance(answer, str) and answer in options:
            number = options.index(answer)
        else:
            try:
                number = int(answer)
            except (TypeError, ValueError):
                number = -1
        if not 0 <= number < len(options):
            raise ColumnError(f"the right choice {answer!r} is none of them", file=file, row=row)
        choices.append(tuple(options))
        right.append(number)
    return tuple(choices), tuple(right)


def read_variants(source: Any, items: Records, columns: Columns = Columns(), kind: str | None = None,
                  vectors: Any = None) -> VariantTexts:  # fmt: skip
    """Variants of items: a table (id: the item's, text, kind; an answer if the text is a prompt).

    Args:
        source: the table: a path, an Arrow table or a frame.
        items: what they are variants of.
        columns: names of its columns.
        kind: the kind of all rows, where the table has no column `kind`.
        vectors: embeddings of the texts.

    Raises:
        JoinError: variants of items that there are not.
        InputError: and its kinds.
    """
    file = str(source) if isinstance(source, str | Path) else None
    frame = tables.as_frame(source)
    of_items = tables.row_ids(frame, columns.id, file)
    known = set(items.ids)
    strange = [row for row, item in enumerate(of_items) if item not in known]
    if strange:
        raise JoinError(
            f"{len(strange)} of {len(of_items)} variants belong to no item, the first to"
            f" {of_items[strange[0]]!r}",
            file=file,
            row=strange[0],
            remedy="the id of a variant is that of its item",
        )
    there = set(map(str, frame.columns))
    prompt = columns.prompt or columns.text
    if prompt is None:
        prompt = next((name for name in ("text", "prompt", "question") if name in there), "text")
    prompts = _texts(frame, prompt, file)
    answer = columns.answer or ("answer" if prompt != "text" and "answer" in there else None)
    answers = ("",) * len(prompts) if answer is None else _texts(frame, answer, file)
    kinds = _texts(frame, "kind", file) if "kind" in there else (kind or "paraphrase",) * len(prompts)
    if NONE in kinds:
        raise ParameterError(f"{NONE!r} is no kind of variant: it names the untreated", file=file)
    return VariantTexts(
        tuple(of_items),
        kinds,
        prompts,
        tuple(whole(p, a, items.separator) for p, a in zip(prompts, answers, strict=True)),
        None if vectors is None else read_vectors(vectors, len(prompts)),
    )


def with_exact(items: Records, variants: VariantTexts, rows: Sequence[int]) -> VariantTexts:
    """The variants with the items of these rows as their own exact copies, where they bring none."""
    there = {item for item, kind in zip(variants.items, variants.kinds, strict=True) if kind == EXACT}
    added = [row for row in rows if items.ids[row] not in there]
    own = items.take(added)
    vectors = None
    if variants.vectors is not None and own.vectors is not None:
        vectors = np.concatenate([variants.vectors, own.vectors])
    return VariantTexts(
        (*variants.items, *own.ids),
        (*variants.kinds, *(EXACT for _ in added)),
        (*variants.prompts, *own.prompts),
        (*variants.texts, *own.texts),
        vectors,
    )


_SPACE = re.compile(r"\W+")


def normalised(text: str) -> str:
    """A text by its words alone: what is compared to find a text that is there already."""
    return _SPACE.sub(" ", text.casefold()).strip()


def present_items(items: Records, base: Records) -> list[int]:
    """Rows of the items whose prompt or whole text stands among the base texts already, word for word."""
    known = {normalised(text) for text in base.prompts} | {normalised(text) for text in base.texts}
    return [
        row
        for row, (prompt, text) in enumerate(zip(items.prompts, items.texts, strict=True))
        if normalised(prompt) in known or normalised(text) in known
    ]


def answers_repeated(items: Records, variants: VariantTexts) -> Mapping[str, float]:
    """By kind: the share of variants whose text holds the last line of their item's answer, word for word.

    For such a kind an effect on the answer is an effect of having read the answer.
    """
    if items.answers is None:
        return {}
    answer = {
        item: normalised(text.strip().splitlines()[-1]) if text.strip() else ""
        for item, text in zip(items.ids, items.answers, strict=True)
    }
    found: dict[str, list[bool]] = {}
    for item, kind, text in zip(variants.items, variants.kinds, variants.texts, strict=True):
        if answer[item]:
            found.setdefault(kind, []).append(f" {answer[item]} " in f" {normalised(text)} ")
    return {kind: float(np.mean(hits)) for kind, hits in found.items()}
