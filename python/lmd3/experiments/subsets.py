"""`lmd3 subsets`: does a density per group say which training data a prediction depends on?

The small model is trained on K random halves of the groups (or with each group left out). What a group does
to a query is then measured by least squares of the losses on the groups read (a linear datamodel). It is
compared, by rank correlation, with what the density under each group predicts.

* `effects`: the mean over queries of Spearman's correlation, across groups, of measured and predicted change.
  `effects pooled` takes all (query, group) pairs at once; its level of chance is not 0, since a query that
  one group does much to tends to have one group of high density, whichever: the random predictor shows how
  much.
* `lds`, the linear datamodelling score (Ilyas et al. 2022, Park et al. 2023): the mean over queries of
  Spearman's correlation, across the K models, of the loss with what the predictor says of the model's
  training groups.

Predictors: log density under the texts that a model read (from sums per group), the largest cosine to them,
and a random one (each query's densities dealt to the groups by lot), which must show nothing. Intervals are
by bootstrap over models.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy import stats

from lmd3 import experiment_files as files
from lmd3.encoders import Encoder, create_encoder
from lmd3.errors import ParameterError
from lmd3.experiments.folder import claim_folder, fingerprint
from lmd3.experiments.leak_inputs import Records, normalised
from lmd3.progress import ProgressFactory, silent
from lmd3.results import write_json, write_parquet

Floats = NDArray[np.float64]

HALVES, LEAVE_ONE_OUT = "halves", "leave-one-out"

#: Random predictors: their spread belongs to the interval of one.
DEALS = 30


@dataclass(frozen=True)
class SubsetSettings:
    """What is trained on which groups.

    Attributes:
        models: K, models on random halves of the groups; for `leave-one-out` it is the number of groups + 1.
        design: "halves" or "leave-one-out".
        texts: most training texts of a group.
        held_out: queries from each group.
        min_words, max_words: texts of other lengths are not used.
        kernel, bandwidths: of the density; the first is the primary one.
        draws: bootstrap draws.
        seed: of all draws.
    """

    models: int = 32
    design: str = HALVES
    texts: int | None = None
    held_out: int = 100
    min_words: int = 5
    max_words: int = 120
    kernel: str = "exponential"
    bandwidths: tuple[str | float, ...] = ("ess=1000", "ess=10", "ess=100", "ess=10000")
    draws: int = 500
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As `plan.json` holds it."""
        return dict(json.loads(json.dumps(asdict(self))))


def draw_subsets(groups: int, settings: SubsetSettings) -> NDArray[np.bool_]:
    """(K, groups): which groups each model reads. All halves have one size, so that no model knows more by
    number; of an even number of groups they come in pairs of complements, and every group is read by half of
    the models.

    Raises:
        ParameterError: too few models to tell the groups' effects apart.
    """
    if settings.design == LEAVE_ONE_OUT:
        return np.concatenate([np.ones((1, groups), dtype=np.bool_), ~np.eye(groups, dtype=np.bool_)])
    random = np.random.default_rng([settings.seed, 40])
    rows: list[NDArray[np.bool_]] = []
    seen: set[bytes] = set()
    tries = 0
    while len(rows) < settings.models:
        half = np.zeros(groups, dtype=np.bool_)
        half[random.permutation(groups)[: groups // 2]] = True
        tries += 1
        if half.tobytes() in seen and tries < 50 * settings.models:
            continue
        for chosen in (half, ~half) if groups % 2 == 0 else (half,):
            seen.add(chosen.tobytes())
            rows.append(chosen)
    included = np.array(rows[: settings.models])
    if np.linalg.matrix_rank(included.astype(np.float64)) < groups:
        raise ParameterError(
            f"{settings.models} models on halves can't tell the effects of {groups} groups apart",
            remedy=f"take at least {2 * groups} models",
        )
    return included


# --- scores ---


def measured_effects(losses: Floats, included: NDArray[np.bool_]) -> Floats:
    """(queries, groups): what reading a group does to a query, by least squares of losses on the groups read.

    Halves hold the number of groups fixed, so an effect is that of a group in the place of another: effects
    are taken less their mean over the groups.

    Args:
        losses: (K, queries).
        included: (K, groups).
    """
    columns = np.column_stack([np.ones(len(included)), included])
    effects = (np.linalg.pinv(columns) @ losses)[1:].T
    return np.asarray(effects - effects.mean(axis=1, keepdims=True))


def _rank(values: Floats) -> Floats:
    return np.asarray(stats.rankdata(values, axis=-1))


def _mean_correlation(first: Floats, second: Floats) -> float:
    """Mean over rows of the Pearson correlation of two matrices; rows without variation are left out."""
    a = first - first.mean(axis=1, keepdims=True)
    b = second - second.mean(axis=1, keepdims=True)
    size = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    kept = size > 1e-12
    return float(((a * b).sum(axis=1)[kept] / size[kept]).mean()) if kept.any() else np.nan


def scores(losses: Floats, included: NDArray[np.bool_], predicted: Floats) -> dict[str, float]:
    """The three scores of a predictor.

    Args:
        losses: (K, queries) measured. included: (K, groups). predicted: (K, queries) what the predictor
        says of every model's training texts: a rise must mean a fall
            of the loss.
    """
    measured = measured_effects(losses, included)
    said = -measured_effects(predicted, included)
    return {
        "effects": _mean_correlation(_rank(measured), _rank(said)),
        "effects pooled": float(stats.spearmanr(measured.ravel(), said.ravel()).statistic),
        "lds": _mean_correlation(_rank(losses.T), _rank(-predicted.T)),
    }


def resampled(
    losses: Floats, included: NDArray[np.bool_], predicted: Floats, *, draws: int, seed: int
) -> pd.DataFrame:
    """(draws, scores): the scores over resampled models, the same ones for every predictor. Draws that leave
    a group always or never read are drawn again.
    """
    random = np.random.default_rng([seed, 41])
    found: list[dict[str, float]] = []
    count = len(losses)
    while len(found) < draws:
        chosen = random.integers(count, size=count)
        read = included[chosen].sum(axis=0)
        if (read == 0).any() or (read == count).any():
            continue
        found.append(scores(losses[chosen], included[chosen], predicted[chosen]))
    return pd.DataFrame(found)


def interval(estimate: float, draws: pd.Series[float]) -> tuple[float, float]:
    """95 % interval of a score, ± 1.96 standard deviations over resampled models. (Percentiles would be off:
    models drawn twice tie, which lowers rank correlations in every draw.)
    """
    half = 1.959964 * float(draws.std(ddof=1))
    return estimate - half, estimate + half


# --- the experiment ---


class Subsets:
    """An experiment in a folder, continued where it was left.

    Args:
        folder: where.
        records: texts with groups, and vectors if they are known.
        settings: what is done.
        encoder: of texts without vectors.
        threads: of the scans; None: all.
        force: whether an experiment of other settings or texts may be replaced.
        progress, say: as elsewhere.
    """

    def __init__(
        self,
        folder: str | Path,
        records: Records,
        settings: SubsetSettings = SubsetSettings(),
        *,
        encoder: str | Path | Encoder = "hashing",
        threads: int | None = None,
        force: bool = False,
        progress: ProgressFactory | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.folder = Path(folder)
        self.records, self.settings = records, settings
        self.threads, self._encoder_name, self._force = threads, encoder, force
        self.progress, self.say = progress or silent, say

    def prepare(self) -> dict[str, Any]:
        """Checks everything, draws queries and subsets, and writes the plan.

        Raises:
            ParameterError: no groups or too few, too few models or texts.
            OutputError: the folder holds another experiment.
        """
        records, settings = self.records, self.settings
        if records.groups is None:
            raise ParameterError("the texts have no groups", remedy="name their column by --group")
        if settings.design not in (HALVES, LEAVE_ONE_OUT):
            raise ParameterError(f"unknown design {settings.design!r}", remedy=f"{HALVES} or {LEAVE_ONE_OUT}")
        if settings.design == HALVES and settings.models < 8:
            raise ParameterError(f"{settings.models} models are too few: at least 8, better 32")
        random = np.random.default_rng([settings.seed, 42])
        seen: set[str] = set()
        usable: dict[str, list[int]] = {}
        for row, (text, group) in enumerate(zip(records.texts, records.groups, strict=True)):
            if settings.min_words <= len(text.split()) <= settings.max_words:
                key = normalised(text)
                if key not in seen:
                    seen.add(key)
                    usable.setdefault(group, []).append(row)
        self.groups = sorted(g for g, rows in usable.items() if len(rows) >= 2 * settings.held_out)
        small = sorted(set(usable) - set(self.groups))
        if small:
            self.say(
                f"groups with fewer than {2 * settings.held_out} texts are left away: {', '.join(small)}"
            )
        if len(self.groups) < 4:
            raise ParameterError(
                f"{len(self.groups)} groups have {2 * settings.held_out} usable texts: at least 4 are needed",
                remedy="lower --held-out or bring more groups",
            )
        self.query_rows: list[int] = []
        self.train_rows: list[list[int]] = []
        for group in self.groups:
            rows = random.permutation(np.array(usable[group], dtype=np.int64)).tolist()
            self.query_rows += rows[: settings.held_out]
            self.train_rows.append(rows[settings.held_out :][: settings.texts])
        self.included = draw_subsets(len(self.groups), settings)
        self._check_folder()
        plan = {
            "format": 1,
            "settings": settings.to_dict(),
            "inputs": self._fingerprint,
            "groups": {g: len(r) for g, r in zip(self.groups, self.train_rows, strict=True)},
            "queries": len(self.query_rows),
            "models": len(self.included),
            "included": self.included.tolist(),
        }
        write_json(self.folder / "plan.json", plan)
        return plan

    def _check_folder(self) -> None:
        self._fingerprint = fingerprint(self.records, str(self._encoder_name))
        claim_folder(self.folder, "subsets", self.settings.to_dict(), self._fingerprint, force=self._force)
        self._force = False

    def measure(self) -> Floats:
        """(K, queries) nats per token of every query under every model; finished models are kept."""
        from lmd3.performance.ngram import NgramModel

        queries = self.records.take(self.query_rows).texts
        texts = self.records.texts
        of_group = [[texts[row] for row in rows] for rows in self.train_rows]
        place = self.folder / "models"
        place.mkdir(exist_ok=True)
        losses = []
        with self.progress("training", len(self.included), "models") as bar:
            for number, chosen in enumerate(self.included):
                path = place / f"{number:04d}.parquet"
                if not path.exists():
                    model = NgramModel(
                        t for group, use in zip(of_group, chosen, strict=True) if use for t in group
                    )
                    found = model.score(queries)
                    write_parquet(path, pa.table({"nats_per_token": found.nats / found.tokens}))
                losses.append(pq.read_table(path)["nats_per_token"].to_numpy())
                bar.update(number + 1)
        return np.array(losses)

    def predictors(self) -> tuple[list[dict[str, Any]], dict[str, Floats]]:
        """Bandwidths, and by name (K, queries): `density:B` for every one, `max_cosine`, and
        `random:D` for every deal."""
        import lmd3

        train = [row for rows in self.train_rows for row in rows]
        vectors = self._vectors("train", train)
        queries = self._vectors("queries", self.query_rows)
        bounds = np.cumsum([0, *map(len, self.train_rows)])
        # Rules are resolved on all texts at once, and every group takes the same numbers.
        estimator = lmd3.KernelDensity(
            kernel=self.settings.kernel,
            bandwidth=list(self.settings.bandwidths),
            normalize=False,
            threads=self.threads,
            seed=self.settings.seed,
        ).fit(vectors, queries=queries)
        for line in estimator.notices_:
            self.say(line)
        entries = [entry.to_dict() for entry in estimator.bandwidths_]
        sums = np.empty((len(entries), len(self.groups), len(queries)))
        cosine = np.empty((len(self.groups), len(queries)))
        numbers = [entry["bandwidth"] for entry in entries]
        with self.progress("summing kernels", len(self.groups), "groups") as bar:
            for group in range(len(self.groups)):
                rows = vectors[bounds[group] : bounds[group + 1]]
                part = lmd3.KernelDensity(
                    kernel=self.settings.kernel, bandwidth=numbers, normalize=False, threads=self.threads
                ).fit(rows)
                found = part.score_samples(queries).reshape(len(queries), -1)
                sums[:, group] = found.T + np.log(len(rows))
                nearest = part.kneighbors(queries, n_neighbors=1)[0][:, 0]
                norms = np.linalg.norm(queries, axis=1)
                # Of rows of unit norm; else a likeness of the same order.
                cosine[group] = (1 + norms**2 - nearest**2) / (2 * norms)
                bar.update(group + 1)
        sizes = np.array(list(map(len, self.train_rows)), dtype=np.float64)
        said: dict[str, Floats] = {}
        read = self.included @ sizes
        with np.errstate(divide="ignore"):
            masks = np.where(self.included, 0.0, -np.inf)
        for number in range(len(entries)):
            total = np.logaddexp.reduce(sums[number][None] + masks[:, :, None], axis=1)
            said[f"density:{number}"] = total - np.log(read)[:, None]
        # The groups' densities in an order of each query's own: no group and no query keeps what is its own.
        random = np.random.default_rng([self.settings.seed, 43])
        for deal in range(DEALS):
            order = random.permuted(np.tile(np.arange(len(sizes))[:, None], len(queries)), axis=0)
            dealt = np.take_along_axis(sums[0], order, axis=0)
            total = np.logaddexp.reduce(dealt[None] + masks[:, :, None], axis=1)
            said[f"random:{deal}"] = total - np.log(self.included @ sizes[order])
        said["max_cosine"] = (cosine[None] + masks[:, :, None]).max(axis=1)
        return entries, said

    def _vectors(self, name: str, rows: list[int]) -> NDArray[np.float32]:
        if self.records.vectors is not None:
            return self.records.vectors[rows]
        path = self.folder / f"{name}.npy"
        if path.exists():
            return np.asarray(np.load(path, allow_pickle=False), dtype=np.float32)
        if not hasattr(self, "_encoder"):
            self._encoder = create_encoder(self._encoder_name)
            if not self._encoder.fitted:
                self._encoder.fit(self.records.prompts[row] for rows in self.train_rows for row in rows)
        vectors = np.concatenate(
            [
                self._encoder.encode(
                    [self.records.prompts[row] for row in rows[start : start + 1024]]
                ).vectors
                for start in range(0, len(rows), 1024)
            ]
        )
        np.save(path.with_suffix(".tmp.npy"), vectors)
        path.with_suffix(".tmp.npy").replace(path)
        return vectors

    def run(self) -> dict[str, Any]:
        """All of it; returns the summary."""
        import lmd3

        started = time.monotonic()
        self.prepare()
        done = self.folder / "run.json"
        done.unlink(missing_ok=True)
        losses = self.measure()
        known = np.isfinite(losses).all(axis=0)
        entries, said = self.predictors()
        self.say("Comparing what was measured with what was predicted ...")
        table = self._scores(losses[:, known], entries, {k: v[:, known] for k, v in said.items()})
        out = self.folder / "analysis"
        out.mkdir(exist_ok=True)
        write_parquet(out / "scores.parquet", files.as_table(table, files.SCORES))
        write_parquet(out / "effects.parquet", self._effects(losses, said))
        summary = {
            "groups": len(self.groups),
            "models": len(losses),
            "queries": int(known.sum()),
            "primary_bandwidth": entries[0],
            "verdicts": {"subsets": verdict(table)},
        }
        write_json(out / "summary.json", summary)
        write_json(
            done,
            {
                "command": "subsets",
                "version": lmd3.__version__,
                "settings": self.settings.to_dict(),
                "inputs": self._fingerprint,
                "seconds": round(time.monotonic() - started, 3),
            },
        )
        return summary

    def _scores(self, losses: Floats, entries: list[dict[str, Any]], said: dict[str, Floats]) -> pd.DataFrame:
        """`SCORES` of every predictor; the random ones are one, whose interval has their spread in it."""
        included, settings = self.included, self.settings
        halves = settings.design == HALVES

        def draws(name: str) -> pd.DataFrame | None:
            if not halves:
                return None
            return resampled(losses, included, said[name], draws=settings.draws, seed=settings.seed)

        nearest = scores(losses, included, said["max_cosine"])
        nearest_draws = draws("max_cosine")
        dealt = pd.DataFrame(
            [scores(losses, included, said[name]) for name in said if name.startswith("random:")]
        )
        rows = []
        for name, predicted in said.items():
            if name.startswith("random:") and name != "random:0":
                continue
            number = int(name.split(":")[1]) if name.startswith("density:") else None
            found = scores(losses, included, predicted)
            redrawn = draws(name)
            for score, estimate in found.items():
                low: float | None = None
                high: float | None = None
                over: dict[str, float | None] = {}
                if redrawn is not None:
                    low, high = interval(estimate, redrawn[score])
                if name == "random:0":
                    half = 0.0 if low is None or high is None else (high - low) / 2
                    half = float(np.hypot(half, 1.959964 * dealt[score].std(ddof=1)))
                    estimate = float(dealt[score].mean())
                    low, high = estimate - half, estimate + half
                elif number is not None:
                    over["over_max_cosine"] = estimate - nearest[score]
                    if redrawn is not None and nearest_draws is not None:
                        gap = interval(estimate - nearest[score], redrawn[score] - nearest_draws[score])
                        over |= {"over_low": gap[0], "over_high": gap[1]}
                rows.append(
                    {
                        "predictor": name.split(":")[0],
                        "bandwidth": None if number is None else entries[number]["bandwidth"],
                        "rule": None if number is None else entries[number]["rule"],
                        "score": score,
                        "estimate": estimate,
                        "ci_low": low,
                        "ci_high": high,
                        **over,
                        "n": losses.shape[1],
                        "models": len(losses),
                        "primary": number in (0, None),
                    }
                )
        return pd.DataFrame(rows)

    def _effects(self, losses: Floats, said: dict[str, Floats]) -> pa.Table:
        measured = measured_effects(losses, self.included)
        queries = self.records.take(self.query_rows)
        n, g = measured.shape
        frame = pd.DataFrame(
            {
                "id": np.repeat(np.array(queries.ids, dtype=object), g),
                "own_group": np.repeat(np.array(queries.groups, dtype=object), g),
                "group": np.tile(np.array(self.groups, dtype=object), n),
                "measured": measured.ravel(),
                "density": measured_effects(said["density:0"], self.included).ravel(),
                "max_cosine": measured_effects(said["max_cosine"], self.included).ravel(),
            }
        )
        return files.as_table(frame, files.EFFECTS)


def verdict(table: pd.DataFrame) -> str:
    """What the scores say, in one sentence."""
    rows: Any = table[table["primary"] & (table["score"] == "effects")].set_index("predictor")

    def said(name: str) -> str:
        row = rows.loc[name]
        interval = "" if pd.isna(row["ci_low"]) else f" [{row['ci_low']:.2f}, {row['ci_high']:.2f}]"
        return f"{row['estimate']:.2f}{interval}"

    density = rows.loc["density"]
    gap, low, high = (density[name] for name in ("over_max_cosine", "over_low", "over_high"))
    if pd.isna(low):
        told = "above" if gap > 0 else "not above"
    else:
        told = "above" if low > 0 else "below" if high < 0 else "not told apart from"
    by = "" if pd.isna(low) else f" (difference {gap:+.2f} [{low:+.2f}, {high:+.2f}])"
    return (
        f"Over {int(density['models'])} models, the change that densities per group predict has a rank"
        f" correlation of {said('density')} with the measured one; {told} that of the largest cosine,"
        f" {said('max_cosine')}{by}; of a random predictor {said('random')}."
    )
