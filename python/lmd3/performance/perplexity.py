"""The likelihood of texts under any causal language model of `transformers`, by name or folder.

* Weights and arithmetic are float32 unless another is asked for; losses are summed in float32 or better.
  `auto` takes bfloat16 where a short benchmark finds it faster. Code that comes with a model is never run.
* Texts are tokenised without special tokens. Where the tokeniser has a beginning-of-sequence token it is put
  first, so that every token of the text is predicted; where it has none the first token is context only.
  `describe` says which. No end-of-sequence token is added or predicted.
* A text longer than the context is cut at its end and counted; its likelihood is that of the part kept, per
  token and byte of that part. With a stride it is read in windows of the context's length instead: each moves
  on by so many tokens and is scored on those alone, the others are their context; a beginning-of-sequence
  token stands at the front of every window.
* With a prompt, the prompt and the text are tokenised apart and joined by a space at the front of the text
  (none after an empty prompt, or one that ends in white space). Only the text is scored. Where both together
  are longer than the context the prompt loses its beginning (with a stride, all of what does not stand
  before the text in its first window).
* Texts of like length share a batch, which may change the last bits of a result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lmd3.errors import MissingDependencyError, ModelError, ParameterError, ShapeError
from lmd3.performance import Likelihoods

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "CausalModel"]

DTYPES = ("float32", "bfloat16", "auto")

#: What bfloat16 must gain in the benchmark to be taken.
_WORTH = 1.05

#: Bytes of logits held at once, which bounds the tokens per batch by the size of the vocabulary.
_LOGIT_BYTES = 1 << 28


class _Window(NamedTuple):
    """What the model reads at once: `ids[scored:]` are predicted."""

    ids: list[int]
    scored: int


class _Sequence(NamedTuple):
    """One text as the model reads it, of whose bytes `size` are predicted."""

    windows: list[_Window]
    size: int
    truncated: bool
    prompt_truncated: bool


class CausalModel:
    """A causal language model.

    Args:
        model: name on the hub or folder.
        revision: of a model on the hub.
        max_tokens: tokens read of each text (and prompt), below the model's own limit; None: that limit.
        device: where it runs; None: a GPU if there is one.
        stride: tokens that the window moves on in longer texts; None: these are cut.
        dtype: of weights and arithmetic: "float32", "bfloat16", or "auto": bfloat16 if it is faster here.

    Attributes:
        dtype: as used.
        speedup: of bfloat16 over float32, as the benchmark of "auto" found; None: not measured.

    Raises:
        MissingDependencyError: torch or transformers is not installed.
        ModelError: the model can't be loaded, or is no causal language model.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        revision: str | None = None,
        max_tokens: int | None = None,
        device: str | None = None,
        stride: int | None = None,
        dtype: str = "float32",
    ) -> None:
        if dtype not in DTYPES:
            raise ParameterError(f"unknown dtype {dtype!r}", remedy=f"choose one of {', '.join(DTYPES)}")
        if max_tokens is not None and max_tokens < 2:
            raise ParameterError(f"max_tokens must be at least 2, not {max_tokens}")
        folder = Path(model).expanduser()
        self.name = str(folder) if folder.is_dir() else str(model)
        if not folder.is_dir() and self.name.startswith((".", "/", "~")):
            raise ModelError("no such folder of a model", file=self.name)
        try:
            import torch
            import transformers
        except ImportError as error:
            raise MissingDependencyError(
                f"scoring by {self.name!r} needs a package that is not installed: {error.name or error}",
                remedy="pip install 'lmd3[encode]', or use --model ngram",
            ) from None
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}

        def load() -> Any:
            return transformers.AutoModelForCausalLM.from_pretrained(self.name, **options)

        self._load = load
        try:
            with _quiet():
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(self.name, **options)
                loaded = load()
        # Every library below raises its own kinds here, for missing files, networks and formats alike.
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ModelError(
                f"the causal language model {self.name!r} can't be loaded: {reason[0]}",
                remedy="check the name or folder; it needs a config, weights and a tokeniser",
            ) from error
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model = loaded.to(self._device, torch.float32).eval()
        self._revision = getattr(loaded.config, "_commit_hash", None) or revision
        self._bos: int | None = self._tokenizer.bos_token_id
        limits = [limit for limit in (_context(loaded.config, self._tokenizer), max_tokens) if limit]
        self.context: int | None = min(limits, default=None)
        self.stride = stride
        if stride is not None and not 1 <= stride < (self.context or stride + 1):
            raise ParameterError(f"stride must be in 1..{(self.context or 0) - 1}, not {stride}")
        self.speedup: float | None = None
        self.dtype = self._take(dtype, loaded.config.get_text_config().vocab_size)
        self._batch_tokens = max(1, _LOGIT_BYTES // (4 * loaded.config.get_text_config().vocab_size))

    def _take(self, dtype: str, vocabulary: int) -> str:
        """Puts the model into a data type; "auto" is decided by the time that a batch takes."""
        import torch

        if dtype == "auto":
            drawn = np.random.default_rng(0).integers(vocabulary, size=min(64, self.context or 64))
            ids = [int(i) for i in drawn]
            probe = [_Window(ids, 1)] * 8
            before = self._seconds(probe)
            self._model.to(torch.bfloat16)
            self.speedup = before / self._seconds(probe)
            dtype = "bfloat16" if self.speedup >= _WORTH else "float32"
            if dtype == "float32":
                # Weights that were rounded are not the model's any more.
                self._model = self._load().to(self._device, torch.float32).eval()
        elif dtype == "bfloat16":
            self._model.to(torch.bfloat16)
        return dtype

    def _seconds(self, probe: list[_Window]) -> float:
        """Least time of three of a batch."""
        self._nats(probe[:1])
        times = []
        for _ in range(3):
            start = time.perf_counter()
            self._nats(probe)
            times.append(time.perf_counter() - start)
        return min(times)

    def describe(self) -> dict[str, Any]:
        """The model and how it is read, as JSON values."""
        return {
            "kind": "causal",
            "model": self.name,
            "revision": self._revision,
            "dtype": self.dtype,
            "context": self.context,
            "stride": self.stride,
            "first_token": "context only" if self._bos is None else "predicted after the BOS token",
        }

    def score(self, texts: Sequence[str], prompts: Sequence[str] | None = None) -> Likelihoods:
        """The likelihoods of texts, each after its prompt if there are prompts.

        Raises:
            ShapeError: not as many prompts as texts.
        """
        if prompts is not None and len(prompts) != len(texts):
            raise ShapeError(f"{len(prompts)} prompts for {len(texts)} texts")
        pairs = [("", text) for text in texts] if prompts is None else zip(prompts, texts, strict=True)
        sequences = [self._sequence(prompt, text) for prompt, text in pairs]
        windows = [window for s in sequences for window in s.windows]
        of_text = np.repeat(np.arange(len(sequences)), [len(s.windows) for s in sequences])
        found = np.zeros(len(windows))
        for batch in self._batches(windows):
            found[batch] = self._nats([windows[i] for i in batch])
        tokens = np.array([len(w.ids) - w.scored for w in windows], dtype=np.int64)
        return Likelihoods(
            nats=np.bincount(of_text, found, minlength=len(sequences)).astype(np.float64),
            tokens=np.bincount(of_text, tokens, minlength=len(sequences)).astype(np.int64),
            bytes=np.array([s.size for s in sequences], dtype=np.int64),
            truncated=np.array([s.truncated for s in sequences], dtype=np.bool_),
            unknown=np.zeros(len(sequences), dtype=np.int64),
            prompt_truncated=np.array([s.prompt_truncated for s in sequences], dtype=np.bool_),
        )

    def _sequence(self, prompt: str, text: str) -> _Sequence:
        join = " " if prompt and not prompt[-1].isspace() else ""
        before: list[int] = self._tokens(prompt)[0] if prompt else []
        tokens, end = self._tokens(join + text)
        start = [] if self._bos is None else [self._bos]
        whole = len(start) + len(before) + len(tokens)
        if self.stride is not None and self.context is not None and whole > self.context:
            windows = self._windows(start, before, tokens)
            skipped = 0 if start or before else 1
            size = len((join + text)[end(skipped) if skipped else len(join) :].encode())
            lost = len(start) + len(before) - windows[0].scored
            return _Sequence(windows, size, False, lost > 0)
        room = whole if self.context is None else self.context
        kept = tokens[: room - len(start)]
        left = room - len(start) - len(kept)
        shortened = before[max(0, len(before) - left) :]
        ids = start + shortened + kept
        # The very first token of a sequence is never predicted.
        scored = max(1, len(start) + len(shortened)) if ids else 0
        skipped = scored - len(start) - len(shortened)
        first = end(skipped) if skipped > 0 else len(join)
        # Where all is kept the text's end counts too, even white space that the tokeniser drops.
        last = end(len(kept)) if len(kept) < len(tokens) else len(join + text)
        size = len((join + text)[first:last].encode())
        window = _Window(ids, scored)
        return _Sequence([window], size, len(kept) < len(tokens), len(shortened) < len(before))

    def _windows(self, start: list[int], before: list[int], tokens: list[int]) -> list[_Window]:
        """Windows of a sequence longer than the context; every token of the text is predicted in one."""
        assert self.context is not None and self.stride is not None
        body, room = before + tokens, self.context - len(start)
        # The very first token of a sequence without a beginning is never predicted.
        next_token = max(len(before), 1 - len(start))
        windows = []
        while next_token < len(body):
            begin = max(0, next_token - (room - self.stride))
            end = min(begin + room, len(body))
            windows.append(_Window(start + body[begin:end], len(start) + next_token - begin))
            next_token = end
        return windows

    def _tokens(self, text: str) -> tuple[list[int], Callable[[int], int]]:
        """The text's tokens, and how many characters of it the first k of them cover."""
        fast = self._tokenizer.is_fast
        # Longer than the context is expected here: no warning.
        encoded = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=fast, truncation=False, verbose=False
        )
        ids: list[int] = encoded["input_ids"]
        if fast:
            offsets: list[tuple[int, int]] = encoded["offset_mapping"]
            return ids, lambda k: offsets[k - 1][1]
        return ids, lambda k: len(self._tokenizer.decode(ids[:k]))

    def _batches(self, sequences: list[_Window]) -> list[list[int]]:
        """Windows with something to predict, longest first, together as long as their padded tokens fit."""
        order = [i for i, s in enumerate(sequences) if len(s.ids) > s.scored]
        order.sort(key=lambda i: (-len(sequences[i].ids), i))
        batches: list[list[int]] = []
        for i in order:
            room = self._batch_tokens // len(sequences[batches[-1][0]].ids) if batches else 0
            if batches and len(batches[-1]) < room:
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches

    def _nats(self, batch: list[_Window]) -> list[float]:
        import torch

        width = max(len(s.ids) for s in batch)
        ids = torch.zeros((len(batch), width), dtype=torch.long)
        mask = torch.zeros((len(batch), width), dtype=torch.long)
        for row, s in enumerate(batch):
            # Padded at the right: what is predicted never sees the padding.
            ids[row, : len(s.ids)] = torch.tensor(s.ids)
            mask[row, : len(s.ids)] = 1
        with torch.inference_mode():
            ids = ids.to(self._device)
            logits: torch.Tensor = self._model(
                input_ids=ids, attention_mask=mask.to(self._device), use_cache=False
            ).logits
            return [
                torch.nn.functional.cross_entropy(
                    logits[row, s.scored - 1 : len(s.ids) - 1].float(),
                    ids[row, s.scored : len(s.ids)],
                    reduction="none",
                )
                .double()
                .sum()
                .item()
                for row, s in enumerate(batch)
            ]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the notices and bars of `transformers` for a while."""
    import transformers

    logging: Any = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _context(config: Any, tokenizer: Any) -> int | None:
    """The most tokens a model reads, as its configuration or else its tokeniser says; None: no limit."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 1:
            return value
    limit = tokenizer.model_max_length
    return int(limit) if 1 < limit < 1 << 30 else None
