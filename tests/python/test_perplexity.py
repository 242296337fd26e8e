"""Against a loss computed by hand on a tiny randomly initialised GPT-2; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lmd3.errors import ModelError, ParameterError, ShapeError

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'lmd3[encode]')")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from lmd3.performance import from_model  # noqa: E402
from lmd3.performance.perplexity import CausalModel  # noqa: E402
from lmd3.texts import Texts  # noqa: E402

CONTEXT = 24
TEXTS = [
    "The cat sat on the mat.",
    "A dog!",
    "x",
    "Übergrößenträger naïve café 日本語 text",
    "the mat the cat " * 12,
    "  leading space and trailing  ",
]


def save_model(folder: Path, bos: bool) -> Path:
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(TEXTS * 20, vocab_size=300, special_tokens=["<|bos|>"] if bos else [])
    special = {"bos_token": "<|bos|>"} if bos else {}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **special).save_pretrained(
        folder
    )
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=300, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["bos", "no-bos"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def loaded(folder: Path):  # type: ignore[no-untyped-def]
    return (
        transformers.AutoTokenizer.from_pretrained(folder),
        transformers.GPT2LMHeadModel.from_pretrained(folder).double().eval(),
    )


def loss(loaded, before: list[int], ids: list[int]) -> tuple[float, int]:  # type: ignore[no-untyped-def]
    """Sum of −ln p over the ids that can be predicted, by the model's own loss in float64."""
    tokenizer, model = loaded
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    sequence = torch.tensor([start + before + ids])
    labels = torch.tensor([[-100] * len(start + before) + ids])
    count = int((labels[0, 1:] != -100).sum())
    if count == 0:
        return 0.0, 0
    with torch.no_grad():
        return model(sequence, labels=labels).loss.item() * count, count


def test_likelihoods_are_the_models_own_loss(folder: Path, loaded) -> None:  # type: ignore[no-untyped-def]
    tokenizer = loaded[0]
    room = CONTEXT - (tokenizer.bos_token_id is not None)
    scores = CausalModel(folder).score(TEXTS)
    for i, text in enumerate(TEXTS):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        nats, count = loss(loaded, [], ids[:room])
        assert scores.nats[i] == pytest.approx(nats, rel=1e-5)
        assert scores.tokens[i] == count
        assert scores.truncated[i] == (len(ids) > room)
        first = 0 if tokenizer.bos_token_id is not None else 1
        covered = tokenizer.decode(ids[first:room], clean_up_tokenization_spaces=False)
        if "日" not in text or first == 0:
            assert scores.bytes[i] == len(covered.encode())
    assert scores.truncated.tolist() == [
        len(t) > 100 or s for t, s in zip(TEXTS, scores.truncated, strict=True)
    ]
    assert scores.truncated[4] and not scores.truncated[0]


def test_batches_change_nothing(folder: Path) -> None:
    model = CausalModel(folder)
    together = model.score(TEXTS * 5).nats
    alone = [model.score([text]).nats[0] for text in TEXTS * 5]
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_prompts_are_context_only(folder: Path, loaded) -> None:  # type: ignore[no-untyped-def]
    tokenizer = loaded[0]
    cases = [
        ("The cat", "sat"),
        ("", "sat on"),
        ("The mat\n", "the dog"),
        ("the cat " * 30, "the mat the dog"),
    ]
    model = CausalModel(folder)
    scores = model.score([text for _, text in cases], [prompt for prompt, _ in cases])
    room = CONTEXT - (tokenizer.bos_token_id is not None)
    for i, (prompt, text) in enumerate(cases):
        joined = text if not prompt or prompt[-1].isspace() else " " + text
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = tokenizer(joined, add_special_tokens=False)["input_ids"]
        kept = before[len(before) - min(len(before), room - len(ids)) :]
        nats, count = loss(loaded, kept, ids)
        assert scores.nats[i] == pytest.approx(nats, rel=1e-5) and scores.tokens[i] == count
        if count == len(ids):
            assert scores.bytes[i] == len(text.encode())
    assert scores.prompt_truncated.tolist() == [False, False, False, True]
    assert not scores.truncated.any()
    with pytest.raises(ShapeError):
        model.score(["a"], [])


def test_tokenisers_without_offsets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = CausalModel(folder).score(TEXTS)
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "is_fast", False)
    slow = CausalModel(folder).score(TEXTS)
    np.testing.assert_array_equal(slow.nats, fast.nats)
    ascii_only = [text.isascii() for text in TEXTS]
    np.testing.assert_array_equal(slow.bytes[ascii_only], fast.bytes[ascii_only])


def test_a_smaller_context_can_be_asked_for(folder: Path) -> None:
    scores = CausalModel(folder, max_tokens=4).score(TEXTS[:2])
    assert scores.truncated.all() and (scores.tokens == 3).all()


def test_outcome_table_leaves_out_what_cannot_be_scored(folder: Path, loaded) -> None:  # type: ignore[no-untyped-def]
    table = from_model(Texts.from_lists(["x", "The cat"], ids=["a", "b"]), folder)
    expected = ["a", "a", "b", "b"] if loaded[0].bos_token_id is not None else ["b", "b"]
    assert table["id"].to_pylist() == expected
    assert np.isfinite(table["value"].to_numpy()).all()


def test_what_is_no_causal_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="can't be loaded"):
        CausalModel(tmp_path)
    with pytest.raises(ModelError, match="no such folder"):
        CausalModel(tmp_path / "nowhere")


@pytest.mark.parametrize("stride", [1, 5, CONTEXT - 2])
def test_windows_of_long_texts(folder: Path, loaded, stride: int) -> None:  # type: ignore[no-untyped-def]
    tokenizer, reference = loaded
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    room = CONTEXT - len(start)
    texts = [*TEXTS, "the dog and the cat and the mat " * 7]
    prompts = ["", "A dog", "", "the cat " * 40, "the cat " * 3, "", "the mat " * 30]
    scores = CausalModel(folder, stride=stride).score(texts, prompts)
    cut = CausalModel(folder).score(texts, prompts)
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        joined = text if not prompt or prompt[-1].isspace() else " " + text
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
        ids = tokenizer(joined, add_special_tokens=False)["input_ids"]
        body = before + ids
        if len(body) <= room:
            assert scores.nats[i] == cut.nats[i] and scores.tokens[i] == cut.tokens[i]
            continue
        # Token by token: each has at least the last room − stride tokens before it, or all there are.
        first = max(len(before), 1 - len(start))
        nats, done = 0.0, first
        while done < len(body):
            begin = max(0, done - (room - stride))
            end = min(len(body), begin + room)
            for t in range(done, end):
                with torch.no_grad():
                    logits = reference(torch.tensor([start + body[begin:t]])).logits[0, -1]
                nats -= float(torch.log_softmax(logits, -1)[body[t]])
            done = end
        assert scores.nats[i] == pytest.approx(nats, rel=1e-5)
        assert scores.tokens[i] == len(body) - first and not scores.truncated[i]
        if start or before:
            assert scores.bytes[i] == len(text.encode())
    assert scores.prompt_truncated.tolist()[3] and scores.prompt_truncated.tolist()[6]
    assert not scores.prompt_truncated[:3].any()


def test_strides_and_types_that_are_none(folder: Path) -> None:
    for stride in (0, CONTEXT):
        with pytest.raises(ParameterError, match="stride"):
            CausalModel(folder, stride=stride)
    with pytest.raises(ParameterError, match="dtype"):
        CausalModel(folder, dtype="int8")
    with pytest.raises(ParameterError, match="neural"):
        from_model(Texts.from_lists(TEXTS), train=TEXTS, stride=3)


def test_arithmetic_on_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = CausalModel(folder).score(TEXTS).nats
    half = CausalModel(folder, dtype="bfloat16")
    assert half.describe()["dtype"] == "bfloat16"
    np.testing.assert_allclose(half.score(TEXTS).nats, exact, rtol=0.05)
    assert (half.score(TEXTS).nats != exact).any()
    for seconds, expected in ((0.5, "bfloat16"), (2.0, "float32")):
        times = iter([1.0, seconds])
        monkeypatch.setattr(CausalModel, "_seconds", lambda self, probe, times=times: next(times))
        model = CausalModel(folder, dtype="auto")
        assert model.dtype == expected and model.speedup == 1 / seconds
        if expected == "float32":
            # Weights that were rounded for the benchmark are read again.
            np.testing.assert_array_equal(model.score(TEXTS).nats, exact)
