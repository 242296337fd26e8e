"""Where the tasks of long work run: in this process, or on the nodes of a Ray cluster.

An `Executor` knows nothing of densities. It takes a function and tasks of plain JSON values, runs them where
it runs things, and hands back what they return, in any order. A task whose worker was lost runs again; one
that raised an error does not. Results that matter are files that the tasks leave; what they return is a few
numbers. So scans, approximate sums, the building of an index and encoding can all be run by it.
"""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from lmd3.errors import ParameterError, WorkError
from lmd3.progress import ProgressFactory, duration

#: The names of the executors.
NAMES = ("local", "ray")

#: Tasks made for each that runs at once: the last ones should end together.
TASKS_PER_SLOT = 16

#: The function of tasks: the task's arguments, and where it may report how much it has done.
Function = Callable[[dict[str, Any], Callable[[float], None]], dict[str, Any]]

#: Is told about once a second that time has passed; where the executor sees into the running task, how much
#: of it is done, else None.
Watch = Callable[[float | None], None]


@dataclass(frozen=True)
class Task:
    """One piece of work.

    Attributes:
        name: what an error calls it: `segments 8 to 11`.
        arguments: JSON values.
        size: how much work it is, in the unit of the progress.
    """

    name: str
    arguments: dict[str, Any]
    size: float


@dataclass(frozen=True)
class Done:
    """A task that has ended.

    Attributes:
        task: the task.
        node: where it ran.
        seconds: how long it took.
        value: what it returned; `rows` and `bytes` in it are summed up.
        error: what it raised instead, in one line.
    """

    task: Task
    node: str
    seconds: float
    value: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


class Executor(Protocol):
    """Runs tasks.

    Where they run in this process, the function may be any callable; else it is a module's function, which
    the workers import by its name.
    """

    @property
    def name(self) -> str:
        """One of `NAMES`."""

    @property
    def in_process(self) -> bool:
        """Whether tasks run in this process."""

    @property
    def slots(self) -> int:
        """Tasks that run at once."""

    @property
    def threads(self) -> int | None:
        """That each may use; None: all cores."""

    def run(self, function: Function, tasks: Iterable[Task], watch: Watch) -> Iterator[Done]:
        """Runs tasks, a few ahead of those that have ended, and gives each when it has ended."""


def make_executor(name: str, *, threads: int | None = None, address: str | None = None) -> Executor:
    """The executor of a name.

    Args:
        name: "local" or "ray".
        threads: of a task [local: all cores; ray: the CPUs of the smallest node].
        address: of a Ray cluster, as `ray.init` takes it [one on this machine for this job].

    Raises:
        ParameterError: an unknown name, or an address without Ray.
        MissingDependencyError: Ray is not installed.
    """
    if name == "ray":
        from lmd3.executors.ray import RayExecutor

        return RayExecutor(address, threads)
    if name != "local":
        raise ParameterError(f"unknown executor {name!r}", remedy=f"choose one of {', '.join(NAMES)}")
    if address is not None:
        raise ParameterError("--address is of a Ray cluster", remedy="add --executor ray")
    from lmd3.executors.local import LocalExecutor

    return LocalExecutor(threads)


@dataclass
class Node:
    """What a node did."""

    tasks: int = 0
    rows: int = 0
    bytes: int = 0
    seconds: float = 0.0
    size: float = 0.0


class Summary:
    """What ran where, in constant memory: per node, and the slowest tasks."""

    #: Tasks kept as the slowest.
    SLOWEST = 3

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self._slowest: list[tuple[float, str, str, float]] = []

    def add(self, done: Done) -> None:
        """Counts a task that has ended."""
        node = self.nodes.setdefault(done.node, Node())
        node.tasks += 1
        node.rows += int(done.value.get("rows", 0))
        node.bytes += int(done.value.get("bytes", 0))
        node.seconds += done.seconds
        node.size += done.task.size
        if done.task.size > 0:
            entry = (done.seconds / done.task.size, done.task.name, done.node, done.seconds)
            heapq.heappush(self._slowest, entry)
            if len(self._slowest) > self.SLOWEST:
                heapq.heappop(self._slowest)

    def stragglers(self) -> list[str]:
        """Nodes that took half as long again as the median node for the same work, and what they took."""
        paces = {name: node.seconds / node.size for name, node in self.nodes.items() if node.size > 0}
        if len(paces) < 2:
            return []
        usual = statistics.median(paces.values())
        return [
            f"{name} took {pace / usual:.1f} times as long as the median node"
            for name, pace in sorted(paces.items())
            if pace > 1.5 * usual
        ]

    def to_dict(self) -> dict[str, Any]:
        """As `run.json` holds it."""
        return {
            "nodes": {
                name: {"tasks": n.tasks, "rows": n.rows, "bytes": n.bytes, "seconds": round(n.seconds, 3)}
                for name, n in sorted(self.nodes.items())
            },
            "slowest": [
                {"task": task, "node": node, "seconds": round(seconds, 3)}
                for _, task, node, seconds in sorted(self._slowest, reverse=True)
            ],
            "stragglers": self.stragglers(),
        }


def in_lines(summary: dict[str, Any]) -> list[str]:
    """What `Summary.to_dict` gives, in words: a line per node."""
    found = [
        f"  {name}: {node['tasks']:,} tasks, {node['rows']:,} rows, {node['bytes'] / 1e9:.3g} GB, "
        f"{duration(node['seconds'])}"
        for name, node in summary["nodes"].items()
    ]
    return found + [f"  straggler: {line}" for line in summary["stragglers"]]


def run_tasks(
    executor: Executor,
    function: Function,
    tasks: Iterable[Task],
    *,
    label: str,
    total: float,
    unit: str,
    progress: ProgressFactory,
    count: Callable[[], float] | None = None,
    summary: Summary | None = None,
    each: Callable[[Done], None] | None = None,
) -> Summary:
    """Runs all tasks, with progress, and says what ran where.

    After the first task that failed no new one is started; those that run are waited for.

    Args:
        executor: where they run.
        function: of a task.
        tasks: may be a generator: only a few are held at once.
        label: of the progress.
        total: the sum of the tasks' sizes.
        unit: of the sizes.
        progress: makes the bar.
        count: how much is done in all, where the executor can't see into running tasks (by the files that
            they have left).
        summary: where what ran is counted too [a new one].
        each: is called with each task that has ended well.

    Raises:
        WorkError: tasks failed; each is named with its error.
    """
    summary = Summary() if summary is None else summary
    failed: list[Done] = []

    def going() -> Iterator[Task]:
        for task in tasks:
            if failed:
                return
            yield task

    ended = 0.0
    with progress(label, total, unit) as bar:

        def watch(within: float | None) -> None:
            bar.update(min(total, max(ended, count() if within is None and count else ended + (within or 0))))

        for done in executor.run(function, going(), watch):
            if done.error is not None:
                failed.append(done)
                continue
            summary.add(done)
            if each is not None:
                each(done)
            ended += done.task.size
            watch(0.0)
    if failed:
        raise task_error(failed)
    return summary


def task_error(failed: Iterable[Done]) -> WorkError:
    """The error of tasks that failed, naming each."""
    lines = [f"{done.task.name} on {done.node}: {done.error}" for done in failed]
    return WorkError(
        "; ".join(lines),
        remedy="what has ended is kept: mend the cause and give the same command again",
    )


__all__ = [
    "NAMES",
    "TASKS_PER_SLOT",
    "Done",
    "Executor",
    "Function",
    "Summary",
    "Task",
    "in_lines",
    "make_executor",
    "run_tasks",
]
