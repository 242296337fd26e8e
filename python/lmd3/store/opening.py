"""Opening what holds vectors: a store, a bare file, an array."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmd3 import _lmd3
from lmd3.errors import FormatError, ParameterError
from lmd3.store.layout import MANIFEST
from lmd3.store.reading import Store, checked_array

#: Bare files up to this size are checked for NaN when opened; larger ones while scanned.
CHECKED_BYTES = 8 << 30


def threads() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_store(source: str | Path | NDArray[Any] | Store) -> Store:
    """Opens vectors: a store's folder, a bare `.npy` or `.safetensors` file, an array, or a store, which is
    returned as it is.

    Nothing is copied or cast. Headers, sizes and facts of the manifest are checked; bare files up to 8 GB
    and arrays are also checked for NaN and infinity (stores are proven finite when written).

    Raises:
        FileMissingError, FormatError, ShapeError, DtypeError, NotFiniteError: each names the file, and the
            row where there is one.
    """
    if isinstance(source, Store):
        return source
    if isinstance(source, np.ndarray):
        return Store(array=checked_array(source))
    if not isinstance(source, (str, os.PathLike)):
        raise ParameterError(f"a store is a path or a NumPy array, not {type(source).__name__}")
    path = Path(source)
    native = _lmd3.Store(path)
    if path.is_dir():
        # The native part has parsed these bytes and checked what it needs; the rest is checked here.
        manifest = json.loads((path / MANIFEST).read_bytes())
        for name, kind in (("encoder", dict), ("counts", dict), ("source", dict), ("files", list)):
            if not isinstance(manifest.get(name), kind | None):
                raise FormatError(
                    f"damaged manifest: {name!r} is not what it should be", file=str(path / MANIFEST)
                )
        rounding = manifest.get("rounding", 0.0)
        if not (isinstance(rounding, int | float) and 0 <= rounding <= 1):
            raise FormatError("damaged manifest: 'rounding' is no share of a norm", file=str(path / MANIFEST))
        return Store(path=path, native=native, manifest=manifest)
    if path.stat().st_size <= CHECKED_BYTES:
        native.check_finite(threads())
    return Store(path=path, native=native)
