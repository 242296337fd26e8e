"""Stores: embeddings on disk with their ids, groups and texts; opened by mapping, written atomically,
verified.

A store is a folder (`manifest.json`, `embeddings-00000.npy`, `documents-00000.parquet`, …), a bare `.npy`
or `.safetensors` file, or an array in memory; `open_store` makes one `Store` of each.
"""

from lmd3.store.appending import append_texts, append_vectors
from lmd3.store.files import check_replaceable, xxh3
from lmd3.store.importing import import_vectors
from lmd3.store.layout import DOCUMENTS, DTYPES, MANIFEST, ROUNDING, SOURCE_ROW
from lmd3.store.opening import open_store
from lmd3.store.reading import Store
from lmd3.store.verifying import verify_store
from lmd3.store.writing import StoreWriter

__all__ = [
    "DOCUMENTS",
    "DTYPES",
    "MANIFEST",
    "ROUNDING",
    "SOURCE_ROW",
    "Store",
    "StoreWriter",
    "append_texts",
    "append_vectors",
    "check_replaceable",
    "import_vectors",
    "open_store",
    "verify_store",
    "xxh3",
]
