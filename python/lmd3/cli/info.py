"""`lmd3 info`: versions, SIMD level and CPU of this machine."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from lmd3.cli._common import ThreadsOption, emit, lines_of
from lmd3.errors import ParameterError

_PACKAGES = (
    "numpy",
    "scipy",
    "pandas",
    "pyarrow",
    "statsmodels",
    "torch",
    "transformers",
    "sentence-transformers",
)


def info(
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Also what it does in a second: peaks, scans, merging (15 seconds)."),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Also into a file, for lmd3 density --plan --rates FILE."),
    ] = None,
    threads: ThreadsOption = None,
) -> None:
    """Versions, SIMD level and CPU: what to put into a report of a problem.

    \b
    Examples:
      lmd3 info
      lmd3 info --json
      lmd3 info --measure
      lmd3 info --measure -o node.json
      LMD3_SIMD=portable lmd3 info
    """
    from lmd3 import __version__, system

    facts: dict[str, Any] = {
        "lmd3": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": system.cores(),
        "simd_level": system.simd_level(),
    }
    facts |= {name: _version(name) for name in _PACKAGES}
    if not measure:
        if out is not None:
            raise ParameterError("-o keeps what was measured", remedy="add --measure")
        emit(facts)
        return
    from lmd3.density.rates import measure_rates
    from lmd3.results import write_json

    found = system.measure(threads)
    found["rates"] = measure_rates(threads, measured=found).to_dict()
    if out is not None:
        write_json(out, facts | {"measured": found})
    emit(facts | {"measured": found}, text="\n".join([lines_of(facts), *_measured(found)]))


def _measured(found: dict[str, Any]) -> list[str]:
    """The peaks in words."""
    lines = []
    for label, key in (("one thread", "one"), (f"{found['threads']} threads", "all")):
        line = f"float32 peak, {label}: {found[f'f32_peak_{key}'] / 1e9:,.1f} GFLOP/s"
        clock = found[f"implied_clock_{key}"]
        if clock is not None and key == "one":  # threads of one core share its multipliers
            line += f" (two multiply-adds a cycle at {clock / 1e9:.2f} GHz)"
        lines.append(line)
    lines += [
        f"{name} peak, {found['threads']} threads: {peak / 1e9:,.1f} GOP/s"
        for name in ("int16", "int8")
        if (peak := found[f"{name}_peak_all"]) is not None
    ]
    lines.append(f"innermost loop in the first-level cache: {found['l1_share']:.0%} of the float32 peak")
    if found["clock"] is not None:
        lines.append(f"clock, one thread: {found['clock'] / 1e9:.2f} GHz")
    for label, key in (("one thread", "one"), (f"{found['threads']} threads", "all")):
        lines.append(f"memory read, {label}: {found[f'read_bandwidth_{key}'] / 1e9:,.1f} GB/s")
    rates = found["rates"]
    lines += [
        f"scan of {arithmetic}, {found['threads']} threads: {rate / 1e9:,.1f} GOP/s"
        for arithmetic, rate in rates["operations"].items()
    ]
    lines.append(f"merging partial files: {rates['fold'] / 1e6:,.0f} MB/s in one process")
    start, task = rates["start"], rates["task"]
    lines.append(f"a worker starts in {start:.1f} s, a task takes {task * 1e3:.0f} ms beside its scan")
    return lines


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
