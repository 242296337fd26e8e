"""The input as rows to encode, in windows of bounded size that end where shards do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lmd3.encoders import EncodedBatch, Encoder
from lmd3.encoders.chunking import Chunking, cut_texts
from lmd3.store.documents import documents_schema, documents_table
from lmd3.store.sampling import SampleDesign
from lmd3.texts import TextBatch

__all__ = ["Window", "window_table", "windows"]

#: Characters after which a window ends sooner: some 64 MB of text.
_CHARACTERS = 1 << 24

#: Texts cut into chunks at a time.
_CUT = 512


@dataclass(frozen=True)
class Window:
    """Rows in a row of the input: `ids`, `texts` and, where there are such, `groups`, `weights`, `documents`
    and `chunks`.

    Attributes:
        left_out: (m,) tokens that chunking dropped.
        position: texts behind this window, and chunks of the next text that are.
    """

    ids: list[str]
    texts: list[str]
    groups: list[str] | None
    weights: NDArray[np.float32] | None
    documents: list[str] | None
    chunks: NDArray[np.int32] | None
    left_out: NDArray[np.int32]
    position: tuple[int, int]

    def __len__(self) -> int:
        return len(self.ids)


def windows(
    stream: Iterable[TextBatch],
    encoder: Encoder,
    chunking: Chunking,
    sample: SampleDesign | None,
    size: int,
    shard_rows: int,
    *,
    position: Sequence[int] = (0, 0),
    row: int = 0,
) -> Iterator[Window]:
    """Windows of at most `size` rows.

    Args:
        stream: the input, from its beginning.
        encoder: by whose tokens texts are cut.
        chunking: how.
        sample: which texts are taken; None: all.
        size: rows of a window.
        shard_rows: rows of a shard, at whose ends windows end.
        position, row: where to go on, as a window gave it, and how many rows are before it.
    """
    buffer = _Buffer(chunking.mode == "sliding")
    behind = 0
    skip, skip_chunks = int(position[0]), int(position[1])
    for batch in stream:
        taken = (
            np.arange(len(batch)) if sample is None else np.flatnonzero(sample.keep(batch.ids, batch.groups))
        )
        behind += len(taken)
        taken = taken[max(0, len(taken) - max(0, behind - skip)) :]
        step = max(1, len(taken)) if chunking.mode == "truncate" else _CUT
        for start in range(0, len(taken), step):
            some = taken[start : start + step]
            first = behind - len(taken) + start
            dropped = skip_chunks if first == skip else 0
            buffer.add(batch, some, first, dropped, chunking, encoder)
            while ready := buffer.ready(min(size, shard_rows - row % shard_rows)):
                row += ready
                yield buffer.take(ready)
    while left := len(buffer):
        ready = buffer.ready(min(size, shard_rows - row % shard_rows)) or left
        row += ready
        yield buffer.take(ready)


def window_table(rows: Window, encoded: EncodedBatch, keep_texts: bool) -> pa.Table:
    """A window's documents, and `left_out`, the tokens that each lost."""
    lost = rows.left_out if encoded.left_out is None else rows.left_out + encoded.left_out
    columns: dict[str, Any] = {
        "groups": rows.groups,
        "texts": rows.texts if keep_texts else None,
        "tokens": encoded.tokens,
        "truncated": encoded.truncated | (rows.left_out > 0),
        "documents": rows.documents,
        "chunks": rows.chunks,
        "source_rows": None,
    }
    table = documents_table(rows.ids, columns, documents_schema(columns))
    return table.append_column("left_out", pa.array(lost.astype(np.int32)))


class _Buffer:
    """Rows that wait for their window."""

    def __init__(self, sliding: bool) -> None:
        self._sliding = sliding
        self._ids: list[str] = []
        self._texts: list[str] = []
        self._groups: list[str] = []
        self._weights: list[float] = []
        self._documents: list[str] = []
        #: Of each row: its text's number in the input, its chunk, and the tokens it lost.
        self._numbers: list[int] = []
        self._chunks: list[int] = []
        self._left_out: list[int] = []
        self._grouped = self._weighted = False
        self._characters = 0
        self._end = 0

    def __len__(self) -> int:
        return len(self._ids)

    def add(
        self,
        batch: TextBatch,
        taken: NDArray[np.int64],
        first: int,
        dropped: int,
        chunking: Chunking,
        encoder: Encoder,
    ) -> None:
        """Takes texts of a batch, number `first` of the input and those behind, without the `dropped` first
        chunks."""
        rows = taken.tolist()
        cut = cut_texts([batch.texts[row] for row in rows], chunking, encoder)
        ids = [batch.ids[row] for row in rows]
        owner, chunk = cut.owner.tolist()[dropped:], cut.chunk.tolist()[dropped:]
        self._texts += cut.texts[dropped:]
        self._characters += sum(map(len, cut.texts[dropped:]))
        self._numbers += [first + text for text in owner]
        self._left_out += cut.left_out.tolist()[dropped:]
        if self._sliding:
            self._documents += [ids[text] for text in owner]
            self._ids += [f"{ids[text]}#{number}" for text, number in zip(owner, chunk, strict=True)]
            self._chunks += chunk
        else:
            self._ids += ids
        if batch.groups is not None:
            self._grouped = True
            self._groups += [batch.groups[rows[text]] for text in owner]
        if batch.weights is not None:
            self._weighted = True
            self._weights += [batch.weights[rows[text]] for text in owner]
        self._end = first + len(rows)

    def ready(self, most: int) -> int:
        """Rows of the next window, or 0 where it is not complete yet."""
        if self._characters < _CHARACTERS:
            return most if len(self._texts) >= most else 0
        characters = 0
        for count, text in enumerate(self._texts[:most]):
            characters += len(text)
            if characters >= _CHARACTERS:
                return count + 1
        return most if len(self._texts) >= most else 0

    def take(self, count: int) -> Window:
        """The first rows as a window."""
        if count < len(self):
            position = (self._numbers[count], self._chunks[count] if self._sliding else 0)
        else:
            position = (self._end, 0)
        window = Window(
            self._ids[:count],
            self._texts[:count],
            self._groups[:count] if self._grouped else None,
            np.array(self._weights[:count], np.float32) if self._weighted else None,
            self._documents[:count] if self._sliding else None,
            np.array(self._chunks[:count], np.int32) if self._sliding else None,
            np.array(self._left_out[:count], np.int32),
            position,
        )
        self._characters -= sum(map(len, window.texts))
        columns: tuple[list[str] | list[int], ...]
        columns = (self._ids, self._texts, self._groups, self._documents)
        for column in (*columns, self._weights, self._numbers, self._chunks, self._left_out):
            del column[:count]
        return window
