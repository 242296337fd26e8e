"""Densities of chunks by document, against the definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import lmd3
from lmd3 import cli
from lmd3.density.by_document import by_document
from lmd3.errors import ColumnError

TEXTS = ["a b c d e f g h", "c d", "x y z a b c", "a b c d e"]


def stores(tmp_path: Path) -> tuple[lmd3.Store, lmd3.Store]:
    words = ["a", "b", "c", "d", "e", "f", "g", "h", "x", "y", "z"]
    draw = np.random.default_rng(0)
    corpus = lmd3.encode([" ".join(draw.choice(words, 4)) for _ in range(200)], out=tmp_path / "c")
    queries = lmd3.encode_queries(
        TEXTS, corpus, tmp_path / "q", chunk="sliding", chunk_tokens=3, chunk_overlap=1
    )
    return corpus, queries


def test_mean_and_largest(tmp_path: Path) -> None:
    corpus, queries = stores(tmp_path)
    density = lmd3.KernelDensity(bandwidth=[0.3, 0.001]).fit(corpus).density(queries).density
    found = by_document(density, queries).to_pandas()
    assert found["id"].tolist() == ["0", "1", "2", "3"] * 2
    table = density.to_pandas()
    table["document"] = table["id"].str.split("#").str[0]
    for row in found.itertuples():
        own = table[(table["document"] == row.id) & (table["bandwidth"] == row.bandwidth)]["log_density"]
        assert row.chunks == len(own)
        assert row.log_density_max == own.max()
        assert np.isclose(row.log_density, np.logaddexp.reduce(own) - np.log(len(own)))


def test_chunks_in_memory_and_other_queries(tmp_path: Path) -> None:
    corpus, queries = stores(tmp_path)
    inside = lmd3.encode_queries(TEXTS, corpus, chunk="sliding", chunk_tokens=3, chunk_overlap=1)
    kde = lmd3.KernelDensity(bandwidth=0.3).fit(corpus)
    one, other = (by_document(kde.density(side).density, side) for side in (queries, inside))
    assert one.equals(other)
    plain = lmd3.encode_queries(TEXTS, corpus)
    with pytest.raises(ColumnError, match="chunk sliding"):
        by_document(kde.density(plain).density, plain)


def test_the_command_writes_documents(tmp_path: Path) -> None:
    stores(tmp_path)
    command = [
        "density",
        str(tmp_path / "c"),
        str(tmp_path / "q"),
        "-o",
        str(tmp_path / "d"),
        "--bandwidth",
        "0.3",
    ]
    assert cli.main(command) == 0
    table = pq.read_table(tmp_path / "d" / "documents.parquet")
    assert table["id"].to_pylist() == ["0", "1", "2", "3"]
