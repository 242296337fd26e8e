"""How long a whole study takes, and its memory: 200,000 queries, 4 bandwidths, all defaults.

`python benches/study.py [--queries N] [--rows N]` makes vectors of 200 topics and two outcomes in a temporary
folder, then runs `lmd3 study` (loss; clusters of near queries) and `lmd3 analyze` (right or wrong, within and
clustered by 30 tasks, so that the score wild bootstrap decides) as a user would.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

COMMAND = [sys.executable, "-m", "lmd3"]


def make(folder: Path, queries: int, rows: int) -> None:
    """The vectors and outcomes."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((200, 64))

    def vectors(topics: np.ndarray, name: str) -> None:
        x = (centres[topics] + 0.8 * rng.standard_normal((len(topics), 64))).astype(np.float32)
        np.save(folder / f"{name}.npy", x / np.linalg.norm(x, axis=1)[:, None])

    vectors(rng.integers(0, 200, rows), "corpus")
    topics = rng.integers(0, 200, queries)
    vectors(topics, "queries")
    loss = rng.standard_normal(200)[topics] + rng.standard_normal(queries)
    shared = {"id": np.arange(queries).astype(str), "task": [f"t{t % 30}" for t in topics]}
    pd.DataFrame(shared | {"value": loss}).to_parquet(folder / "loss.parquet")
    pd.DataFrame(shared | {"value": (loss > 0).astype(float)}).to_parquet(folder / "right.parquet")


def run(name: str, arguments: list[str], folder: Path) -> dict[str, object]:
    """Runs a command; seconds, processor seconds and the peak of memory."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    subprocess.run([*COMMAND, *arguments], cwd=folder, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "command": name,
        "seconds": round(time.monotonic() - started, 1),
        "processor_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_gb_of_any_so_far": round(after.ru_maxrss / 1e6, 2),
        "load": os.getloadavg()[0],
    }


def main() -> None:
    """Runs both and prints a line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=200_000)
    parser.add_argument("--rows", type=int, default=50_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make(folder, options.queries, options.rows)
        study = ["study", "--corpus", "corpus.npy", "--queries", "queries.npy", "--outcomes", "loss.parquet"]
        print(json.dumps(run("study", [*study, "-o", "study"], folder)), flush=True)
        analyze = ["analyze", "study/density", "right.parquet", "--cluster", "task", "--within", "task"]
        print(json.dumps(run("analyze", [*analyze, "-o", "right"], folder)), flush=True)


if __name__ == "__main__":
    main()
