"""The rows of a study: joined, complete, standardised, with their clusters, groups, weights and vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from lmd3 import tables
from lmd3.analysis import controls as _controls
from lmd3.analysis import join as _join
from lmd3.analysis import neighborhoods as _near
from lmd3.analysis import regression as _regression
from lmd3.errors import ColumnError, JoinError, NotFiniteError, ParameterError

#: Name of the clusters made of near queries.
KMEANS = "kmeans"


@dataclass
class Sample:
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
    weights: np.ndarray | None = None
    vectors: np.ndarray | None = None
    cluster_source: str = "none"
    joined: pd.DataFrame | None = None

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
        held: Sequence[str] = (),
    ) -> Sample:
        """Resolves the controls, keeps the complete rows and standardises; raises as `regress`."""
        frame, counts = joined.frame, joined.counts
        specifications = predictors.specifications
        name = specifications[0].predictor
        chosen = _controls.choose(
            wanted, frame, [] if described is None else list(map(str, described.columns)), name
        )
        # What the design itself holds fixed, whatever controls are asked for.
        for c in [c for c in held if c not in chosen.names]:
            chosen.base.insert(0, c)
            chosen.names.insert(0, c)
        beside = [c for c in (_controls.TYPICALITY, _controls.MAX_COSINE) if c in frame.columns and c != name]
        columns = list(dict.fromkeys([*chosen.names, *beside]))
        values = {c: tables.numbers(frame[c], c, files["density"]) for c in columns}
        for c in [c for c in _controls.COUNTS if c in values and not (values[c] < 0).any()]:
            values[c] = np.log1p(values[c])
            counts.setdefault("log_counts", []).append(c)
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
        weights = _weights(frame, complete, files["outcomes"])
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
            weights,
            cluster_source="none" if cluster is None else "column",
            joined=frame[complete].reset_index(drop=True),
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
            self.cluster_source = "text"
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

    def place(self, queries: Any, seed: int, files: Mapping[str, str | None]) -> None:
        """Takes the queries' vectors: where no cluster and no group is named, near queries are clusters.

        Args:
            queries: (ids, (n, d) array), or anything with `ids()` and `rows(numbers)` (a store).
            seed: of k-means.
        """
        ids, rows = (queries.ids(), queries.rows) if hasattr(queries, "rows") else (queries[0], None)
        at = {name: number for number, name in enumerate(map(str, ids))}
        try:
            chosen = np.array([at[name] for name in self.raw["id"]], dtype=np.int64)
        except KeyError as error:
            raise JoinError(
                f"no vector of query {error.args[0]!r}",
                file=files.get("queries"),
                remedy="give the rows that the densities were made of",
            ) from None
        if rows is not None:
            order = np.argsort(chosen, kind="stable")
            found = np.empty((len(chosen), queries.d), dtype=np.float32)
            for start in range(0, len(chosen), 1 << 14):
                part = order[start : start + (1 << 14)]
                found[part] = rows(chosen[part])
            self.vectors = found
        else:
            self.vectors = np.asarray(queries[1])[chosen]
        if self.cluster_source in ("none", "text") and self.within is None and len(chosen) >= 30:
            count = _near.default_clusters(len(chosen))
            codes = _near.kmeans(self.vectors, count, seed)
            if codes.max() > 0:
                self.cluster = pd.Series(codes, name=KMEANS)
                self.cluster_name, self.cluster_source = KMEANS, KMEANS

    def codes(self, rows: np.ndarray) -> np.ndarray | None:
        """Codes of the clusters of some rows."""
        if self.cluster is None:
            return None
        return np.asarray(pd.factorize(self.cluster[rows])[0], dtype=np.int64)

    def effects(self, rows: np.ndarray) -> np.ndarray | None:
        """Codes of the groups of some rows, in the order of their names."""
        if self.within is None:
            return None
        return np.asarray(pd.factorize(self.within[rows], sort=True)[0], dtype=np.int64)


def _weights(frame: pd.DataFrame, complete: np.ndarray, file: str | None) -> np.ndarray | None:
    """trials × weight of the rows kept, or None where all are 1; rows without either count once.

    Raises:
        ColumnError: a weight that is negative, or trials below 1.
    """
    total = np.ones(len(frame))
    for name in ("trials", "weight"):
        if name in frame.columns:
            x = tables.numbers(frame[name], name, file)
            x = np.where(np.isnan(x), 1.0, x)
            bad = np.flatnonzero((x < 1.0) if name == "trials" else ~((x > 0) & np.isfinite(x)))
            if len(bad):
                raise ColumnError(
                    f"{name} of query {frame['id'].iloc[bad[0]]!r} is {x[bad[0]]:g}",
                    file=file,
                    remedy="trials are 1 or more" if name == "trials" else "weights are positive",
                )
            total = total * x
    total = total[complete]
    return None if (total == 1.0).all() else total


def usable(sample: Sample) -> np.ndarray:
    """Rows that tell something in a fit with group effects: their group has two rows (and two values)."""
    assert sample.within is not None
    grouped = sample.frame["value"].groupby(sample.within)
    usable = grouped.transform("size") >= 2
    if sample.binary:
        usable &= grouped.transform("nunique") >= 2
    return usable.to_numpy()


def independent_controls(sample: Sample, is_within: bool) -> None:
    """Leaves out controls that repeat others; refuses a predictor that does."""
    frame, _, groups = sample.part(usable(sample) if is_within else np.ones(len(sample.frame), dtype=bool))
    effects = groups if is_within else None
    every = list(dict.fromkeys([*sample.controls.names, *sample.beside]))
    kept = _regression.independent(frame, every, effects)
    for c in [c for c in every if c not in kept]:
        sample.drop(c, "a linear combination of the other controls")
        sample.notices.append(f"{c} is a linear combination of the other controls and was left out.")
    for s in sample.specifications:
        if _regression.independent(frame, [*sample.controls.names, s.column], effects)[-1:] != [s.column]:
            raise ParameterError(f"{s.column} is a linear combination of the controls")
