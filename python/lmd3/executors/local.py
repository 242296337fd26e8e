"""Tasks in this process, one after the other; each uses the threads it is given."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Iterator

from lmd3.executors import Done, Function, Task, Watch


class LocalExecutor:
    """The default. An error of a task is raised as it is: nothing else runs that could be waited for.

    Args:
        threads: of each task; None takes all cores.
    """

    name = "local"
    in_process = True
    slots = 1

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads

    def run(self, function: Function, tasks: Iterable[Task], watch: Watch) -> Iterator[Done]:
        """Runs tasks in their order."""
        for task in tasks:
            started = time.perf_counter()
            value = function(task.arguments, watch)
            yield Done(task, socket.gethostname(), time.perf_counter() - started, value)
