from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import lmd3
from lmd3.covariates import COVARIATES, compute_covariates
from lmd3.errors import ShapeError
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
    assert set(metadata(bare)["missing"]) == {"log_tokens", "unigram_cross_entropy"}
    assert bare["id"].to_pylist() == list("01234")


def test_a_zero_mean_has_no_typicality() -> None:
    rows = np.array([[1, 0], [-1, 0]], dtype=np.float32)
    table = compute_covariates(rows, rows)
    assert table["typicality"].null_count == 2 and "zero" in metadata(table)["missing"]["typicality"]


def test_dimensions_must_agree(queries: Store) -> None:
    with pytest.raises(ShapeError, match="384 dimensions, the corpus 3"):
        compute_covariates(np.ones((2, 3), np.float32), queries)
