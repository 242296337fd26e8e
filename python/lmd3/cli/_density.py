"""What `lmd3 density` and `lmd3 bandwidth` share: options and the two sides of the question."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmd3.cli import _common
from lmd3.errors import ParameterError

if TYPE_CHECKING:
    from lmd3.density import KernelDensity
    from lmd3.store import Store

CorpusArgument = Annotated[Path, typer.Argument(help="A store, a .npy file: the training rows.")]
QueriesArgument = Annotated[
    Path, typer.Argument(help="Texts (encoded by the corpus's own model), a store or a .npy file.")
]
ExcludeSelfOption = Annotated[
    bool, typer.Option("--exclude-self", help="Leave a query's own row out (same id, same vector).")
]
ExcludeWithinOption = Annotated[
    float,
    typer.Option("--exclude-within", metavar="R", help="Leave out rows nearer than R; they are counted."),
]
PrecisionOption = Annotated[
    str,
    typer.Option(
        "--precision",
        metavar="auto|float32|int16",
        help="Arithmetic of the dot products; auto: int16 for int8 rows, else float32.",
    ),
]


def open_sides(
    corpus: Path, queries: Path, text: str, id: str | None, group: str | None
) -> tuple[Store, Store]:
    """The corpus and the queries; query texts are encoded by the corpus's own model.

    Raises:
        ParameterError: the corpus is texts.
        InputError: and its kinds: either side can't be opened.
    """
    from lmd3.store import open_store

    if _common.is_texts(corpus):
        raise ParameterError(
            f"{corpus} is texts, not rows",
            remedy=f"encode them first: lmd3 encode {corpus} -o corpus.lmd3 (or use lmd3 study)",
        )
    store = open_store(corpus)
    if not _common.is_texts(queries):
        return store, open_store(queries)
    from lmd3.encoders.run import encode_queries
    from lmd3.texts import read_texts

    texts = read_texts([queries], text=text, id=id, group=group)
    return store, encode_queries(texts, store, progress=_common.progress)


def estimator(
    kernel: list[str] | None,
    bandwidth: list[str] | None,
    threads: int | None,
    seed: int,
    precision: str = "auto",
) -> KernelDensity:
    """The estimator of the options, with the command line's defaults."""
    from lmd3.bandwidth import DEFAULT_RULES
    from lmd3.density import KernelDensity

    return KernelDensity(
        kernel=kernel or "exponential",
        bandwidth=bandwidth or list(DEFAULT_RULES),
        threads=threads,
        seed=seed,
        precision=precision,
    )
