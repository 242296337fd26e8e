"""The peers by name, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

#: Seconds that a peer may take for one answer.
PATIENCE = 900
CORE_TYPES = (None, "SkylakeX", "Cooperlake", "SapphireRapids", "Zen")
PEERS = {
    "numpy_inplace": "numpy, in place",
    "numpy_tiled": "numpy, in place, tiled",
    "torch_inplace": "torch, in place",
    "torch_compiled": "torch.compile",
    "faiss_flat": "faiss Flat, k = 10 (no sums)",
    "sklearn_kde": "scikit-learn KernelDensity (float64)",
    "scipy_cdist": "scipy cdist + logsumexp (float64)",
}
FLOAT32_PEERS = ("numpy_inplace", "numpy_tiled", "torch_inplace", "torch_compiled")


class Worker:
    """A peer in a process of its own."""

    def __init__(self, name: str, core_type: str | None, folder: Path) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS_")}
        if core_type:
            environment["OPENBLAS_CORETYPE"] = core_type
        self.name, self.core_type = name, core_type
        self.out = folder / f"{name}.npy"
        self.log = (folder / f"{name}.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "peers.worker", name],
            cwd=Path(__file__).resolve().parents[1],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def ask(self, command: str, **request: Any) -> dict[str, Any]:
        """Its answer, which has `error` where there is none."""
        assert self.process.stdin is not None and self.process.stdout is not None
        timer = threading.Timer(PATIENCE, self.process.kill)
        timer.start()
        try:
            print(json.dumps({"command": command, **request}), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        finally:
            timer.cancel()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        return {"error": f"ended without an answer (status {self.process.wait()})"}

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()
