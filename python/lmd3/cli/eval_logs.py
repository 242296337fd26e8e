"""`lmd3 eval-logs`: outcomes from the logs of evaluation harnesses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmd3.cli import _common


def eval_logs(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="samples_*.jsonl of lm-evaluation-harness, details_*.parquet of lighteval, *.eval or "
            "*.json of inspect, or folders of such.",
        ),
    ],
    out: _common.OutOption,
    metric: Annotated[
        str | None, typer.Option("--metric", metavar="M", help="One metric only [default: all].")
    ] = None,
    filter: Annotated[
        str | None,
        typer.Option("--filter", metavar="F", help="Answers taken by this filter only (strict-match, …)."),
    ] = None,
    repeats: Annotated[
        str,
        typer.Option(
            "--repeats", help="Of differing values of one document: refuse, take the last, or the mean."
        ),
    ] = "refuse",
    text: Annotated[
        str | None,
        typer.Option(
            "--text", metavar="FIELD", help="Carry this field of the document as its text (question)."
        ),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(
            "--group", metavar="FIELD", help="Group by this field of the document [default: the task]."
        ),
    ] = None,
    queries: Annotated[
        Path | None,
        typer.Option(
            "--queries", metavar="FILE", help="Write the documents too (id, text, group) as .jsonl."
        ),
    ] = None,
    force: _common.ForceOption = False,
) -> None:
    """Outcomes of every document from an evaluation harness's logs.

    Writes an outcomes table (id, outcome, value, …) as .parquet, .csv or .jsonl, an outcome per metric, and
    from log-probabilities gold_log_probability and margin. Ids are doc_id for one task, task/doc_id for
    several. Metrics that have several filters are named metric,filter. Epochs of inspect are averaged, with
    the number of trials.

    \b
    Examples:
      lmd3 eval-logs results/model/samples_gsm8k_*.jsonl --filter strict-match -o gsm8k.parquet
      lmd3 eval-logs results/model -o mmlu.parquet --text question --queries mmlu.jsonl
      lmd3 eval-logs logs/2025-01-01_arc.eval --metric choice -o arc.csv
    """
    import json

    from lmd3.cli import _write
    from lmd3.errors import OutputError, ParameterError
    from lmd3.performance.eval_logs import from_eval_logs

    _write.prepare_table(out, force)
    if queries is not None:
        if text is None:
            raise ParameterError("--queries needs --text: the field that is the documents' text")
        if queries.suffix != ".jsonl":
            raise OutputError("the name says no format", file=str(queries), remedy="end it in .jsonl")
        _common.prepare_output(queries, force)
    table = from_eval_logs(files, metric=metric, filter=filter, repeats=repeats, text=text, group=group)
    facts = _write.facts(table)
    run = {
        "command": "eval-logs",
        "files": [str(path) for path in files],
        "metric": metric,
        "filter": filter,
        "repeats": repeats,
        "text": text,
        "group": group,
        **facts,
        "versions": _write.versions(),
    }
    _write.write_table(out, table, run)
    if queries is not None:
        seen: dict[str, dict[str, str | None]] = {}
        for row in table.select(["id", "text", "group"]).to_pylist():
            seen.setdefault(row["id"], row)
        temporary = queries.with_name(f".{queries.name}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in seen.values())
        temporary.replace(queries)
    for notice in facts["notices"]:
        _common.notice(notice)
    for name, why in facts["skipped_metrics"].items():
        _common.notice(f"Metric {name} was left out: {why}.")
    if len(facts["outcomes"]) > 1:
        _common.notice(f"Outcomes: {', '.join(facts['outcomes'])}. Name one to `lmd3 analyze --outcome`.")
    _common.emit(
        {
            "out": out,
            "harness": facts["harness"],
            "documents": facts["documents"],
            "tasks": len(facts["tasks"]),
            "outcomes": facts["outcomes"],
            "unscored": facts["unscored"],
        }
    )
