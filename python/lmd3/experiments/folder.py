"""Whose folder it is: one experiment's, from its first file to its last.

`begun.json` (command, settings, digest of the inputs) is written before anything else and read before
anything is taken from the folder: what a killed run left behind is continued by the same experiment only.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmd3.errors import OutputError
from lmd3.experiments.leak_inputs import Records
from lmd3.results import read_json, write_json

BEGUN = "begun.json"


def claim_folder(
    folder: Path, command: str, settings: Mapping[str, Any], inputs: str, *, force: bool = False
) -> None:
    """Makes the folder, or proves that it holds this very experiment.

    Args:
        folder: of the experiment.
        command: `leak`, `pretrain` or `subsets`.
        settings: JSON values; a setting that has changed makes another experiment.
        inputs: digest of all that is read.
        force: whether the folder of another experiment is emptied.

    Raises:
        OutputError: it holds another experiment (`force` replaces it), or files of no experiment.
    """
    marks = [path for path in (folder / BEGUN, folder / "plan.json") if path.exists()]
    if marks:
        before = read_json(marks[0])
        known = before.get("settings", {})
        changed = [name for name in settings if known.get(name) != settings[name]]
        if before.get("inputs") != inputs:
            changed.append("the texts")
        if before.get("command", command) != command:
            changed.insert(0, f"the command (it was {before['command']}) and what follows from it")
        if changed and not force:
            raise OutputError(
                f"holds another experiment: {', '.join(changed)} differ",
                file=str(folder),
                remedy="name another -o, or give --force to replace it",
            )
        if changed or force:
            shutil.rmtree(folder)
    elif folder.is_dir():
        # The mark itself may have been cut off by a kill.
        foreign = sorted(p.name for p in folder.iterdir() if p.name != BEGUN + ".tmp")
        if foreign:
            raise OutputError(
                f"is not empty and holds no experiment ({foreign[0]})",
                file=str(folder),
                remedy="name another -o",
            )
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / BEGUN
    if not mark.exists():
        write_json(mark, {"format": 1, "command": command, "settings": dict(settings), "inputs": inputs})


def digest_records(digest: Any, records: Records | None) -> None:
    """Adds all that records hold to a digest."""
    if records is None:
        digest.update(b"none")
        return
    for values in (records.ids, records.prompts, records.answers, records.groups):
        digest.update(json.dumps(values).encode())
    if records.vectors is not None:
        digest.update(records.vectors.tobytes())


def fingerprint(records: Records, encoder: str) -> str:
    """A digest of grouped texts and the name of their encoder."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([records.ids, records.texts, records.groups]).encode())
    digest.update(encoder.encode())
    if records.vectors is not None:
        digest.update(records.vectors.tobytes())
    return digest.hexdigest()
