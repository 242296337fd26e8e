"""What a run was measured on, and its record as Markdown and JSON."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
from pathlib import Path
from typing import Any

from lmd3 import _lmd3

from .peer import PEERS

#: Settings that change what is measured; those of OpenBLAS were unset.
WATCHED = ("LMD3_SIMD", "OPENBLAS_", "OMP_", "MKL_", "KMP_", "GOMP_", "TORCHINDUCTOR_", "RUSTFLAGS")


def cpu_facts() -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def cpu() -> str:
    """Its name, with family and model, as names are general in virtual machines."""
    facts = cpu_facts()
    name = facts.get("model name", platform.machine())
    return f"{name} (family {facts.get('cpu family')}, model {facts.get('model')})"


def has(flag: str) -> bool:
    return flag in cpu_facts().get("flags", "").split()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "lmd3": _lmd3.__version__, "kernel": platform.release()}
    for name in ("numpy", "scipy", "scikit-learn", "torch", "faiss-cpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def percent(row: dict[str, Any], name: str) -> str:
    if (value := row.get(name)) is None:
        return "–"
    return f"{value:.2f} ×" if "factor" in name or "against" in name else f"{100 * value:.1f} %"


def bar(row: dict[str, Any]) -> str:
    if row.get("bar") is None:
        return "–"
    sign = "≥" if row.get("more_is_better", True) else "≤"
    limit = f"{row['bar']:g} ×" if "factor" in row or row["section"] == "peers" else f"{100 * row['bar']:g} %"
    return f"{sign} {limit}" + (f" {'met' if row['met'] else '**missed**'}" if "met" in row else "")


def markdown(record: dict[str, Any]) -> str:
    """The record for readers."""
    lines = [f"# The scan, {record['date']}", ""]
    if record["invalid"]:
        lines += ["**Invalid:** " + "; ".join(record["invalid"]) + ".", ""]
    load = " → ".join(f"{values[0]:.1f}" for values in record["load_average"])
    lines += [
        f"{record['cpu']}, {record['cores']} cores, level {record['level']}, "
        f"{record['threads']} threads, load average {load}.",
        f"{record['n']:,} rows × {record['d']}, exponential kernel, h = {record['bandwidth']}, "
        f"ess in every row (it is always on), "
        f"{record['repeats']} repeats with new queries.",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in record["versions"].items()) + ".",
        "Environment: OPENBLAS_* unset; "
        + (", ".join(f"{key}={value}" for key, value in record["environment"].items()) or "nothing else set")
        + ".",
        "",
    ]
    if record["peaks"]:
        top = record["peaks"]

        def range_(name: str, unit: str, digits: int = 0) -> str:
            values = [peaks[name] for peaks in top if peaks.get(name)]
            return f"{min(values):.{digits}f} – {max(values):.{digits}f} {unit}" if values else "not measured"

        lines += [
            f"Peaks of the run: float32 {range_('f32_gops', 'GOP/s')} "
            f"(implied clock {range_('clock_ghz', 'GHz', 2)}), "
            f"int16 {range_('int16_gops', 'GOP/s')}, int8 {range_('int8_gops', 'GOP/s')}; "
            f"read bandwidth {range_('read_gbps', 'GB/s', 1)}. "
            f"L1-resident kernel: {range_('l1_share', 'of the peak', 2)}. Shares are of the highest peak.",
            "",
        ]
    else:
        lines += [
            "No peaks: `lmd3.system.measure` is not there, so shares are empty.",
            "",
        ]
    lines += [
        "| path | Q | GOP/s best / median | GB/s | share or factor, best / median | bar | max error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        if "skipped" in row:
            lines.append(f"| {row['label']} | {row['q']} | not run: {row['skipped']} | | | | |")
            continue
        if "against_best_peer" in row:
            shown = f"{row['against_best_peer']:.2f} × the best float32 peer"
        else:
            kind = "factor" if "factor" in row else "share"
            shown = f"{percent(row, kind)} / {percent(row, 'median_' + kind)}"
        lines.append(
            f"| {row['label']} | {row['q']} | {row['gops']:.1f} / {row['median_gops']:.1f} | "
            f"{row['gbps']:.1f} | {shown} | {bar(row)} | {row['error']:.1e} |"
        )
    lines += [
        "",
        "Error: |Δ log density| / max(1, |log density|) against float64 over the rows as stored.",
        "",
    ]
    if record["groups"]:
        lines += [
            "| groups | runs of rows | with against without, best / median | bar |",
            "|---|---|---|---|",
        ]
        for row in record["groups"]:
            limit = "stated" if row["bar"] is None else f"≤ {row['bar']:g} ×"
            if row["bar"] is not None and not record["quick"]:
                limit += " met" if row["ratio"] <= row["bar"] else " **missed**"
            lines.append(
                f"| {row['groups']:,} | {row['run']:,} | "
                f"{row['ratio']:.2f} × / {row['median_ratio']:.2f} × | {limit} |"
            )
        lines.append("")
    if record["peers"] or any(name in PEERS for name in record["skipped"]):
        lines += [
            "| peer | GOP/s best / median | fastest setting | largest difference from ours |",
            "|---|---|---|---|",
        ]
        for name, label in PEERS.items():
            peer = record["peers"].get(name)
            if not peer or not peer["gops"]:
                lines.append(f"| {label} | not run: {record['skipped'].get(name, '–')} | | |")
                continue
            setting = ", ".join(f"{key} {value}" for key, value in peer["variant"].items())
            if peer["core_type"]:
                setting += f", OPENBLAS_CORETYPE={peer['core_type']}"
            if peer["extrapolated"]:
                setting += f"; on {peer['rows']:,} rows × {peer['queries']} queries, extrapolated"
            gops = peer["gops"]
            difference = "no sums" if name == "faiss_flat" else f"{peer['difference']:.1e}"
            lines.append(
                f"| {label} | {max(gops):.1f} / {statistics.median(gops):.1f} | {setting} | {difference} |"
            )
        lines.append("")
    return "\n".join(lines)


def write(folder: Path, record: dict[str, Any]) -> Path:
    """Both files under a name of their own; the path of the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{record['date'][:10]}-scan"
    number = 1
    while (path := folder / (f"{stem}.md" if number == 1 else f"{stem}-{number}.md")).exists():
        number += 1
    path.write_text(markdown(record))
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    return path
