"""Serves one peer over its standard streams, one JSON object a line: `python -m peers.worker NAME`.

`init` opens the rows, `tune` times every variant on some of them and keeps the fastest, `run` times that one.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from typing import Any

import numpy as np

#: Rows that variants are compared on.
TUNING_ROWS = 1 << 16


def main() -> None:
    # What a library prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    state: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = COMMANDS[request.pop("command")](state, **request)
        except Exception as error:  # whatever a peer raises is its result
            answer = {"error": f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]}
        print(json.dumps(answer), file=answers, flush=True)


def init(state: dict[str, Any], rows: str, threads: int, bandwidth: float) -> dict[str, Any]:
    module = importlib.import_module(f"peers.{sys.argv[1]}")
    matrix = np.load(rows, mmap_mode="r")
    state["peer"] = module.make(matrix, threads, bandwidth)
    state["n"] = min(len(matrix), state["peer"].limit[0] or len(matrix))
    return {"version": module.version(), "rows": state["n"]}


def tune(state: dict[str, Any], queries: str, quick: bool) -> dict[str, Any]:
    peer, n = state["peer"], min(state["n"], TUNING_ROWS)
    batch = np.load(queries)[: peer.limit[1]]
    tried: list[tuple[float, dict[str, Any]]] = []
    failed: list[str] = []
    for variant in peer.variants(quick):
        try:
            times = []
            # The first run pays for compiling and for first touches.
            for _ in range(3):
                started = time.perf_counter()
                peer.log_sums(batch, variant, n)
                times.append(time.perf_counter() - started)
            tried.append((min(times[1:]), variant))
        except Exception as error:
            failed.append(f"{variant}: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")
    if not tried:
        return {"error": "; ".join(failed)}
    seconds, state["variant"] = min(tried, key=lambda pair: pair[0])
    return {"variant": state["variant"], "seconds": seconds, "tried": tried, "failed": failed}


def run(state: dict[str, Any], queries: str, out: str) -> dict[str, Any]:
    peer = state["peer"]
    batch = np.load(queries)[: peer.limit[1]]
    started = time.perf_counter()
    sums = peer.log_sums(batch, state["variant"], state["n"])
    seconds = time.perf_counter() - started
    if sums is not None:
        np.save(out, sums)
    return {"seconds": seconds, "rows": state["n"], "queries": len(batch), "sums": sums is not None}


COMMANDS = {"init": init, "tune": tune, "run": run}

if __name__ == "__main__":
    main()
