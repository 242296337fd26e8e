"""The result of a study: its tables, facts and answer in words, and how they are saved."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lmd3 import study_files as _files
from lmd3.errors import OutputError

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
