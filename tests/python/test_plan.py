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
from lmd3.density.rates import read_rates
from lmd3.errors import FileMissingError, ParameterError
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


@pytest.mark.slow
def test_the_expected_time_is_near_the_true_one() -> None:
    """Work of a second or so, the probe a fifth of it. A timing: run by hand where nothing else runs."""
    generator = np.random.default_rng(1)
    rows = generator.normal(size=(200_000, 256)).astype(np.float32)
    queries = generator.normal(size=(1000, 256)).astype(np.float32)
    kde = KernelDensity(bandwidth=5.0).fit(rows)
    expected = kde.plan(queries, seconds=0.3)["seconds"]
    started = time.perf_counter()
    kde.density(queries)
    taken = time.perf_counter() - started
    assert expected / 3 < taken < expected * 3


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of `lmd3 info --measure -o`."""
    path = tmp_path_factory.mktemp("machine") / "machine.json"
    said = lmd3("info", "--measure", "-o", path)
    assert json.loads(path.read_text(encoding="utf-8")) == said
    return path


def test_peaks_are_measured(machine: Path) -> None:
    found = json.loads(machine.read_text(encoding="utf-8"))["measured"]
    assert found["threads"] == system.cores()
    assert found["f32_peak_one"] > 1e9 and found["read_bandwidth_one"] > 1e8
    assert found["f32_peak_all"] > 1e9
    if system.simd_level() != "portable":
        assert 2e8 < found["implied_clock_one"] < 8e9
    assert "measured" not in lmd3("info")
    rates = found["rates"]
    assert rates["threads"] == system.cores() and rates["simd"] == system.simd_level()
    for arithmetic, rate in rates["operations"].items():
        assert 1e8 < rate < 64e12, arithmetic
    assert rates["fold"] > 1e6 and 0.01 < rates["start"] < 600 and 1e-4 < rates["task"] < 60
    assert lmd3("info", "-o", machine)["error"]["kind"] == "ParameterError"


def test_a_plan_by_measured_rates_touches_no_row(folder: Path, machine: Path, tmp_path: Path) -> None:
    """Rates are those of the file: of another machine, say."""
    found = json.loads(machine.read_text(encoding="utf-8"))
    rates = {"operations": {"float32": 1e12, "int16": 2e12, "int8": 4e12}, "read": 1e10, "fold": 5e7}
    found["measured"]["rates"] |= rates | {"threads": 64, "simd": "avx2", "start": 4.0, "task": 0.25}
    (tmp_path / "node.json").write_text(json.dumps(found), encoding="utf-8")
    given = ("density", folder / "store", folder / "queries.npy", "--bandwidth", "0.3", "--plan")
    plan = lmd3(*given, "--rates", tmp_path / "node.json", "--rows", "1e9", "--nodes", 10, "--cores", 64)
    # 24 dimensions and 200 queries: 48 bytes a row from memory take less than the arithmetic.
    assert plan["scan_seconds"] == pytest.approx(2 * 1e9 * 200 * 24 / 1e12)
    assert (plan["simd"], plan["threads"], plan["rates"]) == ("avx2", 64, "measured before")
    cluster = plan["cluster"]
    assert cluster["compute_seconds"] == pytest.approx((1 + 1 / 32) * plan["scan_seconds"] / 10)
    assert cluster["start_seconds"] == pytest.approx(4 + 16 * 0.25)
    assert cluster["merge_seconds"] == pytest.approx(plan["partial_bytes"] / 5e7)
    few = KernelDensity(bandwidth=0.3).fit(folder / "store")
    by_file = few.plan(folder / "queries.npy", rates=read_rates(tmp_path / "node.json"))
    assert by_file["scan_seconds"] == pytest.approx(2 * 30_000 * 200 * 24 / 1e12)
    one = few.plan(np.load(folder / "queries.npy")[:1], rates=read_rates(tmp_path / "node.json"))
    assert one["scan_seconds"] == pytest.approx(30_000 * 48 / 1e10), "a single query waits for memory"
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    assert lmd3(*given, "--rates", tmp_path / "other.json")["error"]["kind"] == "FormatError"
    assert lmd3(*given, "--rates", tmp_path / "none.json")["error"]["kind"] == "FileMissingError"


def test_a_plan_for_many_machines_adds_up(folder: Path, machine: Path) -> None:
    given = (
        folder / "store",
        folder / "queries.npy",
        "--bandwidth",
        "0.3",
        "--plan",
        "--rows",
        "3e9",
        "--rates",
        machine,
    )
    plan = lmd3("density", *given, "--nodes", 20, "--cores", 32, "--disk-rate", "500MB/s", "--price", 2)
    assert (plan["rows"], plan["segments"], plan["bytes"]) == (3_000_000_000, 300_000, 3_000_000_000 * 48)
    found = plan["cluster"]
    per_core = plan["operations_per_second"] / plan["threads"]
    wave = 1 + 1 / 32
    assert found["compute_seconds"] == pytest.approx(wave * plan["operations"] / (per_core * 640))
    assert found["disk_seconds"] == pytest.approx(wave * 3e9 * 48 / (20 * 500e6))
    assert found["network_bytes"] == 2 * plan["partial_bytes"]
    hours = 20 * found["seconds"] / 3600
    assert found["node_hours_per_billion_rows"] == pytest.approx(hours / 3)
    assert found["cost"] == pytest.approx(2 * hours)
    alone = lmd3("density", *given, "--nodes", 1)["cluster"]
    assert alone["start_seconds"] == 0 and alone["disk_seconds"] == 0 and alone["cost"] is None


@pytest.mark.parametrize("option", [("--disk-rate", "fast"), ("--disk-rate", "0"), ("--rows", "-1")])
def test_a_plan_for_nonsense_is_refused(folder: Path, option: tuple[str, str]) -> None:
    given = (folder / "store", folder / "queries.npy", "--bandwidth", "0.3", "--plan")
    assert lmd3("density", *given, *option)["error"]["kind"] == "ParameterError"


def test_groups_beyond_memory_are_refused_and_the_largest_are_kept(folder: Path, tmp_path: Path) -> None:
    given = ("density", folder / "store", folder / "queries.npy", "--bandwidth", "0.3", "--by-group")
    for more in (("--plan",), ("-o", tmp_path / "out")):
        error = lmd3(*given, *more, "--max-memory", "300kB")["error"]
        assert error["kind"] == "ParameterError" and "--groups top:" in error["remedy"]
    assert not (tmp_path / "out").exists()
    kde = KernelDensity(bandwidth=0.3).fit(folder / "store")
    every = kde.density(folder / "queries.npy", by_group=True).density.to_pandas()
    named = tmp_path / "names.txt"
    named.write_text("b1\na\n", encoding="utf-8")
    for groups, kept in (("top:1", ["a"]), (str(named), ["a", "b1"])):
        out = tmp_path / groups.replace(":", "-").replace("/", "")
        found = kde.density(
            folder / "queries.npy", by_group=True, groups=groups, folder=out
        ).density.to_pandas()
        assert set(found["group"].dropna()) == {*kept, "(other)"}
        sums = {
            name: rows["kernel_sum_log"].to_numpy() for name, rows in found.groupby("group", dropna=False)
        }
        wanted = {
            name: rows["kernel_sum_log"].to_numpy() for name, rows in every.groupby("group", dropna=False)
        }
        for name in kept:
            assert np.array_equal(sums[name], wanted[name])
        other = np.logaddexp.reduce([wanted[name] for name in ("a", "b0", "b1") if name not in kept])
        assert sums["(other)"] == pytest.approx(other, rel=1e-6)
    for wrong in ("top:0", "top:x"):
        with pytest.raises(ParameterError):
            kde.density(folder / "queries.npy", by_group=True, groups=wrong)
    with pytest.raises(ParameterError, match="no group 'c'"):
        kde.density(folder / "queries.npy", by_group=True, groups=["c"])
    with pytest.raises(FileMissingError):
        kde.density(folder / "queries.npy", by_group=True, groups=str(tmp_path / "none"))
    with pytest.raises(ParameterError, match="not asked for"):
        kde.density(folder / "queries.npy", groups="top:1")
