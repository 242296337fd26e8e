"""`lmd3 pretrain`: a small model trained on some groups of texts, its loss related to their density."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lmd3.cli import _common


def pretrain(
    texts: Annotated[Path, typer.Argument(help="Table of texts with groups: .jsonl, .parquet or .csv.")],
    out: _common.OutOption,
    group: Annotated[str, typer.Option("--group", metavar="COL", help="Column of the groups.")] = "group",
    train: Annotated[
        list[str] | None,
        typer.Option("--train", metavar="GROUP", help="Trained on; repeatable [default: all not left out]."),
    ] = None,
    leave_out: Annotated[
        list[str] | None,
        typer.Option("--leave-out", metavar="GROUP", help="Never trained on; repeatable."),
    ] = None,
    max_texts: Annotated[
        int | None, typer.Option("--max-texts", min=1, help="Most training texts of a group [default: all].")
    ] = None,
    held_out: Annotated[int, typer.Option("--held-out", min=10, help="Texts held out of each group.")] = 400,
    scored: Annotated[int, typer.Option("--scored", min=10, help="Texts scored of a group left out.")] = 300,
    finetune: Annotated[
        int,
        typer.Option(
            "--finetune", min=0, help="Texts of the groups left out to train on afterwards: contrast."
        ),
    ] = 0,
    text: _common.TextOption = "text",
    id: _common.IdOption = None,
    vectors: Annotated[
        Path | None, typer.Option("--vectors", metavar="FILE", help="Embeddings (.npy), one row per text.")
    ] = None,
    encoder: Annotated[
        str,
        typer.Option("--encoder", metavar="NAME", help="hashing, or a sentence-transformers NAME or FOLDER."),
    ] = "hashing",
    kernel: Annotated[
        str, typer.Option("--kernel", metavar="K", help="Kernel of the density.")
    ] = "exponential",
    bandwidth: _common.BandwidthOption = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help="ngram (no torch), scratch (a small GPT-2), or the FOLDER of a model that read the texts.",
        ),
    ] = "ngram",
    epochs: Annotated[float, typer.Option("--epochs", min=0.01, help="Times the texts are read.")] = 1.0,
    width: Annotated[int, typer.Option("--width", min=8, help="Of a model from scratch.")] = 128,
    layers: Annotated[int, typer.Option("--layers", min=1, help="Of a model from scratch.")] = 4,
    heads: Annotated[int, typer.Option("--heads", min=1, help="Of a model from scratch.")] = 4,
    context: Annotated[int, typer.Option("--context", min=8, help="Tokens of a sequence.")] = 128,
    vocabulary: Annotated[int, typer.Option("--vocabulary", min=257, help="Of a model from scratch.")] = 2048,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences of an update.")] = 16,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Its peak.")] = 3e-3,
    rivals: Annotated[
        int,
        typer.Option("--rivals", min=0, help="Queries for in-context probing and mirrored influence."),
    ] = 0,
    threads: _common.ThreadsOption = None,
    seed: _common.SeedOption = 0,
    force: _common.ForceOption = False,
) -> None:
    """Train a small model on some groups of texts, and see whether density explains its loss (claim C).

    Texts are deduplicated and some of every group held out; the groups left out show what density says where
    nothing was learned. An interrupted experiment goes on where it was, by the same command.

    \b
    Examples:
      lmd3 pretrain texts.jsonl --group source --leave-out web -o pretrain
      lmd3 pretrain texts.jsonl --group source --leave-out web --model scratch --finetune 5000 -o pretrain
      lmd3 pretrain texts.jsonl --group source --train books --model ./my-model --encoder ./minilm -o given
    """
    _common.limit_threads(threads)
    _common.existing(texts)

    from lmd3.errors import ParameterError
    from lmd3.experiments import leak_inputs
    from lmd3.experiments.leak import NGRAM, SCRATCH
    from lmd3.experiments.pretrain import Pretrain, PretrainSettings
    from lmd3.experiments.training import TrainingJob

    if model not in (NGRAM, SCRATCH):
        _common.existing(model)
    if rivals and model == NGRAM:
        raise ParameterError("--rivals takes gradients: name a neural --model")
    columns = leak_inputs.Columns(id=id, text=text, group=group)
    records = leak_inputs.read_records(texts, columns, vectors)
    options: dict[str, Any] = {} if bandwidth is None else {"bandwidths": tuple(bandwidth)}
    settings = PretrainSettings(
        trained=tuple(train) if train else None,
        left_out=tuple(leave_out) if leave_out else None,
        texts=max_texts,
        held_out=held_out,
        scored=scored,
        finetune=finetune,
        model=model if model in (NGRAM, SCRATCH) else str(Path(model).resolve()),
        epochs=epochs,
        vocabulary=vocabulary,
        kernel=kernel,
        seed=seed,
        job=TrainingJob(
            width=width,
            layers=layers,
            heads=heads,
            context=context,
            batch=batch,
            learning_rate=learning_rate,
        ),
        **options,
    )
    experiment = Pretrain(
        out,
        records,
        settings,
        encoder=encoder,
        threads=threads,
        force=force,
        progress=_common.progress,
        say=_common.notice,
    )
    summary = experiment.run()
    if rivals:
        from lmd3.experiments.rivals import run_rivals

        summary["verdicts"]["rivals"] = run_rivals(
            experiment, queries=rivals, progress=_common.progress, say=_common.notice
        )
    lines = [f"{name}: {sentence}" for name, sentence in summary["verdicts"].items()]
    _common.emit(summary | {"out": out}, text="\n".join([*lines, "", f"Tables: {out / 'analysis'}"]))
