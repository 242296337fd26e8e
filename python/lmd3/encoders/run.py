"""Encoding: a stream of texts to a store, window by window, and queries by the encoder of their corpus.

Memory is that of a few windows of texts and of the encoder, whatever the length of the input. The input is
read
twice: first to refuse what is wrong with it before hours of work, to count it (and the strata of a sample)
and to fit the encoder where it has to be; then to encode it. Every finished window is on disk
(`lmd3.encoders.job`), and the same call after a kill goes on behind the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lmd3.encoders import Encoder, create_encoder, restore_encoder
from lmd3.encoders.chunking import Chunking, size_of
from lmd3.encoders.elsewhere import check_rebuildable, encode_elsewhere
from lmd3.encoders.job import Job
from lmd3.encoders.pool import encode_windows
from lmd3.encoders.windows import Window, window_table, windows
from lmd3.errors import DtypeError, ModelError, ParameterError, ShapeError, WorkError
from lmd3.executors import Executor, in_lines
from lmd3.progress import ProgressFactory, silent
from lmd3.store import DTYPES, Store, check_replaceable, open_store
from lmd3.store.lock import WriterLock
from lmd3.store.resuming import ResumableStoreWriter
from lmd3.store.sampling import SampleCounter, SampleDesign
from lmd3.store.writing import check_exact
from lmd3.texts import Texts

__all__ = ["encode", "encode_queries", "encoder_from_store"]

#: Rows of a window: what is sorted by length together, and what a kill may cost.
WINDOW = 4096


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
    precision: str | None = None,
    backend: str | None = None,
    chunk: str | Chunking = "truncate",
    chunk_tokens: int | None = None,
    chunk_overlap: int = 0,
    sample: float | None = None,
    sample_by: str | None = None,
    seed: int = 0,
    shard_rows: int = 1 << 20,
    window: int = WINDOW,
    workers: int = 1,
    threads: int | None = None,
    keep_texts: bool = True,
    exact: str | None = None,
    force: bool = False,
    executor: Executor | None = None,
    notice: Callable[[str], None] | None = None,
    progress: ProgressFactory | None = None,
) -> Store:
    """Encodes texts into a store, rows in input order.

    Killed at any moment, the same call goes on behind the last finished window, and its store is the same to
    the byte as that of a call without a stop (on the same machine and number of threads).

    Args:
        texts: what `read_texts` gives, or a list of texts.
        model: "hashing" (built in, lexical), the name or folder of a sentence-transformers or model2vec
            model, or an encoder.
        out: the store's folder.
        dtype: element type on disk: "float16", "float32", "bfloat16" or "int8".
        prompt, max_tokens, truncate_dim, batch_size, precision, backend: settings of the encoder, see
            `create_encoder`.
        chunk, chunk_tokens, chunk_overlap: how texts longer than the encoder reads are taken, see `Chunking`.
        sample: encode only this share of the texts, drawn by hash of the id (see `lmd3.store.sampling`); the
            rows get inclusion weights, and densities their standard error. A larger share holds every text
            of a smaller one of the same seed. None: all texts.
        sample_by: "group": draw in each group by itself.
        seed: of the sample.
        shard_rows: rows of one shard.
        window: rows that are sorted by length together; what is finished is kept window by window.
        workers: processes that encode; each is spawned, so a script needs `if __name__ == "__main__":`.
        threads: of all workers together; None: all cores.
        keep_texts: keep the texts beside the vectors: reports show them, covariates need them.
        exact: "float16" or "float32": keep a finer copy of the vectors beside them (`Store.exact`).
        force: replace a store that is there; discard an unfinished encoding of other settings.
        executor: where windows are encoded (`lmd3.executors.make_executor`) [in this process]. Other
            machines need to see `out`, and a neural model, under the same path; the store is the same to the
            byte where their CPUs and numbers of threads are.
        notice: takes lines on what ran where.
        progress: makes the bars; None: no progress.

    Returns:
        The store. Its manifest counts empty texts (left out), tokens, truncated texts and the tokens they
        lost, by group.

    Raises:
        OutputError: `out` exists, is being written by another process (it is named) or can't be written, or
            an encoding of other input or settings is unfinished there.
        ModelError, MissingDependencyError, ParameterError: the encoder can't be had.
        TextFormatError, ColumnError, DuplicateIdError, …: as iterating over `Texts`.
        ShapeError: no texts.
        WorkError: the disk is full, the input changed, a worker ended, tasks of the executor failed (each is
            named); finished windows are kept.
    """
    if out is None:
        raise ParameterError("name the store's folder: out=…")
    for name, value in (("window", window), ("workers", workers), ("shard_rows", shard_rows)):
        if value < 1:
            raise ParameterError(f"{name} must be at least 1, not {value}")
    cutting = chunk if isinstance(chunk, Chunking) else Chunking(chunk, chunk_tokens, chunk_overlap)
    stream = _as_texts(texts)
    encoder = create_encoder(
        model,
        prompt=prompt,
        max_tokens=max_tokens,
        truncate_dim=truncate_dim,
        batch_size=batch_size,
        precision=precision,
        backend=backend,
    )
    counter = None if sample is None or sample == 1 else SampleCounter(sample, seed, sample_by)
    if counter is not None and stream.weight is not None:
        # The weights of a sample must add up to the texts: its standard error rests on it.
        raise ParameterError(
            "a sample has weights of its own, and the texts bring others",
            remedy="leave away the column of weights, or --sample",
        )
    if counter is None and sample_by is not None:
        raise ParameterError("a sample by group needs its rate", remedy="--sample R")
    if counter is not None and cutting.mode == "sliding":
        # Chunks of one document are drawn together, which the standard error would have to know.
        raise ParameterError(
            "a sample of documents can't be cut into sliding chunks: its standard error would be too small",
            remedy="take --chunk first, or cut the documents beforehand and sample their chunks",
        )
    return _encode_to_store(
        stream,
        encoder,
        Path(out),
        dtype=dtype,
        chunking=cutting,
        counter=counter,
        shard_rows=shard_rows,
        window=window,
        workers=workers,
        threads=threads,
        keep_texts=keep_texts,
        exact=exact,
        force=force,
        executor=executor,
        notice=notice,
        progress=progress or silent,
    )


def encode_queries(
    texts: Texts | Sequence[str],
    store: Store,
    out: str | Path | None = None,
    *,
    model: str | Path | Encoder | None = None,
    dtype: str = "float32",
    chunk: str | Chunking = "truncate",
    chunk_tokens: int | None = None,
    chunk_overlap: int = 0,
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
        chunk, chunk_tokens, chunk_overlap: as `encode`.
        force: replace a store that is there.
        progress: makes the bars.

    Raises:
        ModelError: the corpus is bare vectors, or its encoder can't be had or is another one by now.
        Others as `encode`.
    """
    cutting = chunk if isinstance(chunk, Chunking) else Chunking(chunk, chunk_tokens, chunk_overlap)
    stream = _as_texts(texts)
    encoder = encoder_from_store(store, model)
    progress = progress or silent
    if out is not None:
        return _encode_to_store(
            stream, encoder, Path(out), dtype=dtype, chunking=cutting, force=force, progress=progress
        )
    total = _first_pass(stream, encoder, None, progress)
    vectors: list[Any] = []
    parts: list[pa.Table] = []
    done = 0
    with progress("encoding queries", total, "texts") as bar:
        for rows in windows(stream, encoder, cutting, None, WINDOW, 1 << 62):
            encoded = encoder.encode(rows.texts)
            vectors.append(encoded.vectors)
            parts.append(window_table(rows, encoded, keep_texts=True))
            done = rows.position[0]
            bar.update(done)
    if done != total:
        raise _changed(stream)
    return Store.in_memory(np.concatenate(vectors), pa.concat_tables(parts), encoder=encoder.describe())


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


def _first_pass(
    texts: Texts, encoder: Encoder, counter: SampleCounter | None, progress: ProgressFactory
) -> int:
    """Reads everything once: proves the input sound, fits the encoder where it has to be, and counts."""

    def stream() -> Iterator[str]:
        done = 0
        for batch in texts:
            if counter is not None:
                counter.add(batch.ids, batch.groups)
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


def _encode_to_store(
    texts: Texts,
    encoder: Encoder,
    out: Path,
    *,
    dtype: str,
    chunking: Chunking,
    counter: SampleCounter | None = None,
    shard_rows: int = 1 << 20,
    window: int = WINDOW,
    workers: int = 1,
    threads: int | None = None,
    keep_texts: bool = True,
    exact: str | None = None,
    force: bool,
    executor: Executor | None = None,
    notice: Callable[[str], None] | None = None,
    progress: ProgressFactory,
) -> Store:
    elsewhere = None if executor is None or executor.in_process else executor
    if elsewhere is not None:
        check_rebuildable(encoder)
        if workers > 1:
            raise ParameterError("an executor has workers of its own", remedy="leave --workers out")
    if dtype not in DTYPES:
        raise DtypeError(f"stores are not written as {dtype}", remedy=f"use {', '.join(DTYPES)}")
    check_exact(exact, dtype)
    if chunking.mode != "truncate":
        size_of(chunking, encoder)
    key = {
        "lmd3": _version(),
        "input": texts.fingerprint,
        "columns": _columns(texts, texts.id),
        "encoder": encoder.describe(),
        "batch_size": getattr(encoder, "batch_size", None),
        "dtype": dtype,
        "chunking": chunking.describe(),
        "sample": None if counter is None else counter.describe(),
        "shard_rows": shard_rows,
        "window": window,
        "texts": keep_texts,
        "exact": exact,
    }
    with WriterLock(out), Job(out, key, force) as job:
        if job.published():
            return open_store(out)
        check_replaceable(out, force)
        if job.facts is None:
            count = _first_pass(texts, encoder, counter, progress)
            design = None if counter is None else counter.finish()
            job.encoder_state.mkdir(exist_ok=True)
            encoder.save_state(job.encoder_state)
            job.begin(
                {
                    "texts": count if design is None else design.sampled,
                    "source": _facts(texts),
                    "sampling": None if design is None else design.describe(),
                }
            )
        elif not encoder.fitted:
            encoder.load_state(job.encoder_state)
        facts = job.facts
        assert facts is not None
        design = None if facts["sampling"] is None else SampleDesign.restore(facts["sampling"])
        writer = ResumableStoreWriter(
            out,
            job.draft,
            dtype=dtype,
            encoder=encoder,
            shard_rows=shard_rows,
            force=force,
            source=facts["source"],
            exact=exact,
            locked=True,
        )
        writer.facts["chunking"] = chunking.describe()
        if facts["sampling"] is not None:
            writer.facts["sampling"] = facts["sampling"]
        try:
            if job.state is not None:
                writer.restore(job.state)
            rows = writer.n + sum(job.read_window(number)[0].num_rows for number in job.waiting)
            _finish_shards(job, writer, rows, shard_rows)
            # What was done by an earlier run would spoil the estimate of the time left.
            before = int(job.position[0])
            todo = windows(
                texts, encoder, chunking, design, window, shard_rows, position=job.position, row=rows
            )
            if elsewhere is not None:

                def kept(count: int) -> None:
                    nonlocal rows
                    rows += count
                    _finish_shards(job, writer, rows, shard_rows)

                def weigh(part: Window) -> Any:
                    return part.weights if design is None else design.weights(len(part), part.groups)

                left = float(facts["texts"] - before)
                summary = encode_elsewhere(job, todo, encoder, elsewhere, weigh, kept, left, progress)
                if notice is not None:
                    for line in in_lines(summary.to_dict()):
                        notice(line)
                todo = iter(())
            with progress("encoding", facts["texts"] - before, "texts") as bar:
                for part, encoded in encode_windows(
                    todo, encoder, workers=workers, threads=threads, state=job.encoder_state
                ):
                    table = window_table(part, encoded, keep_texts)
                    weights = part.weights
                    if design is not None:
                        weights = design.weights(len(part), part.groups)
                    if weights is not None:
                        table = table.append_column("weight", pa.array(weights))
                    half = dtype == "float16" and exact is None
                    vectors = encoded.vectors.astype(np.float16) if half else encoded.vectors
                    job.keep_window(table, vectors, part.position)
                    rows += len(part)
                    _finish_shards(job, writer, rows, shard_rows)
                    bar.update(part.position[0] - before)
            if job.position[0] != facts["texts"]:
                raise _changed(texts)
            job.seal()
            _fill(job, writer)
            store = writer.close()
        except BaseException:
            writer.abandon()
            raise
    return store


def _finish_shards(job: Job, writer: ResumableStoreWriter, rows: int, shard_rows: int) -> None:
    """Moves the waiting windows into their shard where that is complete."""
    if job.waiting and rows % shard_rows == 0:
        _fill(job, writer)
        job.finish_shard(writer.state())


def _fill(job: Job, writer: ResumableStoreWriter) -> None:
    for number in job.waiting:
        table, vectors = job.read_window(number)
        columns = {name: table[name].combine_chunks() for name in table.column_names}
        kept = {name: column for name, column in columns.items() if column.null_count < len(column)}
        lists = {
            name: kept[name].to_pylist() if name in kept else None for name in ("id", "group", "document")
        }
        numbers = {
            name: kept[name].to_numpy(zero_copy_only=False) if name in kept else None
            for name in ("tokens", "truncated", "weight", "chunk", "left_out")
        }
        writer.append(
            vectors,
            lists["id"],
            lists["group"],
            kept.get("text"),
            numbers["tokens"],
            numbers["truncated"],
            weights=numbers["weight"],
            documents=lists["document"],
            chunks=numbers["chunk"],
            left_out=numbers["left_out"],
        )


def _version() -> str:
    from lmd3 import __version__

    return __version__


def _changed(texts: Texts) -> WorkError:
    file = str(texts.paths[0]) if len(texts.paths) == 1 else None
    return WorkError("the input changed while it was read", file=file, remedy="run it again")


def _columns(texts: Texts, id: str | None) -> dict[str, Any]:
    """The columns that are read."""
    weight = {} if texts.weight is None else {"weight": texts.weight}
    return {"text": texts.text, "id": id, "group": texts.group, **weight}


def _facts(texts: Texts) -> dict[str, Any]:
    return {
        "files": [str(path) for path in texts.paths],
        "fingerprint": texts.fingerprint,
        "columns": _columns(texts, texts.id_column),
        "texts": texts.count,
        "empty": texts.empty,
        **({"first_row": texts.first_row} if texts.first_row else {}),
    }
