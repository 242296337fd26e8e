"""Rivals of density as predictors of a query's loss, in the same ladder, with their cost.

* In-context probing (arXiv 2407.12259): how much the loss of the query falls when a training text stands
  before it, over the query's nearest training texts.
* Mirrored influence (arXiv 2402.08922): how much the loss of these training texts falls after one gradient
  step on the query.

Both are means over the k nearest training texts. What they add to the controls (ΔR²), to the controls and
log density, and what log density adds to them, stands beside the seconds that they took; log density's own
seconds are those of its scan. Unique-fragment leakage (Inan et al. 2021) is an outcome: the share of
n-grams that stand in exactly one training text and that the model reproduces, related to the density of the
training texts around that text, itself left out.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from lmd3 import experiment_files as files
from lmd3.errors import ParameterError
from lmd3.experiments.pretrain_analysis import CONTROLS, load, r_squared, relation
from lmd3.progress import ProgressFactory, silent
from lmd3.results import write_parquet

if TYPE_CHECKING:
    from lmd3.experiments.pretrain import Pretrain

Floats = NDArray[np.float64]

#: Outcomes of the ladder.
LOSS, FRAGMENTS = "nats_per_token", "unique_fragments"


def in_context(folder: Path, queries: Sequence[str], neighbors: Sequence[Sequence[str]]) -> Floats:
    """(q,) mean fall of a query's nats per token when one of its training texts stands before it.

    Args:
        folder: of the model.
        queries: q texts.
        neighbors: their nearest training texts.
    """
    from lmd3.performance.perplexity import CausalModel

    model = CausalModel(folder)
    alone = model.score(queries)
    prompts = [text for texts in neighbors for text in texts]
    repeated = [query for query, texts in zip(queries, neighbors, strict=True) for _ in texts]
    after = model.score(repeated, prompts)
    with np.errstate(invalid="ignore", divide="ignore"):
        base = alone.nats / alone.tokens
        changed = after.nats / after.tokens
    bounds = np.cumsum([0, *(len(texts) for texts in neighbors)])
    means = [changed[low:high].mean() for low, high in pairwise(bounds)]
    return np.asarray(base - np.array(means))


def mirrored(
    folder: Path,
    queries: Sequence[str],
    neighbors: Sequence[Sequence[str]],
    *,
    rate: float = 1e-2,
    progress: ProgressFactory | None = None,
) -> Floats:
    """(q,) mean fall of the training texts' nats per token after one step of gradient descent on the query.

    Args:
        folder: of the model.
        queries: q texts.
        neighbors: their nearest training texts.
        rate: length of the step; the gradient is scaled to norm 1.
        progress: shows the queries.
    """
    import torch

    from lmd3.experiments.training import load_model, load_tokenizer

    tokenizer, model = load_tokenizer(str(folder)), load_model(str(folder))
    model.eval()
    weights = [p for p in model.parameters() if p.requires_grad]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    limit = int(getattr(model.config.get_text_config(), "max_position_embeddings", 1 << 30))

    def tokens(text: str) -> Any:
        ids = start + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor([ids[:limit]])

    def batch_loss(texts: Sequence[str]) -> float:
        encoded = [tokens(text)[0] for text in texts]
        width = max(len(ids) for ids in encoded)
        ids = torch.zeros((len(encoded), width), dtype=torch.long)
        labels = torch.full((len(encoded), width), -100)
        for row, found in enumerate(encoded):
            ids[row, : len(found)] = found
            labels[row, : len(found)] = found
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
            )
        kept = labels[:, 1:] != -100
        return float((losses.sum(dim=1) / kept.sum(dim=1).clamp(min=1)).mean())

    out = np.full(len(queries), np.nan)
    with (progress or silent)("mirrored influence", len(queries), "queries") as bar:
        for row, (query, texts) in enumerate(zip(queries, neighbors, strict=True)):
            ids = tokens(query)
            if ids.shape[1] < 2:
                continue
            before = batch_loss(texts)
            gradients = torch.autograd.grad(model(input_ids=ids, labels=ids, use_cache=False).loss, weights)
            norm = float(torch.sqrt(sum((g * g).sum() for g in gradients)))
            step = rate / max(norm, 1e-12)
            with torch.no_grad():
                kept = [p.clone() for p in weights]
                for p, g in zip(weights, gradients, strict=True):
                    p.sub_(g, alpha=step)
                out[row] = before - batch_loss(texts)
                # The very numbers: adding the step back would leave rounding behind.
                for p, old in zip(weights, kept, strict=True):
                    p.copy_(old)
            bar.update(row + 1)
    return out


def unique_fragments(
    folder: Path, texts: Sequence[str], *, length: int = 4, most: int = 400, seed: int = 0
) -> pa.Table:
    """Unique-fragment leakage of training texts under the model that read them.

    A fragment is a run of `length` tokens that stands in exactly one of the texts; it is reproduced where
    each of its tokens is the likeliest after those before it.

    Args:
        folder: of the model.
        texts: all that it was trained on.
        length: tokens of a fragment.
        most: texts that are looked at, drawn by lot.
        seed: of the draw.

    Returns:
        row, fragments, reproduced, share (null without a unique fragment).
    """
    from lmd3.experiments.training import load_tokenizer
    from lmd3.performance.generation import Generator

    tokenizer = load_tokenizer(str(folder))
    generator = Generator(folder)
    encoded = [
        tuple(ids)
        for start in range(0, len(texts), 1000)
        for ids in tokenizer(list(texts[start : start + 1000]), add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
    ]
    holders: Counter[tuple[int, ...]] = Counter()
    for ids in encoded:
        holders.update({ids[at : at + length] for at in range(len(ids) - length + 1)})
    rows = np.random.default_rng([seed, 50]).permutation(len(texts))[:most]
    found: dict[str, list[Any]] = {"row": [], "fragments": [], "reproduced": [], "share": []}
    for row in rows:
        ids = encoded[row]
        hits = generator.argmax_hits(texts[row])[-len(ids) :] if ids else np.zeros(0, dtype=np.bool_)
        cut = ids[: len(hits)]
        unique = [at for at in range(len(cut) - length + 1) if holders[cut[at : at + length]] == 1]
        hit = sum(bool(hits[at : at + length].all()) for at in unique)
        found["row"].append(int(row))
        found["fragments"].append(len(unique))
        found["reproduced"].append(hit)
        found["share"].append(hit / len(unique) if unique else None)
    return pa.table(found)


def run_rivals(
    experiment: Pretrain,
    *,
    queries: int = 400,
    k: int = 5,
    progress: ProgressFactory | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Measures the rivals on a sample of the held-out texts of a finished `pretrain`, writes
    `analysis/rivals.parquet` and `fragments.parquet`, and returns the verdict.

    Args:
        experiment: prepared, trained and measured, with a neural model.
        queries: held-out texts looked at, drawn by lot.
        k: nearest training texts of each.
        progress, say: as elsewhere.

    Raises:
        ParameterError: an n-gram model, which has no gradients.
    """
    if experiment.settings.model == "ngram":
        raise ParameterError("rivals need a neural model", remedy="--model scratch")
    folder = experiment.model_folder()
    frame, _ = load(experiment.folder)
    frame = frame[frame["role"] == "held_out"].dropna(subset=["value:base", *CONTROLS])
    random = np.random.default_rng([experiment.settings.seed, 51])
    chosen = frame.iloc[np.sort(random.permutation(len(frame))[:queries])].reset_index(drop=True)
    table = experiment.density
    near = table.neighbors.to_pandas()
    text_of = dict(zip(experiment.train_texts.ids, experiment.train_texts.texts, strict=True))
    of_query = near[near["rank"] <= k + int(near["rank"].min()) - 1].groupby("id")["neighbor_id"].apply(list)
    neighbors = [[text_of[name] for name in of_query[name_of]] for name_of in chosen["id"]]
    own = dict(zip(experiment.queries.ids, experiment.queries.texts, strict=True))
    texts = [own[name] for name in chosen["id"]]
    say(f"In-context probing of {len(texts)} queries with {k} training texts each ...")
    seconds = {"log_density": float(table.run["seconds"]) * len(texts) / len(table.queries)}
    started = time.monotonic()
    values = {"in_context": in_context(folder, texts, neighbors)}
    seconds["in_context"] = time.monotonic() - started
    say("Mirrored influence ...")
    started = time.monotonic()
    values["mirrored_influence"] = mirrored(folder, texts, neighbors, progress=progress)
    seconds["mirrored_influence"] = time.monotonic() - started
    say("Unique fragments ...")
    fragments = unique_fragments(folder, experiment.train_texts.texts, seed=experiment.settings.seed)
    fragments = fragments.append_column(
        "log_density", pa.array(left_out_density(experiment, fragments["row"].to_numpy(), table.run))
    )
    values["log_density"] = chosen["density:0"].to_numpy()
    values["max_cosine"] = chosen["max_cosine"].to_numpy()
    rows = ladder(chosen.assign(value=chosen["value:base"]), values, seconds)
    leaked = leakage(experiment, fragments)
    if leaked is not None:
        rows = pd.concat([rows, pd.DataFrame([leaked])], ignore_index=True)
    out = experiment.folder / "analysis"
    write_parquet(out / "rivals.parquet", files.as_table(rows, files.RIVALS))
    write_parquet(out / "fragments.parquet", fragments)
    return verdict(rows, fragments)


def left_out_density(experiment: Pretrain, rows: NDArray[np.int64], run: dict[str, Any]) -> Floats:
    """(r,) log density of training texts under all others, at the primary bandwidth of a density run."""
    from lmd3.experiments.leak_density import log_kernels, log_sum

    entry = run["bandwidths"][0]
    vectors = experiment.vectors(experiment.train_texts, "train")
    others = np.ones(len(vectors), dtype=np.int64)
    out = np.empty(len(rows))
    for place, row in enumerate(rows):
        others[row] = 0
        kernels = log_kernels(entry["kernel"], entry["bandwidth"], vectors[row : row + 1], vectors)
        out[place] = log_sum(kernels, others)[0] - np.log(len(vectors) - 1)
        others[row] = 1
    return out


def leakage(experiment: Pretrain, fragments: pa.Table) -> dict[str, Any] | None:
    """The share of unique fragments reproduced on log density, with length, within groups; None where no two
    shares differ.
    """
    frame = fragments.to_pandas().dropna(subset=["share"]).reset_index(drop=True)
    if len(frame) < 10 or frame["share"].nunique() < 2:
        return None
    groups = experiment.train_texts.groups or ()
    texts = experiment.train_texts.texts
    frame["group"] = [groups[row] for row in frame["row"]]
    frame["log_words"] = [np.log(len(texts[row].split()) + 1) for row in frame["row"]]
    frame["value"] = frame["share"]
    try:
        found = relation(frame, frame["log_density"].to_numpy(), ["log_words"], True)
    except ParameterError:
        return None
    kept = ("estimate", "std_error", "p_value", "delta_r_squared", "n")
    about = {"predictor": "log_density", "outcome": FRAGMENTS, "effects": "within"}
    return about | {name: found[name] for name in kept}


def ladder(frame: pd.DataFrame, values: dict[str, Floats], seconds: dict[str, float]) -> pd.DataFrame:
    """What every predictor adds to the controls and to log density, and log density to it, within groups."""
    frame = frame.reset_index(drop=True).copy()
    effects = frame["group"] if frame["group"].nunique() > 1 else None
    frame["log_density"] = values["log_density"]
    base = r_squared(frame, CONTROLS, effects)
    density = r_squared(frame, [*CONTROLS, "log_density"], effects)
    rows = []
    for name, predictor in values.items():
        known = np.isfinite(predictor)
        found = relation(frame[known], predictor[known], CONTROLS, True)
        frame["rival"] = np.where(known, predictor, np.nanmean(predictor))
        alone = r_squared(frame, [*CONTROLS, "rival"], effects)
        both = (
            alone if name == "log_density" else r_squared(frame, [*CONTROLS, "log_density", "rival"], effects)
        )
        rows.append(
            {
                "predictor": name,
                "outcome": LOSS,
                "effects": "within",
                "estimate": found["estimate"],
                "std_error": found["std_error"],
                "p_value": found["p_value"],
                "delta_r_squared": alone - base,
                "delta_over_density": None if name == "log_density" else both - density,
                "density_over_it": None if name == "log_density" else both - alone,
                "seconds": seconds.get(name),
                "seconds_per_query": seconds[name] / len(frame) if name in seconds else None,
                "n": int(known.sum()),
            }
        )
    return pd.DataFrame(rows)


def verdict(rows: pd.DataFrame, fragments: pa.Table) -> str:
    """The rivals in one sentence."""
    said = "; ".join(
        f"{row['predictor']} ΔR² {row['delta_r_squared']:.3f}"
        + (f" in {row['seconds']:.1f} s" if pd.notna(row["seconds"]) else "")
        for row in rows[rows["outcome"] == LOSS].to_dict("records")
    )
    total = sum(fragments["fragments"].to_pylist())
    share = sum(fragments["reproduced"].to_pylist()) / total if total else float("nan")
    sentence = (
        f"Beyond the controls, within groups, over {int(rows['n'].iloc[0])} queries: {said}. Of {total:,}"
        f" fragments that stand in one training text only the model reproduces {share:.2%}"
    )
    for row in rows[rows["outcome"] == FRAGMENTS].to_dict("records"):
        sentence += (
            f"; the share of a text changes by {100 * row['estimate']:+.2f} percentage points for a standard"
            f" deviation of log density, itself left out (standard error {100 * row['std_error']:.2f},"
            f" p = {row['p_value']:.2g})"
        )
    return sentence + "."
