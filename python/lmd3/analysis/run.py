"""The steps of a study, from the complete rows to its tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from lmd3 import tables
from lmd3.analysis import adjustment as _adjustment
from lmd3.analysis import alternatives as _alternatives
from lmd3.analysis import bins as _bins
from lmd3.analysis import contrast as _contrast
from lmd3.analysis import controls as _controls
from lmd3.analysis import diagnostics as _diagnostics
from lmd3.analysis import evidence as _evidence
from lmd3.analysis import groups as _groups
from lmd3.analysis import join as _join
from lmd3.analysis import ladder as _ladder
from lmd3.analysis import measurement as _measurement
from lmd3.analysis import multiplicity as _many
from lmd3.analysis import neighborhoods as _near
from lmd3.analysis import paired as _paired
from lmd3.analysis import regression as _regression
from lmd3.analysis import subsets as _subsets
from lmd3.analysis import support as _support
from lmd3.analysis import words as _words
from lmd3.analysis.inference import Inference, judge
from lmd3.analysis.sample import Sample, independent_controls, usable
from lmd3.analysis.slope import Data, slope
from lmd3.analysis.study import Study
from lmd3.errors import Lmd3Error, ParameterError, WorkError

#: A group must have this many rows for the fit with group effects to be the primary one.
LEAST_IN_GROUP = 10
#: Queries whose neighbours are kept for the report, at each end of the predictor.
EXTREMES = 10
#: Rows that the spline and SIMEX with many draws are fitted on at most.
_MANY = 20_000


@dataclass(frozen=True)
class Options:
    """What `regress` was asked for beside the rows."""

    shuffles: int
    draws: int
    models: tuple[str, ...]
    seed: int
    contrast: pa.Table | None = None
    plain: _join.Predictors | None = None
    support: _join.Predictors | None = None
    corpus: Any = None
    graph: _adjustment.Graph | None = None
    wanted: str | Sequence[str] = "default"
    random: pd.DataFrame | None = None
    #: Of a study of changes: whether both outcomes are 0 or 1.
    paired: bool | None = None


class _Work:
    """The state of one study: forms, fits, tables so far."""

    def __init__(self, sample: Sample, predictors: _join.Predictors, options: Options) -> None:
        self.sample, self.predictors, self.options = sample, predictors, options
        self.everything = np.ones(len(sample.frame), dtype=bool)
        self.rows_within, self.is_within = self.everything, False
        if sample.within is not None:
            self.rows_within = usable(sample)
            smallest = int(sample.within.value_counts().min())
            self.is_within = smallest >= LEAST_IN_GROUP
            sample.counts["groups"] = int(sample.within.nunique())
            sample.counts["smallest_group"] = smallest
            sample.counts["rows_in_groups_without_variation"] = int((~self.rows_within).sum())
        self.fits: dict[str, _regression.Fit] = {}
        self.coefficients: list[dict[str, Any]] = []
        self.tables: dict[str, pd.DataFrame] = {}
        self.absent: dict[str, str] = {}
        self._bases: dict[tuple[tuple[str, ...], bool], float] = {}

    def rows(self, form: bool) -> np.ndarray:
        """The rows of the fits with group effects (True) or without."""
        return self.rows_within if form else self.everything

    def weights(self, form: bool) -> np.ndarray | None:
        """Weights of these rows."""
        return None if self.sample.weights is None else self.sample.weights[self.rows(form)]

    def fit(
        self,
        s: _join.Specification,
        terms: Sequence[str],
        form: bool,
        robust: bool = True,
        clustered: Any = True,
    ) -> _regression.Fit:
        """A model of the terms and the predictor; `clustered`: labels in place of the clusters, or None."""
        frame, clusters, groups = self.sample.part(self.rows(form))
        if clustered is not True:
            clusters = clustered
        return _regression.fit(
            frame,
            [*terms, s.column],
            binary=self.sample.binary,
            clusters=clusters,
            effects=groups if form else None,
            robust=robust,
            weights=self.weights(form),
        )

    def gain(self, fitted: _regression.Fit, terms: Sequence[str], form: bool) -> float:
        """What the predictor adds to the R² of the terms, in sample."""
        key = (tuple(terms), form)
        if key not in self._bases:
            at = self.rows(form)
            frame = self.sample.frame[at]
            fitter = _ladder.fitter_of(
                frame["value"].to_numpy(dtype=np.float64),
                self.sample.effects(at) if form else None,
                self.sample.binary,
                self.weights(form),
            )
            self._bases[key] = fitter.r_squared(frame[list(terms)].to_numpy(dtype=np.float64))
        return fitted.r_squared - self._bases[key]

    def add(
        self,
        s: _join.Specification,
        model: str,
        fitted: _regression.Fit,
        primary: bool,
        inference: Inference | None = None,
    ) -> None:
        """Rows of the coefficients' table; the predictor's by its inference where one is given."""
        for term in [fitted.terms[-1], *fitted.terms[:-1], "const"]:
            if term not in fitted.results.model.exog_names:
                continue
            of = fitted[term]
            label = "normal" if of.df is None else f"t({of.df:g})"
            if inference is not None and term == s.column:
                of, label = inference.estimate, inference.label
            self.row(s, model, term, of, fitted.covariance, fitted.n, fitted.clusters, primary, label)

    def row(
        self,
        s: _join.Specification,
        model: str,
        term: str,
        of: _regression.Estimate,
        covariance: str,
        n: int,
        clusters: int | None,
        primary: bool,
        label: str,
    ) -> None:
        """One row of the coefficients' table."""
        self.coefficients.append(
            {
                "model": model,
                "outcome": self.sample.outcome,
                "kernel": s.kernel,
                "bandwidth": s.bandwidth,
                "rule": s.rule,
                "term": s.predictor if term == s.column else term,
                **of.to_dict(),
                "covariance": covariance,
                "n": n,
                "clusters": clusters,
                "primary": primary,
                "inference": label,
                "df": of.df,
            }
        )


def analyse(
    sample: Sample, predictors: _join.Predictors, options: Options, files: Mapping[str, str | None]
) -> Study:
    """Takes all steps; see `regress` for what they are and what is raised."""
    adjusted = _adjust(sample, options)
    work = _Work(sample, predictors, options)
    independent_controls(sample, work.is_within)
    inference, bandwidths = _models(work)
    headline, s = work.fits["headline"], sample.specifications[0]
    rows = work.rows(work.is_within)
    clusters = sample.codes(rows)
    ladder, ladder_facts = _climb(work)
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
    groups = _shuffled_within(work)
    work.tables["shuffles"], shuffled = _evidence.shuffled_slopes(
        headline.slope, headline.x, groups, options.shuffles, options.seed
    )
    facts["negative_controls"] = {"shuffle": shuffled}
    _random_slopes(work, facts["negative_controls"])
    named = sample.cluster_source == "column"
    labels = sample.within if sample.within is not None else drawable(sample.cluster) if named else None
    facts |= _by_group(work, labels)
    facts |= _measured(work, clusters)
    facts |= _parts_of_corpus(work, clusters)
    extra, supported = _supported(work)
    facts |= supported
    facts["diagnostics"], more = _diagnosed(work)
    extra |= more
    work.tables["checks"] = _evidence.checks(headline.slope)
    try:
        frame, _, _ = sample.part(rows)
        curve, facts["curvature"] = _alternatives.smooth(
            frame, headline.terms, binary=sample.binary, most=_MANY, seed=options.seed
        )
        work.tables["checks"] = pd.concat([work.tables["checks"], curve], ignore_index=True)
    except Exception as error:  # statsmodels raises many kinds where a basis is singular
        work.absent["smooth"] = f"the spline could not be fitted: {error}"
    results = {name: fitted.results for name, fitted in work.fits.items()}
    results |= _other_models(work, labels)
    facts |= _contrasted(work, clusters, files)
    facts |= _pairs(work)
    if sample.vectors is not None:
        vectors = sample.vectors[rows]
        weights = np.sqrt(headline.slope.weights)
        moran = _near.moran(vectors, headline.slope.rest * weights, options.seed)
        facts["moran"] = None if moran is None else asdict(moran)
    else:
        work.absent["moran"] = "the queries' vectors are not known"
    if "headline_hc" in work.fits:
        plain = work.fits["headline_hc"]
        facts["independent"] = plain[s.column].to_dict() | {"covariance": plain.covariance}
    facts["clusters"] = {
        "source": sample.cluster_source,
        "column": sample.cluster_name,
        "count": headline.clusters,
        "effective": inference.effective_clusters,
    }
    ladder["terms"] = [
        _terms_in_words(t, s, sample.within if work.is_within else None) for t in ladder["terms"]
    ]
    facts = _facts(work, inference, bandwidths, ladder, ladder_facts, clusters) | facts
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


def _models(work: _Work) -> tuple[Inference, list[dict[str, Any]]]:
    """All fits of all specifications, judged; the facts of each bandwidth."""
    sample, options = work.sample, work.options
    names, is_within = sample.controls.names, work.is_within
    bandwidths: list[dict[str, Any]] = []
    judged: Inference | None = None
    for number, s in enumerate(sample.specifications):
        models: dict[str, tuple[list[str], bool, bool]] = {"headline": (names, is_within, True)}
        if sample.within is not None:
            models["headline_pooled" if is_within else "headline_within"] = (names, not is_within, True)
        if number == 0:
            models["naive"] = (names, is_within, False)
        if names:
            models["alone"] = ([], is_within, True)
        if _controls.TYPICALITY in sample.beside:
            if _controls.TYPICALITY in names:
                others = [c for c in names if c != _controls.TYPICALITY]
                models["without_typicality"] = (others, is_within, True)
            else:
                models["with_typicality"] = ([*names, _controls.TYPICALITY], is_within, True)
        if _controls.MAX_COSINE in sample.beside and _controls.MAX_COSINE not in names:
            models["with_max_cosine"] = ([*names, _controls.MAX_COSINE], is_within, True)
        slopes: dict[str, Any] = {}
        for model, (terms, form, robust) in models.items():
            try:
                fitted = work.fit(s, terms, form, robust)
                clusters = sample.codes(work.rows(form)) if robust else None
                # Intervals by inversion for the one that is reported first; a few hundred refits of a logit.
                full = number == 0 and model in ("headline", "headline_pooled", "headline_within")
                inference = judge(fitted, s.column, clusters, options.draws, options.seed, intervals=full)
            except (WorkError, ParameterError) as error:
                if number == 0 and model == "headline":
                    raise
                sample.notices.append(f"Model {model} ({s.setting or s.predictor}) is missing: {error}.")
                continue
            slopes[model] = inference.estimate.to_dict() | {
                "r_squared_gain": work.gain(fitted, terms, form),
                "inference": inference.label,
            }
            key = model if number == 0 else f"{model}@{s.kernel}:{s.bandwidth!r}"
            work.fits[key] = fitted
            first = number == 0 and model == "headline"
            work.add(s, model, fitted, first, inference)
            if first:
                judged = inference
                _beside(work, s, fitted, inference)
        correlations = {
            c: float(np.corrcoef(sample.frame[s.column], sample.frame[c])[0, 1]) for c in sample.beside
        }
        ess = work.predictors.ess[number]
        bandwidths.append(
            {
                "kernel": s.kernel,
                "bandwidth": s.bandwidth,
                "rule": s.rule,
                "primary": number == 0,
                "ess_median": None if ess is None else float(ess.reindex(sample.raw["id"]).median()),
                "sd": sample.scales[s.column]["sd"],
                "correlation": correlations,
                "slopes": slopes,
            }
        )
    assert judged is not None
    return judged, bandwidths


def _beside(work: _Work, s: _join.Specification, fitted: _regression.Fit, inference: Inference) -> None:
    """The headline slope by other rules: the sandwich and CR2 where a bootstrap decides, HC3, by groups."""
    sample = work.sample
    column, n, count = s.column, fitted.n, fitted.clusters
    if inference.few:
        plain = inference.sandwich
        label = "normal" if plain.df is None else f"t({plain.df:g})"
        work.row(s, "headline_sandwich", column, plain, fitted.covariance, n, count, False, label)
        if inference.cr2 is not None:
            name = "headline_cr2_linear" if sample.binary else "headline_cr2"
            label = f"t({inference.cr2.df:.1f}), Satterthwaite"
            work.row(s, name, column, inference.cr2, f"CR2:{sample.cluster_name}", n, count, False, label)
        if inference.linear is not None:
            label = "wild cluster restricted bootstrap of the linear-probability model"
            work.row(
                s, "headline_linear", column, inference.linear, fitted.covariance, n, count, False, label
            )
    if sample.cluster_source in ("kmeans", "text"):
        plain_fit = work.fit(s, sample.controls.names, work.is_within, True, None)
        work.fits["headline_hc"] = plain_fit
        work.add(s, "headline_hc", plain_fit, False)
    if sample.within is not None and sample.cluster is None and work.is_within:
        labels = sample.within[work.rows(True)]
        try:
            by_group = work.fit(s, sample.controls.names, True, True, labels)
            codes = np.asarray(pd.factorize(labels)[0], dtype=np.int64)
            found = judge(by_group, column, codes, work.options.draws, work.options.seed, intervals=True)
        except (WorkError, ParameterError):
            return
        work.fits["headline_clustered"] = by_group
        work.add(s, "headline_clustered", by_group, False, found)
        if (found.estimate.p_value < 0.05) != (inference.estimate.p_value < 0.05):
            sample.notices.append(
                f"The errors take rows of one {sample.within.name} as independent once its effect is out. "
                f"Clustered by {sample.within.name}, for other groups than these, the slope has "
                f"{_words.p_value(found.estimate.p_value)} ({found.label}): name it (--cluster) if the claim "
                "is about groups not in the data."
            )


def _shuffled_within(work: _Work) -> np.ndarray | None:
    """Codes inside which rows are shuffled: groups, or named clusters of five rows and more."""
    sample, at = work.sample, work.rows(work.is_within)
    if sample.within is not None:
        return sample.effects(at)
    return _ladder.shuffle_groups(sample.codes(at)) if sample.cluster_source == "column" else None


def _climb(work: _Work) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The ladder and Shapley's split."""
    sample, s = work.sample, work.sample.specifications[0]
    at = work.rows(work.is_within)
    frame = sample.frame[at].reset_index(drop=True)
    effects = sample.effects(at) if work.is_within else None
    weights = work.weights(work.is_within)
    table, facts = _ladder.ladder(
        frame,
        _ladder.steps(sample.controls, sample.beside, s.predictor, s.column),
        binary=sample.binary,
        effects=effects,
        clusters=sample.codes(at),
        groups=_shuffled_within(work),
        weights=weights,
        shuffles=work.options.shuffles,
        seed=work.options.seed,
    )
    of = sample.controls
    blocks: list[tuple[str, Sequence[str]]] = [
        ("base", of.base),
        ("lexical", of.lexical),
        ("typicality", [_controls.TYPICALITY] if _controls.TYPICALITY in sample.beside else []),
        ("max cosine", [_controls.MAX_COSINE] if _controls.MAX_COSINE in sample.beside else []),
        (_words.name(s.predictor), [s.column]),
    ]
    blocks = [(name, terms) for name, terms in blocks if terms]
    split = _ladder.shapley(frame, blocks, binary=sample.binary, effects=effects, weights=weights)
    split["terms"] = [_terms_in_words(t, s, None) for t in split["terms"]]
    work.tables["shapley"] = split
    return table, facts


def _random_slopes(work: _Work, facts: dict[str, Any]) -> None:
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


def _by_group(work: _Work, labels: pd.Series[Any] | None) -> dict[str, Any]:
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


def _measured(work: _Work, clusters: np.ndarray | None) -> dict[str, Any]:
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


def _parts_of_corpus(work: _Work, clusters: np.ndarray | None) -> dict[str, Any]:
    """Densities per group of the corpus."""
    sample, s = work.sample, work.sample.specifications[0]
    density = work.predictors.density
    if density is None or s.kernel is None or s.bandwidth is None:
        work.absent["subsets"] = "no densities per group of the corpus (lmd3 density --by-group)"
        return {}
    ids = list(sample.raw["id"])
    sums = _subsets.sums_of(density, ids, s.kernel, s.bandwidth)
    if sums is None:
        work.absent["subsets"] = "the corpus has one group only"
        return {}
    work.tables["subset_changes"] = _subsets.changes(sums, ids)
    headline = work.fits["headline"]
    at = work.rows(work.is_within)
    part = _subsets.Sums(sums.names, sums.log_sums[at], sums.rows)
    table, facts = _subsets.evidence(
        headline.slope.data,
        headline.x[:, :-1],
        part,
        clusters,
        draws=min(work.options.draws, _subsets.DRAWS),
        seed=work.options.seed,
    )
    work.tables["subsets"] = table
    top = table.iloc[0] if len(table) else None
    if top is not None and top["r_squared_gain"] == top["r_squared_gain"]:
        facts["first"] = {
            "subset": top["subset"],
            "estimate": float(top["change_estimate"]),
            "p_by": float(top["change_p_by"]),
        }
    facts["below_05_by"] = int((table["change_p_by"] < 0.05).sum())
    return {"subsets": facts}


def _supported(work: _Work) -> tuple[dict[str, Any], dict[str, Any]]:
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


def _diagnosed(work: _Work) -> tuple[dict[str, Any], dict[str, Any]]:
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


def _other_models(work: _Work, labels: pd.Series[Any] | None) -> dict[str, Any]:
    """The alternatives asked for: rows of the coefficients' table, and their statsmodels results."""
    sample, s = work.sample, work.sample.specifications[0]
    frame, clusters, _ = sample.part(work.everything)
    groups = sample.within if sample.within is not None else sample.cluster
    results: dict[str, Any] = {}
    for asked in work.options.models:
        try:
            found = _alternatives.alternative(
                asked,
                frame,
                [*sample.controls.names, s.column],
                binary=sample.binary,
                groups=groups,
                clusters=clusters,
            )
        except Lmd3Error:
            raise
        except Exception as error:  # statsmodels raises many kinds where a fit fails
            sample.notices.append(f"Model {asked} is missing: {error}.")
            continue
        for model, fitted in found.items():
            results[model] = fitted
            for of in _alternatives.estimates(fitted, s.column):
                name, label, estimate = of
                work.row(s, model, name, estimate, label, len(frame), None, False, "normal")
    return results


def _contrasted(work: _Work, clusters: np.ndarray | None, files: Mapping[str, str | None]) -> dict[str, Any]:
    """Contrasts with another model's outcomes, and with density under a reference corpus."""
    sample, options = work.sample, work.options
    headline = work.fits["headline"]
    found: list[pd.DataFrame] = []
    form = "within" if work.is_within else "pooled"
    if options.contrast is not None:
        other = options.contrast.to_pandas().set_index("id")["value"].reindex(sample.raw["id"])
        at = work.rows(work.is_within) & np.isfinite(other.to_numpy(dtype=np.float64))
        if at.sum() < len(headline.x[0]) + 10:
            raise ParameterError(
                "too few queries have both outcomes", remedy="give outcomes on the same queries"
            )
        name = str(options.contrast["outcome"][0].as_py())
        names = (sample.outcome, name)
        if name == sample.outcome:
            stems = [Path(files.get(side) or side).stem for side in ("outcomes", "contrast")]
            names = (stems[0], stems[1]) if stems[0] != stems[1] else (name, f"{name} (other)")
        kept = at[work.rows(work.is_within)]
        x = headline.x[kept]
        first = headline.slope.data.take(kept)
        second = Data(other.to_numpy(dtype=np.float64)[at], sample.binary, first.weights, first.effects)
        codes = None if clusters is None else np.unique(clusters[kept], return_inverse=True)[1]
        if sample.cluster_source in ("kmeans", "text", "none"):
            codes = None
        found.append(
            _contrast.models(
                first,
                second,
                x,
                codes,
                names,
                sample.cluster_name if codes is not None else None,
                form,
                options.draws,
                options.seed,
            )
        )
        sample.counts["contrasted"] = int(at.sum())
    if options.plain is not None:
        plain = options.plain.frame.set_index("id")[options.plain.specifications[0].column]
        values = plain.reindex(sample.raw["id"]).to_numpy(dtype=np.float64)
        at = work.rows(work.is_within)
        x = headline.x.copy()
        x[:, -1] = (values[at] - values.mean()) / values.std(ddof=1)
        sides = {
            "density less reference": (headline.slope, headline.x),
            "density alone": (slope(headline.slope.data, x), x),
        }
        for side, (of, design) in sides.items():
            row = {
                "contrast": "corpus",
                "side": side,
                "form": form,
                "scale": "log odds" if sample.binary else "outcome",
                **_evidence.judged(of, design, clusters, options.draws, options.seed),
                "covariance": headline.covariance,
                "n": headline.n,
                "clusters": headline.clusters,
            }
            found.append(pd.DataFrame([row]))
        if not work.is_within:
            sample.notices.append(
                "A contrast with a reference corpus without group effects can turn its sign: name the groups "
                "(--within)."
            )
    if found:
        table = pd.concat(found, ignore_index=True)
        work.tables["contrasts"] = table
        differences = table[table["side"].str.contains(" − ")]
        judged = differences[differences["side"].str.contains("bootstrap")]
        chosen = judged if len(judged) else differences
        return {"contrast": chosen.iloc[0].to_dict()} if len(chosen) else {}
    work.absent["contrasts"] = "no other model (--contrast) and no reference corpus (--reference) given"
    return {}


def _pairs(work: _Work) -> dict[str, Any]:
    """Tests of a study of changes: mean change, McNemar, randomisation, mediation."""
    sample, options = work.sample, work.options
    if options.paired is None or sample.joined is None:
        work.absent["paired"] = "no outcomes before an intervention (--before)"
        return {}
    frame = sample.joined
    raw = frame[["value", _paired.BEFORE, _paired.AFTER]].astype(np.float64)
    dose = change = None
    if _paired.LOG_DOSE in frame.columns:
        dose = frame[_paired.LOG_DOSE].to_numpy(dtype=np.float64)
    s = sample.specifications[0]
    if s.predictor == _paired.CHANGE:
        change = sample.raw[s.column].to_numpy(dtype=np.float64)
    else:
        sample.notices.append(
            "The densities before the intervention are not given (--density-before): the predictor is the "
            "log density after it, not its change."
        )
    held = [c for c in sample.controls.names if c != _paired.LOG_DOSE]
    whole = np.isin(raw[[_paired.BEFORE, _paired.AFTER]].to_numpy(), (0.0, 1.0)).all()
    table, facts = _paired.tests(
        raw,
        bool(options.paired and whole),
        dose,
        change,
        sample.frame[held].to_numpy(dtype=np.float64),
        sample.codes(work.everything),
        sample.effects(work.everything),
        options.draws,
        options.seed,
    )
    work.tables["paired"] = table
    return {"paired": facts}


def _terms_in_words(terms: str, s: _join.Specification, groups: pd.Series[Any] | None) -> str:
    shown = [s.predictor if t == s.column else t for t in terms.split(", ") if t]
    return ", ".join([*shown, *([] if groups is None else [f"effects of {groups.name}"])])


def _facts(
    work: _Work,
    inference: Inference,
    bandwidths: list[dict[str, Any]],
    ladder: pd.DataFrame,
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
