"""A column of weights, from texts to densities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lmd3
from lmd3.cli import main
from lmd3.errors import ColumnError, ParameterError
from lmd3.store import verify_store

TEXTS = [f"the {word} of number {row}" for row in range(40) for word in ("cat", "dog", "sea")]
WEIGHTS = [round(0.25 * (row % 9), 2) for row in range(len(TEXTS))]


def write(folder: Path, kind: str) -> Path:
    """The same texts and weights in a file of each kind."""
    path = folder / f"x.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": TEXTS, "share": WEIGHTS}), path)
    elif kind == "csv":
        lines = ["text,share", *(f"{text},{weight}" for text, weight in zip(TEXTS, WEIGHTS, strict=True))]
        path.write_text("\n".join(lines), encoding="utf-8")
    else:
        records = [{"text": text, "share": weight} for text, weight in zip(TEXTS, WEIGHTS, strict=True)]
        path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("chunk", ["truncate", "sliding"])
def test_weights_go_with_their_texts(kind: str, chunk: str, tmp_path: Path) -> None:
    source = write(tmp_path, kind)
    settings: dict[str, Any] = {"window": 16, "shard_rows": 50, "chunk": chunk}
    if chunk == "sliding":
        settings["chunk_tokens"] = 3
    store = lmd3.encode(lmd3.read_texts(source, weight="share"), out=tmp_path / "s", **settings)
    found = store.weights()
    assert found is not None
    owner = [int(name.split("#")[0]) for name in store.ids()]
    np.testing.assert_array_equal(found, np.array(WEIGHTS, np.float32)[owner])
    assert store.manifest["source"]["columns"]["weight"] == "share"
    verify_store(store)


def test_densities_are_weighted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path, "jsonl")
    line = ["encode", str(source), "-o", str(tmp_path / "s"), "--dtype", "float32", "--weight", "share"]
    assert main([*line, "--json"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "s")]) == 0
    assert "one per row" in capsys.readouterr().out
    store = lmd3.open_store(tmp_path / "s")
    queries = lmd3.encode_queries(["a cat", "number 7 of the sea"], store)
    found = lmd3.KernelDensity(bandwidth=0.5).fit(store).density(queries).density["log_density"]
    rows = store.rows(np.arange(store.n)).astype(np.float64)
    own = queries.rows(np.arange(2)).astype(np.float64)
    kernel = np.exp(-np.linalg.norm(rows[None] - own[:, None], axis=2) / 0.5)
    expected = np.log(kernel @ np.array(WEIGHTS)) - np.log(sum(WEIGHTS))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # Appended texts bring theirs.
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"text": "a new cat", "w": 7}), encoding="utf-8")
    assert main(["append", str(tmp_path / "s"), str(more), "--weight", "w", "--json"]) == 0
    weights = lmd3.open_store(tmp_path / "s").weights()
    assert weights is not None and weights[-1] == 7
    capsys.readouterr()
    assert main(["append", str(tmp_path / "s"), str(more)]) == 2
    assert "the store has weights, and these rows none" in capsys.readouterr().err


@pytest.mark.parametrize("value", [None, "x", -1, True, 1e39, float("nan"), float("inf"), [1]])
def test_what_is_no_weight_is_refused(value: Any, tmp_path: Path) -> None:
    records = [{"text": "a b", "w": 1}, {"text": "c d", "w": value}]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    with pytest.raises(ColumnError, match="weight 'w'") as caught:
        lmd3.encode(lmd3.read_texts(path, weight="w"), out=tmp_path / "s")
    assert (caught.value.file, caught.value.row) == (str(path), 1)
    assert not (tmp_path / "s").exists()


def test_a_sample_has_weights_of_its_own(tmp_path: Path) -> None:
    texts = lmd3.texts.Texts.from_lists(["a b", "c d"], weights=[1, 2])
    with pytest.raises(ParameterError, match="weights of its own"):
        lmd3.encode(texts, out=tmp_path / "s", sample=0.5)
