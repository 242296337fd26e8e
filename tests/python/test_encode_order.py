"""Rows of an encoded store against a direct encode: any window, number of workers, cut and input format."""

from __future__ import annotations

import csv
import gzip
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lmd3
from lmd3.encoders import EncodedBatch
from lmd3.encoders.chunking import Chunking, cut_texts
from lmd3.encoders.hashing import HashingEncoder
from lmd3.errors import ParameterError
from lmd3.store.sampling import LEAST, SampleCounter, SampleDesign
from lmd3.texts import Texts, read_texts


def expected_rows(store: lmd3.Store, texts: Sequence[str]) -> None:
    """The store's vectors are those that its encoder gives for the texts, one call for all."""
    from lmd3.encoders.run import encoder_from_store

    direct = encoder_from_store(store).encode(list(texts)).vectors
    np.testing.assert_array_equal(store.rows(np.arange(store.n)), direct)


texts_strategy = st.lists(
    st.integers(0, 9).map(lambda n: " ".join(f"w{i * n}" for i in range(n))), min_size=1
)


@settings(max_examples=40, deadline=None)
@given(
    texts=texts_strategy.filter(any),
    window=st.integers(1, 30),
    shard_rows=st.integers(1, 30),
    mode=st.sampled_from([("truncate", None, 0), ("first", 3, 0), ("sliding", 3, 0), ("sliding", 3, 2)]),
    sample=st.sampled_from([None, 0.5]),
)
def test_windows_shards_cuts_and_samples(
    texts: list[str], window: int, shard_rows: int, mode: tuple[str, int | None, int], sample: float | None
) -> None:
    chunking = Chunking(*mode)
    if mode[0] == "sliding":
        sample = None
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "s"
        store = lmd3.encode(
            texts,
            out=out,
            dtype="float32",
            window=window,
            shard_rows=shard_rows,
            chunk=chunking,
            sample=sample,
        )
        kept = [(str(row), text) for row, text in enumerate(texts) if text]
        if sample is not None:
            design = SampleDesign.restore(store.manifest["sampling"])
            mask = design.keep([name for name, _ in kept], None)
            kept = [pair for pair, taken in zip(kept, mask, strict=True) if taken]
            weights = store.weights()
            assert weights is not None and np.isclose(weights[0], design.texts / design.sampled)
        cut = cut_texts([text for _, text in kept], chunking, HashingEncoder())
        names = [kept[row][0] for row in cut.owner]
        if mode[0] == "sliding":
            names = [f"{name}#{chunk}" for name, chunk in zip(names, cut.chunk, strict=True)]
        every = np.arange(store.n)
        found = store.documents(every, ("id", "text", "document", "chunk")).to_pydict()
        assert found["id"] == names and found["text"] == cut.texts
        if mode[0] == "sliding":
            assert found["document"] == [kept[row][0] for row in cut.owner]
            assert found["chunk"] == cut.chunk.tolist()
        expected_rows(store, cut.texts)
        assert store.manifest["counts"]["tokens_left_out"] == int(cut.left_out.sum())
        assert [shard["rows"] for shard in store.manifest["shards"][:-1]] == [shard_rows] * (
            (store.n - 1) // shard_rows
        )


RECORDS = [
    {"id": f"k{row}", "text": f"text {row} of {'long ' * (row % 7)}", "group": "ab"[row % 2]}
    for row in range(60)
]


def _lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _write(path: Path) -> None:
    name = path.name
    if name.endswith(".jsonl"):
        path.write_text(_lines(RECORDS))
    elif name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(_lines(RECORDS).encode()))
    elif name.endswith(".jsonl.zst"):
        path.write_bytes(pa.compress(_lines(RECORDS).encode(), codec="zstd", asbytes=True))
    elif name.endswith(".csv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(RECORDS[0]))
            writer.writeheader()
            writer.writerows(RECORDS)
    elif name.endswith(".txt"):
        path.write_text("".join(record["text"] + "\n" for record in RECORDS))
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=13)
    else:
        path.mkdir()
        (path / "0.jsonl").write_text(_lines(RECORDS[:20]))
        pq.write_table(pa.Table.from_pylist(RECORDS[20:]), path / "1.parquet")


@pytest.mark.parametrize(
    "name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.csv", "x.txt", "x.parquet", "folder"]
)
def test_input_formats(name: str, tmp_path: Path) -> None:
    _write(tmp_path / name)
    store = lmd3.encode(
        read_texts(tmp_path / name), out=tmp_path / "s", dtype="float32", window=7, shard_rows=17
    )
    ids = [str(row) if name == "x.txt" else record["id"] for row, record in enumerate(RECORDS)]
    assert store.ids() == ids
    expected_rows(store, [record["text"] for record in RECORDS])


def test_workers_change_nothing(tmp_path: Path) -> None:
    texts = [f"text {row} " * (row % 5 + 1) for row in range(90)]
    one = lmd3.encode(texts, out=tmp_path / "one", window=8, shard_rows=30)
    two = lmd3.encode(texts, out=tmp_path / "two", window=8, shard_rows=30, workers=2, threads=2)
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    assert one.fingerprint == two.fingerprint


def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    class Own(HashingEncoder):
        def describe(self) -> dict[str, Any]:
            return super().describe() | {"kind": "own"}

        def encode(self, texts: Sequence[str]) -> EncodedBatch:
            raise AssertionError

    with pytest.raises(lmd3.errors.ModelError, match="other processes"):
        lmd3.encode(["a b"], Own(), tmp_path / "s", workers=2)
    assert not list(tmp_path.iterdir())


# --- cutting ---


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(
        st.text("ab ,.é漢", max_size=40).filter(lambda text: not text.isspace() and text), max_size=5
    ),
    size=st.integers(1, 6),
    overlap=st.integers(0, 5),
)
def test_chunks_cover_their_text(texts: list[str], size: int, overlap: int) -> None:
    encoder = HashingEncoder()
    if overlap >= size:
        with pytest.raises(ParameterError):
            Chunking("sliding", size, overlap)
        return
    cut = cut_texts(texts, Chunking("sliding", size, overlap), encoder)
    words = [
        [text[start:end] for start, end in spans.tolist()]
        for text, spans in zip(texts, encoder.token_spans(texts), strict=True)
    ]
    for row in range(len(texts)):
        chunks = [cut.texts[at] for at in np.flatnonzero(cut.owner == row)]
        assert cut.chunk[cut.owner == row].tolist() == list(range(len(chunks)))
        parts = [
            [chunk[start:end] for start, end in encoder.token_spans([chunk])[0].tolist()] for chunk in chunks
        ]
        assert all(len(part) <= size for part in parts)
        if not words[row]:
            assert chunks == [texts[row]]
            continue
        # Laid end to end without what they share, the chunks give the words back.
        joined = list(parts[0])
        for part in parts[1:]:
            shared = next(
                k for k in range(len(part), -1, -1) if k < size and (k == 0 or joined[-k:] == part[:k])
            )
            joined += part[shared:] if overlap else part
        if not overlap:
            assert joined == words[row]
        else:
            assert joined[0] == words[row][0] and joined[-1] == words[row][-1]


def test_tokens_that_are_left_out_are_counted_by_group(tmp_path: Path) -> None:
    texts = Texts.from_lists(["a b c d e", "a b", "a b c d"], groups=["x", "x", "y"])
    cases: tuple[dict[str, Any], ...] = ({"max_tokens": 3}, {"chunk": "first", "chunk_tokens": 3})
    for number, settings_ in enumerate(cases):
        store = lmd3.encode(texts, out=tmp_path / str(number), **settings_)
        assert store.manifest["groups"] == [
            {"name": "x", "rows": 2, "tokens": 5, "truncated": 1, "tokens_left_out": 2},
            {"name": "y", "rows": 1, "tokens": 3, "truncated": 1, "tokens_left_out": 1},
        ]
        assert store.manifest["counts"] == {"rows": 3, "tokens": 8, "truncated": 2, "tokens_left_out": 3}


def test_cuts_without_meaning_are_refused(tmp_path: Path) -> None:
    for settings_ in (
        {"chunk": "middle"},
        {"chunk": "truncate", "chunk_tokens": 3},
        {"chunk": "first", "chunk_overlap": 1},
        {"chunk": "sliding", "chunk_tokens": 3, "chunk_overlap": 3},
        {"chunk": "sliding"},
        {"chunk": "sliding", "chunk_tokens": 9, "max_tokens": 4},
        {"chunk": "sliding", "chunk_tokens": 9, "sample": 0.5},
    ):
        with pytest.raises(ParameterError):
            lmd3.encode(["a b"], out=tmp_path / "s", **settings_)
    assert not list(tmp_path.iterdir())


# --- sampling ---


def drawn(
    ids: list[str], groups: list[str] | None, rate: float, by: str | None, seed: int = 0
) -> SampleDesign:
    counter = SampleCounter(rate, seed, by)
    for start in range(0, len(ids), 700):
        part = slice(start, start + 700)
        counter.add(ids[part], None if groups is None else groups[part])
    return counter.finish()


@pytest.mark.parametrize("by", [None, "group"])
def test_a_larger_sample_holds_the_smaller(by: str | None) -> None:
    ids = [f"id{row}" for row in range(5000)]
    groups = ["small" if row < 20 else "tiny" if row < 90 else "large" for row in range(5000)]
    before = np.zeros(5000, bool)
    for rate in (0.001, 0.01, 0.05, 0.3, 0.9):
        design = drawn(ids, groups, rate, by)
        taken = design.keep(ids, groups)
        assert not (before & ~taken).any()
        before = taken
        assert design.texts == 5000 and design.sampled == taken.sum()
        weights = design.weights(int(taken.sum()), [g for g, t in zip(groups, taken, strict=True) if t])
        assert np.isclose(weights.sum(), 5000)
        for name, stratum in design.strata.items():
            inside = np.array([by is None or group == name for group in groups])
            assert stratum.texts == inside.sum() and stratum.sampled == (inside & taken).sum()
            assert stratum.sampled >= min(LEAST, stratum.texts)
        assert SampleDesign.restore(json.loads(json.dumps(design.describe()))) == design
    assert abs(before.mean() - 0.9) < 0.03


def test_samples_follow_their_seed_and_not_the_order() -> None:
    ids = [f"id{row}" for row in range(2000)]
    first = drawn(ids, None, 0.2, None, seed=1).keep(ids, None)
    turned = drawn(ids[::-1], None, 0.2, None, seed=1).keep(ids[::-1], None)[::-1]
    np.testing.assert_array_equal(first, turned)
    other = drawn(ids, None, 0.2, None, seed=2).keep(ids, None)
    assert 0.02 < (first & other).mean() < 0.06


def test_samples_by_group_need_groups(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="--group"):
        lmd3.encode(["a b"], out=tmp_path / "s", sample=0.5, sample_by="group")
    assert not list(tmp_path.iterdir())


def test_a_converted_store_keeps_its_sample_its_chunks_and_its_counts(tmp_path: Path) -> None:
    texts = [f"a b c d e f {row}" for row in range(200)]
    lmd3.encode(texts, out=tmp_path / "s", sample=0.3, max_tokens=4)
    lmd3.encode(texts, out=tmp_path / "c", chunk="sliding", chunk_tokens=3)
    for name in ("s", "c"):
        before = lmd3.open_store(tmp_path / name)
        after = lmd3.convert(before, tmp_path / f"{name}32", dtype="float32")
        for fact in ("sampling", "chunking", "counts"):
            assert after.manifest.get(fact) == before.manifest.get(fact)
        assert (after.population, after.chunked) == (before.population, before.chunked)
        every = np.arange(before.n)
        columns = ("id", "document", "chunk")
        assert after.documents(every, columns).equals(before.documents(every, columns))
