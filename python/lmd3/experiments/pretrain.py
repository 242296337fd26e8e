"""`lmd3 pretrain` (claim C): a small model is trained on some groups of texts and not on others, and what
held-out texts of both cost it is related to the density of what it was trained on.

The folder of an experiment:

    plan.json             settings, fingerprint of the texts, counts
    split.parquet         id, group, role: train, held_out, untrained (scored, never trained on), finetune
    density/              density of the scored texts under the training texts; `density-finetune/` likewise
    covariates.parquet    controls
    arms/base, finetuned  training runs (`training`)
    outcomes.parquet      model, id, nats per token
    analysis/             relations, groups, contrasts (`experiment_files`), summary.json
    run.json              last
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lmd3.encoders import Encoder, create_encoder
from lmd3.errors import ParameterError
from lmd3.experiments.folder import claim_folder, fingerprint
from lmd3.experiments.leak import NGRAM, SCRATCH
from lmd3.experiments.leak_inputs import Records, normalised
from lmd3.experiments.training import TrainingJob
from lmd3.progress import ProgressFactory, silent
from lmd3.results import DensityTable, read_json, write_json, write_parquet

TRAIN, HELD_OUT, UNTRAINED, FINETUNE = "train", "held_out", "untrained", "finetune"

#: Names of the models in `outcomes.parquet`.
BASE, FINETUNED = "base", "finetuned"

_BATCH = 1024


@dataclass(frozen=True)
class PretrainSettings:
    """What is trained on what.

    Attributes:
        trained: groups that are trained on; None: all but those left out.
        left_out: groups that are not; None: all but those trained on. One of the two must be named.
        texts: most training texts of a group, or of each by name; None: all.
        held_out: texts held out of each trained group.
        scored: texts scored of each group left out.
        min_words, max_words: texts of other lengths are not used.
        finetune: texts of the groups left out on which the model is trained further, for the contrast before
            and after; 0: none.
        model: "ngram", "scratch", or the folder of a model that has read the training texts already: it is
            scored as it is (and finetuned, if asked).
        epochs: times that the texts are read; `finetune_epochs` likewise.
        vocabulary: of the tokenizer that is learned.
        job: the model from scratch and its training; `steps` follows from the epochs.
        finetune_rate: peak learning rate of the finetuning.
        kernel, bandwidths: of the density; the first is the primary one.
        seed: of all draws.
    """

    trained: tuple[str, ...] | None = None
    left_out: tuple[str, ...] | None = None
    texts: int | Mapping[str, int] | None = None
    held_out: int = 400
    scored: int = 300
    min_words: int = 5
    max_words: int = 120
    finetune: int = 0
    model: str = NGRAM
    epochs: float = 1.0
    finetune_epochs: float = 1.0
    vocabulary: int = 2048
    job: TrainingJob = TrainingJob(layers=4, context=128, batch=16)  # noqa: RUF009
    finetune_rate: float = 1e-3
    kernel: str = "exponential"
    bandwidths: tuple[str | float, ...] = ("ess=1000", "ess=10", "ess=100", "ess=10000")
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As `plan.json` holds it."""
        entry: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        entry["job"].pop("checkpoint_seconds")
        return entry


def split(records: Records, settings: PretrainSettings) -> list[str | None]:
    """The role of every text, None where it is not used: too short or long, a repetition, or left over.

    Raises:
        ParameterError: no groups, a group named that there is not, a group with too few texts.
    """
    if records.groups is None:
        raise ParameterError("the texts have no groups", remedy="name their column by --group")
    there = sorted(set(records.groups))
    named = set(settings.trained or ()) | set(settings.left_out or ())
    if missing := sorted(named - set(there)):
        raise ParameterError(f"no group {missing[0]!r}", remedy=f"there are: {', '.join(there[:20])}")
    if both := sorted(set(settings.trained or ()) & set(settings.left_out or ())):
        raise ParameterError(f"the group {both[0]!r} is both trained on and left out")
    if settings.trained is None and settings.left_out is None:
        raise ParameterError("name the groups that are trained on, or those left out")
    left_out = settings.left_out
    if left_out is None:
        left_out = tuple(g for g in there if g not in (settings.trained or ()))
    trained = settings.trained or tuple(g for g in there if g not in left_out)
    random = np.random.default_rng([settings.seed, 20])
    seen: set[str] = set()
    usable: dict[str, list[int]] = {group: [] for group in (*trained, *left_out)}
    for row, (text, group) in enumerate(zip(records.texts, records.groups, strict=True)):
        words = len(text.split())
        if group not in usable or not settings.min_words <= words <= settings.max_words:
            continue
        key = normalised(text)
        if key not in seen:
            seen.add(key)
            usable[group].append(row)
    role: list[str | None] = [None] * len(records)
    spare: list[int] = []
    for group in (*trained, *left_out):
        rows = random.permutation(np.array(usable[group], dtype=np.int64)).tolist()
        wanted = settings.held_out if group in trained else settings.scored
        if len(rows) < (2 * wanted if group in trained else min(wanted, 10)):
            raise ParameterError(
                f"the group {group!r} has {len(rows)} usable texts, too few to score {wanted} of them",
                remedy="lower --held-out or --scored, or leave the group away",
            )
        for row in rows[:wanted]:
            role[row] = HELD_OUT if group in trained else UNTRAINED
        if group in trained:
            limit = (
                settings.texts
                if settings.texts is None or isinstance(settings.texts, int)
                else settings.texts.get(group)
            )
            for row in rows[wanted:][: limit if limit is not None else len(rows)]:
                role[row] = TRAIN
        else:
            spare += rows[wanted:]
    if settings.finetune:
        for row in random.permutation(np.array(spare, dtype=np.int64))[: settings.finetune]:
            role[int(row)] = FINETUNE
    return role


class Pretrain:
    """An experiment in a folder; every step leaves its result there and is not done twice.

    Args:
        folder: where.
        records: texts with groups, and vectors if they are known.
        settings: what is done.
        encoder: of texts without vectors.
        workers: training runs at a time (used where runs don't wait for each other).
        threads: threads of the scans; None: all.
        force: whether an experiment of other settings or texts may be replaced.
        progress, say: as elsewhere.
    """

    def __init__(
        self,
        folder: str | Path,
        records: Records,
        settings: PretrainSettings,
        *,
        encoder: str | Path | Encoder = "hashing",
        workers: int = 1,
        threads: int | None = None,
        force: bool = False,
        progress: ProgressFactory | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.folder = Path(folder)
        self.records, self.settings = records, settings
        self.workers, self.threads = workers, threads
        self.progress, self.say = progress or silent, say
        self._encoder_name, self._force = encoder, force

    # --- the plan ---

    def prepare(self) -> dict[str, Any]:
        """Checks everything, draws the split and writes it down; returns the plan.

        Raises:
            ParameterError: see `split`.
            OutputError: the folder holds another experiment.
        """
        records, settings = self.records, self.settings
        role = split(records, settings)
        self._check_folder()
        self.rows = {
            name: [row for row, r in enumerate(role) if r == name]
            for name in (TRAIN, HELD_OUT, UNTRAINED, FINETUNE)
        }
        self.train_texts = records.take(self.rows[TRAIN])
        self.queries = records.take(self.rows[HELD_OUT] + self.rows[UNTRAINED])
        self.finetune_texts = records.take(self.rows[FINETUNE]) if self.rows[FINETUNE] else None
        used = [row for row, r in enumerate(role) if r is not None]
        groups = records.groups or ()
        table = pa.table(
            {
                "id": [records.ids[row] for row in used],
                "group": [groups[row] for row in used],
                "role": [role[row] for row in used],
            }
        )
        write_parquet(self.folder / "split.parquet", table)
        counts: dict[str, dict[str, int]] = {}
        for group, r in zip(table["group"].to_pylist(), table["role"].to_pylist(), strict=True):
            counts.setdefault(group, {}).setdefault(r, 0)
            counts[group][r] += 1
        self.description = {
            "format": 1,
            "settings": settings.to_dict(),
            "inputs": self._fingerprint,
            "counts": counts,
            "training_texts": len(self.train_texts),
            "scored_texts": len(self.queries),
            "finetuning_texts": len(self.rows[FINETUNE]),
        }
        write_json(self.folder / "plan.json", self.description)
        return self.description

    def _check_folder(self) -> None:
        self._fingerprint = fingerprint(self.records, str(self._encoder_name))
        claim_folder(self.folder, "pretrain", self.settings.to_dict(), self._fingerprint, force=self._force)
        self._force = False

    # --- density and controls ---

    def measure_density(self) -> None:
        """Density of the scored texts under the training texts (and under the finetuning texts), and the
        controls.
        """
        from lmd3.covariates import compute_covariates

        queries = self._store(self.queries, "queries")
        corpus = self._store(self.train_texts, "train")
        bandwidths: Sequence[Any] | None = None
        stores: dict[str, Any] = {"density": corpus}
        if self.finetune_texts is not None:
            stores["density-finetune"] = self._store(self.finetune_texts, "finetune")
        for name, store in stores.items():
            place = self.folder / name
            if not (place / "run.json").exists():
                import lmd3

                rules: list[str | float] = list(self.settings.bandwidths)
                if bandwidths is not None:
                    # The same numbers: a contrast with two bandwidths would compare two things.
                    rules = [entry["bandwidth"] for entry in bandwidths]
                estimator = lmd3.KernelDensity(
                    kernel=self.settings.kernel,
                    bandwidth=rules,
                    normalize=False,
                    threads=self.threads,
                    seed=self.settings.seed,
                )
                table = estimator.fit(store).density(
                    queries, neighbors=10, by_group=False, progress=self.progress
                )
                for line in estimator.notices_:
                    self.say(line)
                table.save(place)
            bandwidths = read_json(place / "run.json")["bandwidths"]
        path = self.folder / "covariates.parquet"
        if not path.exists():
            write_parquet(path, compute_covariates(corpus, queries, progress=self.progress))

    def vectors(self, records: Records, name: str) -> NDArray[np.float32]:
        """The vectors of records, kept in `embeddings/` where they were not given."""
        if records.vectors is not None:
            return records.vectors
        path = self.folder / "embeddings" / f"{name}.npy"
        if path.exists():
            return np.asarray(np.load(path, allow_pickle=False), dtype=np.float32)
        path.parent.mkdir(exist_ok=True)
        vectors = self._encode(records.prompts, name)
        temporary = path.with_name(f"{name}.tmp.npy")
        np.save(temporary, vectors)
        temporary.replace(path)
        return vectors

    def _store(self, records: Records, name: str) -> Any:
        """Records as a store in memory, with their texts."""
        from lmd3.store import Store

        n = len(records)
        columns = {
            "id": list(records.ids),
            "group": list(records.groups or ()),
            "text": records.texts,
            "tokens": pa.nulls(n, pa.int32()),
            "truncated": pa.nulls(n, pa.bool_()),
        }
        return Store.in_memory(self.vectors(records, name), pa.table(columns))

    def _encode(self, prompts: Sequence[str], label: str) -> NDArray[np.float32]:
        if not hasattr(self, "_encoder"):
            self._encoder = create_encoder(self._encoder_name)
            if not self._encoder.fitted:
                self._encoder.fit(iter(self.train_texts.prompts))
        out = np.empty((len(prompts), self._encoder.dim), dtype=np.float32)
        with self.progress(f"encoding {label}", len(prompts), "texts") as bar:
            for start in range(0, len(prompts), _BATCH):
                part = slice(start, start + _BATCH)
                out[part] = self._encoder.encode(list(prompts[part])).vectors
                bar.update(min(start + _BATCH, len(prompts)))
        return out

    # --- models ---

    def train(self) -> None:
        """Trains the model, and trains it further where a contrast is asked for."""
        settings = self.settings
        if settings.model == NGRAM:
            return
        from lmd3.experiments import training
        from lmd3.experiments.worker import run_jobs

        training.require_torch("a neural model")
        arms = self.folder / "arms"
        job = replace(settings.job, seed=settings.seed)
        base = Path(settings.model)
        if settings.model == SCRATCH:
            run_jobs([self.write_base_job()], progress=self.progress, say=self.say)
            base = training.check_model(arms / BASE)
        if self.finetune_texts is not None:
            texts = self.finetune_texts.texts
            loaded = training.load_tokenizer(str(base))
            training.check_fit(training.load_model(str(base)), loaded, str(base))
            steps = self._steps(loaded, texts, job, settings.finetune_epochs)
            more = replace(job, model=str(base), steps=steps, learning_rate=settings.finetune_rate)
            training.write_job(arms / FINETUNED, more, texts)
            run_jobs([arms / FINETUNED], progress=self.progress, say=self.say)

    def write_base_job(self) -> Path:
        """Writes the training run of the model from scratch, and returns its folder."""
        from lmd3.experiments import training

        training.require_torch("a neural model")
        settings = self.settings
        folder = self.folder / "arms" / BASE
        texts = self.train_texts.texts
        tokenizer = training.train_tokenizer(texts, settings.vocabulary, self.folder / "tokenizer")
        loaded = training.load_tokenizer(str(tokenizer))
        job = replace(settings.job, seed=settings.seed, tokenizer=str(tokenizer))
        training.write_job(
            folder, replace(job, steps=self._steps(loaded, texts, job, settings.epochs)), texts
        )
        return folder

    @staticmethod
    def _steps(tokenizer: Any, texts: Sequence[str], job: TrainingJob, epochs: float) -> int:
        from lmd3.experiments.training import count_tokens

        return int(np.ceil(epochs * count_tokens(tokenizer, texts).sum() / (job.context * job.batch)))

    def measure(self) -> None:
        """Scores the held-out and the untrained texts under every model."""
        path = self.folder / "outcomes.parquet"
        if path.exists():
            return
        parts = []
        for name, model in self._models():
            self.say(f"Scoring {len(self.queries):,} texts under the {name} model ...")
            scores = model.score(self.queries.texts)
            with np.errstate(invalid="ignore", divide="ignore"):
                value = scores.nats / scores.tokens
            columns = {
                "model": [name] * len(self.queries),
                "id": list(self.queries.ids),
                "group": list(self.queries.groups or ()),
                "nats_per_token": pa.array(value, from_pandas=True),
                "tokens": scores.tokens,
                "truncated": scores.truncated,
            }
            parts.append(pa.table(columns))
        write_parquet(path, pa.concat_tables(parts))

    def _models(self) -> list[tuple[str, Any]]:
        settings = self.settings
        if settings.model == NGRAM:
            from lmd3.performance.ngram import NgramModel

            model = NgramModel(self.train_texts.texts)
            found: list[tuple[str, Any]] = [(BASE, model)]
            if self.finetune_texts is not None:
                found.append((FINETUNED, model.copy().add(self.finetune_texts.texts)))
            return found
        from lmd3.experiments.training import check_model
        from lmd3.performance.perplexity import CausalModel

        arms = self.folder / "arms"
        base = check_model(arms / BASE) if settings.model == SCRATCH else Path(settings.model)
        found = [(BASE, CausalModel(base))]
        if self.finetune_texts is not None:
            found.append((FINETUNED, CausalModel(check_model(arms / FINETUNED))))
        return found

    def model_folder(self, name: str = BASE) -> Path:
        """The folder of a neural model of this experiment."""
        from lmd3.experiments.training import check_model

        if name == BASE and self.settings.model not in (NGRAM, SCRATCH):
            return Path(self.settings.model)
        return check_model(self.folder / "arms" / name)

    def run(self) -> dict[str, Any]:
        """All of it; returns the summary."""
        from lmd3.experiments.pretrain_analysis import analyse

        started = time.monotonic()
        self.prepare()
        done = self.folder / "run.json"
        done.unlink(missing_ok=True)
        self.say("Summing the kernels of all pairs ...")
        self.measure_density()
        self.train()
        self.measure()
        curve = self.folder / "arms" / BASE / "loss.parquet"
        if curve.exists():
            table = pq.read_table(curve)
            table = table.append_column("arm", pa.array([BASE] * len(table)))
            write_parquet(
                self.folder / "loss.parquet",
                table.append_column("seed", pa.array([self.settings.seed] * len(table))),
            )
        self.say("Relating the two ...")
        summary = analyse(self.folder, progress=self.progress)
        import lmd3

        write_json(
            done,
            {
                "command": "pretrain",
                "version": lmd3.__version__,
                "settings": self.settings.to_dict(),
                "inputs": self._fingerprint,
                "seconds": round(time.monotonic() - started, 3),
            },
        )
        return summary

    @property
    def density(self) -> DensityTable:
        """The densities under the training texts."""
        return DensityTable.load(self.folder / "density")
