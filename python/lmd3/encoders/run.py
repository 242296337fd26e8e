"""Encoding: a stream of texts to a store, window by window, and queries by the encoder of their corpus.

Memory is that of one window of texts and of the encoder, whatever the length of the input. The input is read
twice: first to refuse what is wrong with it before hours of work, to count it and to fit the encoder where
it has to be; then to encode it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lmd3.encoders import Encoder, create_encoder, restore_encoder
from lmd3.errors import ModelError, ParameterError, ShapeError, WorkError
from lmd3.progress import ProgressFactory, silent
from lmd3.store import DOCUMENTS, Store, StoreWriter
from lmd3.texts import Texts

__all__ = ["encode", "encode_queries", "encoder_from_store"]


def encode(
    texts: Texts | Sequence[str],
    model: str | Path | Encoder = "hashing",
    out: str | Path | None = None,
    *,
    dtype: str = "float16",
    prompt: str | None = None,
    max_tokens: int | None = None,
    truncate_dim: int | None = None,
    batch_size: int | None = None,
    shard_rows: int = 1 << 20,
    keep_texts: bool = True,
    force: bool = False,
    progress: ProgressFactory | None = None,
) -> Store:
    """Encodes texts into a store, rows in input order.

    Args:
        texts: what `read_texts` gives, or a list of texts.
        model: "hashing" (built in, lexical), the name or folder of a sentence-transformers model, or an
            encoder.
        out: the store's folder.
        dtype: element type on disk: "float16", "float32", "bfloat16" or "int8".
        prompt, max_tokens, truncate_dim, batch_size: settings of the encoder, see `create_encoder`.
        shard_rows: rows of one shard.
        keep_texts: keep the texts beside the vectors: reports show them, covariates need them.
        force: replace a store that is there.
        progress: makes the bars; None: no progress.

    Returns:
        The store. Its manifest counts empty texts (left out), tokens and truncated texts.

    Raises:
        OutputError: `out` exists or can't be written.
        ModelError, MissingDependencyError, ParameterError: the encoder can't be had.
        TextFormatError, ColumnError, DuplicateIdError, …: as iterating over `Texts`.
        ShapeError: no texts.
    """
    if out is None:
        raise ParameterError("name the store's folder: out=…")
    stream = _as_texts(texts)
    encoder = create_encoder(
        model, prompt=prompt, max_tokens=max_tokens, truncate_dim=truncate_dim, batch_size=batch_size
    )
    with StoreWriter(out, dtype=dtype, encoder=encoder, shard_rows=shard_rows, force=force) as writer:
        return _write(stream, encoder, writer, keep_texts, progress or silent)


def encode_queries(
    texts: Texts | Sequence[str],
    store: Store,
    out: str | Path | None = None,
    *,
    model: str | Path | Encoder | None = None,
    dtype: str = "float32",
    force: bool = False,
    progress: ProgressFactory | None = None,
) -> Store:
    """Encodes queries by the encoder that a corpus was encoded with, its fitted state, prompt and limits
    included.

    Args:
        texts: what `read_texts` gives, or a list of texts.
        store: the corpus.
        out: the folder of a store to write; None: keep the queries in memory, as float32.
        model: where the corpus's model is now, if it has moved, or an encoder; it must have the corpus's
            fingerprint.
        dtype: element type on disk.
        force: replace a store that is there.
        progress: makes the bars.

    Raises:
        ModelError: the corpus is bare vectors, or its encoder can't be had or is another one by now.
        Others as `encode`.
    """
    stream = _as_texts(texts)
    encoder = encoder_from_store(store, model)
    progress = progress or silent
    if out is not None:
        with StoreWriter(out, dtype=dtype, encoder=encoder, force=force) as writer:
            return _write(stream, encoder, writer, True, progress)
    total = _first_pass(stream, encoder, progress)
    vectors = np.empty((total, encoder.dim), np.float32)
    parts: list[pa.Table] = []
    done = 0
    with progress("encoding queries", total, "texts") as bar:
        for batch in stream:
            if done + len(batch) > total:
                raise _changed(stream)
            encoded = encoder.encode(batch.texts)
            vectors[done : done + len(batch)] = encoded.vectors
            columns = {
                "id": pa.array(batch.ids, pa.string()),
                "group": pa.nulls(len(batch), pa.string())
                if batch.groups is None
                else pa.array(batch.groups),
                "text": pa.array(batch.texts, pa.string()),
                "tokens": pa.array(encoded.tokens),
                "truncated": pa.array(encoded.truncated),
            }
            parts.append(pa.table(columns, schema=DOCUMENTS))
            done += len(batch)
            bar.update(done)
    if done != total:
        raise _changed(stream)
    return Store.in_memory(vectors, pa.concat_tables(parts), encoder=encoder.describe())


def encoder_from_store(store: Store, model: str | Path | Encoder | None = None) -> Encoder:
    """The encoder that a store was written with.

    Args:
        store: the store.
        model: where a neural model is now, if not where the manifest says, or an encoder to take instead.

    Raises:
        ModelError: the store is bare vectors, or its encoder can't be had or is another one by now.
    """
    if store.encoder is None:
        raise ModelError(
            "bare vectors do not say how they were made, so texts can't be encoded to match them",
            file=None if store.path is None else str(store.path),
            remedy="give the vectors of the queries, or encode the corpus by lmd3 encode",
        )
    if model is not None and not isinstance(model, (str, Path)):
        if model.describe()["fingerprint"] != store.encoder.get("fingerprint"):
            raise ModelError(f"the encoder {model.name!r} is not the one that the store was written with")
        return model
    return restore_encoder(store.encoder, store.path or Path(), None if model is None else str(model))


def _as_texts(texts: Texts | Sequence[str]) -> Texts:
    if isinstance(texts, Texts):
        return texts
    if isinstance(texts, (str, Path)):
        raise ParameterError(f"{texts!s} is a path, not texts", remedy="give lmd3.read_texts(path)")
    return Texts.from_lists(texts)


def _first_pass(texts: Texts, encoder: Encoder, progress: ProgressFactory) -> int:
    """Reads everything once: proves the input sound, fits the encoder where it has to be, and counts."""

    def stream() -> Iterator[str]:
        done = 0
        for batch in texts:
            yield from batch.texts
            done += len(batch)
            bar.update(done)

    with progress("reading", None, "texts") as bar:
        if encoder.fitted:
            for _ in stream():
                pass
        else:
            rest = _refusing_nothing(stream(), texts)
            encoder.fit(rest)
            # An encoder may have seen enough before the end; the input is proven to its end.
            for _ in rest:
                pass
    if not texts.count:
        raise _no_texts(texts)
    return texts.count


def _refusing_nothing(stream: Iterator[str], texts: Texts) -> Iterator[str]:
    """The stream, refused before an encoder is fitted on nothing."""
    empty = True
    for text in stream:
        empty = False
        yield text
    if empty:
        raise _no_texts(texts)


def _no_texts(texts: Texts) -> ShapeError:
    note = f": all {texts.empty} are empty" if texts.empty else ""
    file = str(texts.paths[0]) if texts.paths else None
    return ShapeError(f"there are no texts{note}", file=file)


def _write(
    texts: Texts, encoder: Encoder, writer: StoreWriter, keep_texts: bool, progress: ProgressFactory
) -> Store:
    total = _first_pass(texts, encoder, progress)
    writer.source.update(_facts(texts))
    with progress("encoding", total, "texts") as bar:
        for batch in texts:
            encoded = encoder.encode(batch.texts)
            writer.append(
                encoded.vectors,
                batch.ids,
                groups=batch.groups,
                texts=batch.texts if keep_texts else None,
                tokens=encoded.tokens,
                truncated=encoded.truncated,
            )
            bar.update(writer.n)
    if writer.n != total:
        raise _changed(texts)
    return writer.close()


def _changed(texts: Texts) -> WorkError:
    file = str(texts.paths[0]) if len(texts.paths) == 1 else None
    return WorkError("the input changed while it was read", file=file, remedy="run it again")


def _facts(texts: Texts) -> dict[str, Any]:
    return {
        "files": [str(path) for path in texts.paths],
        "fingerprint": texts.fingerprint,
        "columns": {"text": texts.text, "id": texts.id_column, "group": texts.group},
        "texts": texts.count,
        "empty": texts.empty,
    }
