"""`lmd3 study`: the whole job in one command, from texts or vectors to a report."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmd3.cli._common import (
    BandwidthOption,
    ForceOption,
    GroupOption,
    IdOption,
    KernelOption,
    OutcomeIdOption,
    OutcomeValueOption,
    OutOption,
    SeedOption,
    TextOption,
    ThreadsOption,
    WeightOption,
    emit,
    existing,
    is_texts,
    notice,
    prepare_output,
    progress,
    read_outcomes,
)
from lmd3.cli._density import (
    AdaptiveOption,
    AddressOption,
    AnyEncoderOption,
    ExecutorOption,
    GroupsOption,
    IndexOption,
    IoOption,
    MemoryOption,
    MethodOption,
    PrecisionOption,
    ToleranceOption,
    parse_bytes,
)
from lmd3.cli._density import (
    estimating as estimating_by,
)
from lmd3.cli._steps import Step, Steps, fingerprint
from lmd3.cli.encode import (
    BackendOption,
    ChunkOption,
    ChunkOverlapOption,
    ChunkTokensOption,
    KeepExactOption,
    SampleByOption,
    SampleOption,
    WindowOption,
    WorkersOption,
)
from lmd3.cli.encode import PrecisionOption as EncodePrecisionOption
from lmd3.errors import OtherJobError, ParameterError

if TYPE_CHECKING:
    from lmd3.store import Store
    from lmd3.texts import Texts


def _column_of(side: str, what: str) -> Any:
    return typer.Option(f"--{side}-{what}", metavar="COL", help=f"--{what} of the {side} only.")


CorpusText = Annotated[str | None, _column_of("corpus", "text")]
CorpusId = Annotated[str | None, _column_of("corpus", "id")]
CorpusGroup = Annotated[str | None, _column_of("corpus", "group")]
QueryText = Annotated[str | None, _column_of("query", "text")]
QueryId = Annotated[str | None, _column_of("query", "id")]
QueryGroup = Annotated[str | None, _column_of("query", "group")]


@dataclass(frozen=True)
class _Side:
    """The corpus or the queries: texts that are encoded into `rows`, or rows that are there already."""

    source: Path
    is_texts: bool
    columns: dict[str, str | None]
    rows: Path

    @classmethod
    def of(cls, source: Path, encoded: Path, **columns: str | None) -> _Side:
        """The side of a source; `encoded` is where its texts' vectors go."""
        texts = is_texts(source)
        return cls(source, texts, columns, encoded if texts else source)

    @property
    def settings(self) -> dict[str, Any]:
        """What tells it from another."""
        return {"source": fingerprint(self.source)} | (self.columns if self.is_texts else {})

    def texts(self) -> Texts:
        """Its texts, as a stream that can be read again."""
        from lmd3.texts import read_texts

        columns = dict(self.columns)
        return read_texts(self.source, text=columns.pop("text") or "text", **columns)

    def open(self) -> Store:
        """Its rows."""
        from lmd3.store import open_store

        return open_store(self.rows)


def study(
    corpus: Annotated[Path, typer.Option("--corpus", help="The training texts, or a store of them.")],
    queries: Annotated[Path, typer.Option("--queries", help="The test texts, or rows of them.")],
    outcomes: Annotated[
        str,
        typer.Option(
            "--outcomes",
            help="A table (id, value), an evaluation log (lm-evaluation-harness, lighteval, inspect), or "
            "perplexity:MODEL (ngram, a name or a folder).",
        ),
    ],
    out: OutOption,
    model: Annotated[
        str, typer.Option("--model", help="hashing, or a sentence-transformers name or folder.")
    ] = "hashing",
    text: TextOption = "text",
    id: IdOption = None,
    group: GroupOption = None,
    corpus_text: CorpusText = None,
    corpus_id: CorpusId = None,
    corpus_group: CorpusGroup = None,
    query_text: QueryText = None,
    query_id: QueryId = None,
    query_group: QueryGroup = None,
    weight: WeightOption = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float16, float32, bfloat16 or int8.")] = "float16",
    prompt: Annotated[str | None, typer.Option("--prompt", help="Put before every text.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Tokens read of each text.")
    ] = None,
    truncate_dim: Annotated[
        int | None, typer.Option("--truncate-dim", min=1, help="Keep the first dimensions only.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Texts per pass of a neural encoder.")
    ] = None,
    encode_precision: EncodePrecisionOption = None,
    backend: BackendOption = None,
    chunk: ChunkOption = "truncate",
    chunk_tokens: ChunkTokensOption = None,
    chunk_overlap: ChunkOverlapOption = 0,
    sample: SampleOption = None,
    sample_by: SampleByOption = None,
    window: WindowOption = 4096,
    workers: WorkersOption = 1,
    keep_exact: KeepExactOption = None,
    shard_rows: Annotated[int, typer.Option("--shard-rows", min=1, help="Rows of one shard.")] = 1 << 20,
    no_texts: Annotated[
        bool, typer.Option("--no-texts", help="Keep no training texts in the store.")
    ] = False,
    kernel: KernelOption = None,
    bandwidth: BandwidthOption = None,
    neighbors: Annotated[int, typer.Option("--neighbors", min=0, help="Nearest texts listed.")] = 10,
    by_group: Annotated[bool, typer.Option("--by-group", help="Densities under each group too.")] = False,
    groups: GroupsOption = None,
    exclude_self: Annotated[
        bool, typer.Option("--exclude-self", help="Leave a query's own row out of its density.")
    ] = False,
    exclude_within: Annotated[
        float, typer.Option("--exclude-within", min=0, metavar="R", help="Leave rows nearer than R out.")
    ] = 0.0,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Subtract the kernel's normalising constant.")
    ] = False,
    precision: PrecisionOption = "auto",
    any_encoder: AnyEncoderOption = False,
    io: IoOption = "mmap",
    method: MethodOption = "exact",
    tolerance: ToleranceOption = None,
    index: IndexOption = None,
    adaptive: AdaptiveOption = None,
    executor: ExecutorOption = "local",
    address: AddressOption = None,
    max_memory: MemoryOption = "2GB",
    outcome_id: OutcomeIdOption = None,
    outcome_value: OutcomeValueOption = None,
    outcome: Annotated[
        str | None, typer.Option("--outcome", metavar="NAME", help="Which outcome, where there are several.")
    ] = None,
    predictor: Annotated[str, typer.Option("--predictor", help="What is related.")] = "log_density",
    controls: Annotated[
        str, typer.Option("--controls", help="default, none, or names of covariates (a,b).")
    ] = "default",
    covariates: Annotated[
        Path | None, typer.Option("--covariates", help="A table of covariates of your own.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option("--cluster", metavar="COL", help="Standard errors clustered by this column.")
    ] = None,
    within: Annotated[
        str | None, typer.Option("--within", metavar="COL", help="Compare within the groups of this column.")
    ] = None,
    floor: Annotated[
        float | None, typer.Option("--floor", help="Log density to put where it is lower.")
    ] = None,
    shuffles: Annotated[int, typer.Option("--shuffles", min=200, help="Draws of the shuffle null.")] = 200,
    draws: Annotated[
        int, typer.Option("--draws", min=199, help="Draws of wild bootstraps (few clusters) and max-T.")
    ] = 9_999,
    models: Annotated[
        list[str] | None,
        typer.Option("--also", metavar="NAME", help="Fit too: mixed, gee, gam …; repeatable."),
    ] = None,
    contrast: Annotated[
        Path | None,
        typer.Option("--contrast", metavar="FILE", help="Another model's outcomes: the difference."),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option("--reference", metavar="CORPUS", help="Texts or rows that the model never saw."),
    ] = None,
    adjust: Annotated[
        Path | None, typer.Option("--adjust", metavar="FILE", help="A causal graph or a list of controls.")
    ] = None,
    negative_control: Annotated[
        bool,
        typer.Option(
            "--negative-control",
            help="The slope again with vectors that mean nothing, 20 times (at most 100,000 rows).",
        ),
    ] = False,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    force: ForceOption = False,
) -> None:
    """The whole job: encode what is text, density, covariates, analysis, report.

    Every step whose result is in the folder already, with the same settings, is skipped; so the same
    command continues an interrupted study.

    \b
    Examples:
      lmd3 study --corpus train.jsonl --queries test.jsonl --outcomes results.jsonl -o study
      lmd3 study --corpus train.jsonl --queries test.jsonl --outcomes perplexity:ngram -o study
      lmd3 study --corpus train.jsonl --queries test.jsonl --text question --outcomes results.jsonl \\
        --outcome-id doc_id --outcome-value correct --bandwidth .2 --controls none -o study
    """
    import pyarrow.parquet as pq

    import lmd3
    from lmd3.bandwidth import DEFAULT_RULES
    from lmd3.cli.density import METHODS, PRECISIONS
    from lmd3.density import KernelDensity
    from lmd3.density.adaptive import check_factor
    from lmd3.density.held_out import held_out, random_densities, some_rows
    from lmd3.encoders.run import encoder_from_store
    from lmd3.executors import make_executor
    from lmd3.executors.partials import FOLDER
    from lmd3.outcomes import choose_outcome
    from lmd3.performance.eval_logs import files_of
    from lmd3.results import DensityTable

    prepare_output(out, force=out.is_dir())
    memory = parse_bytes(max_memory)
    how = estimating_by(method, tolerance, index)
    train = _Side.of(
        corpus,
        out / "corpus.lmd3",
        text=corpus_text or text,
        id=corpus_id or id,
        group=corpus_group or group,
        weight=weight,
    )
    test = _Side.of(
        queries, out / "queries.lmd3", text=query_text or text, id=query_id or id, group=query_group or group
    )
    scorer = outcomes.removeprefix("perplexity:") if outcomes.startswith("perplexity:") else None
    encoding: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "truncate_dim": truncate_dim,
        "batch_size": batch_size,
        "dtype": dtype,
        "precision": encode_precision,
        "backend": backend,
        "chunk": chunk,
        "chunk_tokens": chunk_tokens,
        "chunk_overlap": chunk_overlap,
        "sample": sample,
        "sample_by": sample_by,
        "seed": seed,
        "window": window,
        "workers": workers,
        "shard_rows": shard_rows,
        "keep_texts": not no_texts,
        "exact": keep_exact,
    }
    estimating: dict[str, Any] = {
        "kernel": kernel or ["exponential"],
        "bandwidth": bandwidth or list(DEFAULT_RULES),
        "seed": seed,
        "precision": precision,
        "any_encoder": any_encoder,
        **how,
    }
    scanning: dict[str, Any] = {
        "neighbors": neighbors,
        "by_group": by_group,
        "groups": groups,
        "normalize": normalize,
        "exclude_self": exclude_self,
        "exclude_within": exclude_within,
        **({} if adaptive is None else {"adaptive": adaptive}),
    }
    relating: dict[str, Any] = {
        "outcome_name": outcome or ("nats_per_token" if scorer else None),
        "predictor": predictor,
        "controls": controls if controls in ("default", "none") else controls.split(","),
        "cluster": cluster,
        "within": within,
        "floor": floor,
        "shuffles": shuffles,
        "draws": draws,
        "models": list(models or ()),
        "adjust": adjust,
        "seed": seed,
    }
    score_file, covariates_file = out / "outcomes.parquet", out / "covariates.parquet"
    described = covariates is None and controls != "none"

    def encode_corpus() -> None:
        lmd3.encode(train.texts(), **encoding, out=train.rows, force=True, progress=progress)

    def encode_queries() -> None:
        lmd3.encode_queries(test.texts(), train.open(), test.rows, force=True, progress=progress)

    def sum_kernels() -> None:
        estimator = lmd3.KernelDensity(**estimating, threads=threads, max_memory=memory, io=io).fit(
            train.open()
        )
        asked, folder = test.open(), out / "density"
        given: dict[str, Any] = {**scanning, "folder": folder, "notice": notice, "progress": progress}
        given["executor"] = make_executor(executor, threads=threads, address=address)
        try:
            table = estimator.density(asked, **given)
        except OtherJobError as error:
            # Settings or texts have changed since: what was begun for the old ones is of no use.
            notice(f"{error.message}: begun anew")
            shutil.rmtree(folder / FOLDER)
            (folder / "run.json").unlink(missing_ok=True)
            table = estimator.density(asked, **given)
        for line in table.run.get("notices", []):
            notice(line)
        table.save(out / "density")

    def score() -> None:
        if scorer is None:
            table = read_outcomes(outcomes, id=outcome_id, value=outcome_value)
        else:
            words = (text for batch in train.texts() for text in batch.texts) if scorer == "ngram" else None
            table = lmd3.performance.from_model(test.texts(), scorer, train=words, progress=progress)
        pq.write_table(table, score_file)

    def measure_controls() -> None:
        table = lmd3.compute_covariates(train.open(), test.open(), progress=progress)
        pq.write_table(table, covariates_file)

    def relate() -> None:
        beside = covariates or (covariates_file if described else None)
        result = lmd3.analysis.regress(
            pq.read_table(score_file),
            DensityTable.load(out / "density"),
            covariates=beside,
            files={"outcomes": outcomes, "queries": str(test.rows)}
            | ({} if contrast is None else {"contrast": str(contrast)}),
            contrast=None
            if contrast is None
            else read_outcomes(str(contrast), id=outcome_id, value=outcome_value, outcome=None),
            reference=None if reference is None else out / "reference",
            support=None if reference is not None else out / "support.parquet",
            queries=test.open(),
            corpus=some_rows(train.open(), seed),
            random_controls=out / "random.parquet" if negative_control else None,
            **relating,
        )
        result.save(out / "analysis")

    def hold_out() -> None:
        table = held_out(fixed(train.open()), seed=seed, normalize=normalize, progress=progress)
        pq.write_table(table, out / "support.parquet")

    def score_reference() -> None:
        assert reference is not None
        beside = _Side.of(reference, out / "reference.lmd3", text=corpus_text or text, id=None, group=None)
        if beside.is_texts:
            lmd3.encode_queries(beside.texts(), train.open(), beside.rows, force=True, progress=progress)
        rows = beside.open()
        table = fixed(rows).density(test.open(), neighbors=1, normalize=normalize, progress=progress)
        table.save(out / "reference")

    def score_random() -> None:
        bandwidths = DensityTable.load(out / "density").run["bandwidths"]
        table = random_densities(train.open(), test.open(), bandwidths[0], seed=seed, progress=progress)
        pq.write_table(table, out / "random.parquet")

    def fixed(corpus: Store) -> KernelDensity:
        """An estimator with the bandwidths of this study."""
        numbers = f"@{out / 'density' / 'bandwidth.json'}"
        estimator = KernelDensity(bandwidth=numbers, precision=precision, threads=threads, seed=seed)
        return estimator.fit(corpus, queries=test.open())

    def write_page() -> None:
        lmd3.write_report(out / "analysis", out / "report.html")

    # Everything that can be refused without the work is refused before it.
    if scorer is None:
        scores = read_outcomes(outcomes, id=outcome_id, value=outcome_value)
        choose_outcome(scores, outcome, outcomes)
    elif not test.is_texts:
        raise ParameterError("perplexity needs the texts of the queries", file=str(queries))
    elif scorer == "ngram" and not train.is_texts:
        raise ParameterError("the n-gram model trains on the texts of the corpus", file=str(corpus))
    if test.is_texts and not train.is_texts:
        encoder_from_store(train.open())
    for name, value, known in (("precision", precision, PRECISIONS), ("method", method, METHODS)):
        if value not in known:
            raise ParameterError(f"unknown {name} {value!r}", remedy=f"choose one of {', '.join(known)}")
    lmd3.KernelDensity(**estimating).check_params()
    if adaptive is not None:
        check_factor(adaptive, estimating["kernel"])
        if method != "exact":
            raise ParameterError("--adaptive is for exact sums", remedy="leave --method out")

    scored: dict[str, Any] = {"model": scorer, "queries": test.settings}
    if scorer is None:
        files = [fingerprint(path) for path in files_of(outcomes)]
        scored = {"table": files[0] if len(files) == 1 else files, "id": outcome_id, "value": outcome_value}
    elif scorer == "ngram":
        scored["corpus"] = train.settings
    beside = fingerprint(existing(covariates)) if covariates else described
    rows = {"corpus": train.settings, "queries": test.settings}
    steps = [
        Step("corpus", "corpus.lmd3", train.settings | encoding, encode_corpus),
        Step("queries", "queries.lmd3", test.settings, encode_queries, ("corpus",)),
        Step("density", "density/run.json", rows | estimating | scanning, sum_kernels, ("corpus", "queries")),
        Step("outcomes", score_file.name, scored, score),
        Step("covariates", covariates_file.name, rows, measure_controls, ("corpus", "queries")),
        Step("support", "support.parquet", {"seed": seed, "normalize": normalize}, hold_out, ("density",)),
        Step(
            "reference",
            "reference/run.json",
            {"reference": None if reference is None else fingerprint(existing(reference))},
            score_reference,
            ("density",),
        ),
        Step("random", "random.parquet", {"seed": seed}, score_random, ("density",)),
        Step(
            "analysis",
            "analysis/summary.json",
            relating
            | {
                "covariates": beside,
                "adjust": None if adjust is None else fingerprint(existing(adjust)),
                "contrast": None if contrast is None else fingerprint(existing(contrast)),
            },
            relate,
            ("density", "outcomes", "covariates", "support", "reference", "random"),
        ),
        Step("report", "report.html", {}, write_page, ("analysis",)),
    ]
    wanted = {
        "corpus": train.is_texts,
        "queries": test.is_texts,
        "covariates": described,
        "support": reference is None,
        "reference": reference is not None,
        "random": negative_control,
    }
    done = Steps(out, [step for step in steps if wanted.get(step.name, True)], force=force).run()
    facts = json.loads((out / "analysis" / "summary.json").read_text(encoding="utf-8"))
    emit(
        {"out": out, "report": out / "report.html", "steps_done": done, "summary": facts},
        text="\n".join([*facts["answer"], "", f"Report: {out / 'report.html'}"]),
    )
