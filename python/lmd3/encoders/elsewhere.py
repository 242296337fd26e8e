"""Windows encoded by tasks, each on whichever machine an executor chooses.

This process reads the input and cuts it into windows; it leaves each as a file beside the store to be, in
the folder of the encoding (`lmd3.encoders.job`), which all machines see under one path. A task encodes a
window and leaves `done-NUMBER-CHECKSUM.arrow`, whole or not at all; this process takes them over in their
order, as if it had encoded them itself: the store is the same to the byte, and what is done outlives this
process. Neither texts nor vectors go through the executor.
"""

from __future__ import annotations

import functools
import json
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lmd3.encoders import Encoder
from lmd3.encoders.job import Job, pack_window, read_key
from lmd3.encoders.pool import open_encoder
from lmd3.encoders.windows import Window, window_table
from lmd3.errors import FormatError, ModelError, WorkError
from lmd3.executors import Done, Executor, Summary, Task, run_tasks
from lmd3.progress import ProgressFactory
from lmd3.store import xxh3
from lmd3.store.files import sync_folder

__all__ = ["check_rebuildable", "encode_elsewhere", "encode_window"]

#: What workers build the encoder from.
ENCODER = "encoder.json"

_DONE = re.compile(r"done-(\d{9})-([0-9a-f]{16})\.arrow")


def check_rebuildable(encoder: Encoder) -> None:
    """Refuses an encoder that other processes can't rebuild.

    Raises:
        ModelError: it is such a one.
    """
    if encoder.describe().get("kind") not in ("hashing", "static", "sentence-transformers"):
        raise ModelError(
            f"the encoder {encoder.name!r} can't be rebuilt in other processes",
            remedy="encode with one worker, in this process",
        )


def encode_elsewhere(
    job: Job,
    todo: Iterable[Window],
    encoder: Encoder,
    executor: Executor,
    weights: Callable[[Window], Any],
    kept: Callable[[int], None],
    total: float,
    progress: ProgressFactory,
) -> Summary:
    """Encodes windows by tasks and keeps them in their order.

    Args:
        job: of the encoding, begun.
        todo: the windows from `job.position` on; only a few are held at once.
        encoder: by what, fitted; its state is in the job's folder.
        executor: where tasks run.
        weights: of a window's rows; it gives None where they have none.
        kept: is told the rows of each window that the job now holds.
        total: texts behind `job.position`.
        progress: makes the bar.

    Raises:
        WorkError: tasks failed; the texts of each are named.
    """
    ready = _found(job)
    _write(job.folder / ENCODER, json.dumps(encoder.describe(), ensure_ascii=False).encode())

    def take_over() -> None:
        while (path := ready.pop(job.next_window, None)) is not None:
            number = job.next_window
            content = path.read_bytes()
            if xxh3(content) != path.stem.rpartition("-")[2]:
                path.unlink(missing_ok=True)
                raise FormatError(
                    "what a task left is damaged", file=str(path), remedy="give the same command again"
                )
            rows = job.take_over(path, content)
            _input(job.folder, number).unlink(missing_ok=True)
            kept(rows)

    def tasks() -> Iterator[Task]:
        number, begin = job.next_window, tuple(job.position)
        for window in todo:
            facts = {"begin": list(begin), "position": list(window.position), "rows": len(window)}
            name = f"texts {begin[0]:,} to {window.position[0] - 1:,}"
            size = float(window.position[0] - begin[0])
            if not _fits(ready.get(number), facts):
                ready.pop(number, None)
                _write_input(job.folder, number, window, facts, weights(window))
                arguments = {
                    "folder": str(job.folder.absolute()),
                    "number": number,
                    "threads": executor.threads,
                }
                yield Task(name, arguments, size)
            else:
                take_over()
            number, begin = number + 1, window.position

    def ended(done: Done) -> None:
        ready[int(done.task.arguments["number"])] = job.folder / done.value["file"]
        take_over()

    summary = run_tasks(
        executor,
        encode_window,
        tasks(),
        label="encoding",
        total=total,
        unit="texts",
        progress=progress,
        each=ended,
    )
    take_over()
    return summary


def _found(job: Job) -> dict[int, Path]:
    """What tasks of an earlier run have left, by number; other leftovers are removed."""
    ready: dict[int, Path] = {}
    for path in job.folder.iterdir():
        if (name := _DONE.fullmatch(path.name)) and int(name[1]) >= job.next_window:
            ready[int(name[1])] = path
        elif path.name.startswith(("done-", "input-", ".done-", ".input-")):
            path.unlink(missing_ok=True)
    return ready


def _fits(path: Path | None, facts: dict[str, Any]) -> bool:
    """Whether a file holds the window of these facts, undamaged."""
    if path is None:
        return False
    try:
        content = path.read_bytes()
        whole = xxh3(content) == path.stem.rpartition("-")[2]
        return whole and json.loads(pa.ipc.open_file(content).schema.metadata[b"facts"]) == facts
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return False


def _input(folder: Path, number: int) -> Path:
    return folder / f"input-{number:09}.arrow"


def _write(path: Path, content: bytes) -> None:
    """Writes a file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def _write_input(folder: Path, number: int, window: Window, facts: dict[str, Any], weights: Any) -> None:
    columns: dict[str, Any] = {
        "id": pa.array(window.ids, pa.string()),
        "text": pa.array(window.texts, pa.large_string()),
        "left_out": pa.array(window.left_out),
    }
    for name, values in (("group", window.groups), ("document", window.documents)):
        if values is not None:
            columns[name] = pa.array(values, pa.string())
    if window.chunks is not None:
        columns["chunk"] = pa.array(window.chunks)
    if weights is not None:
        columns["weight"] = pa.array(weights)
    table = pa.table(columns).replace_schema_metadata({"facts": json.dumps(facts)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    try:
        _write(_input(folder, number), sink.getvalue().to_pybytes())
    except OSError as error:
        raise WorkError(
            error.strerror or str(error),
            file=str(folder),
            remedy="what was finished is kept: make room and run the same command again",
        ) from None


# --- the work of a task ---


def encode_window(arguments: dict[str, Any], report: Callable[[float], None]) -> dict[str, Any]:
    """A task on any machine: encodes a window into a file.

    Args:
        arguments: `folder` of the encoding, `number` of the window, `threads`.
        report: is not used.

    Raises:
        InputError, WorkError: and their kinds: the encoder is not here or not the same, or another version.
    """
    folder, number = Path(arguments["folder"]), int(arguments["number"])
    written = (folder / ENCODER).stat().st_mtime_ns
    key, encoder = _opened(folder, written, arguments["threads"])
    path = _input(folder, number)
    with pa.OSFile(str(path)) as source:
        table = pa.ipc.open_file(source).read_all().combine_chunks()
    facts = json.loads(table.schema.metadata[b"facts"])
    names = table.column_names
    lists = {
        name: table[name].to_pylist() if name in names else None
        for name in ("id", "text", "group", "document")
    }
    window = Window(
        ids=lists["id"] or [],
        texts=lists["text"] or [],
        groups=lists["group"],
        weights=None,  # go around the encoder
        documents=lists["document"],
        chunks=table["chunk"].to_numpy() if "chunk" in names else None,
        left_out=table["left_out"].to_numpy(),
        position=(facts["position"][0], facts["position"][1]),
    )
    encoded = encoder.encode(window.texts)
    found = window_table(window, encoded, key["texts"])
    if "weight" in names:
        found = found.append_column("weight", table["weight"])
    half = key["dtype"] == "float16" and key["exact"] is None
    vectors = encoded.vectors.astype(np.float16) if half else encoded.vectors
    content = pack_window(found, vectors, {"position": facts["position"], "facts": facts})
    name = f"done-{number:09}-{xxh3(content)}.arrow"
    _write(folder / name, content)
    return {"rows": len(window), "bytes": path.stat().st_size, "file": name}


@functools.lru_cache(maxsize=1)
def _opened(folder: Path, written: int, threads: int | None) -> tuple[dict[str, Any], Encoder]:
    """The settings of an encoding and its encoder, kept between the tasks of a worker."""
    from lmd3.encoders.run import _version
    from lmd3.system import cores

    key = read_key(folder)
    if key["lmd3"] != _version():
        raise WorkError(f"lmd3 {_version()} is installed here, the encoding was begun by {key['lmd3']}")
    description = json.loads((folder / ENCODER).read_bytes())
    encoder = open_encoder(description, str(folder / "state"), key["batch_size"], threads or cores())
    return key, encoder
