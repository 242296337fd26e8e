"""The density tables: frozen results, their file schemas, reading and writing, without the native core."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lmd3.errors import FileMissingError, FormatError

#: `density.parquet`: one row per query, kernel, bandwidth and group (null: the whole corpus).
DENSITY = pa.schema(
    [
        ("id", pa.string()),
        ("kernel", pa.string()),
        ("bandwidth", pa.float64()),
        ("rule", pa.string()),
        ("group", pa.string()),
        ("log_density", pa.float64()),
        ("std_error", pa.float64()),
        ("ci_low", pa.float64()),
        ("ci_high", pa.float64()),
        ("kernel_sum_log", pa.float64()),
        ("ess", pa.float64()),
        ("rows_evaluated", pa.int64()),
        ("method", pa.string()),
        ("precision", pa.string()),
        ("flags", pa.string()),
    ]
)

#: `queries.parquet`: what does not depend on the bandwidth.
QUERIES = pa.schema(
    [
        ("id", pa.string()),
        ("max_cosine", pa.float64()),
        ("typicality", pa.float64()),
        ("nearest_id", pa.string()),
        ("nearest_distance", pa.float64()),
        ("kth_distance", pa.float64()),
        ("local_dimension", pa.float64()),
        ("duplicates", pa.int64()),
        ("excluded", pa.int64()),
    ]
)

#: `neighbors.parquet`: the nearest rows of each query; `share` is of the kernel sum at the primary bandwidth.
NEIGHBORS = pa.schema(
    [
        ("id", pa.string()),
        ("rank", pa.int32()),
        ("neighbor_id", pa.string()),
        ("neighbor_group", pa.string()),
        ("distance", pa.float64()),
        ("cosine", pa.float64()),
        ("share", pa.float64()),
    ]
)

#: `documents.parquet`, beside the densities of queries that are chunks of documents: log of the mean over a
#: document's chunks, and the largest.
DOCUMENTS = pa.schema(
    [
        ("id", pa.string()),
        ("kernel", pa.string()),
        ("bandwidth", pa.float64()),
        ("rule", pa.string()),
        ("group", pa.string()),
        ("log_density", pa.float64()),
        ("log_density_max", pa.float64()),
        ("std_error", pa.float64()),
        ("chunks", pa.int64()),
    ]
)

_TABLES = {"density": DENSITY, "queries": QUERIES, "neighbors": NEIGHBORS}

#: The files of a density result, `run.json` last: a folder that holds it is complete.
DENSITY_FILES = ("density.parquet", "queries.parquet", "neighbors.parquet", "bandwidth.json", "run.json")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON under a temporary name and renames it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(
        json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )
    temporary.replace(path)


def write_parquet(path: Path, table: pa.Table) -> None:
    """Writes a table under a temporary name and renames it."""
    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(table, temporary)
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        FileMissingError: it is not there.
        FormatError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileMissingError("no such file", file=str(path)) from None
    except (OSError, ValueError) as error:
        raise FormatError(f"not readable as JSON: {error}", file=str(path)) from None


@dataclass(frozen=True)
class DensityTable:
    """Densities of Q queries under a corpus.

    Attributes:
        density: `DENSITY`: one row per query, kernel, bandwidth and group.
        queries: `QUERIES`: one row per query, in the order of the queries.
        neighbors: `NEIGHBORS`: up to k rows per query.
        run: settings, fingerprints, versions, SIMD level, seconds; `run["bandwidths"]` lists the kernels
        with their
            bandwidths, the primary one first.
    """

    density: pa.Table
    queries: pa.Table
    neighbors: pa.Table
    run: dict[str, Any] = field(default_factory=dict)

    @property
    def primary(self) -> dict[str, Any]:
        """The primary bandwidth: {"kernel", "bandwidth", "rule", …}."""
        primary: dict[str, Any] = self.run["bandwidths"][0]
        return primary

    def save(self, folder: str | Path) -> Path:
        """Writes the tables and `run.json` (last) into a folder, which is made."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, schema in _TABLES.items():
            write_parquet(folder / f"{name}.parquet", getattr(self, name).cast(schema))
        write_json(folder / "bandwidth.json", {"format": 1, "bandwidths": self.run["bandwidths"]})
        write_json(folder / "run.json", self.run)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> DensityTable:
        """Reads what `save` wrote.

        Raises:
            FileMissingError: a table is not there.
            FormatError: a file is not what its name says, or lacks a column.
        """
        folder = Path(folder)
        run = read_json(folder / "run.json")
        if not isinstance(run, dict) or not run.get("bandwidths"):
            raise FormatError("not the run of a density result", file=str(folder / "run.json"))
        tables = {}
        for name, schema in _TABLES.items():
            path = folder / f"{name}.parquet"
            if not path.is_file():
                raise FileMissingError("no such table", file=str(path), remedy="run lmd3 density again")
            try:
                tables[name] = pq.read_table(path).select(schema.names).cast(schema)
            except (pa.ArrowException, KeyError) as error:
                raise FormatError(f"not a {name} table: {error}", file=str(path)) from None
        return cls(**tables, run=run)
