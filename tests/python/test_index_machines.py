"""An index built in many places: the same files to the byte, whoever assigned the rows to their lists."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_machines import Elsewhere

from lmd3 import errors
from lmd3.cli import main
from lmd3.index import Index
from lmd3.index_lists import FOLDER, Lists, assign_range, assign_shard
from lmd3.store import Store, StoreWriter, open_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """20,000 rows in 4 shards of norms far apart, so that some lists come out too large and are split."""
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(20_000, 24)) * np.exp(rng.uniform(-9, 3, size=(20_000, 1)))
    path = tmp_path_factory.mktemp("index") / "store"
    with StoreWriter(path, dtype="int8", shard_rows=6000, normalised=False) as writer:
        writer.append(rows.astype(np.float32), groups=[f"g{i % 3}" for i in range(len(rows))])
    return open_store(path)


def content(index: Index) -> dict[str, Any]:
    """All that an index is: its manifest, with the checksums of its files, but for the seconds it took."""
    index.verify()
    assert {path.name for path in index.path.iterdir()} == {
        "index.json",
        *(file["name"] for file in index.manifest["files"]),
    }
    return {key: value for key, value in index.manifest.items() if key != "seconds"}


@pytest.fixture(scope="module")
def local(store: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    index = Index.build(store, tmp_path_factory.mktemp("local") / "i", lists=60)
    # Lists were split: rows had to be assigned more than once.
    assert index.lists > 60
    return content(index)


def test_tasks_elsewhere(store: Store, local: dict[str, Any], tmp_path: Path) -> None:
    elsewhere = Elsewhere()
    told: list[str] = []
    index = Index.build(store, tmp_path / "i", lists=60, executor=elsewhere, notice=told.append)
    assert content(index) == local and elsewhere.started >= 2 * 48
    assert any("node1" in line and "rows" in line for line in told)
    with pytest.raises(errors.ParameterError, match="need a store in a file"):
        Index.build(store.rows(np.arange(50)), tmp_path / "j", executor=elsewhere)


def test_a_task_fails_and_the_build_goes_on(store: Store, local: dict[str, Any], tmp_path: Path) -> None:
    failing = Elsewhere(lambda number: "shard gone" if number == 20 else None)
    with pytest.raises(errors.WorkError, match=r"lists of rows [\d,]+ to [\d,]+ on node\d: shard gone"):
        Index.build(store, tmp_path / "i", lists=60, executor=failing)
    files = sorted((tmp_path / "i.partial" / FOLDER).glob("*.part"))
    assert len(files) == 23
    files[3].write_bytes(files[3].read_bytes()[:-2])
    again = Elsewhere()
    told: list[str] = []
    index = Index.build(store, tmp_path / "i", lists=60, executor=again, notice=told.append)
    assert content(index) == local and str(files[3]) in told[0] and "damaged" in told[0]


def test_shards_of_a_batch_system(
    store: Store, local: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*more: object) -> Any:
        words = ["index", str(store.path), "-o", str(tmp_path / "i"), *map(str, more), "--json", "--quiet"]
        assert main(words) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    with pytest.raises(errors.ParameterError, match="waits for its rows"):
        assign_shard(store, (0, 3), tmp_path / "i")
    rounds = 0
    while True:
        said = command("--lists", 60, "--pause")
        if said.get("finished", True):
            break
        rounds += 1
        for i in (2, 0, 1):
            said = command("--shard", f"{i}/3")
        assert said["missing"] == [] and said["rows"] == [6666, 13333]
    assert rounds >= 2 and content(Index(tmp_path / "i", store)) == local
    # Some shards only, and the command that ends it: in this process, also where lists are split.
    other = tmp_path / "j"
    assert Index.prepare(store, other, lists=60) is None
    assert assign_shard(store, (1, 3), other)["missing"] == [(0, 6666), (13333, 20000)]
    assert content(Index.build(store, other, lists=60)) == local
    assert main(["index", str(store.path), "--shard", "0/2", "--pause"]) == 2
    assert main(["index", str(store.path), "--shard", "2/2"]) == 2


def test_other_rows_and_levels_are_refused(store: Store, tmp_path: Path) -> None:
    assert Index.prepare(store, tmp_path / "i", lists=60) is None
    lists = Lists.open(store, tmp_path / "i", print)
    assert lists is not None
    (tmp_path / "i.partial" / FOLDER).mkdir()
    task = {
        "store": str(store.path),
        "partial": str(lists.partial),
        "configuration": lists.configuration,
        "start": 0,
        "end": 100,
        "threads": 1,
    }
    other = {**lists.configuration, "store": "0" * 16}
    with pytest.raises(errors.VerificationError, match="not the rows"):
        assign_range({**task, "configuration": other}, print)
    with pytest.raises(errors.WorkError, match="made anew"):
        assign_range({**task, "configuration": {**lists.configuration, "tree": "0"}}, print)
    if lists.configuration["simd"] != "portable":
        program = "import json, sys; from lmd3.index_lists import assign_range\n"
        program += "assign_range(json.loads(sys.argv[1]), print)"
        environment = {**os.environ, "LMD3_SIMD": "portable"}
        command = [sys.executable, "-c", program, json.dumps(task)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert "SIMD level portable, the index was begun at" in done.stderr
    assert assign_range(task, print)["rows"] == 100 and assign_range(task, print)["rows"] == 0


def test_killed_while_trees_are_kept(store: Store, local: dict[str, Any], tmp_path: Path) -> None:
    """Half a tree, or lists of another tree, are never met: the build then trains again."""
    assert Index.prepare(store, tmp_path / "i", lists=60) is None
    state = tmp_path / "i.partial" / "state.json"
    found = json.loads(state.read_bytes())
    state.write_text(json.dumps({**found, "trees": 0}))
    (tmp_path / "i.partial" / "centroids.npy").write_bytes(b"half a tree")
    (tmp_path / "i.partial" / "lists.bin").write_bytes(b"\0" * 8 * store.n)
    assert content(Index.build(store, tmp_path / "i", lists=60)) == local


@pytest.mark.slow
def test_killed_at_random_times(store: Store, local: dict[str, Any], tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from test_machines import Elsewhere; from lmd3.index import Index\n"
        "Index.build(sys.argv[2], Path(sys.argv[3]), lists=60, executor=Elsewhere())\n"
    )
    rng = np.random.default_rng()
    for number in range(12):
        target = tmp_path / f"i{number}"
        command = [sys.executable, "-c", program, str(Path(__file__).parent), str(store.path), str(target)]
        kills = 0
        while not target.exists():
            process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)})
            try:
                process.wait(timeout=float(rng.uniform(0.5, 2.5)) + 0.2 * kills)
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
        assert content(Index(target, store)) == local, kills
