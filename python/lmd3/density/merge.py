"""Partial files from anywhere, merged into the tables of one job."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lmd3.bandwidth import Bandwidth
from lmd3.density.job import ids_of, open_job
from lmd3.density.scan import fold
from lmd3.density.tables import table_of
from lmd3.errors import FileMissingError, OutputError, ParameterError
from lmd3.executors.jobs import (
    JOB,
    File,
    files_of,
    gaps,
    in_words,
    ordered,
    owners,
    parts_of,
    read_record,
)
from lmd3.executors.partials import FOLDER, differences, read_configuration, verify
from lmd3.progress import ProgressFactory, silent
from lmd3.results import DensityTable

#: What files of one merge may differ in, where that is allowed: the last bits of the sums come from it.
MIXABLE = ("simd", "precision")


def merge(
    folders: Sequence[str | Path],
    *,
    corpus: str | Path | None = None,
    queries: str | Path | None = None,
    allow_mixed: bool = False,
    notice: Callable[[str], None] | None = None,
    progress: ProgressFactory | None = None,
) -> DensityTable:
    """The tables of a job whose partial files lie in these folders.

    Segments are folded in their order, each once, whatever the folders' order and however they overlap: the
    bytes are those of a run in one process.

    Args:
        folders: of results (`lmd3 density -o`), or of partial files.
        corpus: where the rows are now [where they were].
        queries: where the queries are now [where they were].
        allow_mixed: merge sums of different SIMD levels or precisions, which differ in their last bits.
        notice: takes lines on what should be known.
        progress: shows progress.

    Raises:
        FileMissingError: a folder is not there, or segments have no file; they are named.
        OutputError: files are of different configurations; the message names in what.
        VerificationError: a file is damaged, or rows or queries have changed.
    """
    started = time.time()
    told = notice or (lambda line: None)
    places = [_partials(Path(folder)) for folder in folders]
    if not places:
        raise ParameterError("no folder to merge")
    files = ordered(file for place in places for file in files_of(place))
    if not files:
        raise FileMissingError("no partial files", file=str(places[0]))
    configurations = {file: read_configuration(file.path) for file in files}
    mixed = _one_configuration(configurations, allow_mixed)
    configuration = configurations[files[0]]
    segments = int(configuration["segments"])
    taken = owners(files)
    if missing := gaps(taken, 0, segments):
        raise FileMissingError(
            f"segments {in_words(missing)} of {segments} are missing",
            file=str(places[0]),
            remedy="run what is missing (the same lmd3 density command does that), or name its folder too",
        )
    with (progress or silent)("verifying", float(len(taken)), "files") as bar:
        for number, owner in enumerate(taken):
            verify(owner.file.path)
            bar.update(number + 1.0)
    noted = next((place for place in places if (place / JOB).is_file()), places[0])
    job = open_job(noted, corpus=corpus, queries=queries, any_level=True)
    record = read_record(noted)
    assert record is not None  # open_job has read it
    found = differences(job.configuration(segments), configuration)
    if [line for line in found if line.partition(":")[0] not in mixed]:
        raise OutputError(f"the files are not of the job beside them ({'; '.join(found)})", file=str(noted))
    with (progress or silent)("merging", float(segments), "segments") as bar:

        def counted() -> Any:
            for part in parts_of(taken):
                yield part
                bar.update(float(part["place"][0]) + 1.0)

        numbers = (len(job.queries), len(job.pairs), job.asked.neighbors)
        scan, _ = fold(counted(), *numbers, str(configuration["simd"]))
    bandwidths = [Bandwidth(**entry) for entry in record.bandwidths]
    settings = {key: value for key, value in record.work["settings"].items() if key != "notices"}
    notices = list(record.work["settings"].get("notices", []))
    for key, values in mixed.items():
        notices.append(f"merged from different {key}: {', '.join(values)}; the last digits depend on it")
        told(notices[-1])
    precision = "+".join(mixed["precision"]) if "precision" in mixed else None
    ids, described = ids_of(noted, queries), record.work["asked_of"]
    table = table_of(job, bandwidths, ids, described, scan, settings, notices, precision)
    table.run.update(
        settings=settings,
        seconds=round(time.time() - started, 3),
        merged_from=[str(place.absolute()) for place in places],
    )
    for key, values in mixed.items():
        table.run[key] = "+".join(values)
    return table


def _partials(folder: Path) -> Path:
    """The folder of partial files that a folder is or has."""
    if not folder.is_dir():
        raise FileMissingError("no such folder", file=str(folder))
    return folder / FOLDER if (folder / FOLDER).is_dir() else folder


def _one_configuration(configurations: dict[File, dict[str, Any]], allow_mixed: bool) -> dict[str, list[str]]:
    """What the files differ in and may, with the values.

    Raises:
        OutputError: they differ in more, or may not differ.
    """
    first, *others = configurations.items()
    mixed: dict[str, set[str]] = {}
    for file, configuration in others:
        keys = [key for key in {**first[1], **configuration} if first[1].get(key) != configuration.get(key)]
        if not keys:
            continue
        words = "; ".join(differences(first[1], configuration))
        place = f"another configuration than {first[0].path}"
        if any(key not in MIXABLE for key in keys):
            raise OutputError(f"{place} ({words})", file=str(file.path), remedy="merge files of one job only")
        if not allow_mixed:
            raise OutputError(
                f"{place} ({words})",
                file=str(file.path),
                remedy="set LMD3_SIMD to one level for the whole cluster, or give --allow-mixed",
            )
        for key in keys:
            mixed.setdefault(key, {str(first[1][key])}).add(str(configuration[key]))
    return {key: sorted(values) for key, values in mixed.items()}
