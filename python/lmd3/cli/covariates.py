"""`lmd3 covariates`: the controls of the analysis."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmd3.cli import _common
from lmd3.cli._common import ForceOption, GroupOption, IdOption, OutOption, TextOption, ThreadsOption


def covariates(
    corpus: Annotated[Path, typer.Argument(help="A store.")],
    queries: Annotated[Path, typer.Argument(help="A store, or texts (encoded by the corpus's own model).")],
    out: OutOption,
    text: TextOption = "text",
    id: IdOption = None,
    group: GroupOption = None,
    threads: ThreadsOption = None,
    force: ForceOption = False,
) -> None:
    """Length, unigram cross-entropy under the corpus and typicality of every query.

    Writes a table (id, group, log_tokens, unigram_cross_entropy, typicality) as .parquet, .csv or .jsonl.
    What can't be computed, because texts are not kept, is null and named.

    \b
    Example:
      lmd3 covariates corpus.lmd3 queries.jsonl -o covariates.parquet
    """
    _common.limit_threads(threads)
    import time

    from lmd3.cli import _write
    from lmd3.covariates import compute_covariates
    from lmd3.store import open_store

    started = time.monotonic()
    _write.prepare_table(out, force)
    store = open_store(corpus)
    if _common.is_texts(queries):
        from lmd3.encoders.run import encode_queries
        from lmd3.texts import read_texts

        asked = encode_queries(read_texts([queries], text=text, id=id, group=group), store)
    else:
        asked = open_store(queries)
    table = compute_covariates(store, asked, progress=_common.progress)
    facts = _write.facts(table)
    run = {
        "command": "covariates",
        "corpus": {"path": str(corpus), "fingerprint": store.fingerprint},
        "queries": {"path": str(queries), "fingerprint": asked.fingerprint},
        **facts,
        "versions": _write.versions(),
        "seconds": round(time.monotonic() - started, 3),
    }
    _write.write_table(out, table, run)
    for column, reason in facts["missing"].items():
        _common.notice(f"{column} is null: {reason}")
    if facts.get("queries_without_tokens"):
        _common.notice(f"{facts['queries_without_tokens']:,} queries have no words: their length is null")
    _common.emit({"out": out, "queries": table.num_rows, "missing": facts["missing"]})
