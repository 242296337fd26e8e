"""Nearest rows by the index against faiss IVF-SQ8: queries per second at the same recall, same threads, same
run; and DEANN as faiss and NumPy do it."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmd3.density import KernelDensity
from lmd3.index import Index
from lmd3.store import Store

K = 10


def faiss_index(store: Store, lists: int, threads: int, seed: int = 0) -> Any:
    import faiss

    faiss.omp_set_num_threads(threads)
    quantiser = faiss.IndexFlatL2(store.d)
    index = faiss.IndexIVFScalarQuantizer(
        quantiser, store.d, lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_L2
    )
    chosen = np.sort(np.random.default_rng(seed).choice(store.n, min(store.n, 40 * lists), replace=False))
    index.train(store.rows(chosen))
    for start in range(0, store.n, 1 << 17):
        index.add(store.rows(np.arange(start, min(start + (1 << 17), store.n))))
    return index


def recall(found: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found, truth, strict=True)]))


def run(
    store: Store, index: Index, faiss: Any, queries: NDArray[np.float32], threads: int, wanted: float = 0.95
) -> dict[str, Any]:
    """The fewest probes that reach the recall on each side, then both timed in turns, the best of five."""
    _, truth = KernelDensity(bandwidth=1.0, threads=threads).fit(store).kneighbors(queries, K)  # type: ignore[misc]

    def ours(probes: int) -> NDArray[np.int64]:
        return index.kneighbors(queries, K, probes=probes, threads=threads)[1]

    def theirs(probes: int) -> NDArray[np.int64]:
        faiss.nprobe = probes
        return faiss.search(queries, K)[1]

    chosen = {}
    for name, search in (("ours", ours), ("faiss", theirs)):
        probes = 1
        while (reached := recall(search(probes), truth)) < wanted and probes < index.lists:
            probes = max(probes + 1, probes * 6 // 5)
        chosen[name] = (probes, reached)
    seconds: dict[str, list[float]] = {"ours": [], "faiss": []}
    for _ in range(5):
        for name, search in (("ours", ours), ("faiss", theirs)):
            started = time.perf_counter()
            search(chosen[name][0])
            seconds[name].append(time.perf_counter() - started)
    return {
        name: {
            "probes": chosen[name][0],
            "recall": chosen[name][1],
            "queries_per_second": len(queries) / min(seconds[name]),
        }
        for name in seconds
    }


def faiss_deann(
    store: Store,
    faiss: Any,
    queries: NDArray[np.float32],
    h: float,
    probes: int,
    k: int,
    m: int,
    seed: int = 0,
) -> tuple[NDArray[np.float64], float]:
    """DEANN by faiss and NumPy: log sums, and seconds. Random rows are one run of a permuted float32 copy."""
    rng = np.random.default_rng(seed)
    sample = store.rows(np.sort(rng.choice(store.n, min(store.n, 200_000), replace=False)))[
        rng.permutation(min(store.n, 200_000))
    ]
    norms = np.einsum("ij,ij->i", sample, sample)
    faiss.nprobe = probes
    started = time.perf_counter()
    squared, _ = faiss.search(queries, k)
    near = np.exp(-np.sqrt(np.maximum(squared, 0)) / h).sum(1)
    starts = rng.integers(len(sample) - m, size=len(queries))
    rest = np.empty(len(queries))
    farthest = squared[:, -1]
    for i, (query, start) in enumerate(zip(queries, starts, strict=True)):
        rows = sample[start : start + m]
        d2 = np.maximum(norms[start : start + m] + query @ query - 2 * rows @ query, 0)
        # Rows nearer than the last neighbour count as neighbours: found already.
        rest[i] = np.exp(-np.sqrt(d2[d2 > farthest[i]]) / h).sum() * store.n / m
    return np.log(near + rest), time.perf_counter() - started
