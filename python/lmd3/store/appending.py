"""More rows to a store: new shards beside the old ones, which stay as they are.

The rows are written as a store of their own first; when it is whole, its files are moved in under new
numbers, and a new manifest takes the place of the old one in one step. Who has the store open keeps the rows
it opened; who opens it sees the old manifest or the new one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lmd3.errors import Lmd3Error, ModelError, ParameterError, ShapeError, WorkError
from lmd3.progress import ProgressFactory, silent
from lmd3.store.files import listed, sync_file, sync_folder
from lmd3.store.importing import _sidecar, write_source
from lmd3.store.layout import MANIFEST
from lmd3.store.lock import WriterLock
from lmd3.store.opening import open_store
from lmd3.store.reading import Store
from lmd3.store.sidecar import Columns
from lmd3.store.sources import Source
from lmd3.unique import UniqueIds

if TYPE_CHECKING:
    from lmd3.texts import Texts

__all__ = ["append_texts", "append_vectors"]

#: Entries of a shard that are files, and how they are named.
_FILES = ("embeddings", "scales", "groups", "weights", "documents", "exact")


def append_texts(
    store: str | Path,
    texts: Texts,
    *,
    model: str | Path | None = None,
    workers: int = 1,
    threads: int | None = None,
    progress: ProgressFactory | None = None,
) -> Store:
    """Encodes texts as the store's were (encoder and its frozen state, prompt, chunking) and appends them.

    A killed call goes on behind its last finished window when it is repeated.

    Args:
        store: the store's folder.
        texts: what `read_texts` gives; with groups and weights where the store has them. Without a column of
            ids they are numbered on from the store's last row.
        model: where a neural model is now, if it has moved.
        workers, threads: as `lmd3.encode`.
        progress: makes the bars.

    Raises:
        OutputError: another process writes to the store (it is named).
        ModelError: the store's encoder can't be had, or it has none.
        DuplicateIdError: an id that the store has already.
        ParameterError: texts without the groups or weights that the store has, or with others; a sampled
            store.
        InputError: and its kinds: as `lmd3.encode`.
    """
    from lmd3.encoders.chunking import Chunking
    from lmd3.encoders.run import encode, encoder_from_store

    path = Path(store)
    with WriterLock(path):
        base = _base(path)
        if bool(base.groups) != (texts.group is not None):
            raise _lacking("groups", bool(base.groups), path, "--group COL")
        if base.weights_kept != (texts.weight is not None):
            raise _lacking("weights", base.weights_kept, path, "--weight COL")
        place = _place(path)
        if (left := _left(place, base)) is not None:
            # Killed when all was done but for the clearing away: is this the same call?
            texts.number_from(int(left.get("first_row", 0)))
            same = left.get("fingerprint") == texts.fingerprint
            shutil.rmtree(place, ignore_errors=True)
            if same:
                return base
        encoder = encoder_from_store(base, model)
        cut = base.manifest.get("chunking") or {}
        chunking = Chunking(**cut) if cut else Chunking()
        texts.number_from(_next_number(base))
        addition = _encoded(place, texts, encoder.describe()) or encode(
            texts,
            model=encoder,
            out=place,
            dtype=base.dtype,
            chunk=chunking,
            shard_rows=_shard_rows(base),
            workers=workers,
            threads=threads,
            keep_texts=base.has_texts,
            exact=_exact_type(base),
            progress=progress,
        )
        return _graft(base, addition)


def _left(place: Path, base: Store) -> dict[str, Any] | None:
    """Facts on the input of an addition that the store holds already and that was not cleared away."""
    entries = base.manifest.get("appended") or [{}]
    last = entries[-1].get("source")
    try:
        left = json.loads((place / MANIFEST).read_bytes()).get("source")
    except (OSError, ValueError, AttributeError):
        return None
    return left if isinstance(left, dict) and left == last else None


def _encoded(place: Path, texts: Texts, encoder: Mapping[str, Any]) -> Store | None:
    """What an earlier call encoded of the same texts and did not move in; anything else there is removed."""
    if not place.exists():
        return None
    try:
        found = open_store(place)
        source = found.manifest.get("source") or {}
        if source.get("fingerprint") == texts.fingerprint and found.encoder == encoder:
            return found
    except Lmd3Error:
        # Some of its files were moved.
        pass
    shutil.rmtree(place)
    return None


def _exact_type(base: Store) -> str | None:
    """The type of the finer copy that the store keeps."""
    exact = base.manifest.get("exact")
    return None if exact is None else str(exact["dtype"])


def append_vectors(
    store: str | Path,
    source: str | Path | Sequence[str | Path],
    *,
    vectors: str | None = None,
    metadata: str | Path | Sequence[str | Path] | None = None,
    id: str | None = None,
    group: str | None = None,
    text: str | None = None,
    weight: str | None = None,
    raw: tuple[str, tuple[int, int]] | None = None,
    same_encoder: bool = False,
    progress: ProgressFactory | None = None,
) -> Store:
    """Appends vectors to a store.

    Args:
        store: the store's folder.
        source, vectors, metadata, id, group, text, weight, raw: as `import_vectors`. What the store has of
            groups and weights, they must have; without ids they are numbered on.
        same_encoder: the vectors were made by the store's own encoder, which bare vectors do not say.
        progress: makes the bars.

    Raises:
        OutputError: another process writes to the store (it is named).
        ModelError: the vectors were encoded otherwise than the store's, or do not say how.
        DuplicateIdError: an id that the store has already.
        ShapeError, DtypeError, ParameterError, …: vectors that do not fit the store.
    """
    paths = [source] if isinstance(source, (str, Path)) else list(source)
    path = Path(store)
    with WriterLock(path):
        base = _base(path)
        columns = Columns(id, group, text, weight)
        own = _encoder_of(paths)
        if base.encoder is not None and not same_encoder:
            if own is None:
                raise ModelError(
                    "bare vectors do not say whether the store's encoder made them",
                    file=str(paths[0]),
                    remedy="if it did, give --same-encoder",
                )
            if own.get("fingerprint") != base.encoder.get("fingerprint"):
                raise ModelError(
                    f"encoded by {own.get('model')!r}, the store by {base.encoder.get('model')!r}",
                    file=str(paths[0]),
                )
        stores = [path for path in paths if (Path(path) / MANIFEST).exists()]
        if stores and base.groups and group is None and metadata is None:
            columns = Columns(id, "group", text, weight)
        if stores and base.has_texts and text is None and metadata is None:
            columns = Columns(columns.id, columns.group, "text", columns.weight)
        facts = {"imported": [str(path) for path in paths]}
        place = _place(path)
        if _left(place, base) == facts and _older(paths, place / MANIFEST):
            # Killed when all was done but for the clearing away.
            shutil.rmtree(place, ignore_errors=True)
            return base
        if place.exists():
            shutil.rmtree(place)
        addition = write_source(
            Source(paths, vectors=vectors, raw=raw, place=path.absolute().parent),
            place,
            sidecar=_sidecar(metadata, columns),
            columns=columns,
            dtype=base.dtype,
            encoder=base.encoder,
            shard_rows=_shard_rows(base),
            first_row=_next_number(base),
            exact=_exact_type(base),
            facts=facts,
            progress=progress or silent,
        )
        return _graft(base, addition)


def _older(paths: Sequence[str | Path], file: Path) -> bool:
    """Whether all files were last changed before another was written."""
    written = file.stat().st_mtime_ns
    return all(Path(path).exists() and Path(path).stat().st_mtime_ns < written for path in paths)


def _encoder_of(paths: Sequence[str | Path]) -> dict[str, Any] | None:
    found = [open_store(path).encoder for path in paths if (Path(path) / MANIFEST).exists()]
    return found[0] if found and len(found) == len(paths) and all(f == found[0] for f in found) else None


def _base(path: Path) -> Store:
    base = open_store(path)
    if not base.manifest:
        raise ParameterError(
            "bare vectors, not a store", file=str(path), remedy="make a store of them: lmd3 import"
        )
    if base.manifest.get("sampling"):
        raise ParameterError(
            "a sample: rows that are added to it have no part in its design",
            file=str(path),
            remedy="encode the whole input again with --sample",
        )
    return base


def _place(path: Path) -> Path:
    return path.absolute().parent / f".{path.name}.adding"


def _shard_rows(base: Store) -> int:
    return max(int(shard["rows"]) for shard in base.manifest["shards"])


def _next_number(base: Store) -> int:
    """The number behind that of the last row, where rows are numbered."""
    last = base.ids(np.array([base.n - 1]))[0]
    return max(base.n, int(last) + 1) if last.isascii() and last.isdecimal() else base.n


def _lacking(what: str, wanted: bool, path: Path, remedy: str) -> ParameterError:
    if wanted:
        return ParameterError(f"the store has {what}, and these rows none", file=str(path), remedy=remedy)
    return ParameterError(f"the store has no {what}, and these rows have", file=str(path))


def _graft(base: Store, addition: Store) -> Store:
    """Moves a finished store's shards into another."""
    path, place = Path(str(base.path)), Path(str(addition.path))
    try:
        _check_fits(base, addition, path)
        _check_ids(base, addition, path)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    manifest = dict(base.manifest)
    groups, codes = _merged_groups(base, addition)
    manifest["groups"] = groups
    try:
        shards = [dict(shard) for shard in base.manifest["shards"]]
        if len(groups) > 1:
            # A store of one group keeps no codes.
            for number, shard in enumerate(shards):
                if "groups" not in shard:
                    shard["groups"] = _write_codes(path, number, np.zeros(int(shard["rows"]), np.uint32))
        first = 0
        for shard in addition.manifest["shards"]:
            shards.append(_moved(shard, place, path, len(shards), first, codes if len(groups) > 1 else None))
            first += int(shard["rows"])
        sync_folder(path)
        manifest["shards"] = shards
        _sum_facts(manifest, base, addition)
        temporary = path / f".{MANIFEST}.new"
        temporary.write_text(json.dumps(manifest, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        sync_file(temporary)
        temporary.replace(path / MANIFEST)
        sync_folder(path)
    except OSError as error:
        raise WorkError(error.strerror or str(error), file=str(path)) from None
    _clear(place)
    return open_store(path)


def _clear(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)


def _check_fits(base: Store, addition: Store, path: Path) -> None:
    if addition.d != base.d:
        raise ShapeError(f"vectors of {addition.d} dimensions for a store of {base.d}", file=str(path))
    if base.normalised and not addition.normalised:
        raise ParameterError(
            "the store's vectors are normalised, and these are not",
            file=str(path),
            remedy="normalise them first",
        )
    for what, mine, theirs, remedy in (
        ("groups", bool(base.groups), bool(addition.groups), "--group COL"),
        ("weights", base.weights_kept, addition.weights_kept, "--weight COL"),
    ):
        if mine != theirs:
            raise _lacking(what, mine, path, remedy)


def _check_ids(base: Store, addition: Store, path: Path) -> None:
    with UniqueIds(path.absolute().parent) as unique:
        for store in (base, addition):
            for table in store._read_documents(["id"]):
                unique.add(table["id"].to_pylist())

        def look_up(rows: list[int]) -> list[str]:
            numbers = np.asarray(rows)
            old, new = numbers[numbers < base.n], numbers[numbers >= base.n] - base.n
            return [*base.ids(old), *addition.ids(new)]

        unique.check(look_up, file=str(path))


def _merged_groups(base: Store, addition: Store) -> tuple[list[dict[str, Any]], NDArray[np.uint32] | None]:
    """The table of groups, old codes as they were, and the codes of the new rows in it."""
    groups = [dict(group) for group in base.manifest.get("groups", [])]
    place = {group["name"]: code for code, group in enumerate(groups)}
    for group in addition.manifest.get("groups", []):
        if group["name"] not in place:
            place[group["name"]] = len(groups)
            groups.append(dict(group))
            continue
        mine = groups[place[group["name"]]]
        for name, value in group.items():
            if name != "name":
                mine[name] = mine.get(name, 0) + value
    own = addition.group_codes()
    if own is None:
        return groups, None
    return groups, np.array([place[name] for name in addition.groups], np.uint32)[own]


def _write_codes(path: Path, number: int, codes: NDArray[np.uint32]) -> dict[str, Any]:
    target = path / f"groups-{number:05}.npy"
    with target.open("wb") as file:
        np.save(file, codes, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    return listed(target)


def _moved(
    shard: Mapping[str, Any],
    place: Path,
    path: Path,
    number: int,
    first: int,
    codes: NDArray[np.uint32] | None,
) -> dict[str, Any]:
    """A shard under its new number, its files moved."""
    moved = dict(shard)
    for kind in _FILES:
        if kind not in shard or kind == "groups":
            continue
        name = re.sub(r"-\d{5}", f"-{number:05}", shard[kind]["name"], count=1)
        (place / shard[kind]["name"]).replace(path / name)
        moved[kind] = {**shard[kind], "name": name}
    moved.pop("groups", None)
    if codes is not None:
        moved["groups"] = _write_codes(path, number, codes[first : first + int(shard["rows"])])
    return moved


def _sum_facts(manifest: dict[str, Any], base: Store, addition: Store) -> None:
    manifest["rows"] = base.n + addition.n
    manifest["rounding"] = max(base.rounding, addition.rounding)
    if (exact := addition.manifest.get("exact")) is not None:
        own = base.manifest["exact"]
        manifest["exact"] = {**own, "rounding": max(own["rounding"], exact["rounding"])}
    manifest["texts"] = base.has_texts and addition.has_texts
    counts = dict(base.manifest.get("counts") or {})
    for name, value in (addition.manifest.get("counts") or {}).items():
        counts[name] = counts.get(name, 0) + value
    manifest["counts"] = counts
    if addition.given_ids:
        manifest["ids"] = "given"
    entry = {
        "rows": base.n,
        "shards": len(base.manifest["shards"]),
        "fingerprint": base.fingerprint,
        "rounding": base.rounding,
        "source": addition.manifest.get("source"),
    }
    manifest["appended"] = [*base.manifest.get("appended", []), entry]
