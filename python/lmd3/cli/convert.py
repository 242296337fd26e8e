"""`lmd3 convert`: a store of another element type, or with the rows of each group together."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from lmd3.cli._common import ForceOption, OutOption, emit, existing, prepare_output, progress

ExactOption = Annotated[
    str | None,
    typer.Option(
        "--keep-exact",
        metavar="float16|float32|none",
        help="Keep a finer copy beside the rows, by which an index and kneighbors rank neighbours again "
        "[default: the source's, where it is finer than --dtype].",
    ),
]


def convert(
    store: Annotated[
        str, typer.Argument(metavar="STORE", help="A store, or bare vectors (.npy, .safetensors).")
    ],
    out: OutOption,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="float32|float16|bfloat16|int8",
            help="Element type on disk [default: that of STORE].",
        ),
    ] = None,
    keep_exact: ExactOption = None,
    sort_by: Annotated[
        str | None,
        typer.Option(
            "--sort-by", metavar="group", help="Put the rows of each group together: faster --by-group."
        ),
    ] = None,
    shard_rows: Annotated[
        int | None, typer.Option("--shard-rows", min=1, help="Rows of one shard [default: as in STORE].")
    ] = None,
    force: ForceOption = False,
) -> None:
    """Writes a store again, in another element type or order; ids, groups, texts and weights are kept.

    \b
    Examples:
      lmd3 convert corpus.lmd3 -o small.lmd3 --dtype int8
      lmd3 convert corpus.lmd3 -o small.lmd3 --dtype int8 --keep-exact float16
      lmd3 convert corpus.lmd3 -o sorted.lmd3 --sort-by group
      lmd3 convert vectors.npy -o vectors.lmd3 --dtype bfloat16
    """
    import lmd3

    path = existing(store)
    prepare_output(out, force)
    start = time.monotonic()
    written = lmd3.convert(
        path,
        out,
        dtype=dtype,
        exact=keep_exact,
        sort_by=sort_by,
        shard_rows=shard_rows,
        force=force,
        progress=progress,
    )
    emit(
        {
            "store": out,
            "rows": written.n,
            "dimensions": written.d,
            "dtype": written.dtype,
            "rounding": written.rounding,
            "exact": written.manifest.get("exact"),
            "groups": len(written.groups),
            "sorted_by": sort_by,
            "bytes": sum(file.stat().st_size for file in out.iterdir()),
            "fingerprint": written.fingerprint,
            "seconds": round(time.monotonic() - start, 3),
        }
    )
