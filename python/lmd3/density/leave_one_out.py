"""The bandwidth of the largest leave-one-out likelihood of the corpus itself (`--bandwidth loo`).

Rows drawn at random are scored with themselves left out, and the h is taken at which the mean of their log
densities (with the kernel's normalising constant) is largest: Habbema, Hermans and van den Broek (1974),
Duin (1976). Whole clusters of duplicates are left out with a row: one copy left in would make the likelihood
grow without end as h → 0.

The likelihood is that of a density over ℝᵈ, as in scikit-learn. Embeddings fill far fewer dimensions, so it
asks for a very narrow kernel; `loo=M` takes the constant of M dimensions (the local dimension, say) instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lmd3.bandwidth import Bandwidth, Rule
from lmd3.density.scan import Asked, Scanner
from lmd3.errors import ParameterError
from lmd3.kernels import log_normalizer
from lmd3.progress import ProgressFactory

#: Rows left out in turn; bandwidths of the first grid, of each finer one, and finer grids.
ROWS, COARSE, FINE, ROUNDS = 1_000, 48, 9, 2
#: Neighbours that the local dimension is taken from.
_NEAREST = 10


def likeliest(
    rows: Scanner,
    kernel: str,
    rule: Rule,
    *,
    scale: float,
    weights: NDArray[np.float32] | None,
    exclude_within: float,
    seed: int,
    progress: ProgressFactory,
) -> tuple[Bandwidth, str | None]:
    """The bandwidth, with the curve it was found on, and a notice where hardly a row decides a density.

    Args:
        rows: the rows looked at.
        kernel: its name.
        rule: of kind "loo"; its value is the dimension of the constant, 0 for that of the rows.
        scale: a typical distance.
        weights: of the rows, or None: they weigh the log densities too.
        exclude_within: rows nearer than this count as copies; at least those that are duplicates do.
        seed: of the draw.
        progress: shows the pairs.

    Raises:
        ParameterError: the likelihood has no maximum; vmf with a dimension of its own.
    """
    store = rows.store
    if kernel == "vmf" and rule.value:
        raise ParameterError(f"bandwidth {rule.text}: vmf has its constant on the sphere", remedy="take loo")
    dimension = rule.value or store.d
    rng = np.random.default_rng([seed, 3])
    chosen = np.sort(rng.choice(store.n, min(ROWS, store.n), replace=False)).astype(np.int64)
    sample = np.ascontiguousarray(store.rows(chosen), dtype=np.float32)
    norm = float(np.median(np.linalg.norm(sample.astype(np.float64), axis=1)))
    near = max(exclude_within, 1e-3 * norm, 2.0 * store.rounding)
    asked = Asked(own=chosen, exclude_within=near, neighbors=min(_NEAREST, store.n))
    share = np.ones(len(chosen)) if weights is None else weights[chosen].astype(np.float64)
    if not share.sum() > 0:
        raise ParameterError(f"bandwidth {rule.text}: the rows drawn have no weight")
    share /= share.sum()
    curve: dict[float, tuple[float, float, float]] = {}
    dimensions: list[float] = []

    def look(grid: Sequence[float]) -> None:
        scan = rows.scan(sample, [(kernel, h) for h in grid], asked, progress, "leave-one-out")
        for b, h in enumerate(grid):
            scores = scan.total.log_density[:, b] - log_normalizer(kernel, dimension, h)
            mean = float(share @ scores) if np.isfinite(scores).all() else -math.inf
            error = float(np.sqrt(share**2 @ (scores - mean) ** 2)) if math.isfinite(mean) else math.nan
            curve[h] = (mean, error, float(np.median(scan.total.ess[:, b])))
        if not dimensions:
            dimensions.append(_local_dimension(scan.neighbor_distances))

    # The exponential kernel's optimum is near (nearest distance)/d.
    look([float(h) for h in scale * np.geomspace(min(2e-3, 0.05 / dimension), 10.0, COARSE)])
    for _ in range(ROUNDS):
        grid = sorted(curve)
        best = max(range(len(grid)), key=lambda at: curve[grid[at]][0])
        if best in (0, len(grid) - 1) or not math.isfinite(curve[grid[best]][0]):
            raise ParameterError(
                f"bandwidth {rule.text}: the leave-one-out likelihood has no maximum between "
                f"{grid[0]:.3g} and {grid[-1]:.3g}",
                remedy="leave near-copies out (--exclude-within), or name a bandwidth or ess=N",
            )
        look([float(h) for h in np.geomspace(grid[best - 1], grid[best + 1], FINE + 2)[1:-1]])
    h = max(curve, key=lambda at: curve[at][0])
    mean, error, ess = curve[h]
    points = tuple((at, *curve[at]) for at in sorted(curve) if math.isfinite(curve[at][0]))
    found = Bandwidth(
        kernel, h, rule.text, mean, mean - 1.96 * error, mean + 1.96 * error, len(chosen), store.n, points
    )
    notice = None
    if ess < 10:
        notice = (
            f"{rule.text}: at h = {h:.4g} a density rests on {ess:.3g} effective rows (median): the "
            f"likelihood of {dimension:g} dimensions asks for a narrow kernel"
        )
        if not rule.value and kernel != "vmf" and math.isfinite(dimensions[0]):
            notice += (
                f"; near a row the data have about {dimensions[0]:.3g} dimensions (loo={dimensions[0]:.0f})"
            )
    return found, notice


def _local_dimension(distances: NDArray[np.float64]) -> float:
    """One dimension for all rows: Hill's estimates, their inverses averaged (MacKay and Ghahramani 2005)."""
    from lmd3.density.tables import local_dimension

    local = local_dimension(distances)
    local = local[np.isfinite(local)]
    return float(1.0 / np.mean(1.0 / local)) if len(local) else math.nan
