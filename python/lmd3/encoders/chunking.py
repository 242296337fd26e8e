"""Cutting long texts before they are encoded, by the encoder's own tokens.

Chunks begin and end between words where the encoder's tokens allow it, so that a chunk is read as the tokens
it was cut from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmd3.encoders import Encoder
from lmd3.errors import ModelError, ParameterError

__all__ = ["CHUNKINGS", "Chunking", "Cut", "cut_texts"]

CHUNKINGS = ("truncate", "first", "sliding")


@dataclass(frozen=True)
class Chunking:
    """How texts longer than the encoder reads are taken.

    Attributes:
        mode: "truncate": the encoder reads what it can and the rest is counted; "first": the first `tokens`
            tokens are kept, as text too; "sliding": chunks of `tokens` tokens, each beginning
            `tokens - overlap` after the one before, with ids `ID#0`, `ID#1`, …
        tokens: size of a chunk; None: what the encoder reads.
        overlap: tokens that two neighbours share.

    Raises:
        ParameterError: an unknown mode, or a size and overlap that make no chunks.
    """

    mode: str = "truncate"
    tokens: int | None = None
    overlap: int = 0

    def __post_init__(self) -> None:
        if self.mode not in CHUNKINGS:
            raise ParameterError(f"texts are cut by {', '.join(CHUNKINGS)}, not by {self.mode!r}")
        if self.mode == "truncate" and (self.tokens is not None or self.overlap):
            raise ParameterError(
                "truncate takes no size", remedy="give --max-tokens, or cut by --chunk first or sliding"
            )
        if self.tokens is not None and self.tokens < 1:
            raise ParameterError(f"a chunk has at least one token, not {self.tokens}")
        if self.overlap and self.mode != "sliding":
            raise ParameterError("only sliding chunks overlap", remedy="--chunk sliding")
        if self.overlap < 0 or (self.tokens is not None and self.overlap >= self.tokens):
            raise ParameterError(f"chunks of {self.tokens} tokens can't share {self.overlap}")

    def describe(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Cut:
    """Chunks of m texts: `texts`, and for each which text it is of (`owner`) and which of its chunks
    (`chunk`). `left_out`: tokens of the text that no chunk holds."""

    texts: list[str]
    owner: NDArray[np.int64]
    chunk: NDArray[np.int32]
    left_out: NDArray[np.int32]


def size_of(chunking: Chunking, encoder: Encoder) -> int:
    """Tokens of a chunk.

    Raises:
        ModelError: an encoder that does not say where its tokens stand.
        ParameterError: a size above what the encoder reads, or none where it reads all.
    """
    room = getattr(encoder, "room", None)
    if not hasattr(encoder, "token_spans"):
        raise ModelError(f"the encoder {encoder.name!r} does not say where its tokens stand")
    size = chunking.tokens if chunking.tokens is not None else room
    if size is None:
        raise ParameterError(
            f"the encoder {encoder.name!r} reads texts of any length",
            remedy="give the size: --chunk-tokens N",
        )
    if room is not None and size > room:
        raise ParameterError(f"the encoder {encoder.name!r} reads {room} tokens of a text, not {size}")
    if chunking.overlap >= size:
        raise ParameterError(f"chunks of {size} tokens can't share {chunking.overlap}")
    return size


def cut_texts(texts: Sequence[str], chunking: Chunking, encoder: Encoder) -> Cut:
    """Cuts texts into chunks; "truncate" leaves them as they are.

    Raises:
        As `size_of`.
    """
    if chunking.mode == "truncate":
        rows = np.arange(len(texts))
        return Cut(list(texts), rows, np.zeros(len(texts), np.int32), np.zeros(len(texts), np.int32))
    size = size_of(chunking, encoder)
    found: list[str] = []
    owner: list[int] = []
    chunk: list[int] = []
    left_out: list[int] = []
    found_spans = encoder.token_spans(texts)  # type: ignore[attr-defined]
    for row, (text, spans) in enumerate(zip(texts, found_spans, strict=True)):
        pieces = _pieces(spans, size, chunking)
        for number, (first, last) in enumerate(pieces):
            whole = first == 0 and last == len(spans)
            found.append(text if whole else text[int(spans[first, 0]) : int(spans[last - 1, 1])])
            owner.append(row)
            chunk.append(number)
            left_out.append(len(spans) - last if chunking.mode == "first" else 0)
    return Cut(found, np.array(owner, np.int64), np.array(chunk, np.int32), np.array(left_out, np.int32))


def _pieces(spans: NDArray[np.uint32], size: int, chunking: Chunking) -> list[tuple[int, int]]:
    """First token and the one after the last of every chunk."""
    count = len(spans)
    if count <= size:
        return [(0, count)]
    # A word begins where a token does not touch the one before it.
    starts = np.flatnonzero(np.append(True, spans[1:, 0] > spans[:-1, 1]))

    def word(at: int, after: int) -> int:
        """The last beginning of a word up to `at`, or `at` where there is none behind `after`."""
        found = int(starts[np.searchsorted(starts, at, side="right") - 1])
        return found if found > after else at

    pieces = []
    first = 0
    while True:
        last = count if first + size >= count else word(first + size, first)
        pieces.append((first, last))
        if last == count or chunking.mode == "first":
            return pieces
        # Snapping may have shortened the chunk to less than the overlap.
        first = word(max(last - chunking.overlap, first + 1), first) if chunking.overlap else last
