"""`lmd3 info`: versions, SIMD level and CPU of this machine."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from lmd3.cli._common import emit

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


def info() -> None:
    """Versions, SIMD level and CPU: what to put into a report of a problem.

    \b
    Examples:
      lmd3 info
      lmd3 info --json
      LMD3_SIMD=portable lmd3 info
    """
    from lmd3 import __version__, system

    facts: dict[str, Any] = {
        "lmd3": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "simd_level": system.simd_level(),
    }
    facts |= {name: _version(name) for name in _PACKAGES}
    emit(facts)


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
