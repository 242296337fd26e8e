"""One study: outcome against density, from the tables to coefficients, ladder and an answer in words."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lmd3 import outcomes as _outcomes
from lmd3 import tables
from lmd3.analysis import bins as _bins
from lmd3.analysis import controls as _controls
from lmd3.analysis import join as _join
from lmd3.analysis import regression as _regression
from lmd3.analysis import words as _words
from lmd3.errors import NotFiniteError, OutputError, ParameterError, WorkError

#: Files of a saved study; the first four are those scripts may rely on.
FILES = (
    "coefficients.parquet",
    "ladder.parquet",
    "summary.json",
    "run.json",
    "points.parquet",
    "bins.parquet",
    "neighbors.parquet",
)
#: A group must have this many rows for the fit with group effects to be the primary one.
LEAST_IN_GROUP = 10
#: Queries whose neighbours are kept for the report, at each end of the predictor.
EXTREMES = 10


@dataclass(frozen=True)
class Study:
    """The result of `regress`.

    Attributes:
        results: statsmodels results by model: `headline`, beside it `headline_pooled` or `headline_within`,
            `naive`, `alone`, `without_typicality`, `with_typicality`, `with_max_cosine`, all of the primary
            specification, and `headline@KERNEL:BANDWIDTH` for the others.
        coefficients: as in `coefficients.parquet`, the headline rows first.
        ladder: as in `ladder.parquet`.
        facts: as in `summary.json`.
        points: one row per query: id, value, predictor, typicality, max_cosine, group, fitted, residual.
        bins: mean outcome in bins of the predictor.
        neighbors: nearest training rows of the densest and the sparsest queries, or None.
        run: settings, versions and provenance, as in `run.json`.
    """

    results: dict[str, Any]
    coefficients: pd.DataFrame
    ladder: pd.DataFrame
    facts: dict[str, Any]
    points: pd.DataFrame
    bins: pd.DataFrame
    neighbors: pd.DataFrame | None
    run: dict[str, Any]

    def summary(self) -> str:
        """The answer in three sentences, then the numbers behind it and what was left out, as plain text."""
        return _words.page(self.facts, self.coefficients, self.ladder)

    def save(self, folder: str | Path) -> Path:
        """Writes the tables into a folder, each file whole or not at all, `summary.json` last.

        Raises:
            OutputError: the folder can't be written.
        """
        folder = Path(folder)
        written: dict[str, pd.DataFrame | None] = {
            "coefficients.parquet": self.coefficients,
            "ladder.parquet": self.ladder,
            "points.parquet": self.points,
            "bins.parquet": self.bins,
            "neighbors.parquet": self.neighbors,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # A summary beside tables of another study would be worse than none.
            (folder / "summary.json").unlink(missing_ok=True)
            for name, frame in written.items():
                if frame is None:
                    (folder / name).unlink(missing_ok=True)
                    continue
                table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
                temporary = folder / f".{name}.partial"
                pq.write_table(table, temporary)
                temporary.replace(folder / name)
            for name, facts in (("run.json", self.run), ("summary.json", self.facts)):
                temporary = folder / f".{name}.partial"
                temporary.write_text(
                    json.dumps(plain(facts), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
                    encoding="utf-8",
                )
                temporary.replace(folder / name)
        except OSError as error:
            raise OutputError(
                f"can't be written: {(error.strerror or str(error)).lower()}", file=str(folder)
            ) from None
        return folder


def plain(value: Any) -> Any:
    """A value in JSON's own types; numbers that JSON lacks become null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


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
    shuffles: int = _controls.SHUFFLES,
    seed: int = 0,
    id: str | None = None,
    files: Mapping[str, str] | None = None,
) -> Study:
    """Relates an outcome to the density of its queries.

    The predictor and every control enter per standard deviation (over the rows of the study). Continuous
    outcomes are fitted by least squares, binary ones by a logit.

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
        shuffles: draws of the shuffle null, at least 200.
        seed: of shuffles and folds.
        id: id column of a plain predictor table.
        files: names for messages and `run.json` (`outcomes`, `density`, `covariates`) of tables given as
            objects.

    Raises:
        JoinError: no id joins.
        ColumnError: a column named does not exist or is not numeric.
        NotFiniteError: a log density of −inf or NaN, and no floor.
        ParameterError: an option out of range; an outcome or predictor without variation; too few rows.
        WorkError: the headline logit does not converge.
    """
    started = time.monotonic()
    if shuffles < 200:
        raise ParameterError(f"{shuffles} shuffles are too few", remedy="take at least 200")
    origins = {
        name: str(value) if isinstance(value, (str, Path)) else None
        for name, value in {"outcomes": outcome, "density": density, "covariates": covariates}.items()
    } | dict(files or {})
    asked = [bandwidth] if isinstance(bandwidth, (int, float, str)) else bandwidth
    scores = outcome
    if not isinstance(scores, pa.Table) or scores.column_names[:2] != _outcomes.OUTCOME_SCHEMA.names[:2]:
        scores = _outcomes.read_outcomes(scores)
    scores = _outcomes.choose_outcome(scores, outcome_name, origins["outcomes"])
    predictors = _join.read_predictors(density, predictor, asked, id)
    described = None if covariates is None else tables.as_frame(covariates)
    joined = _join.join(scores, predictors, described, files=origins)
    sample = _Sample.of(joined, predictors, described, scores, cluster, within, controls, floor, origins)
    return _run(sample, predictors, shuffles, seed, started, origins)


@dataclass
class _Sample:
    """The rows and columns of a study, complete and standardised."""

    frame: pd.DataFrame
    specifications: list[_join.Specification]
    controls: _controls.Controls
    outcome: str
    binary: bool
    cluster: pd.Series[Any] | None
    cluster_name: str | None
    within: pd.Series[Any] | None
    scales: dict[str, dict[str, float]]
    counts: dict[str, Any]
    unmatched: dict[str, list[str]]
    notices: list[str]
    raw: pd.DataFrame

    @classmethod
    def of(
        cls,
        joined: _join.Joined,
        predictors: _join.Predictors,
        described: pd.DataFrame | None,
        scores: pa.Table,
        cluster: str | None,
        within: str | None,
        wanted: str | Sequence[str],
        floor: float | None,
        files: Mapping[str, str | None],
    ) -> _Sample:
        frame, counts = joined.frame, joined.counts
        specifications = predictors.specifications
        name = specifications[0].predictor
        chosen = _controls.choose(
            wanted, frame, [] if described is None else list(map(str, described.columns)), name
        )
        beside = [c for c in (_controls.TYPICALITY, _controls.MAX_COSINE) if c in frame.columns and c != name]
        columns = list(dict.fromkeys([*chosen.names, *beside]))
        values = {c: tables.numbers(frame[c], c, files["density"]) for c in columns}
        # A column that nobody asked for and that is empty must not cost rows.
        for c in [c for c in beside if c not in chosen.names and not np.isfinite(values[c]).any()]:
            del values[c]
        complete = np.ones(len(frame), dtype=bool)
        counts["missing_controls"] = {}
        for c, x in values.items():
            bad = ~np.isfinite(x)
            if bad.any():
                counts["missing_controls"][c] = int((bad & complete).sum())
                complete &= ~bad
        labelled = {}
        for role, asked in (("cluster", cluster), ("within", within)):
            if asked is not None:
                labelled[role] = _join.labels(frame, asked, files["outcomes"])
                bad = labelled[role].isna().to_numpy()
                counts[f"without_{role}"] = int((bad & complete).sum())
                complete &= ~bad
        x_of = {}
        for s in specifications:
            x = tables.numbers(frame[s.column], s.column, files["density"])
            bad = ~np.isfinite(x) if floor is None else ~(x >= floor)
            if (bad & complete).any() and s.kernel is None and floor is None and not np.isinf(x).any():
                # A plain column may have gaps; a density has none, so there a gap is refused below.
                counts["missing_controls"][s.column] = int((bad & complete).sum())
                complete &= ~bad
            elif (bad & complete).any():
                if floor is None:
                    row = int(np.flatnonzero(bad & complete)[0])
                    raise NotFiniteError(
                        f"{int((bad & complete).sum())} queries have no finite {s.predictor} "
                        f"({s.setting or 'plain column'}), the first is {frame['id'].iloc[row]!r}",
                        file=files["density"],
                        remedy="take a wider bandwidth, or name a floor (--floor)",
                    )
                counts.setdefault("floored", {})[s.column] = int((bad & complete).sum())
                x = np.where(bad, floor, x)
            x_of[s.column] = x
        counts["analysed"] = int(complete.sum())
        if counts["analysed"] == 0:
            raise ParameterError("no query has an outcome and all controls", file=files["covariates"])
        raw = pd.DataFrame({"id": frame["id"], "value": frame["value"].astype(np.float64), **values, **x_of})
        raw = raw[complete].reset_index(drop=True)
        kept = {role: series[complete].reset_index(drop=True) for role, series in labelled.items()}
        for role, asked in (("cluster", cluster), ("within", within)):
            if role in kept:
                kept[role].name = asked
        binary = scores["kind"][0].as_py() == "binary"
        sample = cls(
            raw.copy(),
            specifications,
            chosen,
            scores["outcome"][0].as_py(),
            binary,
            kept.get("cluster"),
            cluster,
            kept.get("within"),
            {},
            counts,
            joined.unmatched,
            [],
            raw,
        )
        if raw["value"].nunique() < 2:
            raise ParameterError(
                f"outcome {sample.outcome!r} has one value only over the {len(raw)} joined queries",
                file=files["outcomes"],
            )
        sample._repeats(frame[complete].reset_index(drop=True))
        sample._standardise(files)
        return sample

    def _repeats(self, frame: pd.DataFrame) -> None:
        """Counts repeated texts; without another cluster, equal texts are one."""
        self.counts["repeated_texts"] = None
        if "text" not in frame.columns:
            return
        text = frame["text"].astype(str)
        home = self.cluster if self.cluster is not None else self.within
        keys = text if home is None else pd.Series(list(zip(home, text, strict=True)))
        repeated = int(keys.duplicated().sum())
        self.counts["repeated_texts"] = repeated
        if not repeated:
            return
        where = "" if home is None else f" inside one {home.name}"
        self.notices.append(f"{repeated:,} of {len(text):,} rows repeat the text of an earlier row{where}.")
        if self.cluster is None:
            self.cluster, self.cluster_name = text.rename("text"), "text"
            self.notices.append("Rows of equal text are clustered together.")

    def _standardise(self, files: Mapping[str, str | None]) -> None:
        """Every regressor less its mean, over its standard deviation (n − 1)."""
        for c in [c for c in self.raw.columns if c not in ("id", "value")]:
            x = self.raw[c].to_numpy()
            mean, sd = float(x.mean()), float(x.std(ddof=1)) if len(x) > 1 else 0.0
            if not sd > 1e-12 * max(abs(mean), 1e-300):
                if c in {s.column for s in self.specifications}:
                    raise ParameterError(f"{c} is the same for all queries", file=files["density"])
                self.drop(c, "the same for all queries")
                continue
            self.scales[c] = {"mean": mean, "sd": sd}
            self.frame[c] = (x - mean) / sd

    def drop(self, control: str, why: str) -> None:
        """Leaves a control out of every model."""
        self.controls.left_out[control] = why
        for names in (self.controls.names, self.controls.base, self.controls.lexical):
            if control in names:
                names.remove(control)
        self.frame = self.frame.drop(columns=[control])

    @property
    def beside(self) -> list[str]:
        """Typicality and max cosine, as far as they are known."""
        there = (_controls.TYPICALITY, _controls.MAX_COSINE)
        return [c for c in there if c in self.frame.columns and c != self.specifications[0].column]

    def part(self, rows: np.ndarray) -> tuple[pd.DataFrame, Any, Any]:
        """(frame, clusters, groups) of some rows."""
        return (
            self.frame[rows],
            None if self.cluster is None else self.cluster[rows],
            None if self.within is None else self.within[rows],
        )


def _usable(sample: _Sample) -> np.ndarray:
    """Rows that tell something in a fit with group effects: their group has two rows (and two values)."""
    assert sample.within is not None
    grouped = sample.frame["value"].groupby(sample.within)
    usable = grouped.transform("size") >= 2
    if sample.binary:
        usable &= grouped.transform("nunique") >= 2
    return usable.to_numpy()


def _run(
    sample: _Sample,
    predictors: _join.Predictors,
    shuffles: int,
    seed: int,
    started: float,
    files: Mapping[str, str | None],
) -> Study:
    everything = np.ones(len(sample.frame), dtype=bool)
    rows_within, is_within = everything, False
    if sample.within is not None:
        rows_within = _usable(sample)
        smallest = int(sample.within.value_counts().min())
        is_within = smallest >= LEAST_IN_GROUP
        sample.counts["groups"] = int(sample.within.nunique())
        sample.counts["smallest_group"] = smallest
        sample.counts["rows_in_groups_without_variation"] = int((~rows_within).sum())
    _independent_controls(sample, is_within)
    names = sample.controls.names
    fits: dict[str, _regression.Fit] = {}
    table: list[dict[str, Any]] = []

    def take(model: str, s: _join.Specification, terms: list[str], form: bool, robust: bool = True) -> Any:
        frame, clusters, groups = sample.part(rows_within if form else everything)
        return _regression.fit(
            frame,
            [*terms, s.column],
            binary=sample.binary,
            clusters=clusters,
            effects=groups if form else None,
            robust=robust,
        )

    def gain(s: _join.Specification, terms: list[str], form: bool) -> float:
        """What the predictor adds to the R² of the terms, in sample."""
        frame, _, groups = sample.part(rows_within if form else everything)
        effects = pd.factorize(groups)[0] if form else None
        fitter = _controls.fitter_of(frame["value"].to_numpy(), effects, sample.binary)
        return fitter.r_squared(frame[[*terms, s.column]].to_numpy()) - fitter.r_squared(
            frame[terms].to_numpy(dtype=np.float64)
        )

    bandwidths = []
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
                fitted = take(model, s, terms, form, robust)
            except (WorkError, ParameterError) as error:
                if number == 0 and model == "headline":
                    raise
                sample.notices.append(f"Model {model} ({s.setting or s.predictor}) is missing: {error}.")
                continue
            slopes[model] = fitted[s.column].to_dict() | {"r_squared_gain": gain(s, terms, form)}
            key = model if number == 0 else f"{model}@{s.kernel}:{s.bandwidth!r}"
            fits[key] = fitted
            table += _rows(sample, s, model, fitted, number == 0 and model == "headline")
        correlations = {
            c: float(np.corrcoef(sample.frame[s.column], sample.frame[c])[0, 1]) for c in sample.beside
        }
        ess = predictors.ess[number]
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

    primary = sample.specifications[0]
    frame, clusters, groups = sample.part(rows_within if is_within else everything)
    ladder, ladder_facts = _controls.ladder(
        frame.reset_index(drop=True),
        _controls.steps(sample.controls, sample.beside, primary.predictor, primary.column),
        binary=sample.binary,
        effects=pd.factorize(groups, sort=True)[0] if is_within else None,
        clusters=None if clusters is None else pd.factorize(clusters)[0],
        shuffles=shuffles,
        seed=seed,
    )
    ladder["terms"] = [_terms_in_words(t, primary, groups if is_within else None) for t in ladder["terms"]]
    facts = _facts(sample, fits, bandwidths, ladder, ladder_facts, is_within)
    coefficients = pd.DataFrame(table, columns=list(_regression.COEFFICIENTS))
    coefficients = coefficients.sort_values("primary", ascending=False, kind="stable", ignore_index=True)
    coefficients["clusters"] = coefficients["clusters"].astype("Int64")
    points = _points(sample, fits["headline"], primary)
    binned = _bins.bins(
        points["predictor"].to_numpy(),
        points["value"].to_numpy(),
        binary=sample.binary,
        groups=sample.within if sample.within is not None else _drawable(sample.cluster),
        clusters=None if sample.cluster is None else pd.factorize(sample.cluster)[0],
    )
    run = {
        "command": "analyze",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "inputs": dict(files),
        "predictor": primary.predictor,
        "controls": list(names),
        "cluster": sample.cluster_name,
        "within": None if sample.within is None else sample.within.name,
        "shuffles": shuffles,
        "seed": seed,
        "versions": _versions(),
        "seconds": round(time.monotonic() - started, 3),
        "density": predictors.run,
    }
    results = {name: fitted.results for name, fitted in fits.items()}
    kept = _extreme_neighbors(points, predictors.neighbors)
    return Study(results, coefficients, ladder, facts, points, binned, kept, run)


def _independent_controls(sample: _Sample, is_within: bool) -> None:
    """Leaves out controls that repeat others; refuses a predictor that does."""
    frame, _, groups = sample.part(_usable(sample) if is_within else np.ones(len(sample.frame), dtype=bool))
    effects = groups if is_within else None
    every = list(dict.fromkeys([*sample.controls.names, *sample.beside]))
    kept = _regression.independent(frame, every, effects)
    for c in [c for c in every if c not in kept]:
        sample.drop(c, "a linear combination of the other controls")
        sample.notices.append(f"{c} is a linear combination of the other controls and was left out.")
    for s in sample.specifications:
        if _regression.independent(frame, [*sample.controls.names, s.column], effects)[-1:] != [s.column]:
            raise ParameterError(f"{s.column} is a linear combination of the controls")


def _rows(
    sample: _Sample, s: _join.Specification, model: str, fitted: _regression.Fit, primary: bool
) -> list[dict[str, Any]]:
    terms = [fitted.terms[-1], *fitted.terms[:-1], "const"]
    return [
        {
            "model": model,
            "outcome": sample.outcome,
            "kernel": s.kernel,
            "bandwidth": s.bandwidth,
            "rule": s.rule,
            "term": s.predictor if term == s.column else term,
            **fitted[term].to_dict(),
            "covariance": fitted.covariance,
            "n": fitted.n,
            "clusters": fitted.clusters,
            "primary": primary,
        }
        for term in terms
    ]


def _terms_in_words(terms: str, s: _join.Specification, groups: pd.Series[Any] | None) -> str:
    shown = [s.predictor if t == s.column else t for t in terms.split(", ") if t]
    return ", ".join([*shown, *([] if groups is None else [f"effects of {groups.name}"])])


def _facts(
    sample: _Sample,
    fits: Mapping[str, _regression.Fit],
    bandwidths: list[dict[str, Any]],
    ladder: pd.DataFrame,
    ladder_facts: dict[str, Any],
    is_within: bool,
) -> dict[str, Any]:
    s = sample.specifications[0]
    headline = fits["headline"]
    slope = headline[s.column]
    scales = {(s.predictor if c == s.column else c): scale for c, scale in sample.scales.items()}
    facts: dict[str, Any] = {
        "outcome": sample.outcome,
        "kind": "binary" if sample.binary else "continuous",
        "outcome_mean": float(sample.raw["value"].mean()),
        "outcome_sd": float(sample.raw["value"].std(ddof=1)),
        "primary": {
            "model": "headline",
            "form": "within" if is_within else "pooled",
            "family": "logit" if sample.binary else "least squares",
            "unit": "log odds per SD" if sample.binary else "outcome units per SD",
            "predictor": s.predictor,
            "kernel": s.kernel,
            "bandwidth": s.bandwidth,
            "rule": s.rule,
            "controls": list(sample.controls.names),
            "covariance": headline.covariance,
            "clusters": headline.clusters,
            "n": headline.n,
            "sd": sample.scales[s.column]["sd"],
            **slope.to_dict(),
            "odds_ratio": math.exp(min(slope.estimate, 700.0)) if sample.binary else None,
            "average_marginal_effect": _marginal(headline, slope.estimate) if sample.binary else None,
            "r_squared": headline.r_squared,
            "smallest_detectable_effect": slope.smallest_detectable,
            "equivalence_bound": slope.equivalence_bound,
        },
        "bandwidths": bandwidths,
        "ladder": ladder_facts,
        "scales": scales,
        "controls_missing": sample.controls.missing,
        "controls_left_out": sample.controls.left_out,
        "counts": sample.counts,
        "unmatched": sample.unmatched,
    }
    facts["explained_by"] = _words.explained(facts)
    facts["notices"] = sample.notices + _words.cautions(facts)
    facts["answer"] = _words.answer(facts, ladder)
    return facts


def _marginal(fitted: _regression.Fit, slope: float) -> float:
    """Mean change of the probability per standard deviation, to first order."""
    p = np.asarray(fitted.results.predict())
    return float((p * (1 - p)).mean() * slope)


def _drawable(cluster: pd.Series[Any] | None) -> pd.Series[Any] | None:
    """Clusters that are worth a picture each: not those of one or two rows."""
    return None if cluster is None or cluster.value_counts().median() < 10 else cluster


def _points(sample: _Sample, fitted: _regression.Fit, s: _join.Specification) -> pd.DataFrame:
    points = pd.DataFrame({"id": sample.raw["id"], "value": sample.raw["value"]})
    points["predictor"] = sample.raw[s.column]
    for c in (_controls.TYPICALITY, _controls.MAX_COSINE):
        points[c] = sample.raw[c] if c in sample.raw.columns else np.nan
    group = sample.within if sample.within is not None else _drawable(sample.cluster)
    points["group"] = None if group is None else group
    points["fitted"] = pd.Series(
        np.asarray(fitted.results.predict()), index=fitted.results.model.data.row_labels
    )
    points["residual"] = points["value"] - points["fitted"]
    return points


def _extreme_neighbors(points: pd.DataFrame, neighbors: pd.DataFrame | None) -> pd.DataFrame | None:
    if neighbors is None:
        return None
    order = points.sort_values("predictor", kind="stable")["id"]
    wanted = set(order.head(EXTREMES)) | set(order.tail(EXTREMES))
    return neighbors[neighbors["id"].astype(str).isin(wanted)].reset_index(drop=True)


def _versions() -> dict[str, str]:
    names = ("lmd3", "numpy", "pandas", "pyarrow", "scipy", "statsmodels")
    return {name: metadata.version(name) for name in names}
