"""Outcome tables: what is read, what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import statsmodels.api as sm
from hypothesis import given
from hypothesis import strategies as st

from lmd3 import errors
from lmd3.analysis import regress
from lmd3.outcomes import OUTCOME_SCHEMA, choose_outcome, read_outcomes


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_csv_ids_stay_as_written_and_missing_values_are_null(tmp_path: Path) -> None:
    path = write(tmp_path, "o.csv", 'id,value,topic\n007,1.5,"a, b"\n8,nan,\n9,,c\n')
    table = read_outcomes(path)
    assert table.column_names == [*OUTCOME_SCHEMA.names, "topic"]
    assert table["id"].to_pylist() == ["007", "8", "9"]
    assert table["value"].to_pylist() == [1.5, None, None]
    assert table["topic"].to_pylist() == ["a, b", "", "c"]
    assert set(table["kind"].to_pylist()) == {"continuous"}
    assert table["trials"].null_count == 3


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ("[0, 1]", "binary"),
        ("[true, false]", "binary"),
        ('["True", "false"]', "binary"),
        ("[1, null]", "binary"),
        ("[0, 1.5]", "continuous"),
        ("[2, 3]", "continuous"),
    ],
)
def test_kind_is_read_off_the_values(tmp_path: Path, values: str, kind: str) -> None:
    lines = [json.dumps({"doc_id": i, "correct": v}) for i, v in enumerate(json.loads(values))]
    table = read_outcomes(write(tmp_path, "o.jsonl", "\n".join(lines)))
    assert table["kind"].to_pylist() == [kind, kind]
    assert table["outcome"].to_pylist() == ["correct", "correct"]
    assert table["id"].to_pylist() == ["0", "1"]


def test_rows_are_numbered_without_an_id_column() -> None:
    table = read_outcomes(pd.DataFrame({"score": [0.1, 0.2], "name": ["a", "b"]}))
    assert table["id"].to_pylist() == ["0", "1"]
    assert table["value"].to_pylist() == [0.1, 0.2]


def test_parquet_integers_with_nulls_stay_integers(tmp_path: Path) -> None:
    pq.write_table(pa.table({"q": [1, 2], "value": [True, None]}), tmp_path / "o.parquet")
    table = read_outcomes(tmp_path / "o.parquet", id="q")
    assert table["id"].to_pylist() == ["1", "2"]
    assert table["value"].to_pylist() == [1.0, None]
    assert table["kind"][0].as_py() == "binary"


def test_gzip(tmp_path: Path) -> None:
    table = read_outcomes(write(tmp_path, "o.jsonl.gz", gzip.compress(b'{"id": "a", "value": 2}\n')))
    assert table["value"].to_pylist() == [2.0]


def test_one_of_several_outcomes() -> None:
    frame = pd.DataFrame({"id": [1, 1], "outcome": ["loss", "right"], "value": [0.3, 1]})
    table = read_outcomes(frame)
    assert table["kind"].to_pylist() == ["continuous", "binary"]
    with pytest.raises(errors.InputError, match="several outcomes"):
        choose_outcome(table, None)
    with pytest.raises(errors.InputError, match="no outcome 'x'"):
        read_outcomes(frame, outcome="x")
    assert read_outcomes(frame, outcome="right")["value"].to_pylist() == [1.0]


@pytest.mark.parametrize(
    ("name", "content", "error", "row"),
    [
        ("o.csv", "id,value\na,1\na,2\n", errors.DuplicateIdError, 1),
        ("o.csv", "id,value\na,1\nb,one\n", errors.ColumnError, 1),
        ("o.csv", "id,value\na,1\nb,inf\n", errors.NotFiniteError, 1),
        ("o.csv", "id,value\na,1\nb\n", errors.TextFormatError, 1),
        ("o.csv", "id,value,value\na,1,1\n", errors.TextFormatError, None),
        ("o.csv", "id,value\n", errors.InputError, None),
        ("o.csv", "id,kind,value\na,binary,1\nb,binary,.5\n", errors.ColumnError, 1),
        ("o.csv", "id,kind,value\na,other,1\n", errors.ColumnError, None),
        ("o.csv", "id,value,trials\na,1,1.5\n", errors.ColumnError, None),
        ("o.jsonl", '{"id": 1, "value": 1}\n{"id": 2, "value":\n', errors.TextFormatError, 1),
        ("o.jsonl", "[1]\n", errors.TextFormatError, 0),
        ("o.jsonl", '{"id": null, "value": 1}\n', errors.ColumnError, 0),
        ("o.jsonl", '{"id": 1, "a": 1, "b": 2}\n', errors.ColumnError, None),
        ("o.jsonl", b'{"id": 1, "value": 1}\n{"id": "\xff", "value": 1}\n', errors.TextFormatError, 1),
        ("o.jsonl.gz", b"junk", errors.FormatError, None),
        ("o.parquet", b"PAR1junk", errors.FormatError, None),
        ("o.xlsx", b"", errors.FormatError, None),
    ],
)
def test_refused(
    tmp_path: Path, name: str, content: str | bytes, error: type[errors.Lmd3Error], row: int | None
) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(error) as raised:
        read_outcomes(path)
    assert raised.value.row == row
    assert raised.value.file == str(path)
    assert raised.value.refused


def test_missing_file_and_column(tmp_path: Path) -> None:
    with pytest.raises(errors.FileMissingError):
        read_outcomes(tmp_path / "no.csv")
    path = write(tmp_path, "o.csv", "id,value\na,1\n")
    with pytest.raises(errors.ColumnError, match=r"no column 'score'.*id, value"):
        read_outcomes(path, value="score")


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1),
        st.none() | st.floats(allow_nan=False, allow_infinity=False),
        min_size=1,
    )
)
def test_jsonl_round_trip(tmp_path_factory: pytest.TempPathFactory, scores: dict[str, float | None]) -> None:
    lines = [json.dumps({"id": i, "value": v}, ensure_ascii=False) for i, v in scores.items()]
    path = write(tmp_path_factory.mktemp("o"), "o.jsonl", "\n".join(lines))
    table = read_outcomes(path)
    assert dict(zip(table["id"].to_pylist(), table["value"].to_pylist(), strict=True)) == scores


def test_shares_of_trials_are_binary_and_lose_their_rounding() -> None:
    rng = np.random.default_rng(0)
    trials = rng.integers(1, 40, 200)
    right = rng.binomial(trials, 0.4)
    frame = pd.DataFrame({"id": [str(i) for i in range(200)], "value": right / trials, "trials": trials})
    rounded = frame.assign(value=frame["value"].round(3))
    for table_of in (frame, rounded, rounded.assign(kind="binary")):
        table = read_outcomes(table_of)
        assert set(table["kind"].to_pylist()) == {"binary"}
        np.testing.assert_allclose(table["value"].to_numpy(), right / trials, rtol=0, atol=1e-15)
    # Means of scores that are no counts stay continuous, and are refused where they are said to be counts.
    scores = frame.assign(value=rng.random(200))
    assert set(read_outcomes(scores)["kind"].to_pylist()) == {"continuous"}
    assert set(read_outcomes(scores.assign(kind="continuous"))["kind"].to_pylist()) == {"continuous"}
    with pytest.raises(errors.ColumnError, match="trials"):
        read_outcomes(scores.assign(kind="binary"))
    with pytest.raises(errors.ColumnError, match="trials"):
        read_outcomes(frame.drop(columns="trials").assign(kind="binary"))
    # As many rows of single trials.
    single = pd.DataFrame(
        {
            "id": np.repeat(frame["id"], trials),
            "value": np.concatenate([np.arange(t) < r for t, r in zip(trials, right, strict=True)]),
        }
    )
    x = pd.DataFrame({"id": frame["id"], "log_density": rng.standard_normal(200)})
    found = regress(rounded, x, controls="none").facts["primary"]
    long = single.merge(x, on="id")
    scaled = sm.add_constant(long["log_density"] / x["log_density"].std())
    direct = sm.Logit(long["value"].astype(float), scaled).fit(disp=0)
    assert found["estimate"] == pytest.approx(direct.params["log_density"], rel=1e-6)
