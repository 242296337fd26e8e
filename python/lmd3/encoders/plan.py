"""What an encoding will take, by a short trial of the encoder: hours, disk, and what a sample costs in
doubt."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import islice
from typing import Any

from lmd3.encoders import Encoder
from lmd3.store.layout import ITEM_BYTES
from lmd3.texts import Texts

__all__ = ["plan_encoding", "sampled_error"]

#: Shares of the texts that are compared.
RATES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.001)

#: Effective rows in the corpus that a bandwidth may stand for: the default rules.
EFFECTIVE = (1000, 100, 10_000)

#: Texts that the trial draws from, taken from the beginning of the input.
_TRIAL = 20_000


def sampled_error(rate: float, effective: float) -> float:
    """The standard error of log f that sampling at `rate` brings where `effective` rows of the corpus count:
    √((1 − R) / (R · ess)), of simple random sampling (see `lmd3.density.design_error`)."""
    return math.sqrt((1 - rate) / (rate * effective))


def plan_encoding(
    texts: Texts, encoder: Encoder, dtype: str = "float16", seconds: float = 3.0, keep_texts: bool = True
) -> dict[str, Any]:
    """Reads the input once to count it, and encodes some of it for a few seconds.

    Args:
        texts: the input.
        encoder: by what.
        dtype: element type on disk.
        seconds: of the trial.
        keep_texts: whether the texts are kept.

    Returns:
        `texts`; `characters` of them; `texts_per_second` of the trial; `bytes_per_row` on disk (texts before
        compression); `rates`: for shares of the texts `rate`, `texts`, `hours`, `bytes` and `std_error`, by
        the effective rows of the corpus that a bandwidth stands for; `speedup`: of bfloat16, where the
        encoder measured it.
    """
    count = characters = 0
    some: list[str] = []
    for batch in texts:
        count += len(batch)
        characters += sum(map(len, batch.texts))
        some += islice(batch.texts, max(0, _TRIAL - len(some)))
    if not encoder.fitted:
        encoder.fit(some)
    speed = _texts_per_second(some, encoder, seconds)
    row = encoder.dim * ITEM_BYTES[dtype] + (4 if dtype == "int8" else 0) + 24
    row_bytes = row + (characters / max(count, 1) if keep_texts else 0.0)
    rates = [
        {
            "rate": rate,
            "texts": round(count * rate),
            "hours": count * rate / speed / 3600,
            "bytes": round(count * rate * row_bytes),
            "std_error": {str(ess): sampled_error(rate, ess) for ess in EFFECTIVE if ess <= count / 4},
        }
        for rate in RATES
        if count * rate >= 1
    ]
    return {
        "texts": count,
        "characters": characters,
        "texts_per_second": speed,
        "bytes_per_row": row_bytes,
        "rates": rates,
        "speedup": getattr(encoder, "speedup", None),
    }


def _texts_per_second(texts: Sequence[str], encoder: Encoder, seconds: float) -> float:
    """By batches spread over the texts, doubled until the time is over."""
    encoder.encode(list(texts[:8]))
    size, done, spent = 16, 0, 0.0
    while spent < seconds:
        step = max(1, len(texts) // size)
        batch = list(texts[::step][:size])
        start = time.perf_counter()
        encoder.encode(batch)
        took = time.perf_counter() - start
        spent += took
        done += len(batch)
        if took < seconds / 4 and size < 4096:
            size *= 2
            # What was slow by warming up does not count.
            done, spent = (0, 0.0) if took < seconds / 16 else (done, spent)
    return done / spent
