"""`lmd3 pretrain`: a small model trained on some groups of texts, its loss related to their density."""

from __future__ import annotations

from typing import Annotated

import typer

from lmd3.cli import _common, _experiment


def pretrain(
    texts: _experiment.TextsArgument,
    out: _common.OutOption,
    group: _experiment.TextGroupOption = "group",
    train: Annotated[
        list[str] | None,
        typer.Option("--train", metavar="GROUP", help="Trained on; repeatable [default: all not left out]."),
    ] = None,
    leave_out: Annotated[
        list[str] | None,
        typer.Option("--leave-out", metavar="GROUP", help="Never trained on; repeatable."),
    ] = None,
    max_texts: _experiment.MaxTextsOption = None,
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
    vectors: _experiment.VectorsOption = None,
    encoder: _experiment.EncoderOption = "hashing",
    kernel: _experiment.KernelOption = "exponential",
    bandwidth: _common.BandwidthOption = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help="ngram (no torch), scratch (a small GPT-2), or the FOLDER of a model that read the texts.",
        ),
    ] = "ngram",
    epochs: _experiment.EpochsOption = 1.0,
    width: _experiment.WidthOption = 128,
    layers: _experiment.LayersOption = 4,
    heads: _experiment.HeadsOption = 4,
    context: _experiment.ContextOption = 128,
    vocabulary: _experiment.VocabularyOption = 2048,
    batch: _experiment.BatchOption = 16,
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
    from lmd3.experiments.leak import NGRAM
    from lmd3.experiments.pretrain import Pretrain, PretrainSettings
    from lmd3.experiments.training import TrainingJob

    model = _experiment.locate_model(model)
    if rivals and model == NGRAM:
        raise ParameterError("--rivals takes gradients: name a neural --model")
    records = _experiment.read_grouped(texts, id=id, text=text, group=group, vectors=vectors)
    settings = PretrainSettings(
        trained=tuple(train) if train else None,
        left_out=tuple(leave_out) if leave_out else None,
        texts=max_texts,
        held_out=held_out,
        scored=scored,
        finetune=finetune,
        model=model,
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
        **_experiment.chosen_bandwidths(bandwidth),
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
    _experiment.emit_verdicts(summary, out)
