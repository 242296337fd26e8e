"""Densities over a store with appended rows: old rows' sums are taken, the result is that of a full scan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lmd3
from lmd3.cli import main
from lmd3.errors import FormatError, ParameterError
from lmd3.results import DensityTable
from lmd3.store import StoreWriter

D = 8


def unit(n: int, seed: int) -> Any:
    vectors = np.random.default_rng(seed).normal(size=(n, D))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def write(path: Path, rows: Any, start: int, groups: list[str] | None, dtype: str) -> None:
    with StoreWriter(path, dtype=dtype, shard_rows=5000) as writer:
        writer.append(rows, [f"n{start + row}" for row in range(len(rows))], groups)
        writer.close()


def files(folder: Path) -> dict[str, bytes]:
    return {
        name: (folder / name).read_bytes()
        for name in ("density.parquet", "queries.parquet", "neighbors.parquet")
    }


@pytest.mark.parametrize(("dtype", "by_group"), [("float32", True), ("float16", False)])
def test_the_old_rows_are_not_scanned_again(
    dtype: str, by_group: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (["a"] * 12_000, ["a", "b"] * 1500) if by_group else (None, None)
    write(tmp_path / "s", unit(12_000, 0), 0, first, dtype)
    write(tmp_path / "t", unit(3_000, 1), 12_000, second, dtype)
    np.save(tmp_path / "q.npy", unit(30, 2))
    group = ["--by-group"] if by_group else []

    def density(out: str, *options: str) -> int:
        return main(
            [
                "density",
                str(tmp_path / "s"),
                str(tmp_path / "q.npy"),
                "-o",
                str(tmp_path / out),
                *group,
                *options,
            ]
        )

    assert density("old") == 0
    lmd3.append_vectors(tmp_path / "s", tmp_path / "t")
    capsys.readouterr()
    assert density("new", "--extend", str(tmp_path / "old")) == 0
    said = capsys.readouterr().err
    assert "the sums of 12,000 rows, which are not scanned again" in said
    assert "12,000 of 15,000 rows were done before" in said
    assert density("scratch", "--bandwidth", f"@{tmp_path / 'old' / 'bandwidth.json'}") == 0
    assert files(tmp_path / "new") == files(tmp_path / "scratch")
    assert DensityTable.load(tmp_path / "new").run["rows"] == 15_000


def test_what_is_not_an_earlier_result_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "s", unit(500, 0), 0, None, "float32")
    write(tmp_path / "t", unit(50, 1), 500, None, "float32")
    write(tmp_path / "other", unit(500, 3), 0, None, "float32")
    queries = unit(5, 2)
    kde = lmd3.KernelDensity(bandwidth=0.3)
    kde.fit(tmp_path / "s").density(queries, folder=tmp_path / "old")
    kde.fit(tmp_path / "other").density(queries, folder=tmp_path / "elsewhere")
    store = lmd3.append_vectors(tmp_path / "s", tmp_path / "t")

    def refused(error: type[Exception], match: str, earlier: str, h: float = 0.3, **options: Any) -> None:
        with pytest.raises(error, match=match):
            lmd3.KernelDensity(bandwidth=h).fit(store).density(
                queries, folder=tmp_path / match[:12], extend=tmp_path / earlier, **options
            )

    refused(FormatError, "no result with its segment sums", "nowhere")
    refused(ParameterError, "over another store", "elsewhere")
    refused(ParameterError, "other settings: neighbors: 10 then, 20 now", "old", neighbors=20)
    refused(ParameterError, "settings: kernels", "old", 0.4)
    with pytest.raises(ParameterError, match="folder"):
        lmd3.KernelDensity(bandwidth=0.3).fit(store).density(queries, extend=tmp_path / "old")


def test_coarser_integers_than_before_take_a_full_scan(tmp_path: Path) -> None:
    """How near a copy has to be follows the rounding of all rows, and with it the sums."""
    write(tmp_path / "s", unit(500, 0), 0, None, "int8")
    # One large value makes the scale, and so the rounding, of its row.
    rough = np.full((5, D), 0.004, np.float32)
    rough[np.arange(5), np.arange(5)] = 1
    write(tmp_path / "t", rough / np.linalg.norm(rough, axis=1, keepdims=True), 500, None, "float32")
    kde = lmd3.KernelDensity(bandwidth=0.3)
    kde.fit(tmp_path / "s").density(unit(5, 2), folder=tmp_path / "old")
    store = lmd3.append_vectors(tmp_path / "s", tmp_path / "t")
    with pytest.raises(ParameterError, match="settings: rounding"):
        kde.fit(store).density(unit(5, 2), folder=tmp_path / "new", extend=tmp_path / "old")
