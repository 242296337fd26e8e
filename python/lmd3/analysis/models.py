"""The models of a study: the headline and its variants at every bandwidth, the ladder, the alternatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from lmd3.analysis import alternatives as _alternatives
from lmd3.analysis import controls as _controls
from lmd3.analysis import join as _join
from lmd3.analysis import ladder as _ladder
from lmd3.analysis import regression as _regression
from lmd3.analysis import words as _words
from lmd3.analysis.inference import Inference, judge
from lmd3.analysis.work import Work
from lmd3.errors import Lmd3Error, ParameterError, WorkError


def specifications(work: Work) -> tuple[Inference, list[dict[str, Any]]]:
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


def _beside(work: Work, s: _join.Specification, fitted: _regression.Fit, inference: Inference) -> None:
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


def ladder(work: Work) -> tuple[pd.DataFrame, dict[str, Any]]:
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
        groups=work.shuffled_within(),
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
    within = sample.within if work.is_within else None
    table["terms"] = [_terms_in_words(t, s, within) for t in table["terms"]]
    work.tables["shapley"] = split
    return table, facts


def _terms_in_words(terms: str, s: _join.Specification, groups: pd.Series[Any] | None) -> str:
    shown = [s.predictor if t == s.column else t for t in terms.split(", ") if t]
    return ", ".join([*shown, *([] if groups is None else [f"effects of {groups.name}"])])


def alternatives(work: Work) -> dict[str, Any]:
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
