"""Neural encoders: any sentence-transformers model by name or folder, in float32, with its truncation
counted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmd3.encoders import EncodedBatch
from lmd3.errors import MissingDependencyError, ModelError, ParameterError

__all__ = ["SentenceTransformerEncoder"]

#: Texts of one forward pass. They are sorted by length first, so that little is padded.
BATCH_SIZE = 32


class SentenceTransformerEncoder:
    """A sentence-transformers model. Nothing in the model's folder is executed (`trust_remote_code` is never
    given).

    A vector depends on the texts beside it in its batch by the rounding of float32 only.

    Args:
        model: name or folder.
        prompt: put before every text; None: the model's own default prompt, which most do not have.
        max_tokens: tokens read of a text; None: the model's own limit, which it can't exceed.
        truncate_dim: keep the first dimensions and normalise again; None: all.
        batch_size: texts of one forward pass.
        device: torch's name of the device; None: the best there is.
        revision: the model's revision on its hub.

    Raises:
        MissingDependencyError: sentence-transformers is not installed.
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
        batch_size: int = BATCH_SIZE,
        device: str | None = None,
        revision: str | None = None,
    ) -> None:
        folder = Path(model).expanduser()
        local = folder.exists()
        # A manifest is read from anywhere, so folders are written down in full.
        self.name = str(folder.resolve()) if local else model
        if not local and model.startswith((".", "/", "~")):
            raise ModelError("no such folder of a model", file=model)
        self._model = _load(self.name, device, revision)
        self._batch_size = batch_size
        limits = [int(limit) for limit in (self._model.max_seq_length, max_tokens) if limit is not None]
        self.max_tokens: int | None = min(limits, default=None)
        if self.max_tokens is not None:
            self._model.max_seq_length = self.max_tokens
        own = self._model.prompts.get(self._model.default_prompt_name or "", "")
        self.prompt: str = own if prompt is None else prompt
        self._full_dim = int(_dimension(self._model))
        self.dim = self._full_dim if truncate_dim is None else truncate_dim
        if not 1 <= self.dim <= self._full_dim:
            raise ParameterError(f"truncate_dim must be in 1..{self._full_dim}, not {truncate_dim}")
        self._revision = revision or _revision(self._model)
        self._fingerprint: str | None = None

    @property
    def fitted(self) -> bool:
        """Always: the model was trained elsewhere."""
        return True

    def describe(self) -> dict[str, Any]:
        """The settings as JSON values; the first call hashes the weights."""
        settings = {
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "dim": self.dim,
            "pooling": _pooling(self._model),
        }
        if self._fingerprint is None:
            self._fingerprint = _fingerprint(self._model, settings)
        return {
            "kind": "sentence-transformers",
            "model": self.name,
            "revision": self._revision,
            **settings,
            "precision": "float32",
            "fingerprint": self._fingerprint,
        }

    def fit(self, texts: Iterable[str]) -> None:
        """Does nothing and reads nothing."""

    def encode(self, texts: Sequence[str]) -> EncodedBatch:
        """The vectors of texts, in their order; `tokens` counts the tokenizer's tokens with the special ones.

        Raises:
            ModelError: a vector that is zero or not finite.
        """
        texts = list(texts)
        if not texts:
            return EncodedBatch(
                np.empty((0, self.dim), np.float32), np.empty(0, np.int32), np.empty(0, np.bool_)
            )
        lengths = self._lengths(texts)
        vectors = self._model.encode(
            texts,
            prompt=self.prompt,
            batch_size=self._batch_size,
            show_progress_bar=False,
            convert_to_numpy=True,
            normalize_embeddings=False,
        )
        limit = np.iinfo(np.int32).max if self.max_tokens is None else self.max_tokens
        return EncodedBatch(
            self._normalised(np.asarray(vectors)[:, : self.dim]),
            np.minimum(lengths, limit).astype(np.int32),
            lengths > limit,
        )

    def _lengths(self, texts: list[str]) -> NDArray[np.int64]:
        """Tokens of each text as the model would read it without a limit."""
        prompted = [self.prompt + text for text in texts]
        tokenizer = self._model.tokenizer
        if hasattr(tokenizer, "encode_batch_fast"):
            # The bare tokenizer of static models.
            return np.array([len(encoding) for encoding in tokenizer.encode_batch_fast(prompted)], np.int64)
        encoded = tokenizer(
            prompted, truncation=False, padding=False, verbose=False, return_attention_mask=False
        )
        return np.array([len(tokens) for tokens in encoded["input_ids"]], np.int64)

    def _normalised(self, vectors: NDArray[Any]) -> NDArray[np.float32]:
        wide = vectors.astype(np.float64)
        norms = np.linalg.norm(wide, axis=1, keepdims=True)
        if not (np.isfinite(norms).all() and (norms > 0).all()):
            row = int(np.argmin(np.isfinite(norms[:, 0]) & (norms[:, 0] > 0)))
            raise ModelError(f"the model {self.name!r} gives a vector that is zero or not finite", row=row)
        return np.ascontiguousarray(wide / norms, dtype=np.float32)

    def save_state(self, folder: Path) -> None:
        """Writes nothing: the weights stay where they are, and their fingerprint is in the manifest."""

    def load_state(self, folder: Path) -> None:
        """Reads nothing."""

    @classmethod
    def restore(
        cls, description: Mapping[str, Any], folder: Path, model: str | None = None
    ) -> SentenceTransformerEncoder:
        """The encoder that `describe` wrote down; `model` says where its weights are now, if elsewhere.

        Raises:
            ModelError: it can't be loaded.
        """
        prompt, limit, dim = (description.get(name) for name in ("prompt", "max_tokens", "dim"))
        name, revision = description.get("model"), description.get("revision")
        if not isinstance(name, str):
            raise ModelError("the manifest does not name the model of its vectors", file=str(folder))
        return cls(model or name, prompt=prompt, max_tokens=limit, truncate_dim=dim, revision=revision)


def _load(model: str, device: str | None, revision: str | None) -> Any:
    try:
        # Its own notices on import are of no use to users of the command line.
        with _quiet():
            from sentence_transformers import SentenceTransformer
            from torch import float32
            from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise MissingDependencyError(
            f"the encoder {model!r} needs a package that is not installed: {error.name or error}",
            remedy="pip install 'lmd3[encode]'",
        ) from None
    try:
        transformers_logging.disable_progress_bar()
        with _quiet():
            loaded = SentenceTransformer(model, device=device, revision=revision, trust_remote_code=False)
        return loaded.to(float32).eval()
    except Exception as error:
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise ModelError(
            f"the model {model!r} can't be loaded: {reason.rstrip('.')}",
            remedy="give the name or folder of a sentence-transformers model",
        ) from error
    finally:
        transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences warnings and log lines of the libraries for a while."""
    names = ("sentence_transformers", "transformers", "huggingface_hub")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _dimension(model: Any) -> int:
    # Renamed in sentence-transformers 5.
    name = "get_embedding_dimension"
    found = getattr(model, name)() if hasattr(model, name) else model.get_sentence_embedding_dimension()
    if found is None:
        raise ModelError("the model does not say how many dimensions its vectors have")
    return int(found)


def _revision(model: Any) -> str | None:
    """The commit that the weights were loaded from, where the hub's cache knows it."""
    config = getattr(getattr(model[0], "auto_model", None), "config", None)
    commit = getattr(config, "_commit_hash", None)
    return commit if isinstance(commit, str) else None


def _pooling(model: Any) -> str | None:
    """How token vectors become one ("mean", "cls", …); None for models without that step."""
    for module in model:
        for name in ("get_pooling_mode_str", "pooling_mode"):
            found = getattr(module, name, None)
            found = found() if callable(found) else found
            if isinstance(found, str):
                return found
    return None


def _fingerprint(model: Any, settings: Mapping[str, Any]) -> str:
    """Of the weights, the tokenizer and the settings: what the vectors depend on."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(json.dumps(dict(settings), sort_keys=True).encode())
    digest.update(" ".join(type(module).__name__ for module in model).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"\0{name} {tuple(tensor.shape)}\0".encode())
        digest.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).tobytes())
    tokenizer = getattr(model.tokenizer, "backend_tokenizer", model.tokenizer)
    if hasattr(tokenizer, "to_str"):
        # Truncation and padding are settings of a call, not of the vocabulary.
        parts = json.loads(tokenizer.to_str())
        parts = {name: part for name, part in parts.items() if name not in ("truncation", "padding")}
        digest.update(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()
