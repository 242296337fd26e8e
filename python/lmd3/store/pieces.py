"""Matrices inside files."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Piece(NamedTuple):
    """Rows of vectors in a file: all of it, by its name and header, or (dtype, rows, d, offset in bytes)."""

    file: Path
    place: tuple[str, int, int, int] | None = None
