"""What every item gets in every arm: losses, choices, extraction."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lmd3.experiment_files import MEASURES
from lmd3.experiments.leak_inputs import Records, normalised
from lmd3.experiments.training import LOSS, TrainingJob
from lmd3.performance import LanguageModel

#: Outcomes, the primary one first, with their kind. `prompt` and `answer` are nats per token.
OUTCOMES = {
    "prompt": "continuous",
    "answer": "continuous",
    "margin": "continuous",
    "longest_run": "continuous",
    "correct": "binary",
    "exact_match": "binary",
    "extracted": "binary",
}


def open_model(folder: Path, documents: Sequence[str] | None) -> LanguageModel:
    """An arm's model: the n-gram model of its documents, or the one that its training left, proven whole."""
    if documents is not None:
        from lmd3.performance.ngram import NgramModel

        return NgramModel(documents)
    from lmd3.experiments.training import check_model
    from lmd3.performance.perplexity import CausalModel

    return CausalModel(check_model(folder))


def measure(
    model: LanguageModel,
    items: Records,
    arm: str,
    seed: int,
    *,
    choices: tuple[Sequence[Sequence[str]], Sequence[int]] | None = None,
    folder: Path | None = None,
    generate: int = 0,
    prefix: int = 16,
    length: int = 16,
) -> pa.Table:
    """`MEASURES` of one arm.

    Args:
        model: scores texts.
        items: n items.
        arm, seed: which.
        choices: of every item, and the right one.
        folder: of the training run, for generation; None: the model can't write.
        generate: tokens written after each prompt and compared with the answer.
        prefix, length: of the extraction.
    """
    ids = list(items.ids)
    parts: list[pa.Table] = []

    def add(outcome: str, values: Any, tokens: Any = None) -> None:
        parts.append(
            pa.table(
                {
                    "id": ids,
                    "arm": [arm] * len(ids),
                    "seed": [seed] * len(ids),
                    "outcome": [outcome] * len(ids),
                    "value": pa.array(np.asarray(values, dtype=np.float64), from_pandas=True),
                    "kind": [OUTCOMES[outcome]] * len(ids),
                    "tokens": pa.nulls(len(ids), pa.int64()) if tokens is None else tokens,
                },
                schema=MEASURES,
            )
        )

    scores = model.score(items.prompts)
    with np.errstate(invalid="ignore", divide="ignore"):
        add("prompt", scores.nats / scores.tokens, scores.tokens)
        prompts = items.contexts
        if items.answers is not None:
            scores = model.score(items.answers, prompts)
            add("answer", scores.nats / scores.tokens, scores.tokens)
    if choices is not None:
        from lmd3.performance.choices import score_choices

        found = score_choices(model, prompts, choices[0], choices[1])
        add("correct", found.correct)
        add("margin", found.margin)
    if folder is not None and (length or generate):
        from lmd3.performance.generation import Generator

        writer = Generator(folder / "model")
        if length:
            extraction = writer.extraction(items.texts, prefix=prefix, length=length)
            add("extracted", extraction.extracted)
            add("longest_run", extraction.longest)
        if generate and items.answers is not None:
            written = writer.answers(prompts, tokens=generate)
            right = [
                normalised(text).startswith(normalised(answer))
                for text, answer in zip(written, items.answers, strict=True)
            ]
            add("exact_match", right)
    return pa.concat_tables(parts)


def joined(parts: Sequence[pa.Table], seeds: int) -> pa.Table:
    """The measures of all arms; a treatment that was trained once stands for every seed."""
    out = list(parts)
    treated = [part for part in parts if part["arm"][0].as_py() == "treatment"]
    if len(treated) == 1:
        for seed in range(1, seeds):
            numbers = pa.array([seed] * len(treated[0]), pa.int64())
            out.append(treated[0].set_column(2, "seed", numbers))
    return pa.concat_tables(out)


def loss_table(arms: Path) -> pa.Table | None:
    """Loss curves of all training runs: the columns of `training.LOSS` with arm and seed."""
    parts = []
    for folder in sorted(arms.iterdir()):
        path = folder / "loss.parquet"
        if path.exists():
            table = pq.read_table(path).cast(LOSS)
            arm, seed = folder.name.rsplit("-", 1)
            table = table.append_column("arm", pa.array([arm] * len(table)))
            parts.append(table.append_column("seed", pa.array([int(seed)] * len(table))))
    return pa.concat_tables(parts) if parts else None


def probe(job: TrainingJob, documents: Sequence[str], steps: int = 3) -> float:
    """Seconds of one update of a job, measured on one thread over a few of them."""
    from dataclasses import replace

    from lmd3.experiments.training import write_job
    from lmd3.experiments.worker import run_jobs

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "probe"
        write_job(folder, replace(job, steps=steps), list(documents[:2000]))
        run_jobs([folder])
        seconds = pq.read_table(folder / "loss.parquet")["seconds"].to_numpy()
    return float((seconds[-1] - seconds[0]) / max(1, len(seconds) - 1))


def probe_ngram(documents: Sequence[str], items: Sequence[str], most: int = 20_000) -> tuple[int, float]:
    """Tokens of an arm of the n-gram model, and the seconds that it takes to train it and to score the items
    twice, as prompts and as answers; of more than `most` texts, scaled up from the first of them.
    """
    from lmd3.performance.ngram import NgramModel

    started = time.monotonic()
    model = NgramModel(documents[:most])
    model.score(items[:most])
    scale = max(1.0, len(documents) / most)
    seconds = (time.monotonic() - started) * max(scale, len(items) / most)
    return round(int(model.describe()["tokens"]) * scale), 2 * seconds
