"""Several processes that encode windows, each with its share of the threads.

Processes are spawned, never forked: a fork copies locks of torch, rayon and the tokenizers in whatever state
they are. Windows come back in their order, and what is computed for one does not depend on the number of
processes.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from lmd3.encoders import EncodedBatch, Encoder, restore_encoder
from lmd3.encoders.windows import Window
from lmd3.errors import Lmd3Error, ModelError, WorkError

__all__ = ["encode_windows"]

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")

#: Kinds of encoders that are no slower than what goes on around them, and soon stopped.
_QUICK = ("hashing", "static")

#: The encoder of a worker process.
_encoder: Encoder | None = None


def open_encoder(
    description: Mapping[str, Any], folder: str, batch_size: int | None, threads: int
) -> Encoder:
    """The encoder of a process that only encodes, with its share of the threads."""
    for name in _THREADS:
        os.environ[name] = str(threads)
    # The tokenizers' own pool of threads reads this.
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    encoder = restore_encoder(description, Path(folder))
    if batch_size is not None:
        encoder.batch_size = batch_size  # type: ignore[attr-defined]
    if description["kind"] == "sentence-transformers":
        from lmd3.encoders.sentence_transformers import limit_threads

        limit_threads(threads)
    return encoder


def _start(description: Mapping[str, Any], folder: str, batch_size: int | None, threads: int) -> None:
    global _encoder
    _encoder = open_encoder(description, folder, batch_size, threads)


def _encode(texts: list[str]) -> EncodedBatch | dict[str, Any]:
    assert _encoder is not None
    try:
        return _encoder.encode(texts)
    except Lmd3Error as error:
        # Errors do not keep their parts on the way between processes.
        return {"message": error.message, "row": error.row, "remedy": error.remedy}


def encode_windows(
    windows: Iterable[Window],
    encoder: Encoder,
    *,
    workers: int = 1,
    threads: int | None = None,
    state: Path | None = None,
) -> Iterator[tuple[Window, EncodedBatch]]:
    """The windows in their order, with their vectors.

    Args:
        windows: what to encode.
        encoder: by what; with one worker it is used as it is.
        workers: processes.
        threads: of all processes together; None: all cores.
        state: folder of the encoder's frozen state, for other processes.

    Raises:
        ModelError: an encoder that other processes can't rebuild, or that fails on a text.
        WorkError: a process ended.
    """
    if workers == 1:
        quick = encoder.describe().get("kind") in _QUICK
        yield from _ahead(windows, encoder) if quick else _in_turn(windows, encoder)
        return
    from lmd3.system import cores

    if encoder.describe().get("kind") not in ("hashing", "static", "sentence-transformers"):
        raise ModelError(
            f"the encoder {encoder.name!r} can't be rebuilt in other processes",
            remedy="encode with one worker",
        )
    budget = max(1, (threads or cores()) // workers)
    arguments = (encoder.describe(), str(state or ""), getattr(encoder, "batch_size", None), budget)
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=arguments
    )
    under_way: deque[tuple[Window, Future[Any]]] = deque()
    try:
        for window in windows:
            under_way.append((window, pool.submit(_encode, window.texts)))
            # One window ahead of each worker, so that none waits for this process.
            if len(under_way) > 2 * workers:
                yield _result(*under_way.popleft())
        while under_way:
            yield _result(*under_way.popleft())
    except BrokenProcessPool as error:
        raise WorkError(
            "a worker process ended: out of memory, killed, or its encoder could not be loaded",
            remedy="finished windows are kept: run the same command again, with fewer --workers",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_turn(windows: Iterable[Window], encoder: Encoder) -> Iterator[tuple[Window, EncodedBatch]]:
    for window in windows:
        yield window, encoder.encode(window.texts)


def _ahead(windows: Iterable[Window], encoder: Encoder) -> Iterator[tuple[Window, EncodedBatch]]:
    """Encodes a window while this thread reads the next one and the caller keeps the one before.

    Where encoding is quick, reading and writing take as long, and on one core only.
    """
    with ThreadPoolExecutor(1) as pool:
        before: tuple[Window, Future[EncodedBatch]] | None = None
        for window in windows:
            here = (window, pool.submit(encoder.encode, window.texts))
            if before is not None:
                yield before[0], before[1].result()
            before = here
        if before is not None:
            yield before[0], before[1].result()


def _result(window: Window, future: Future[Any]) -> tuple[Window, EncodedBatch]:
    found = future.result()
    if isinstance(found, dict):
        raise WorkError(found["message"], row=found["row"], remedy=found["remedy"])
    return window, found
