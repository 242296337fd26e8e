"""lmd3: does a language model do well where its training data is dense?

The names below are loaded when first used, so that `import lmd3` is quick and brings no heavy library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lmd3.analysis as analysis
    import lmd3.errors as errors
    import lmd3.performance as performance
    import lmd3.system as system
    from lmd3.conversion import convert
    from lmd3.covariates import compute_covariates
    from lmd3.density import KernelDensity
    from lmd3.encoders.run import encode, encode_queries
    from lmd3.index import Index
    from lmd3.outcomes import read_outcomes
    from lmd3.report import write_report
    from lmd3.results import DensityTable
    from lmd3.store import (
        Store,
        StoreWriter,
        append_texts,
        append_vectors,
        import_vectors,
        open_store,
    )
    from lmd3.texts import read_texts

    __version__: str

__all__ = [
    "DensityTable",
    "Index",
    "KernelDensity",
    "Store",
    "StoreWriter",
    "__version__",
    "analysis",
    "append_texts",
    "append_vectors",
    "compute_covariates",
    "convert",
    "encode",
    "encode_queries",
    "errors",
    "import_vectors",
    "open_store",
    "performance",
    "read_outcomes",
    "read_texts",
    "system",
    "write_report",
]

#: Where the public names are defined; the others are modules.
_HOMES = {
    "DensityTable": "lmd3.results",
    "Index": "lmd3.index",
    "KernelDensity": "lmd3.density",
    "Store": "lmd3.store",
    "StoreWriter": "lmd3.store",
    "append_texts": "lmd3.store",
    "append_vectors": "lmd3.store",
    "import_vectors": "lmd3.store",
    "compute_covariates": "lmd3.covariates",
    "convert": "lmd3.conversion",
    "encode": "lmd3.encoders.run",
    "encode_queries": "lmd3.encoders.run",
    "open_store": "lmd3.store",
    "read_outcomes": "lmd3.outcomes",
    "read_texts": "lmd3.texts",
    "write_report": "lmd3.report",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("lmd3")
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in __all__:
        value = importlib.import_module(f"lmd3.{name}")
    else:
        raise AttributeError(f"module 'lmd3' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
