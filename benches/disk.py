"""A file of vectors larger than memory, scanned at the rate of the disk.

`python benches/disk.py --gigabytes 30` synthesises one `.i8bin` file; then come, each with cold caches (of
this file), plain sequential reads (the disk's rate: the better of one and two readers) and exact scans by map
and by reads, with int16 arithmetic. The record goes to `benches/records/`.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from scanning.record import cpu

from lmd3 import KernelDensity
from lmd3.system import simd_level

D, PIECE = 384, 1 << 23


def synthesise(path: Path, gigabytes: float) -> int:
    """Writes rows of random integers, blocks of them shifted against each other; returns their number."""
    n = int(gigabytes * 1e9) // D
    block = np.random.default_rng(0).integers(-127, 128, size=(1 << 17, D), dtype=np.int8)
    with path.open("wb") as file:
        file.write(np.array([n, D], "<u4").tobytes())
        for start in range(0, n, len(block)):
            file.write(np.roll(block, start // len(block), axis=1)[: n - start].tobytes())
        file.flush()
        os.fsync(file.fileno())
    return n


def forget(path: Path) -> None:
    """Drops the file from the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sequential(path: Path, readers: int) -> float:
    """Bytes a second of plain reads of the whole file."""
    forget(path)
    size = path.stat().st_size
    share = size // readers

    def read(number: int) -> None:
        buffer = bytearray(PIECE)
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            end = size if number == readers - 1 else (number + 1) * share
            for offset in range(number * share, end, PIECE):
                os.preadv(file.fileno(), [buffer], offset)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(readers)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return size / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=30.0)
    parser.add_argument("--queries", type=int, nargs="+", default=[16, 256])
    parser.add_argument("--folder", type=Path, help="where the file goes [a temporary folder]")
    options = parser.parse_args()
    today = datetime.datetime.now(datetime.UTC)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "rows.i8bin"
        n = synthesise(path, options.gigabytes)
        size = path.stat().st_size
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        disk = max(sequential(path, 1), sequential(path, 2))
        lines = [
            f"# Scans at the rate of the disk, {today:%Y-%m-%d %H:%M} UTC",
            "",
            f"{cpu()}, {len(os.sched_getaffinity(0))} cores, level {simd_level()}; "
            f"{memory / 1e9:.0f} GB of memory; "
            f"{n:,} rows × {D}, int8, {size / 1e9:.1f} GB; exponential kernel, int16 arithmetic.",
            "",
            "| what | Q | seconds | GB/s | of the disk |",
            "|---|---|---|---|---|",
            f"| plain reads | – | {size / disk:.1f} | {disk / 1e9:.2f} | – |",
        ]
        print("\n".join(lines), flush=True)
        queries = np.random.default_rng(1).normal(size=(max(options.queries), D)).astype(np.float32) * 73
        for count in options.queries:
            for io in ("mmap", "pread"):
                forget(path)
                kde = KernelDensity(bandwidth=300.0, io=io, precision="int16").fit(path)
                started = time.perf_counter()
                kde.score_samples(queries[:count])
                seconds = time.perf_counter() - started
                rate = size / seconds
                shown = f"{seconds:.1f} | {rate / 1e9:.2f} | {rate / disk:.0%}"
                lines.append(f"| scan, {io} | {count} | {shown} |")
                print(lines[-1], flush=True)
        again = max(sequential(path, 1), sequential(path, 2))
        lines += ["", f"Plain reads again, at the end: {again / 1e9:.2f} GB/s."]
        print(lines[-1])
    target = Path(__file__).parent / "records" / f"{today:%Y-%m-%d}-disk.md"
    target.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
