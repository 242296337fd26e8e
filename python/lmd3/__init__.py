"""lmd3: does a language model do well where its training data is dense?

The names below are loaded when first used, so that `import lmd3` is quick and brings no heavy library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmd3 import analysis as analysis
    from lmd3 import errors as errors
    from lmd3 import performance as performance
    from lmd3 import system as system

    __version__: str

#: Where each public name is defined; an empty name stands for the module itself.
_PUBLIC = {
    "KernelDensity": "lmd3.density",
    "DensityTable": "lmd3.results",
    "Store": "lmd3.store",
    "StoreWriter": "lmd3.store",
    "open_store": "lmd3.store",
    "read_texts": "lmd3.texts",
    "read_outcomes": "lmd3.outcomes",
    "encode": "lmd3.encoders.run",
    "encode_queries": "lmd3.encoders.run",
    "compute_covariates": "lmd3.covariates",
    "write_report": "lmd3.report",
}
_MODULES = ("analysis", "errors", "performance", "system")

__all__ = [*_PUBLIC, *_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"lmd3.{name}")
    elif name == "__version__":
        from importlib.metadata import version

        value = version("lmd3")
    else:
        raise AttributeError(f"module 'lmd3' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
