"""The parameters of an estimator: what may be given, and what it comes to."""

from __future__ import annotations

from collections.abc import Sequence

from lmd3.bandwidth import DEFAULT_RULES, Bandwidth, Rule, parse_rule, read_bandwidths
from lmd3.density.methods import METHODS, parse_tolerance
from lmd3.errors import ParameterError
from lmd3.kernels import KERNELS, unknown_kernel

#: Arithmetic of the dot products; "auto" is float32, and int16 for int8 rows.
PRECISIONS = ("auto", "float32", "int16", "int8")


def parse_kernels(kernel: str | Sequence[str]) -> list[str]:
    """The kernels that were given, one or a list.

    Raises:
        ParameterError: none, an unknown one, or one twice.
    """
    kernels = [kernel] if isinstance(kernel, str) else list(kernel)
    if not kernels:
        raise ParameterError("no kernel given")
    for name in kernels:
        if name not in KERNELS:
            raise unknown_kernel(name)
    if len(set(kernels)) < len(kernels):
        raise ParameterError("a kernel was given twice")
    return kernels


def parse_bandwidths(
    given: str | float | Sequence[str | float],
) -> tuple[list[Rule] | list[Bandwidth], bool]:
    """The parsed rules (or the content of a file), and whether they are the default grid.

    Raises:
        ParameterError: none, one that is no bandwidth, or one twice.
        FileMissingError, FormatError: a file of bandwidths that can't be read.
    """
    rules = (
        [given] if isinstance(given, (str, float, int)) or not isinstance(given, Sequence) else list(given)
    )
    if not rules:
        raise ParameterError("no bandwidth given")
    files = [rule for rule in rules if isinstance(rule, str) and rule.startswith("@")]
    if files:
        if len(rules) > 1:
            raise ParameterError("a file of bandwidths stands alone: it is the whole set")
        resolved = read_bandwidths(files[0][1:])
        for entry in resolved:
            if entry.kernel not in KERNELS:
                raise unknown_kernel(entry.kernel)
        return resolved, False
    parsed = [parse_rule(rule) for rule in rules]
    if len({rule.text for rule in parsed}) < len(parsed):
        raise ParameterError("a bandwidth was given twice")
    return parsed, tuple(rules) == DEFAULT_RULES


def check_precision(precision: str, io: str) -> None:
    """Refuses an arithmetic or a way to read rows that is none.

    Raises:
        ParameterError: that is so.
    """
    if precision not in PRECISIONS:
        raise ParameterError(
            f"unknown precision {precision!r}", remedy=f"choose one of {', '.join(PRECISIONS)}"
        )
    if io not in ("mmap", "pread"):
        raise ParameterError(f"unknown io {io!r}", remedy="choose mmap or pread")


def check_method(method: str, tolerance: str | float) -> None:
    """Refuses a method or a tolerance that is none.

    Raises:
        ParameterError: that is so.
    """
    if method not in METHODS:
        raise ParameterError(f"unknown method {method!r}", remedy=f"choose one of {', '.join(METHODS)}")
    parse_tolerance(tolerance)
