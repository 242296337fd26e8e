"""Neural encoders: any sentence-transformers model by name or folder, with its truncation counted.

Texts are sorted by their number of tokens and passed in batches of about 2,048 tokens, so that little is
padded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmd3.encoders import EncodedBatch
from lmd3.errors import MissingDependencyError, ModelError, ParameterError

__all__ = ["PRECISIONS", "SentenceTransformerEncoder", "limit_threads"]

PRECISIONS = ("float32", "bfloat16")
BACKENDS = ("torch", "onnx", "openvino")

#: OpenVINO takes bfloat16 by itself where the CPU has it: vectors must not depend on the CPU in silence.
_BACKEND_SETTINGS = {"openvino": {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}}

#: Tokens of one forward pass: large enough that weights are read seldom, small enough for the caches.
_BATCH_TOKENS = 2048

#: What bfloat16 must gain in the benchmark to be taken.
_WORTH = 1.05


class SentenceTransformerEncoder:
    """A sentence-transformers model. Nothing in the model's folder is executed (`trust_remote_code` is never
    given).

    A vector depends on the texts beside it in its batch by the rounding of its arithmetic only.

    Args:
        model: name or folder.
        prompt: put before every text; None: the model's own default prompt, which most do not have.
        max_tokens: tokens read of a text; None: the model's own limit, which it can't exceed.
        truncate_dim: keep the first dimensions and normalise again; None: all.
        batch_size: texts of one forward pass; None: as many as make 2,048 tokens.
        device: torch's name of the device; None: the best there is.
        revision: the model's revision on its hub.
        precision: arithmetic of the transformer: "float32", or "bfloat16" (pooling stays in float32; vectors
            have a cosine of about .9999 to those of float32).
        backend: "torch", "onnx" or "openvino" (as sentence-transformers' option of that name).
        check_speed: refuse bfloat16 where a short benchmark finds it no faster, as on CPUs without
            instructions for it, where it can be a hundred times slower.

    Attributes:
        speedup: texts per second in bfloat16 to those in float32, as the benchmark found; None: not measured.

    Raises:
        MissingDependencyError: sentence-transformers, or the backend's package, is not installed.
        ModelError: the model can't be loaded.
        ParameterError: `truncate_dim` above the model's dimensions; a precision that the machine is slow at.
    """

    def __init__(
        self,
        model: str,
        *,
        prompt: str | None = None,
        max_tokens: int | None = None,
        truncate_dim: int | None = None,
        batch_size: int | None = None,
        device: str | None = None,
        revision: str | None = None,
        precision: str = "float32",
        backend: str = "torch",
        check_speed: bool = True,
    ) -> None:
        if precision not in PRECISIONS:
            raise ParameterError(f"encoders run in {' or '.join(PRECISIONS)}, not in {precision}")
        if backend not in BACKENDS:
            raise ParameterError(f"encoders run by {', '.join(BACKENDS)}, not by {backend}")
        if backend != "torch" and precision != "float32":
            raise ParameterError(
                f"{precision} is an option of the backend torch",
                remedy=f"give a folder with a model quantised for {backend}, or leave one of the two away",
            )
        folder = Path(model).expanduser()
        local = folder.exists()
        # A manifest is read from anywhere, so folders are written down in full.
        self.name = str(folder.resolve()) if local else model
        if not local and model.startswith((".", "/", "~")):
            raise ModelError("no such folder of a model", file=model)
        self.precision, self.backend = precision, backend
        self._model = _load(self.name, device, revision, backend)
        self.batch_size = batch_size
        # Static models say "infinity".
        known = (limit for limit in (self._model.max_seq_length, max_tokens) if limit is not None)
        limits = [int(limit) for limit in known if math.isfinite(limit)]
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
        self.speedup: float | None = None
        if precision == "bfloat16":
            self._to_bfloat16(check_speed)

    def _to_bfloat16(self, check_speed: bool) -> None:
        """Puts the transformer into bfloat16, once the weights as given have their fingerprint."""
        from torch import bfloat16

        from lmd3.encoders.packed import pack_linear_layers

        self.describe()
        before = self._probe_seconds() if check_speed else 0.0
        self._model[0].to(bfloat16)
        pack_linear_layers(self._model[0])

        def widen(module: Any, args: Any, features: dict[str, Any]) -> dict[str, Any]:
            # Pooling is a mean over many tokens: in float32.
            return {
                name: value.float() if getattr(value, "dtype", None) is bfloat16 else value
                for name, value in features.items()
            }

        self._model[0].register_forward_hook(widen)
        if check_speed:
            self.speedup = before / self._probe_seconds()
            if self.speedup < _WORTH:
                raise ParameterError(
                    f"bfloat16 is no faster than float32 here ({self.speedup:.2g} times its speed)",
                    remedy="leave it away: this CPU has no instructions for it",
                )

    def _probe_seconds(self) -> float:
        """Least time of three for a batch of 16 texts of some 30 tokens."""
        texts = ["the quick brown fox jumps over the lazy dog and runs far away " * 2] * 16
        self._forward(texts[:1])
        times = []
        for _ in range(3):
            start = time.perf_counter()
            self._forward(texts)
            times.append(time.perf_counter() - start)
        return min(times)

    def _forward(self, texts: list[str]) -> NDArray[Any]:
        return np.asarray(
            self._model.encode(
                texts,
                prompt=self.prompt,
                batch_size=len(texts),
                show_progress_bar=False,
                convert_to_numpy=True,
                normalize_embeddings=False,
            )
        )

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
            # Only what differs from the default counts, so that older stores keep their fingerprint.
            changed = {} if self.precision == "float32" else {"precision": self.precision}
            if self.backend != "torch":
                changed["backend"] = self.backend
            self._fingerprint = _fingerprint(self._model, settings | changed)
        return {
            "kind": "sentence-transformers",
            "model": self.name,
            "revision": self._revision,
            **settings,
            "precision": self.precision,
            "backend": self.backend,
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
        limit = np.iinfo(np.int32).max if self.max_tokens is None else self.max_tokens
        read = np.minimum(lengths, limit)
        vectors = np.empty((len(texts), self._full_dim), np.float32)
        for rows in self._batches(read):
            vectors[rows] = self._forward([texts[row] for row in rows.tolist()])
        return EncodedBatch(
            self._normalised(vectors[:, : self.dim]),
            read.astype(np.int32),
            lengths > limit,
            (lengths - read).astype(np.int32),
        )

    def _batches(self, lengths: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Row numbers of each forward pass, shortest texts first."""
        order = np.argsort(lengths, kind="stable")
        start = 0
        while start < len(order):
            if self.batch_size is not None:
                stop = start + self.batch_size
            else:
                # Padded to the longest, which comes last.
                padded = lengths[order[start:]] * np.arange(1, len(order) - start + 1)
                stop = start + max(1, int(np.searchsorted(padded, _BATCH_TOKENS, side="right")))
            yield order[start:stop]
            start = stop

    def token_spans(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Where the tokens of each text stand, the special ones left out: (tokens, 2) starts and ends in
        characters.

        Raises:
            ModelError: a tokenizer that does not say it.
        """
        tokenizer = self._model.tokenizer
        if hasattr(tokenizer, "encode_batch_fast"):
            bare = tokenizer.encode_batch(list(texts), add_special_tokens=False)
            return [np.array(encoding.offsets, np.uint32).reshape(-1, 2) for encoding in bare]
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"the tokenizer of {self.name!r} does not say where its tokens stand",
                remedy="leave --chunk away",
            )
        encoded = tokenizer(
            list(texts),
            add_special_tokens=False,
            truncation=False,
            padding=False,
            verbose=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
        )
        return [np.array(offsets, np.uint32).reshape(-1, 2) for offsets in encoded["offset_mapping"]]

    @property
    def room(self) -> int | None:
        """Tokens of a text that are read beside the prompt and the special tokens; None: all."""
        return None if self.max_tokens is None else max(1, self.max_tokens - int(self._lengths([""])[0]))

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
        precision, backend = description.get("precision", "float32"), description.get("backend", "torch")
        name, revision = description.get("model"), description.get("revision")
        if not isinstance(name, str):
            raise ModelError("the manifest does not name the model of its vectors", file=str(folder))
        # The vectors are what they are: slower is no reason to take others.
        return cls(
            model or name,
            prompt=prompt,
            max_tokens=limit,
            truncate_dim=dim,
            revision=revision,
            precision=precision,
            backend=backend,
            check_speed=False,
        )


def limit_threads(threads: int) -> None:
    """The number of threads of torch in this process."""
    import torch

    torch.set_num_threads(threads)


def _load(model: str, device: str | None, revision: str | None, backend: str) -> Any:
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
            if backend != "torch":
                return SentenceTransformer(
                    model,
                    device=device,
                    revision=revision,
                    trust_remote_code=False,
                    backend=backend,
                    model_kwargs=_BACKEND_SETTINGS.get(backend),
                )
            loaded = SentenceTransformer(model, device=device, revision=revision, trust_remote_code=False)
        return loaded.to(float32).eval()
    except Exception as error:
        if backend != "torch" and isinstance(error, ImportError | ModuleNotFoundError):
            raise MissingDependencyError(
                f"the backend {backend} is not installed",
                remedy=f"pip install 'sentence-transformers[{backend}]'",
            ) from error
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
    for path in _exported(model, settings.get("backend")):
        digest.update(f"\0{path.name}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
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


def _exported(model: Any, backend: str | None) -> list[Path]:
    """The files of an exported model's weights, which torch does not hold."""
    if backend is None:
        return []
    inner = getattr(model[0], "auto_model", None)
    place = getattr(inner, "model_save_dir", None)
    if place is None:
        raise ModelError(
            f"the backend {backend} does not say where its weights are, so they have no fingerprint"
        )
    suffixes = (".onnx", ".onnx_data", ".xml", ".bin")
    return sorted(path for path in Path(place).rglob("*") if path.suffix in suffixes and path.is_file())
