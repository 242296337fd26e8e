"""Encoders: texts to vectors of unit norm, behind one small protocol.

Nothing heavy is imported here; `create_encoder` and `restore_encoder` load the module of the encoder asked
for.
"""

from __future__ import annotations

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
    """

    vectors: NDArray[np.float32]
    tokens: NDArray[np.int32]
    truncated: NDArray[np.bool_]


@runtime_checkable
class Encoder(Protocol):
    """Turns texts into vectors of unit norm. The same text gives the same vector wherever it stands in the
    input, up to the rounding of float32.

    A class that implements it also has `restore(description, folder)`, the inverse of `describe` and
    `save_state`, where its stores are to encode queries later.
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

        Keys: `kind` ("hashing" or "sentence-transformers"), `model`, `revision`, `prompt`, `max_tokens`,
            `dim`,
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
) -> Encoder:
    """The encoder of a name.

    Args:
        model: "hashing" (built in), the name or folder of a sentence-transformers model, or an encoder,
            which is returned as it is.
        prompt: put before every text (neural encoders only).
        max_tokens: tokens read of each text; the rest is cut off and the text counted. None: what the model
            reads.
        truncate_dim: keep the first dimensions only and normalise again. For "hashing": the dimensions.
        batch_size: texts per forward pass of a neural encoder; None: its default.

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
    if not isinstance(model, str | Path):
        if (prompt, max_tokens, truncate_dim, batch_size) != (None, None, None, None):
            raise ParameterError("settings belong to the encoder given: they can't be changed here")
        return model
    if str(model) == "hashing":
        if prompt is not None:
            raise ParameterError("a prompt has no meaning for the hashing encoder: its vectors count words")
        from lmd3.encoders.hashing import HashingEncoder

        settings = {} if truncate_dim is None else {"dim": truncate_dim}
        return HashingEncoder(**settings, max_tokens=max_tokens)
    from lmd3.encoders.sentence_transformers import BATCH_SIZE, SentenceTransformerEncoder

    return SentenceTransformerEncoder(
        str(model),
        prompt=prompt,
        max_tokens=max_tokens,
        truncate_dim=truncate_dim,
        batch_size=BATCH_SIZE if batch_size is None else batch_size,
    )


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
