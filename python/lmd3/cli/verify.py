"""`lmd3 verify`: proves a store against its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmd3.cli._common import emit, existing, progress


def verify(
    store: Annotated[str, typer.Argument(metavar="STORE", help="A store, or bare vectors (.npy).")],
) -> None:
    """Proves a store: checksums of all files, row counts, finite values, norms, unique ids.

    Exit 0 if all holds; 1 if a file is not what was written; 2 if the store can't even be opened.

    \b
    Examples:
      lmd3 verify corpus.lmd3
    """
    from lmd3.store import verify_store

    path = existing(store)
    size = (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        if path.is_dir()
        else Path(path).stat().st_size
    )
    with progress("verifying", size, "B") as bar:
        found = verify_store(path, progress=bar.update)
    if found["files"]:
        what = f"{found['files']} files as they were written"
    else:
        what = "bare vectors have no checksums; header and size hold"
    text = (
        f"{path}: {found['rows']:,} rows, {what}, all values finite, "
        f"norms {found['norm_min']:.6g} to {found['norm_max']:.6g}, ids unique"
    )
    emit({"store": path, "verified": True, **found}, text=text)
