"""Looks up the texts of a few ids in stores and text files, with pyarrow alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lmd3.errors import Lmd3Error

#: Longest text shown of a query; the rest is cut and marked.
LONGEST = 600
#: … and of a training text beside it.
LONGEST_NEAR = 320


def look_up(
    source: str | Path | None, ids: Iterable[str], text: str = "text", id: str | None = None
) -> dict[str, str]:
    """Texts by id, as far as the source has them; a source that is gone or keeps no texts gives none.

    Args:
        source: a store's folder (its `documents-*.parquet` are read), or a file of texts.
        ids: those wanted.
        text: the text column of a file of texts.
        id: its id column; by default as everywhere.
    """
    wanted = set(ids)
    if source is None or not wanted or not Path(source).exists():
        return {}
    source = Path(source)
    if (source / "manifest.json").is_file():
        return _of_store(source, wanted)
    from lmd3.texts import is_texts, read_texts

    found: dict[str, str] = {}
    try:
        if not is_texts(source):
            return {}
        for batch in read_texts(source, text=text, id=id):
            found |= {i: t for i, t in zip(batch.ids, batch.texts, strict=True) if i in wanted}
            if len(found) == len(wanted):
                break
    except Lmd3Error:
        return found
    return found


def _of_store(folder: Path, wanted: set[str]) -> dict[str, str]:
    names = pa.array(sorted(wanted), pa.string())
    found: dict[str, str] = {}
    for path in sorted(folder.glob("documents-*.parquet")):
        try:
            with pq.ParquetFile(path) as file:
                if not {"id", "text"} <= set(file.schema_arrow.names):
                    return {}
                # Ids first: texts are read of the row groups only that hold one of them.
                for group in range(file.num_row_groups):
                    ids = file.read_row_group(group, columns=["id"])["id"].cast(pa.string())
                    mask = pc.is_in(ids, value_set=names)
                    if pc.any(mask).as_py():
                        texts = file.read_row_group(group, columns=["text"])["text"].filter(mask)
                        pairs = zip(ids.filter(mask).to_pylist(), texts.to_pylist(), strict=True)
                        found |= {i: t for i, t in pairs if t is not None}
        except (pa.ArrowException, OSError):
            continue
        if len(found) == len(wanted):
            break
    return found


def shorten(text: str, longest: int = LONGEST) -> str:
    """At most so many characters, cut at a word where there is one near, and marked."""
    if len(text) <= longest:
        return text
    cut = text[:longest]
    space = cut.rfind(" ", longest - 40)
    return (cut[:space] if space > 0 else cut) + " …"
