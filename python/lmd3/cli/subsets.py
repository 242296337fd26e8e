"""`lmd3 subsets`: models on random halves of the groups, as ground truth for densities per group."""

from __future__ import annotations

from typing import Annotated

import typer

from lmd3.cli import _common, _experiment


def subsets(
    texts: _experiment.TextsArgument,
    out: _common.OutOption,
    group: _experiment.TextGroupOption = "group",
    models: Annotated[
        int, typer.Option("--models", min=8, help="Models, each trained on a random half of the groups.")
    ] = 32,
    leave_one_out: Annotated[
        bool, typer.Option("--leave-one-out", help="Leave each group out instead; no intervals then.")
    ] = False,
    max_texts: _experiment.MaxTextsOption = None,
    held_out: Annotated[int, typer.Option("--held-out", min=5, help="Queries from each group.")] = 100,
    text: _common.TextOption = "text",
    id: _common.IdOption = None,
    vectors: _experiment.VectorsOption = None,
    encoder: _experiment.EncoderOption = "hashing",
    kernel: _experiment.KernelOption = "exponential",
    bandwidth: _common.BandwidthOption = None,
    threads: _common.ThreadsOption = None,
    seed: _common.SeedOption = 0,
    force: _common.ForceOption = False,
) -> None:
    """Measure what each group of training texts does to each query, and compare with its density.

    The built-in n-gram model is trained many times; rank correlations with what densities per group predict
    stand beside those of the largest cosine and of a random predictor.

    \b
    Examples:
      lmd3 subsets texts.jsonl --group source -o subsets
      lmd3 subsets texts.parquet --group source --vectors vectors.npy --models 64 --bandwidth .1 -o subsets
      lmd3 subsets texts.jsonl --group source --leave-one-out -o left-out
    """
    _common.limit_threads(threads)
    _common.existing(texts)

    from lmd3.experiments.subsets import HALVES, LEAVE_ONE_OUT, Subsets, SubsetSettings

    records = _experiment.read_grouped(texts, id=id, text=text, group=group, vectors=vectors)
    settings = SubsetSettings(
        models=models,
        design=LEAVE_ONE_OUT if leave_one_out else HALVES,
        texts=max_texts,
        held_out=held_out,
        kernel=kernel,
        seed=seed,
        **_experiment.chosen_bandwidths(bandwidth),
    )
    summary = Subsets(
        out,
        records,
        settings,
        encoder=encoder,
        threads=threads,
        force=force,
        progress=_common.progress,
        say=_common.notice,
    ).run()
    text_lines = [*summary["verdicts"].values(), "", f"Tables: {out / 'analysis'}"]
    _common.emit(summary | {"out": out}, text="\n".join(text_lines))
