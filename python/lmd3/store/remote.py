"""Files of other machines, by fsspec addresses (`s3://…`, `gs://…`, `memory://…`): fetched whole, each
complete or not at all."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmd3.errors import FileMissingError, MissingDependencyError, OutputError

__all__ = ["address_of", "cache_folder", "fetch", "files", "is_remote", "stage"]

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_remote(path: object) -> bool:
    """Whether a path is an fsspec address (`file://` too)."""
    return isinstance(path, str) and _ADDRESS.match(path) is not None


def address_of(path: object) -> str | None:
    """The address that a path is, also where it went through `Path`, which makes one slash of two."""
    if is_remote(path):
        return str(path)
    if isinstance(path, Path) and (found := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", str(path))):
        scheme, rest = found.group(1), str(path)[found.end() :]
        # A drive's letter is no scheme, and what is there is no address.
        return None if path.exists() else f"{scheme}://{rest}"
    return None


def _system(address: str) -> tuple[Any, str]:
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(address)
    except ImportError as error:
        raise MissingDependencyError(
            f"{address}: {error}", remedy="pip install 'lmd3[remote]' (for s3:// also s3fs, for gs:// gcsfs)"
        ) from None
    except ValueError as error:
        raise FileMissingError(str(error), file=address) from None
    return system, path


def files(address: str) -> list[str]:
    """The addresses of the files of a folder (in natural order; hidden ones left out), or the file's own.

    Raises:
        FileMissingError: there is nothing, or it can't be read.
        MissingDependencyError: fsspec or what it needs is not installed.
    """
    from lmd3.store.bare import natural

    system, path = _system(address)
    try:
        if system.isfile(path):
            return [system.unstrip_protocol(path)]
        found = [name for name in system.find(path) if not Path(name).name.startswith(".")]
    except OSError as error:
        raise FileMissingError(error.strerror or str(error), file=address) from None
    if not found:
        raise FileMissingError("no such file or folder", file=address)
    return [system.unstrip_protocol(name) for name in sorted(found, key=lambda name: natural(Path(name)))]


def fetch(address: str, folder: Path) -> Path:
    """Copies a file into a folder; it appears there complete.

    Raises:
        FileMissingError: it can't be read.
        OutputError: the folder can't be written, or is full.
    """
    system, path = _system(address)
    target = folder / Path(path).name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".", suffix=".part", dir=folder)
    except OSError as error:
        raise OutputError(f"can't be written: {error.strerror or error}", file=str(folder)) from None
    try:
        with os.fdopen(handle, "wb") as to, system.open(path, "rb") as source:
            shutil.copyfileobj(source, to, 1 << 22)
        Path(temporary).replace(target)
    except FileNotFoundError:
        raise FileMissingError("no such file", file=address) from None
    except OSError as error:
        raise FileMissingError(f"can't be fetched: {error.strerror or error}", file=address) from None
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target


def cache_folder() -> Path:
    """Where staged files lie: `LMD3_CACHE`, else `lmd3` in the user's cache."""
    given = os.environ.get("LMD3_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmd3"


def stage(address: str, notice: Callable[[str], None] | None = None) -> Path:
    """Copies what an address names into the cache, file by file, and gives the copy: the files that are there
    already, of the same size, age and mark, are kept.

    Raises:
        FileMissingError, MissingDependencyError, OutputError: as `files` and `fetch`.
    """
    system, path = _system(address)
    found = files(address)
    whole = bool(len(found) == 1 and system.isfile(path))
    key = hashlib.blake2b(address.encode(), digest_size=8).hexdigest()
    folder = cache_folder() / "staged" / f"{Path(path.rstrip('/')).name}-{key}"
    root = path.rstrip("/") + "/"
    kept: set[Path] = set()
    for name in found:
        inner = system._strip_protocol(name)
        relative = Path(Path(inner).name if whole else inner.removeprefix(root))
        if relative.is_absolute() or ".." in relative.parts:
            raise FileMissingError("leads out of its folder", file=name)
        facts = system.info(inner)
        known = [facts.get(part) for part in ("size", "mtime", "LastModified", "ETag", "created")]
        mark = hashlib.blake2b(repr(known).encode(), digest_size=8).hexdigest()
        target = folder / relative
        kept.add(target)
        beside = target.with_name(f".{target.name}.mark")
        if target.is_file() and beside.is_file() and beside.read_text(encoding="utf-8") == mark:
            continue
        if notice is not None:
            notice(f"fetching {name} ({facts.get('size') or 0:,} bytes)")
        fetch(name, target.parent)
        beside.write_text(mark, encoding="utf-8")
    for old in folder.rglob("*"):
        # What is there no more must not be opened with the rest.
        if old.is_file() and not old.name.startswith(".") and old not in kept:
            old.unlink()
    return folder / Path(path).name if whole else folder
