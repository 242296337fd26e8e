"""What this machine can do: the SIMD levels of the scan, its arithmetic and its memory."""

from __future__ import annotations

import os
import warnings
from typing import Any

from lmd3 import _lmd3


def simd_level() -> str:
    """The SIMD level that scans run at: the highest this CPU has, or that named by `LMD3_SIMD`.

    A level whose kernels disagree with the portable ones on this CPU is passed over, with a RuntimeWarning.

    Raises:
        ParameterError: `LMD3_SIMD` names a level that this CPU lacks.
    """
    level = _lmd3.simd_level()
    if notice := _lmd3.simd_notice():
        warnings.warn(notice, RuntimeWarning, stacklevel=2)
    return level


def simd_levels() -> list[str]:
    """All SIMD levels this CPU has, lowest first."""
    return _lmd3.simd_levels()


def cores() -> int:
    """Logical CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_where_files_are_cut_short(json: bool) -> None:
    """Makes this process end with status 1 and the file's name where a mapped file is cut short while it is
    read, instead of dying of SIGBUS. For programs, not for libraries: it takes the process's signal.

    Args:
        json: say it as JSON on stdout instead of a line on stderr.
    """
    _lmd3.end_where_files_are_cut_short(json)


def measure(threads: int | None = None, seconds: float = 0.4) -> dict[str, Any]:
    """Measures what a scan can't exceed, on one thread and on all.

    Args:
        threads: all [default: every core].
        seconds: of each measurement.

    Returns:
        `threads`; `f32_peak_one` and `f32_peak_all`: operations (2 a multiply-add) per second of a loop that
        touches nothing but registers; `implied_clock_one` and `implied_clock_all`: Hz at which two vector
        multiply-adds a cycle give them (None at the portable level); `int16_peak_all` and
        `int8_peak_all`: the same of products of integers (None for int8 where no instruction multiplies
        four at a time); `l1_share`: the share of `f32_peak_one` that the scan's innermost loop reaches on
        data in the first-level cache (below .95: this host is busy); `clock`: Hz by dependent additions;
        `read_bandwidth_one` and `read_bandwidth_all`: bytes per second from memory (512 MiB are read).
    """
    threads = threads or cores()
    one, clock_one = _lmd3.peak_arithmetic(1, seconds)
    every, clock_all = _lmd3.peak_arithmetic(threads, seconds)
    int16, int8 = _lmd3.peak_integers(threads, seconds)
    size = 1 << 29
    return {
        "threads": threads,
        "f32_peak_one": one,
        "f32_peak_all": every,
        "implied_clock_one": clock_one,
        "implied_clock_all": clock_all,
        "int16_peak_all": int16,
        "int8_peak_all": int8,
        "l1_share": _lmd3.cached_dots(seconds / 2) / one,
        "clock": _lmd3.clock(seconds / 2),
        "read_bandwidth_one": _lmd3.read_bandwidth(1, size, seconds),
        "read_bandwidth_all": _lmd3.read_bandwidth(threads, size, seconds),
    }
