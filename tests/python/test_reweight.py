"""Densities under another mixture of the groups, against a store whose rows weigh so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sampling import drawn_store

import lmd3
from lmd3.cli import main
from lmd3.density.reweighting import read_mix, reweight
from lmd3.errors import ColumnError, ParameterError
from lmd3.results import DensityTable
from lmd3.store import StoreWriter

N, D, NAMES = 400, 6, ("web", "code", "books")
BANDWIDTHS = [0.2, 1.0]


def rows() -> tuple[Any, Any]:
    generator = np.random.default_rng(2)
    return generator.normal(size=(N, D)).astype(np.float32), generator.choice(3, N, p=[0.6, 0.3, 0.1])


def write(path: Path, weights: Any = None) -> Path:
    vectors, codes = rows()
    with StoreWriter(path, dtype="float32", normalised=False) as writer:
        groups = [NAMES[code] for code in codes]
        writer.append(vectors, None, groups, weights=weights)
        writer.close()
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> DensityTable:
    store = write(tmp_path_factory.mktemp("mix") / "s")
    kde = lmd3.KernelDensity(kernel=["exponential", "tophat"], bandwidth=BANDWIDTHS)
    return kde.fit(store).density(rows()[0][:20] + np.float32(0.1), neighbors=3, by_group=True)


def whole(found: DensityTable) -> Any:
    return found.density.filter(pc.field("group").is_null())


@pytest.mark.parametrize("mix", [(1, 1, 1), (0.2, 0.7, 0.1), (5, 0, 0), (0, 1e-9, 1)])
def test_as_if_rows_weighed_so(mix: tuple[float, ...], table: DensityTable, tmp_path: Path) -> None:
    codes = rows()[1]
    counts = np.bincount(codes)
    weights = (np.array(mix) / np.sum(mix) / counts)[codes]
    # float32 weights are what a store keeps: the mixture is theirs.
    weights = weights.astype(np.float32)
    exact = {name: float(weights[codes == code].sum(dtype=float)) for code, name in enumerate(NAMES)}
    found = whole(reweight(table, exact))
    kde = lmd3.KernelDensity(kernel=["exponential", "tophat"], bandwidth=BANDWIDTHS)
    expected = whole(
        kde.fit(write(tmp_path / "s", weights)).density(rows()[0][:20] + np.float32(0.1), by_group=True)
    )
    for name, tolerance in (("log_density", 2e-6), ("ess", 2e-5)):
        np.testing.assert_allclose(found[name].to_numpy(), expected[name].to_numpy(), rtol=tolerance)
    assert found["id"].equals(expected["id"]) and found["flags"].equals(expected["flags"])


def test_its_own_mixture_changes_nothing(table: DensityTable) -> None:
    counts = np.bincount(rows()[1])
    found = reweight(table, dict(zip(NAMES, counts.tolist(), strict=True)))
    for name in ("log_density", "ess", "kernel_sum_log"):
        np.testing.assert_allclose(
            whole(found)[name].to_numpy(), whole(table)[name].to_numpy(), rtol=1e-9, atol=1e-9
        )
    groups = [table.density, found.density]
    one, two = (g.filter(pc.field("group").is_valid()).sort_by("log_density") for g in groups)
    assert one["log_density"].equals(two["log_density"])
    assert found.queries["typicality"].null_count == found.queries.num_rows
    assert found.neighbors["share"].null_count == found.neighbors.num_rows > 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=3, max_size=3).filter(lambda w: sum(w) > 0), st.floats(1e-3, 1e3))
def test_only_ratios_count(table: DensityTable, weights: list[float], factor: float) -> None:
    mix = dict(zip(NAMES, weights, strict=True))
    one = whole(reweight(table, mix))["log_density"].to_numpy()
    two = whole(reweight(table, {name: w * factor for name, w in mix.items()}))["log_density"].to_numpy()
    np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ([], "object of groups"),
        ({}, "object of groups"),
        ({"web": 1, "code": 1}, "lacks the group 'books'"),
        ({"web": 1, "code": 1, "books": 1, "x": 1}, "no group 'x'"),
        ({"web": -1, "code": 1, "books": 1}, "'web' is not a finite number"),
        ({"web": True, "code": 1, "books": 1}, "'web' is not a finite number"),
        ({"web": float("nan"), "code": 1, "books": 1}, "'web' is not a finite number"),
        ({"web": 0, "code": 0, "books": 0}, "all weights"),
    ],
)
def test_what_is_no_mixture(value: Any, match: str) -> None:
    with pytest.raises(ParameterError, match=match):
        read_mix(value, list(NAMES))


def test_a_mixture_of_a_sample_is_unbiased_and_its_interval_covers(tmp_path: Path) -> None:
    """A mixture that leans on a small group, over the seeds of a sample drawn by group."""
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(6000, 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    groups = ["small" if row % 10 == 0 else "large" for row in range(6000)]
    queries = draw.normal(size=(40, 6)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    mix = {"small": 3, "large": 1}
    with StoreWriter(tmp_path / "whole", dtype="float32") as writer:
        writer.append(vectors, None, groups)
    kde = lmd3.KernelDensity(bandwidth=[1.0, 0.02], threads=1)
    truth = reweight(kde.fit(tmp_path / "whole").density(queries, neighbors=0, by_group=True), mix)
    expected = whole(truth)["log_density"].to_numpy().reshape(2, 40)
    errors, inside = [], []
    for seed in range(30):
        store = drawn_store(tmp_path / "s", vectors, groups, 0.2, "group", seed)
        found = whole(reweight(kde.fit(store).density(queries, by_group=True), mix))
        log, low, high, said = (
            found[name].to_numpy().reshape(2, 40)
            for name in ("log_density", "ci_low", "ci_high", "std_error")
        )
        flags = np.array(found["flags"].to_pylist()).reshape(2, 40)
        assert (flags[0] == "").all() and all("few_effective_rows" in flag for flag in flags[1])
        errors.append(np.expm1(log[0] - expected[0]))
        inside.append((low[0] <= expected[0]) & (expected[0] <= high[0]))
        assert (low < log).all() and (log < high).all()
    pooled = np.mean(errors, axis=1)
    assert abs(pooled.mean()) <= 3 * pooled.std(ddof=1) / np.sqrt(30)
    # The allowance for a near row that was missed makes wide kernels' intervals a little too wide.
    assert 0.93 <= np.mean(inside) <= 0.995
    # What is said of the error is how the estimates spread.
    spread = np.std(errors, axis=0, ddof=1)
    assert 0.85 < (said[0] / spread).mean() < 1.2


def test_groups_are_needed(tmp_path: Path) -> None:
    found = lmd3.KernelDensity(bandwidth=1.0).fit(rows()[0]).density(rows()[0][:3])
    with pytest.raises(ColumnError, match="no densities by group"):
        reweight(found, {"a": 1})


def test_the_command(table: DensityTable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table.save(tmp_path / "d")
    (tmp_path / "mix.json").write_text('{"web": 1, "code": 2, "books": 1}', encoding="utf-8")
    arguments = ["reweight", str(tmp_path / "d"), "--mix", str(tmp_path / "mix.json")]
    assert main([*arguments, "-o", str(tmp_path / "m"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mix"] == {"web": 0.25, "code": 0.5, "books": 0.25}
    assert DensityTable.load(tmp_path / "m").run["mix"]["code"] == 0.5
    assert main([*arguments, "-o", str(tmp_path / "m")]) == 2
    assert "holds a result already" in capsys.readouterr().err
