"""The commands that repeat a study, and what of its texts was cut: from the files it left."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from lmd3.report.files import StudyFiles


def commands(parts: StudyFiles) -> list[str]:
    """Command lines, in order: as typed where that was recorded, else from the settings recorded."""
    whole = parts.steps.get("arguments")
    if whole:
        return [_line(whole)]
    out = []
    density = parts.run.get("density") or {}
    manifests = parts.manifests()
    for side, key in (("corpus", "store"), ("queries", "queries")):
        line = _encode(manifests.get(side), (density.get(key) or {}).get("path"), side)
        if line:
            out.append(line)
    out += [line for line in (_density(density),) if line]
    out.append(_analyze(parts))
    out.append(_line(["report", "analysis", "-o", "report.html"]))
    return out


def _line(arguments: Sequence[Any]) -> str:
    return shlex.join(["lmd3", *map(str, arguments)])


def _encode(manifest: Mapping[str, Any] | None, path: Any, side: str) -> str | None:
    """Only what was encoded by a command of its own; texts of queries are encoded by the density command."""
    source = (manifest or {}).get("source") or {}
    if not path or not source.get("files"):
        return None
    encoder = (manifest or {}).get("encoder") or {}
    arguments: list[Any] = ["encode", *source["files"], "-o", path]
    if side == "corpus" and encoder.get("model"):
        arguments += ["--model", encoder["model"]]
    columns = source.get("columns") or {}
    for name in ("text", "id", "group"):
        if columns.get(name) not in (None, "text" if name == "text" else None):
            arguments += [f"--{name}", columns[name]]
    if (manifest or {}).get("dtype") not in (None, "float16") and side == "corpus":
        arguments += ["--dtype", (manifest or {})["dtype"]]
    for name in ("prompt", "max_tokens"):
        if side == "corpus" and encoder.get(name) is not None:
            arguments += [f"--{name.replace('_', '-')}", encoder[name]]
    return _line(arguments)


def _density(run: Mapping[str, Any]) -> str | None:
    if run.get("arguments"):
        return _line(run["arguments"])
    store, queries = (run.get("store") or {}).get("path"), (run.get("queries") or {}).get("path")
    if not store or not queries:
        return None
    arguments: list[Any] = ["density", store, queries, "-o", "density"]
    kernels = list(dict.fromkeys(b.get("kernel") for b in run.get("bandwidths", [])))
    for kernel in kernels:
        if kernels != ["exponential"]:
            arguments += ["--kernel", kernel]
    for asked in dict.fromkeys(b.get("rule") or b.get("bandwidth") for b in run.get("bandwidths", [])):
        arguments += ["--bandwidth", asked]
    settings = run.get("settings") or {}
    if settings.get("neighbors") not in (None, 10):
        arguments += ["--neighbors", settings["neighbors"]]
    for name in ("by_group", "normalize", "exclude_self"):
        if settings.get(name):
            arguments.append(f"--{name.replace('_', '-')}")
    if settings.get("exclude_within"):
        arguments += ["--exclude-within", settings["exclude_within"]]
    if settings.get("seed"):
        arguments += ["--seed", settings["seed"]]
    return _line(arguments)


def _analyze(parts: StudyFiles) -> str:
    run, facts = parts.run, parts.facts
    if run.get("arguments"):
        return _line(run["arguments"])
    inputs = run.get("inputs") or {}
    arguments: list[Any] = ["analyze", inputs.get("density") or "density"]
    arguments += [inputs.get("outcomes") or "outcomes", "-o", "analysis"]
    if inputs.get("covariates"):
        arguments += ["--covariates", inputs["covariates"]]
    arguments += ["--outcome", str(facts["outcome"]).removeprefix("change of ")]
    predictor = str(run.get("predictor") or "log_density").removesuffix("_less_reference")
    if predictor not in ("log_density", "change_of_log_density"):
        arguments += ["--predictor", predictor]
    named = (("reference", "reference"), ("contrast", "contrast"), ("before", "before"))
    for option, given in (*named, ("density-before", "density_before")):
        if inputs.get(given):
            arguments += [f"--{option}", inputs[given]]
    for name in ("cluster", "within"):
        if run.get(name):
            arguments += [f"--{name}", run[name]]
    if run.get("seed"):
        arguments += ["--seed", run["seed"]]
    return _line(arguments)


def versions(parts: StudyFiles) -> list[tuple[str, str]]:
    """Versions and machine, as (name, value)."""
    density = parts.run.get("density") or {}
    rows = [(name, str(version)) for name, version in (parts.run.get("versions") or {}).items()]
    if density.get("version"):
        rows.append(("lmd3 of the density", str(density["version"])))
    for key, name in (("simd", "SIMD level"), ("precision", "precision"), ("method", "method")):
        if density.get(key):
            rows.append((name, str(density[key])))
    rows += [
        (f"fingerprint of the {side}", str(density[side]["fingerprint"]))
        for side in ("store", "queries")
        if (density.get(side) or {}).get("fingerprint")
    ]
    if parts.run.get("created"):
        rows.append(("made", str(parts.run["created"])))
    return rows


def truncation(parts: StudyFiles) -> list[dict[str, Any]]:
    """How many texts of each side were cut, left out empty, or read in parts, as their stores say."""
    rows = []
    for side, manifest in parts.manifests().items():
        counts, source = manifest.get("counts") or {}, manifest.get("source") or {}
        if "truncated" not in counts:
            continue
        rows.append(
            {
                "what": {"corpus": "training texts", "queries": "queries"}[side],
                "texts": source.get("texts") or counts.get("rows"),
                "rows": counts.get("rows"),
                "tokens": counts.get("tokens"),
                "truncated": counts["truncated"],
                "left_out": counts.get("tokens_left_out") or 0,
                "empty": source.get("empty") or 0,
                **_groups_cut(manifest.get("groups") or []),
            }
        )
    return rows


#: Groups of a side that are shown, those that lost most first.
_GROUPS = 12


def _groups_cut(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The groups of a side whose texts were cut, and how many of them are not shown."""
    cut = [group for group in groups if isinstance(group.get("truncated"), int) and group["truncated"]]
    cut.sort(key=lambda group: (-(group.get("tokens_left_out") or 0) / _tokens(group), -group["truncated"]))
    rows = [
        {
            "name": group["name"],
            "rows": group["rows"],
            "truncated": group["truncated"],
            "left_out": group.get("tokens_left_out") or 0,
            "lost": (group.get("tokens_left_out") or 0) / _tokens(group),
        }
        for group in cut[:_GROUPS]
    ]
    return {"groups": rows, "more": max(len(cut) - _GROUPS, 0), "uncut": len(groups) - len(cut)}


def _tokens(group: Mapping[str, Any]) -> int:
    """Tokens of a group's texts, with those that no vector saw."""
    return max((group.get("tokens") or 0) + (group.get("tokens_left_out") or 0), 1)
