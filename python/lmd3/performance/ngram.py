"""The built-in language model: interpolated modified Kneser–Ney of order 3 over words. Trains in a second.

Chen and Goodman, *An empirical study of smoothing techniques for language modeling* (1999). Tokens are
lower-cased words and single punctuation marks; a text is one sequence between a start and an end, and the end
is predicted too (so a text of m words and marks has m + 1 tokens).

Words never seen in training are one symbol `<unk>`. It is never counted: it only has its share of the uniform
distribution that the lowest order is interpolated with, so an unknown word is dearer than any known one in
its place, and probabilities sum to one over the vocabulary, the end and `<unk>`. A long unknown word costs no
more than a short one, though; with `spelled=True` words are spelled by a byte model instead, probabilities
sum to one over all strings, and rare names weigh heavily (some 20 nats each).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np

from lmd3 import _lmd3
from lmd3.errors import ParameterError
from lmd3.performance import Likelihoods, batched

__all__ = ["NgramModel"]

_BATCH = 4096


class NgramModel:
    """A word trigram model with Kneser–Ney smoothing.

    Texts can be added at any time; a copy shares the counts until one of the two changes, so "the same with
    these texts too" costs no second training.

    Args:
        texts: training texts.
        spelled: whether unknown words are spelled, instead of one symbol for all.
    """

    def __init__(self, texts: Iterable[str] = (), *, spelled: bool = False) -> None:
        self.spelled = spelled
        self._counts = _lmd3.NgramCounts()
        self._model: _lmd3.Ngram | None = None
        self.add(texts)

    def add(self, texts: Iterable[str]) -> Self:
        """Trains on more texts."""
        if isinstance(texts, str):
            raise ParameterError("training texts are a list of texts, not one text")
        self._model = None
        for batch in batched(texts, _BATCH):
            self._counts.add(batch)
        return self

    def copy(self) -> NgramModel:
        """A model with the same counts."""
        other = NgramModel(spelled=self.spelled)
        other._counts = self._counts.copy()
        other._model = self._model
        return other

    @property
    def native(self) -> _lmd3.Ngram:
        """The smoothed model of the counts so far.

        Raises:
            ParameterError: there are no training texts.
        """
        if self._model is None:
            self._model = self._counts.model(self.spelled)
        return self._model

    def describe(self) -> dict[str, Any]:
        """The model as JSON values."""
        return {
            "kind": "ngram",
            "order": 3,
            "smoothing": "interpolated modified Kneser-Ney",
            "unknown": "spelled" if self.spelled else "symbol",
            "texts": self._counts.texts,
            "tokens": self._counts.tokens,
            "vocabulary": self._counts.vocabulary,
            "discounts": self.native.discounts,
        }

    def score(self, texts: Sequence[str], prompts: Sequence[str] | None = None) -> Likelihoods:
        """The likelihoods of texts and their ends, each after its prompt if there are prompts.

        Raises:
            ParameterError: there are no training texts.
            ShapeError: not as many prompts as texts.
        """
        texts = list(texts)
        nats, tokens, unknown = self.native.score(texts, None if prompts is None else list(prompts))
        none = np.zeros(len(texts), dtype=np.bool_)
        return Likelihoods(
            nats=nats,
            tokens=tokens.astype(np.int64),
            bytes=np.array([len(text.encode()) for text in texts], dtype=np.int64),
            truncated=none,
            unknown=unknown.astype(np.int64),
            prompt_truncated=none,
        )
