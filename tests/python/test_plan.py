"""`lmd3 density --plan` and `lmd3 info --measure`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmd3 import KernelDensity, system
from lmd3.store import StoreWriter


def lmd3(*arguments: object) -> Any:
    command = [sys.executable, "-m", "lmd3", *map(str, arguments), "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    rows = np.random.default_rng(0).normal(size=(30_000, 24)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    with StoreWriter(folder / "store", dtype="float16", shard_rows=12_000) as writer:
        groups = ["a" if i < 12_000 else f"b{i % 2}" for i in range(len(rows))]
        writer.append(rows, [str(i) for i in range(len(rows))], groups=groups)
    np.save(folder / "queries.npy", rows[:200])
    return folder


def test_a_plan_counts_the_work_and_writes_nothing(folder: Path) -> None:
    given = (folder / "store", folder / "queries.npy", "--bandwidth", "0.3", "--by-group", "--neighbors", 5)
    plan = lmd3("density", *given, "-o", folder / "out", "--plan")
    assert not (folder / "out").exists()
    assert (plan["rows"], plan["queries"], plan["dimensions"]) == (30_000, 200, 24)
    assert (plan["segments"], plan["passes"]) == (3, 1)
    assert plan["bytes"] == 30_000 * 24 * 2
    assert plan["operations"] == 2 * 30_000 * 200 * 24
    assert plan["bandwidth_seconds"] == 0 and plan["seconds"] == plan["scan_seconds"] > 0
    # Groups in the three shards: 1, 2 and 2.
    assert plan["partial_bytes"] == 200 * (5 * 24 + 3 * (5 * 16 + 8)) + 3 * 24 * 8
    lmd3("density", *given, "-o", folder / "out")
    written = sum(path.stat().st_size for path in (folder / "out" / "partials").glob("*.part"))
    assert 0.3 * plan["partial_bytes"] < written < plan["partial_bytes"] + 4096


def test_rules_take_their_time(folder: Path) -> None:
    plan = lmd3("density", folder / "store", folder / "queries.npy", "--plan", "--bandwidth", "ess=50")
    assert plan["seconds"] == plan["bandwidth_seconds"] + plan["scan_seconds"]
    assert plan["bandwidth_seconds"] > plan["scan_seconds"]


def test_without_a_plan_the_output_is_asked_for(folder: Path) -> None:
    error = lmd3("density", folder / "store", folder / "queries.npy")["error"]
    assert error["kind"] == "ParameterError" and "--plan" in error["remedy"]


def test_the_expected_time_is_near_the_true_one() -> None:
    """Work of a second or so, the probe a fifth of it; a factor of 3 for a busy machine."""
    generator = np.random.default_rng(1)
    rows = generator.normal(size=(200_000, 256)).astype(np.float32)
    queries = generator.normal(size=(1000, 256)).astype(np.float32)
    kde = KernelDensity(bandwidth=5.0).fit(rows)
    expected = kde.plan(queries, seconds=0.3)["seconds"]
    started = time.perf_counter()
    kde.density(queries)
    taken = time.perf_counter() - started
    assert expected / 3 < taken < expected * 3


def test_peaks_are_measured() -> None:
    found = lmd3("info", "--measure")["measured"]
    assert found["threads"] == system.cores()
    assert found["f32_peak_one"] > 1e9 and found["read_bandwidth_one"] > 1e8
    # All threads do no less than one, but for what other work takes meanwhile.
    assert found["f32_peak_all"] > 0.5 * found["f32_peak_one"]
    if system.simd_level() != "portable":
        assert 2e8 < found["implied_clock_one"] < 8e9
    assert "measured" not in lmd3("info")
