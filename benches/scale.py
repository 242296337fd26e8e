"""The table of docs/scale.md: plans of an example job on clusters, by the measured rates of one machine.

lmd3 info --measure -o machine.json      on a node, with nothing else running
python benches/scale.py machine.json     prints the table; nothing is measured here
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from lmd3 import KernelDensity
from lmd3.density.plan import Cluster
from lmd3.density.rates import DIMENSIONS, NEIGHBORS, PAIRS, read_rates
from lmd3.progress import duration
from lmd3.store import StoreWriter

#: Rows of the whole job, nodes, bytes per second that each reads.
CASES = ((1e9, 1, 2e9), (1e10, 10, 2e9), (1e11, 100, 2e9), (1e11, 100, 2e8))
CORES, QUERIES = 32, 1000


def main(machine: str) -> None:
    rates = read_rates(machine)
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        rows = generator.normal(size=(1 << 18, DIMENSIONS)).astype(np.float32)  # one segment
        with StoreWriter(store, dtype="int8", normalised=False) as writer:
            writer.append(rows)
        kde = KernelDensity(bandwidth=[h for _, h in PAIRS]).fit(store)
        print(
            "| rows | bytes | nodes | disk per node | arithmetic | disk | start | merging | expected | "
            "node-hours per 10⁹ rows | bottleneck |\n|---|---|---|---|---|---|---|---|---|---|---|"
        )
        for count, nodes, disk in CASES:
            plan = kde.plan(
                rows[:QUERIES], NEIGHBORS, rows=int(count), cluster=Cluster(nodes, CORES, disk), rates=rates
            )
            found = plan["cluster"]
            parts = ("compute_seconds", "disk_seconds", "start_seconds", "merge_seconds", "seconds")
            cells = [
                f"10^{round(np.log10(count))}",
                f"{plan['bytes'] / 1e12:.3g} TB",
                str(nodes),
                f"{disk / 1e9:.3g} GB/s",
                *(duration(found[part]) for part in parts),
                f"{found['node_hours_per_billion_rows']:.3f}",
                found["bottleneck"],
            ]
            print("| " + " | ".join(cells) + " |")
        quick = kde.plan(rows[:QUERIES], NEIGHBORS, rows=50_000_000, rates=rates)
        print(f"\n50 million rows here: {quick['scan_seconds']:.0f} s; partial files of 10⁹ rows: ", end="")
        billion = kde.plan(rows[:QUERIES], NEIGHBORS, rows=10**9, rates=rates)
        print(f"{billion['partial_bytes'] / 1e9:.2f} GB")


if __name__ == "__main__":
    main(sys.argv[1])
