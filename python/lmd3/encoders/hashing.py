"""The built-in encoder: words and word pairs, tf-idf weighted, under a signed random projection.

It needs no download and no torch, and what it measures is *lexical*: two texts are near where they share
words and phrases. It knows nothing of synonyms, of word order beyond pairs, or of the same word in another
language.

Each distinct lower-cased word and pair of adjacent words weighs (1 + ln tf)·(1 + ln(N / max(df, 1))) and is
spread over all coordinates with signs drawn from its hash; the sum is scaled to norm 1. The idf is counted
once, on the corpus (a seeded uniform sample of at most 262,144 texts), and frozen: queries and later rows are
weighted by it, and words it never saw weigh the most. A text without words is represented by its punctuation;
an empty one by a vector reserved for empty texts, which is near nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmd3 import _lmd3
from lmd3.encoders import EncodedBatch
from lmd3.errors import FileMissingError, FormatError, ModelError, OutputError, ParameterError

__all__ = ["HashingEncoder"]

#: File of the frozen idf inside a store.
STATE_FILE = "hashing.bin"
_MAX_DIM = 65536
_BATCH = 4096


class HashingEncoder:
    """The lexical encoder; deterministic, the same bytes on any number of threads.

    Args:
        dim: dimensions of the vectors, 1 to 65,536. The error of a cosine has a standard deviation of at most
            1/√dim.
        max_tokens: words read of each text; None: all.
        seed: of the sample of texts that the idf is counted on (where the corpus is too long for all).
    """

    name = "hashing"

    def __init__(self, dim: int = 384, *, max_tokens: int | None = None, seed: int = 0) -> None:
        if not 1 <= dim <= _MAX_DIM:
            raise ParameterError(f"dim must be in 1..{_MAX_DIM}, not {dim}")
        if max_tokens is not None and max_tokens < 1:
            raise ParameterError(f"max_tokens must be at least 1, not {max_tokens}")
        self.dim = dim
        self.max_tokens = max_tokens
        self.seed = seed
        self._state: _lmd3.HashingEncoder | None = None

    @property
    def fitted(self) -> bool:
        """Whether the idf is there."""
        return self._state is not None

    def _fitted(self) -> _lmd3.HashingEncoder:
        if self._state is None:
            raise ModelError("the hashing encoder has no idf yet", remedy="fit it on the texts of a corpus")
        return self._state

    def describe(self) -> dict[str, Any]:
        """The settings as JSON values; `fingerprint` is None until fitted."""
        state = self._state
        return {
            "kind": "hashing",
            "model": self.name,
            "revision": None,
            "prompt": None,
            "max_tokens": self.max_tokens,
            "dim": self.dim,
            "state_file": STATE_FILE,
            "fingerprint": state and self._fingerprint(state),
            "density": "lexical: shared words and word pairs, not meaning",
            "idf_texts": state and state.fitted_texts,
            "idf_seen_texts": state and state.seen_texts,
            "idf_features": state and state.features,
        }

    def _fingerprint(self, state: _lmd3.HashingEncoder) -> str:
        key = f"{state.fingerprint} {self.max_tokens}"
        return hashlib.blake2b(key.encode(), digest_size=8).hexdigest()

    def fit(self, texts: Iterable[str]) -> None:
        """Counts the idf over the texts, streamed, and freezes it.

        Raises:
            ParameterError: there are no texts, or the encoder is fitted already: its vectors would change.
        """
        if self._state is not None:
            raise ParameterError("the hashing encoder is fitted already and its idf is frozen")
        fitter = _lmd3.HashingFitter(self.seed)
        stream = iter(texts)
        while batch := list(islice(stream, _BATCH)):
            fitter.add(batch)
        self._state = fitter.finish(self.dim)

    def encode(self, texts: Sequence[str]) -> EncodedBatch:
        """The vectors of texts, in their order; `tokens` counts words.

        Raises:
            ModelError: the encoder has not been fitted.
        """
        vectors, tokens, left_out = self._fitted().encode(list(texts), self.max_tokens)
        return EncodedBatch(vectors, tokens, left_out > 0, left_out)

    def token_spans(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Where the words of each text stand: (words, 2) starts and ends in characters."""
        return _lmd3.word_spans(list(texts))

    @property
    def room(self) -> int | None:
        """Words of a text that are read; None: all."""
        return self.max_tokens

    def unknown(self, texts: Sequence[str]) -> tuple[int, int]:
        """Words and pairs in the texts, each counted once a text, and how many of them the frozen idf has
        never seen twice: their share, against that in the texts it was counted on, is how far a corpus has
            drifted.

        Raises:
            ModelError: the encoder has not been fitted.
        """
        return self._fitted().unknown(list(texts), self.max_tokens)

    def save_state(self, folder: Path) -> None:
        """Writes the frozen idf to `folder / "hashing.bin"`: versioned, with its checksum at the end.

        Raises:
            ModelError: the encoder has not been fitted.
            OutputError: the file can't be written.
        """
        path = Path(folder) / STATE_FILE
        try:
            path.write_bytes(self._fitted().to_bytes())
        except OSError as error:
            raise OutputError(error.strerror or str(error), file=str(path)) from error

    def load_state(self, folder: Path) -> None:
        """Reads what `save_state` wrote.

        Raises:
            FileMissingError: there is no such file.
            FormatError: it is damaged, of another version or of another dimension.
        """
        path = Path(folder) / STATE_FILE
        try:
            data = path.read_bytes()
        except OSError as error:
            raise FileMissingError(
                f"the state of the hashing encoder can't be read: {error.strerror or error}",
                file=str(path),
                remedy="restore the file, or encode the corpus again",
            ) from error
        try:
            state = _lmd3.HashingEncoder.from_bytes(data)
        except FormatError as error:
            raise FormatError(error.message, file=str(path), remedy="encode the corpus again") from None
        if state.dim != self.dim:
            raise FormatError(f"the state has {state.dim} dimensions, not {self.dim}", file=str(path))
        self._state = state

    @classmethod
    def restore(cls, description: Mapping[str, Any], folder: Path) -> HashingEncoder:
        """The encoder that `describe` and `save_state` wrote down.

        Raises:
            FileMissingError, FormatError: the state is not there or damaged.
            ModelError: the description is not one of this encoder.
        """
        dim, max_tokens = description.get("dim"), description.get("max_tokens")
        if not isinstance(dim, int) or not isinstance(max_tokens, int | None):
            raise ModelError(
                "the manifest's description of the hashing encoder is not valid", file=str(folder)
            )
        encoder = cls(dim, max_tokens=max_tokens)
        encoder.load_state(folder)
        return encoder
