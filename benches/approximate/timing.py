"""Time, not only rows: a store of many int8 rows (real embeddings plus noise), a batch of queries, and our
own exact scan beside."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmd3.density import KernelDensity
from lmd3.density.approximate import Estimation, keys_of, parse_tolerance
from lmd3.density.scan import Asked, Scanner
from lmd3.index import Index, default_path
from lmd3.progress import silent
from lmd3.store import Store, StoreWriter, open_store

#: Norm of the noise beside unit vectors: a copy lies about as far from its source as a near neighbour.
NOISE = 0.5


def synthesise(source: Store, path: Path, n: int, seed: int = 0) -> Store:
    """n unit rows: rows of the source plus noise, int8.

    Noise is a window of a pool of normal numbers, at a place of its own for each row: drawing it anew takes
    several times as long as all the rest.
    """
    if path.exists():
        return open_store(path)
    rng = np.random.default_rng(seed)
    base = source.rows(np.arange(source.n))
    pool = np.float32(NOISE / np.sqrt(source.d)) * rng.standard_normal(1 << 23, dtype=np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(pool, source.d)
    step = 16_384
    rows, noise = (np.empty((step, source.d), np.float32) for _ in range(2))
    with StoreWriter(path, dtype="int8", shard_rows=1 << 21) as writer:
        for start in range(0, n, step):
            count = min(step, n - start)
            some, added = rows[:count], noise[:count]
            np.take(base, rng.integers(source.n, size=count), axis=0, out=some)
            added[...] = windows[rng.integers(len(windows), size=count)]
            some += added
            some /= np.sqrt(np.einsum("ij,ij->i", some, some))[:, None]
            writer.append(some)
    return open_store(path)


def build(store: Store, threads: int) -> tuple[Index, float, float]:
    """The index, its seconds, and the peak of anonymous memory in GB."""
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    peak[0] = max(peak[0], float(line.split()[1]) / 1e6)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    index = Index.build(store, threads=threads, force=default_path(store).exists())
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    return index, seconds, peak[0]


def bandwidth(store: Store, queries: NDArray[np.float32]) -> float:
    return KernelDensity(bandwidth="ess=1000").fit(store).resolve(queries)[0].bandwidth


def run(
    store: Store,
    index: Index,
    queries: NDArray[np.float32],
    h: float,
    tolerances: tuple[str, ...],
    repeat: int = 1,
) -> dict[str, Any]:
    """Seconds of the exact scan and of whole approximate jobs (audit and fallbacks included), interleaved."""
    scanner = Scanner(store, None, "auto", None, 2_000_000_000)
    pairs = [("exponential", h)]
    exact, jobs = [], {tolerance: [] for tolerance in tolerances}
    for _ in range(repeat):
        started = time.perf_counter()
        truth = scanner.scan(queries, pairs).total.log_sum[:, 0]
        exact.append(time.perf_counter() - started)
        for tolerance in tolerances:
            job = Estimation(
                scanner,
                index,
                "stratified",
                parse_tolerance(tolerance),
                queries,
                keys_of(open_store(queries)),
                pairs,
                Asked(),
                0,
                True,
            )
            started = time.perf_counter()
            sums, facts, _, done = job.run(lambda line: None, silent)
            seconds = time.perf_counter() - started
            error = (sums.log_sum[:, 0] - truth)[~done]
            jobs[tolerance].append(
                {
                    "seconds": seconds,
                    "exact": int(done.sum()),
                    "rms": float(np.sqrt(np.mean(error**2))) if len(error) else 0.0,
                    "target": facts["target"],
                    "audit": facts["audit"],
                    "reasons": facts["exact"],
                    "rows": float(sums.rows[~done].mean()) if len(error) else 0.0,
                    "spread": float(truth.std()),
                }
            )
    return {"n": store.n, "queries": len(queries), "h": h, "exact_seconds": exact, "jobs": jobs}


def clean(store: Store) -> None:
    """Removes the synthesised store and its index."""
    shutil.rmtree(default_path(store), ignore_errors=True)
    if store.path is not None:
        shutil.rmtree(store.path, ignore_errors=True)
