"""Anonymous memory of a scan over a store larger than any cache: `python benches/memory.py [GB] [FOLDER]`.

Writes a float16 store of so many gigabytes (384 dimensions), scores queries in a process of its own and
samples that process's `RssAnon` every 20 ms: memory the kernel can't take back, unlike mapped pages.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

D, QUERIES = 384, 1000


def write_store(folder: Path, gigabytes: float) -> Path:
    """A store of random unit rows."""
    from lmd3.store import StoreWriter

    rng = np.random.default_rng(0)
    block = rng.standard_normal((1 << 16, D), dtype=np.float32)
    block /= np.linalg.norm(block, axis=1, keepdims=True)
    blocks = round(gigabytes * 1e9 / (2 * D * len(block)))
    with StoreWriter(folder / "store.lmd3", dtype="float16") as writer:
        for index in range(blocks):
            start = index * len(block)
            # Rotated columns: other rows at no cost.
            writer.append(np.roll(block, index, axis=1), [str(start + i) for i in range(len(block))])
        writer.close()
    np.save(folder / "queries.npy", block[:QUERIES])
    return folder / "store.lmd3"


def anonymous(pid: int) -> int:
    """RssAnon of a process in bytes, 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def main() -> None:
    """Measures and prints one JSON object."""
    gigabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 6.0
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as name:
        folder = Path(name)
        started = time.perf_counter()
        store = write_store(folder, gigabytes)
        written = time.perf_counter() - started
        command = [sys.executable, "-m", "lmd3", "density", str(store), str(folder / "queries.npy")]
        command += ["--bandwidth", "0.05", "--bandwidth", "0.1", "--quiet", "-o", str(folder / "out")]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        peak = 0
        started = time.perf_counter()

        def sample() -> None:
            nonlocal peak
            while process.poll() is None:
                peak = max(peak, anonymous(process.pid))
                time.sleep(0.02)

        watcher = threading.Thread(target=sample)
        watcher.start()
        status = process.wait()
        watcher.join()
        bytes_ = sum(path.stat().st_size for path in store.glob("embeddings-*.npy"))
        cpu = next(
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
        print(
            json.dumps(
                {
                    "store_gb": round(bytes_ / 1e9, 2),
                    "queries": QUERIES,
                    "exit": status,
                    "peak_anonymous_mb": round(peak / 1e6),
                    "seconds": round(time.perf_counter() - started, 1),
                    "seconds_writing": round(written, 1),
                    "cpu": cpu,
                }
            )
        )


if __name__ == "__main__":
    main()
