"""`lmd3 encode`: texts to a store."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from lmd3.cli._common import (
    ForceOption,
    GroupOption,
    IdOption,
    SeedOption,
    TextOption,
    ThreadsOption,
    WeightOption,
    emit,
    limit_threads,
    notice,
    progress,
)
from lmd3.cli._density import AddressOption, ExecutorOption
from lmd3.errors import Lmd3Error, ParameterError

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
LikeOption = Annotated[
    Path | None,
    typer.Option(
        "--like",
        metavar="STORE",
        help="Encode by the encoder of a store, its frozen idf, prompt and limits included.",
    ),
]
PlanOption = Annotated[
    bool,
    typer.Option(
        "--plan", help="Say what it will take, and what a sample would cost in doubt; write nothing."
    ),
]
ShardRowsOption = Annotated[int, typer.Option("--shard-rows", min=1, help="Rows of one shard.")]
NoTextsOption = Annotated[
    bool, typer.Option("--no-texts", help="Keep no texts: smaller, but reports can't show them.")
]

KeepExactOption = Annotated[
    str | None,
    typer.Option(
        "--keep-exact",
        metavar="float16|float32",
        help="Keep a finer copy beside the rows, by which an index and kneighbors rank neighbours again.",
    ),
]


def encode(
    texts: Annotated[list[str], typer.Argument(metavar="TEXTS…", help="Files or folders of texts.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="What is written.")] = None,
    model: ModelOption = "hashing",
    text: TextOption = "text",
    id: IdOption = None,
    group: GroupOption = None,
    weight: WeightOption = None,
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
    keep_exact: KeepExactOption = None,
    like: LikeOption = None,
    plan: PlanOption = False,
    executor: ExecutorOption = "local",
    address: AddressOption = None,
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
      lmd3 encode crawl/ -o /shared/crawl.lmd3 --model MODEL --executor ray --address auto
    """
    limit_threads(threads)
    import lmd3
    from lmd3.executors import make_executor

    stream = lmd3.read_texts(texts, text=text, id=id, group=group, weight=weight)
    start = time.monotonic()
    encoder: Any = model
    settings: dict[str, Any] = {
        "max_tokens": max_tokens,
        "prompt": prompt,
        "truncate_dim": truncate_dim,
        "batch_size": batch_size,
        "precision": encode_precision,
        "backend": backend,
    }
    if like is not None:
        from lmd3.encoders.run import encoder_from_store

        if any(value is not None for value in settings.values()) or model != "hashing":
            raise ParameterError(
                "--like takes the whole encoder of a store: it goes with no other setting of one"
            )
        encoder = encoder_from_store(lmd3.open_store(like))
    if plan:
        _plan(stream, encoder, settings, dtype, not no_texts)
        return
    if out is None:
        raise ParameterError("no -o/--out given", remedy="name the store to write, or ask for --plan")
    store = lmd3.encode(
        stream,
        encoder,
        out,
        dtype=dtype,
        **settings,
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
        exact=keep_exact,
        force=force,
        executor=make_executor(executor, threads=threads, address=address),
        notice=notice,
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


def _plan(texts: Any, model: Any, settings: dict[str, Any], dtype: str, keep_texts: bool) -> None:
    """Says what an encoding takes."""
    from lmd3.encoders import create_encoder
    from lmd3.encoders.plan import plan_encoding
    from lmd3.progress import duration

    encoder = create_encoder(model, **settings)
    found = plan_encoding(texts, encoder, dtype, keep_texts=keep_texts)
    kind = encoder.describe()["kind"]
    if kind == "sentence-transformers" and not any(settings[name] for name in ("precision", "backend")):
        # Offered only where this machine gains by it.
        try:
            narrow: Any = create_encoder(model, **(settings | {"precision": "bfloat16"}))
            found["bfloat16_speedup"] = narrow.speedup
        except Lmd3Error:
            found["bfloat16_speedup"] = None
    lines = [
        f"{found['texts']:,} texts of {found['characters'] / max(found['texts'], 1):,.0f} characters",
        f"  encodes    {found['texts_per_second']:,.0f} texts a second in a trial",
    ]
    if gain := found.get("bfloat16_speedup"):
        lines.append(
            f"  faster     {gain:.2g} times with --encode-precision bfloat16 (cosine to float32 about .9999)"
        )
    names = list(found["rates"][0]["std_error"]) if found["rates"] else []
    head = "".join(f"{'ess=' + name:>12}" for name in names)
    lines += [
        "",
        f"  {'sample':>8}{'texts':>16}{'time':>16}{'disk':>12}   standard error of log f at",
        f"{'':>55}{head}",
    ]
    for entry in found["rates"]:
        errors = "".join(f"{value:>12.3f}" for value in entry["std_error"].values())
        time_ = duration(entry["hours"] * 3600)
        disk = f"{entry['bytes'] / 1e9:,.2f} GB"
        lines.append(f"  {entry['rate']:>8.1%}{entry['texts']:>16,}{time_:>16}{disk:>12} {errors}")
    emit(found, text="\n".join(lines))
