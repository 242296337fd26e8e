"""The state of one study: its rows, what was asked, the models fitted and the tables made so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from lmd3.analysis import adjustment as _adjustment
from lmd3.analysis import join as _join
from lmd3.analysis import ladder as _ladder
from lmd3.analysis import regression as _regression
from lmd3.analysis.inference import Inference
from lmd3.analysis.sample import Sample, usable

#: A group must have this many rows for the fit with group effects to be the primary one.
LEAST_IN_GROUP = 10


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


class Work:
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

    def shuffled_within(self) -> np.ndarray | None:
        """Codes inside which rows are shuffled: groups, or named clusters of five rows and more."""
        sample, at = self.sample, self.rows(self.is_within)
        if sample.within is not None:
            return sample.effects(at)
        return _ladder.shuffle_groups(sample.codes(at)) if sample.cluster_source == "column" else None

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
