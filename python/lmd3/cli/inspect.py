"""`lmd3 inspect`: what a store, bare vectors or texts hold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lmd3.cli._common import emit, existing

if TYPE_CHECKING:
    from lmd3.store import Store

#: Rows at either end of a store by which the drift of an idf is judged.
DRIFT_ROWS = 4096

#: Mean rows of a piece below which a copy in one piece is advised.
SMALL_PIECE = 1 << 15

#: Mean rows of a run of one group below which sorting by group is advised.
SHORT_RUN = 64


def inspect(
    store: str = typer.Argument(metavar="STORE", help="A store, or bare vectors (.npy, .fbin, a folder, …)."),
    rows: int = typer.Option(3, "--rows", min=0, help="First rows to show."),
) -> None:
    """Says what a store holds: size, element type, encoder, groups, counts, first rows.

    \b
    Examples:
      lmd3 inspect corpus.lmd3
      lmd3 inspect vectors.npy --json
    """
    import lmd3

    path = existing(store)
    facts = facts_of(lmd3.open_store(path), path, rows)
    emit(facts, text=_page(facts))


def facts_of(opened: Store, path: Path, rows: int) -> dict[str, Any]:
    """What is said of a store; `rows`: how many of its first rows are shown."""
    import numpy as np

    manifest = opened.manifest
    shown = opened.documents(np.arange(min(rows, opened.n)), ("id", "group", "text")).to_pylist()
    runs = opened.group_runs()
    return {
        "path": str(path),
        "kind": f"store, version {manifest['version']}" if manifest else "bare vectors",
        "rows": opened.n,
        "dimensions": opened.d,
        "dtype": opened.dtype,
        "bytes": _size(path),
        "shards": 1 if opened.native is None else len(opened.native.shards),
        "opened": opened.opened,
        "normalised": opened.normalised,
        "ids": "given" if opened.given_ids else "rows",
        "texts": opened.has_texts,
        "fingerprint": opened.fingerprint,
        "created_by": manifest.get("created_by"),
        "counts": manifest.get("counts"),
        "source": manifest.get("source"),
        "encoder": opened.encoder,
        "chunking": manifest.get("chunking"),
        "sampling": manifest.get("sampling"),
        "idf_drift": _drift(opened),
        "groups": manifest.get("groups", []) or _group_rows(opened),
        "rounding": opened.rounding,
        "exact": manifest.get("exact"),
        "weights": opened.weights_kept,
        "group_run": opened.n / runs if len(opened.groups) > 1 else None,
        "advice": _advice(opened.n, len(opened.groups), runs) + _chunks(opened),
        "first_rows": shown,
    }


def _advice(rows: int, groups: int, runs: int) -> list[str]:
    """What would make scans faster."""
    # Sorting makes one run of each group: it pays where that is longer.
    if groups > 1 and rows / runs < SHORT_RUN and runs >= 2 * groups:
        return [
            f"groups lie in runs of {rows / runs:.1f} rows: densities by group are faster after "
            "lmd3 convert STORE -o SORTED --sort-by group"
        ]
    return []


def _drift(store: Store) -> dict[str, Any] | None:
    """How much of the first and the last rows the frozen idf of the built-in encoder does not know."""
    import numpy as np

    encoder = store.encoder or {}
    if encoder.get("kind") != "hashing" or not store.has_texts:
        return None
    from lmd3.encoders.run import encoder_from_store
    from lmd3.errors import Lmd3Error

    try:
        state: Any = encoder_from_store(store)
    except Lmd3Error:
        return None
    shares = []
    for start in (0, max(0, store.n - DRIFT_ROWS)):
        rows = np.arange(start, min(start + DRIFT_ROWS, store.n))
        texts = store.documents(rows, ("text",))["text"]
        if texts.null_count:  # promised by the manifest, and not there
            return None
        found, unknown = state.unknown(texts.to_pylist())
        shares.append(unknown / max(found, 1))
    return {"unknown_first": shares[0], "unknown_last": shares[1], "drift": shares[1] - shares[0]}


def _group_rows(store: Store) -> list[dict[str, Any]]:
    """Names and rows of the groups that bare vectors came with."""
    import numpy as np

    codes = store.group_codes()
    if codes is None:
        return []
    counts = np.bincount(codes, minlength=len(store.groups)).tolist()
    return [{"name": name, "rows": rows} for name, rows in zip(store.groups, counts, strict=True)]


def _chunks(store: Store) -> list[str]:
    """What is said of vectors in many small pieces."""
    pieces = 1 if store.native is None else len(store.native.shards)
    if pieces > 16 and store.n / pieces < SMALL_PIECE:
        return [
            f"the vectors lie in {pieces:,} pieces of {store.n / pieces:,.0f} rows: scans are faster after "
            "lmd3 import VECTORS -o STORE"
        ]
    return []


def _ids(facts: dict[str, Any]) -> str:
    if facts["ids"] != "given":
        return "row numbers"
    columns = (facts["source"] or {}).get("columns")
    if columns is None:
        return "given"
    return "row numbers of the input" if columns["id"] is None else f"the column {columns['id']!r}"


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _page(facts: dict[str, Any]) -> str:
    """The facts for people."""
    lines = [f"{facts['path']}: {facts['kind']}", ""]

    def line(name: str, value: Any) -> None:
        lines.append(f"  {name:<12}{value}")

    line(
        "vectors",
        f"{facts['rows']:,} × {facts['dimensions']}, {facts['dtype']}, in {facts['shards']} shard(s)",
    )
    line("on disk", f"{facts['bytes'] / 1e6:,.1f} MB; opened as {facts['opened']}")
    line("norms", "1" if facts["normalised"] else "any")
    line("rounding", f"{facts['rounding']:.2g} of a row's norm")
    if exact := facts["exact"]:
        line("exact copy", f"{exact['dtype']}, to rank neighbours again; rounding {exact['rounding']:.2g}")
    line("ids", _ids(facts))
    line("texts", "kept" if facts["texts"] else "not kept")
    if facts["weights"]:
        line("weights", "one per row")
    encoder = facts["encoder"]
    if encoder is None:
        line("encoder", "not known")
    else:
        name, kind, mark = (encoder.get(key) for key in ("model", "kind", "fingerprint"))
        line("encoder", f"{name} ({kind}), fingerprint {mark}")
        known = ("kind", "model", "fingerprint", "state_file", "dim")
        for name, value in encoder.items():
            if name not in known and value not in (None, ""):
                line("", f"{name.replace('_', ' ')}: {value}")
    counts, source = facts["counts"] or {}, facts["source"] or {}
    if counts:
        truncated = counts.get("truncated", 0)
        line(
            "tokens",
            f"{counts.get('tokens', 0):,}; {truncated:,} texts truncated ({truncated / facts['rows']:.1%})"
            + (f", {lost:,} tokens left out" if (lost := counts.get("tokens_left_out")) else ""),
        )
    if (cut := facts["chunking"]) and cut["mode"] != "truncate":
        size = "what the model reads" if cut["tokens"] is None else f"{cut['tokens']} tokens"
        line("chunks", f"{cut['mode']}, {size}, {cut['overlap']} shared")
    if drawn := facts["sampling"]:
        by = " by group" if drawn["by"] else ""
        line(
            "sample",
            f"{drawn['sampled']:,} of {drawn['texts']:,} texts{by}, asked for {drawn['rate']:g}, "
            f"seed {drawn['seed']}",
        )
    if drift := facts["idf_drift"]:
        line(
            "idf",
            f"{drift['unknown_first']:.1%} of words and pairs unknown to it in the first rows, "
            f"{drift['unknown_last']:.1%} in the last",
        )
    if source.get("empty") is not None:
        line("left out", f"{source['empty']:,} empty texts")
    line("fingerprint", facts["fingerprint"])
    if facts["groups"]:
        lines += ["", f"  {len(facts['groups'])} groups"]
        biggest = sorted(facts["groups"], key=lambda group: -group["rows"])
        for group in biggest[:20]:
            cut = f"  ({group['truncated']:,} truncated)" if group.get("truncated") else ""
            lines.append(
                f"    {group['rows']:>12,}  {group['rows'] / facts['rows']:>6.1%}  {group['name']}{cut}"
            )
        if len(biggest) > 20:
            lines.append(f"    … and {len(biggest) - 20} more (--json has all)")
    for advice in facts["advice"]:
        lines += ["", f"  {advice}"]
    if facts["first_rows"]:
        lines += ["", "  first rows"]
        for row in facts["first_rows"]:
            text = " ".join((row["text"] or "").split())
            lines.append(f"    {row['id']}  {text[:80] + '…' if len(text) > 80 else text}".rstrip())
    return "\n".join(lines)
