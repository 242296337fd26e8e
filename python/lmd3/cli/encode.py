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
    TextOption,
    emit,
    notice,
    prepare_output,
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
    shard_rows: ShardRowsOption = 1 << 20,
    no_texts: NoTextsOption = False,
    force: ForceOption = False,
) -> None:
    """Encodes texts into a store.

    Texts are .jsonl, .csv and .txt (also .gz, .zst), .parquet, or folders of such, read as one stream. Ids
    are the column `id`, else row numbers of the whole input; empty texts are left out and counted.

    \b
    Examples:
      lmd3 encode corpus.jsonl.zst -o corpus.lmd3 --group source
      lmd3 encode train.parquet -o train.lmd3 --text question --model sentence-transformers/all-MiniLM-L6-v2
    """
    import lmd3

    stream = lmd3.read_texts(texts, text=text, id=id, group=group)
    prepare_output(out, force)
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
        shard_rows=shard_rows,
        keep_texts=not no_texts,
        force=force,
        progress=progress,
    )
    assert store.encoder is not None
    counts = store.manifest["counts"]
    if stream.empty:
        notice(f"{stream.empty:,} empty texts were left out")
    if counts["truncated"]:
        limit = store.encoder["max_tokens"]
        share = counts["truncated"] / store.n
        notice(
            f"{counts['truncated']:,} texts ({share:.1%}) are longer than {limit} tokens and were cut there"
        )
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
            "fingerprint": store.fingerprint,
            "seconds": round(time.monotonic() - start, 3),
        }
    )
