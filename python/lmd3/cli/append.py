"""`lmd3 append`: more rows to a store."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from lmd3.cli._common import (
    TextOption,
    ThreadsOption,
    emit,
    existing,
    is_texts,
    limit_threads,
    progress,
)
from lmd3.cli.import_ import (
    GroupColumn,
    IdColumn,
    MetadataOption,
    RawOption,
    VectorsOption,
    WeightColumn,
    raw_of,
)
from lmd3.errors import ParameterError


def append(
    store: Annotated[str, typer.Argument(metavar="STORE", help="The store.")],
    sources: Annotated[
        list[str],
        typer.Argument(metavar="TEXTS|ROWS…", help="Texts, or vectors as `lmd3 import` takes them."),
    ],
    text: TextOption = "text",
    id: IdColumn = None,
    group: GroupColumn = None,
    weight: WeightColumn = None,
    vectors: VectorsOption = None,
    metadata: MetadataOption = None,
    raw: RawOption = None,
    same_encoder: Annotated[
        bool, typer.Option("--same-encoder", help="Bare vectors were made by the store's own encoder.")
    ] = False,
    model: Annotated[
        str | None, typer.Option("--model", metavar="FOLDER", help="Where the store's model is now.")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes that encode.")] = 1,
    threads: ThreadsOption = None,
) -> None:
    """Adds rows to a store as new shards; the old ones stay as they are, and so do their row numbers.

    Texts are encoded by the store's own encoder.

    \b
    Examples:
      lmd3 append corpus.lmd3 more.jsonl.zst
      lmd3 append corpus.lmd3 more.npy --metadata more.csv --id id --same-encoder
      lmd3 append corpus.lmd3 more.parquet --vectors embedding --id id
    """
    limit_threads(threads)
    import lmd3

    path = existing(store)
    start = time.monotonic()
    before = lmd3.open_store(path).n
    kinds = {vectors is None and "://" not in source and is_texts(source) for source in sources}
    if len(kinds) > 1:
        raise ParameterError("texts and vectors at once", remedy="append them one after the other")
    if kinds == {True}:
        for name, value in (("--metadata", metadata), ("--raw", raw)):
            if value is not None:
                raise ParameterError(f"{name} is for vectors, and these are texts")
        texts = lmd3.read_texts(sources, text=text, id=id, group=group, weight=weight)
        found = lmd3.append_texts(
            path, texts, model=model, workers=workers, threads=threads, progress=progress
        )
    else:
        found = lmd3.append_vectors(
            path,
            sources,
            vectors=vectors,
            metadata=metadata,
            id=id,
            group=group,
            text=text if metadata is not None and lmd3.open_store(path).has_texts else None,
            weight=weight,
            raw=raw_of(raw),
            same_encoder=same_encoder,
            progress=progress,
        )
    emit(
        {
            "store": path,
            "rows": found.n,
            "appended": found.n - before,
            "shards": len(found.manifest["shards"]),
            "groups": len(found.groups),
            "fingerprint": found.fingerprint,
            "seconds": round(time.monotonic() - start, 3),
        }
    )
