"""`lmd3 leak`: an intervention on the training data, planned, run and analysed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmd3.cli import _common, _experiment

_Path = Annotated[Path | None, typer.Option(metavar="FILE", help="Embeddings (.npy), one row per text.")]


def leak(
    base: Annotated[Path, typer.Option("--base", metavar="TABLE", help="Base training texts.")],
    items: Annotated[
        Path, typer.Option("--items", metavar="TABLE", help="Test items: id, prompt, answer, choices, group.")
    ],
    out: _common.OutOption,
    variants: Annotated[
        Path | None,
        typer.Option(
            "--variants",
            metavar="TABLE",
            help="Variants of items: id (the item's), text, kind [default: exact copies only].",
        ),
    ] = None,
    placebo: Annotated[
        Path | None,
        typer.Option(
            "--placebo",
            metavar="TABLE",
            help="Texts that stand in the control arms' slots [default: set aside from the base].",
        ),
    ] = None,
    dose: Annotated[
        list[int] | None,
        typer.Option("--dose", metavar="N", help="Copies added; repeatable [default: 0 1 4 16]."),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option("--kind", metavar="K", help="Kinds of variants; repeatable [default: all and exact]."),
    ] = None,
    untreated: Annotated[int, typer.Option("--untreated", min=1, help="Untreated items of a block.")] = 2,
    hold_back: Annotated[
        float, typer.Option("--hold-back", min=0.0, max=0.95, help="Share of items that no draw treats.")
    ] = 0.1,
    distinct: Annotated[
        bool, typer.Option("--distinct", help="A dose is so many different variants, never copies.")
    ] = False,
    allow_present: Annotated[
        bool, typer.Option("--allow-present", help="Items may stand in the base texts already.")
    ] = False,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", metavar="COL", help="Column of the prompts [default: prompt, question, text]."
        ),
    ] = None,
    answer: Annotated[
        str | None, typer.Option("--answer", metavar="COL", help="Column of the answers [default: answer].")
    ] = None,
    separator: Annotated[
        str, typer.Option("--separator", metavar="S", help="Between prompt and answer: \\n or a space.")
    ] = "\\n",
    choices: Annotated[
        str | None,
        typer.Option("--choices", metavar="COL", help="Column of the items' lists of choices, for accuracy."),
    ] = None,
    label: Annotated[
        str,
        typer.Option(
            "--label", metavar="COL", help="Column of the right choice: its number from 0, or text."
        ),
    ] = "label",
    variant_text: Annotated[
        str | None, typer.Option("--variant-text", metavar="COL", help="Column of the variants' texts.")
    ] = None,
    variant_answer: Annotated[
        str | None,
        typer.Option("--variant-answer", metavar="COL", help="Column of an answer that follows a variant."),
    ] = None,
    id: _common.IdOption = None,
    variant_id: Annotated[
        str | None,
        typer.Option("--variant-id", metavar="COL", help="Column of the variants with the item's id."),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option("--group", metavar="COL", help="Column of the items' groups: blocks stay inside one."),
    ] = None,
    encoder: _experiment.EncoderOption = "hashing",
    base_vectors: _Path = None,
    item_vectors: _Path = None,
    variant_vectors: _Path = None,
    placebo_vectors: _Path = None,
    kernel: _experiment.KernelOption = "exponential",
    bandwidth: _common.BandwidthOption = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help="ngram (no torch), scratch (a small GPT-2 configuration), or a model's FOLDER.",
        ),
    ] = "ngram",
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", metavar="FOLDER", help="Of the model given, if elsewhere.")
    ] = None,
    lora: Annotated[
        int | None, typer.Option("--lora", min=1, metavar="RANK", help="Finetune low-rank (needs peft).")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="Pairs of arms [default: 3; 2 for ngram].")
    ] = None,
    epochs: _experiment.EpochsOption = 2.0,
    width: _experiment.WidthOption = 128,
    layers: _experiment.LayersOption = 2,
    heads: _experiment.HeadsOption = 4,
    context: _experiment.ContextOption = 256,
    vocabulary: _experiment.VocabularyOption = 2048,
    batch: _experiment.BatchOption = 8,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", help="Its peak [default: 3e-3 from scratch, 5e-5 for finetuning]."),
    ] = None,
    generate: Annotated[
        int,
        typer.Option("--generate", min=0, metavar="N", help="Write N tokens after a prompt: exact match."),
    ] = 0,
    replays: Annotated[int, typer.Option("--replays", min=1000, help="Assignments drawn anew.")] = 2000,
    plan: Annotated[
        bool, typer.Option("--plan", help="Draw the assignment, say power and cost, and stop.")
    ] = False,
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Training runs at a time, one thread each.")
    ] = 1,
    threads: _common.ThreadsOption = None,
    seed: _common.SeedOption = 0,
    force: _common.ForceOption = False,
) -> None:
    """Leak test items into training data by lot, train again, and see density and performance answer.

    Items are drawn into doses and kinds of variants within blocks of like density; control arms take
    unrelated placebo texts in the same slots. An interrupted experiment goes on where it was, by the same
    command.

    \b
    Examples:
      lmd3 leak --base train.jsonl --items test.jsonl --variants paraphrases.jsonl -o leak --plan
      lmd3 leak --base train.jsonl --items test.jsonl --variants paraphrases.jsonl -o leak
      lmd3 leak --base train.jsonl --items test.jsonl -o leak --model scratch --seeds 2 --workers 2
      lmd3 leak --base train.jsonl --items mmlu.jsonl --choices choices --model ./my-model --lora 8 -o leak
    """
    _common.limit_threads(threads)
    for path in (base, items, variants, placebo):
        if path is not None:
            _common.existing(path)

    from dataclasses import replace

    from lmd3.errors import ParameterError
    from lmd3.experiments import leak_inputs
    from lmd3.experiments.leak import NGRAM, SCRATCH, Leak, LeakSettings
    from lmd3.experiments.training import TrainingJob

    model = _experiment.locate_model(model)
    if lora is not None and model in (NGRAM, SCRATCH):
        raise ParameterError("--lora finetunes a given model: name its folder by --model")
    columns = leak_inputs.Columns(id=id, prompt=prompt, answer=answer)
    between = separator.replace("\\n", "\n").replace("\\t", "\t")
    if not between.isspace():
        raise ParameterError("the separator is white space: \\n, \\n\\n or a space")
    base_records = leak_inputs.read_records(base, replace(columns, id=None), base_vectors, between)
    item_records = leak_inputs.read_records(items, replace(columns, group=group), item_vectors, between)
    placebo_records = None
    if placebo is not None:
        placebo_records = leak_inputs.read_records(
            placebo, replace(columns, id=None), placebo_vectors, between
        )
    if variants is not None:
        found = leak_inputs.read_variants(
            variants,
            item_records,
            leak_inputs.Columns(id=variant_id, prompt=variant_text, answer=variant_answer),
            vectors=variant_vectors,
        )
    else:
        found = leak_inputs.VariantTexts(
            (), (), (), (), None if item_records.vectors is None else item_records.vectors[:0]
        )
    rate = learning_rate or (3e-3 if model in (NGRAM, SCRATCH) else 5e-5)
    settings = LeakSettings(
        doses=tuple(dose) if dose else (0, 1, 4, 16),
        kinds=tuple(kind) if kind else None,
        untreated=untreated,
        hold_back=hold_back,
        distinct=distinct,
        allow_present=allow_present,
        model=model,
        tokenizer=tokenizer,
        seeds=seeds,
        epochs=epochs,
        vocabulary=vocabulary,
        kernel=kernel,
        generate=generate,
        replays=replays,
        seed=seed,
        job=TrainingJob(
            width=width,
            layers=layers,
            heads=heads,
            context=context,
            batch=batch,
            learning_rate=rate,
            lora=lora,
        ),
        **_experiment.chosen_bandwidths(bandwidth),
    )
    experiment = Leak(
        out,
        base_records,
        item_records,
        found,
        settings,
        placebo=placebo_records,
        choices=leak_inputs.read_choices(items, choices, label) if choices else None,
        encoder=encoder,
        workers=workers,
        threads=threads,
        force=force,
        progress=_common.progress,
        say=_common.notice,
    )
    if plan:
        described = experiment.prepare()
        described["cost"] = experiment.price()
        lines = [
            f"{described['items']:,} items, {described['eligible']:,} with variants of all kinds:"
            f" {described['blocks']} blocks of {described['block_size']}",
            *(f"  {name:<16} {count:,}" for name, count in described["cells"].items()),
            f"{described['texts_added']:,} texts are added to {described['base_texts']:,}",
            "power of the test of any effect, by its size in standard deviations: "
            + ", ".join(f"{size}: {share:.0%}" for size, share in described["power"].items()),
            "cost: "
            + ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in described["cost"].items()),
            f"assignment: {out / 'assignment.parquet'}",
        ]
        _common.emit(described, text="\n".join(lines))
        return
    summary = experiment.run()
    _experiment.emit_verdicts(summary, out)
