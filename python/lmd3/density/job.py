"""A job whose finished segments are kept in partial files: what identifies it, and its scan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmd3.density.scan import Asked, Pair, Scan, Scanner, fold
from lmd3.errors import VerificationError
from lmd3.executors.partials import Partials
from lmd3.progress import ProgressFactory
from lmd3.store import Store, xxh3


def identity(scanner: Scanner, queries: Store, chosen: Mapping[str, Any], asked: Asked) -> dict[str, Any]:
    """Everything that the bytes of a job's sums depend on, but for what bandwidth rules come to.

    Args:
        scanner: of the corpus.
        queries: its fingerprint.
        chosen: the bandwidths or their rules.
        asked: what is asked beside.
    """
    weights = scanner.weights
    return {
        "store": scanner.store.fingerprint,
        "queries": queries.fingerprint,
        **chosen,
        "neighbors": asked.neighbors,
        "by_group": asked.by_group,
        "exclude_self": None if asked.own is None else xxh3(asked.own.tobytes()),
        "exclude_within": asked.exclude_within,
        "weights": None if weights is None else xxh3(weights.tobytes()),
        "precision": scanner.arithmetic,
        "rounding": scanner.store.rounding,
        "simd": scanner.level,
    }


def scan_in_parts(
    scanner: Scanner,
    queries: NDArray[np.float32],
    pairs: Sequence[Pair],
    folder: Path,
    identified: Mapping[str, Any],
    asked: Asked,
    notice: Callable[[str], None],
    progress: ProgressFactory,
) -> Scan:
    """The scan whose finished segments are kept in files, less the segments that are there already.

    Raises:
        OutputError: `folder` holds partials of another configuration.
        VerificationError: files went missing during the work.
    """
    rows = scanner.segments()
    configuration = {**identified, "kernels": pairs, "segments": len(rows), "query_count": len(queries)}
    partials = Partials(folder, configuration, len(rows), len(queries), notice)
    missing = partials.missing()
    left = sum(sum(rows[start:end]) for start, end in missing)
    if left < scanner.store.n:
        notice(f"continued: {scanner.store.n - left:,} of {scanner.store.n:,} rows were done before")
    before = 0
    with progress("density", float(left) * len(queries), "pairs") as bar:
        for start, end in missing:

            def report(done: int, total: int, before: int = before) -> None:
                bar.update(float(before + done))

            with partials.writer() as writer:
                scanner.scan_parts(queries, pairs, start, end, writer.add, asked, report)
            before += sum(rows[start:end]) * len(queries)
    scan, after = fold(partials.parts(), len(queries), len(pairs), asked.neighbors, scanner.level)
    if after != (len(rows), 0):
        raise VerificationError("partial files went missing during the work", file=str(folder))
    return scan
