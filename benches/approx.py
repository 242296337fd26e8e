"""Approximate densities beside an oracle and their rivals, in one run; writes records/DATE-approx-PART.

    python benches/approx.py cells            error, bias, coverage at equal rows on sentences/ (LMD3_DATA)
    python benches/approx.py jobs             coverage as whole jobs report it, on other queries
    python benches/approx.py powerlaw         mixtures where one or a few rows decide a sum
    python benches/approx.py published        the setting of the DEANN paper on digits and a mixture
    python benches/approx.py neighbors        nearest rows against faiss IVF-SQ8
    python benches/approx.py time --rows N    N synthesised int8 rows against the exact scan, DEANN by faiss;
                                              stopped, the same command goes on (--folder keeps its state)

`make bench-approx` runs all but the last.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benches.approximate import cells, jobs, neighbors, powerlaw, published, timing

from lmd3 import system
from lmd3.density import KernelDensity
from lmd3.index import Index
from lmd3.store import open_store

RECORDS = Path(__file__).resolve().parent / "records"


def machine() -> dict[str, Any]:
    """What a figure needs beside it."""
    name = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    return {"cpu": name, "cores": system.cores(), "simd": system.simd_level(), "numpy": np.__version__}


#: Queries of a set: 32 of them are audited, the others are what a job estimates.
QUERIES = 80


def sentences() -> tuple[Any, np.ndarray, np.ndarray]:
    """The store, the test questions, and the numbers of rows that are queries with themselves left out.

    The estimator's constants were chosen on other questions (200 to 259) and other rows, and on other draws.
    """
    folder = os.environ.get("LMD3_DATA")
    if not folder:
        raise SystemExit("LMD3_DATA is not set: real data is not at hand")
    store = open_store(Path(folder) / "sentences" / "embeddings.npy")
    questions = np.load(Path(folder) / "gsm8k" / "test_questions_minilm.npy").astype(np.float32)
    rng = np.random.default_rng(41)
    held_out = np.sort(rng.choice(np.arange(7473, store.n), QUERIES, replace=False))
    return store, questions, held_out


def run_cells(seeds: int, lists: int | None, alone: bool = False) -> dict[str, Any]:
    store, questions, held_out = sentences()
    out: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        index = Index.build(store, Path(folder) / "index", lists=lists)
        sides = (
            ("gsm", questions[600 : 600 + QUERIES], None),
            ("held out", store.rows(held_out), held_out.astype(np.int64)),
        )
        rules = [("exponential", rule) for rule in ("ess=1000", "ess=100", "ess=10000")]
        if not alone:
            rules += [("exponential", f"mass={z}") for z in (10, 1000)]
            rules += [("gaussian", f"mass={z}") for z in (10, 100, 10000)]
        for name, queries, own in sides:
            for kernel, rule in rules:
                if kernel == "gaussian" or rule.startswith("mass"):
                    h = (
                        KernelDensity(kernel=kernel, bandwidth=rule)
                        .fit(store)
                        .resolve(questions)[0]
                        .bandwidth
                    )
                else:
                    every = questions if own is None else queries
                    fitted = KernelDensity(kernel=kernel, bandwidth=rule).fit(store)
                    scanner, asked = fitted._scanner(), None
                    if own is None:
                        h = fitted.resolve(every)[0].bandwidth
                    else:
                        from lmd3.density.rules import resolve_rules
                        from lmd3.density.scan import Asked

                        asked = Asked(own=own)
                        parsed = fitted._allowed_rules()[0]
                        from lmd3.progress import silent

                        h = resolve_rules(scanner, [kernel], parsed, queries, asked, 0, silent)[0].bandwidth
                cell = cells.Cell(store, index, name, queries, own, kernel, h)
                for rows in (2000, 10_000):
                    found = {
                        "queries": name,
                        "kernel": kernel,
                        "rule": rule,
                        "h": h,
                        "ess": cell.ess,
                        "z": float(np.median(cell.z)),
                        "rows": rows,
                        "ours": cell.ours(rows, seeds),
                        **(cell.oracle(rows) if alone else cell.rivals(rows, max(4, seeds // 2))),
                    }
                    found["held_to"] = cells.HELD_TO.get((name, rule, rows))
                    out.append(found)
                    print(cell_line(found), flush=True)
        copies = np.random.default_rng(2).choice(store.n, 1000, replace=False)
        of_row = np.empty(store.n, np.int64)
        of_row[index.native.ids.astype(np.int64)] = np.repeat(
            np.arange(index.lists), index.native.sizes.astype(int)
        )
        first = int((index.native.nearest_lists(store.rows(copies), 1)[:, 0] == of_row[copies]).sum())
        return {"n": store.n, "lists": index.lists, "seeds": seeds, "cells": out, "copies_at_rank_0": first}


def run_jobs(seeds: int = 4, count: int = 300) -> list[dict[str, Any]]:
    store, questions, _ = sentences()
    rows = np.sort(np.random.default_rng(2024).choice(np.arange(7473, store.n), count, replace=False))
    sets = {
        "gsm": (np.ascontiguousarray(questions[700 : 700 + count]), None),
        "held out": (np.ascontiguousarray(store.rows(rows)), rows.astype(np.int64)),
    }
    with tempfile.TemporaryDirectory() as folder:
        return jobs.run(store, Index.build(store, Path(folder) / "index"), sets, seeds)


def cell_line(found: dict[str, Any]) -> str:
    """A row of the table: RMS relative error by estimator."""
    ours = found["ours"]
    others = [
        f"{found[name]['rms']:.4f}" if name in found else "-"
        for name in ("RS", "RS permuted", "RS+CV", "DEANN best", "levels", "kNN")
    ]
    in_job = "-" if ours["coverage_in_a_job"] is None else f"{ours['coverage_in_a_job']:.3f}"
    bound = "-" if found["held_to"] is None else f"{found['held_to']:g}"
    return (
        f"| {found['queries']} | {found['kernel']} {found['rule']} | {found['h']:.4f} | {found['ess']:.0f} "
        f"| {found['rows']} | "
        f"{found['oracle']['median']:.4f} | **{ours['median']:.4f}** | {bound} | {ours['p90']:.4f} "
        f"| {ours['rms']:.4f} | "
        f"{ours['bias_z']:+.1f} | {ours['coverage']:.3f} | {in_job} | {ours['given_up']:.2f} "
        f"| {ours['flagged']:.2f} | {' | '.join(others)} |"
    )


CELL_HEAD = (
    "| queries | kernel | h | ess | rows | oracle, median | ours, median | held to | p90 | ours, RMS "
    "| bias / its SE | coverage | coverage in a job | jobs given up | flagged "
    "| RS | RS permuted | RS+CV | DEANN best | levels | kNN |\n" + "|---" * 21 + "|"
)


def run_neighbors(threads: int) -> dict[str, Any]:
    store, questions, _ = sentences()
    queries = np.concatenate(
        [questions, store.rows(np.random.default_rng(3).choice(store.n, 1000, replace=False))]
    )
    with tempfile.TemporaryDirectory() as folder:
        index = Index.build(store, Path(folder) / "index", dtype="int8", threads=threads)
        other = neighbors.faiss_index(store, index.lists, threads)
        return {
            "n": store.n,
            "queries": len(queries),
            "threads": threads,
            **neighbors.run(store, index, other, queries, threads),
        }


def run_time(rows: int, threads: int, folder: Path, keep: bool, queries: int = 1000) -> dict[str, Any]:
    source, questions, _ = sentences()
    peer_rows = min(rows, 1_000_000)
    asked = np.ascontiguousarray(questions[:queries])
    found = timing.run(source, folder, rows, peer_rows, asked, threads)
    if not keep:
        timing.clean(folder, rows, peer_rows)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("cells", "jobs", "powerlaw", "published", "neighbors", "time"))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--lists", type=int)
    parser.add_argument("--alone", action="store_true", help="cells of the default regime without rivals")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--threads", type=int, default=system.cores())
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--keep", action="store_true", help="keep the synthesised store and its index")
    options = parser.parse_args()
    text = ""
    if options.part == "cells":
        found: Any = run_cells(options.seeds, options.lists, options.alone)
        text = CELL_HEAD + "\n" + "\n".join(cell_line(cell) for cell in found["cells"])
        text += f"\n\nAn exact copy's list at rank 0: {found['copies_at_rank_0']} of 1000.\n"
    elif options.part == "jobs":
        found = run_jobs()
    elif options.part == "powerlaw":
        found = powerlaw.run()
    elif options.part == "published":
        found = published.run()
    elif options.part == "neighbors":
        found = run_neighbors(options.threads)
    else:
        found = run_time(options.rows, options.threads, options.folder, options.keep)
    if not text:
        text = "```\n" + json.dumps(found, indent=1) + "\n```\n"
    date = datetime.date.today().isoformat()
    part = options.part + ("-alone" if options.alone else "")
    record = {"date": date, "part": part, "machine": machine(), "found": found}
    (RECORDS / f"{date}-approx-{part}.json").write_text(json.dumps(record, indent=1) + "\n")
    head = f"# Approximate densities: {part}, {date}\n\n{json.dumps(machine())}\n\n"
    (RECORDS / f"{date}-approx-{part}.md").write_text(head + text)
    print(text)


if __name__ == "__main__":
    main()
