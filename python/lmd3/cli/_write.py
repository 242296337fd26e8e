"""Tables that a command writes to one file, with their run beside it."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmd3.cli._common import prepare_output
from lmd3.errors import OutputError

if TYPE_CHECKING:
    import pyarrow as pa

_SUFFIXES = (".parquet", ".csv", ".jsonl")


def prepare_table(path: Path, force: bool) -> Path:
    """Checks before work that a table may be written at `path`.

    Raises:
        OutputError: it exists, can't be written, or its name ends in no known format.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise OutputError(
            "the name says no format", file=str(path), remedy=f"end it in {', '.join(_SUFFIXES)}"
        )
    return prepare_output(path, force)


def write_table(path: Path, table: pa.Table, run: Mapping[str, Any]) -> Path:
    """Writes a table by its name's suffix, and `run` to `NAME.run.json`; each complete or not at all.

    Returns:
        The path of the run.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    beside = path.with_name(f"{path.name}.run.json")
    try:
        match path.suffix.lower():
            case ".parquet":
                from pyarrow import parquet

                parquet.write_table(table, temporary)
            case ".csv":
                from pyarrow import csv

                csv.write_csv(table, temporary)
            case _:
                with temporary.open("w", encoding="utf-8") as file:
                    for batch in table.to_batches():
                        for row in batch.to_pylist():
                            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        temporary.replace(path)
        temporary.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(beside)
    finally:
        temporary.unlink(missing_ok=True)
    return beside


def facts(table: pa.Table) -> dict[str, Any]:
    """What the library noted in a table's metadata."""
    noted: dict[str, Any] = json.loads((table.schema.metadata or {}).get(b"lmd3", b"{}"))
    return noted


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    import numpy
    import pyarrow

    import lmd3

    return {
        "lmd3": lmd3.__version__,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "pyarrow": pyarrow.__version__,
    }
