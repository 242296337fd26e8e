"""Valid inputs to start from: `python3 fuzz/seeds.py TARGET FOLDER`."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path


def seeds(target: str) -> list[bytes]:
    """The valid inputs of a target."""
    match target:
        case "manifest":
            file = {"name": "embeddings-00000.npy", "bytes": 128, "xxh3": "0123456789abcdef"}
            shard = {"rows": 3, "embeddings": file, "groups": {**file, "name": "groups-00000.npy"}}
            manifest = {"format": "lmd3-store", "version": 1, "d": 4, "rows": 3, "dtype": "float16"}
            manifest |= {"normalised": True, "groups": [{"name": "a", "rows": 3}], "shards": [shard]}
            return [json.dumps(manifest).encode()]
        case "npy":
            text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }   \n"
            return [b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text]
        case "fbin":
            return [bytes([kind]) + struct.pack("<II", 2, 3) + bytes(24) for kind in range(4)]
        case "safetensors":
            tensor = {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}
            text = json.dumps({"__metadata__": {"a": "b"}, "x": tensor}).encode()
            return [struct.pack("<Q", len(text)) + text + bytes(12)]
    raise SystemExit(f"no such target: {target}")


if __name__ == "__main__":
    for number, seed in enumerate(seeds(sys.argv[1])):
        (Path(sys.argv[2]) / f"seed-{number}").write_bytes(seed)
