"""What a page is made of: a study's files, or the same from memory. Tables that are not there are None."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lmd3 import study_files, tables
from lmd3.errors import FileMissingError, FormatError

if TYPE_CHECKING:
    from lmd3.analysis import Study

#: Tables that every study has.
NEEDED = ("coefficients", "ladder", "points", "bins")
#: Tables of one row per query and group can be long, and no figure needs them.
_UNREAD = frozenset({"subset_changes"})


@dataclass(frozen=True)
class StudyFiles:
    """A study as the report takes it.

    Attributes:
        facts, run: `summary.json` and `run.json`.
        tables: by name, as far as they are there.
        folder: of the analysis, or None for a study in memory.
        around: the folder of a whole `lmd3 study`, where the analysis lies in one.
        density: the folder of the density run, where it is known and the same as the study's.
        neighbors: nearest training rows of as many queries as are known.
        steps: `study.json` of a whole study, or empty.
    """

    facts: dict[str, Any]
    run: dict[str, Any]
    tables: dict[str, pd.DataFrame]
    folder: Path | None = None
    around: Path | None = None
    density: Path | None = None
    neighbors: pd.DataFrame | None = None
    steps: dict[str, Any] = field(default_factory=dict)

    def table(self, name: str) -> pd.DataFrame | None:
        """A table with at least one row, or None."""
        found = self.tables.get(name)
        return None if found is None or found.empty else found

    @classmethod
    def of(cls, study: Study | str | Path, density: Any = None) -> StudyFiles:
        """A study's folder, or one in memory with its density table.

        Raises:
            FileMissingError, FormatError: not the folder of a study.
        """
        if isinstance(study, (str, Path)):
            return cls.read(Path(study), density)
        # Through JSON, so that a page from memory and one from files are the same.
        facts, run = (json.loads(json.dumps(_plain(x))) for x in (study.facts, study.run))
        named: dict[str, pd.DataFrame] = {name: getattr(study, name) for name in NEEDED}
        named |= dict(getattr(study, "tables", {}))
        neighbors = study.neighbors
        if density is not None:
            neighbors = tables.as_frame(density.neighbors)
        return cls(facts, run, {n: _as_read(n, t) for n, t in named.items()}, neighbors=neighbors)

    @classmethod
    def read(cls, folder: Path, density: Any = None) -> StudyFiles:
        """A study's folder, also that of a whole `lmd3 study`."""
        around = None
        if not (folder / "summary.json").is_file() and (folder / "analysis" / "summary.json").is_file():
            around, folder = folder, folder / "analysis"
        if not (folder / "summary.json").is_file():
            raise FileMissingError(
                "no summary.json in this folder", file=str(folder), remedy="make one with `lmd3 analyze`"
            )
        if around is None and (folder.parent / "study.json").is_file():
            around = folder.parent
        facts, run = (read_object(folder / name) for name in ("summary.json", "run.json"))
        found = {name: tables.read_table(folder / f"{name}.parquet") for name in NEEDED}
        for name in study_files.STUDY:
            path = folder / f"{name}.parquet"
            if name not in found and name not in _UNREAD and path.is_file():
                found[name] = tables.read_table(path)
        place = _density_folder(folder, around, run)
        near = folder / "neighbors.parquet"
        neighbors = tables.read_table(near) if near.is_file() else None
        if density is not None and hasattr(density, "neighbors"):
            neighbors = tables.as_frame(density.neighbors)
        whole = None if around is None else around / "study.json"
        steps = read_object(whole) if whole is not None and whole.is_file() else {}
        return cls(facts, run, found, folder, around, place, neighbors, steps)

    def neighbors_of(self, ids: list[str], most: int) -> dict[str, list[dict[str, Any]]]:
        """The nearest training rows of some queries, nearest first."""
        wanted = pa.array(sorted(set(ids)), pa.string())
        frame = self.neighbors
        path = None if self.density is None else self.density / "neighbors.parquet"
        if path is not None and path.is_file():
            # Row groups are read one at a time: there may be ten rows for each of millions of queries.
            frame = _filtered(path, wanted, most)
        if frame is None or frame.empty:
            return {}
        frame = frame[frame["id"].astype(str).isin(set(ids))]
        frame = frame[frame["rank"] <= most].sort_values(["id", "rank"], kind="stable")
        found: dict[str, list[dict[str, Any]]] = {}
        for row in frame.to_dict("records"):
            found.setdefault(str(row["id"]), []).append({str(k): v for k, v in row.items()})
        return found

    def manifests(self) -> dict[str, dict[str, Any]]:
        """The manifests of corpus and queries, where their stores are still there."""
        found = {}
        for side, key in (("corpus", "store"), ("queries", "queries")):
            place = self.place(key)
            if place is not None and (place / "manifest.json").is_file():
                found[side] = read_object(place / "manifest.json")
        return found

    def place(self, side: str) -> Path | None:
        """Where the density run says a side's store is (`store`, `queries`), or a folder of its name near."""
        stated = ((self.run.get("density") or {}).get(side) or {}).get("path")
        if not stated:
            return None
        places = [Path(stated)]
        for folder in (self.folder, self.around):
            if folder is not None:
                places += [folder.parent / Path(stated).name, folder / Path(stated).name]
        return next((place for place in places if place.exists()), None)


def _plain(value: Any) -> Any:
    from lmd3.analysis.study import plain

    return plain(value)


def _as_read(name: str, frame: pd.DataFrame) -> pd.DataFrame:
    """A table as it comes back from its file: types of the schema, missing values as pandas reads them."""
    schema = study_files.STUDY.get(name)
    fitting = schema is not None and set(schema.names) == set(map(str, frame.columns))
    table = pa.Table.from_pandas(frame, schema=schema if fitting else None, preserve_index=False)
    return tables.as_frame(table.replace_schema_metadata(None))


def read_object(path: Path) -> dict[str, Any]:
    """A file of one JSON object.

    Raises:
        FileMissingError, FormatError: it is not there, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileMissingError("no such file", file=str(path)) from None
    except ValueError as error:
        raise FormatError(f"not valid JSON: {error}", file=str(path)) from None
    if not isinstance(found, dict):
        raise FormatError("not a JSON object", file=str(path))
    return found


def _density_folder(folder: Path, around: Path | None, run: Mapping[str, Any]) -> Path | None:
    """The density run that the study was made of, proven by its settings."""
    stated = (run.get("inputs") or {}).get("density")
    places = [Path(stated)] if stated else []
    places += [of / "density" for of in (around, folder.parent) if of is not None]
    for place in places:
        path = place / "run.json"
        if path.is_file() and _same(read_object(path), run.get("density") or {}):
            return place
    return None


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    keys = ("bandwidths", "store", "queries")
    return all(one.get(key) == other.get(key) for key in keys) and bool(other)


def _filtered(path: Path, wanted: pa.Array, most: int) -> pd.DataFrame | None:
    import pyarrow.compute as pc

    parts = []
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1 << 18):
                table = pa.Table.from_batches([batch])
                near = table.filter(pc.less_equal(table["rank"], most))
                parts.append(near.filter(pc.is_in(near["id"].cast(pa.string()), value_set=wanted)))
    except (pa.ArrowException, OSError, KeyError):
        return None
    frame: pd.DataFrame = pa.concat_tables(parts).to_pandas() if parts else pd.DataFrame()
    return frame
