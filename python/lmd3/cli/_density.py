"""What `lmd3 density` and `lmd3 bandwidth` share: options and the two sides of the question."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmd3.cli import _common
from lmd3.errors import ParameterError

if TYPE_CHECKING:
    from lmd3.density import KernelDensity
    from lmd3.results import DensityTable
    from lmd3.store import Store

CorpusArgument = Annotated[Path, typer.Argument(help="A store, a .npy file: the training rows.")]
QueriesArgument = Annotated[
    Path, typer.Argument(help="Texts (encoded by the corpus's own model), a store or a .npy file.")
]
ExcludeSelfOption = Annotated[
    bool, typer.Option("--exclude-self", help="Leave a query's own row out (same id, same vector).")
]
ExcludeWithinOption = Annotated[
    float,
    typer.Option("--exclude-within", metavar="R", help="Leave out rows nearer than R; they are counted."),
]
PrecisionOption = Annotated[
    str,
    typer.Option(
        "--precision",
        metavar="auto|float32|int16|int8",
        help="Arithmetic of the dot products; auto: int16 for int8 rows, else float32; int8 is the coarsest.",
    ),
]
AnyEncoderOption = Annotated[
    bool,
    typer.Option("--any-encoder", help="Score queries that another model, prompt or revision has encoded."),
]
GroupsOption = Annotated[
    str | None,
    typer.Option(
        "--groups",
        metavar="top:K|FILE",
        help="The groups kept apart by --by-group; others are taken together.",
    ),
]
MethodOption = Annotated[
    str,
    typer.Option(
        "--method",
        metavar="exact|auto|stratified|sample|deann|knn",
        help="exact reads all rows; auto estimates by the index (lmd3 index) where that is cheaper.",
    ),
]
ToleranceOption = Annotated[
    str | None,
    typer.Option(
        "--tolerance",
        metavar="E",
        help="How exact estimates must be: the relative error of a kernel sum, or reliability=R of the log "
        "density over the queries [default: 0.01].",
    ),
]
IndexOption = Annotated[
    Path | None, typer.Option("--index", help="The index [default: beside the corpus, CORPUS.index].")
]
ExecutorOption = Annotated[
    str, typer.Option("--executor", metavar="local|ray", help="Where it runs; ray: on a cluster's nodes.")
]
AddressOption = Annotated[
    str | None,
    typer.Option("--address", help="Of the Ray cluster [default: RAY_ADDRESS, else one on this machine]."),
]
MemoryOption = Annotated[
    str, typer.Option("--max-memory", metavar="SIZE", help="For sums in flight, beside the page cache.")
]
IoOption = Annotated[
    str,
    typer.Option(
        "--io",
        metavar="mmap|pread",
        help="How rows of files come: mapped, or read block by block; the same result.",
    ),
]


AdaptiveOption = Annotated[
    float | None,
    typer.Option(
        "--adaptive",
        metavar="C",
        help="Also with a bandwidth of each query's own: C times the distance of the last of its nearest "
        "rows (--neighbors), for the volume of the local dimension.",
    ),
]


def estimating(method: str, tolerance: str | None, index: Path | None) -> dict[str, Any]:
    """The parameters of `KernelDensity` that say whether and how densities are estimated.

    Raises:
        ParameterError: options that go with estimates, without any.
    """
    if method == "exact" and (tolerance is not None or index is not None):
        name = "--tolerance" if tolerance is not None else "--index"
        raise ParameterError(
            f"{name} goes with estimates, not with --method exact", remedy="ask for --method auto"
        )
    return {"method": method, "tolerance": tolerance or 0.01, "index": None if index is None else str(index)}


def parse_bytes(text: str) -> int:
    """Bytes of `2GB`, `500MB`, `1.5 GiB` or a plain number.

    Raises:
        ParameterError: not such a size.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kMGT]?)(i?)B?\s*", text)
    if not found:
        raise ParameterError(f"{text!r} is no size", remedy="for example 500MB, 2GB or 1.5GiB")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kMGT".index(prefix or " "))


def parse_shard(text: str) -> tuple[int, int]:
    """The shard (i, n) of `i/n`, i from 0.

    Raises:
        ParameterError: not such a shard.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not int(found[1]) < int(found[2]):
        raise ParameterError(
            f"{text!r} is no shard", remedy="shards are counted from 0: --shard 0/8 … --shard 7/8"
        )
    return int(found[1]), int(found[2])


def open_sides(
    corpus: Path, queries: Path, text: str, id: str | None, group: str | None
) -> tuple[Store, Store]:
    """The corpus and the queries; query texts are encoded by the corpus's own model.

    Raises:
        ParameterError: the corpus is texts.
        InputError: and its kinds: either side can't be opened.
    """
    from lmd3.store import open_store

    if _common.is_texts(corpus):
        raise ParameterError(
            f"{corpus} is texts, not rows",
            remedy=f"encode them first: lmd3 encode {corpus} -o corpus.lmd3 (or use lmd3 study)",
        )
    store = open_store(corpus)
    if not _common.is_texts(queries):
        return store, open_store(queries)
    from lmd3.encoders.run import encode_queries
    from lmd3.texts import read_texts

    texts = read_texts([queries], text=text, id=id, group=group)
    return store, encode_queries(texts, store, progress=_common.progress)


def estimator(
    kernel: list[str] | None,
    bandwidth: list[str] | None,
    threads: int | None,
    seed: int,
    precision: str = "auto",
    max_memory: str = "2GB",
    any_encoder: bool = False,
    io: str = "mmap",
) -> KernelDensity:
    """The estimator of the options, with the command line's defaults."""
    from lmd3.bandwidth import DEFAULT_RULES
    from lmd3.density import KernelDensity

    return KernelDensity(
        kernel=kernel or "exponential",
        bandwidth=bandwidth or list(DEFAULT_RULES),
        threads=threads,
        seed=seed,
        precision=precision,
        max_memory=parse_bytes(max_memory),
        any_encoder=any_encoder,
        io=io,
    )


def report_density(table: DensityTable, out: Path) -> None:
    """Says what a finished job found."""
    import pyarrow.compute as pc

    whole = table.density.filter(pc.is_null(table.density["group"]))
    lines = [f"{table.queries.num_rows:,} queries × {table.run['store']['n']:,} rows → {out}"]
    if facts := table.run.get("approximate"):
        lines.append(
            f"  {facts['method']}: {facts['queries_estimated']:,} queries estimated, "
            f"{facts['queries_exact']:,} scored exactly ({facts['audited']} of them to audit the estimates)"
        )
    summary = []
    for entry in table.run["bandwidths"]:
        chosen = whole.filter(
            pc.and_(
                pc.equal(whole["kernel"], entry["kernel"]), pc.equal(whole["bandwidth"], entry["bandwidth"])
            )
        )
        median = pc.quantile(chosen["log_density"], 0.5)[0].as_py()
        ess = pc.quantile(chosen["ess"], 0.5)[0].as_py()
        summary.append({**entry, "median_log_density": median, "median_ess": ess})
        lines.append(
            f"  {entry['kernel']} h = {entry['bandwidth']:.6g} ({entry['rule']}): "
            f"median log density {median:.4f}, median ess {ess:.4g}"
        )
    for entry in table.run.get("adaptive", []):
        volume = "" if entry["dimension"] is None else f", volume of {entry['dimension']:.3g} dimensions"
        lines.append(
            f"  {entry['kernel']} h(q) = {entry['factor']:g} × distance of nearest row {entry['neighbors']}: "
            f"{entry['smallest']:.4g} to {entry['largest']:.4g}, median {entry['bandwidth']:.4g}{volume}"
        )
    _common.emit(
        {
            "out": str(out),
            "queries": table.queries.num_rows,
            "rows": table.run["store"]["n"],
            "bandwidths": summary,
            "method": table.run["method"],
            **{name: table.run[name] for name in ("approximate", "adaptive") if name in table.run},
            "precision": table.run["precision"],
            "simd": table.run["simd"],
            "seconds": table.run["seconds"],
            "notices": table.run["notices"],
        },
        text="\n".join(lines),
    )
