"""One writer at a time, killed at any moment; and stores that shrink while they are read."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import lmd3
from lmd3.cli import main
from lmd3.errors import OutputError
from lmd3.store import StoreWriter, verify_store


def unit(n: int, d: int = 8, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


HOLDERS = {
    # A writer that has a row and waits; an encoding that waits for its first window.
    "writer": (
        "from lmd3.store import StoreWriter\n"
        "with StoreWriter(path, force=True) as writer:\n"
        "    writer.append(numpy.eye(3, dtype='float32'))\n"
        "    wait()\n"
    ),
    "encode": (
        "from lmd3.encoders.hashing import HashingEncoder\n"
        "class Waiting(HashingEncoder):\n"
        "    def encode(self, texts):\n"
        "        wait()\n"
        "lmd3.encode(['a b', 'c d'], Waiting(), path, force=True)\n"
    ),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_every_second_writer_is_refused_by_name(holder: str, tmp_path: Path) -> None:
    lmd3.encode([f"text {row}" for row in range(20)], out=tmp_path / "s")
    (tmp_path / "more.txt").write_text("one\ntwo\n", encoding="utf-8")
    np.save(tmp_path / "v.npy", unit(5))
    before = contents(tmp_path / "s")
    program = (
        "import sys, time, numpy, lmd3\n"
        "path = sys.argv[1]\n"
        "def wait():\n    print('held', flush=True)\n    time.sleep(120)\n" + HOLDERS[holder]
    )
    out = tmp_path / "s"
    seconds: dict[str, Callable[[], object]] = {
        "convert": lambda: lmd3.convert(tmp_path / "v.npy", out, force=True),
        "StoreWriter": lambda: StoreWriter(out, force=True),
        "encode": lambda: lmd3.encode(["a b"], out=out, force=True),
        "import": lambda: lmd3.import_vectors(tmp_path / "v.npy", out, force=True),
        "append": lambda: lmd3.append_texts(out, lmd3.read_texts(tmp_path / "more.txt")),
        "append rows": lambda: lmd3.append_vectors(out, tmp_path / "v.npy", same_encoder=True),
    }
    with subprocess.Popen(
        [sys.executable, "-c", program, str(out)], stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            for name, second in seconds.items():
                with pytest.raises(
                    OutputError, match=f"is being written by process {other.pid} on "
                ) as caught:
                    second()
                assert caught.value.file == str(out), name
        finally:
            other.kill()
            other.wait()
    assert contents(out) == before
    # The lock ends with its owner.
    assert lmd3.append_texts(out, lmd3.read_texts(tmp_path / "more.txt")).n == 22


def killed(command: list[str], seconds: float) -> bool:
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["texts", "rows"])
def test_a_killed_append_leaves_the_old_store_or_the_new_one(kind: str, tmp_path: Path) -> None:
    texts = [f"the {word} of number {row}" for row in range(1000) for word in ("cat", "dog", "sea")]
    lmd3.encode(texts, out=tmp_path / "base", shard_rows=1000)
    draw = random.Random(0)
    command = [sys.executable, "-m", "lmd3", "append"]
    if kind == "texts":
        source = tmp_path / "more.txt"
        lines = [" ".join(draw.choices(["cat", "dog", "sea", "x", "y", "z"], k=9)) for _ in range(20_000)]
        source.write_text("\n".join(lines), encoding="utf-8")
        options = []
    else:
        source = tmp_path / "more.npy"
        np.save(source, unit(20_000, lmd3.open_store(tmp_path / "base").d))
        options = ["--same-encoder"]

    def appending(store: Path) -> list[str]:
        return [*command, str(store), str(source), *options]

    shutil.copytree(tmp_path / "base", tmp_path / "whole")
    start = time.monotonic()
    subprocess.run(appending(tmp_path / "whole"), check=True, capture_output=True)
    seconds = time.monotonic() - start
    expected = contents(tmp_path / "whole")
    store = tmp_path / "s"
    shutil.copytree(tmp_path / "base", store)
    kills = finished = 0
    for _ in range(40):
        if kills == 12:
            break
        # More of them where files are moved and the manifest is replaced.
        early = draw.random() < 0.3
        kills += killed(
            appending(store), seconds * (draw.uniform(0.1, 0.8) if early else draw.uniform(0.8, 1.1))
        )
        found = lmd3.open_store(store)
        assert found.n in (3000, 23_000)
        assert verify_store(found)["rows"] == found.n
        if found.n == 23_000:
            finished += 1
            # Killed behind its last step, the same call again adds nothing.
            if (tmp_path / ".s.adding").exists():
                subprocess.run(appending(store), check=True, capture_output=True)
            assert contents(store) == expected
            shutil.rmtree(store)
            shutil.copytree(tmp_path / "base", store)
    assert kills == 12
    subprocess.run(appending(store), check=True, capture_output=True)
    assert contents(store) == expected
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("step", ["sealed", "moved", "published"])
@pytest.mark.parametrize("kind", ["texts", "rows"])
def test_an_append_that_was_cut_short_at_a_step(
    kind: str, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmd3.store import appending

    class Killed(BaseException):
        pass

    def die(*arguments: object, **named: object) -> None:
        raise Killed

    lmd3.encode([f"text {row}" for row in range(20)], out=tmp_path / "s", shard_rows=8)
    (tmp_path / "more.txt").write_text("\n".join(f"new {row}" for row in range(9)), encoding="utf-8")
    np.save(tmp_path / "v.npy", unit(9, lmd3.open_store(tmp_path / "s").d))

    def append() -> lmd3.Store:
        if kind == "texts":
            return lmd3.append_texts(tmp_path / "s", lmd3.read_texts(tmp_path / "more.txt"))
        return lmd3.append_vectors(tmp_path / "s", tmp_path / "v.npy", same_encoder=True)

    before = contents(tmp_path / "s")
    with monkeypatch.context() as patch:
        if step == "sealed":
            patch.setattr(appending, "_graft", die)
        elif step == "moved":
            patch.setattr(appending, "_sum_facts", die)
        else:
            # What is left is cleared away at the end, and by whoever comes next.
            patch.setattr(appending, "_clear", die)
        with pytest.raises(Killed):
            append()
    opened = lmd3.open_store(tmp_path / "s")
    verify_store(opened)
    if step == "published":
        assert opened.n == 29
    else:
        assert opened.n == 20
        assert {name: contents(tmp_path / "s")[name] for name in before} == before
    assert append().n == 29
    verify_store(tmp_path / "s")
    assert lmd3.open_store(tmp_path / "s").ids() == [str(row) for row in range(29)]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("style", ["plain", "json"])
def test_a_shard_that_is_cut_short_under_a_command(style: str, tmp_path: Path) -> None:
    """A whole `lmd3 density` whose shard loses its end once it is mapped."""
    with StoreWriter(tmp_path / "s", dtype="float32", shard_rows=30_000) as writer:
        writer.append(unit(60_000, 16))
    np.save(tmp_path / "q.npy", unit(20, 16, seed=1))
    shard = tmp_path / "s" / "embeddings-00001.npy"
    # The file is cut when all is opened and checked, before the first segment is read.
    program = (
        "import os, sys\n"
        "import lmd3._lmd3 as native, lmd3.density.scan as scan\n"
        "before = scan._lmd3.segments\n"
        "def cut(*arguments):\n"
        "    found = before(*arguments)\n"
        f"    os.truncate({str(shard)!r}, 200_000)\n"
        "    return found\n"
        "class Native:\n"
        "    segments = staticmethod(cut)\n"
        "    def __getattr__(self, name):\n"
        "        return getattr(native, name)\n"
        "scan._lmd3 = Native()\n"
        "from lmd3.cli import run\n"
        "run()\n"
    )
    line = [sys.executable, "-c", program, "density", str(tmp_path / "s"), str(tmp_path / "q.npy")]
    line += ["-o", str(tmp_path / "d"), "--bandwidth", "0.2", *(["--json"] if style == "json" else [])]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 1, (done.returncode, done.stderr)
    if style == "json":
        error = json.loads(done.stdout.strip().splitlines()[-1])["error"]
        assert error["file"] == str(shard)
    else:
        assert str(shard) in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "d" / "density.parquet").exists()


def test_the_command_of_a_second_writer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "v.npy", unit(5))
    with StoreWriter(tmp_path / "s", normalised=None) as writer:
        writer.append(unit(3))
        assert main(["convert", str(tmp_path / "v.npy"), "-o", str(tmp_path / "s")]) == 2
        assert f"is being written by process {os.getpid()} on " in capsys.readouterr().err
