"""The demonstration: density and perplexity on real text, offline, without torch, in two minutes.

Part one (the paper's claim C): an n-gram model is trained on paragraphs of documentation, and the density
of these paragraphs at held-out ones is related to what the model pays for them. Part two (claims A and B):
some held-out paragraphs are leaked into the training text, and both the density and the model answer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lmd3.bandwidth import DEFAULT_RULES
from lmd3.errors import InputError
from lmd3.experiments.documentation import PACKAGES, Paragraph, paragraphs
from lmd3.progress import ProgressFactory
from lmd3.results import DensityTable

Floats = NDArray[np.float64]

#: The package that nothing is trained on.
UNTRAINED = "statsmodels"
#: Share of the trained packages' paragraphs that is held out, and of the untrained package's that is scored.
HELD_OUT, SCORED = 0.08, 0.16
#: The arms of the leak with the copies they add, one paragraph each in a block; `none` stands twice.
ARMS: tuple[tuple[str, int], ...] = (
    ("none", 0),
    ("none", 0),
    ("exact", 1),
    ("exact", 4),
    ("dropout", 1),
    ("dropout", 4),
)
#: Paragraphs in the leak: 80 blocks.
LEAKED = 480
#: Share of the words that a paragraph loses when it is leaked with word dropout.
DROPPED = 0.2


@dataclass(frozen=True, slots=True)
class Relation:
    """What density says about loss over one set of paragraphs, in shares of variance (R²).

    Attributes:
        n: paragraphs.
        controls: length, unigram cross-entropy and typicality.
        density: what log density adds to the controls.
        cosine: what the largest cosine to a training paragraph adds to the controls.
        density_beyond_cosine: what log density adds to both.
        slope: change of the loss (nats per token) for one standard deviation of log density, given controls.
        std_error: its standard error (HC3).
        slope_within: the same with an effect for every package, where there are several.
        std_error_within: its standard error.
    """

    n: int
    controls: float
    density: float
    cosine: float
    density_beyond_cosine: float
    slope: float
    std_error: float
    slope_within: float | None
    std_error_within: float | None


@dataclass(frozen=True, slots=True)
class Arm:
    """One arm of the leak: the same paragraphs with and without it.

    Attributes:
        kind: none, exact or dropout.
        copies: copies added to the training text.
        n: paragraphs.
        loss: mean change of the loss, nats per token.
        loss_error: its standard error.
        log_density: median change of log density.
    """

    kind: str
    copies: int
    n: int
    loss: float
    loss_error: float
    log_density: float


@dataclass(frozen=True, slots=True)
class Leak:
    """What the leak did: its arms, and the loss against the density over their paragraphs.

    Attributes:
        arms: the arms, `none` first.
        n: paragraphs.
        added: paragraphs added to the training text, copies counted.
        slope: change of the loss for a change of 1 in log density, all arms.
        std_error: its standard error (HC3).
        r_squared: share of the variance of the change of loss.
        slope_dropout: the same over the arms `none` and `dropout` alone.
        std_error_dropout: its standard error.
        r_squared_dropout: its share of variance.
    """

    arms: tuple[Arm, ...]
    n: int
    added: int
    slope: float
    std_error: float
    r_squared: float
    slope_dropout: float
    std_error_dropout: float
    r_squared_dropout: float


@dataclass(frozen=True, slots=True)
class Demo:
    """The demonstration's results.

    Attributes:
        folder: where its files are.
        report: the page.
        corpus: training paragraphs.
        packages: the packages trained on.
        untrained_package: the one that is not.
        bandwidth: the primary bandwidth.
        trained: the held-out paragraphs of the trained packages.
        untrained: paragraphs of the untrained package.
        leak: the second part.
        slope_all_controls: slope and its 95 % interval of the report, which holds near-copies fixed too.
        seconds: wall-clock time.
    """

    folder: Path
    report: Path
    corpus: int
    packages: tuple[str, ...]
    untrained_package: str
    bandwidth: float
    trained: Relation
    untrained: Relation
    leak: Leak
    slope_all_controls: tuple[float, float, float]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The results as JSON values."""
        return asdict(self) | {"folder": str(self.folder), "report": str(self.report)}

    def summary(self) -> str:
        """The results in plain words, for one screen."""
        return _summary(self)


def run_demo(
    folder: str | Path,
    *,
    seed: int = 0,
    threads: int | None = None,
    progress: ProgressFactory | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Demo:
    """Runs the demonstration and writes its texts, store, tables, summary and report into a folder.

    Args:
        folder: where; made if need be, the files of an earlier demonstration are replaced.
        seed: of the split, the leak and the word dropout.
        threads: threads of the scans (None: all cores).
        progress: shows long steps.
        say: told in a line what happens next.

    Returns:
        The results; `summary()` says them in words.
    """
    import pyarrow.parquet as pq

    import lmd3
    from lmd3.encoders.hashing import HashingEncoder
    from lmd3.performance import outcome_table
    from lmd3.performance.ngram import NgramModel

    start = time.monotonic()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    say(f"Reading the documentation of {', '.join(PACKAGES)} ...")
    training, held_out, unseen = split(paragraphs(progress=progress), np.random.default_rng([seed, 0]))
    queries = held_out + unseen
    _write_texts(folder / "corpus.jsonl", training)
    _write_texts(folder / "queries.jsonl", queries)
    ids = [paragraph.id for paragraph in queries]
    groups = [paragraph.group for paragraph in queries]

    say(f"Encoding {len(training):,} paragraphs as training text, {len(queries):,} as queries ...")
    encoder = HashingEncoder()
    corpus = lmd3.encode(
        lmd3.read_texts(folder / "corpus.jsonl", group="group"),
        encoder,
        out=folder / "corpus.lmd3",
        force=True,
        progress=progress,
    )
    encoded = lmd3.encode_queries(lmd3.read_texts(folder / "queries.jsonl", group="group"), corpus)

    say("Summing the kernels of all pairs: density ...")
    estimator = lmd3.KernelDensity(bandwidth=list(DEFAULT_RULES), threads=threads)
    table = estimator.fit(corpus).density(encoded, neighbors=10, progress=progress)
    table.save(folder / "density")
    covariates = lmd3.compute_covariates(corpus, encoded)
    pq.write_table(covariates, folder / "covariates.parquet")

    say("Training the n-gram model and scoring the queries: performance ...")
    model = NgramModel(paragraph.text for paragraph in training)
    scores = model.score([paragraph.text for paragraph in queries])
    loss = scores.nats / scores.tokens
    outcomes = outcome_table(ids, scores, groups)
    pq.write_table(outcomes, folder / "outcomes.parquet")

    say("Relating the two ...")
    # The first rows are those of the primary bandwidth, in the order of the queries.
    log_density = _columns(table.density.slice(0, len(ids)), ids, "log_density")[:, 0]
    max_cosine = _columns(table.queries, ids, "max_cosine")[:, 0]
    controls = _columns(covariates, ids, "log_tokens", "unigram_cross_entropy", "typicality")

    def related(rows: slice) -> Relation:
        return relate(loss[rows], controls[rows], log_density[rows], max_cosine[rows], groups[rows])

    trained, untrained = related(slice(len(held_out))), related(slice(len(held_out), None))
    study = lmd3.analysis.regress(
        outcomes.filter((pc.field("outcome") == "nats_per_token") & (pc.field("group") != UNTRAINED)),
        _of_queries(table, ids[: len(held_out)]),
        covariates=covariates,
        within="group",
    )
    study.save(folder / "analysis")
    headline = study.facts["primary"]
    report = folder / "report.html"
    lmd3.write_report(study, table, report, queries=folder / "queries.jsonl")

    say("Leaking held-out paragraphs into the training text and training again ...")
    random = np.random.default_rng([seed, 1])
    texts = [paragraph.text for paragraph in held_out]
    plan = plan_leak(log_density[: len(held_out)], random)
    added, placebos = added_texts(plan, texts, random)
    items = [texts[item] for item in plan.items]
    vectors = encoder.encode(items).vectors

    def after(more: list[str]) -> tuple[Floats, Floats]:
        """Loss and log density of the items when these texts are added to the training text."""
        scores = model.copy().add(more).score(items)
        primary = table.primary
        kernel = lmd3.KernelDensity(
            kernel=primary["kernel"], bandwidth=primary["bandwidth"], normalize=False, threads=threads
        )
        of_added = kernel.fit(encoder.encode(more).vectors).score_samples(vectors)
        # Densities add: (n + m) f' = n f + m g.
        n, m = corpus.n, len(more)
        total = np.logaddexp(log_density[plan.items] + np.log(n), of_added + np.log(m)) - np.log(n + m)
        return scores.nats / scores.tokens, total

    (loss_leak, density_leak), (loss_control, density_control) = after(added), after(placebos)
    demo = Demo(
        folder=folder,
        report=report,
        corpus=len(training),
        packages=tuple(package for package in PACKAGES if package != UNTRAINED),
        untrained_package=UNTRAINED,
        bandwidth=float(table.primary["bandwidth"]),
        trained=trained,
        untrained=untrained,
        leak=relate_leak(plan.arms, loss_leak - loss_control, density_leak - density_control, len(added)),
        slope_all_controls=(headline["estimate"], headline["ci_low"], headline["ci_high"]),
        seconds=time.monotonic() - start,
    )
    (folder / "demo.json").write_text(json.dumps(demo.to_dict(), indent=1) + "\n", encoding="utf-8")
    (folder / "summary.txt").write_text(demo.summary() + "\n", encoding="utf-8")
    return demo


def _of_queries(table: DensityTable, ids: Sequence[str]) -> DensityTable:
    """The tables of some queries only."""
    chosen = pc.field("id").isin(pa.array(ids, pa.string()))
    return replace(
        table,
        density=table.density.filter(chosen),
        queries=table.queries.filter(chosen),
        neighbors=table.neighbors.filter(chosen),
    )


def _columns(table: pa.Table, ids: Sequence[str], *names: str) -> Floats:
    """Columns of a table in the order of ids, shape (ids, names)."""
    row = {identifier: number for number, identifier in enumerate(table["id"].to_pylist())}
    order = [row[identifier] for identifier in ids]
    return np.column_stack([table[name].to_numpy().astype(np.float64)[order] for name in names])


def _write_texts(path: Path, found: Sequence[Paragraph]) -> None:
    """Paragraphs as JSON lines (id, group, text)."""
    with path.open("w", encoding="utf-8") as file:
        for paragraph in found:
            file.write(json.dumps(asdict(paragraph), ensure_ascii=False) + "\n")


# --- design ---


def split(
    found: Sequence[Paragraph], random: np.random.Generator
) -> tuple[list[Paragraph], list[Paragraph], list[Paragraph]]:
    """Training paragraphs, held-out ones of the same packages, and some of the untrained package."""
    draws = random.random(len(found))
    training, held_out, unseen = [], [], []
    for paragraph, draw in zip(found, draws, strict=True):
        if paragraph.group == UNTRAINED:
            if draw < SCORED:
                unseen.append(paragraph)
        elif draw < HELD_OUT:
            held_out.append(paragraph)
        else:
            training.append(paragraph)
    return training, held_out, unseen


@dataclass(frozen=True, slots=True)
class LeakPlan:
    """Which paragraphs are leaked how.

    Attributes:
        items: positions of the paragraphs studied, block after block.
        arms: the arm of each, an index into `ARMS`.
        placebos: positions of other paragraphs, one for each item leaked: the control model gets them.
    """

    items: NDArray[np.int64]
    arms: NDArray[np.int64]
    placebos: NDArray[np.int64]


def plan_leak(log_density: Floats, random: np.random.Generator, items: int = LEAKED) -> LeakPlan:
    """Draws the paragraphs of a leak and assigns the arms in blocks of like density.

    Args:
        log_density: of every held-out paragraph, shape (n,), before the leak.
        random: source of the draws.
        items: how many are studied at most; fewer where the paragraphs don't suffice for their placebos too.
    """
    size = len(ARMS)
    leaked = sum(copies > 0 for _, copies in ARMS)
    blocks = min(items // size, len(log_density) // (size + leaked))
    if blocks < 2:
        raise InputError(f"{len(log_density)} held-out paragraphs are too few for a leak")
    order = random.permutation(len(log_density))
    chosen = order[: blocks * size]
    chosen = chosen[np.argsort(log_density[chosen], kind="stable")]
    arms = np.concatenate([random.permutation(size) for _ in range(blocks)])
    return LeakPlan(chosen, arms, order[blocks * size : blocks * (size + leaked)])


def drop_words(text: str, random: np.random.Generator, share: float = DROPPED) -> str:
    """The text without a random share of its words, never without all."""
    words = text.split()
    kept = random.random(len(words)) >= share
    if not kept.any():
        kept[0] = True
    return " ".join(word for word, keep in zip(words, kept, strict=True) if keep)


def added_texts(
    plan: LeakPlan, texts: Sequence[str], random: np.random.Generator
) -> tuple[list[str], list[str]]:
    """What the leak adds to the training text, and what is added in its place for the control model."""
    leak: list[str] = []
    control: list[str] = []
    placebos = iter(plan.placebos)
    for item, arm in zip(plan.items, plan.arms, strict=True):
        kind, copies = ARMS[arm]
        if copies:
            leak += [drop_words(texts[item], random) if kind == "dropout" else texts[item]] * copies
            control += [texts[next(placebos)]] * copies
    return leak, control


# --- statistics ---


def _fit(outcome: Floats, *columns: Floats) -> Any:
    """Ordinary least squares with an intercept and HC3 errors: statsmodels' results."""
    import statsmodels.api as sm

    return sm.OLS(outcome, sm.add_constant(np.column_stack(columns))).fit(cov_type="HC3")


def _standardised(values: Floats) -> Floats:
    return np.asarray((values - values.mean()) / values.std(ddof=1))


def relate(
    loss: Floats, controls: Floats, log_density: Floats, max_cosine: Floats, groups: Sequence[str]
) -> Relation:
    """Relates loss to density, with and without the controls' and the largest cosine's help.

    Args:
        loss: nats per token, shape (n,).
        controls: one column each, shape (n, c).
        log_density: shape (n,).
        max_cosine: shape (n,).
        groups: the package of each paragraph.
    """
    density = _standardised(log_density)
    base = _fit(loss, controls)
    with_density = _fit(loss, controls, density)
    with_cosine = _fit(loss, controls, max_cosine)
    with_both = _fit(loss, controls, max_cosine, density)
    names = sorted(set(groups))
    effects = [np.array([group == name for group in groups], dtype=np.float64) for name in names[1:]]
    within = _fit(loss, controls, *effects, density) if effects else None
    return Relation(
        n=len(loss),
        controls=float(base.rsquared),
        density=float(with_density.rsquared - base.rsquared),
        cosine=float(with_cosine.rsquared - base.rsquared),
        density_beyond_cosine=float(with_both.rsquared - with_cosine.rsquared),
        slope=float(with_density.params[-1]),
        std_error=float(with_density.bse[-1]),
        slope_within=None if within is None else float(within.params[-1]),
        std_error_within=None if within is None else float(within.bse[-1]),
    )


def relate_leak(arms: NDArray[np.int64], loss: Floats, log_density: Floats, added: int) -> Leak:
    """Relates the changes of loss to the changes of log density that a leak caused.

    Args:
        arms: the arm of each paragraph, an index into `ARMS`.
        loss: change of the loss of each, nats per token.
        log_density: change of the log density of each.
        added: paragraphs added, copies counted.
    """
    kinds = sorted(set(ARMS), key=lambda arm: (arm[0] != "none", arm[0] == "exact", arm[1]))
    results = []
    for kind, copies in kinds:
        inside = np.isin(arms, [number for number, arm in enumerate(ARMS) if arm == (kind, copies)])
        n = int(inside.sum())
        error = float(loss[inside].std(ddof=1) / np.sqrt(n))
        results.append(
            Arm(kind, copies, n, float(loss[inside].mean()), error, float(np.median(log_density[inside])))
        )
    every = _fit(loss, log_density)
    mild = np.isin(arms, [number for number, (kind, _) in enumerate(ARMS) if kind != "exact"])
    dropout = _fit(loss[mild], log_density[mild])
    return Leak(
        arms=tuple(results),
        n=len(arms),
        added=added,
        slope=float(every.params[-1]),
        std_error=float(every.bse[-1]),
        r_squared=float(every.rsquared),
        slope_dropout=float(dropout.params[-1]),
        std_error_dropout=float(dropout.bse[-1]),
        r_squared_dropout=float(dropout.rsquared),
    )


# --- words ---


def _summary(demo: Demo) -> str:
    trained, untrained, leak = demo.trained, demo.untrained, demo.leak
    slope, low, high = demo.slope_all_controls
    lines = [
        f"lmd3 demo: {demo.corpus:,} paragraphs of the documentation of {', '.join(demo.packages)}",
        "train a small n-gram model. How well does it predict paragraphs that it has not seen?",
        "",
        "1. Is the model better where its training text is dense?",
        f"   Loss on {trained.n:,} held-out paragraphs: share of the variance explained (R2) by",
        f"      length, word frequency and typicality    {trained.controls:5.2f}",
        f"      log density, beyond these               {trained.density:+6.2f}",
        "   One standard deviation of log density is worth"
        f" {trained.slope:+.2f} ({trained.std_error:.2f}) nats per token;",
    ]
    if trained.slope_within is not None:
        within = f"{trained.slope_within:+.2f} ({trained.std_error_within:.2f})"
        lines.append(f"   comparing paragraphs of the same package only, {within}.")
    lines += [
        f"   In {demo.untrained_package}, which the model never saw, log density adds {untrained.density:.2f}"
        f" ({untrained.n:,} paragraphs).",
        "",
        "2. Does the loss fall because the density rises?",
        f"   {leak.n} held-out paragraphs, arms drawn by lot; {leak.added} texts leaked into the training",
        "   text, other paragraphs added in their place for the control model.",
        "      arm                 change of loss      change of log density",
    ]
    for arm in leak.arms:
        copies = f", {arm.copies} {'copy' if arm.copies == 1 else 'copies'}"
        name = "not leaked" if arm.kind == "none" else arm.kind + copies
        loss = f"{arm.loss:+.2f} ({arm.loss_error:.2f})"
        lines.append(f"      {name:<19} {loss:>14} {arm.log_density:>+26.1f}")
    lines += [
        "   (dropout: a copy that lacks a fifth of its words)",
        f"   Both move together: {leak.slope:+.3f} ({leak.std_error:.3f}) nats per unit of log density,"
        f" R2 {leak.r_squared:.2f};",
        f"   without the exact copies {leak.slope_dropout:+.3f} ({leak.std_error_dropout:.3f}),"
        f" R2 {leak.r_squared_dropout:.2f}.",
        "",
        "What this does not show",
        "   * That density says more than the nearest text does: the largest cosine alone adds"
        f" {trained.cosine:.2f},",
        f"     log density then {trained.density_beyond_cosine:.3f}."
        " The built-in encoder compares words, and",
        "     documentation is full of near-copies. With a neural encoder the answer may differ.",
        "   * That it says more than shared word sequences do: the report holds the n-gram overlap with the",
        "     training text and duplicates fixed too, and is left with"
        f" {slope:+.2f} ({low:+.2f} to {high:+.2f}).",
        "   * That a neural model would behave so: an n-gram model repeats what it read.",
        "   * A cause, in part 1: that is a correlation. Only part 2 changes the training text.",
        "",
        f"Report: {demo.report}",
        f"Files:  {demo.folder} (texts, store, tables; {demo.seconds:.0f} s)",
    ]
    return "\n".join(lines)
