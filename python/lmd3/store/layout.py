"""What a store is made of: names, element types, and the columns of its documents."""

from __future__ import annotations

import pyarrow as pa

FORMAT = "lmd3-store"
VERSION = 1
MANIFEST = "manifest.json"

#: Element types that stores are written in.
DTYPES = ("float16", "float32", "bfloat16", "int8")

#: Rounding to an element type relative to the norm: half a unit in the last place. (That of int8 depends on
#: the rows.)
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}

#: Element types of the copy for ranking again, and how fine each type is.
EXACT_DTYPES = ("float16", "float32")
FINENESS = {"int8": 0, "uint8": 0, "bfloat16": 1, "float16": 2, "float32": 3}

#: Columns of `documents-*.parquet`.
DOCUMENTS = pa.schema(
    [
        ("id", pa.string()),
        ("group", pa.string()),
        ("text", pa.string()),
        ("tokens", pa.int32()),
        ("truncated", pa.bool_()),
    ]
)

#: The column that sorting adds: the row's number in the store that was sorted.
SOURCE_ROW = pa.field("source_row", pa.int64())

#: The columns that cutting documents into chunks adds: the id of the document, and which of its chunks it is.
DOCUMENT = pa.field("document", pa.string())
CHUNK = pa.field("chunk", pa.int32())

#: Columns that only some stores have, in the order in which they follow the others.
OPTIONAL = (SOURCE_ROW, DOCUMENT, CHUNK)

#: Columns that may be asked for.
COLUMNS = (*DOCUMENTS.names, *(field.name for field in OPTIONAL))

#: Rows of one row group of the documents: what a look-up of one row reads.
ROW_GROUP = 4096

#: Allowed distance of a norm from 1 where a store says that it is normalised.
NORM_TOLERANCE = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1.6e-2, "int8": 5e-2, "uint8": 5e-2}

#: Bytes of an element; those of bare vectors too.
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1}
