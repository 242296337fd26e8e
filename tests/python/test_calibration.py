"""The calibration suite itself: replicates do not depend on the split, rows are kept and judged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from lmd3.analysis import simulate


def test_replicates_are_the_same_in_any_split() -> None:
    numbers = {s.name: n for n, s in enumerate(simulate.scenarios())}
    number = numbers["conformal p-values of 200 supported queries"]
    whole = simulate.replicate(number, 0, 6, 3)
    parts = np.concatenate([simulate.replicate(number, 0, 2, 3), simulate.replicate(number, 2, 4, 3)])
    np.testing.assert_array_equal(whole, parts)


def test_rows_are_kept_and_made_anew_where_their_settings_changed(tmp_path: Path) -> None:
    last = len(simulate.scenarios()) - 1
    keep = tmp_path / "rows"
    (first,) = simulate.run(20, 0, 1, [last], keep)
    assert first.replicates == 20 and 0.0 <= first.rejected <= 0.2
    line = json.loads(keep.read_text())
    line["rates"]["rejected"] = 0.123
    # A line that a kill cut short is no line.
    keep.write_text(json.dumps(line) + "\n" + '{"name": "conf')
    assert simulate.run(20, 0, 1, [last], keep)[0].rejected == 0.123
    (other,) = simulate.run(10, 0, 1, [last], keep)
    assert [r.replicates for r in (other, *simulate.run(10, 0, 1, [last], keep))] == [10, 10]
    assert [
        json.loads(text)["settings"]["replicates"] for text in keep.read_text().split("\n") if "rates" in text
    ] == [20, 10]
    line["settings"]["sources"] = "other"
    keep.write_text(json.dumps(line) + "\n")
    assert simulate.run(20, 0, 1, [last], keep)[0].rejected == first.rejected
    assert simulate.run(20, 1, 1, [last], keep)[0].rejected != first.rejected


def test_a_row_outside_its_bounds_is_said_to_be(tmp_path: Path) -> None:
    null, error = (next(s for s in simulate.scenarios() if s.kind == kind) for kind in ("null", "error"))
    good = {"rejected": 0.05, "coverage": 0.95, "naive": 0.5, "replicates": 2000}
    assert simulate.summarised(null, good).fine
    assert not simulate.summarised(null, good | {"rejected": 0.07}).fine
    assert not simulate.summarised(null, good | {"coverage": 0.92}).fine
    assert not simulate.summarised(
        error, {"bias": 0.0, "coverage": 0.98, "naive": 0.9, "replicates": 2000}
    ).fine
    text = simulate.page([simulate.summarised(null, good | {"rejected": 0.07})], 0, 60.0, "a CPU")
    assert "**no**" in text and "7.0 %" in text
