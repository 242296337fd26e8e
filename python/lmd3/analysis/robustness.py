"""How robust the headline slope is: negative controls, groups, curvature, measurement, support, rows."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from lmd3 import tables
from lmd3.analysis import alternatives as _alternatives
from lmd3.analysis import diagnostics as _diagnostics
from lmd3.analysis import evidence as _evidence
from lmd3.analysis import groups as _groups
from lmd3.analysis import measurement as _measurement
from lmd3.analysis import neighborhoods as _near
from lmd3.analysis import paired as _paired
from lmd3.analysis import support as _support
from lmd3.analysis.slope import slope
from lmd3.analysis.work import Work
from lmd3.errors import ParameterError, WorkError

#: Rows that the spline and SIMEX with many draws are fitted on at most.
_MANY = 20_000


def negative_controls(work: Work) -> dict[str, Any]:
    """Slopes of the shuffled predictor, and of densities among vectors that mean nothing."""
    headline, options = work.fits["headline"], work.options
    work.tables["shuffles"], shuffled = _evidence.shuffled_slopes(
        headline.slope, headline.x, work.shuffled_within(), options.shuffles, options.seed
    )
    facts: dict[str, Any] = {"shuffle": shuffled}
    _random_slopes(work, facts)
    return {"negative_controls": facts}


def _random_slopes(work: Work, facts: dict[str, Any]) -> None:
    """Slopes of densities among vectors that mean nothing, in the headline model."""
    given, sample, headline = work.options.random, work.sample, work.fits["headline"]
    if given is None:
        work.absent["random_embedding"] = "not asked for (lmd3 study --negative-control)"
        return
    at = work.rows(work.is_within)
    ids, clusters = sample.raw["id"][at], sample.codes(at)
    rows: list[tuple[str, int, float, float]] = []
    for _, part in given.groupby("draw", sort=True):
        values = part.assign(id=part["id"].astype(str)).set_index("id")["log_density"].reindex(ids).to_numpy()
        known = np.isfinite(values)
        if known.sum() < headline.x.shape[1] + 20 or not values[known].std() > 0:
            continue
        x = (values[known] - values[known].mean()) / values[known].std(ddof=1)
        data = headline.slope.data.take(known)
        try:
            of = slope(data, np.column_stack([headline.x[known][:, :-1], x]))
        except (WorkError, np.linalg.LinAlgError):
            continue
        codes = None if clusters is None else np.unique(clusters[known], return_inverse=True)[1]
        found = _evidence.test(of, codes)
        rows.append(("random embedding", len(rows), found["estimate"], found["statistic"]))
    if len(rows) < 2:
        work.absent["random_embedding"] = "too few queries with random vectors"
        return
    table = pd.DataFrame(rows, columns=list(work.tables["shuffles"].columns))
    work.tables["shuffles"] = pd.concat([work.tables["shuffles"], table], ignore_index=True)
    facts["random_embedding"] = _evidence.negative_control(
        table["estimate"].to_numpy(), table["statistic"].to_numpy(), headline.slope.estimate, None
    )


def by_group(work: Work, labels: pd.Series[Any] | None) -> dict[str, Any]:
    """Forest, heterogeneity, and the slope without each group or cluster."""
    sample, headline = work.sample, work.fits["headline"]
    at = work.rows(work.is_within)
    facts: dict[str, Any] = {}
    if labels is None:
        work.absent["forest"] = "no groups of ten rows and more are named (--within, --cluster)"
    else:
        table, facts["heterogeneity"] = _groups.forest(headline.slope, labels[at])
        if len(table):
            work.tables["forest"] = table
    for kind, of in (("group", sample.within), ("cluster", sample.cluster)):
        if of is not None:
            work.tables["left_out"] = _groups.left_out(headline.slope, of[at], kind)
            break
    return facts


def measured(work: Work, clusters: np.ndarray | None) -> dict[str, Any]:
    """Reliability of the densities, and the corrected slope."""
    sample, headline, s = work.sample, work.fits["headline"], work.sample.specifications[0]
    given = work.predictors.errors[0]
    if given is None:
        work.absent["measurement"] = "standard errors of the predictor are not known"
        return {}
    at = work.rows(work.is_within)
    errors = given.reindex(sample.raw["id"]).to_numpy(dtype=np.float64)[at] / sample.scales[s.column]["sd"]
    if not np.isfinite(errors).all():
        work.absent["measurement"] = "some queries have no standard error"
        return {}
    value = _measurement.reliability(headline.slope, headline.x, errors)
    found: dict[str, Any] = {
        "reliability": value,
        "marginal_reliability": 1.0 - float((errors**2).mean()),
        "mean_std_error": float(errors.mean() * sample.scales[s.column]["sd"]),
        "exact": bool((errors == 0).all()),
        "advice": _measurement.advice(value),
    }
    if not found["exact"] and value > 0:
        found["regression_calibration"] = _measurement.calibrated(
            headline.slope, headline.x, errors, clusters
        ).to_dict()
        count = 50 if len(errors) <= _MANY else 8
        try:
            corrected, table = _measurement.simex(
                headline.slope.data, headline.x, errors, clusters, count, work.options.seed
            )
            found["simex"] = corrected.to_dict()
            work.tables["simex"] = table
        except (WorkError, np.linalg.LinAlgError):
            work.absent["simex"] = "a fit with added noise does not converge"
    return {"measurement": found}


def supported(work: Work) -> tuple[dict[str, Any], dict[str, Any]]:
    """Columns for the points, and facts: conformal p-values."""
    sample, s = work.sample, work.sample.specifications[0]
    calibration = work.options.support
    if calibration is None or work.options.plain is not None or s.predictor == _paired.CHANGE:
        work.absent["support"] = "no densities of held-out training rows (--support)"
        return {}, {}
    match = [c for c in calibration.specifications if (c.kernel, c.bandwidth) == (s.kernel, s.bandwidth)]
    if not match:
        raise ParameterError(
            f"the densities of training rows lack {s.setting or s.predictor}",
            file=calibration.file,
            remedy="make both with one `bandwidth.json` (--bandwidth @bandwidth.json)",
        )
    values = calibration.frame[match[0].column].to_numpy(dtype=np.float64)
    found = _support.support(sample.raw[s.column].to_numpy(), values)
    facts = {
        "alpha": found.alpha,
        "calibration_rows": found.calibration,
        "unsupported": int(found.unsupported.sum()),
        "share": float(found.unsupported.mean()),
        "share_below_alpha": float((found.p_value <= found.alpha).mean()),
    }
    return {"support_p": found.p_value, "unsupported": found.unsupported}, {"support": facts}


def diagnosed(work: Work) -> tuple[dict[str, Any], dict[str, Any]]:
    """Facts of vectors and rows, and columns for the points."""
    sample, headline = work.sample, work.fits["headline"]
    at = work.rows(work.is_within)
    facts: dict[str, Any] = {}
    columns: dict[str, Any] = {}
    scaled, facts["influence"] = _diagnostics.influence(headline.slope, list(sample.raw["id"][at]))
    moves = np.full(len(at), np.nan)
    moves[at] = scaled
    columns["influence"] = moves
    given = work.predictors.errors[0]
    if given is not None:
        columns["std_error"] = given.reindex(sample.raw["id"]).to_numpy(dtype=np.float64)
    known = work.predictors.frame.set_index("id")
    if "local_dimension" in known.columns:
        column = known["local_dimension"].reindex(sample.raw["id"])
        values = tables.numbers(column.reset_index(drop=True), "local_dimension")
        columns["local_dimension"] = values
        facts["local_dimension"] = _diagnostics.local_dimension(values)
    if "duplicates" in known.columns:
        found = known["duplicates"].reindex(sample.raw["id"]).reset_index(drop=True)
        numbers = tables.numbers(found, "duplicates")
        columns["duplicates"] = pd.array(
            np.where(np.isnan(numbers), -1, numbers).astype(np.int64), dtype="Int64"
        )
        columns["duplicates"][np.isnan(numbers)] = pd.NA
        facts["duplicates"] = {
            "queries": int((numbers > 0).sum()),
            "rows": int(np.nansum(numbers)),
        }
    neighbors = work.predictors.neighbors
    if neighbors is not None and len(neighbors) and "neighbor_id" in neighbors.columns:
        work.tables["hubs"], facts["hubness"] = _diagnostics.hubness(neighbors)
    if sample.vectors is not None:
        facts["anisotropy"] = _diagnostics.anisotropy(sample.vectors)
        if work.options.corpus is not None:
            facts["corpus_distance"] = {
                "mmd": _diagnostics.mmd(sample.vectors, work.options.corpus, seed=work.options.seed),
                "sliced_wasserstein": _diagnostics.sliced_wasserstein(
                    sample.vectors, work.options.corpus, seed=work.options.seed
                ),
            }
    else:
        work.absent["anisotropy"] = "the queries' vectors are not known"
    return facts, columns


def curvature(work: Work) -> dict[str, Any]:
    """Charts of the fit, and a spline in place of the line."""
    headline = work.fits["headline"]
    work.tables["checks"] = _evidence.checks(headline.slope)
    try:
        frame, _, _ = work.sample.part(work.rows(work.is_within))
        curve, facts = _alternatives.smooth(
            frame, headline.terms, binary=work.sample.binary, most=_MANY, seed=work.options.seed
        )
    except Exception as error:  # statsmodels raises many kinds where a basis is singular
        work.absent["smooth"] = f"the spline could not be fitted: {error}"
        return {}
    work.tables["checks"] = pd.concat([work.tables["checks"], curve], ignore_index=True)
    return {"curvature": facts}


def autocorrelation(work: Work) -> dict[str, Any]:
    """Moran's I of the residuals over near queries."""
    if work.sample.vectors is None:
        work.absent["moran"] = "the queries' vectors are not known"
        return {}
    headline = work.fits["headline"]
    weights = np.sqrt(headline.slope.weights)
    vectors = work.sample.vectors[work.rows(work.is_within)]
    moran = _near.moran(vectors, headline.slope.rest * weights, work.options.seed)
    return {"moran": None if moran is None else asdict(moran)}
