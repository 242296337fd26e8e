"""Windows encoded elsewhere: the same store to the byte, whoever encoded which window and whatever died."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_encode_resume import contents, corpus
from test_machines import Elsewhere

import lmd3
from lmd3 import cli, errors
from lmd3.encoders import EncodedBatch
from lmd3.encoders.elsewhere import ENCODER, encode_window
from lmd3.encoders.hashing import HashingEncoder
from lmd3.texts import read_texts

#: 17 or more windows in 7 shards.
SMALL: dict[str, Any] = {"window": 10, "shard_rows": 25}


def encode(texts: Path, out: Path, **given: Any) -> Path:
    lmd3.encode(read_texts(texts, group="source"), "hashing", out, **(SMALL | given))
    return out


def leftovers(out: Path) -> Path:
    return out.parent / f".{out.name}.encoding"


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"dtype": "int8", "keep_texts": False, "window": 7},
        {"dtype": "float32", "chunk": "sliding", "chunk_tokens": 4, "chunk_overlap": 1},
        {"sample": 0.5, "sample_by": "group"},
    ],
)
def test_the_same_bytes(tmp_path: Path, given: dict[str, Any]) -> None:
    texts = corpus(tmp_path / "x.jsonl", 170)
    elsewhere, told = Elsewhere(), list[str]()
    out = encode(texts, tmp_path / "there", executor=elsewhere, notice=told.append, **given)
    assert contents(out) == contents(encode(texts, tmp_path / "here", **given))
    assert elsewhere.started >= 8 and "node1" in told[1] and "rows" in told[1]
    assert not leftovers(out).exists()


def test_what_was_done_is_kept(tmp_path: Path) -> None:
    texts = corpus(tmp_path / "x.jsonl", 170)
    first = Elsewhere()
    whole = contents(encode(texts, tmp_path / "whole", executor=first))
    out = tmp_path / "out"
    failing = Elsewhere(lambda number: "no such model" if number == 3 else None)
    with pytest.raises(errors.WorkError, match=r"texts \d+ to \d+ on node0: no such model"):
        encode(texts, out, executor=failing)
    # Six ran, five ended; of those behind the one that failed one is damaged.
    waiting = sorted(leftovers(out).glob("done-*"))
    if waiting:
        waiting[0].write_bytes(waiting[0].read_bytes()[:-1])
    again = Elsewhere()
    encode(texts, out, executor=again)
    assert contents(out) == whole and again.started == first.started - 5 + (len(waiting) > 0)
    # A command without an executor may go on too.
    other = tmp_path / "other"
    with pytest.raises(errors.WorkError):
        encode(texts, other, executor=Elsewhere(lambda number: "gone" if number == 8 else None))
    assert contents(encode(texts, other)) == whole


def test_refusals(tmp_path: Path) -> None:
    texts = corpus(tmp_path / "x.jsonl", 60)

    class Own(HashingEncoder):
        def describe(self) -> dict[str, Any]:
            return {**super().describe(), "kind": "own"}

        def encode(self, texts: Any) -> EncodedBatch:
            raise AssertionError("not reached")

    with pytest.raises(errors.ModelError, match="can't be rebuilt"):
        lmd3.encode(read_texts(texts), Own(), tmp_path / "a", executor=Elsewhere())
    with pytest.raises(errors.ParameterError, match="workers of its own"):
        encode(texts, tmp_path / "a", executor=Elsewhere(), workers=2)
    assert cli.main(["encode", str(texts), "-o", str(tmp_path / "a"), "--executor", "slurm"]) == 2
    assert cli.main(["encode", str(texts), "-o", str(tmp_path / "a"), "--address", "auto"]) == 2
    assert not (tmp_path / "a").exists() and not leftovers(tmp_path / "a").exists()
    with pytest.raises(errors.WorkError):
        encode(texts, tmp_path / "b", executor=Elsewhere(lambda number: "gone" if number == 2 else None))
    job = leftovers(tmp_path / "b") / "job.json"
    job.write_text(job.read_text().replace('"lmd3": "', '"lmd3": "0'))
    (job.parent / ENCODER).touch()  # workers keep what they have opened
    with pytest.raises(errors.WorkError, match="was begun by 0"):
        encode_window({"folder": str(job.parent), "number": 0, "threads": 1}, print)


@pytest.mark.slow
def test_killed_at_random_times(tmp_path: Path) -> None:
    texts = corpus(tmp_path / "x.jsonl", 20_000)
    given = {"window": 100, "shard_rows": 1500}
    whole = contents(encode(texts, tmp_path / "whole", **given))
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from test_machines import Elsewhere; from test_encode_machines import encode\n"
        f"encode(Path(sys.argv[2]), Path(sys.argv[3]), executor=Elsewhere(), **{given})\n"
    )
    here = str(Path(__file__).parent)
    rng = np.random.default_rng()
    kills = 0
    for number in range(5):
        out = tmp_path / f"out{number}"
        while not out.exists():
            command = [sys.executable, "-c", program, here, str(texts), str(out)]
            process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": here})
            try:
                process.wait(timeout=float(rng.uniform(1.5, 5)) + 0.3 * kills)
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
        assert contents(out) == whole
    print(f"{kills} kills")
    assert kills > 3
