"""A Ray cluster of three simulated nodes, and what happens to its nodes, workers and driver: by hand.

`pytest -m slow tests/python/test_ray.py`
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmd3.store import StoreWriter

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

TABLES = ("density.parquet", "queries.parquet", "neighbors.parquet", "bandwidth.json")
SEGMENTS = 60


def tables(out: Path) -> list[bytes]:
    return [(out / name).read_bytes() for name in TABLES]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2.4 million rows in 60 segments, a second of work or so each."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(1)
    with StoreWriter(folder / "store", dtype="float16", shard_rows=40_000) as writer:
        for segment in range(SEGMENTS):
            rows = generator.normal(size=(40_000, 48)).astype(np.float32)
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            first = segment * len(rows)
            writer.append(rows, [f"r{first + i}" for i in range(len(rows))])
    queries = generator.normal(size=(5000, 48)).astype(np.float32)
    np.save(folder / "queries.npy", queries / np.linalg.norm(queries, axis=1, keepdims=True))
    return folder


def command(corpus: Path, out: Path, *more: str) -> list[str]:
    sides = ["density", str(corpus / "store"), str(corpus / "queries.npy"), "-o", str(out)]
    options = ["--bandwidth", "0.3", "--bandwidth", "0.5", "--neighbors", "3", "--quiet"]
    return [sys.executable, "-m", "lmd3", *sides, *options, *more]


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    subprocess.run(command(corpus, out), check=True)
    return out


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    # Workers are children of what is started here, and import the tasks of these tests by name.
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    given: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80_000_000}
    for attempt in range(3):
        try:
            made = Cluster(initialize_head=True, head_node_args={**given, "include_dashboard": False})
            break
        except Exception as error:  # on a busy machine Ray does not wait long enough for its processes
            print(f"attempt {attempt}: {error}")
    made.given = given
    for _ in range(2):
        made.add_node(**given)
    yield made
    made.shutdown()


def start(cluster: Any, corpus: Path, out: Path) -> subprocess.Popen[str]:
    ray = ("--executor", "ray", "--address", cluster.address, "--threads", "1")
    pipe = subprocess.PIPE
    return subprocess.Popen(command(corpus, out, *ray), stdout=pipe, stderr=pipe, text=True)


def finish(driver: subprocess.Popen[str]) -> str:
    printed, said = driver.communicate(timeout=900)
    assert driver.returncode == 0, printed + said
    return printed + said


def files(out: Path) -> int:
    return len(list(out.glob("partials/*.part")))


def wait_for(out: Path, count: int, driver: subprocess.Popen[str]) -> None:
    while files(out) < count and driver.poll() is None:
        time.sleep(0.05)


def workers() -> list[int]:
    """The processes of this test's cluster that run a task."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes()
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            above = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1]
        except (OSError, ValueError):
            continue
        if words.startswith(b"ray::_call") and int(above) == os.getpid():
            found.append(int(path.name))
    return found


def test_three_nodes_give_the_same_bytes(cluster: Any, corpus: Path, whole: Path, tmp_path: Path) -> None:
    finish(start(cluster, corpus, tmp_path / "out"))
    assert tables(tmp_path / "out") == tables(whole)
    from lmd3.results import read_json

    work = read_json(tmp_path / "out" / "run.json")["work"]
    print(work)
    assert len(work["nodes"]) == 3 and sum(node["rows"] for node in work["nodes"].values()) == 2_400_000


def test_a_node_is_removed(cluster: Any, corpus: Path, whole: Path, tmp_path: Path) -> None:
    node = cluster.add_node(**cluster.given)
    driver = start(cluster, corpus, tmp_path / "out")
    wait_for(tmp_path / "out", 8, driver)
    cluster.remove_node(node, allow_graceful=False)
    assert driver.poll() is None
    finish(driver)
    assert tables(tmp_path / "out") == tables(whole)


def test_workers_are_killed(cluster: Any, corpus: Path, whole: Path, tmp_path: Path) -> None:
    driver = start(cluster, corpus, tmp_path / "out")
    killed = 0
    for count in (4, 12, 20, 30):
        wait_for(tmp_path / "out", count, driver)
        time.sleep(random.uniform(0, 0.5))
        for worker in random.sample(there := workers(), min(1, len(there))):
            os.kill(worker, signal.SIGKILL)
            killed += 1
    assert killed > 0
    finish(driver)
    assert tables(tmp_path / "out") == tables(whole)


def test_the_driver_is_killed_again_and_again(
    cluster: Any, corpus: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    before = 0
    for _ in range(3):
        driver = start(cluster, corpus, out)
        wait_for(out, before + 3, driver)
        time.sleep(random.uniform(0, 1))
        assert driver.poll() is None
        os.kill(driver.pid, signal.SIGKILL)
        driver.communicate()
        before = files(out)
    there = {path: path.stat().st_mtime_ns for path in out.glob("partials/*.part")}
    damaged = sorted(there)[1]
    damaged.write_bytes(damaged.read_bytes()[:-3])
    finish(start(cluster, corpus, out))
    assert tables(out) == tables(whole)
    kept = [path for path, then in there.items() if path.stat().st_mtime_ns == then]
    assert damaged not in kept and len(kept) >= len(there) - 1


def test_a_shard_is_not_there(cluster: Any, corpus: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    driver = start(cluster, corpus, out)
    wait_for(out, 3, driver)
    shard = sorted((corpus / "store").glob("embeddings-*.npy"))[55]
    # Those that have the store open keep it; a worker that starts now does not find it.
    shard.rename(shard.with_suffix(".away"))
    for worker in workers():
        os.kill(worker, signal.SIGKILL)
    printed, said = driver.communicate(timeout=900)
    shard.with_suffix(".away").rename(shard)
    assert driver.returncode == 1, printed + said
    assert shard.name in said and "segments" in said and not (out / "run.json").exists()
    finish(start(cluster, corpus, out))
    assert tables(out) == tables(whole)


TEN_THOUSAND = """
import resource, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_ray import nothing
from lmd3.executors import Task, make_executor, run_tasks
from lmd3.progress import silent
executor = make_executor("ray", threads=1, address=sys.argv[2])
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
def run(count):
    tasks = (Task(f"task {i}", {"start": i}, 1.0) for i in range(count))
    begun = time.time()
    run_tasks(executor, nothing, tasks, label="", total=float(count), unit="", progress=silent)
    print(f"{count} tasks: {time.time() - begun:.0f} s, driver {resident() / 1e6:.1f} MB", flush=True)
    return resident()
run(500)
first = run(1000)
last = run(10_000)
assert last < first + 30e6, (first, last)
"""


def nothing(arguments: dict[str, Any], report: Any) -> dict[str, Any]:
    return {"rows": 1}


def test_ten_thousand_tasks(cluster: Any) -> None:
    here = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", TEN_THOUSAND, here, cluster.address], check=True)
