"""What is known of a query beside its density: the controls of the analysis.

* `log_tokens`: ln T, T the words and punctuation marks of the text.
* `unigram_cross_entropy`: −1/T·Σ ln((c(w) + 1)/(N + V + 1)) over the text's tokens w, in nats per token; c(w)
  is the word's count among the N tokens of the corpus, V the number of its different words, and all words
  that it lacks are one class (add-one smoothing).
* `typicality`: cosine of the query's vector to the mean of the corpus's vectors.

Words are counted lower-cased in one pass through the corpus's texts, in bounded memory: beyond 8 million
different words the rarest are forgotten and count as lacking.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lmd3 import _lmd3
from lmd3.errors import ShapeError
from lmd3.progress import ProgressFactory, silent

if TYPE_CHECKING:
    from lmd3.store import Store

__all__ = ["COVARIATES", "compute_covariates"]

#: Columns of `covariates.parquet`; what could not be computed is null.
COVARIATES = pa.schema(
    [
        ("id", pa.string()),
        ("group", pa.string()),
        ("log_tokens", pa.float64()),
        ("unigram_cross_entropy", pa.float64()),
        ("typicality", pa.float64()),
    ]
)

#: Values read at once from a store.
_BLOCK = 1 << 22
_BATCH = 4096


def compute_covariates(
    corpus: Store | str | Path | NDArray[np.float32],
    queries: Store | str | Path | NDArray[np.float32],
    *,
    progress: ProgressFactory | None = None,
) -> pa.Table:
    """The covariates of every query under a corpus.

    Args:
        corpus: a store, its path, or bare vectors (then there is typicality only).
        queries: likewise.
        progress: shows the rows and texts read.

    Returns:
        `COVARIATES`, one row per query in the order of the queries. The schema's metadata holds JSON under
        `lmd3`: `missing` (column: why it is null), the corpus's tokens and different words, words forgotten
        for want of memory, and queries without any token (their values of text are null).

    Raises:
        ShapeError: the vectors of the two have different dimensions.
    """
    from lmd3.store import open_store

    corpus, queries = open_store(corpus), open_store(queries)
    if corpus.d != queries.d:
        raise ShapeError(
            f"the queries have {queries.d} dimensions, the corpus {corpus.d}",
            remedy="encode both with the same model",
        )
    missing: dict[str, str] = {}
    facts: dict[str, object] = {"missing": missing}
    progress = progress or silent
    length = np.full(queries.n, np.nan)
    entropy = np.full(queries.n, np.nan)
    if queries.has_texts:
        counts = _lmd3.TokenCounts()
        if corpus.has_texts:
            with progress("counting words", corpus.n, "texts") as bar:
                done = 0
                for texts in corpus.texts(batch=_BATCH):
                    counts.add(texts)
                    done += len(texts)
                    bar.update(done)
            facts |= {"tokens": counts.tokens, "words": counts.words, "forgotten_words": counts.forgotten}
        else:
            missing["unigram_cross_entropy"] = "the corpus keeps no texts"
        done = 0
        for texts in queries.texts(batch=_BATCH):
            part = slice(done, done + len(texts))
            nats, tokens = counts.cross_entropy(texts)
            length[part] = np.where(tokens > 0, np.log(np.maximum(tokens, 1)), np.nan)
            entropy[part] = nats if corpus.has_texts else np.nan
            done += len(texts)
        facts["queries_without_tokens"] = int(np.isnan(length).sum())
    else:
        missing["log_tokens"] = missing["unigram_cross_entropy"] = "the queries keep no texts"
    typicality = _typicality(corpus, queries, progress)
    if np.isnan(typicality).all():
        missing["typicality"] = "the corpus's mean vector is zero"
    codes = queries.group_codes()
    names = np.array([*queries.groups, None], dtype=object)
    table = pa.table(
        {
            "id": queries.ids(),
            "group": pa.nulls(queries.n, pa.string()) if codes is None else names[codes].tolist(),
            "log_tokens": pa.array(length, from_pandas=True),
            "unigram_cross_entropy": pa.array(entropy, from_pandas=True),
            "typicality": pa.array(typicality, from_pandas=True),
        },
        schema=COVARIATES,
    )
    return table.replace_schema_metadata({"lmd3": json.dumps(facts)})


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
