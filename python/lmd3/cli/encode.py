"""`lmd3 encode`: texts to a store."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from lmd3.cli._common import (
    ForceOption,
    GroupOption,
    IdOption,
    OutOption,
    SeedOption,
    TextOption,
    ThreadsOption,
    emit,
    limit_threads,
    notice,
    progress,
)

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="hashing|NAME|FOLDER",
        help="hashing (built in, lexical), or a sentence-transformers model by name or folder.",
    ),
]
DtypeOption = Annotated[
    str, typer.Option("--dtype", metavar="float16|float32|bfloat16|int8", help="Element type on disk.")
]
MaxTokensOption = Annotated[
    int | None,
    typer.Option("--max-tokens", min=1, help="Tokens read of each text [default: what the model reads]."),
]
PromptOption = Annotated[
    str | None, typer.Option("--prompt", help="Put before every text (neural models only).")
]
TruncateDimOption = Annotated[
    int | None,
    typer.Option(
        "--truncate-dim", min=1, help="Keep the first dimensions and normalise again [default: all]."
    ),
]
BatchSizeOption = Annotated[
    int | None, typer.Option("--batch-size", min=1, help="Texts of one forward pass of a neural model.")
]
PrecisionOption = Annotated[
    str | None,
    typer.Option(
        "--encode-precision",
        metavar="float32|bfloat16",
        help="Arithmetic of a neural model; bfloat16 is refused where it is no faster [default: float32].",
    ),
]
BackendOption = Annotated[
    str | None,
    typer.Option(
        "--backend", metavar="torch|onnx|openvino", help="What runs a neural model [default: torch]."
    ),
]
ChunkOption = Annotated[
    str,
    typer.Option(
        "--chunk",
        metavar="truncate|first|sliding",
        help="Long texts: cut where the model stops reading, keep the first chunk, or encode chunks of each.",
    ),
]
ChunkTokensOption = Annotated[
    int | None,
    typer.Option("--chunk-tokens", min=1, help="Tokens of a chunk [default: what the model reads]."),
]
ChunkOverlapOption = Annotated[
    int, typer.Option("--chunk-overlap", min=0, help="Tokens that neighbouring chunks share (sliding).")
]
SampleOption = Annotated[
    float | None,
    typer.Option(
        "--sample",
        metavar="R",
        min=0,
        max=1,
        help="Encode a share of the texts, drawn by hash of the id; densities carry the standard error.",
    ),
]
SampleByOption = Annotated[
    str | None,
    typer.Option("--sample-by", metavar="group", help="Draw the sample in each group by itself."),
]
WindowOption = Annotated[
    int,
    typer.Option(
        "--window", min=1, help="Rows sorted by length together, and kept on disk when they are encoded."
    ),
]
WorkersOption = Annotated[
    int, typer.Option("--workers", min=1, help="Processes that encode, each with its share of the threads.")
]
ShardRowsOption = Annotated[int, typer.Option("--shard-rows", min=1, help="Rows of one shard.")]
NoTextsOption = Annotated[
    bool, typer.Option("--no-texts", help="Keep no texts: smaller, but reports can't show them.")
]


def encode(
    texts: Annotated[list[str], typer.Argument(metavar="TEXTS…", help="Files or folders of texts.")],
    out: OutOption,
    model: ModelOption = "hashing",
    text: TextOption = "text",
    id: IdOption = None,
    group: GroupOption = None,
    dtype: DtypeOption = "float16",
    max_tokens: MaxTokensOption = None,
    prompt: PromptOption = None,
    truncate_dim: TruncateDimOption = None,
    batch_size: BatchSizeOption = None,
    encode_precision: PrecisionOption = None,
    backend: BackendOption = None,
    chunk: ChunkOption = "truncate",
    chunk_tokens: ChunkTokensOption = None,
    chunk_overlap: ChunkOverlapOption = 0,
    sample: SampleOption = None,
    sample_by: SampleByOption = None,
    seed: SeedOption = 0,
    shard_rows: ShardRowsOption = 1 << 20,
    window: WindowOption = 4096,
    workers: WorkersOption = 1,
    threads: ThreadsOption = None,
    no_texts: NoTextsOption = False,
    force: ForceOption = False,
) -> None:
    """Encodes texts into a store.

    Texts are .jsonl, .csv and .txt (also .gz, .zst), .parquet, or folders of such, read as one stream. Ids
    are the column `id`, else row numbers of the whole input; empty texts are left out and counted.

    The same command after a stop or a kill goes on behind the last finished window.

    \b
    Examples:
      lmd3 encode corpus.jsonl.zst -o corpus.lmd3 --group source
      lmd3 encode train.parquet -o train.lmd3 --text question --model sentence-transformers/all-MiniLM-L6-v2
      lmd3 encode crawl/ -o crawl.lmd3 --group source --sample 0.01 --sample-by group --workers 4
    """
    limit_threads(threads)
    import lmd3

    stream = lmd3.read_texts(texts, text=text, id=id, group=group)
    start = time.monotonic()
    store = lmd3.encode(
        stream,
        model,
        out,
        dtype=dtype,
        max_tokens=max_tokens,
        prompt=prompt,
        truncate_dim=truncate_dim,
        batch_size=batch_size,
        precision=encode_precision,
        backend=backend,
        chunk=chunk,
        chunk_tokens=chunk_tokens,
        chunk_overlap=chunk_overlap,
        sample=sample,
        sample_by=sample_by,
        seed=seed,
        shard_rows=shard_rows,
        window=window,
        workers=workers,
        threads=threads,
        keep_texts=not no_texts,
        force=force,
        progress=progress,
    )
    assert store.encoder is not None
    counts = store.manifest["counts"]
    if stream.empty:
        notice(f"{stream.empty:,} empty texts were left out")
    if counts["truncated"]:
        limit = chunk_tokens or store.encoder["max_tokens"]
        share = counts["truncated"] / store.n
        lost = counts["tokens_left_out"] / (counts["tokens"] + counts["tokens_left_out"])
        notice(
            f"{counts['truncated']:,} texts ({share:.1%}) are longer than {limit} tokens and were cut there: "
            f"{counts['tokens_left_out']:,} tokens ({lost:.1%}) are not in their vectors"
        )
    if drawn := store.manifest.get("sampling"):
        notice(f"{drawn['sampled']:,} of {drawn['texts']:,} texts were drawn and encoded")
    emit(
        {
            "store": Path(out),
            "rows": store.n,
            "dimensions": store.d,
            "dtype": store.dtype,
            "model": store.encoder["model"],
            "groups": len(store.groups),
            "empty": stream.empty,
            "truncated": counts["truncated"],
            "tokens": counts["tokens"],
            "tokens_left_out": counts["tokens_left_out"],
            **({"texts": drawn["texts"]} if (drawn := store.manifest.get("sampling")) else {}),
            "fingerprint": store.fingerprint,
            "seconds": round(time.monotonic() - start, 3),
        }
    )
