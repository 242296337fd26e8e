"""Static encoders: the mean of a vector per token, hundreds of times faster than a transformer, without
torch.

What they measure is nearer to shared vocabulary than to meaning in context, so a density under one is another
density than that under a neural model, and the manifest says so. Models are those of model2vec, by folder or
name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from lmd3.encoders import EncodedBatch
from lmd3.errors import MissingDependencyError, ModelError, ParameterError

__all__ = ["StaticEncoder"]

#: Rows of token vectors gathered at a time.
_GATHERED = 1 << 16


class StaticEncoder:
    """A model2vec model. The same text gives the same bytes in any company.

    A text without any token that the model knows is given signs drawn from a hash of it: a vector of its own,
    near nothing else.

    Args:
        model: folder, or name on the hub.
        prompt: put before every text; None: nothing.
        max_tokens: tokens read of a text; None: the model's own limit.
        truncate_dim: keep the first dimensions and normalise again; None: all.

    Raises:
        MissingDependencyError: model2vec is not installed.
        ModelError: the model can't be loaded.
        ParameterError: `truncate_dim` above the model's dimensions.
    """

    def __init__(
        self,
        model: str,
        *,
        prompt: str | None = None,
        max_tokens: int | None = None,
        truncate_dim: int | None = None,
    ) -> None:
        try:
            from model2vec import StaticModel
        except ImportError as error:
            raise MissingDependencyError(
                f"the encoder {model!r} needs a package that is not installed: {error.name or error}",
                remedy="pip install 'lmd3[static]'",
            ) from None
        folder = Path(model).expanduser()
        self.name = str(folder.resolve()) if folder.exists() else model
        try:
            loaded = StaticModel.from_pretrained(self.name)
        except Exception as error:
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            raise ModelError(
                f"the static model {model!r} can't be loaded: {reason.rstrip('.') or type(error).__name__}",
                remedy="give the name or folder of a model2vec model",
            ) from error
        limits = [limit for limit in (loaded.max_length, max_tokens) if limit is not None]
        self.max_tokens: int | None = min(limits, default=None)
        self.prompt = prompt or ""
        self._tokenizer = loaded.tokenizer
        self._tokenizer.no_truncation()
        self._unknown = loaded.unk_token_id
        self._mapping = loaded.token_mapping
        self._weights = loaded.weights
        self._table = np.asarray(loaded.embedding)
        full = int(self._table.shape[1])
        self.dim = full if truncate_dim is None else truncate_dim
        if not 1 <= self.dim <= full:
            raise ParameterError(f"truncate_dim must be in 1..{full}, not {truncate_dim}")
        self._vectors = np.ascontiguousarray(self._table[:, : self.dim], np.float32)
        self._fingerprint: str | None = None

    @property
    def fitted(self) -> bool:
        """Always: the model was trained elsewhere."""
        return True

    def describe(self) -> dict[str, Any]:
        """The settings as JSON values; the first call hashes the token vectors."""
        settings = {"prompt": self.prompt, "max_tokens": self.max_tokens, "dim": self.dim, "pooling": "mean"}
        if self._fingerprint is None:
            digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8)
            for part in (self._table, self._weights, self._mapping):
                if part is not None:
                    digest.update(f"\0{part.shape} {part.dtype}\0".encode())
                    digest.update(np.ascontiguousarray(part).tobytes())
            digest.update(self._tokenizer.to_str().encode())
            self._fingerprint = digest.hexdigest()
        return {
            "kind": "static",
            "model": self.name,
            "revision": None,
            **settings,
            "density": "static: mean token vectors, nearer to shared vocabulary than to meaning in context",
            "fingerprint": self._fingerprint,
        }

    def fit(self, texts: Iterable[str]) -> None:
        """Does nothing and reads nothing."""

    def _encodings(self, texts: Sequence[str]) -> list[Any]:
        return list(self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False))

    def encode(self, texts: Sequence[str]) -> EncodedBatch:
        """The vectors of texts, in their order; `tokens` counts the tokenizer's tokens."""
        found = [encoding.ids for encoding in self._encodings([self.prompt + text for text in texts])]
        lengths = np.array([len(ids) for ids in found], np.int64)
        limit = np.iinfo(np.int32).max if self.max_tokens is None else self.max_tokens
        read = np.minimum(lengths, limit)
        vectors = np.empty((len(found), self.dim), np.float32)
        start = 0
        while start < len(found):
            ends = np.cumsum(read[start:])
            stop = start + max(1, int(np.searchsorted(ends, _GATHERED, side="right")))
            vectors[start:stop] = self._means(
                [ids[:limit] for ids in found[start:stop]], texts[start:stop], read[start:stop]
            )
            start = stop
        return EncodedBatch(
            vectors, read.astype(np.int32), lengths > limit, (lengths - read).astype(np.int32)
        )

    def _means(
        self, found: Sequence[list[int]], texts: Sequence[str], lengths: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Unit vectors in the direction of the mean over each text's known tokens."""
        tokens = np.fromiter(chain.from_iterable(found), np.int64, int(lengths.sum()))
        owner = np.repeat(np.arange(len(found)), lengths)
        if self._unknown is not None:
            known = tokens != self._unknown
            tokens, owner = tokens[known], owner[known]
        rows = tokens if self._mapping is None else np.asarray(self._mapping)[tokens]
        ones = np.ones(len(tokens), np.float32)
        values = ones if self._weights is None else np.asarray(self._weights, np.float32)[tokens]
        ends = np.searchsorted(owner, np.arange(len(found) + 1))
        # A product with a sparse matrix of counts adds the rows up without copying them.
        counts = csr_array((values, rows, ends), shape=(len(found), len(self._vectors)))
        sums = np.asarray(counts @ self._vectors, np.float64)
        norms = np.linalg.norm(sums, axis=1)
        for row in np.flatnonzero(~(norms > 0)).tolist():
            sums[row] = _signs(texts[row], self.dim)
            norms[row] = np.sqrt(self.dim)
        if not np.isfinite(norms).all():
            bad = int(np.argmin(np.isfinite(norms)))
            raise ModelError(f"the model {self.name!r} gives a vector that is not finite", row=bad)
        unit: NDArray[np.float32] = (sums / norms[:, None]).astype(np.float32)
        return unit

    def token_spans(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Where the tokens of each text stand: (tokens, 2) starts and ends in characters."""
        found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(encoding.offsets, np.uint32).reshape(-1, 2) for encoding in found]

    @property
    def room(self) -> int | None:
        """Tokens of a text that are read beside the prompt; None: all."""
        if self.max_tokens is None:
            return None
        return max(1, self.max_tokens - len(self._encodings([self.prompt])[0].ids))

    def save_state(self, folder: Path) -> None:
        """Writes nothing: the vectors stay where they are, and their fingerprint is in the manifest."""

    def load_state(self, folder: Path) -> None:
        """Reads nothing."""

    @classmethod
    def restore(cls, description: Mapping[str, Any], folder: Path, model: str | None = None) -> StaticEncoder:
        """The encoder that `describe` wrote down; `model` says where it is now, if elsewhere.

        Raises:
            ModelError: it can't be loaded.
        """
        name = description.get("model")
        if not isinstance(name, str):
            raise ModelError("the manifest does not name the model of its vectors", file=str(folder))
        prompt, limit, dim = (description.get(key) for key in ("prompt", "max_tokens", "dim"))
        return cls(model or name, prompt=prompt, max_tokens=limit, truncate_dim=dim)


def _signs(text: str, dim: int) -> NDArray[np.float64]:
    """±1 per dimension, drawn from a hash of the text."""
    bits = hashlib.shake_128(text.encode()).digest((dim + 7) // 8)
    return np.unpackbits(np.frombuffer(bits, np.uint8))[:dim].astype(np.float64) * 2 - 1
