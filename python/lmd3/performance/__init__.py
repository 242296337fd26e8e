"""Outcomes: how well a model does on each text, as a table (id, outcome, value, …).

`from_model` scores texts under a language model: the built-in n-gram model or any causal language model of
`transformers`. Both answer with negative log-likelihoods in nats, per token and per byte; per byte compares
models with different tokens. `from_eval_logs` reads what evaluation harnesses wrote.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lmd3.errors import ParameterError
from lmd3.outcomes import OUTCOME_SCHEMA
from lmd3.performance.eval_logs import from_eval_logs, from_inspect, from_lighteval, from_lm_eval
from lmd3.progress import ProgressFactory, silent

if TYPE_CHECKING:
    from lmd3.texts import Texts

__all__ = [
    "LanguageModel",
    "Likelihoods",
    "from_eval_logs",
    "from_inspect",
    "from_lighteval",
    "from_lm_eval",
    "from_model",
    "outcome_table",
]

#: Texts scored between two reports of progress.
_BATCH = 256


@dataclass(frozen=True)
class Likelihoods:
    """What m texts cost under a model.

    Attributes:
        nats: (m,) float64, negative log-likelihood of the tokens scored.
        tokens: (m,) int64, tokens scored; 0 where there was nothing to predict.
        bytes: (m,) int64, bytes (UTF-8) of the text that these tokens cover.
        truncated: (m,) bool, whether the text was longer than the model's context.
        unknown: (m,) int64, tokens the model has no word for (n-gram only, else 0).
        prompt_truncated: (m,) bool, whether the prompt was shortened to make room for the text.
    """

    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]
    bytes: NDArray[np.int64]
    truncated: NDArray[np.bool_]
    unknown: NDArray[np.int64]
    prompt_truncated: NDArray[np.bool_]


class LanguageModel(Protocol):
    """Gives texts a likelihood; that of a text does not depend on its company (but for rounding)."""

    def describe(self) -> dict[str, Any]:
        """The model and its settings as JSON values."""

    def score(self, texts: Sequence[str], prompts: Sequence[str] | None = None) -> Likelihoods:
        """The likelihoods of texts, each after its prompt if there are prompts."""


def from_model(
    texts: Texts,
    model: str | Path | LanguageModel = "ngram",
    *,
    train: Iterable[str] | None = None,
    prompts: Mapping[str, str] | None = None,
    stride: int | None = None,
    dtype: str = "float32",
    progress: ProgressFactory | None = None,
) -> pa.Table:
    """Mean negative log-likelihood of each text, per token and per byte.

    Args:
        texts: what to score, from `lmd3.read_texts`; read twice, to be proven sound before the work.
        model: "ngram" (trained on `train`), the name or folder of a causal language model, or a model.
        train: the texts that the n-gram model is trained on.
        prompts: by id, what comes before a text: the text's likelihood given the prompt is taken. Ids without
            one have an empty prompt.
        stride: reads texts longer than a neural model's context in windows that move on by so many tokens;
            by default they are cut, and counted.
        dtype: arithmetic of a neural model: "float32", "bfloat16", or "auto": bfloat16 where it is faster.
        progress: shows the texts scored.

    Returns:
        The outcome table, two rows per text: `nats_per_token` and `nats_per_byte`. What was counted on the
        way (texts, truncated, unscored: texts with no token to predict, which have no rows) stands in the
        schema's metadata as JSON under `lmd3`.

    Raises:
        ParameterError: no training texts for the n-gram model, or some for another.
        MissingDependencyError, ModelError: torch or transformers is missing, or the model can't be loaded.
    """
    if texts.count is None:
        # A broken record or an id that occurs twice is found before the work, not hours later.
        for _ in texts:
            pass
    scorer = _model(model, train, stride, dtype)
    parts: list[pa.Table] = []
    counts = dict.fromkeys(("texts", "tokens", "unknown", "truncated", "prompts_truncated", "unscored"), 0)
    with (progress or silent)("scoring", texts.count, "texts") as bar:
        for batch in texts:
            for start in range(0, len(batch.texts), _BATCH):
                part = slice(start, start + _BATCH)
                ids = list(batch.ids[part])
                before = None if prompts is None else [prompts.get(id, "") for id in ids]
                scores = scorer.score(list(batch.texts[part]), before)
                groups = None if batch.groups is None else list(batch.groups[part])
                parts.append(outcome_table(ids, scores, groups))
                counts["texts"] += len(ids)
                counts["tokens"] += int(scores.tokens.sum())
                counts["unknown"] += int(scores.unknown.sum())
                counts["truncated"] += int(scores.truncated.sum())
                counts["prompts_truncated"] += int(scores.prompt_truncated.sum())
                counts["unscored"] += int(((scores.tokens == 0) | (scores.bytes == 0)).sum())
                bar.update(counts["texts"])
    table = pa.concat_tables(parts) if parts else OUTCOME_SCHEMA.empty_table()
    facts = {"model": scorer.describe(), "prompts": prompts is not None, **counts}
    return table.replace_schema_metadata({"lmd3": json.dumps(facts)})


def outcome_table(ids: Sequence[str], scores: Likelihoods, groups: Sequence[str] | None = None) -> pa.Table:
    """The outcome table of likelihoods: rows `nats_per_token` and `nats_per_byte` for each id.

    Texts without a token to predict have no rows.
    """
    kept = np.flatnonzero((scores.tokens > 0) & (scores.bytes > 0))
    nats, tokens, size = scores.nats[kept], scores.tokens[kept], scores.bytes[kept]

    def twice(values: Sequence[Any] | NDArray[Any]) -> NDArray[Any]:
        return np.repeat(np.asarray(values), 2)

    rows = kept.tolist()
    return pa.table(
        {
            "id": [ids[row] for row in rows for _ in range(2)],
            "outcome": ["nats_per_token", "nats_per_byte"] * len(rows),
            "value": np.column_stack([nats / tokens, nats / size]).ravel(),
            "kind": ["continuous"] * (2 * len(rows)),
            "trials": pa.nulls(2 * len(rows), pa.int64()),
            "weight": pa.nulls(2 * len(rows), pa.float64()),
            "tokens": twice(tokens),
            "bytes": twice(size),
            "group": pa.nulls(2 * len(rows), pa.string())
            if groups is None
            else [groups[row] for row in rows for _ in range(2)],
        },
        schema=OUTCOME_SCHEMA,
    )


def _model(
    model: str | Path | LanguageModel, train: Iterable[str] | None, stride: int | None, dtype: str
) -> LanguageModel:
    is_neural = isinstance(model, str | Path) and model != "ngram"
    if not is_neural and (stride is not None or dtype != "float32"):
        raise ParameterError("stride and dtype are for neural models given by name or folder")
    if isinstance(model, str) and model == "ngram":
        if train is None:
            raise ParameterError(
                "the n-gram model has no training texts", remedy="name them with --train (or `train=`)"
            )
        from lmd3.performance.ngram import NgramModel

        return NgramModel(train)
    if train is not None:
        raise ParameterError(
            "training texts are for the n-gram model only: other models are trained elsewhere"
        )
    if not isinstance(model, str | Path):
        return model
    from lmd3.performance.perplexity import CausalModel

    return CausalModel(model, stride=stride, dtype=dtype)


def batched(texts: Iterable[str], size: int) -> Iterable[list[str]]:
    """The texts in lists of `size`."""
    stream = iter(texts)
    while batch := list(islice(stream, size)):
        yield batch
