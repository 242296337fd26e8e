"""`lmd3 leak`: known texts are added to the training data by lot, the model is trained again, and density and
performance are seen to move together, or not.

The folder of an experiment, in the order in which it fills:

    begun.json            whose folder it is (`folder`)
    plan.json             settings, fingerprint of the inputs, counts, power
    assignment.parquet    who gets what (`ASSIGNMENT`), written before anything is trained
    slots.parquet         the texts leaked, with their placebos (`SLOTS`)
    exposure/             exact log sums and kernels of every bandwidth: what replays need
    density.parquet       change of log density of every item (`CHANGES`)
    arms/control-0 …      training runs (`training`), with measures.parquet (`MEASURES`)
    measures.parquet      all of these
    analysis/             the tables of `analysis.intervention`, and summary.json
    run.json              last: a folder that holds it is complete

Schemas: `lmd3.experiment_files`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lmd3.analysis.assignment import cells_of
from lmd3.encoders import Encoder, create_encoder
from lmd3.errors import InputError, ParameterError, ShapeError
from lmd3.experiment_files import VARIANTS
from lmd3.experiments import leak_density, leak_measure, leak_plan
from lmd3.experiments.folder import claim_folder, digest_records
from lmd3.experiments.leak_inputs import (
    Records,
    VariantTexts,
    answers_repeated,
    present_items,
    with_exact,
)
from lmd3.experiments.training import TrainingJob
from lmd3.progress import ProgressFactory, silent
from lmd3.results import write_json, write_parquet

#: The built-in model, and a small GPT-2 configuration trained from scratch; anything else is a folder.
NGRAM, SCRATCH = "ngram", "scratch"

#: Pairs of items and base texts that are summed in double precision; more go through the scan.
_EXACT_PAIRS = 100_000_000

#: Texts encoded at once.
_BATCH = 1024


@dataclass(frozen=True)
class LeakSettings:
    """What a leak is.

    Attributes:
        doses: copies (or, with `distinct`, different variants) added of an item.
        kinds: of variants; None: all there are, and exact copies.
        untreated: untreated items of a block.
        hold_back: share of the items with variants that no draw treats.
        distinct: whether a dose needs as many different variants.
        allow_present: whether items may stand in the base texts already.
        model: "ngram", "scratch" or the folder of a model to train further.
        tokenizer: of the model given, where it is not in its folder.
        seeds: pairs of arms; None: 3, and 2 for the n-gram model, whose seeds differ by their placebos only.
        epochs: times that the texts are read.
        vocabulary: of the tokenizer that is learned for a model from scratch.
        job: the model from scratch and its training; `steps` follows from the epochs.
        kernel: of the density.
        bandwidths: rules or numbers, the first is the primary one.
        generate: tokens generated after each prompt and compared with the answer; 0: none.
        prefix, length: of the extraction: tokens given, tokens compared; length 0: none.
        replays: assignments drawn anew for randomisation inference.
        seed: of all draws.
    """

    doses: tuple[int, ...] = (0, 1, 4, 16)
    kinds: tuple[str, ...] | None = None
    untreated: int = 2
    hold_back: float = 0.0
    distinct: bool = False
    allow_present: bool = False
    model: str = NGRAM
    tokenizer: str | None = None
    seeds: int | None = None
    epochs: float = 2.0
    vocabulary: int = 2048
    job: TrainingJob = TrainingJob()  # noqa: RUF009
    kernel: str = "exponential"
    bandwidths: tuple[str | float, ...] = ("ess=1000", "ess=10", "ess=100", "ess=10000")
    generate: int = 0
    prefix: int = 16
    length: int = 16
    replays: int = 2000
    seed: int = 0

    @property
    def arms(self) -> int:
        """Number of seeds."""
        return self.seeds or (2 if self.model == NGRAM else 3)

    def to_dict(self) -> dict[str, Any]:
        """As `plan.json` holds it."""
        entry: dict[str, Any] = json.loads(json.dumps(asdict(self) | {"seeds": self.arms}))
        entry["job"].pop("checkpoint_seconds")
        return entry


class Leak:
    """An experiment in a folder. Every step leaves its result there and is not done twice.

    Args:
        folder: where.
        base: the base training texts.
        items: the test items.
        variants: variants of items (exact copies are added by itself).
        settings: what is done.
        placebo: texts for the control arms; None: taken out of the base.
        choices: the items' choices and the number of the right one, for accuracy.
        encoder: name, folder or encoder of all texts that come without vectors.
        workers: training runs at a time, each on one thread.
        threads: threads of everything else; None: all.
        force: whether an experiment of other settings or inputs may be replaced.
        progress: shows long steps.
        say: told in a line what happens next.

    Raises:
        InputError: and its kinds: see `prepare`.
    """

    def __init__(
        self,
        folder: str | Path,
        base: Records,
        items: Records,
        variants: VariantTexts,
        settings: LeakSettings = LeakSettings(),
        *,
        placebo: Records | None = None,
        choices: tuple[Sequence[Sequence[str]], Sequence[int]] | None = None,
        encoder: str | Path | Encoder = "hashing",
        workers: int = 1,
        threads: int | None = None,
        force: bool = False,
        progress: ProgressFactory | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.folder = Path(folder)
        self.settings = settings
        self.workers, self.threads = workers, threads
        self.progress, self.say = progress or silent, say
        self.choices = choices
        self._encoder_name = encoder
        self._base, self._items, self._placebo, self._variants = base, items, placebo, variants
        self._force = force
        if settings.arms < 1:
            raise ParameterError("an experiment has at least one seed")
        if choices is not None and not len(items) == len(choices[0]) == len(choices[1]):
            raise ShapeError(f"choices of {len(choices[0])} items for {len(items)}")

    # --- the plan ---

    def prepare(self) -> dict[str, Any]:
        """Checks everything, draws the assignment and writes it down; returns the plan.

        Raises:
            ParameterError: settings outside their range, too few items, too high a dose.
            InputError: items that stand in the base texts already.
            OutputError: the folder holds another experiment.
        """
        items, settings = self._items, self.settings
        present = present_items(items, self._base)
        if present and not settings.allow_present:
            raise InputError(
                f"{len(present)} of {len(items)} items stand in the base texts already, the first is"
                f" {items.ids[present[0]]!r}",
                row=present[0],
                remedy="take them out, or give --allow-present",
            )
        rows = range(len(items))
        if settings.kinds is None or "exact" in settings.kinds:
            self._variants = with_exact(items, self._variants, rows)
        variants = self._variants
        kinds = leak_plan.choose_kinds(variants, settings.kinds)
        if not kinds:
            raise ParameterError("there are no variants")
        eligible = leak_plan.eligible_items(items, variants, kinds)
        if settings.distinct:
            leak_plan.refuse_doses(items, variants, kinds, settings.doses, eligible)
        self._check_folder()
        if self._placebo is None:
            size = len(cells_of(kinds, settings.doses, settings.untreated))
            slots = int(eligible.sum()) // size * (size - settings.untreated)
            stay, aside = leak_plan.split_placebo(self._base, slots, settings.arms, settings.seed)
            self.base, self.placebo = self._base.take(stay), self._base.take(aside)
        else:
            self.base, self.placebo = self._base, self._placebo
        self._embed(kinds)
        self._sum(kinds)
        self.plan = leak_plan.make_plan(
            items,
            self.variants,
            self._sums[:, 0] - np.log(len(self.base)),
            kinds,
            settings.doses,
            untreated=settings.untreated,
            hold_back=settings.hold_back,
            eligible=eligible,
            placebo=self.placebo,
            arms=settings.arms,
            seed=settings.seed,
        )
        plan, design = self.plan, self.plan.design
        density = self._sums[:, 0] - np.log(len(self.base))
        write_parquet(self.folder / "assignment.parquet", leak_plan.assignment_table(plan, items, density))
        write_parquet(self.folder / "slots.parquet", leak_plan.slots_table(plan, self.variants, self.placebo))
        rows_table = pa.table(
            {
                "item": [self.variants.items[row] for row in plan.rows],
                "kind": [self.variants.kinds[row] for row in plan.rows],
                "prompt": [self.variants.prompts[row] for row in plan.rows],
                "text": [self.variants.texts[row] for row in plan.rows],
            }
        )
        write_parquet(self.folder / "variants.parquet", rows_table.cast(VARIANTS))
        repeated = answers_repeated(items, self.variants)
        self.description = {
            "format": 1,
            "settings": settings.to_dict(),
            "inputs": self._fingerprint,
            "encoder": str(self._encoder_name)
            if not isinstance(self._encoder_name, str)
            else self._encoder_name,
            "base_texts": len(self.base),
            "placebo_texts": len(self.placebo),
            "placebo_sets": len({id(rows) for rows in plan.placebos}),
            "items": len(items),
            "eligible": int(eligible.sum()),
            "present_in_base": len(present),
            "blocks": design.blocks,
            "block_size": len(design.cells),
            "cells": leak_plan.cell_counts(plan),
            "kinds": list(kinds),
            "texts_added": plan.added,
            "answers_repeated": dict(repeated),
            "bandwidths": [entry.to_dict() for entry in self.bandwidths],
            "power": {
                str(effect): leak_plan.power(
                    design.blocks, len(design.cells), settings.untreated, effect, seed=settings.seed
                )
                for effect in leak_plan.EFFECTS
            },
        }
        write_json(self.folder / "plan.json", self.description)
        for kind, share in repeated.items():
            if share > 0.5 and kind != "exact":
                self.say(
                    f"{share:.0%} of the variants of kind {kind!r} repeat the last line of their item's"
                    " answer word for word: only the prompt's loss shows an effect of the kind"
                )
        return self.description

    def _check_folder(self) -> None:
        """Refuses a folder of another experiment, or clears it with `force`."""
        self._fingerprint = _fingerprint(
            self._base, self._items, self._variants, self._placebo, self.choices, str(self._encoder_name)
        )
        claim_folder(self.folder, "leak", self.settings.to_dict(), self._fingerprint, force=self._force)
        self._force = False

    def _embed(self, kinds: Sequence[str]) -> None:
        """The vectors of all texts, kept in `embeddings/`."""
        chosen = [row for row, kind in enumerate(self._variants.kinds) if kind in kinds]
        v = self._variants
        vectors = None if v.vectors is None else v.vectors[chosen]
        self.variants = VariantTexts(
            tuple(v.items[row] for row in chosen),
            tuple(v.kinds[row] for row in chosen),
            tuple(v.prompts[row] for row in chosen),
            tuple(v.texts[row] for row in chosen),
            vectors,
        )
        parts = {
            "base": (self.base.prompts, self.base.vectors),
            "items": (self._items.prompts, self._items.vectors),
            "variants": (self.variants.prompts, self.variants.vectors),
            "placebo": (self.placebo.prompts, self.placebo.vectors),
        }
        place = self.folder / "embeddings"
        place.mkdir(exist_ok=True)
        found: dict[str, NDArray[np.float32]] = {}
        for name, (prompts, given) in parts.items():
            path = place / f"{name}.npy"
            if given is not None:
                found[name] = given
            elif path.exists():
                found[name] = np.load(path, allow_pickle=False)
            else:
                found[name] = self._encode(prompts, name)
                temporary = place / f"{name}.tmp.npy"
                np.save(temporary, found[name])
                temporary.replace(path)
        dimensions = {name: vectors.shape[1] for name, vectors in found.items()}
        if len(set(dimensions.values())) > 1:
            raise ShapeError(
                f"vectors of different dimensions: {dimensions}", remedy="encode all texts by one model"
            )
        self.vectors = found

    def _encode(self, prompts: Sequence[str], label: str) -> NDArray[np.float32]:
        if not hasattr(self, "_encoder"):
            self._encoder = create_encoder(self._encoder_name)
            if not self._encoder.fitted:
                self._encoder.fit(iter(self.base.prompts))
        out = np.empty((len(prompts), self._encoder.dim), dtype=np.float32)
        with self.progress(f"encoding {label}", len(prompts), "texts") as bar:
            for start in range(0, len(prompts), _BATCH):
                part = slice(start, start + _BATCH)
                out[part] = self._encoder.encode(list(prompts[part])).vectors
                bar.update(min(start + _BATCH, len(prompts)))
        return out

    def _sum(self, kinds: Sequence[str]) -> None:
        """Log kernel sums of the items under the base, (n, B), and the bandwidths."""
        import lmd3

        estimator = lmd3.KernelDensity(
            kernel=self.settings.kernel,
            bandwidth=list(self.settings.bandwidths),
            normalize=False,
            threads=self.threads,
            seed=self.settings.seed,
        )
        base, items = self.vectors["base"], self.vectors["items"]
        estimator.fit(base, queries=items)
        self.bandwidths = estimator.bandwidths_
        if len(base) * len(items) <= _EXACT_PAIRS:
            # In double precision, as the rows that are added: the changes are then exact to rounding.
            self._sums = leak_density.base_sums(self.bandwidths, items, base)
        else:
            scores = estimator.score_samples(items)
            self._sums = scores.reshape(len(scores), -1) + np.log(len(base))
        for line in estimator.notices_:
            self.say(line)

    # --- the steps after it ---

    def measure_density(self) -> None:
        """Writes the exposures and the change of every item's log density."""
        place = self.folder / "exposure"
        found = leak_density.exposures(
            self.bandwidths,
            self._sums,
            self.plan,
            self.vectors["items"],
            self.vectors["variants"][self.plan.rows],
            self.vectors["placebo"],
        )
        leak_density.save_exposures(place, found, self.bandwidths)
        entries = [entry.to_dict() for entry in self.bandwidths]
        table = leak_density.changes_table(self._items.ids, found, entries, self.plan, len(self.base))
        write_parquet(self.folder / "density.parquet", table)

    def documents(self, arm: str, seed: int) -> list[str]:
        """The texts that an arm reads in an epoch: the base, then its slots; both arms have them in the same
        places.
        """
        plan = self.plan
        copies = plan.copies[plan.slots]
        if arm == "treatment":
            texts = [self.variants.texts[row] for row in plan.rows[plan.slots]]
        else:
            pool = self.placebo.texts
            texts = [pool[row] for row in plan.placebos[seed]]
        return self.base.texts + [t for t, n in zip(texts, copies, strict=True) for _ in range(n)]

    @property
    def arm_names(self) -> list[tuple[str, int]]:
        """(arm, seed) of all training runs; the n-gram model's treatment is one: it has no seed."""
        seeds = range(self.settings.arms)
        treated = range(1) if self.settings.model == NGRAM else seeds
        return [
            (arm, s) for s in seeds for arm in ("control", "treatment") if arm == "control" or s in treated
        ]

    def jobs(self) -> dict[Path, TrainingJob]:
        """The neural training runs, written to their folders."""
        from lmd3.experiments import training

        settings = self.settings
        training.require_torch("a neural arm")
        place = self.folder / "arms"
        place.mkdir(exist_ok=True)
        job = settings.job
        if settings.model == SCRATCH:
            # Learned from the base alone: no arm's own texts shape it.
            tokenizer = training.train_tokenizer(
                self.base.texts, settings.vocabulary, self.folder / "tokenizer"
            )
            job = replace(job, model=None, tokenizer=str(tokenizer))
        else:
            job = replace(job, model=settings.model, tokenizer=settings.tokenizer)
        loaded = training.load_tokenizer(job.tokenizer or str(job.model))
        if job.model is not None:
            training.check_fit(training.load_model(job.model), loaded, job.model)
        tokens = [
            int(training.count_tokens(loaded, self.documents(arm, seed)).sum())
            for arm, seed in self.arm_names
            if seed == 0
        ]
        # Both arms get the same number of updates, whatever their tokens.
        steps = int(np.ceil(settings.epochs * np.mean(tokens) / (job.context * job.batch)))
        self.cost = {"tokens_per_arm": float(np.mean(tokens)) * settings.epochs, "steps_per_arm": steps}
        return {
            place / f"{arm}-{seed}": replace(job, steps=steps, seed=settings.seed * 1000 + seed)
            for arm, seed in self.arm_names
        }

    def price(self) -> dict[str, Any]:
        """What the training will cost: tokens, updates and, by a probe, minutes."""
        arms = len(self.arm_names)
        if self.settings.model == NGRAM:
            tokens, seconds = leak_measure.probe_ngram(self.documents("control", 0), self._items.texts)
            return {"tokens_per_arm": tokens, "arms": arms, "minutes": round(arms * seconds / 60, 2)}
        jobs = self.jobs()
        job = next(iter(jobs.values()))
        seconds = leak_measure.probe(job, self.documents("control", 0))
        minutes = seconds * job.steps * arms / 60 / max(1, min(self.workers, arms))
        return self.cost | {"arms": arms, "seconds_per_step": round(seconds, 3), "minutes": round(minutes, 1)}

    def train(self) -> None:
        """Trains every neural arm (does nothing for the n-gram model)."""
        if self.settings.model == NGRAM:
            return
        from lmd3.experiments.training import write_job
        from lmd3.experiments.worker import run_jobs

        jobs = self.jobs()
        for folder, job in jobs.items():
            arm, seed = folder.name.rsplit("-", 1)
            write_job(folder, job, self.documents(arm, int(seed)))
        run_jobs(list(jobs), workers=self.workers, progress=self.progress, say=self.say)

    def measure(self) -> None:
        """Scores every item under every arm."""
        place = self.folder / "arms"
        for arm, seed in self.arm_names:
            folder = place / f"{arm}-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "measures.parquet"
            if path.exists():
                continue
            self.say(f"Measuring {arm} {seed} ...")
            documents = self.documents(arm, seed) if self.settings.model == NGRAM else None
            model = leak_measure.open_model(folder, documents)
            table = leak_measure.measure(
                model,
                self._items,
                arm,
                seed,
                choices=self.choices,
                folder=None if documents is not None else folder,
                generate=self.settings.generate,
                prefix=self.settings.prefix,
                length=self.settings.length,
            )
            write_parquet(path, table)
        parts = [pq.read_table(place / f"{arm}-{seed}" / "measures.parquet") for arm, seed in self.arm_names]
        write_parquet(self.folder / "measures.parquet", leak_measure.joined(parts, self.settings.arms))
        losses = leak_measure.loss_table(place)
        if losses is not None:
            write_parquet(self.folder / "loss.parquet", losses)

    def run(self) -> dict[str, Any]:
        """All of it; returns the summary."""
        from lmd3.experiments.leak_analysis import analyse

        started = time.monotonic()
        self.prepare()
        done = self.folder / "run.json"
        done.unlink(missing_ok=True)
        self.say("Summing the kernels of what is leaked ...")
        self.measure_density()
        self.train()
        self.measure()
        self.say("Relating the two ...")
        summary = analyse(self.folder, progress=self.progress)
        import lmd3

        write_json(
            done,
            {
                "command": "leak",
                "version": lmd3.__version__,
                "settings": self.settings.to_dict(),
                "inputs": self._fingerprint,
                "seconds": round(time.monotonic() - started, 3),
            },
        )
        return summary


def _fingerprint(
    base: Records,
    items: Records,
    variants: VariantTexts,
    placebo: Records | None,
    choices: Any,
    encoder: str,
) -> str:
    """A digest of everything that an experiment reads."""
    digest = hashlib.blake2b(digest_size=16)
    for records in (base, items, placebo):
        digest_records(digest, records)
    digest.update(json.dumps([variants.items, variants.kinds, variants.texts, variants.prompts]).encode())
    if variants.vectors is not None:
        digest.update(variants.vectors.tobytes())
    digest.update(
        json.dumps([encoder, [list(map(list, choices[0])), list(choices[1])] if choices else None]).encode()
    )
    return digest.hexdigest()
