from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmd3.encoders import Encoder, restore_encoder
from lmd3.encoders.hashing import HashingEncoder
from lmd3.errors import FileMissingError, FormatError, ModelError, ParameterError

CORPUS = [
    "Return the inverse of a matrix.",
    "Compute the inverse of a square matrix by elimination.",
    "Open a file and read its lines.",
    "Read all lines of the open file.",
    "The cat sleeps on the mat.",
    "A random walk on a graph.",
]


@pytest.fixture(scope="module")
def encoder() -> HashingEncoder:
    encoder = HashingEncoder()
    encoder.fit(CORPUS)
    return encoder


def test_is_an_encoder_with_unit_vectors(encoder: HashingEncoder) -> None:
    assert isinstance(encoder, Encoder)
    batch = encoder.encode(CORPUS)
    assert batch.vectors.shape == (6, 384) and batch.vectors.dtype == np.float32
    assert batch.tokens.tolist() == [6, 9, 7, 7, 6, 6] and batch.tokens.dtype == np.int32
    assert not batch.truncated.any() and batch.truncated.dtype == np.bool_
    np.testing.assert_allclose(np.linalg.norm(batch.vectors, axis=1), 1, atol=1e-6)


def test_nearest_texts_share_words(encoder: HashingEncoder) -> None:
    rows = encoder.encode(CORPUS).vectors
    queries = ["the inverse matrix", "lines of a file", "a cat on a mat", "walk on the graph"]
    nearest = (encoder.encode(queries).vectors @ rows.T).argmax(axis=1)
    assert nearest[0] in (0, 1) and nearest[1] in (2, 3) and nearest[2] == 4 and nearest[3] == 5


def test_cosines_follow_the_tf_idf_vectors(encoder: HashingEncoder) -> None:
    """Against explicit tf-idf vectors over words and pairs, without hashing."""
    wide = HashingEncoder(dim=16384)
    wide.fit(CORPUS)

    def features(text: str) -> list[tuple[str, ...]]:
        words = text.lower().replace(".", "").split()
        return [(word,) for word in words] + list(itertools.pairwise(words))

    documents = [set(features(text)) for text in CORPUS]
    names = sorted(set().union(*documents))
    exact = np.zeros((len(CORPUS), len(names)))
    for row, text in zip(exact, CORPUS, strict=True):
        found = features(text)
        for name in set(found):
            df = sum(name in document for document in documents)
            row[names.index(name)] = (1 + np.log(found.count(name))) * (1 + np.log(len(CORPUS) / df))
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    vectors = wide.encode(CORPUS).vectors.astype(float)
    np.testing.assert_allclose(vectors @ vectors.T, exact @ exact.T, atol=5 / np.sqrt(16384))


def test_case_order_and_company_do_not_matter(encoder: HashingEncoder) -> None:
    alone = encoder.encode(["The CAT sleeps"]).vectors[0]
    among = encoder.encode([*CORPUS * 1000, "the cat, sleeps!"]).vectors[-1]
    np.testing.assert_array_equal(alone, among)


def test_unseen_words_weigh_the_most(encoder: HashingEncoder) -> None:
    def share(word: str) -> float:
        text, alone = encoder.encode([f"{word} zyxgloss", word]).vectors
        return float(text @ alone)

    assert share("the") < share("xylophone") - 0.1


@given(st.lists(st.text(max_size=30), max_size=5))
def test_any_text_is_encoded(texts: list[str]) -> None:
    encoder = HashingEncoder(dim=64)
    encoder.fit(CORPUS)
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    norms = np.linalg.norm(encoder.encode(texts).vectors, axis=1)
    np.testing.assert_allclose(norms, np.ones(len(texts)), atol=1e-5)


def test_longer_texts_are_cut_and_counted() -> None:
    encoder = HashingEncoder(max_tokens=3)
    encoder.fit(CORPUS)
    batch = encoder.encode(["one two three", "one two three four five"])
    assert batch.tokens.tolist() == [3, 3] and batch.truncated.tolist() == [False, True]
    np.testing.assert_array_equal(batch.vectors[0], batch.vectors[1])


def test_state_is_saved_and_restored(encoder: HashingEncoder, tmp_path: Path) -> None:
    encoder.save_state(tmp_path)
    restored = restore_encoder(encoder.describe(), tmp_path)
    assert restored.describe() == encoder.describe()
    np.testing.assert_array_equal(restored.encode(CORPUS).vectors, encoder.encode(CORPUS).vectors)


def test_a_state_that_does_not_hold_is_refused(encoder: HashingEncoder, tmp_path: Path) -> None:
    description = encoder.describe()
    with pytest.raises(FileMissingError, match="hashing"):
        restore_encoder(description, tmp_path)
    encoder.save_state(tmp_path)
    file = tmp_path / "hashing.bin"
    good = file.read_bytes()
    for bad in (b"", b"junk" * 40, good[:-1], good[:60] + b"\0" + good[61:]):
        file.write_bytes(bad)
        with pytest.raises(FormatError):
            restore_encoder(description, tmp_path)
    file.write_bytes(good)
    with pytest.raises(FormatError, match="384 dimensions, not 128"):
        restore_encoder(description | {"dim": 128}, tmp_path)
    other = HashingEncoder()
    other.fit(CORPUS[:3])
    other.save_state(tmp_path)
    with pytest.raises(ModelError, match="fingerprint"):
        restore_encoder(description, tmp_path)


def test_misuse_is_refused(encoder: HashingEncoder) -> None:
    with pytest.raises(ModelError, match="no idf"):
        HashingEncoder().encode(["a"])
    with pytest.raises(ParameterError, match="frozen"):
        encoder.fit(CORPUS)
    with pytest.raises(ParameterError, match="no texts"):
        HashingEncoder().fit([])
    for settings in ({"dim": 0}, {"dim": 1 << 20}, {"max_tokens": 0}):
        with pytest.raises(ParameterError):
            HashingEncoder(**settings)


def test_bytes_do_not_depend_on_threads_or_processes() -> None:
    code = (
        "import hashlib; from lmd3.encoders.hashing import HashingEncoder as H\n"
        "t = [f'text {i} of {i % 7} words {i * i}' for i in range(3000)]\n"
        "e = H(); e.fit(t); print(e.describe()['fingerprint'], hashlib.md5(e.encode(t).vectors).hexdigest())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2", "3")
    }
    assert len(outputs) == 1
