"""Tasks on the nodes of a Ray cluster: Ray Core tasks, one at a time per node.

Workers import the function by its name and take plain JSON values, so nothing of the corpus goes through
Ray. A task whose worker or node was lost runs again, elsewhere or here; an error of the task itself is
returned as a value, so that Ray does not see it and does not repeat it.
"""

from __future__ import annotations

import importlib
import os
import socket
import time
from collections.abc import Iterable, Iterator
from typing import Any

from lmd3.errors import Lmd3Error, MissingDependencyError, ParameterError, WorkError
from lmd3.executors import Done, Function, Task, Watch

#: How often a task is run again whose worker was lost.
RETRIES = 10

#: How often the start of a cluster on this machine is tried.
STARTS = 3

#: Object store of a cluster that is started for one job: only a few numbers go through it.
_STORE_BYTES = 100_000_000


class RayExecutor:
    """Runs tasks on a Ray cluster.

    Args:
        address: of the cluster, as `ray.init` takes it. None: that of RAY_ADDRESS, or where this process is
            connected already; else a cluster on this machine for this job.
        threads: CPUs and threads of a task; None: as many as the smallest node has, so that a node does one
            task at a time.

    Raises:
        MissingDependencyError: Ray is not installed.
        ParameterError: no cluster is there, or none of its nodes has so many CPUs.
    """

    name = "ray"
    in_process = False

    def __init__(self, address: str | None = None, threads: int | None = None) -> None:
        try:
            import ray
        except ImportError:
            raise MissingDependencyError(
                "Ray is not installed", remedy='pip install "lmd3[ray]" on every node'
            ) from None
        self._ray: Any = ray
        self._started = not ray.is_initialized()
        if self._started:
            _connect(ray, address, threads)
        self.threads: int = threads or int(min(self._cpus(), default=0))
        #: Tasks that run at once, counted again as nodes come and go.
        self.slots = self._fits()
        if self.threads < 1 or self.slots < 1:
            most = int(max(self._cpus(), default=0))
            self.close()
            raise ParameterError(
                f"no node of the cluster has {max(1, self.threads)} CPUs; the largest has {most}",
                remedy="give --threads a smaller number",
            )

    def _cpus(self) -> list[float]:
        """CPUs of each node that is alive and has some."""
        counts = [node["Resources"].get("CPU", 0.0) for node in self._ray.nodes() if node["Alive"]]
        return [count for count in counts if count >= 1]

    def _fits(self) -> int:
        return sum(int(count // self.threads) for count in self._cpus()) if self.threads else 0

    def run(self, function: Function, tasks: Iterable[Task], watch: Watch) -> Iterator[Done]:
        """Runs tasks, as many as fit the cluster and a few that wait there."""
        ray = self._ray
        remote = ray.remote(num_cpus=self.threads, max_retries=RETRIES, retry_exceptions=False)(_call)
        waiting = iter(tasks)
        running: dict[Any, Task] = {}
        looked = 0.0
        try:
            while True:
                if time.monotonic() - looked > 10:
                    # Nodes may have joined or gone.
                    self.slots, looked = max(1, self._fits()), time.monotonic()
                while len(running) < 2 * self.slots and (task := next(waiting, None)) is not None:
                    where = (function.__module__, function.__qualname__)
                    running[remote.remote(*where, task.arguments)] = task
                if not running:
                    return
                ended, _ = ray.wait(list(running), num_returns=1, timeout=1.0, fetch_local=True)
                for reference in ended:
                    yield self._result(reference, running.pop(reference))
                if not ended:
                    watch(None)
        finally:
            for reference in running:
                ray.cancel(reference, force=False, recursive=False)

    def _result(self, reference: Any, task: Task) -> Done:
        try:
            found = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            line = str(error).strip().splitlines()
            reason = line[0] if line else type(error).__name__
            return Done(task, "a lost worker", 0.0, error=f"{reason} (tried {RETRIES + 1} times)")
        return Done(task, found["node"], found["seconds"], found["value"], found["error"])

    def close(self) -> None:
        """Leaves the cluster, where this executor has joined it; ends it, where it was for this job."""
        if self._started and self._ray.is_initialized():
            self._ray.shutdown()


def _connect(ray: Any, address: str | None, threads: int | None) -> None:
    """Joins the cluster or starts one.

    Raises:
        ParameterError: it can't be reached.
        WorkError: it does not start.
    """
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if level := os.environ.get("LMD3_SIMD"):
        options["runtime_env"] = {"env_vars": {"LMD3_SIMD": level}}
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
        from lmd3.system import cores

        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options |= {
            "address": "local",
            "num_cpus": max(threads or 0, cores()),
            "include_dashboard": False,
            "object_store_memory": _STORE_BYTES,
        }
    else:
        options["address"] = address
    # On a busy machine the processes of a cluster may take longer to start than Ray waits for them.
    for attempt in range(STARTS if address is None else 1):
        try:
            ray.init(**options)
            return
        except Exception as error:
            ray.shutdown()
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if address is not None:
                raise ParameterError(
                    f"no Ray cluster to join at {address}: {reason}",
                    remedy="start one with `ray start --head`, or leave --address out",
                ) from None
            if attempt + 1 == STARTS:
                raise WorkError(f"Ray does not start on this machine: {reason}") from None


def _call(module: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Runs a task on a node."""
    started = time.perf_counter()
    value: dict[str, Any] = {}
    error = None
    try:
        function = getattr(importlib.import_module(module), name)
        value = function(arguments, _unseen)
    except (Lmd3Error, OSError, MemoryError) as problem:
        error = str(problem) or type(problem).__name__
    except Exception as problem:
        error = f"internal error: {type(problem).__name__}: {problem}"
    where = f"{socket.gethostname()}:{_node()}"
    return {"node": where, "seconds": time.perf_counter() - started, "value": value, "error": error}


def _node() -> str:
    """The first digits of the node's id: several may run on one machine."""
    import ray

    return str(ray.get_runtime_context().get_node_id())[:6]


def _unseen(done: float) -> None:
    """Progress is seen by the files that a task leaves."""
