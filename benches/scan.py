"""The scan against the machine and against its peers, in one run: `python benches/scan.py` (`make bench`).

Every repeat draws new queries, measures the peaks and the read bandwidth, and then runs each of our paths and
each peer once, so that all see the same host. Errors are those of the timed calls, against float64 over the
rows as stored. Rows are random unit vectors around 256 centres (cosine about .5 within one). The figures, the
bars and what they were measured on go to `benches/records/` as Markdown and JSON.

Ours is called at the native level, so that the making of Python tables is in no figure. Speed is
2 · rows · queries · d / time in GOP/s (10⁹ operations a second), whatever else is computed.

Peaks come from `lmd3.system.measure(threads=T)`. What is read of its result:
    f32_peak_all        operations a second of single-precision multiply-adds, 2 each, on registers only
    implied_clock_all   the clock in Hz that this implies
    read_bandwidth_all  bytes a second read from memory
and, once it measures them, int16_peak_all and int8_peak_all (the same of integer products) and l1_share (the
share of f32_peak_all that the micro-kernel reaches on operands in L1: below .95 the host is busy and
it is repeated).
Without that function shares are left empty and the record says so.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before numpy: inherited settings of its BLAS would be measured with it.
for _name in [name for name in os.environ if name.startswith("OPENBLAS_")]:
    del os.environ[_name]

import numpy as np
from numpy.typing import NDArray
from scanning.data import Corpus, Vectors, write_float16, write_float32, write_store
from scanning.peer import CORE_TYPES, FLOAT32_PEERS, PEERS, Worker
from scanning.record import WATCHED, cpu, has, markdown, versions, write

from lmd3 import _lmd3, system
from lmd3.errors import Lmd3Error

HERE = Path(__file__).resolve().parent
BANDWIDTH = 0.1
BANDWIDTHS = [float(h) for h in np.geomspace(0.05, 0.4, 8)]
#: Queries of each timed call whose error is taken.
CHECKED = 4
DIMENSIONS = (96, 100, 768, 1000, 1024)
SECTIONS = ("float32", "float16", "int16", "int8", "q1", "dims", "bandwidths", "threads", "peers", "groups")
#: Figures in 10⁹ a second and what `lmd3.system.measure` calls them.
MEASURED = {
    "f32_gops": "f32_peak_all",
    "int16_gops": "int16_peak_all",
    "int8_gops": "int8_peak_all",
    "clock_ghz": "implied_clock_all",
    "read_gbps": "read_bandwidth_all",
}
#: Peaks of integer products as multiples of the float32 peak at most: what a register holds more of.
DENSITY = {"float32": 1, "int16": 2, "int8": 4}


@dataclass(frozen=True)
class Case:
    """One of our paths."""

    key: str
    section: str
    label: str
    corpus: str
    q: int
    precision: str = "float32"
    neighbors: int = 0
    bandwidths: int = 1
    threads: int | None = None
    by_group: bool = False
    #: What it is set against: "f32" or "int8" (peaks), "read" (bandwidth), or the key of another case.
    against: str = "f32"
    #: Bars on AVX-512 with VNNI and on AVX2, as shares or factors; None for none.
    bars: tuple[float | None, float | None] = (None, None)


def cases(d: int) -> list[Case]:
    """Every row of the table but the groups'."""
    made: list[Case] = []

    def add(*args: Any, **named: Any) -> None:
        made.append(Case(*args, **named))

    for q, bar in ((128, (0.88, 0.86)), (1024, (0.90, 0.87))):
        lower = (bar[0] - 0.03, bar[1] - 0.03)
        add(f"float32-{q}", "float32", "float32", "float32", q, bars=bar)
        add(f"float32-{q}-top10", "float32", "float32, top 10", "float32", q, neighbors=10, bars=lower)
    for q, bar in ((128, (0.82, 0.82)), (1024, (0.82, 0.86))):
        add(f"float16-{q}", "float16", "float16 store → float32", "float16", q, bars=bar)
    for q, int8, other in ((128, (1.65, 1.25), (1.55, 1.22)), (1024, (1.65, 1.32), (1.55, 1.30))):
        for corpus, bar in (("int8", int8), ("float16", other), ("float32", other)):
            label = f"int16 from {corpus} store"
            add(f"int16-{corpus}-{q}", "int16", label, corpus, q, precision="int16", bars=bar)
    for q in (128, 1024):
        label = "int8 × int8, of its own peak"
        add(f"int8-{q}", "int8", label, "int8", q, precision="int8", against="int8", bars=(0.70, None))
    for corpus, bar in (("float32", (0.80, 0.80)), ("float16", (0.75, 0.75)), ("int8", (0.60, 0.75))):
        precision = "int16" if corpus == "int8" else "float32"
        label = f"Q = 1, {corpus} store, of the read bandwidth"
        add(f"q1-{corpus}", "q1", label, corpus, 1, precision=precision, against="read", bars=bar)
    for other in DIMENSIONS:
        add(f"d{other}", "dims", f"float32, d = {other}", f"d{other}", 1024, bars=(0.80, 0.80))
    for precision, corpus, bar in (("float32", "float32", (1.4, 1.35)), ("int16", "int8", (1.7, 1.6))):
        base = f"bandwidths-{precision}-1"
        label = f"{precision} from {corpus} store, 1 bandwidth"
        add(base, "bandwidths", label, corpus, 1024, precision=precision)
        label = f"{precision} from {corpus} store, 8 bandwidths against 1"
        add(f"bandwidths-{precision}-8", "bandwidths", label, corpus, 1024, precision=precision, bandwidths=8,
            against=base, bars=bar)  # fmt: skip
    for precision, corpus in (("float32", "float32"), ("int16", "int8")):
        base, double = f"threads-{precision}-1", f"threads-{precision}-2"
        label = f"{precision}, 1 thread"
        add(base, "threads", label, corpus, 1024, precision=precision, threads=1, against="")
        label = f"{precision}, 1 → 2 threads"
        add(
            double,
            "threads",
            label,
            corpus,
            1024,
            precision=precision,
            threads=2,
            against=base,
            bars=(1.9, 1.9),
        )
    add("peers-float32", "peers", "ours, float32", "float32", 1024)
    add("peers-int16", "peers", "ours, int16 from the float32 rows", "float32", 1024, precision="int16")
    add("peers-int16-int8", "peers", "ours, int16 from an int8 store", "int8", 1024, precision="int16")
    return made


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(threads: int) -> dict[str, Any] | None:
    """Peaks and bandwidth now; None where `lmd3.system` measures none."""
    function = getattr(system, "measure", None)
    if function is None:
        return None
    for _ in range(3):
        measured = function(threads=threads)
        values = {name: measured[key] / 1e9 for name, key in MEASURED.items() if measured.get(key)}
        values["l1_share"] = measured.get("l1_share")
        if values["l1_share"] is None or values["l1_share"] >= 0.95:
            break
        time.sleep(2)
    return values


def best_median(values: list[float]) -> tuple[float, float]:
    """The smallest and the median."""
    return min(values), statistics.median(values)


class Bench:
    """One run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.threads: int = options.threads
        self.sections = [name for name in SECTIONS if not options.only or name in options.only]
        self.wanted = [
            case
            for case in cases(options.d)
            if case.section in self.sections and (case.threads or 1) <= len(os.sched_getaffinity(0))
        ]
        self.corpora: dict[str, Corpus] = {}
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.errors: dict[str, float] = defaultdict(float)
        self.skipped: dict[str, str] = {}
        self.peaks: list[dict[str, Any]] = []
        #: Read bandwidth around the calls with one query, by repeat.
        self.reads: list[float] = []
        self.workers: dict[str, Worker] = {}
        self.peers: dict[str, dict[str, Any]] = {}
        self.groups: list[dict[str, Any]] = []
        self.invalid: list[str] = []
        self.load = [os.getloadavg()]

    def run(self, folder: Path) -> None:
        options = self.options
        self.folder = folder
        self.prepare()
        if "peers" in self.sections:
            self.start_peers()
        for repeat in range(options.repeats):
            say(f"repeat {repeat + 1} of {options.repeats}")
            self.repeat(repeat)
        for worker in self.workers.values():
            worker.close()
        if "groups" in self.sections:
            self.run_groups()
        self.load.append(os.getloadavg())

    def prepare(self) -> None:
        """Writes the sources; they are in the page cache afterwards."""
        n, d = self.options.n, self.options.d
        needed = {case.corpus for case in self.wanted}
        say(f"writing {n} rows of {d}: {', '.join(sorted(needed))}")
        self.corpora["float32"] = base = write_float32(self.folder, n, d)
        if "float16" in needed:
            self.corpora["float16"] = write_float16(self.folder, base)
        if "int8" in needed:
            try:
                self.corpora["int8"] = write_store(self.folder / "int8.lmd3", base, "int8")
            except Lmd3Error as error:
                say(f"no int8 store: {error}")
        for other in DIMENSIONS:
            if f"d{other}" in needed:
                # The base again where --d names this one.
                same = other == d
                self.corpora[f"d{other}"] = base if same else write_float32(self.folder, n, other)

    def start_peers(self) -> None:
        """Starts and tunes every peer, numpy under every core type of its BLAS where that can matter."""
        quick = self.options.quick
        queries = self.folder / "tuning.npy"
        np.save(queries, Vectors(self.options.d, seed=2).draw(1024))
        for name in PEERS:
            by_core: dict[str, float] = {}
            kept: tuple[float, Worker, dict[str, Any]] | None = None
            tries = CORE_TYPES if name.startswith("numpy") and has("avx512f") and not quick else (None,)
            for core_type in tries:
                worker = Worker(name, core_type, self.folder)
                path = str(self.corpora["float32"].path)
                started = worker.ask("init", rows=path, threads=self.threads, bandwidth=BANDWIDTH)
                tuned = (
                    started if "error" in started else worker.ask("tune", queries=str(queries), quick=quick)
                )
                if "error" in tuned:
                    worker.close()
                    self.skipped[name] = tuned["error"]
                    continue
                by_core[core_type or "default"] = tuned["seconds"]
                if kept is None or tuned["seconds"] < kept[0]:
                    if kept is not None:
                        kept[1].close()
                    kept = (tuned["seconds"], worker, {**started, **tuned})
                else:
                    worker.close()
            if kept is None:
                say(f"{PEERS[name]}: left out: {self.skipped[name]}")
                continue
            self.skipped.pop(name, None)
            self.workers[name] = kept[1]
            core = kept[1].core_type
            self.peers[name] = {
                **kept[2],
                "core_type": core,
                "core_types": by_core,
                "gops": [],
                "difference": 0.0,
            }
            say(f"{PEERS[name]}: {kept[2]['variant']}" + (f", OPENBLAS_CORETYPE={core}" if core else ""))

    def repeat(self, repeat: int) -> None:
        if (peaks := measure(self.threads)) is not None:
            self.peaks.append(peaks)
        drawn = {d: Vectors(d, seed=100 + repeat).draw(1024) for d in {c.d for c in self.corpora.values()}}
        references: dict[tuple[str, int], NDArray[np.float64]] = {}
        read_before = read_after = None
        for case in self.wanted:
            if case.corpus not in self.corpora:
                self.skipped[case.key] = "no such store yet"
                continue
            if case.section == "q1" and read_before is None and (around := measure(self.threads)) is not None:
                read_before = around["read_gbps"]
            queries = np.ascontiguousarray(drawn[self.corpora[case.corpus].d][: case.q])
            if repeat == 0:
                # First touches and the choice of a level are in no figure.
                self.scan(case, queries)
            result = self.scan(case, queries)
            if result is None:
                continue
            key = (case.corpus, case.bandwidths)
            checked = queries[:CHECKED]
            if key not in references or len(references[key]) < len(checked):
                hs = [BANDWIDTH] if case.bandwidths == 1 else BANDWIDTHS
                references[key] = self.corpora[case.corpus].reference(drawn[queries.shape[1]][:CHECKED], hs)
            seconds, sums = result
            self.seconds[case.key].append(seconds)
            truth = references[key][: len(checked)]
            # Of the log density: of the same size as the log sum less log n.
            scale = np.maximum(1, np.abs(truth - np.log(self.options.n)))
            self.errors[case.key] = max(
                self.errors[case.key], float(np.max(np.abs(sums[: len(checked)] - truth) / scale))
            )
            if case.section == "q1":
                later = [other.section for other in self.wanted[self.wanted.index(case) + 1 :]]
                if "q1" not in later and (around := measure(self.threads)) is not None:
                    read_after = around["read_gbps"]
        if read_before is not None:
            self.reads.append(max(read_before, read_after or 0.0))
        if self.workers:
            self.run_peers(drawn[self.options.d])

    def scan(self, case: Case, queries: NDArray[np.float32]) -> tuple[float, NDArray[np.float64]] | None:
        """Seconds and log sums of one call of ours."""
        hs = [BANDWIDTH] if case.bandwidths == 1 else BANDWIDTHS
        kernels = [("exponential", h) for h in hs]
        source = self.corpora[case.corpus].native
        try:
            started = time.perf_counter()
            result = _lmd3.scan(
                source,
                queries,
                kernels,
                neighbors=case.neighbors,
                by_group=case.by_group,
                precision=case.precision,
                threads=case.threads or self.threads,
            )
            seconds = time.perf_counter() - started
        except Lmd3Error as error:
            self.skipped[case.key] = str(error).splitlines()[0]
            return None
        if not np.isfinite(result.total.ess).all():
            self.invalid.append(f"{case.label}: ess is not finite")
        return seconds, result.total.log_sum

    def run_peers(self, queries: NDArray[np.float32]) -> None:
        path = self.folder / "queries.npy"
        np.save(path, queries)
        ours: dict[tuple[int, int], NDArray[np.float64]] = {}
        for name, worker in list(self.workers.items()):
            answer = worker.ask("run", queries=str(path), out=str(worker.out))
            if "error" in answer:
                self.skipped[name] = answer["error"]
                continue
            n, q = answer["rows"], answer["queries"]
            operations = 2 * n * q * self.options.d
            peer = self.peers[name]
            peer["gops"].append(operations / answer["seconds"] / 1e9)
            peer["extrapolated"] = (n, q) != (self.options.n, len(queries))
            peer["queries"] = q
            if answer["sums"]:
                if (n, q) not in ours:
                    rows = np.load(self.corpora["float32"].path, mmap_mode="r")[:n]
                    result = _lmd3.scan(rows, queries[:q], [("exponential", BANDWIDTH)], threads=self.threads)
                    ours[n, q] = result.total.log_sum[:, 0]
                difference = float(np.max(np.abs(np.load(worker.out) - ours[n, q])))
                peer["difference"] = max(peer["difference"], difference)
                # Written so that a NaN is caught too.
                if not difference <= 1e-3:
                    self.invalid.append(f"{PEERS[name]} disagrees with ours by {difference:.2g}")
            # Threads that spin for a while after their work must not share the cores with what comes next.
            time.sleep(0.3)

    def run_groups(self) -> None:
        """With groups against without, store by store."""
        n = self.options.n
        base = self.corpora["float32"]
        for count in (10, 10_000):
            for length in (4096, 64, 1):
                runs = -(-n // length)
                rng = np.random.default_rng([count, length])
                # Shuffled over the runs, each group about equally often.
                codes = np.repeat(rng.permutation(np.arange(runs) % count), length)[:n]
                found = len(np.unique(codes))
                say(f"groups: {found} in runs of {length}")
                store = write_store(self.folder / "groups.lmd3", base, "float32", codes)
                self.corpora["groups"] = store
                times: dict[bool, list[float]] = {False: [], True: []}
                for repeat in range(self.options.repeats + 1):
                    queries = Vectors(self.options.d, seed=200 + repeat).draw(1024)
                    for by_group in (False, True):
                        case = Case("groups", "groups", "groups", "groups", 1024, by_group=by_group)
                        result = self.scan(case, queries)
                        if result is not None and repeat:
                            times[by_group].append(result[0])
                ratios = [with_ / without for with_, without in zip(times[True], times[False], strict=True)]
                if ratios:
                    self.groups.append(
                        {
                            "groups": found,
                            "run": length,
                            "ratio": min(times[True]) / min(times[False]),
                            "median_ratio": statistics.median(ratios),
                            "seconds": times[True],
                            "seconds_without": times[False],
                            "bar": 1.05 if count == 10 and length >= 4096 else None,
                        }
                    )
                for path in sorted(store.path.rglob("*"), reverse=True):
                    path.unlink() if path.is_file() else path.rmdir()
                store.path.rmdir()
                del self.corpora["groups"], store

    # --- the table ---

    def peak(self, name: str) -> float | None:
        """The highest reading of the run: the strictest."""
        values = [peaks[name] for peaks in self.peaks if peaks.get(name)]
        return max(values) if values else None

    def rows(self) -> list[dict[str, Any]]:
        """One row of the table per case."""
        column = 0 if has("avx512_vnni") and system.simd_level() == "avx512" else 1
        made: list[dict[str, Any]] = []
        for case in self.wanted:
            row: dict[str, Any] = {"key": case.key, "section": case.section, "label": case.label, "q": case.q}
            made.append(row)
            if not (times := self.seconds.get(case.key)):
                row["skipped"] = self.skipped.get(case.key, "not run")
                continue
            corpus = self.corpora[case.corpus]
            best, median = best_median(times)
            operations = 2 * corpus.n * case.q * corpus.d / 1e9
            gigabytes = corpus.n * corpus.row_bytes / 1e9
            row |= {"seconds": times, "gops": operations / best, "median_gops": operations / median}
            row |= {"gbps": gigabytes / best, "error": self.errors[case.key], "bar": case.bars[column]}
            more = True
            if case.against == "read":
                # Each call by the bandwidth of its own repeat, which drifts.
                shares = [gigabytes / t / read for t, read in zip(times, self.reads, strict=False)]
                if shares:
                    row |= {"share": max(shares), "median_share": statistics.median(shares)}
            elif case.against in ("f32", "int8"):
                # Paths with integers are set against the single-precision peak too, as the bars are.
                if peak := self.peak(f"{case.against}_gops"):
                    row |= {"share": operations / best / peak, "median_share": operations / median / peak}
                own = {"float32": "f32_gops", "int16": "int16_gops", "int8": "int8_gops"}[case.precision]
                limit = self.peak(own) or DENSITY[case.precision] * (self.peak("f32_gops") or 0)
                if 0 < limit < operations / best:
                    self.invalid.append(
                        f"{case.label}, Q = {case.q}, is faster than the peak of its arithmetic"
                    )
            elif base := self.seconds.get(case.against):
                pairs = list(zip(times, base, strict=True))
                if case.section == "threads":
                    row |= {
                        "factor": min(base) / best,
                        "median_factor": statistics.median(b / t for t, b in pairs),
                    }
                else:
                    more = False
                    row |= {
                        "factor": best / min(base),
                        "median_factor": statistics.median(t / b for t, b in pairs),
                    }
            row["more_is_better"] = more
            value = row.get("share", row.get("factor"))
            if value is not None and row["bar"] is not None and not self.options.quick:
                row["met"] = value >= row["bar"] if more else value <= row["bar"]
        ratio_bars = {"peers-float32": (1.7, 1.3), "peers-int16": (3.2, 1.9), "peers-int16-int8": (3.2, 1.9)}
        peers = [
            max(self.peers[name]["gops"]) for name in FLOAT32_PEERS if self.peers.get(name, {}).get("gops")
        ]
        for row in made:
            if row["section"] == "peers" and "gops" in row and peers:
                row["against_best_peer"] = row["gops"] / max(peers)
                row["bar"] = ratio_bars[row["key"]][column]
                if not self.options.quick:
                    row["met"] = row["against_best_peer"] >= row["bar"]
        return made

    def record(self) -> dict[str, Any]:
        """Everything, as JSON."""
        rows = self.rows()
        return {
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "cpu": cpu(),
            "cores": len(os.sched_getaffinity(0)),
            "level": system.simd_level(),
            "threads": self.threads,
            "n": self.options.n,
            "d": self.options.d,
            "bandwidth": BANDWIDTH,
            "bandwidths": BANDWIDTHS,
            "repeats": self.options.repeats,
            "quick": self.options.quick,
            "load_average": self.load,
            "versions": versions(),
            "environment": {
                key: value for key, value in sorted(os.environ.items()) if key.startswith(WATCHED)
            },
            "peaks": self.peaks,
            "read_gbps": self.reads,
            "rows": rows,
            "peers": self.peers,
            "groups": self.groups,
            "skipped": self.skipped,
            "invalid": sorted(set(self.invalid)),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, help="rows (400,000; 20,000 with --quick)")
    parser.add_argument("--d", type=int, default=384, help="dimension")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="of ours and of the peers"
    )
    parser.add_argument("--repeats", type=int, help="timed calls of each path (5; 1 with --quick)")
    parser.add_argument("--only", type=lambda text: text.split(","), help=f"of {','.join(SECTIONS)}")
    parser.add_argument(
        "--quick", action="store_true", help="few rows, one repeat, few settings of peers, no record"
    )
    parser.add_argument("--out", type=Path, help="folder of the record (benches/records; none with --quick)")
    options = parser.parse_args()
    if unknown := set(options.only or []) - set(SECTIONS):
        parser.error(f"--only takes {', '.join(SECTIONS)}, not {', '.join(sorted(unknown))}")
    options.n = options.n or (20_000 if options.quick else 400_000)
    options.repeats = options.repeats or (1 if options.quick else 5)
    bench = Bench(options)
    with tempfile.TemporaryDirectory(prefix="lmd3-bench-") as name:
        bench.run(Path(name))
        record = bench.record()
    print(markdown(record))
    out = options.out or (None if options.quick else HERE / "records")
    if out is not None:
        say(f"written: {write(out, record).name}")
    return 1 if record["invalid"] else 0


if __name__ == "__main__":
    sys.exit(main())
