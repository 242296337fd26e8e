"""Logs of evaluation harnesses: what they say, and where they mislead."""

from __future__ import annotations

import gzip
import json
import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lmd3
from lmd3 import errors
from lmd3.cli import main
from lmd3.performance import from_eval_logs, from_inspect, from_lighteval, from_lm_eval
from lmd3.performance.eval_logs import harness_of

TIME = "2025-03-01T10-20-30.123456"


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def generated(doc: int, filter: str, score: float, **more: Any) -> dict[str, Any]:
    return {
        "doc_id": doc,
        "doc": {"question": f"What is {doc}?", "subject": "sums"},
        "target": "42",
        "arguments": {"gen_args_0": {"arg_0": "few shots", "arg_1": {"until": ["\n"]}}},
        "resps": [["it is 42"]],
        "filtered_resps": ["42"],
        "filter": filter,
        "metrics": ["exact_match"],
        "doc_hash": f"hash{doc}",
        "exact_match": score,
        **more,
    }


def choice(
    doc: int, logs: list[Any], target: Any, acc: float, texts: list[str], **more: Any
) -> dict[str, Any]:
    return {
        "doc_id": doc,
        "doc": {"query": "q"},
        "target": str(target),
        "arguments": {f"gen_args_{i}": {"arg_0": "q", "arg_1": f" {t}"} for i, t in enumerate(texts)},
        "resps": [[[str(x), "False"]] for x in logs],
        "filtered_resps": [[str(x), "False"] for x in logs],
        "filter": "none",
        "metrics": ["acc", "acc_norm"],
        "doc_hash": f"hash{doc}",
        "acc": acc,
        "acc_norm": acc,
        **more,
    }


def rows_of(table: pa.Table, outcome: str) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in table.to_pylist() if row["outcome"] == outcome}


def facts(table: pa.Table) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(table.schema.metadata[b"lmd3"])
    return found


# --- lm-evaluation-harness ---


def test_two_filters_are_two_outcomes_and_ranks_are_put_in_order(tmp_path: Path) -> None:
    lines = [
        generated(doc, name, score)
        for doc, strict, loose in ((10, 0, 1), (2, 1, 1), (0, 0, 0))
        for name, score in (("strict-match", strict), ("flexible-extract", loose))
    ]
    path = write(tmp_path / f"samples_gsm8k_{TIME}.jsonl", lines)
    table = from_lm_eval(path)
    assert set(table["outcome"].to_pylist()) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    strict = from_lm_eval(path, filter="strict-match")
    assert strict["outcome"].to_pylist() == ["exact_match"] * 3
    assert strict["id"].to_pylist() == ["0", "2", "10"]
    assert strict["value"].to_pylist() == [0, 1, 0]
    assert set(strict["kind"].to_pylist()) == {"binary"} and strict["trials"].null_count == 3
    assert facts(strict)["tasks"] == ["gsm8k"]
    named = from_lm_eval(path, metric="exact_match,flexible-extract")
    assert named["value"].to_pylist() == [0, 1, 1]
    with pytest.raises(errors.ParameterError, match="strict-match"):
        from_lm_eval(path, filter="none")
    with pytest.raises(errors.ParameterError, match="exact_match,strict-match"):
        from_lm_eval(path, metric="acc")


def test_several_tasks_and_a_folder(tmp_path: Path) -> None:
    for task in ("mmlu_law", "mmlu_art"):
        write(tmp_path / f"samples_{task}_{TIME}.jsonl", [generated(0, "none", 1), generated(1, "none", 0)])
    table = from_lm_eval(tmp_path)
    assert table["id"].to_pylist() == ["mmlu_art/0", "mmlu_art/1", "mmlu_law/0", "mmlu_law/1"]
    assert table["group"].to_pylist() == ["mmlu_art"] * 2 + ["mmlu_law"] * 2
    assert from_lm_eval(str(tmp_path / "samples_mmlu_law*.jsonl"))["id"].to_pylist() == ["0", "1"]


def test_log_probability_of_the_right_answer_and_its_margin(tmp_path: Path) -> None:
    texts = ["red", "deep blue", "green"]
    lines = [
        choice(0, [-3.5, -1.25, "-4"], 1, 1.0, texts),
        choice(1, ["-2", "-2.5", "-9"], 2, 0.0, texts),
    ]
    table = from_lm_eval(write(tmp_path / f"samples_colours_{TIME}.jsonl", lines))
    gold, margin = rows_of(table, "gold_log_probability"), rows_of(table, "margin")
    assert [gold[i]["value"] for i in "01"] == [-1.25, -9.0]
    assert [margin[i]["value"] for i in "01"] == [2.25, -7.0]
    assert gold["0"]["bytes"] == len(" deep blue") and gold["0"]["kind"] == "continuous"
    assert [r["value"] for r in rows_of(table, "acc").values()] == [1, 0]


def test_the_right_answer_by_its_text_where_only_that_agrees_with_acc(tmp_path: Path) -> None:
    # Choices that are numbers: "2" as an index would be the third one, by its text it is the first.
    texts = ["2", "0", "1"]
    lines = [choice(0, [-1, -2, -3], "2", 1.0, texts), choice(1, [-3, -1, -2], "1", 0.0, texts)]
    table = from_lm_eval(write(tmp_path / f"samples_sums_{TIME}.jsonl", lines))
    assert [r["value"] for r in rows_of(table, "gold_log_probability").values()] == [-1, -2]
    # Nothing agrees: no guess is made, and it is said.
    lines[1]["acc"] = 1.0
    table = from_lm_eval(write(tmp_path / f"samples_sums_{TIME}.jsonl", lines))
    assert "gold_log_probability" not in table["outcome"].to_pylist()
    assert "can't be told" in " ".join(facts(table)["notices"])


def test_perplexity_that_is_a_log_likelihood_is_not_called_so(tmp_path: Path) -> None:
    lines = [
        choice(i, [logs], "word", 1.0, ["word"], metrics=["acc", "perplexity"], perplexity=logs)
        for i, logs in enumerate((-2.5, -0.5))
    ]
    table = from_lm_eval(write(tmp_path / f"samples_lambada_openai_{TIME}.jsonl", lines))
    assert set(table["outcome"].to_pylist()) == {"acc", "gold_log_probability"}
    assert [r["value"] for r in rows_of(table, "gold_log_probability").values()] == [-2.5, -0.5]
    assert "raw log-likelihood" in facts(table)["notices"][0]


def test_pairs_of_log_likelihood_and_count(tmp_path: Path) -> None:
    line = {
        "doc_id": 0,
        "doc": {},
        "target": "",
        "arguments": {},
        "resps": [["-69.5"]],
        "filtered_resps": ["-69.5"],
        "filter": "none",
        "metrics": ["word_perplexity", "byte_perplexity", "bits_per_byte", "f1"],
        "word_perplexity": [-69.5, 20],
        "byte_perplexity": ["-69.5", 100],
        "bits_per_byte": [-69.5, 100],
        "f1": [1, 0],
    }
    table = from_lm_eval(write(tmp_path / f"samples_wikitext_{TIME}.jsonl", [line]))
    values = {row["outcome"]: row for row in table.to_pylist()}
    assert values["nats_per_word"]["value"] == pytest.approx(3.475)
    assert values["nats_per_byte"]["value"] == pytest.approx(0.695)
    assert values["bits_per_byte"]["value"] == pytest.approx(0.695 / math.log(2))
    assert values["nats_per_byte"]["bytes"] == 100
    assert set(facts(table)["skipped_metrics"]) == {"f1"}


def test_old_files_are_indented_arrays_without_filter_metrics_and_hashes(tmp_path: Path) -> None:
    def old(doc: int, acc: float) -> dict[str, Any]:
        line = choice(doc, [-1, -2], 0, acc, ["a", "b"])
        line["arguments"] = [["q", " a"], ["q", " b"]]
        line["filtered_resps"] = [[-1.0, False], [-2.0, True]]
        for name in ("filter", "metrics", "doc_hash"):
            del line[name]
        return line

    path = tmp_path / "pretrained__x_arc_easy.jsonl"
    # Appended to: two arrays in one file.
    path.write_text(json.dumps([old(0, 1.0)], indent=2) + json.dumps([old(1, 1.0)], indent=2))
    assert harness_of(path) == "lm-evaluation-harness"
    table = from_eval_logs(path)
    assert set(table["outcome"].to_pylist()) == {"acc", "acc_norm", "gold_log_probability", "margin"}
    assert rows_of(table, "margin")["1"]["value"] == 1.0
    assert rows_of(table, "acc")["0"]["value"] == 1.0


def test_files_that_were_appended_to(tmp_path: Path) -> None:
    path = write(tmp_path / f"samples_t_{TIME}.jsonl", [generated(0, "none", 1), generated(0, "none", 1)])
    table = from_eval_logs(path)
    assert table.num_rows == 1 and facts(table)["repeated_lines"] == 1
    write(path, [generated(0, "none", 1), generated(1, "none", 0), generated(0, "none", 0)])
    with pytest.raises(errors.DuplicateIdError, match="two values of exact_match") as refused:
        from_eval_logs(path)
    assert refused.value.row == 2
    assert rows_of(from_eval_logs(path, repeats="last"), "exact_match")["0"]["value"] == 0
    mean = rows_of(from_eval_logs(path, repeats="mean"), "exact_match")
    assert (mean["0"]["value"], mean["0"]["trials"], mean["1"]["trials"]) == (0.5, 2, 1)
    assert mean["0"]["kind"] == "binary"
    with pytest.raises(errors.ParameterError, match="repeats"):
        from_eval_logs(path, repeats="first")


def test_one_id_is_one_document(tmp_path: Path) -> None:
    path = write(
        tmp_path / f"samples_t_{TIME}.jsonl",
        [generated(0, "a", 1), generated(0, "b", 1, doc_hash="other")],
    )
    with pytest.raises(errors.DuplicateIdError, match="another document"):
        from_eval_logs(path)
    write(path, [generated(0, "a", 1), generated(1, "a", 1, doc_hash="hash0")])
    assert "copy of another" in facts(from_eval_logs(path))["notices"][0]


def test_compressed_broken_and_foreign_files(tmp_path: Path) -> None:
    text = json.dumps(generated(0, "none", 1)) + "\n"
    packed = tmp_path / f"samples_t_{TIME}.jsonl.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    assert from_eval_logs(packed).num_rows == 1 and facts(from_eval_logs(packed))["tasks"] == ["t"]
    cut = tmp_path / f"samples_t_{TIME}.jsonl"
    cut.write_text(text + text[:40])
    with pytest.raises(errors.TextFormatError) as broken:
        from_eval_logs(cut)
    assert broken.value.row == 1
    other = tmp_path / f"results_{TIME}.json"
    other.write_text('{"results": {}}')
    with pytest.raises(errors.FormatError, match="give the samples"):
        from_eval_logs(other)
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.FileMissingError):
        from_eval_logs(tmp_path / "empty")
    table = tmp_path / "plain.csv"
    table.write_text("id,value\n1,2\n")
    assert harness_of(table) is None


# --- lighteval ---


def test_lighteval_new_and_old(tmp_path: Path) -> None:
    new = tmp_path / f"details_lighteval|arc|0_{TIME}.parquet"
    docs = [
        {"query": f"q{i}", "choices": ["a", "bc"], "gold_index": i, "id": str(7 - i), "task_name": "arc"}
        for i in range(2)
    ]
    columns = {
        "doc": docs,
        "metric": [{"acc": 1, "em": None}, {"acc": 0, "em": None}],
        "model_response": [{"logprobs": [-1.0, -3.0]}, {"logprobs": [-1.5, -4.0]}],
    }
    pq.write_table(pa.table(columns), new)
    table = from_lighteval(new)
    assert [rows_of(table, "acc")[i]["value"] for i in ("7", "6")] == [1, 0]
    assert [rows_of(table, "gold_log_probability")[i]["value"] for i in ("7", "6")] == [-1.0, -4.0]
    assert rows_of(table, "margin")["6"]["value"] == -2.5 and rows_of(table, "margin")["6"]["bytes"] == 2
    pq.write_table(pa.table({f"__{name}__": values for name, values in columns.items()}), new)
    assert from_lighteval(new).equals(table)
    old = tmp_path / f"details_harness|arc|25_{TIME}.parquet"
    columns = {
        "example": ["q0", "q1"],
        "metrics": [{"acc": 1.0}, {"acc": 0.0}],
        "predictions": ["[[-1.0, False], [-3.0, True]]", "[[-1.5, False], [-4.0, True]]"],
        "choices": [["a", "bc"]] * 2,
        "gold_index": [[0], [1]],
    }
    pq.write_table(pa.table(columns), old)
    table = from_eval_logs(old)
    assert table["id"].to_pylist()[:2] == ["0", "1"]
    assert [r["value"] for r in rows_of(table, "gold_log_probability").values()] == [-1.0, -4.0]
    assert "row numbers" in facts(table)["notices"][0]


# --- inspect ---


def sample(id: Any, epoch: int, value: Any) -> dict[str, Any]:
    scores = None if value is None else {"match": {"value": value, "answer": "x"}}
    return {
        "id": id,
        "epoch": epoch,
        "input": f"in {id}",
        "target": "t",
        "scores": scores,
        "metadata": {"k": "v"},
    }


SAMPLES = [
    sample("a", 1, "C"), sample("a", 2, "I"), sample("b", 1, "C"), sample("b", 2, float("nan")),
    sample("c", 1, None), sample("c", 2, None),
]  # fmt: skip


def archive(path: Path, header: str = "header.json") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(header, json.dumps({"version": 2, "eval": {"task": "suite/arith"}}))
        for s in SAMPLES:
            file.writestr(f"samples/{s['id']}_epoch_{s['epoch']}.json", json.dumps(s))
    return path


@pytest.mark.parametrize("kind", ["eval", "cut", "json", "csv"])
def test_inspect_epochs_are_trials_and_nan_is_unscored(tmp_path: Path, kind: str) -> None:
    if kind in ("eval", "cut"):
        path = archive(tmp_path / "l.eval", "header.json" if kind == "eval" else "_journal/start.json")
    elif kind == "json":
        path = tmp_path / "l.json"
        log = {"version": 2, "eval": {"task": "arith"}, "samples": SAMPLES}
        path.write_text(json.dumps(log, indent=2))
    else:
        path = tmp_path / "l.csv"
        frame = pd.DataFrame(
            {
                "id": [s["id"] for s in SAMPLES],
                "epoch": [s["epoch"] for s in SAMPLES],
                "score_match": ["C", "I", "C", None, None, None],
                "task_name": "arith",
            }
        )
        frame.to_csv(path, index=False)
    table = from_inspect(path)
    rows = rows_of(table, "match")
    assert (rows["a"]["value"], rows["a"]["trials"]) == (0.5, 2)
    assert (rows["b"]["value"], rows["b"]["trials"]) == (1.0, 1)
    assert rows["c"]["value"] is None
    assert {row["kind"] for row in rows.values()} == {"binary"}
    assert facts(table)["unscored"] == 1 and facts(table)["tasks"] == ["arith"]
    # What is read stays readable as a table of outcomes: a share of trials is still binary.
    again = lmd3.read_outcomes(table)
    assert again["value"].to_pylist() == table["value"].to_pylist()
    with pytest.raises(errors.ColumnError, match="said to be binary"):
        lmd3.read_outcomes(table.set_column(4, "trials", pa.array([3, 1, 1])))


def test_inspect_zstandard_members_and_scorers_of_several_values(tmp_path: Path) -> None:
    plain = {"eval": {"task": "t"}, "version": 2}
    body = json.dumps(sample("a", 1, {"x": 1, "y": "I", "why": "text"})).encode()
    packed = pa.Codec("zstd").compress(body, asbytes=True)
    path = tmp_path / "z.eval"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("header.json", json.dumps(plain))
        file.writestr("samples/a_epoch_1.json", packed)
    # The member is marked as Zstandard (method 93) of the text's own size and checksum.
    data = bytearray(path.read_bytes())
    crc = struct.pack("<I", zlib.crc32(body))
    for signature, method, check in ((b"PK\x03\x04", 8, 14), (b"PK\x01\x02", 10, 16)):
        at = data.find(b"samples/")
        while at >= 0:
            start = data.rfind(signature, 0, at)
            if start >= 0 and at - start in (30, 46):
                data[start + method : start + method + 2] = struct.pack("<H", 93)
                data[start + check : start + check + 4] = crc
                data[start + check + 8 : start + check + 12] = struct.pack("<I", len(body))
            at = data.find(b"samples/", at + 1)
    path.write_bytes(data)
    table = from_inspect(path)
    assert {row["outcome"]: row["value"] for row in table.to_pylist()} == {"match/x": 1.0, "match/y": 0.0}
    assert facts(table)["skipped_metrics"].keys() == {"match/why"}
    path.write_bytes(data[:-30])
    with pytest.raises(errors.FormatError, match="damaged"):
        from_inspect(path)


# --- the commands ---


def test_command_writes_outcomes_and_queries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write(
        tmp_path / f"samples_gsm8k_{TIME}.jsonl",
        [generated(d, f, d % 2) for d in range(6) for f in ("strict-match", "flexible-extract")],
    )
    out, queries = tmp_path / "o.csv", tmp_path / "q.jsonl"
    line = ["eval-logs", str(log), "-o", str(out), "--filter", "strict-match", "--text", "question"]
    line += ["--group", "subject", "--queries", str(queries), "--json"]
    assert main(line) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["documents"] == 6 and answer["outcomes"] == ["exact_match"]
    found = [json.loads(row) for row in queries.read_text().splitlines()]
    assert found[3] == {"id": "3", "text": "What is 3?", "group": "sums"}
    assert lmd3.read_outcomes(out)["value"].to_pylist() == [0, 1, 0, 1, 0, 1]
    assert main([*line, "--force", "--text", "nothing"]) == 2
    assert "question" in json.loads(capsys.readouterr().out)["error"]["remedy"]


def test_study_takes_a_log_for_its_outcomes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "while",
        "seven",
        "wizards",
        "brew",
        "strange",
        "potions",
        "at",
        "dawn",
    ]
    corpus = [
        {"text": " ".join(words[(i * 7 + j * (1 + i % 5)) % len(words)] for j in range(9))}
        for i in range(120)
    ]
    asked = [
        {"text": " ".join(words[(i * 5 + j * (1 + i % 3)) % len(words)] for j in range(7))} for i in range(60)
    ]
    write(tmp_path / "c.jsonl", corpus)
    write(tmp_path / "q.jsonl", asked)
    write(
        tmp_path / f"samples_t_{TIME}.jsonl",
        [generated(i, f, (i * 7 + k) % 3 == 0) for i in range(60) for k, f in enumerate(("a", "b"))],
    )
    line = [
        "study",
        "--corpus",
        str(tmp_path / "c.jsonl"),
        "--queries",
        str(tmp_path / "q.jsonl"),
        "--outcomes",
    ]
    line += [str(tmp_path / "samples_t_*.jsonl"), "-o", str(tmp_path / "s"), "--bandwidth", "0.5", "--json"]
    assert main(line) == 2
    assert "name one of 'exact_match,a'" in json.loads(capsys.readouterr().out)["error"]["remedy"]
    assert not (tmp_path / "s").exists()
    assert main([*line, "--outcome", "exact_match,a"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"]["primary"]["n"] == 60
