"""One study: outcome against density, from the tables to coefficients, ladder and an answer in words."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lmd3 import outcomes as _outcomes
from lmd3 import study_files as _files
from lmd3 import tables
from lmd3.analysis import adjustment as _adjustment
from lmd3.analysis import few_clusters as _few
from lmd3.analysis import join as _join
from lmd3.analysis import ladder as _ladder
from lmd3.analysis import paired as _paired
from lmd3.analysis.sample import Sample
from lmd3.errors import OutputError, ParameterError

#: Files of a saved study; the first four are those scripts may rely on. Their columns: `lmd3.study_files`.
FILES = (
    "coefficients.parquet",
    "ladder.parquet",
    "summary.json",
    "run.json",
    *(f"{name}.parquet" for name in ("points", "bins", "neighbors")),
    *(f"{name}.parquet" for name in _files.STUDY if name not in ("coefficients", "ladder", "points")),
)


@dataclass(frozen=True)
class Study:
    """The result of `regress`.

    Attributes:
        results: statsmodels results by model: `headline`, beside it `headline_pooled` or `headline_within`,
            `naive`, `alone`, `without_typicality`, `with_typicality`, `with_max_cosine`, all of the primary
            specification, `headline@KERNEL:BANDWIDTH` for the others, and the alternatives asked for.
        coefficients: as in `coefficients.parquet`, the headline rows first.
        ladder: as in `ladder.parquet`.
        facts: as in `summary.json`.
        points: one row per query, as in `points.parquet`.
        bins: mean outcome in bins of the predictor.
        neighbors: nearest training rows of the densest and the sparsest queries, or None.
        run: settings, versions and provenance, as in `run.json`.
        tables: the other tables of `lmd3.study_files.STUDY` by name, as far as they could be made.
    """

    results: dict[str, Any]
    coefficients: pd.DataFrame
    ladder: pd.DataFrame
    facts: dict[str, Any]
    points: pd.DataFrame
    bins: pd.DataFrame
    neighbors: pd.DataFrame | None
    run: dict[str, Any]
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)

    def summary(self) -> str:
        """The answer in three sentences, then the numbers behind it and what was left out, as plain text."""
        from lmd3.analysis import words

        return words.page(self.facts, self.coefficients, self.ladder)

    def save(self, folder: str | Path) -> Path:
        """Writes the tables into a folder, each file whole or not at all, `summary.json` last.

        Raises:
            OutputError: the folder can't be written.
        """
        folder = Path(folder)
        written: dict[str, pd.DataFrame | None] = {
            "bins.parquet": self.bins,
            "neighbors.parquet": self.neighbors,
        }
        own = {"coefficients": self.coefficients, "ladder": self.ladder, "points": self.points}
        for name in _files.STUDY:
            written[f"{name}.parquet"] = own.get(name, self.tables.get(name))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # A summary beside tables of another study would be worse than none.
            (folder / "summary.json").unlink(missing_ok=True)
            for name, frame in written.items():
                if frame is None:
                    (folder / name).unlink(missing_ok=True)
                    continue
                schema = _files.STUDY.get(name.removesuffix(".parquet"))
                table = pa.Table.from_pandas(frame, schema=schema, preserve_index=False)
                temporary = folder / f".{name}.partial"
                pq.write_table(table.replace_schema_metadata(None), temporary)
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
    from lmd3.analysis.run import analyse
    from lmd3.analysis.work import Options

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


def _scores(outcome: Any, name: str | None, file: str | None) -> pa.Table:
    if not isinstance(outcome, pa.Table) or outcome.column_names[:2] != _outcomes.OUTCOME_SCHEMA.names[:2]:
        outcome = _outcomes.read_outcomes(outcome)
    return _outcomes.choose_outcome(outcome, name, file)


def _versions() -> dict[str, str]:
    names = ("lmd3", "numpy", "pandas", "pyarrow", "scipy", "statsmodels")
    return {name: metadata.version(name) for name in names}
