"""`lmd3 import`: vectors of other tools to a store."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from lmd3.cli._common import ForceOption, OutOption, emit, prepare_output, progress

VectorsOption = Annotated[
    str | None,
    typer.Option(
        "--vectors", metavar="COL", help="Column of the vectors [default: the only one of lists of numbers]."
    ),
]
MetadataOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--metadata",
        metavar="FILE",
        help="A row per vector, in their order (.parquet, .csv, .jsonl, or .txt of one id per line); "
        "repeatable [default: the columns beside the vectors].",
    ),
]
IdColumn = Annotated[str | None, typer.Option("--id", metavar="COL", help="Column of the id.")]
GroupColumn = Annotated[str | None, typer.Option("--group", metavar="COL", help="Column of the group.")]
TextColumn = Annotated[str | None, typer.Option("--text", metavar="COL", help="Column of the text.")]
WeightColumn = Annotated[
    str | None, typer.Option("--weight", metavar="COL", help="Column of the weight (a number ≥ 0).")
]
RawOption = Annotated[
    str | None,
    typer.Option(
        "--raw", metavar="DTYPE:ROWSxDIMS", help="What raw numbers are, such as float32:1000000x384."
    ),
]


def raw_of(text: str | None) -> tuple[str, tuple[int, int]] | None:
    """The value of `--raw`."""
    from lmd3.store.importing import raw_shape

    if text is None:
        return None
    dtype, _, shape = text.partition(":")
    return dtype, raw_shape(shape)


def import_(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="VECTORS…",
            help="Files or folders in row order: parquet, Arrow, saved datasets, faiss, .npy, .fbin, … or "
            "addresses of them (s3://…).",
        ),
    ],
    out: OutOption,
    vectors: VectorsOption = None,
    metadata: MetadataOption = None,
    id: IdColumn = None,
    group: GroupColumn = None,
    text: TextColumn = None,
    weight: WeightColumn = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="float32|float16|bfloat16|int8",
            help="Element type on disk [default: that of VECTORS].",
        ),
    ] = None,
    raw: RawOption = None,
    shard_rows: Annotated[int, typer.Option("--shard-rows", min=1, help="Rows of one shard.")] = 1 << 20,
    force: ForceOption = False,
) -> None:
    """Writes vectors of another tool as a store, with the ids, groups, texts and weights that go with them.

    What opens directly (.npy, .fbin, uncompressed Arrow, …; see `lmd3 inspect`) needs no import; a store adds
    checksums, ids, groups and weights.

    \b
    Examples:
      lmd3 import embeddings.parquet -o corpus.lmd3 --id doc_id --group source
      lmd3 import part-*.npy -o corpus.lmd3 --metadata meta.csv --id id --text text
      lmd3 import index.faiss -o corpus.lmd3
      lmd3 import vectors.dat -o corpus.lmd3 --raw float16:1000000x768
      lmd3 import s3://bucket/embeddings/ -o corpus.lmd3 --dtype float16
    """
    import lmd3

    prepare_output(out, force)
    start = time.monotonic()
    store = lmd3.import_vectors(
        sources,
        out,
        vectors=vectors,
        metadata=metadata,
        id=id,
        group=group,
        text=text,
        weight=weight,
        dtype=dtype,
        raw=raw_of(raw),
        shard_rows=shard_rows,
        force=force,
        progress=progress,
    )
    emit(
        {
            "store": out,
            "rows": store.n,
            "dimensions": store.d,
            "dtype": store.dtype,
            "normalised": store.normalised,
            "ids": "given" if store.given_ids else "row numbers",
            "groups": len(store.groups),
            "texts": store.has_texts,
            "weights": store.weights_kept,
            "bytes": sum(file.stat().st_size for file in out.iterdir()),
            "fingerprint": store.fingerprint,
            "seconds": round(time.monotonic() - start, 3),
        }
    )
