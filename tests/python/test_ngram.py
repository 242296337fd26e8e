from __future__ import annotations

import json
import math
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmd3.errors import ParameterError, ShapeError
from lmd3.outcomes import OUTCOME_SCHEMA
from lmd3.performance import from_model
from lmd3.performance.ngram import NgramModel
from lmd3.texts import Texts

TEXTS = [
    "The cat sat on the mat.",
    "The dog sat on the log.",
    "A cat and a dog sat.",
    "On the mat sat a cat, and on the log a dog.",
] * 2 + ["The mat is red.", "The log is wet; the cat is not."]


def tokens(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


class Reference:
    """Interpolated modified Kneser–Ney written out slowly, for order 3."""

    def __init__(self, texts: list[str]) -> None:
        self.tri: Counter[tuple[str, ...]] = Counter()
        start: Counter[tuple[str, ...]] = Counter()
        for text in texts:
            words = ["<s>", *tokens(text), "</s>"]
            start[tuple(words[:2])] += 1
            self.tri.update(zip(words, words[1:], words[2:], strict=False))
        self.bi = Counter((v, w) for _, v, w in self.tri) + start
        self.uni = Counter(w for _, w in self.bi)
        self.d = [self.discounts(counts) for counts in (self.uni, self.bi, self.tri)]

    @staticmethod
    def discounts(counts: Counter) -> list[float]:
        n1, n2, n3, n4 = (sum(c == k for c in counts.values()) for k in (1, 2, 3, 4))
        if 0 in (n1, n2, n3, n4):
            return [0.5, 1.0, 1.5]
        y = n1 / (n1 + 2 * n2)
        low, high = (0.05, 0.05, 0.05), (0.95, 1.95, 2.95)
        raw = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
        return np.clip(raw, low, high).tolist()

    def level(self, counts: dict[str, int], d: list[float], w: str, lower: float) -> float:
        total = sum(counts.values())
        left = sum(d[min(c, 3) - 1] for c in counts.values()) / total
        c = counts.get(w, 0)
        return (c - d[min(c, 3) - 1] if c else 0) / total + left * lower

    def p(self, u: str, v: str, w: str) -> float:
        p = self.level(dict(self.uni), self.d[0], w, 1 / (len(self.uni) + 1))
        after_one = {x: c for (a, x), c in self.bi.items() if a == v}
        if after_one:
            p = self.level(after_one, self.d[1], w, p)
        after_two = {x: c for (a, b, x), c in self.tri.items() if (a, b) == (u, v)}
        return self.level(after_two, self.d[2], w, p) if after_two else p

    def nats(self, text: str) -> float:
        words = ["", "<s>", *tokens(text), "</s>"]
        return -sum(math.log(self.p(*words[i : i + 3])) for i in range(len(words) - 2))


@pytest.mark.parametrize(
    "texts", [TEXTS, TEXTS[:1], [f"{a} {b} {c}." for a in "xyz" for b in "xyz" for c in "xy"]]
)
def test_agrees_with_the_formulas_written_out(texts: list[str]) -> None:
    reference = Reference(texts)
    queries = [*TEXTS, "The red dog is on the wet mat.", "Zebras? x y z y x.", "", "cat cat cat"]
    scores = NgramModel(texts).score(queries)
    np.testing.assert_allclose(scores.nats, [reference.nats(query) for query in queries], rtol=1e-12)
    assert scores.tokens.tolist() == [len(tokens(query)) + 1 for query in queries]
    assert scores.bytes.tolist() == [len(query.encode()) for query in queries]


@given(
    st.lists(st.text("ab cd.", max_size=20), min_size=1, max_size=6),
    st.lists(st.sampled_from(["a", "ab", ".", "never"]), max_size=3),
    st.booleans(),
)
def test_probabilities_sum_to_one(texts: list[str], context: list[str], from_start: bool) -> None:
    vocabulary = {token for text in texts for token in tokens(text)}
    native = NgramModel(texts).native
    following = [*vocabulary, None, "<unk>"]
    total = sum(math.exp(native.log_probability(context, token, from_start)) for token in following)
    assert total == pytest.approx(1, abs=1e-9)


def test_unknown_words_are_the_dearest_and_counted() -> None:
    for spelled in (False, True):
        model = NgramModel(TEXTS, spelled=spelled)
        known = min(model.native.log_probability(["the"], word) for word in ("red", "wet", "not", "and"))
        assert model.native.log_probability(["the"], "unicorn") < known
        assert model.score(["the unicorn sat, mooing"]).unknown.tolist() == [2]
    assert NgramModel(TEXTS).native.log_probability([], "ox") == NgramModel(TEXTS).native.log_probability(
        [], "hippopotamus"
    )


def test_copies_are_trained_further_without_touching_the_first() -> None:
    base = NgramModel(TEXTS[:6])
    before = base.score(TEXTS).nats
    more = base.copy().add(TEXTS[6:])
    np.testing.assert_array_equal(more.score(TEXTS).nats, NgramModel(TEXTS).score(TEXTS).nats)
    np.testing.assert_array_equal(base.score(TEXTS).nats, before)
    assert more.score(TEXTS).nats[-1] < before[-1] - 1


def test_prompts_are_context_only() -> None:
    model = NgramModel(TEXTS)
    after = model.score(["the mat."], ["The cat sat on"])
    assert after.tokens.tolist() == [4] and after.bytes.tolist() == [8]
    assert after.nats[0] < model.score(["the mat."]).nats[0]
    with pytest.raises(ShapeError, match="1 prompts for 2 texts"):
        model.score(["a", "b"], ["c"])


def test_misuse_is_refused() -> None:
    with pytest.raises(ParameterError, match="no texts"):
        NgramModel().score(["a"])
    with pytest.raises(ParameterError, match="not one text"):
        NgramModel("a text")


def test_outcome_table() -> None:
    texts = Texts.from_lists([*TEXTS[:2], "unicorns"], ids=["a", "b", "c"], groups=["g", "h", "g"])
    table = from_model(texts, "ngram", train=TEXTS, prompts={"b": "A cat."})
    assert table.schema.equals(OUTCOME_SCHEMA)
    assert table["id"].to_pylist() == ["a", "a", "b", "b", "c", "c"]
    assert table["outcome"].to_pylist() == ["nats_per_token", "nats_per_byte"] * 3
    assert table["group"].to_pylist() == ["g", "g", "h", "h", "g", "g"]
    scores = NgramModel(TEXTS).score([*TEXTS[:2], "unicorns"], ["", "A cat.", ""])
    values = np.array(table["value"].to_pylist()).reshape(3, 2)
    np.testing.assert_allclose(values[:, 0], scores.nats / scores.tokens)
    np.testing.assert_allclose(values[:, 1], scores.nats / scores.bytes)
    facts = json.loads(table.schema.metadata[b"lmd3"])
    assert facts["texts"] == 3 and facts["unknown"] == 1 and facts["model"]["order"] == 3


def test_training_texts_are_asked_for_and_refused_by_others() -> None:
    with pytest.raises(ParameterError, match="no training texts"):
        from_model(Texts.from_lists(["a"]), "ngram")
    with pytest.raises(ParameterError, match="n-gram model only"):
        from_model(Texts.from_lists(["a"]), "gpt2", train=TEXTS)
