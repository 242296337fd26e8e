"""What is known of a query beside its density: the controls of the analysis.

* `log_tokens`: ln T, T the words and punctuation marks of the text.
* `unigram_cross_entropy`: −1/T·Σ ln((c(w) + 1)/(N + V + 1)) over the text's tokens w, in nats per token; c(w)
  is the word's count among the N tokens of the corpus, V the number of its different words, and all words
  that it lacks are one class (add-one smoothing).
* `typicality`: cosine of the query's vector to the mean of the corpus's vectors.
* `rarest_term_count`: count in the corpus of the query's rarest word; 0 where the corpus lacks one of them.
* `ngram_overlap`: the largest share of the query's distinct n-grams (n = 5 tokens) that one text of the
  corpus holds, 0 to 1. A shorter query has one n-gram: all of it.
* `duplicates`: texts of the corpus with the very tokens of the query (case and white space do not count).
* `reference_loss`: what another model made of the query, where it is given.

Words are counted lower-cased in one pass through the corpus's texts, in bounded memory: beyond 8 million
different words the rarest are forgotten and count as lacking. Overlap is taken in the same pass, in memory
that depends on the queries alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from lmd3 import _lmd3, tables
from lmd3.errors import ColumnError, ParameterError, ShapeError
from lmd3.outcomes import choose_outcome, read_outcomes
from lmd3.progress import ProgressFactory, silent

if TYPE_CHECKING:
    from lmd3.store import Store
    from lmd3.texts import Texts

__all__ = ["COVARIATES", "NGRAM", "compute_covariates"]

#: Columns of `covariates.parquet`; what could not be computed is null. A reference model's loss and columns
#: of the user's own follow where they are given.
COVARIATES = pa.schema(
    [
        ("id", pa.string()),
        ("group", pa.string()),
        ("log_tokens", pa.float64()),
        ("unigram_cross_entropy", pa.float64()),
        ("typicality", pa.float64()),
        ("rarest_term_count", pa.float64()),
        ("ngram_overlap", pa.float64()),
        ("duplicates", pa.float64()),
    ]
)
#: Tokens of an n-gram.
NGRAM = 5

#: Values read at once from a store.
_BLOCK = 1 << 22
_BATCH = 4096


def compute_covariates(
    corpus: Store | str | Path | NDArray[np.float32],
    queries: Store | str | Path | NDArray[np.float32],
    *,
    corpus_texts: Texts | Iterable[Sequence[str]] | None = None,
    query_texts: Texts | None = None,
    ngram: int = NGRAM,
    reference: Any = None,
    columns: Sequence[Any] = (),
    progress: ProgressFactory | None = None,
) -> pa.Table:
    """The covariates of every query under a corpus.

    Args:
        corpus: a store, its path, or bare vectors.
        queries: likewise.
        corpus_texts: the texts of a corpus that keeps none, from `lmd3.read_texts`.
        query_texts: those of the queries, likewise: joined by id.
        ngram: tokens of an n-gram.
        reference: an outcome table (or its path) of a reference model, whose value is `reference_loss`; of
            several outcomes `nats_per_token` is taken.
        columns: tables (or their paths) with an id: each of their other columns becomes a covariate.
        progress: shows the rows and texts read.

    Returns:
        `COVARIATES` and what was given beside, one row per query in the order of the queries. The schema's
        metadata holds JSON under `lmd3`: `missing` (column: why it is null), the corpus's tokens and
        different words, words forgotten for want of memory, queries without any token (their values of text
        are null), and how many queries each table given lacks.

    Raises:
        ShapeError: the vectors of the two have different dimensions.
        ParameterError: an n-gram of no tokens; a column given twice.
        ColumnError: a table without an id for any query.
    """
    from lmd3.store import open_store

    corpus, queries = open_store(corpus), open_store(queries)
    if corpus.d != queries.d:
        raise ShapeError(
            f"the queries have {queries.d} dimensions, the corpus {corpus.d}",
            remedy="encode both with the same model",
        )
    if ngram < 1:
        raise ParameterError(f"an n-gram of {ngram} tokens")
    progress = progress or silent
    ids = queries.ids()
    beside, lacking = _given(ids, reference, columns)
    missing: dict[str, str] = {}
    facts: dict[str, Any] = {"missing": missing}
    found = {name: np.full(queries.n, np.nan) for name in COVARIATES.names if name not in ("id", "group")}
    asked = _query_texts(queries, ids, query_texts)
    if asked is None:
        of_text = ("log_tokens", "unigram_cross_entropy", "rarest_term_count", "ngram_overlap", "duplicates")
        missing |= dict.fromkeys(of_text, "the queries keep no texts")
    else:
        stream = _batches(corpus, corpus_texts)
        _lexical(asked, stream, corpus.n, ngram, found, facts, progress)
    found["typicality"] = _typicality(corpus, queries, progress)
    if np.isnan(found["typicality"]).all():
        missing["typicality"] = "the corpus's mean vector is zero"
    codes = queries.group_codes()
    names = np.array([*queries.groups, None], dtype=object)
    table = pa.table(
        {
            "id": ids,
            "group": pa.nulls(queries.n, pa.string()) if codes is None else names[codes].tolist(),
            **{name: pa.array(values, from_pandas=True) for name, values in found.items()},
        },
        schema=COVARIATES,
    )
    for name, values in beside.items():
        table = table.append_column(name, values)
    if lacking:
        facts["queries_lacking"] = lacking
    return table.replace_schema_metadata({"lmd3": json.dumps(facts)})


def _query_texts(queries: Store, ids: list[str], given: Texts | None) -> list[str] | None:
    """The queries' texts in their order; the empty string where one is not known."""
    if given is not None:
        known = {i: text for batch in given for i, text in zip(batch.ids, batch.texts, strict=True)}
        if not known.keys() & set(ids):
            raise ColumnError(
                "no id of the texts is one of a query",
                remedy=f"ids of texts: {', '.join(list(known)[:3])}; of queries: {', '.join(ids[:3])}",
            )
        return [known.get(i, "") for i in ids]
    if not queries.has_texts:
        return None
    return [text or "" for batch in queries.texts(batch=_BATCH) for text in batch]


def _batches(corpus: Store, given: Texts | Iterable[Sequence[str]] | None) -> Iterator[Sequence[str]] | None:
    if given is not None:
        return (batch.texts if hasattr(batch, "texts") else batch for batch in given)
    return corpus.texts(batch=_BATCH) if corpus.has_texts else None


def _lexical(
    asked: list[str],
    stream: Iterator[Sequence[str]] | None,
    count: int,
    ngram: int,
    found: dict[str, NDArray[np.float64]],
    facts: dict[str, Any],
    progress: ProgressFactory,
) -> None:
    """Fills the columns of text, in one pass through the corpus's texts."""
    counts = _lmd3.TokenCounts()
    if stream is not None:
        overlap = _lmd3.Overlap(asked, ngram)
        with progress("counting words", count, "texts") as bar:
            done = 0
            for batch in stream:
                texts = [text or "" for text in batch]
                counts.add(texts)
                overlap.add(texts)
                done += len(texts)
                bar.update(done)
        facts |= {
            "tokens": counts.tokens,
            "words": counts.words,
            "forgotten_words": counts.forgotten,
            "ngram": ngram,
        }
        found["ngram_overlap"], copies = overlap.result()
        found["rarest_term_count"] = counts.rarest(asked)
        found["duplicates"] = copies.astype(np.float64)
    else:
        for name in ("unigram_cross_entropy", "rarest_term_count", "ngram_overlap", "duplicates"):
            facts["missing"][name] = "the corpus keeps no texts"
    nats, tokens = counts.cross_entropy(asked)
    empty = tokens == 0
    found["log_tokens"] = np.where(empty, np.nan, np.log(np.maximum(tokens, 1)))
    if stream is not None:
        found["unigram_cross_entropy"] = nats
        found["duplicates"][empty] = np.nan
    facts["queries_without_tokens"] = int(empty.sum())


def _given(
    ids: list[str], reference: Any, columns: Sequence[Any]
) -> tuple[dict[str, pa.Array], dict[str, int]]:
    """The columns that a user brings, in the order of the queries, and how many queries each table lacks."""
    out: dict[str, pa.Array] = {}
    lacking: dict[str, int] = {}
    if reference is not None:
        file = str(reference) if isinstance(reference, (str, Path)) else None
        scores = read_outcomes(reference)
        names = set(scores["outcome"].to_pylist())
        scores = choose_outcome(scores, "nats_per_token" if "nats_per_token" in names else None, file)
        values = dict(zip(scores["id"].to_pylist(), scores["value"].to_pylist(), strict=True))
        lacking["reference_loss"] = _lacking(ids, values, file)
        out["reference_loss"] = pa.array([values.get(i) for i in ids], pa.float64())
    for given in columns:
        file = str(given) if isinstance(given, (str, Path)) else None
        frame = tables.as_frame(given)
        names_of_ids = tables.row_ids(frame, None, file)
        tables.refuse_duplicates(names_of_ids, file)
        rows = {i: row for row, i in enumerate(names_of_ids)}
        absent = _lacking(ids, rows, file)
        order = [rows.get(i, -1) for i in ids]
        for name in map(str, frame.columns):
            if name in ("id", "doc_id"):
                continue
            if name in COVARIATES.names or name in out:
                raise ParameterError(f"column {name!r} is there already", file=file, remedy="rename it")
            out[name] = _column(frame[name], order, name, file)
            if absent:
                lacking[name] = absent
    return out, {name: count for name, count in lacking.items() if count}


def _lacking(ids: list[str], known: dict[str, Any], file: str | None) -> int:
    absent = sum(i not in known for i in ids)
    if absent == len(ids):
        raise ColumnError(
            "no id of this table is one of a query",
            file=file,
            remedy=f"ids of the table: {', '.join(list(known)[:3])}; of queries: {', '.join(ids[:3])}",
        )
    return absent


def _column(values: pd.Series[Any], order: list[int], name: str, file: str | None) -> pa.Array:
    """Numbers as float64, anything else as strings; null where a row is missing (−1)."""
    if tables.is_numeric(values):
        numbers = tables.numbers(values, name, file)
        return pa.array(
            [None if row < 0 or np.isnan(numbers[row]) else float(numbers[row]) for row in order],
            pa.float64(),
        )
    listed = list(values)
    shown = [None if row < 0 or listed[row] is None else str(listed[row]) for row in order]
    return pa.array(shown, pa.string())


def _typicality(corpus: Store, queries: Store, progress: ProgressFactory) -> NDArray[np.float64]:
    """Cosine of each query to the corpus's mean vector; NaN where one of the two is zero."""
    total = np.zeros(corpus.d)
    with progress("averaging vectors", corpus.n, "rows") as bar:
        for rows in _blocks(corpus.n, corpus.d):
            total += corpus.rows(rows).sum(axis=0, dtype=np.float64)
            bar.update(int(rows[-1]) + 1)
    norm = np.linalg.norm(total)
    cosines = np.empty(queries.n)
    for rows in _blocks(queries.n, queries.d):
        vectors = queries.rows(rows).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            cosines[rows] = (vectors @ total) / (np.linalg.norm(vectors, axis=1) * norm)
    return cosines


def _blocks(n: int, d: int) -> Iterator[NDArray[np.int64]]:
    size = max(1, _BLOCK // d)
    for start in range(0, n, size):
        yield np.arange(start, min(start + size, n), dtype=np.int64)
