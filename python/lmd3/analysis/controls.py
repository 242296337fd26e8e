"""Which controls enter a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from lmd3 import tables
from lmd3.errors import ParameterError

#: The part a known covariate plays; any other column of the covariates is the user's own and enters first.
LENGTH = ("log_tokens",)
LEXICAL = ("unigram_cross_entropy", "rarest_term_count", "ngram_overlap", "duplicates", "reference_loss")
TYPICALITY = "typicality"
MAX_COSINE = "max_cosine"
#: What the headline model of the method asks for; what of it is missing is named.
EXPECTED = (*LENGTH, "unigram_cross_entropy", TYPICALITY)


@dataclass(frozen=True)
class Controls:
    """The controls of a study.

    Attributes:
        names: columns that enter the headline model, in the order base, lexical, typicality.
        base, lexical: those of M0 and those that M1 adds.
        missing: what the headline model of the method asks for and nobody gave.
        left_out: column → why it was not used.
    """

    names: list[str]
    base: list[str]
    lexical: list[str]
    missing: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


#: Counts, which enter models as log(1 + count): their tails would be all that a line sees.
COUNTS = ("rarest_term_count", "duplicates")


def choose(
    wanted: str | Sequence[str], frame: pd.DataFrame, covariates: Sequence[str], predictor: str
) -> Controls:
    """Resolves `--controls`.

    Args:
        wanted: `default` (typicality and every numeric covariate), `none`, or names (a list, or joined by
            commas).
        frame: the joined rows.
        covariates: columns of the covariates' table.
        predictor: never a control of itself.

    Raises:
        ColumnError: a column named does not exist or is not numeric.
        ParameterError: the predictor named as its own control.
    """
    if isinstance(wanted, str):
        wanted = wanted if wanted in ("default", "none") else [w.strip() for w in wanted.split(",")]
    left_out: dict[str, str] = {}
    missing: list[str] = []
    names: list[str] = []
    if wanted == "none":
        pass
    elif wanted == "default":
        for name in dict.fromkeys([*covariates, TYPICALITY]):
            if name not in frame.columns or name in ("id", "group", MAX_COSINE, predictor):
                continue
            if not tables.is_numeric(frame[name]):
                left_out[name] = "not numeric"
            elif not np.isfinite(tables.numbers(frame[name], name)).any():
                left_out[name] = "no values"
            else:
                names.append(name)
        missing = [name for name in EXPECTED if name not in names and name != predictor]
    else:
        names = list(dict.fromkeys(name for name in wanted if name))
        for name in names:
            if name == predictor:
                raise ParameterError(f"{name} is the predictor and can't be a control of itself")
            tables.numbers(tables.column(frame, name), name)
    lexical = [name for name in names if name in LEXICAL]
    base = [name for name in names if name not in (*LEXICAL, TYPICALITY, MAX_COSINE)]
    order = base + lexical + [name for name in (TYPICALITY, MAX_COSINE) if name in names]
    return Controls(order, base, lexical, missing, left_out)
