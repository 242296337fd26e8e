"""Damaged Arrow files and faiss indexes: `python fuzz/files.py SECONDS`. Any error but the library's own, a
hang or a large allocation is a finding (the bytes are kept in fuzz/artifacts)."""

from __future__ import annotations

import random
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

import lmd3
from lmd3.errors import InputError
from lmd3.store.faiss_files import read_faiss
from lmd3.store.sources import Source

FOLDER = Path(__file__).parent / "artifacts" / "files"


def _seeds(folder: Path) -> dict[str, bytes]:
    import faiss

    rows = np.random.default_rng(0).random((9, 4), dtype=np.float32)
    lists = pa.ListArray.from_arrays(np.arange(0, 37, 4, dtype=np.int32), pa.array(rows.reshape(-1)))
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), 4)
    for name, column, make in (("file", fixed, pa.ipc.new_file), ("stream", lists, pa.ipc.new_stream)):
        table = pa.table({"id": [str(row) for row in range(9)], "v": column})
        for codec in (None, "zstd"):
            options = pa.ipc.IpcWriteOptions(compression=codec)
            with make(str(folder / f"{name}-{codec}.arrow"), table.schema, options=options) as writer:
                writer.write_table(table, max_chunksize=5)
    for name in ("Flat", "IDMap,Flat", "SQ8", "IDMap2,SQ8", "SQfp16"):
        index = faiss.index_factory(4, name)
        index.train(rows)
        index.add_with_ids(rows, np.arange(9)) if "IDMap" in name else index.add(rows)
        faiss.write_index(index, str(folder / f"{name}.faiss"))
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _damaged(whole: bytes, chance: random.Random) -> bytes:
    content = bytearray(whole)
    for _ in range(chance.choice([1, 1, 2, 4, 16])):
        at = chance.randrange(len(content))
        match chance.randrange(4):
            case 0:
                content[at] = chance.randrange(256)
            case 1:
                content[at] = chance.choice([0, 1, 127, 128, 255])
            case 2:
                size = chance.choice([4, 8])
                number = chance.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1])
                content[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")
            case _:
                other = chance.randrange(len(content))
                content[at : at + 8] = content[other : other + 8]
    if chance.random() < 0.1:
        del content[chance.randrange(len(content)) :]
    return bytes(content)


def _attempt(path: Path) -> None:
    try:
        if path.suffix == ".faiss":
            index = read_faiss(path)
            if index.piece is None:
                index.rows(0, index.n)
        store = lmd3.open_store(path)
        store.rows(np.array([0, store.n - 1]))
    except InputError:
        pass
    try:
        for _ in Source([path]).batches(["id"]):
            pass
    except InputError:
        pass


def main(seconds: float) -> int:
    """Tries damaged files for so long; 1 where something was found."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    work = FOLDER / "work"
    work.mkdir(exist_ok=True)
    found = _seeds(work)
    seed = time.time_ns()
    chance = random.Random(seed)
    # What a damaged number may not allocate.
    resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))
    end, tried, findings = time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
        name = chance.choice(list(found))
        path = work / f"x{Path(name).suffix}"
        path.write_bytes(_damaged(found[name], chance))
        # In place for whoever looks after a crash.
        signal.alarm(10)
        try:
            _attempt(path)
        except Exception as error:
            findings += 1
            kept = FOLDER / f"{type(error).__name__}-{tried}{path.suffix}"
            kept.write_bytes(path.read_bytes())
            print(f"{kept}: {type(error).__name__}: {error}")
        signal.alarm(0)
        tried += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{tried:,} files of {len(found)} kinds, {findings} findings, peak {peak} MB, seed {seed}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
