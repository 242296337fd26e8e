"""The steps of a study, from the complete rows to its tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from lmd3.analysis import adjustment as _adjustment
from lmd3.analysis import bins as _bins
from lmd3.analysis import comparisons as _comparisons
from lmd3.analysis import evidence as _evidence
from lmd3.analysis import join as _join
from lmd3.analysis import models as _models
from lmd3.analysis import multiplicity as _many
from lmd3.analysis import regression as _regression
from lmd3.analysis import robustness as _robust
from lmd3.analysis import words as _words
from lmd3.analysis.inference import Inference
from lmd3.analysis.sample import Sample, independent_controls
from lmd3.analysis.study import Study
from lmd3.analysis.work import LEAST_IN_GROUP, Options, Work

#: Queries whose neighbours are kept for the report, at each end of the predictor.
EXTREMES = 10


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
