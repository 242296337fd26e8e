"""Lists read whole for many queries together: the sums of their rows, the same alone and in company, at every
SIMD level; and budgets by the variance that the index predicts."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from lmd3 import errors, system
from lmd3.index import Index, draw_keys
from lmd3.store import open_store

TOGETHER = """
import json, sys, tempfile
from pathlib import Path
import numpy as np
from lmd3.index import Index, draw_keys
from lmd3.store import StoreWriter, open_store
n, q = 6000, 70
kernels = [("exponential", 0.15), ("gaussian", 0.3), ("exponential", 0.4)]
rng = np.random.default_rng(3)
worst = {}
# Odd and even dimensions; one where rows must be set apart in the cache.
for d in (33, 64, 512):
    centres = rng.normal(size=(25, d))
    rows = centres[rng.integers(25, size=n)] + 0.6 * rng.normal(size=(n, d))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    rows[700:730] = rows[700]
    for dtype in ("float32", "float16", "int8"):
        with tempfile.TemporaryDirectory() as folder:
            with StoreWriter(Path(folder) / "s", dtype=dtype) as writer:
                writer.append(rows, weights=rng.uniform(0.1, 3.0, size=n))
            store = open_store(Path(folder) / "s")
            index = Index.build(store, lists=30)
            stored = store.rows(np.arange(n)).astype(np.float64)
            weights = store.weights().astype(np.float64)
            own = np.where(np.arange(q) % 3 == 0, rng.integers(n, size=q), -1)
            own[0] = 710
            others = rows[rng.integers(n, size=q)]
            queries = np.where((own >= 0)[:, None], store.rows(np.maximum(own, 0)), others)
            queries = np.ascontiguousarray(queries, np.float32)
            keys = draw_keys([str(i) for i in range(q)])
            squared = ((stored[None] - queries[:, None].astype(np.float64)) ** 2).sum(-1)
            sums = []
            for kernel, h in kernels:
                k = np.exp(-np.sqrt(squared) / h if kernel == "exponential" else -squared / (2 * h * h))
                k *= weights
                k[np.flatnonzero(own >= 0), own[own >= 0]] = 0
                sums.append(k.sum(1))
            exact = np.log(np.array(sums)).T
            def stage(chosen, rows, **options):
                count = len(chosen)
                budget = np.full(count, rows, np.uint64)
                return index.stage(
                    queries[chosen], keys[chosen], kernels, budget, own=own[chosen], **options
                )
            everyone = np.arange(q)
            all_rows = stage(everyone, 10 * n)
            assert (all_rows["draws"] == 0).all() and (all_rows["rows"] == n).all()
            assert np.allclose(all_rows["excluded"], np.where(own >= 0, weights[np.maximum(own, 0)], 0))
            worst[f"{d} {dtype}"] = float(np.abs(all_rows["log_sum"] - exact).max())
            some = stage(everyone, 150, whole_cost=1 / 16, threads=2)
            assert (some["draws"] > 0).any() and (some["rows"] - some["draws"] > 300).all()
            # Panels of one query, of a few, of all but one, of two wide ones and a narrow one.
            for chosen in (everyone[5:6], everyone[3:19], everyone[1:], everyone[:66]):
                part = stage(chosen, 150, whole_cost=1 / 16, threads=1)
                for name in part:
                    same = np.array_equal(part[name], some[name][chosen], equal_nan=True)
                    assert same, (d, dtype, name, len(chosen))
print(json.dumps(worst))
"""


@pytest.mark.parametrize("level", system.simd_levels())
def test_lists_read_together_are_the_sums_of_their_rows_in_any_company(level: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TOGETHER],
        env={**os.environ, "LMD3_SIMD": level},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name, worst in json.loads(done.stdout).items():
        # Queries of 15 bits against rows of 8: what the audit counts as the error of the arithmetic.
        assert worst < (2e-4 if "int8" in name else 2e-6), (level, name, worst)


def clustered(n: int, seed: int, d: int = 48) -> np.ndarray:
    centres = np.random.default_rng(1).normal(size=(40, d))
    rng = np.random.default_rng(seed)
    rows = centres[rng.integers(40, size=n)] + 0.7 * rng.normal(size=(n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return Index.build(open_store(clustered(60_000, 0)), tmp_path_factory.mktemp("i") / "i")


def test_a_variance_aimed_at_is_reached(index: Index) -> None:
    """What the index predicts of the variance is brought down to the aim, by more rows for a smaller one."""
    queries, keys, kernels = clustered(40, 2), draw_keys([str(i) for i in range(40)]), [("exponential", 0.15)]
    most = np.full(40, 60_000, np.uint64)
    z = index.stage(queries, keys, kernels, np.full(40, 600_000, np.uint64))["log_sum"][:, 0]
    spent = []
    for target in (0.003, 0.001, 0.0003):
        found = index.stage(queries, keys, kernels, most, aims=2 * (z + np.log(target)))
        predicted = np.sqrt(found["predicted"][:, 0]) * np.exp(found["log_sum"][:, 0] - z)
        assert (predicted < 1.1 * target).all() and (predicted > 0.4 * target).all(), predicted / target
        error, spread = np.abs(found["log_sum"][:, 0] - z), np.sqrt(found["variance"][:, 0])
        assert (error <= 3 * spread).mean() > 0.97 and np.median(spread) < 1.5 * target
        spent.append(found["rows"])
    assert (spent[0] < spent[1]).all() and (spent[1] < spent[2]).all()
    # No more than `rows` allow, whatever the aim.
    few = np.full(40, 2000, np.uint64)
    capped = index.stage(queries, keys, kernels, few, aims=np.full(40, -np.inf), whole_cost=1 / 16)
    plain = index.stage(queries, keys, kernels, few, whole_cost=1 / 16)
    for name in plain:
        assert np.array_equal(capped[name], plain[name]), name


def test_a_cost_that_is_none_is_refused(index: Index) -> None:
    for cost in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(errors.ParameterError, match="costs"):
            index.stage(
                clustered(1, 3),
                draw_keys(["a"]),
                [("exponential", 0.1)],
                np.array([900], np.uint64),
                whole_cost=cost,
            )
    with pytest.raises(errors.InputError, match="aims"):
        index.stage(
            clustered(2, 3),
            draw_keys(["a", "b"]),
            [("exponential", 0.1)],
            np.full(2, 900, np.uint64),
            aims=np.zeros(1),
        )
