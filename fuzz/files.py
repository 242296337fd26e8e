"""Damaged Arrow files, faiss indexes and manifests: `python fuzz/files.py SECONDS [arrow|faiss|manifest]…`.

Any error but the library's own, a hang or a large allocation is a finding (the bytes are kept in
fuzz/artifacts). Seconds are of this process's own time, so that a busy machine does not make them fewer.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import lmd3
from lmd3.errors import InputError, Lmd3Error
from lmd3.store import StoreWriter, verify_store
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


#: What takes the place of a value in a manifest.
_VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    2**31,
    2**63,
    2**70,
    1e308,
    "",
    "x",
    "../x",
    "a/b",
    [],
    {},
    [1],
    {"a": 1},
]


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [(value, key) for key, _ in inner]
    return found + [place for container, key in found for place in _places(container[key])]


def _damaged_manifest(whole: str, chance: random.Random) -> bytes:
    """Values, keys and whole branches exchanged: what is well-formed and wrong."""
    manifest = json.loads(whole)
    for _ in range(chance.choice([1, 1, 2, 4])):
        places = _places(manifest)
        container, key = chance.choice(places)
        match chance.randrange(5):
            case 0:
                del container[key]
            case 1:
                other, its = chance.choice(places)
                container[key] = json.loads(json.dumps(other[its])) if its in _keys(other) else None
            case 2 if isinstance(container, dict):
                container[chance.choice(["name", "rows", "exact", "scales", "groups", "x"])] = container.pop(
                    key
                )
            case _:
                container[key] = copy.deepcopy(chance.choice(_VALUES))
    text = json.dumps(manifest).encode()
    return _damaged(text, chance) if chance.random() < 0.1 else text


def _keys(container: Any) -> Any:
    return range(len(container)) if isinstance(container, list) else container


def _store(folder: Path) -> str:
    """A store with all that manifests speak of."""
    lmd3.encode([f"the cat number {row}" for row in range(40)], out=folder / "base", shard_rows=20)
    lmd3.convert(folder / "base", folder / "rows", dtype="int8", exact="float16")
    base = lmd3.open_store(folder / "rows")
    shutil.rmtree(folder / "store", ignore_errors=True)
    with StoreWriter(
        folder / "store", dtype="int8", encoder=base.encoder, exact="float16", shard_rows=20
    ) as writer:
        strata = [{"name": name, "texts": 40, "sampled": 20, "threshold": "f" * 16} for name in "ab"]
        writer.facts["sampling"] = {
            "rate": 0.5,
            "seed": 0,
            "by": "group",
            "texts": 80,
            "sampled": 40,
            "strata": strata,
        }
        writer.facts["chunking"] = {"mode": "truncate", "tokens": None, "overlap": 0}
        writer.facts["appended"] = [
            {"rows": 20, "shards": 1, "fingerprint": "x", "rounding": 0.1, "source": {}}
        ]
        writer.attach(folder / "rows" / "hashing.bin")
        rows = np.arange(40)
        groups = ["ab"[row % 2] for row in rows]
        writer.append(
            base.rows(rows), base.ids(), groups, tokens=rows, truncated=rows > 9, weights=np.ones(40)
        )
    return (folder / "store" / "manifest.json").read_text()


def _use(folder: Path) -> None:
    """A store as commands use it: inspect, verify, a density by group, a conversion."""
    from lmd3.cli.inspect import _page, facts_of

    store = lmd3.open_store(folder)
    _page(facts_of(store, folder, 3))
    verify_store(store)
    lmd3.KernelDensity(bandwidth=0.5, threads=1).fit(store).density(store.rows(np.array([0])), by_group=True)
    lmd3.convert(store, folder.parent / "converted", dtype="float16", force=True)


def _attempt(path: Path) -> None:
    if path.is_dir():
        with contextlib.suppress(Lmd3Error):
            _use(path)
        return
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


def main(seconds: float, kinds: list[str]) -> int:
    """Tries damaged files for so long each kind; 1 where something was found."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    work = FOLDER / "work"
    work.mkdir(exist_ok=True)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    found = _seeds(work)
    manifest = _store(work)
    seed = time.time_ns()
    print(f"seed {seed}")
    chance = random.Random(seed)
    # What a damaged number may not allocate.
    resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))
    # A hang is counted in the process's own seconds too.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    all_findings = 0
    for kind in kinds:
        names = [name for name in found if Path(name).suffix == f".{kind}"]
        end, tried, findings = time.process_time() + seconds, 0, 0
        while time.process_time() < end:
            if kind == "manifest":
                path = file = work / "store" / "manifest.json"
                file.write_bytes(_damaged_manifest(manifest, chance))
                path = work / "store"
            else:
                name = chance.choice(names)
                path = file = work / f"x{Path(name).suffix}"
                file.write_bytes(_damaged(found[name], chance))
            # The file is in its place for whoever looks after a crash.
            signal.setitimer(signal.ITIMER_PROF, 10)
            try:
                _attempt(path)
            except Exception as error:
                findings += 1
                kept = FOLDER / f"{type(error).__name__}-{tried}{file.suffix}"
                kept.write_bytes(file.read_bytes())
                where = traceback.extract_tb(error.__traceback__)[-1]
                at = f"{Path(where.filename).name}:{where.lineno}"
                print(f"{kept}: {type(error).__name__} at {at}: {error}", flush=True)
            signal.setitimer(signal.ITIMER_PROF, 0)
            tried += 1
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        line = f"{kind}: {tried:,} files, {findings} findings, {seconds:.0f} s of CPU, peak {peak} MB"
        print(line, flush=True)
        all_findings += findings
    return 1 if all_findings else 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:] or ["arrow", "faiss", "manifest"]))
