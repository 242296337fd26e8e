"""Encoders: texts to vectors of unit norm, behind one small protocol.

Nothing heavy is imported here; `create_encoder` and `restore_encoder` load the module of the encoder asked
for.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from lmd3.errors import ModelError, ParameterError

__all__ = ["EncodedBatch", "Encoder", "create_encoder", "restore_encoder"]


@dataclass(frozen=True)
class EncodedBatch:
    """What an encoder makes of m texts.

    Attributes:
        vectors: (m, dim) float32, every row of norm 1.
        tokens: (m,) int32, tokens (or words) read of each text, after truncation and with the prompt.
        truncated: (m,) bool, whether the text was longer than what the encoder reads.
        left_out: (m,) int32, tokens beyond the limit; None where the encoder does not count them.
    """

    vectors: NDArray[np.float32]
    tokens: NDArray[np.int32]
    truncated: NDArray[np.bool_]
    left_out: NDArray[np.int32] | None = None


@runtime_checkable
class Encoder(Protocol):
    """Turns texts into vectors of unit norm. The same text gives the same vector wherever it stands in the
    input, up to the rounding of float32.

    A class that implements it also has `restore(description, folder)`, the inverse of `describe` and
    `save_state`, where its stores are to encode queries later; and to cut texts into chunks by its own
    tokens, `token_spans(texts)`, a (tokens, 2) array of starts and ends in characters for each text, and
    `room`, the tokens of a text that it reads (None: all).
    """

    @property
    def name(self) -> str:
        """How the user names the encoder: `hashing`, a model's name or folder."""

    @property
    def dim(self) -> int:
        """Dimensions of the vectors."""

    @property
    def fitted(self) -> bool:
        """Whether `encode` can be called: always for models trained elsewhere, after `fit` for others."""

    def describe(self) -> dict[str, Any]:
        """The settings as JSON values, recorded in the store's manifest.

        Keys: `kind` ("hashing", "static" or "sentence-transformers"), `model`, `revision`, `prompt`,
        `max_tokens`, `dim`,
        `fingerprint` (hex; equal exactly where the vectors are: it covers settings, weights or fitted state),
        `state_file` (name of the file that `save_state` writes; only where there is one), and the encoder's
        own.
        """

    def fit(self, texts: Iterable[str]) -> None:
        """Learns from the texts of a corpus, once. Does nothing, and reads nothing, for models trained
        elsewhere.
        """

    def encode(self, texts: Sequence[str]) -> EncodedBatch:
        """The vectors of texts, in their order.

        Raises:
            ModelError: where the encoder has not been fitted.
        """

    def save_state(self, folder: Path) -> None:
        """Writes what `fit` learned to `folder / state_file`; nothing for models trained elsewhere."""

    def load_state(self, folder: Path) -> None:
        """Reads what `save_state` wrote.

        Raises:
            FileMissingError, FormatError: where the state is not there or damaged.
        """


def create_encoder(
    model: str | Path | Encoder = "hashing",
    *,
    prompt: str | None = None,
    max_tokens: int | None = None,
    truncate_dim: int | None = None,
    batch_size: int | None = None,
    precision: str | None = None,
    backend: str | None = None,
) -> Encoder:
    """The encoder of a name.

    Args:
        model: "hashing" (built in), the name or folder of a sentence-transformers or model2vec model, or an
            encoder, which is returned as it is. `static:NAME` is a model2vec model by its name on the hub.
        prompt: put before every text (neural encoders only).
        max_tokens: tokens read of each text; the rest is cut off and the text counted. None: what the model
            reads.
        truncate_dim: keep the first dimensions only and normalise again. For "hashing": the dimensions.
        batch_size: texts per forward pass of a neural encoder; None: as many as make 2,048 tokens.
        precision: arithmetic of a neural encoder, "float32" (default) or "bfloat16", which is refused where a
            short benchmark finds it no faster.
        backend: what runs a neural encoder: "torch" (default), "onnx" or "openvino".

    Raises:
        ParameterError: a setting outside its range or without meaning for the encoder.
        MissingDependencyError: the package the encoder needs is not installed.
        ModelError: the model can't be loaded.
    """
    for name, value in (
        ("max_tokens", max_tokens),
        ("truncate_dim", truncate_dim),
        ("batch_size", batch_size),
    ):
        if value is not None and value < 1:
            raise ParameterError(f"{name} must be at least 1, not {value}")
    neural = {"prompt": prompt, "batch_size": batch_size, "precision": precision, "backend": backend}
    settings = {"max_tokens": max_tokens, "truncate_dim": truncate_dim, **neural}
    if not isinstance(model, str | Path):
        if any(setting is not None for setting in settings.values()):
            raise ParameterError("settings belong to the encoder given: they can't be changed here")
        return model
    if str(model) == "hashing":
        if prompt is not None:
            raise ParameterError("a prompt has no meaning for the hashing encoder: its vectors count words")
        _refuse(neural, "the hashing encoder")
        from lmd3.encoders.hashing import HashingEncoder

        dim = {} if truncate_dim is None else {"dim": truncate_dim}
        return HashingEncoder(**dim, max_tokens=max_tokens)
    if static := _static(str(model)):
        _refuse(neural | {"prompt": None}, "a static encoder")
        from lmd3.encoders.static import StaticEncoder

        return StaticEncoder(static, prompt=prompt, max_tokens=max_tokens, truncate_dim=truncate_dim)
    from lmd3.encoders.sentence_transformers import SentenceTransformerEncoder

    return SentenceTransformerEncoder(
        str(model),
        prompt=prompt,
        max_tokens=max_tokens,
        truncate_dim=truncate_dim,
        batch_size=batch_size,
        precision="float32" if precision is None else precision,
        backend="torch" if backend is None else backend,
    )


def _refuse(settings: Mapping[str, Any], encoder: str) -> None:
    for name, value in settings.items():
        if value is not None and (name, value) not in (("precision", "float32"), ("backend", "torch")):
            raise ParameterError(f"{name} has no meaning for {encoder}", remedy="leave it away")


def _static(model: str) -> str | None:
    """The name or folder of a static model where `model` names one: `static:NAME`, or a folder that says
    so."""
    if model.startswith("static:"):
        return model.removeprefix("static:")
    folder = Path(model).expanduser()
    config, modules = _json(folder / "config.json"), _json(folder / "modules.json")
    if isinstance(config, dict) and config.get("model_type") == "model2vec":
        return model
    # model2vec writes its models so that sentence-transformers reads them too.
    first = modules[0] if isinstance(modules, list) and modules else None
    static = isinstance(first, dict) and str(first.get("type")).endswith(".StaticEmbedding")
    if static and (folder / "model.safetensors").exists() and importlib.util.find_spec("model2vec"):
        return model
    return None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def restore_encoder(description: Mapping[str, Any], folder: Path, model: str | None = None) -> Encoder:
    """The encoder that a store was written with, its fitted state included.

    Args:
        description: what `describe` gave, as the manifest keeps it.
        folder: where `save_state` wrote: the store's folder.
        model: where the weights of a neural encoder are now, if not where the description says.

    Raises:
        ModelError: an unknown kind of encoder, or one that is no longer the same (its fingerprint differs).
    """
    encoder: Encoder
    match description.get("kind"):
        case "hashing":
            from lmd3.encoders.hashing import HashingEncoder

            encoder = HashingEncoder.restore(description, folder)
        case "static":
            from lmd3.encoders.static import StaticEncoder

            encoder = StaticEncoder.restore(description, folder, model)
        case "sentence-transformers":
            from lmd3.encoders.sentence_transformers import SentenceTransformerEncoder

            encoder = SentenceTransformerEncoder.restore(description, folder, model)
        case kind:
            raise ModelError(
                f"an encoder of kind {kind!r} can't be rebuilt from the store's manifest",
                file=str(folder),
                remedy="encode the queries with the same encoder and give their vectors",
            )
    if encoder.describe()["fingerprint"] != description.get("fingerprint"):
        raise ModelError(
            f"{encoder.name!r} is not the encoder the store was written with: its fingerprint differs",
            file=str(folder),
            remedy="use the model's revision recorded in the manifest, or encode the corpus again",
        )
    return encoder
