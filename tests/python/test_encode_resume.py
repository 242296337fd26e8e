"""Encoding that is cut short goes on, and its store is that of an uninterrupted run, to the byte."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lmd3
from lmd3 import cli
from lmd3.encoders import EncodedBatch
from lmd3.encoders.hashing import HashingEncoder
from lmd3.errors import OutputError, ParameterError, WorkError
from lmd3.store import verify_store
from lmd3.texts import Texts, read_texts


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def corpus(path: Path, count: int) -> Path:
    words = [f"w{number}" for number in range(997)]
    draw = random.Random(count)
    with path.open("w") as file:
        for row in range(count):
            text = " ".join(draw.choices(words, k=draw.randint(0, 12)))
            file.write(json.dumps({"id": f"k{row}", "text": text, "source": f"s{row % 3}"}) + "\n")
    return path


SMALL: dict[str, Any] = {
    "window": 10,
    "shard_rows": 25,
    "dtype": "int8",
    "chunk": "sliding",
    "chunk_tokens": 4,
}


def small(tmp_path: Path, out: str, **changes: Any) -> Any:
    texts = read_texts(tmp_path / "x.jsonl", group="source")
    return lmd3.encode(texts, "hashing", tmp_path / out, **(SMALL | changes))


# --- a failure at every single step ---


@contextmanager
def failing(at: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The disk is full at the `at`-th file made durable, renamed or removed."""
    calls = [0]

    def counted(real: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            calls[0] += 1
            if calls[0] == at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **named)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", counted(lambda handle: None))
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        yield calls


def test_a_failure_at_any_step_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus(tmp_path / "x.jsonl", 30)
    small(tmp_path, "whole")
    expected = contents(tmp_path / "whole")
    with failing(0, monkeypatch) as calls:
        small(tmp_path, "counted")
    steps = calls[0]
    assert steps > 40
    failures = 0
    for at in range(1, steps + 1):
        out = tmp_path / f"cut{at}"
        with failing(at, monkeypatch):
            try:
                small(tmp_path, out.name)
            except WorkError as error:
                failures += 1
                assert "No space left" in str(error) and not out.exists()
        if not out.exists():
            small(tmp_path, out.name)
        assert contents(out) == expected, at
    assert failures > 30
    # The file of a lock that could not be removed is in nobody's way.
    assert {path.suffix for path in tmp_path.glob(".*")} <= {".lock"}


# --- kills ---


def killed(command: Sequence[str], seconds: float) -> bool:
    """Whether the process was still at work when it was killed."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True
    assert process.stderr is not None
    assert process.returncode == 0, process.stderr.read()
    return False


def survives_kills(tmp_path: Path, texts: int, window: int, shard_rows: int, kills: int) -> None:
    source = corpus(tmp_path / "x.jsonl", texts)
    options = ["--group", "source", "--window", str(window), "--shard-rows", str(shard_rows)]
    command = [sys.executable, "-m", "lmd3", "encode", str(source), *options, "-o"]
    start = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    seconds = time.monotonic() - start
    draw = random.Random(0)
    out, done, tries = tmp_path / "out", 0, 0
    while done < kills and tries < 4 * kills:
        tries += 1
        start = time.monotonic()
        if not killed([*command, str(out)], draw.uniform(0.3, 1.0) * seconds):
            # Finished before its kill (the machine had other work before): once more from the beginning.
            seconds = min(seconds, time.monotonic() - start)
            assert contents(out) == contents(tmp_path / "whole")
            subprocess.run(["rm", "-r", str(out)], check=True)
            continue
        done += 1
        if out.exists():
            # Killed when all was in its place: complete, and once more from the beginning.
            assert contents(out) == contents(tmp_path / "whole")
            subprocess.run(["rm", "-r", str(out)], check=True)
    if not out.exists():
        subprocess.run([*command, str(out)], check=True, capture_output=True)
    assert done == kills
    assert contents(out) == contents(tmp_path / "whole")
    assert verify_store(out)["ids"] == "unique"
    assert not list(tmp_path.glob(".*"))


def test_kills(tmp_path: Path) -> None:
    survives_kills(tmp_path, 3000, 50, 700, 2)


@pytest.mark.slow
def test_twenty_kills_of_fifty_thousand_texts(tmp_path: Path) -> None:
    survives_kills(tmp_path, 50_000, 512, 9_000, 20)


# --- what is not continued ---


class Stopping(HashingEncoder):
    """Stops at the fourth window."""

    windows = 0

    def encode(self, texts: Sequence[str]) -> EncodedBatch:
        self.windows += 1
        if self.windows == 4:
            raise KeyboardInterrupt
        return super().encode(texts)


def stopped(tmp_path: Path) -> None:
    corpus(tmp_path / "x.jsonl", 100)
    with pytest.raises(KeyboardInterrupt):
        lmd3.encode(read_texts(tmp_path / "x.jsonl"), Stopping(), tmp_path / "s", window=20, shard_rows=40)
    assert not (tmp_path / "s").exists()


def test_finished_windows_are_not_encoded_again(tmp_path: Path) -> None:
    stopped(tmp_path)
    counting = Stopping()
    counting.windows = 4
    store = lmd3.encode(read_texts(tmp_path / "x.jsonl"), counting, tmp_path / "s", window=20, shard_rows=40)
    assert counting.windows - 4 == -(-store.n // 20) - 3
    assert verify_store(store)["rows"] == store.n


def test_other_settings_and_another_input_are_refused(tmp_path: Path) -> None:
    stopped(tmp_path)
    texts = read_texts(tmp_path / "x.jsonl")
    same: dict[str, Any] = {"window": 20, "shard_rows": 40}
    for changes, what in (
        ({"dtype": "float32"}, r"dtype \(float16 before, float32 now\)"),
        ({"max_tokens": 3}, "encoder max_tokens"),
        ({"window": 10}, "window"),
        ({"sample": 0.5}, "sample"),
    ):
        with pytest.raises(OutputError, match=what) as caught:
            lmd3.encode(texts, "hashing", tmp_path / "s", **(same | changes))
        assert "--force" in str(caught.value)
    (tmp_path / "x.jsonl").write_text('{"id": 1, "text": "another"}\n')
    changed = read_texts(tmp_path / "x.jsonl")
    with pytest.raises(OutputError, match="different: input"):
        lmd3.encode(changed, "hashing", tmp_path / "s", **same)
    store = lmd3.encode(changed, "hashing", tmp_path / "s", force=True, **same)
    assert store.n == 1 and not list(tmp_path.glob(".*"))


def test_two_writers_are_not_mixed(tmp_path: Path) -> None:
    class Inner(HashingEncoder):
        def encode(self, texts: Sequence[str]) -> EncodedBatch:
            with pytest.raises(OutputError, match=f"being written by process {os.getpid()}"):
                lmd3.encode(["a b"], out=tmp_path / "s")
            return super().encode(texts)

    assert lmd3.encode(["a b"], Inner(), tmp_path / "s").n == 1


# --- places that can't be written ---


def test_a_full_disk(tmp_path: Path) -> None:
    mounted = tmp_path / "disk"
    mounted.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mounted)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"a small disk can't be mounted here: {made.stderr.strip()}")
    try:
        source = corpus(tmp_path / "x.jsonl", 3000)
        settings: dict[str, Any] = {"window": 100, "shard_rows": 300}
        with pytest.raises(WorkError, match="No space left") as caught:
            lmd3.encode(read_texts(source), out=mounted / "s", **settings)
        assert "run the same command again" in str(caught.value)
        finished = sorted((mounted / ".s.encoding" / "draft").glob("embeddings-*.npy"))
        assert finished and all(len(np.load(path)) == 300 for path in finished)
        subprocess.run(["mount", "-o", "remount,size=16m", str(mounted)], check=True)
        lmd3.encode(read_texts(source), out=mounted / "s", **settings)
        lmd3.encode(read_texts(source), out=tmp_path / "whole", **settings)
        assert contents(mounted / "s") == contents(tmp_path / "whole")
    finally:
        subprocess.run(["umount", "--lazy", str(mounted)], check=True)


def test_a_read_only_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = corpus(tmp_path / "x.jsonl", 10)
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        # The superuser may write anywhere but where nobody can.
        folder = Path("/proc/self")
    with pytest.raises(OutputError, match="can't be written"):
        lmd3.encode(read_texts(source), out=folder / "s")
    assert cli.main(["encode", str(source), "-o", str(folder / "s")]) == 2
    assert "can't be written" in capsys.readouterr().err


def test_settings_out_of_range_are_refused(tmp_path: Path) -> None:
    for changes in ({"window": 0}, {"workers": 0}, {"sample": 0.0}, {"sample": 2.0}, {"sample_by": "group"}):
        with pytest.raises(ParameterError):
            lmd3.encode(Texts.from_lists(["a"]), out=tmp_path / "s", **changes)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
