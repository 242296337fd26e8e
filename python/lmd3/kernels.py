"""Kernels by name: their logarithms at given pairs and their normalising constants.

Those of ℝᵈ are the constants of scikit-learn's `KernelDensity` (see its user guide, "Kernel Density
Estimation"); that of the von Mises–Fisher kernel is of the sphere (Mardia & Jupp, *Directional Statistics*,
2000, section 9.3).
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, ive

from lmd3.errors import ParameterError

#: Kernels that the scan evaluates within its tiles of distances.
FUSED = ("exponential", "gaussian")

#: Kernels by name. Those that are not fused are summed pair by pair in double precision, more slowly.
KERNELS = (*FUSED, "vmf", "laplacian", "tophat", "epanechnikov", "linear")

#: Terms of the uniform asymptotic expansion of Bessel functions.
_TERMS = 10


def unknown_kernel(kernel: object) -> ParameterError:
    """The error of a name that is no kernel's."""
    return ParameterError(f"unknown kernel {kernel!r}", remedy=f"choose one of {', '.join(KERNELS)}")


def log_normalizer(kernel: str, dimensions: float, bandwidth: float) -> float:
    """Logarithm of the kernel's integral over ℝᵈ (vmf: over the unit sphere), to be subtracted from a log
    density.

    With V = π^{d/2}/Γ(d/2 + 1) the volume of the unit ball and κ = 1/h²:

    * exponential, exp(−D/h): log(2π^{d/2}/Γ(d/2)) + log Γ(d) + d·log h
    * gaussian, exp(−D²/2h²): (d/2)·log(2πh²)
    * vmf, exp(κ(⟨x,q⟩ − 1)): (d/2)·log 2π + log I_{d/2−1}(κ) − (d/2−1)·log κ − κ
    * laplacian, exp(−‖x − q‖₁/h): d·log(2h)
    * tophat, 1 where D < h: log V + d·log h
    * epanechnikov, 1 − (D/h)²: log V + log(2/(d + 2)) + d·log h
    * linear, 1 − D/h: log V − log(d + 1) + d·log h

    Raises:
        ParameterError: unknown kernel.
    """
    d, log_h = dimensions, math.log(bandwidth)
    if kernel == "exponential":
        sphere = math.log(2.0) + 0.5 * d * math.log(math.pi) - gammaln(0.5 * d)
        return float(sphere + gammaln(d) + d * log_h)
    if kernel == "gaussian":
        return 0.5 * d * math.log(2.0 * math.pi) + d * log_h
    if kernel == "vmf":
        order = 0.5 * d - 1.0
        bessel = log_bessel_scaled(order, math.exp(-2.0 * log_h))
        return 0.5 * d * math.log(2.0 * math.pi) + bessel + 2.0 * order * log_h
    if kernel == "laplacian":
        return d * (math.log(2.0) + log_h)
    ball = 0.5 * d * math.log(math.pi) - float(gammaln(0.5 * d + 1.0)) + d * log_h
    if kernel == "tophat":
        return ball
    if kernel == "epanechnikov":
        return ball + math.log(2.0 / (d + 2.0))
    if kernel == "linear":
        return ball - math.log(d + 1.0)
    raise unknown_kernel(kernel)


def log_bessel_scaled(order: float, x: float) -> float:
    """log(e^{−x} I_ν(x)) for ν = `order` ≥ −1/2 and x > 0, where `scipy.special.ive` underflows too.

    There by the uniform asymptotic expansion in ν (DLMF 10.41.3), written in μ = √(ν² + x²) and p = ν/μ:
    μ − x + ν·log(x/(ν + μ)) − ½·log(2πμ) + log Σ_k U_k(p)/ν^k.
    """
    direct = float(ive(order, x))
    # NaN and 0 fail this, and so do values that have lost digits to underflow.
    if direct > 1e-290:
        return math.log(direct)
    mu = math.hypot(order, x)
    p = order / mu
    series = math.fsum(
        # U_k has no power below p^k, so that U_k(p)/ν^k is a polynomial in p over μ^k.
        math.fsum(c * p**i for i, c in enumerate(_debye(k)[k:])) / mu**k
        for k in range(_TERMS)
    )
    exponent = order * order / (mu + x) + order * (math.log(x) - math.log(order + mu))
    return exponent - 0.5 * math.log(2.0 * math.pi * mu) + math.log(series)


@cache
def _debye(k: int) -> tuple[float, ...]:
    """Coefficients of U_k by ascending powers (DLMF 10.41.9)."""
    return tuple(float(c) for c in _debye_exact(k))


@cache
def _debye_exact(k: int) -> tuple[Fraction, ...]:
    """U_{k+1}(p) = ½p²(1 − p²)U_k′(p) + ⅛∫₀ᵖ (1 − 5t²)U_k(t) dt, U_0 = 1."""
    if k == 0:
        return (Fraction(1),)
    before = _debye_exact(k - 1)
    after = [Fraction(0)] * (len(before) + 3)
    for i, c in enumerate(before):
        after[i + 1] += c * (Fraction(i, 2) + Fraction(1, 8 * (i + 1)))
        after[i + 3] -= c * (Fraction(i, 2) + Fraction(5, 8 * (i + 3)))
    return tuple(after)


def log_kernel(
    kernel: str,
    bandwidth: float,
    distances: NDArray[np.float64],
    rows: NDArray[np.float64],
    queries: NDArray[np.float64],
) -> NDArray[np.float64]:
    """log k of pairs (m,): their Euclidean distances (m,), rows (m, d) and queries (m, d).

    −∞ on and beyond the edge of a compact kernel.

    Raises:
        ParameterError: unknown kernel.
    """
    h = bandwidth
    scaled = distances / h
    edge = np.where(distances < h, scaled, 1.0)
    values: NDArray[np.float64]
    with np.errstate(divide="ignore"):
        match kernel:
            case "exponential":
                values = -scaled
            case "gaussian":
                values = -0.5 * scaled**2
            case "vmf":
                values = (np.einsum("ij,ij->i", rows, queries) - 1.0) / h**2
            case "laplacian":
                values = -np.abs(rows - queries).sum(axis=1) / h
            case "tophat":
                values = np.where(distances < h, 0.0, -np.inf)
            case "epanechnikov":
                values = np.log1p(-(edge**2))
            case "linear":
                values = np.log1p(-edge)
            case _:
                raise unknown_kernel(kernel)
    return values
