"""How much of a treatment's effect passes through density: linear mediation with a cluster bootstrap.

Indirect effect = a·b, a the treatment's slope for the mediator, b the mediator's for the outcome beside the
treatment (Imai, Keele and Yamamoto 2010); for linear models the simulation of
`statsmodels.stats.mediation.Mediation` has this limit, and stands beside. Intervals are percentiles of a
bootstrap that draws whole clusters and fits all models anew. Were the errors of the two models correlated by
ρ, the indirect effect would be another: `sensitivity`, and `rho_zero` where it vanishes (their theorem 2).
Where the treatment all but determines the mediator the two can't be told apart, and the analysis is refused.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import numpy as np
import pandas as pd

from lmd3.errors import ParameterError

#: Share of the mediator's variance that treatment (and controls) may explain.
MOST_EXPLAINED = 0.9
DRAWS = 2_000
#: Queries that the simulation of statsmodels is run on at most, and its draws.
_MOST_SIMULATED, _SIMULATIONS = 5_000, 400
_BATCH = 20_000_000


def paths(gram: np.ndarray) -> np.ndarray:
    """(…, 3) indirect, direct and total effect from cross products (…, k, k) of [t, controls…, m, y]."""
    size = gram.shape[-1]
    inner, m, y = list(range(size - 2)), size - 2, size - 1
    both = [*inner, m]

    def solve(columns: list[int], target: int) -> np.ndarray:
        at = np.array(columns)
        return np.asarray(
            np.linalg.solve(gram[..., at[:, None], at], gram[..., at, target][..., None])[..., 0]
        )

    a, outcome = solve(inner, m)[..., 0], solve(both, y)
    indirect, direct = a * outcome[..., -1], outcome[..., 0]
    return np.stack([indirect, direct, indirect + direct], axis=-1)


def mediate(
    y: np.ndarray,
    m: np.ndarray,
    t: np.ndarray,
    controls: np.ndarray,
    clusters: np.ndarray | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    most: float = MOST_EXPLAINED,
) -> dict[str, Any]:
    """The effect of t on y, split into what passes through m and what does not.

    Args:
        y: (n,) outcome.
        m: (n,) mediator: the change of log density.
        t: (n,) treatment: the dose.
        controls: (n, k) columns of both models, an intercept (or group effects taken out of all) included.
        clusters: (n,) codes that the bootstrap draws whole; None: rows.
        draws: of the bootstrap.
        seed: of the draws.
        most: the share of the mediator's variance that the treatment explains (beyond the controls) above
            which it is refused.

    Returns:
        `refused` (why) and `explained`; or `indirect`, `direct`, `total`, each [estimate, low, high] per unit
        of t, `share` of the total, `p_value` of the indirect effect, `explained`, `rho_zero`, `sensitivity`
        {ρ: indirect}, `draws`, `clusters`.

    Raises:
        ParameterError: a treatment, mediator or outcome without variation.
    """
    n = len(y)
    base = np.linalg.qr(controls)[0] if controls.shape[1] else np.empty((n, 0))

    def rest(x: np.ndarray) -> np.ndarray:
        return np.asarray(x - base @ (base.T @ x))

    left = {"treatment": rest(t), "mediator": rest(m), "outcome": rest(y)}
    for name, x in left.items():
        if not float(x @ x) > 1e-18 * max(1.0, float(n)):
            raise ParameterError(f"mediation: the {name} does not vary beyond the controls")
    rt, rm, ry = left.values()
    a = float(rt @ rm / (rt @ rt))
    explained = float((rt @ rm) ** 2 / ((rt @ rt) * (rm @ rm)))
    if explained > most:
        return {
            "refused": f"the dose explains {explained:.0%} of the change of log density: its effect can't be "
            "told from that of density",
            "explained": explained,
        }
    z = np.column_stack([t, controls, m, y])
    codes = np.arange(n) if clusters is None else clusters
    g = int(codes.max()) + 1
    k = z.shape[1]
    upper = np.triu_indices(k)
    parts = np.column_stack(
        [np.bincount(codes, z[:, i] * z[:, j], minlength=g) for i, j in zip(*upper, strict=True)]
    )

    def gram(sums: np.ndarray) -> np.ndarray:
        full = np.empty((*sums.shape[:-1], k, k))
        full[..., upper[0], upper[1]] = sums
        full[..., upper[1], upper[0]] = sums
        return full

    estimate = paths(gram(parts.sum(axis=0)))
    rng = np.random.default_rng([seed, 13])
    boot = np.empty((draws, 3))
    size = max(1, min(draws, _BATCH // max(g, 1)))
    for start in range(0, draws, size):
        count = min(size, draws - start)
        weights = np.empty((count, g))
        for row in range(count):
            weights[row] = np.bincount(rng.integers(g, size=g), minlength=g)
        sums = weights @ parts
        try:
            boot[start : start + count] = paths(gram(sums))
        except np.linalg.LinAlgError:
            boot[start : start + count] = np.nan
    boot = boot[np.isfinite(boot).all(axis=1)]
    low, high = np.quantile(boot, [0.025, 0.975], axis=0)
    beyond = min((boot[:, 0] <= 0).mean(), (boot[:, 0] >= 0).mean())
    e_m, e_y = rm - a * rt, ry - float(rt @ ry / (rt @ rt)) * rt
    rho_hat = float(np.corrcoef(e_m, e_y)[0, 1])
    ratio = float(e_y.std() / e_m.std())

    def at(rho: float) -> float:
        return float(a * ratio * (rho_hat - rho * np.sqrt((1 - rho_hat**2) / (1 - rho**2))))

    found: dict[str, Any] = {
        name: [float(estimate[i]), float(low[i]), float(high[i])]
        for i, name in enumerate(("indirect", "direct", "total"))
    }
    return found | {
        "share": float(estimate[0] / estimate[2]) if estimate[2] else None,
        "p_value": float(min(1.0, 2 * (1 + beyond * len(boot)) / (1 + len(boot)))),
        "explained": explained,
        "rho_zero": rho_hat,
        "sensitivity": {f"{step / 10:+.1f}": at(step / 10) for step in range(-8, 9, 2)},
        "draws": len(boot),
        "clusters": g if clusters is not None else None,
    }


def simulated(
    y: np.ndarray, m: np.ndarray, t: np.ndarray, controls: np.ndarray, seed: int = 0
) -> dict[str, float] | None:
    """The average indirect effect by statsmodels' simulation, per unit of t; None where it fails.

    Args:
        y, m, t, controls: as for `mediate`, the intercept among the controls.
        seed: of the draw of rows and of the simulation.
    """
    import statsmodels.api as sm
    from statsmodels.stats.mediation import Mediation

    rng = np.random.default_rng([seed, 14])
    rows = np.arange(len(y))
    if len(rows) > _MOST_SIMULATED:
        rows = np.sort(rng.choice(rows, _MOST_SIMULATED, replace=False))
    names = [f"c{i}" for i in range(controls.shape[1])]
    frame = pd.DataFrame(controls[rows], columns=names).assign(t=t[rows], m=m[rows], y=y[rows])
    # Before 0.15 statsmodels draws from numpy's global state, from then on from `rng` alone.
    takes_rng = "rng" in inspect.signature(Mediation.fit).parameters
    own = {"rng": rng} if takes_rng else {}
    state = np.random.get_state()
    try:
        np.random.seed(seed % 2**32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = sm.OLS(frame["y"], frame[["t", "m", *names]])
            mediator = sm.OLS(frame["m"], frame[["t", *names]])
            result = Mediation(outcome, mediator, "t", "m").fit(
                method="parametric", n_rep=_SIMULATIONS, **own
            )
            table = result.summary()
    except Exception:  # statsmodels raises many kinds where a fit fails
        return None
    finally:
        np.random.set_state(state)
    row = table.loc["ACME (average)"]
    return {
        "indirect": float(row["Estimate"]),
        "ci_low": float(row["Lower CI bound"]),
        "ci_high": float(row["Upper CI bound"]),
    }
