"""What this machine can do: the SIMD levels of the scan."""

from __future__ import annotations

import warnings

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
