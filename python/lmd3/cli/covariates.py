"""`lmd3 covariates`: the controls of the analysis."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmd3.cli import _common
from lmd3.cli._common import ForceOption, GroupOption, IdOption, OutOption, TextOption, ThreadsOption

if TYPE_CHECKING:
    import pandas as pd


def covariates(
    corpus: Annotated[Path, typer.Argument(help="A store.")],
    queries: Annotated[Path, typer.Argument(help="A store, or texts (encoded by the corpus's own model).")],
    out: OutOption,
    text: TextOption = "text",
    id: IdOption = None,
    group: GroupOption = None,
    ngram: Annotated[
        int, typer.Option("--ngram", min=1, metavar="N", help="Tokens of an n-gram, for the overlap.")
    ] = 5,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="TABLE",
            help="What another model made of the queries: a table (id, value), or perplexity:MODEL (a name "
            "or folder) to score them now.",
        ),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option("--column", metavar="COL", help="Carry this column of the queries' file; repeatable."),
    ] = None,
    join: Annotated[
        list[Path] | None,
        typer.Option("--join", metavar="TABLE", help="Carry all columns of a table with an id; repeatable."),
    ] = None,
    corpus_texts: Annotated[
        Path | None, typer.Option("--corpus-texts", help="Texts of a corpus whose store keeps none.")
    ] = None,
    query_texts: Annotated[
        Path | None, typer.Option("--query-texts", help="Texts of queries given as vectors, joined by id.")
    ] = None,
    threads: ThreadsOption = None,
    force: ForceOption = False,
) -> None:
    """Length, words, overlap with the corpus and typicality of every query: the controls of the analysis.

    Writes a table (id, group, log_tokens, unigram_cross_entropy, typicality, rarest_term_count,
    ngram_overlap, duplicates, then what you give) as .parquet, .csv or .jsonl. The corpus's texts are read
    once, in bounded memory. What can't be computed, because texts are not kept, is null and named.

    \b
    Examples:
      lmd3 covariates corpus.lmd3 queries.jsonl -o covariates.parquet
      lmd3 covariates corpus.lmd3 queries.jsonl --column difficulty --reference small.parquet -o c.parquet
      lmd3 covariates corpus.npy queries.npy --corpus-texts corpus.jsonl --query-texts queries.jsonl -o c.csv
    """
    _common.limit_threads(threads)
    import time

    from lmd3.cli import _write
    from lmd3.covariates import compute_covariates
    from lmd3.errors import ParameterError
    from lmd3.store import open_store
    from lmd3.texts import read_texts

    started = time.monotonic()
    _write.prepare_table(out, force)
    scorer = (
        reference.removeprefix("perplexity:") if reference and reference.startswith("perplexity:") else None
    )
    if scorer == "ngram":
        raise ParameterError(
            "an n-gram model of the corpus is no reference",
            remedy="score the queries with `lmd3 perplexity --train OTHER` and give that table",
        )
    for path in [*(join or []), *([Path(reference)] if reference and not scorer else [])]:
        _common.existing(path)
    for place in (corpus_texts, query_texts):
        if place is not None:
            _common.existing(place)
    store = open_store(corpus)
    words = None
    if _common.is_texts(queries):
        from lmd3.encoders.run import encode_queries

        words = read_texts([queries], text=text, id=id, group=group)
        own = _columns(queries, column, id) if column else None
        asked = encode_queries(words, store)
    else:
        if column:
            raise ParameterError("--column is for a file of texts", remedy="bring a table with --join")
        own = None
        asked = open_store(queries)
    if query_texts is not None:
        words = read_texts([query_texts], text=text, id=id)
    scores: object = reference
    if scorer is not None:
        from lmd3.performance import from_model

        if words is None:
            raise ParameterError("perplexity needs the texts of the queries", remedy="give --query-texts")
        scores = from_model(words, scorer, progress=_common.progress)
    table = compute_covariates(
        store,
        asked,
        corpus_texts=None if corpus_texts is None else read_texts([corpus_texts], text=text),
        query_texts=None if query_texts is None else words,
        ngram=ngram,
        reference=scores,
        columns=[*([] if own is None else [own]), *(join or [])],
        progress=_common.progress,
    )
    facts = _write.facts(table)
    run = {
        "command": "covariates",
        "corpus": {"path": str(corpus), "fingerprint": store.fingerprint},
        "queries": {"path": str(queries), "fingerprint": asked.fingerprint},
        "reference": reference,
        "columns": column,
        "join": [str(path) for path in join or []],
        **facts,
        "versions": _write.versions(),
        "seconds": round(time.monotonic() - started, 3),
    }
    _write.write_table(out, table, run)
    for name, reason in facts["missing"].items():
        _common.notice(f"{name} is null: {reason}")
    if facts.get("queries_without_tokens"):
        _common.notice(f"{facts['queries_without_tokens']:,} queries have no words: their length is null")
    if facts.get("forgotten_words"):
        _common.notice(
            f"{facts['forgotten_words']:,} rare words of the corpus were forgotten for want of memory: a "
            "rarest_term_count of 0 may be a small number"
        )
    for name, count in facts.get("queries_lacking", {}).items():
        _common.notice(f"{count:,} queries have no {name}")
    _common.emit({"out": out, "queries": table.num_rows, "missing": facts["missing"]})


def _columns(path: Path, names: list[str], id: str | None) -> pd.DataFrame:
    """Columns of the file of queries, with the ids that its texts have."""
    from lmd3 import tables

    frame = tables.read_table(path)
    ids = tables.row_ids(frame, id or ("id" if "id" in frame.columns else None), str(path))
    if id is None and "id" not in frame.columns:
        # Texts without an id are known by their row, not by a column `doc_id`.
        ids = [str(row) for row in range(len(frame))]
    taken = {name: tables.column(frame, name, str(path)) for name in names}
    return frame.iloc[:, :0].assign(id=ids, **taken)
