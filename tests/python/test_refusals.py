"""Bad input and bad options are refused by the commands: exit 2, one clear line, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmd3 import cli


def rows(n: int, d: int, seed: int = 0) -> np.ndarray:
    matrix = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of good input: vectors, texts, a store, a density result, outcomes."""
    folder = tmp_path_factory.mktemp("good")
    np.save(folder / "rows.npy", rows(500, 16))
    np.save(folder / "queries.npy", rows(40, 16, 1))
    texts = [{"id": f"t{i}", "text": f"word{i % 7} word{i % 11} word{i % 13} and more"} for i in range(100)]
    write_lines(folder / "texts.jsonl", texts)
    write_lines(folder / "outcomes.jsonl", [{"id": str(i), "value": float(i % 3)} for i in range(40)])
    vectors = [str(folder / "rows.npy"), str(folder / "queries.npy")]
    for line in (
        ["encode", str(folder / "texts.jsonl"), "-o", str(folder / "store")],
        ["density", *vectors, "--bandwidth", "0.3", "-o", str(folder / "density")],
    ):
        assert cli.main([*line, "--quiet"]) == 0
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy of the good input that a test may spoil."""
    return Path(shutil.copytree(good, tmp_path / "input"))


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Runs a command with `-o` and returns its error: it must be refused and leave nothing."""

    def run(*arguments: str | Path, out: Path | None = None) -> dict[str, Any]:
        output = tmp_path / "out.parquet" if out is None else out
        before = sorted(tmp_path.rglob("*"))
        line = [*map(str, arguments), "-o", str(output), "--json"]
        assert cli.main(line) == 2
        printed = json.loads(capsys.readouterr().out)
        assert sorted(tmp_path.rglob("*")) == before
        error = dict(printed["error"])
        assert error["message"]
        return error

    return run


Refused = Callable[..., dict[str, Any]]


# --- vectors ---


@pytest.mark.parametrize("side", ["corpus", "queries"])
@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("missing", None, "FileMissingError"),
        ("junk", b"this is no array at all", "FormatError"),
        ("nothing", b"", "FormatError"),
        ("objects", np.array([["a", 1], [None, 2]], dtype=object), "DtypeError"),
        ("integers", np.ones((5, 16), dtype=np.int64), "DtypeError"),
        ("complex", np.ones((5, 16), dtype=np.complex64), "DtypeError"),
        ("no_rows", np.ones((0, 16), dtype=np.float32), "ShapeError"),
        ("one_dimension", np.ones(16, dtype=np.float32), "ShapeError"),
        ("other_d", rows(5, 17), "ShapeError"),
    ],
)
def test_matrices_that_are_none(
    side: str, name: str, content: Any, kind: str, folder: Path, refused: Refused
) -> None:
    path = folder / f"{name}.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    good = folder / ("queries.npy" if side == "corpus" else "rows.npy")
    error = refused("density", *((path, good) if side == "corpus" else (good, path)))
    assert error["kind"] in (kind, "FormatError") if name == "objects" else error["kind"] == kind
    if name != "other_d":
        assert error["file"] == str(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite(bad: float, folder: Path, refused: Refused) -> None:
    matrix = rows(500, 16)
    matrix[321, 5] = bad
    np.save(folder / "bad.npy", matrix)
    error = refused("density", folder / "bad.npy", folder / "queries.npy")
    assert (error["kind"], error["row"]) == ("NotFiniteError", 321)
    assert error["file"] == str(folder / "bad.npy")


def test_a_truncated_file_and_a_truncated_shard(folder: Path, refused: Refused) -> None:
    path = folder / "rows.npy"
    path.write_bytes(path.read_bytes()[:-10])
    assert refused("density", path, folder / "queries.npy")["kind"] == "FormatError"
    shard = next((folder / "store").glob("embeddings-*.npy"))
    shard.write_bytes(shard.read_bytes()[:-10])
    error = refused("density", folder / "store", folder / "texts.jsonl")
    assert error["kind"] == "FormatError" and error["file"] == str(shard)


def test_a_manifest_of_another_version(folder: Path, refused: Refused) -> None:
    path = folder / "store" / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["version"] = 99
    path.write_text(json.dumps(manifest), encoding="utf-8")
    error = refused("density", folder / "store", folder / "texts.jsonl")
    assert error["kind"] == "FormatError" and "99" in error["message"]


# --- texts ---


@pytest.mark.parametrize(
    ("content", "kind", "row"),
    [
        (b'{"text": "one"}\n{"text": "two\n', "TextFormatError", 1),
        (b'{"text": "one"}\n{"text": "two"}\n[3]\n', "TextFormatError", 2),
        (b'{"text": "one"}\n{"text": "\xff\xfe"}\n', "TextFormatError", 1),
        (b'{"words": "one"}\n', "ColumnError", None),
        (b'{"id": "a", "text": "one"}\n{"id": "a", "text": "two"}\n', "DuplicateIdError", None),
    ],
)
@pytest.mark.parametrize("command", ["encode", "perplexity"])
def test_texts_that_are_none(
    command: str, content: bytes, kind: str, row: int | None, folder: Path, refused: Refused
) -> None:
    path = folder / "bad.jsonl"
    path.write_bytes(content)
    training = ["--train", folder / "texts.jsonl"] if command == "perplexity" else []
    error = refused(command, path, *training)
    assert error["kind"] == kind
    if row is not None:
        assert error["row"] == row


def test_missing_texts_and_columns(folder: Path, refused: Refused) -> None:
    assert refused("encode", folder / "nothing.jsonl")["kind"] == "FileMissingError"
    assert refused("encode", folder / "texts.jsonl", "--id", "number")["kind"] == "ColumnError"
    assert refused("encode", folder / "texts.jsonl", "--group", "source")["kind"] == "ColumnError"


def test_models_that_cannot_be_loaded(folder: Path, refused: Refused) -> None:
    (folder / "model").mkdir()
    for command in ("encode", "perplexity"):
        error = refused(command, folder / "texts.jsonl", "--model", folder / "model")
        assert error["kind"] in ("ModelError", "MissingDependencyError")


# --- options ---


@pytest.mark.parametrize(
    "bandwidth", ["0", "-0.1", "nan", "inf", "ess=0", "ess=400", "mass=-1", "wide", "@none.json"]
)
def test_bandwidths_that_are_none(bandwidth: str, folder: Path, refused: Refused) -> None:
    command = ["density", folder / "rows.npy", folder / "queries.npy", f"--bandwidth={bandwidth}"]
    assert refused(*command)["kind"] in ("ParameterError", "FileMissingError")
    assert refused("bandwidth", *command[1:])["kind"] in ("ParameterError", "FileMissingError")


def test_unknown_kernels(folder: Path, refused: Refused) -> None:
    error = refused("density", folder / "rows.npy", folder / "queries.npy", "--kernel", "round")
    assert error["kind"] in ("ParameterError", "UsageError") and "round" in error["message"]


# --- joins ---


def test_ids_that_do_not_join(folder: Path, refused: Refused) -> None:
    write_lines(folder / "other.jsonl", [{"id": f"x{i}", "value": float(i)} for i in range(40)])
    assert refused("analyze", folder / "density", folder / "other.jsonl")["kind"] == "JoinError"


def test_outcome_columns_that_are_missing(folder: Path, refused: Refused) -> None:
    command = ["analyze", folder / "density", folder / "outcomes.jsonl"]
    assert refused(*command, "--outcome-value", "nothing")["kind"] == "ColumnError"
    assert refused(*command, "--outcome-id", "nothing")["kind"] == "ColumnError"
    assert refused(*command, "--cluster", "nothing")["kind"] == "ColumnError"


# --- outputs ---


@pytest.mark.parametrize("command", ["encode", "density", "bandwidth", "covariates", "perplexity", "analyze"])
@pytest.mark.parametrize("place", ["/proc/lmd3/out.parquet", "file/out.parquet"])
def test_outputs_that_cannot_be_written(
    command: str, place: str, folder: Path, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    inputs = {
        "encode": [folder / "texts.jsonl"],
        "density": [folder / "rows.npy", folder / "queries.npy"],
        "bandwidth": [folder / "rows.npy", folder / "queries.npy"],
        "covariates": [folder / "store", folder / "texts.jsonl"],
        "perplexity": [folder / "texts.jsonl", "--train", folder / "texts.jsonl"],
        "analyze": [folder / "density", folder / "outcomes.jsonl"],
    }
    assert refused(command, *inputs[command], out=tmp_path / place)["kind"] == "OutputError"


# --- the whole job ---


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"--corpus": "nothing.jsonl"}, "FileMissingError"),
        ({"--outcomes": "nothing.jsonl"}, "FileMissingError"),
        ({"--outcomes": "texts.jsonl"}, "ColumnError"),
        ({"--covariates": "nothing.parquet"}, "FileMissingError"),
        ({"--corpus": "rows.npy"}, "ModelError"),
        (
            {"--corpus": "rows.npy", "--queries": "queries.npy", "--outcomes": "perplexity:ngram"},
            "ParameterError",
        ),
        ({"--bandwidth": "0"}, "ParameterError"),
        ({"--kernel": "round"}, "ParameterError"),
        ({"--text": "nothing"}, "ColumnError"),
        ({"--dtype": "int7"}, "DtypeError"),
    ],
)
def test_study_refuses_before_it_writes(
    options: dict[str, str], kind: str, folder: Path, tmp_path: Path, refused: Refused
) -> None:
    given = {"--corpus": "texts.jsonl", "--queries": "texts.jsonl", "--outcomes": "outcomes.jsonl"} | options
    words: list[str | Path] = []
    for name, value in given.items():
        words += [
            name,
            folder / value if (folder / value).exists() or value.startswith("nothing.") else value,
        ]
    assert refused("study", *words, out=tmp_path / "study")["kind"] == kind


def test_study_does_not_replace_a_file(folder: Path, refused: Refused) -> None:
    texts = folder / "texts.jsonl"
    words = ["--corpus", texts, "--queries", texts, "--outcomes", folder / "outcomes.jsonl"]
    assert refused("study", *words, out=folder / "outcomes.jsonl")["kind"] == "OutputError"
