"""One training run as a process of its own: `python -m lmd3.experiments.worker FOLDER [THREADS]`.

It ends where its parent has gone, so that a killed experiment leaves nobody behind who writes to its folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lmd3.errors import Lmd3Error, VerificationError, WorkError
from lmd3.progress import ProgressFactory, silent

_POLL = 0.5


class _Parent:
    """A bar that writes its steps where the parent reads them, and ends the process where that has gone."""

    def __init__(self, file: Path) -> None:
        self._file, self._parent, self._last = file, os.getppid(), 0.0

    def __call__(self, label: str, total: float | None = None, unit: str = "") -> _Parent:
        return self

    def __enter__(self) -> _Parent:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, done: float) -> None:
        if os.getppid() != self._parent:
            os._exit(1)
        if time.monotonic() - self._last > 1:
            self._last = time.monotonic()
            self._file.write_text(str(int(done)), encoding="utf-8")


def run_jobs(
    folders: Sequence[Path],
    *,
    workers: int = 1,
    threads: int = 1,
    progress: ProgressFactory | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Trains the jobs of these folders (see `training.write_job`), several at a time, each in a process.

    Raises:
        WorkError: one of them failed; what the others have done stays.
    """
    from lmd3.experiments.training import is_done
    from lmd3.results import read_json

    waiting = [folder for folder in folders if not is_done(folder)]
    total = sum(int(read_json(folder / "job.json")["steps"]) for folder in waiting)
    running: dict[Path, subprocess.Popen[bytes]] = {}
    ended = 0
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    try:
        with (progress or silent)("training", total, "steps") as bar:
            while waiting or running:
                while waiting and len(running) < max(1, workers):
                    folder = waiting.pop(0)
                    log = (folder / "log.txt").open("wb")
                    command = [sys.executable, "-m", "lmd3.experiments.worker", str(folder), str(threads)]
                    running[folder] = subprocess.Popen(command, stderr=log, stdout=log, env=environment)
                    log.close()
                time.sleep(_POLL)
                for folder, process in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[folder]
                    lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
                    for line in lines:
                        if line.startswith("notice: "):
                            say(line.removeprefix("notice: "))
                    if process.returncode:
                        reason = lines[-1] if lines else f"exit status {process.returncode}"
                        raise WorkError(f"a training run failed: {reason}", file=str(folder))
                    ended += int(read_json(folder / "job.json")["steps"])
                bar.update(ended + sum(_steps(folder) for folder in running))
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def _steps(folder: Path) -> int:
    try:
        return int((folder / "steps.txt").read_text(encoding="utf-8") or 0)
    except (OSError, ValueError):
        return 0


def main(arguments: Sequence[str]) -> int:
    """Trains one job."""
    import torch

    from lmd3.experiments.training import train

    folder, threads = Path(arguments[0]), int(arguments[1]) if len(arguments) > 1 else 1
    torch.set_num_threads(threads)
    bar = _Parent(folder / "steps.txt")
    try:
        try:
            train(folder, progress=bar)
        except VerificationError as error:
            print(f"notice: {error.file}: {error.message}: this run starts anew", file=sys.stderr, flush=True)
            train(folder, progress=bar)
    except Lmd3Error as error:
        print(str(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
