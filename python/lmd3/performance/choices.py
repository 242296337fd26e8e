"""Multiple choice by likelihood: which of an item's answers does a language model find likeliest?

An answer's score is its log-likelihood given the prompt: the sum (as lm-evaluation-harness's `acc`), or per
token or byte of the answer (`acc_norm` is per byte).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmd3.errors import ParameterError, ShapeError
from lmd3.performance import LanguageModel

__all__ = ["ChoiceScores", "score_choices"]

_PER = ("sum", "token", "byte")


@dataclass(frozen=True)
class ChoiceScores:
    """What m items with choices got.

    Attributes:
        chosen: (m,) int64, the likeliest choice, the first of several that tie.
        correct: (m,) bool, whether the right one is likelier than every other: a tie is not correct.
        margin: (m,) float64, its score minus the best other's, in nats.
        nats: (m,) the negative log-likelihood of every choice, each (choices,).
    """

    chosen: NDArray[np.int64]
    correct: NDArray[np.bool_]
    margin: NDArray[np.float64]
    nats: tuple[NDArray[np.float64], ...]


def score_choices(
    model: LanguageModel,
    prompts: Sequence[str],
    choices: Sequence[Sequence[str]],
    right: Sequence[int],
    *,
    per: str = "sum",
) -> ChoiceScores:
    """Scores every choice of every item after its prompt.

    Args:
        model: gives likelihoods.
        prompts: (m,) what stands before the choices; one that does not end in white space gets a space.
        choices: (m,) two or more answers each.
        right: (m,) index of the right one.
        per: "sum", "token" or "byte".

    Raises:
        ShapeError: the lengths differ.
        ParameterError: an item with fewer than two choices, the right one not among them, or one twice.
    """
    if per not in _PER:
        raise ParameterError(f"unknown normalisation {per!r}", remedy=f"choose one of {', '.join(_PER)}")
    if not len(prompts) == len(choices) == len(right):
        raise ShapeError(f"{len(prompts)} prompts, {len(choices)} lists of choices, {len(right)} answers")
    for row, (options, index) in enumerate(zip(choices, right, strict=True)):
        if len(options) < 2 or not 0 <= index < len(options):
            raise ParameterError(f"{len(options)} choices with number {index} right", row=row)
        if len(set(options)) < len(options):
            raise ParameterError("a choice that is there twice", row=row)
    sizes = [len(options) for options in choices]
    likelihoods = model.score(
        [option for options in choices for option in options],
        [prompt for prompt, size in zip(prompts, sizes, strict=True) for _ in range(size)],
    )
    units = {
        "sum": np.ones(len(likelihoods.nats)),
        "token": np.maximum(likelihoods.tokens, 1),
        "byte": np.maximum(likelihoods.bytes, 1),
    }
    nats = np.split(likelihoods.nats / units[per], np.cumsum(sizes)[:-1])
    margin = np.empty(len(prompts))
    for row, (costs, index) in enumerate(zip(nats, right, strict=True)):
        margin[row] = np.delete(costs, index).min() - costs[index]
    return ChoiceScores(
        chosen=np.array([int(costs.argmin()) for costs in nats], dtype=np.int64),
        correct=margin > 0,
        margin=margin,
        nats=tuple(nats),
    )
