"""`lmd3 info`: versions, SIMD level and CPU of this machine."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from lmd3.cli._common import ThreadsOption, emit, lines_of

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
        bool, typer.Option("--measure", help="Also the peaks of arithmetic and memory (2 seconds).")
    ] = False,
    threads: ThreadsOption = None,
) -> None:
    """Versions, SIMD level and CPU: what to put into a report of a problem.

    \b
    Examples:
      lmd3 info
      lmd3 info --json
      lmd3 info --measure
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
        emit(facts)
        return
    found = system.measure(threads)
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
