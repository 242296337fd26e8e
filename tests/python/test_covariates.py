from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import lmd3
from lmd3.covariates import COVARIATES, compute_covariates
from lmd3.errors import ColumnError, DuplicateIdError, ParameterError, ShapeError
from lmd3.store import Store

CORPUS = [
    "Return the inverse of a matrix.",
    "Compute the inverse of a square matrix by elimination.",
    "Open a file and read its lines.",
    "The cat sleeps on the mat.",
]
QUERIES = ["The inverse of the cat.", "Zebras gallop!", "a a a a"]


def write_jsonl(path: Path, texts: list[str], groups: list[str] | None = None) -> Path:
    rows = [{"id": f"{path.stem}-{i}", "text": text} for i, text in enumerate(texts)]
    for row, name in zip(rows, groups or [], strict=False):
        row["source"] = name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Store:
    texts = lmd3.read_texts(write_jsonl(tmp_path / "c.jsonl", CORPUS))
    return lmd3.encode(texts, out=tmp_path / "corpus.lmd3", dtype="float32")


@pytest.fixture
def queries(tmp_path: Path, corpus: Store) -> Store:
    path = write_jsonl(tmp_path / "q.jsonl", QUERIES, ["x", "y", "x"])
    return lmd3.encode_queries(lmd3.read_texts(path, group="source"), corpus)


def metadata(table: pa.Table) -> dict[str, object]:
    facts: dict[str, object] = json.loads(table.schema.metadata[b"lmd3"])
    return facts


def test_every_column_by_its_formula(corpus: Store, queries: Store) -> None:
    table = compute_covariates(corpus, queries)
    assert table.schema.equals(COVARIATES)
    assert table["id"].to_pylist() == ["q-0", "q-1", "q-2"]
    assert table["group"].to_pylist() == ["x", "y", "x"]

    def tokens(text: str) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", text.lower())

    counts = Counter(token for text in CORPUS for token in tokens(text))
    total = sum(counts.values()) + len(counts) + 1
    for text, row in zip(QUERIES, table.to_pylist(), strict=True):
        found = tokens(text)
        assert row["log_tokens"] == pytest.approx(math.log(len(found)))
        entropy = -sum(math.log((counts[token] + 1) / total) for token in found) / len(found)
        assert row["unigram_cross_entropy"] == pytest.approx(entropy, rel=1e-12)
        words = [token for token in found if token.isalnum()]
        assert row["rarest_term_count"] == min(counts[word] for word in words)
        grams = {tuple(found[i : i + 5]) for i in range(max(1, len(found) - 4))}
        size = min(5, len(found))
        of = [{tuple(tokens(t)[i : i + size]) for i in range(len(tokens(t)))} for t in CORPUS]
        held = [len(grams & texts) for texts in of]
        assert row["ngram_overlap"] == max(held) / len(grams)
        assert row["duplicates"] == 0
    mean = corpus.rows(np.arange(4)).astype(float).mean(axis=0)
    vectors = queries.rows(np.arange(3)).astype(float)
    cosine = vectors @ mean / np.linalg.norm(mean) / np.linalg.norm(vectors, axis=1)
    np.testing.assert_allclose(table["typicality"].to_numpy(), cosine, rtol=1e-9)
    assert metadata(table)["missing"] == {}


def test_bare_vectors_have_typicality_only(corpus: Store, queries: Store) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((50_000, 384)).astype(np.float32) + 0.5
    table = compute_covariates(rows, queries)
    assert table["unigram_cross_entropy"].null_count == 3 and table["log_tokens"].null_count == 0
    assert "no texts" in metadata(table)["missing"]["unigram_cross_entropy"]
    mean = rows.astype(float).mean(axis=0)
    vectors = queries.rows(np.arange(3)).astype(float)
    expected = vectors @ mean / np.linalg.norm(mean) / np.linalg.norm(vectors, axis=1)
    np.testing.assert_allclose(table["typicality"].to_numpy(), expected, rtol=1e-9)
    bare = compute_covariates(corpus, rows[:5])
    assert bare["log_tokens"].null_count == bare["unigram_cross_entropy"].null_count == 5
    assert set(metadata(bare)["missing"]) == set(COVARIATES.names) - {"id", "group", "typicality"}
    assert bare["id"].to_pylist() == list("01234")


def test_a_zero_mean_has_no_typicality() -> None:
    rows = np.array([[1, 0], [-1, 0]], dtype=np.float32)
    table = compute_covariates(rows, rows)
    assert table["typicality"].null_count == 2 and "zero" in metadata(table)["missing"]["typicality"]


def test_dimensions_must_agree(queries: Store) -> None:
    with pytest.raises(ShapeError, match="384 dimensions, the corpus 3"):
        compute_covariates(np.ones((2, 3), np.float32), queries)


def test_overlap_and_duplicates(corpus: Store, tmp_path: Path) -> None:
    texts = [CORPUS[1].upper(), "square matrix by elimination. Then some more words", "the mat", "?!", "."]
    asked = lmd3.encode_queries(lmd3.read_texts(write_jsonl(tmp_path / "o.jsonl", texts)), corpus)
    rows = compute_covariates(corpus, asked).to_pylist()
    # 9 tokens and the stop; all of them in one text, as a copy but for case.
    assert (rows[0]["ngram_overlap"], rows[0]["duplicates"]) == (1.0, 1.0)
    # One of five 5-grams: "square matrix by elimination .".
    assert (rows[1]["ngram_overlap"], rows[1]["duplicates"]) == (0.2, 0.0)
    # Shorter than five tokens: all of it, once.
    assert (rows[2]["ngram_overlap"], rows[2]["rarest_term_count"]) == (1.0, 1.0)
    # Without words there is no rarest one.
    assert rows[3]["rarest_term_count"] is None and rows[4]["ngram_overlap"] == 1.0
    pairs = compute_covariates(corpus, asked, ngram=2).to_pylist()
    assert pairs[1]["ngram_overlap"] == 0.5
    with pytest.raises(ParameterError, match="0 tokens"):
        compute_covariates(corpus, asked, ngram=0)


def test_texts_of_bare_vectors(corpus: Store, queries: Store, tmp_path: Path) -> None:
    whole = compute_covariates(corpus, queries)
    vectors = queries.rows(np.arange(3))
    lines = [{"id": str(i), "text": text} for i, text in reversed(list(enumerate(QUERIES)))]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    bare = compute_covariates(
        corpus.rows(np.arange(4)),
        vectors,
        corpus_texts=lmd3.read_texts(tmp_path / "c.jsonl"),
        query_texts=lmd3.read_texts(tmp_path / "t.jsonl"),
    )
    for name in COVARIATES.names[2:]:
        np.testing.assert_allclose(bare[name].to_numpy(), whole[name].to_numpy(), rtol=1e-6)
    with pytest.raises(ColumnError, match="no id of the texts"):
        compute_covariates(corpus, vectors, query_texts=lmd3.read_texts(tmp_path / "q.jsonl"))


def test_reference_and_columns_of_the_users_own(corpus: Store, queries: Store) -> None:
    reference = pa.table({"id": ["q-1", "q-0", "x"], "value": [2.0, 1.0, 9.0]})
    own = pd.DataFrame({"id": ["q-2", "q-0", "q-1"], "level": ["3", "1", "2"], "kind": ["c", "a", "b"]})
    table = compute_covariates(corpus, queries, reference=reference, columns=[own])
    assert table.column_names == [*COVARIATES.names, "reference_loss", "level", "kind"]
    assert table["reference_loss"].to_pylist() == [1.0, 2.0, None]
    assert table["level"].to_pylist() == [1.0, 2.0, 3.0]
    assert table["kind"].to_pylist() == ["a", "b", "c"]
    assert metadata(table)["queries_lacking"] == {"reference_loss": 1}
    with pytest.raises(ParameterError, match="there already"):
        compute_covariates(corpus, queries, columns=[own.rename(columns={"level": "typicality"})])
    with pytest.raises(ColumnError, match="no id of this table"):
        compute_covariates(corpus, queries, reference=reference.slice(2))
    with pytest.raises(DuplicateIdError):
        compute_covariates(corpus, queries, columns=[pd.concat([own, own])])
