"""What this machine can do: the SIMD levels of the scan."""

from __future__ import annotations

from lmd3 import _lmd3


def simd_level() -> str:
    """The SIMD level that scans run at: the highest this CPU has, or that named by `LMD3_SIMD`.

    Raises:
        ParameterError: `LMD3_SIMD` names a level that this CPU lacks.
    """
    return _lmd3.simd_level()


def simd_levels() -> list[str]:
    """All SIMD levels this CPU has, lowest first."""
    return _lmd3.simd_levels()
