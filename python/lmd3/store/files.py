"""Files and folders of a store: checksums, names made durable, and what may be replaced."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from lmd3 import _lmd3
from lmd3.errors import OutputError
from lmd3.store.layout import MANIFEST


def xxh3(data: bytes) -> str:
    """The xxh3-64 of bytes, 16 hexadecimal digits."""
    return _lmd3.xxh3(data)


def entry_of(name: str, size: int, digest: str) -> dict[str, Any]:
    """A file as the manifest lists it."""
    return {"name": name, "bytes": size, "xxh3": digest}


def listed(path: Path) -> dict[str, Any]:
    """A file as the manifest lists it, read for its checksum."""
    digest, size = _lmd3.checksum(path)
    return entry_of(path.name, size, digest)


def umask() -> int:
    """The permissions that new files of this process do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_file(path: Path) -> None:
    """Makes the bytes of a file durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Makes the names inside a folder durable, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_replaceable(path: Path, force: bool) -> None:
    """Refuses to write a store over what is there; with `force` over anything that is not a store.

    Raises:
        OutputError: the path exists.
    """
    if not path.exists() and not path.is_symlink():
        return
    if path.is_dir() and not any(path.iterdir()):
        return
    if not force:
        raise OutputError("exists already", file=str(path), remedy="name another output, or give --force")
    if path.is_symlink() or not (path / MANIFEST).is_file():
        raise OutputError("exists and is not a store: it is not overwritten", file=str(path))
