"""What a causal language model writes by itself: greedy continuations, extraction, exact answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmd3.errors import MissingDependencyError, ModelError

__all__ = ["Extraction", "Generator", "longest_run"]


@dataclass(frozen=True)
class Extraction:
    """What m texts gave away.

    Attributes:
        extracted: (m,) float64: 1 where greedy decoding continues the prefix by the text, word for word; 0
            where it does not; NaN where the text is too short.
        longest: (m,) float64: tokens of the longest run that the continuation shares with the text's; NaN
            likewise.
    """

    extracted: NDArray[np.float64]
    longest: NDArray[np.float64]


class Generator:
    """A causal language model that continues texts greedily.

    Args:
        model: its folder, or a name on the hub.
        batch: texts continued at once.

    Raises:
        MissingDependencyError: torch or transformers is not installed.
        ModelError: the model can't be loaded.
    """

    def __init__(self, model: str | Path, *, batch: int = 64) -> None:
        try:
            import transformers
        except ImportError as error:
            raise MissingDependencyError(
                f"generation needs a package that is not installed: {error.name or error}",
                remedy="pip install 'lmd3[encode]'",
            ) from None
        name = str(model)
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                name, trust_remote_code=False, dtype="float32"
            )
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"can't be loaded as a causal language model: {reason}", file=name) from None
        self._model.eval()
        self._batch = batch
        self._start = [] if self._tokenizer.bos_token_id is None else [self._tokenizer.bos_token_id]
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        self._context = int(limit) if limit else 1 << 30

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _continue(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        """Greedy continuations of prompts of one length."""
        import torch

        out: list[list[int]] = []
        for start in range(0, len(prompts), self._batch):
            ids = torch.tensor(prompts[start : start + self._batch])
            with torch.inference_mode():
                cache = None
                step = ids
                found = []
                for _ in range(tokens):
                    result = self._model(input_ids=step, past_key_values=cache, use_cache=True)
                    cache = result.past_key_values
                    step = result.logits[:, -1].argmax(dim=-1, keepdim=True)
                    found.append(step)
                out += torch.cat(found, dim=1).tolist()
        return out

    def extraction(self, texts: Sequence[str], *, prefix: int = 16, length: int = 16) -> Extraction:
        """Continues the first `prefix` tokens of each text and compares the next `length` with the text's."""
        prefix = min(prefix, self._context - length - len(self._start))
        ids = [self._ids(text) for text in texts]
        rows = [row for row, tokens in enumerate(ids) if len(tokens) >= prefix + length]
        extracted, longest = np.full(len(texts), np.nan), np.full(len(texts), np.nan)
        found = self._continue([self._start + ids[row][:prefix] for row in rows], length) if rows else []
        for row, continuation in zip(rows, found, strict=True):
            truth = ids[row][prefix : prefix + length]
            extracted[row] = float(continuation == truth)
            longest[row] = longest_run(continuation, truth)
        return Extraction(extracted, longest)

    def answers(self, prompts: Sequence[str], *, tokens: int = 32) -> list[str]:
        """What stands greedily after each prompt, up to the end of the text or `tokens`."""
        end = self._tokenizer.eos_token_id
        room = self._context - tokens
        ids = [(self._start + self._ids(prompt))[-room:] for prompt in prompts]
        out = [""] * len(prompts)
        for length in sorted({len(prompt) for prompt in ids}):
            rows = [row for row, prompt in enumerate(ids) if len(prompt) == length]
            for row, found in zip(rows, self._continue([ids[row] for row in rows], tokens), strict=True):
                cut = found.index(end) if end in found else len(found)
                out[row] = self._tokenizer.decode(found[:cut])
        return out

    def argmax_hits(self, text: str) -> NDArray[np.bool_]:
        """For each token of a text (cut at the context): whether it is the likeliest after those before."""
        import torch

        ids = (self._start + self._ids(text))[: self._context]
        if len(ids) < 2:
            return np.zeros(0, dtype=np.bool_)
        with torch.inference_mode():
            logits = self._model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
        hits: NDArray[np.bool_] = (logits.argmax(dim=-1) == torch.tensor(ids[1:])).numpy()
        return hits


def longest_run(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest run of tokens that two sequences share."""
    best = 0
    before = np.zeros(len(second) + 1, dtype=np.int64)
    other = np.asarray(second)
    for token in first:
        now = np.zeros_like(before)
        now[1:] = np.where(other == token, before[:-1] + 1, 0)
        best = max(best, int(now.max(initial=0)))
        before = now
    return best
