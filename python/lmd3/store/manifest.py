"""The facts of a manifest that Python reads, checked: a store may come from anyone.

The native part has checked width, rows, element type, shards and file names by then.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmd3.errors import FormatError
from lmd3.store.layout import EXACT_DTYPES

_KINDS: dict[str, type] = {
    "encoder": dict,
    "counts": dict,
    "source": dict,
    "files": list,
    "chunking": dict,
    "sampling": dict,
    "exact": dict,
    "appended": list,
    "ids": str,
    "texts": bool,
    "weights": bool,
    "created_by": str,
    "metric": str,
}


def check_manifest(manifest: Mapping[str, Any], file: Path) -> None:
    """Refuses entries of another kind than stores have.

    Raises:
        FormatError: names the entry.
    """

    def refuse(name: str) -> FormatError:
        return FormatError(f"damaged manifest: {name!r} is not what it should be", file=str(file))

    for name, kind in _KINDS.items():
        if not isinstance(manifest.get(name), kind | None):
            raise refuse(name)
    rounding = manifest.get("rounding", 0.0)
    if not _is_share(rounding):
        raise FormatError("damaged manifest: 'rounding' is no share of a norm", file=str(file))
    for name in ("files", "appended"):
        listed = manifest.get(name, [])
        if listed is None or not all(isinstance(entry, dict) for entry in listed):
            raise refuse(name)
    files = [*(manifest.get("files") or ())]
    files += [shard["exact"] for shard in manifest["shards"] if shard.get("exact") is not None]
    if not all(_is_file(entry) for entry in files):
        raise refuse("files")
    if not all(_is_count(value) for value in (manifest.get("counts") or {}).values()):
        raise refuse("counts")
    for group in manifest.get("groups") or ():
        if not all(_is_count(value) for name, value in group.items() if name != "name"):
            raise refuse("groups")
    # What one shard has beside its rows, all have.
    for name in ("weights", "documents", "exact"):
        if len({shard.get(name) is None for shard in manifest["shards"]}) > 1:
            raise FormatError(f"damaged manifest: some shards have {name!r}, others not", file=str(file))
    if (exact := manifest.get("exact")) is not None and not (
        exact.get("dtype") in EXACT_DTYPES and _is_share(exact.get("rounding")) and exact["rounding"] < 1
    ):
        raise refuse("exact")
    if (sampling := manifest.get("sampling")) is not None:
        if not _is_sampling(sampling):
            raise refuse("sampling")
        drawn = {stratum["name"] for stratum in sampling["strata"]}
        if (
            sampling["by"] == "group"
            and not {group["name"] for group in manifest.get("groups") or ()} <= drawn
        ):
            raise FormatError("damaged manifest: a group that 'sampling' does not know", file=str(file))
    if (chunking := manifest.get("chunking")) is not None and not (
        isinstance(chunking.get("mode"), str)
        and (chunking.get("tokens") is None or _is_count(chunking["tokens"]))
        and _is_count(chunking.get("overlap", 0))
    ):
        raise refuse("chunking")
    if (encoder := manifest.get("encoder")) is not None and not all(
        isinstance(encoder.get(name), str | None) for name in ("kind", "model", "fingerprint", "state_file")
    ):
        raise refuse("encoder")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_file(entry: Any) -> bool:
    """A file of the store's folder: its name must not lead out of it."""
    if not isinstance(entry, dict) or not isinstance(name := entry.get("name"), str):
        return False
    plain = name and not name.startswith(".") and not set(name) & set("/\\:\0")
    return bool(plain) and _is_count(entry.get("bytes")) and isinstance(entry.get("xxh3"), str)


def _is_sampling(found: Mapping[str, Any]) -> bool:
    strata = found.get("strata")
    return (
        _is_share(found.get("rate"))
        and isinstance(found.get("seed"), int)
        and found.get("by") in (None, "group")
        and _is_count(found.get("texts"))
        and _is_count(found.get("sampled"))
        and isinstance(strata, list)
        and len(strata) > 0
        and all(_is_stratum(stratum) for stratum in strata)
        and (found.get("by") == "group" or strata[0]["name"] == "")
    )


def _is_stratum(found: Any) -> bool:
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return False
    texts, sampled, threshold = found.get("texts", 0), found.get("sampled", 0), found.get("threshold")
    return (
        _is_count(texts)
        and _is_count(sampled)
        and bool(1 <= sampled <= texts)
        and isinstance(threshold, str)
        and len(threshold) == 16
        and all(c in "0123456789abcdef" for c in threshold)
    )
