"""`lmd3 perplexity`: what texts cost a language model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmd3.cli import _common
from lmd3.cli._common import ForceOption, GroupOption, IdOption, OutOption, TextOption, ThreadsOption


def perplexity(
    texts: Annotated[
        list[Path], typer.Argument(help="Texts: .jsonl[.gz|.zst], .parquet, .csv, .txt, or folders of such.")
    ],
    out: OutOption,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help="ngram (built in, trained on --train), or a causal language model: NAME or FOLDER.",
        ),
    ] = "ngram",
    train: Annotated[
        list[Path] | None,
        typer.Option("--train", metavar="TEXTS", help="What the n-gram model is trained on; repeatable."),
    ] = None,
    text: TextOption = "text",
    train_text: Annotated[
        str | None,
        typer.Option("--train-text", metavar="COL", help="Text column of --train [default: that of --text]."),
    ] = None,
    id: IdOption = None,
    group: GroupOption = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", metavar="COL", help="Score each text as the continuation of this column's text."
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            "--stride",
            min=1,
            metavar="N",
            help="Read texts longer than the model's context in windows that move on by N tokens "
            "[default: cut them].",
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            help="Arithmetic of a neural model: float32, bfloat16, or auto (bfloat16 if faster here).",
        ),
    ] = "float32",
    threads: ThreadsOption = None,
    force: ForceOption = False,
) -> None:
    """Mean negative log-likelihood of each text, in nats per token and per byte.

    Writes an outcomes table (id, outcome, value, …) as .parquet, .csv or .jsonl, with two outcomes:
    nats_per_token and nats_per_byte. Texts longer than a model's context are truncated and counted, or read
    in windows with --stride.

    \b
    Examples:
      lmd3 perplexity test.jsonl --train train.jsonl -o outcomes.parquet
      lmd3 perplexity test.jsonl --model ./my-model --text question -o outcomes.csv
      lmd3 perplexity qa.jsonl --model gpt2 --prompt question --text answer -o answers.parquet
      lmd3 perplexity books.jsonl --model gpt2 --stride 512 --dtype auto -o books.parquet
    """
    _common.limit_threads(threads)
    import time

    from lmd3.cli import _write
    from lmd3.errors import ParameterError
    from lmd3.performance import from_model
    from lmd3.texts import read_texts

    started = time.monotonic()
    _write.prepare_table(out, force)
    if model == "ngram" and not train:
        raise ParameterError("the n-gram model has no training texts", remedy="name them with --train")
    if model != "ngram" and (train or train_text):
        raise ParameterError("--train is for the n-gram model only: other models are trained elsewhere")
    stream = read_texts(texts, text=text, id=id, group=group)
    prompts = None
    if prompt is not None:
        batches = read_texts(texts, text=prompt, id=id, group=None)
        prompts = {key: words for batch in batches for key, words in zip(batch.ids, batch.texts, strict=True)}
    training = read_texts(train, text=train_text or text) if train else None
    table = from_model(
        stream,
        model,
        train=None if training is None else (words for batch in training for words in batch.texts),
        prompts=prompts,
        stride=stride,
        dtype=dtype,
        progress=_common.progress,
    )
    facts = _write.facts(table)
    if not table.num_rows:
        raise ParameterError("no text could be scored: there is nothing to write", file=str(texts[0]))
    run = {
        "command": "perplexity",
        "input": {
            "files": [str(path) for path in texts],
            "text": text,
            "id": id,
            "group": group,
            "prompt": prompt,
        },
        "fingerprint": stream.fingerprint,
        "train": None
        if train is None
        else {"files": [str(path) for path in train], "text": train_text or text},
        "empty_texts": stream.empty,
        **facts,
        "versions": _write.versions(),
        "seconds": round(time.monotonic() - started, 3),
    }
    _write.write_table(out, table, run)
    for count, what in (
        (stream.empty, "empty texts left out"),
        (facts["truncated"], "texts longer than the model's context: the part that fits was scored"),
        (facts["prompts_truncated"], "prompts shortened to make room for their texts"),
        (facts["unscored"], "texts without a token to predict left out"),
    ):
        if count:
            _common.notice(f"{count:,} {what}")
    import pyarrow.compute as pc

    means = {
        name: pc.mean(table.filter(pc.equal(table["outcome"], name))["value"]).as_py()
        for name in ("nats_per_token", "nats_per_byte")
    }
    _common.emit(
        {"out": out, "texts": facts["texts"], "tokens": facts["tokens"], "truncated": facts["truncated"]}
        | means
    )
