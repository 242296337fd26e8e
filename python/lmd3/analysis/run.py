"""One study: outcome against density, from the tables to coefficients, ladder and an answer in words."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from lmd3 import outcomes as _outcomes
from lmd3 import tables
from lmd3.analysis import adjustment as _adjustment
from lmd3.analysis import bins as _bins
from lmd3.analysis import comparisons as _comparisons
from lmd3.analysis import evidence as _evidence
from lmd3.analysis import few_clusters as _few
from lmd3.analysis import join as _join
from lmd3.analysis import ladder as _ladder
from lmd3.analysis import models as _models
from lmd3.analysis import multiplicity as _many
from lmd3.analysis import paired as _paired
from lmd3.analysis import regression as _regression
from lmd3.analysis import robustness as _robust
from lmd3.analysis import words as _words
from lmd3.analysis.inference import Inference
from lmd3.analysis.sample import Sample, independent_controls
from lmd3.analysis.study import Study
from lmd3.analysis.work import LEAST_IN_GROUP, Options, Work
from lmd3.errors import ParameterError

#: Queries whose neighbours are kept for the report, at each end of the predictor.
EXTREMES = 10


def regress(
    outcome: Any,
    density: Any,
    covariates: Any = None,
    cluster: str | None = None,
    within: str | None = None,
    controls: str | Sequence[str] = "default",
    predictor: str = "log_density",
    bandwidth: float | str | Sequence[float | str] | None = None,
    *,
    outcome_name: str | None = None,
    floor: float | None = None,
    shuffles: int = _ladder.SHUFFLES,
    draws: int = _few.DRAWS,
    models: Sequence[str] = (),
    contrast: Any = None,
    reference: Any = None,
    support: Any = None,
    queries: Any = None,
    corpus: Any = None,
    adjust: str | Path | None = None,
    random_controls: Any = None,
    before: Any = None,
    density_before: Any = None,
    dose: str | None = None,
    seed: int = 0,
    id: str | None = None,
    files: Mapping[str, str] | None = None,
) -> Study:
    """Relates an outcome to the density of its queries.

    The predictor and every control enter per standard deviation (over the rows of the study). Continuous
    outcomes are fitted by least squares, binary ones by a logit; rows count `trials` × `weight` times where
    the outcome table has such columns.

    Args:
        outcome: an outcome table (`lmd3.read_outcomes`), any other table of (id, value), or its path.
        density: a `DensityTable`, its folder, or any table with an id and the predictor.
        covariates: table or path with an id and one column per covariate.
        cluster: column whose equal values are one cluster of the covariance.
        within: column of groups that get an effect each. The fit with group effects is the primary one where
            every group has at least 10 rows, else the pooled one; both are given.
        controls: `default` (typicality and all of `covariates`), `none`, or names.
        predictor: the column whose slope is asked for.
        bandwidth: restricts a density table to these; the first is the primary one.
        outcome_name: which outcome, where the table holds several.
        floor: replaces log densities below it (−inf, where the density is zero); without one they are
            refused.
        shuffles: draws of the shuffle nulls, at least 200.
        draws: of the wild bootstraps (effective clusters below 40) and, at most 1,999, of max-T.
        models: alternatives to fit beside: of `lmd3.analysis.alternatives.ALTERNATIVES`.
        contrast: another model's outcome table on the same queries: its slope, and the difference.
        reference: densities of the same queries under a corpus the model never saw, at the same bandwidths:
            the predictor becomes log density less that one, and density alone stands beside.
        support: log densities of training rows, each left out of its own density (a density table):
            queries get conformal p-values against them.
        queries: vectors of the queries: a store, or (ids, (n, d) array). Where no cluster and no group is
            named, near queries are clusters (k-means, √n of them); Moran's I of the residuals.
        corpus: (m, d) vectors of training rows drawn at random: the distance of queries and corpus.
        adjust: file of a causal graph or adjustment set (`lmd3.analysis.adjustment`).
        random_controls: a table (id, draw, log_density) of densities among vectors that mean nothing
            (`lmd3.density.held_out.random_densities`): their slopes stand beside.
        before: outcomes of the same queries before an intervention: the study is of the change
            (`lmd3.analysis.paired`).
        density_before: their densities before it, at the same bandwidths: the predictor is the change.
        dose: with `before`, a column of the outcomes: the number of texts leaked per query, or 0 and 1.
        seed: of shuffles, draws, folds and k-means.
        id: id column of a plain predictor table.
        files: names for messages and `run.json` (`outcomes`, `density`, `covariates`) of tables given as
            objects.

    Raises:
        JoinError: no id joins.
        ColumnError: a column named does not exist or is not numeric.
        NotFiniteError: a log density of −inf or NaN, and no floor.
        ParameterError: an option out of range; an outcome or predictor without variation; too few rows;
            another bandwidth than the reference's.
        WorkError: the headline logit does not converge.
    """
    started = time.monotonic()
    if before is None and (density_before is not None or dose is not None):
        raise ParameterError("densities before and a dose go with outcomes before", remedy="give --before")
    if before is not None and (reference is not None or contrast is not None):
        raise ParameterError("a change is related to a change: no reference or contrast beside --before")
    if shuffles < 200:
        raise ParameterError(f"{shuffles} shuffles are too few", remedy="take at least 200")
    if draws < 199:
        raise ParameterError(f"{draws} draws are too few", remedy="take at least 199")
    origins = {
        name: str(value) if isinstance(value, (str, Path)) else None
        for name, value in {
            "outcomes": outcome,
            "density": density,
            "covariates": covariates,
            "contrast": contrast,
            "reference": reference,
            "before": before,
            "density_before": density_before,
            "support": support,
            "queries": queries,
        }.items()
    } | dict(files or {})
    asked = [bandwidth] if isinstance(bandwidth, (int, float, str)) else bandwidth
    scores = _scores(outcome, outcome_name, origins["outcomes"])
    predictors = _join.read_predictors(density, predictor, asked, id)
    plain_predictors, paired = None, None
    if before is not None:
        paired = scores["kind"][0].as_py() == "binary"
        earlier = _scores(before, outcome_name, origins["before"])
        scores = _paired.differences(scores, earlier, dose, origins["before"])
        if density_before is not None:
            under = _join.read_predictors(density_before, predictor, None, id)
            predictors = _join.less_reference(predictors, under, _paired.CHANGE)
    if reference is not None:
        under = _join.read_predictors(reference, predictor, None, id)
        plain_predictors = predictors
        predictors = _join.less_reference(predictors, under, f"{predictor}_less_reference")
    described = None if covariates is None else tables.as_frame(covariates)
    joined = _join.join(scores, predictors, described, files=origins)
    held = () if paired is None else _paired.held(joined.frame, dose is not None)
    sample = Sample.of(joined, predictors, described, scores, cluster, within, controls, floor, origins, held)
    graph = None
    if adjust is not None:
        graph = _adjustment.read_graph(adjust, predictor, sample.outcome)
    if queries is not None:
        sample.place(queries, seed, origins)
    other = None if contrast is None else _scores(contrast, None, origins["contrast"])
    options = Options(
        shuffles,
        draws,
        tuple(models),
        seed,
        other,
        plain_predictors,
        None if support is None else _join.read_predictors(support, "log_density", None, id),
        corpus,
        graph,
        controls,
        None if random_controls is None else tables.as_frame(random_controls),
        paired,
    )
    study = analyse(sample, predictors, options, origins)
    study.run["created"] = datetime.now(UTC).isoformat(timespec="seconds")
    study.run["versions"] = _versions()
    study.run["seconds"] = round(time.monotonic() - started, 3)
    return study


def analyse(
    sample: Sample, predictors: _join.Predictors, options: Options, files: Mapping[str, str | None]
) -> Study:
    """Takes all steps; see `regress` for what they are and what is raised."""
    adjusted = _adjust(sample, options)
    work = Work(sample, predictors, options)
    independent_controls(sample, work.is_within)
    inference, bandwidths = _models.specifications(work)
    headline, s = work.fits["headline"], sample.specifications[0]
    rows = work.rows(work.is_within)
    clusters = sample.codes(rows)
    ladder, ladder_facts = _models.ladder(work)
    facts: dict[str, Any] = {}
    if adjusted is not None:
        facts["adjustment"] = adjusted
    work.tables["specifications"], facts["multiplicity"] = _evidence.specifications(
        sample,
        predictors,
        [b["ess_median"] for b in bandwidths],
        work.is_within,
        min(options.draws, _many.DRAWS),
        options.seed,
    )
    facts["by_controls"] = _evidence.by_controls(sample, work.tables["specifications"], work.is_within)
    facts |= _robust.negative_controls(work)
    named = sample.cluster_source == "column"
    labels = sample.within if sample.within is not None else drawable(sample.cluster) if named else None
    facts |= _robust.by_group(work, labels)
    facts |= _robust.measured(work, clusters)
    facts |= _comparisons.parts_of_corpus(work, clusters)
    extra, supported = _robust.supported(work)
    facts |= supported
    facts["diagnostics"], more = _robust.diagnosed(work)
    extra |= more
    facts |= _robust.curvature(work)
    results = {name: fitted.results for name, fitted in work.fits.items()}
    results |= _models.alternatives(work)
    facts |= _comparisons.contrasts(work, clusters, files)
    facts |= _comparisons.before_and_after(work)
    facts |= _robust.autocorrelation(work)
    if "headline_hc" in work.fits:
        plain = work.fits["headline_hc"]
        facts["independent"] = plain[s.column].to_dict() | {"covariance": plain.covariance}
    facts["clusters"] = {
        "source": sample.cluster_source,
        "column": sample.cluster_name,
        "count": headline.clusters,
        "effective": inference.effective_clusters,
    }
    facts = _facts(work, inference, bandwidths, ladder_facts, clusters) | facts
    facts["not_computed"] = work.absent
    facts["explained_by"] = _words.explained(facts)
    facts["notices"] = sample.notices + _words.cautions(facts)
    facts["answer"] = _words.answer(facts, ladder)
    coefficients = pd.DataFrame(work.coefficients, columns=list(_regression.COEFFICIENTS))
    coefficients = coefficients.sort_values("primary", ascending=False, kind="stable", ignore_index=True)
    coefficients["clusters"] = coefficients["clusters"].astype("Int64")
    points = _evidence.points(sample, headline, rows, extra, labels)
    binned = _bins.bins(
        points["predictor"].to_numpy(),
        points["value"].to_numpy(),
        binary=sample.binary and sample.weights is None,
        groups=labels,
        clusters=sample.codes(work.everything),
    )
    run = {
        "command": "analyze",
        "created": "",
        "inputs": dict(files),
        "predictor": s.predictor,
        "controls": list(sample.controls.names),
        "cluster": sample.cluster_name,
        "within": None if sample.within is None else sample.within.name,
        "shuffles": options.shuffles,
        "draws": options.draws,
        "models": list(options.models),
        "seed": options.seed,
        "versions": {},
        "seconds": 0.0,
        "density": predictors.run,
    }
    kept = _extreme_neighbors(points, predictors.neighbors)
    return Study(results, coefficients, ladder, facts, points, binned, kept, run, work.tables)


def _adjust(sample: Sample, options: Options) -> dict[str, Any] | None:
    """What the declared graph says; controls that it forbids and nobody named are left out."""
    if options.graph is None:
        return None
    found = _adjustment.judge(options.graph, list(sample.controls.names), list(sample.frame.columns))
    kept = []
    for control, why in found["refused"].items():
        if options.wanted == "default":
            sample.controls.left_out[control] = f"by the declared graph {why}"
            for names in (sample.controls.names, sample.controls.base, sample.controls.lexical):
                if control in names:
                    names.remove(control)
            sample.notices.append(f"{_words.name(control)} is not held fixed: by the declared graph {why}.")
        else:
            kept.append(control)
            sample.notices.append(
                f"{_words.name(control)} is held fixed because it was named, but by the declared graph it is "
                f"{why}."
            )
    if found["missing"]:
        listed = _words.listed([_words.name(m) for m in found["missing"]])
        sample.notices.append(f"By the declared graph {listed} should be held fixed too.")
    elif found["sufficient"] is False:
        sample.notices.append("By the declared graph these controls do not close all back doors.")
    return found | {"kept_although": kept}


def _facts(
    work: Work,
    inference: Inference,
    bandwidths: list[dict[str, Any]],
    ladder_facts: dict[str, Any],
    clusters: np.ndarray | None,
) -> dict[str, Any]:
    sample, s = work.sample, work.sample.specifications[0]
    headline, judged = work.fits["headline"], inference.estimate
    scales = {(s.predictor if c == s.column else c): scale for c, scale in sample.scales.items()}
    marginal: dict[str, Any] = {"average_marginal_effect": None}
    if sample.binary:
        marginal = _evidence.marginal_effect(headline.slope, headline.x, clusters)
    return {
        "outcome": sample.outcome,
        "kind": "binary" if sample.binary else "continuous",
        "outcome_mean": float(sample.raw["value"].mean()),
        "outcome_sd": float(sample.raw["value"].std(ddof=1)),
        "primary": {
            "model": "headline",
            "form": "within" if work.is_within else "pooled",
            "family": "logit" if sample.binary else "least squares",
            "unit": "log odds per SD" if sample.binary else "outcome units per SD",
            "predictor": s.predictor,
            "kernel": s.kernel,
            "bandwidth": s.bandwidth,
            "rule": s.rule,
            "controls": list(sample.controls.names),
            "covariance": headline.covariance,
            "clusters": headline.clusters,
            "effective_clusters": inference.effective_clusters,
            "inference": inference.label,
            "df": judged.df,
            "n": headline.n,
            "weighted": sample.weights is not None,
            "sd": sample.scales[s.column]["sd"],
            **judged.to_dict(),
            "odds_ratio": math.exp(min(judged.estimate, 700.0)) if sample.binary else None,
            **marginal,
            "r_squared": headline.r_squared,
            "tjur_r_squared": _evidence.tjur(headline.slope) if sample.binary else None,
            "smallest_detectable_effect": judged.smallest_detectable,
            "equivalence_bound": judged.equivalence_bound,
        },
        "inference": inference.to_dict(),
        "bandwidths": bandwidths,
        "ladder": ladder_facts,
        "scales": scales,
        "controls_missing": sample.controls.missing,
        "controls_left_out": sample.controls.left_out,
        "counts": sample.counts,
        "unmatched": sample.unmatched,
    }


def drawable(cluster: pd.Series[Any] | None) -> pd.Series[Any] | None:
    """Clusters that are worth a picture each: not those of one or two rows."""
    return None if cluster is None or cluster.value_counts().median() < LEAST_IN_GROUP else cluster


def _extreme_neighbors(points: pd.DataFrame, neighbors: pd.DataFrame | None) -> pd.DataFrame | None:
    if neighbors is None:
        return None
    order = points.sort_values("predictor", kind="stable")["id"]
    wanted = set(order.head(EXTREMES)) | set(order.tail(EXTREMES))
    return neighbors[neighbors["id"].astype(str).isin(wanted)].reset_index(drop=True)


def _scores(outcome: Any, name: str | None, file: str | None) -> pa.Table:
    if not isinstance(outcome, pa.Table) or outcome.column_names[:2] != _outcomes.OUTCOME_SCHEMA.names[:2]:
        outcome = _outcomes.read_outcomes(outcome)
    return _outcomes.choose_outcome(outcome, name, file)


def _versions() -> dict[str, str]:
    names = ("lmd3", "numpy", "pandas", "pyarrow", "scipy", "statsmodels")
    return {name: metadata.version(name) for name in names}
