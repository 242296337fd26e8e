"""Manifests that are well-formed and wrong: refused by name when a store is opened, as fuzzing found them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lmd3
from lmd3.cli import main
from lmd3.errors import FormatError, InputError
from lmd3.store import StoreWriter


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """All that manifests speak of, in two shards."""
    strata = [{"name": name, "texts": 40, "sampled": 20, "threshold": "f" * 16} for name in "ab"]
    with StoreWriter(
        tmp_path / "s", dtype="int8", normalised=False, exact="float16", shard_rows=20
    ) as writer:
        writer.facts["sampling"] = {
            "rate": 0.5, "seed": 0, "by": "group", "texts": 80, "sampled": 40, "strata": strata
        }  # fmt: skip
        writer.facts["chunking"] = {"mode": "truncate", "tokens": None, "overlap": 0}
        rows = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
        groups = ["ab"[row % 2] for row in range(40)]
        writer.append(rows, [f"i{row}" for row in range(40)], groups, weights=np.full(40, 2.0))
    return tmp_path / "s"


def change(store: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = store / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "'weights'": lambda m: m["shards"][1].pop("weights"),
    "'documents'": lambda m: m["shards"][0].pop("documents"),
    "'exact', others": lambda m: m["shards"][0].pop("exact"),
    "a group that 'sampling' does not know": lambda m: m["sampling"]["strata"].pop(),
    "'sampling' is not": lambda m: m["sampling"]["strata"][0].update(threshold=7),
    "'sampling' is": lambda m: m["sampling"]["strata"][0].update(sampled=0),
    "'sampling'": lambda m: m.update(sampling=[1]),
    "'exact' is not": lambda m: m["exact"].update(dtype="int8"),
    "'exact' is not what it": lambda m: m["exact"].update(rounding=1),
    "'exact' is": lambda m: m["exact"].update(rounding=[]),
    "'files' is not": lambda m: m["shards"][0]["exact"].update(name="../x"),
    "'files' is not what": lambda m: m.update(files=None),
    "'files' is": lambda m: m.update(files=[{"name": "x"}]),
    "'files'": lambda m: m.update(files=[5]),
    "'groups'": lambda m: m["groups"][0].update(truncated="many"),
    "'counts'": lambda m: m.update(counts={"tokens": "x"}),
    "'chunking'": lambda m: m.update(chunking={"mode": 5}),
    "'encoder'": lambda m: m.update(encoder={"kind": []}),
    "'appended'": lambda m: m.update(appended=["x"]),
    "'ids'": lambda m: m.update(ids=3),
    "'rounding'": lambda m: m.update(rounding=True),
}


@pytest.mark.parametrize("match", EDITS)
def test_entries_of_another_kind_are_refused(match: str, store: Path) -> None:
    lmd3.open_store(store)
    change(store, EDITS[match])
    with pytest.raises(FormatError, match=match) as caught:
        lmd3.open_store(store)
    assert caught.value.file == str(store / "manifest.json")


def test_bytes_that_are_no_text(store: Path) -> None:
    path = store / "manifest.json"
    manifest = json.loads(path.read_text()) | {"remark": "remark"}
    path.write_bytes(json.dumps(manifest).encode().replace(b'"remark"}', b'"re\xd8mark"}'))
    with pytest.raises(FormatError, match="damaged manifest: not JSON"):
        lmd3.open_store(store)


def test_texts_that_are_promised_and_not_there(store: Path) -> None:
    change(store, lambda m: m.update(texts=True))
    with pytest.raises(FormatError, match="has rows without"):
        list(lmd3.open_store(store).texts())


def test_no_drift_of_texts_that_are_promised_and_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A store whose encoder counted texts, and keeps none."""
    store = tmp_path / "s"
    lmd3.encode(["a b c", "b c d", "c d e"] * 20, out=store, keep_texts=False)
    change(store, lambda m: m.update(texts=True))
    assert main(["inspect", str(store), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["idf_drift"] is None


def test_names_of_arrow_columns_that_are_no_text(tmp_path: Path) -> None:
    """The bytes of a column's name are damaged: first no UTF-8, then a name that ends early."""
    import pyarrow as pa

    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(12, dtype=np.float32)), 4)
    table = pa.table({"id": ["a", "b", "c"], "vectorcolumn": vectors})
    path = tmp_path / "x.arrow"
    for make in (pa.ipc.new_file, pa.ipc.new_stream):
        for damaged in (b"vector\xff\xfeumn", b"vector\0olumn", b"\0ectorcolumn"):
            with make(str(path), table.schema) as writer:
                writer.write_table(table)
            path.write_bytes(path.read_bytes().replace(b"vectorcolumn", damaged))
            for attempt in (
                lambda: lmd3.open_store(path),
                lambda: lmd3.import_vectors(path, tmp_path / "out", force=True),
            ):
                # Read by its whole name or refused by the file's.
                try:
                    found = attempt()
                except InputError as error:
                    assert error.file == str(path)
                else:
                    np.testing.assert_array_equal(found.rows(np.arange(3)).reshape(-1), np.arange(12))
