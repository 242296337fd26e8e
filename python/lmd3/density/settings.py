"""The settings of a job: as `run.json` names them, and what they ask of a scan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmd3.density.design_error import NEAREST, design_of
from lmd3.density.groups import choose_groups
from lmd3.density.scan import Asked
from lmd3.density.sides import own_rows
from lmd3.errors import ParameterError
from lmd3.store import Store


def settings_of(
    neighbors: int,
    by_group: bool,
    groups: str | Path | Sequence[str] | None,
    normalize: bool,
    exclude_self: bool,
    exclude_within: float,
    seed: int,
) -> dict[str, Any]:
    """The settings of a job as `run.json` names them."""
    chosen = str(groups) if isinstance(groups, (str, Path)) else list(groups or ())
    return {
        "neighbors": neighbors,
        "by_group": by_group,
        **({} if groups is None else {"groups": chosen}),
        "normalize": normalize,
        "exclude_self": exclude_self,
        "exclude_within": exclude_within,
        "seed": seed,
    }


def asked_of(
    corpus: Store,
    queries: Store,
    matrix: NDArray[np.float32],
    neighbors: int,
    by_group: bool,
    groups: str | Path | Sequence[str] | None,
    exclude_self: bool,
    exclude_within: float,
) -> Asked:
    """What settings ask of a scan beside the sums.

    Args:
        corpus: the rows.
        queries: their store.
        matrix: their vectors (Q, d).
        neighbors: nearest rows to be listed.
        by_group: whether sums of groups are asked for.
        groups: those kept apart, as `KernelDensity.density` takes them.
        exclude_self: leave a query's own row out.
        exclude_within: leave out rows nearer than this.

    Raises:
        ParameterError: groups that are not there, or not to be had of a sample.
        JoinError: no query is a row, or one has the id of a row with another vector.
    """
    own = own_rows(corpus, queries, matrix) if exclude_self else None
    if groups is not None and not by_group:
        raise ParameterError("groups are chosen, but not asked for", remedy="add --by-group")
    if by_group and not corpus.groups:
        raise ParameterError(
            "the corpus has no groups", remedy="encode it with --group, or leave --by-group out"
        )
    least = 1
    if (design := design_of(corpus)) is not None:
        # What the standard error of a sample needs.
        by_group, least = by_group or design.by is not None, NEAREST
        if groups is not None:
            raise ParameterError(
                "the corpus is a sample: no standard error is known for groups taken together",
                remedy="leave --groups out",
            )
    k = min(max(neighbors, least), corpus.n)
    kept = None if groups is None else choose_groups(corpus, groups)
    return Asked(k, by_group, kept, own, exclude_within, tables=True)
