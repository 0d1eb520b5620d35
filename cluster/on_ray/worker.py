"""Worker: the Ray actor that runs tasks, and its location."""

from __future__ import annotations

import os
import pickle
import platform
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.executors.autoscaling import Node
from cluster.executors.gang import Rank, die_with_parent, free_port, run_rank
from cluster.executors.task import TaskResult, run_task
from cluster.on_ray import draining


@dataclass(frozen=True)
class WorkerLocation:
    """The location of a worker's process."""

    machine: str
    """The host name."""
    address: str
    pid: int
    node: Node


class Worker:
    """One warm process: the modules and caches that a task loads stay loaded for the next task."""

    def __init__(self) -> None:
        die_with_parent()  # without this, Ray let busy workers write for 30 s after their node was gone
        draining.watch()
        self._pickled_fn, self._fn = b"", no_op

    def run(self, key: str, pickled_fn: bytes, args: tuple[Any, ...]) -> TaskResult:
        return run_task(key, self._unpickled(pickled_fn), args)

    def run_rank(
        self,
        key: str,
        pickled_fn: bytes,
        args: tuple[Any, ...],
        ranks: tuple[int, int, int],
        meeting_point: tuple[str, int],
    ) -> TaskResult:
        """Run one rank of a gang. `ranks`: its number, the number of ranks, its number among those of this node."""
        return run_rank(key, pickle.loads(pickled_fn), args, Rank(*ranks, *meeting_point))

    def meeting_point(self, address: str) -> tuple[str, int]:
        """Return the address and a free port at which the ranks of a gang can meet; this worker runs rank 0."""
        return address, free_port()

    def location(self) -> WorkerLocation:
        import ray

        context = ray.get_runtime_context()
        labels: Mapping[str, Any] = context.get_node_labels()
        node = Node(context.get_node_id(), dict(labels), _processor())
        address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        return WorkerLocation(socket.gethostname(), address, os.getpid(), node)

    def load(self, pickled_fn: bytes) -> None:
        """Unpickle a function before it is called, so that this process imports its modules."""
        self._unpickled(pickled_fn)

    def _unpickled(self, pickled_fn: bytes) -> Callable[..., Any]:
        """Return the function; consecutive tasks mostly have the same one, which is kept."""
        if pickled_fn != self._pickled_fn:
            self._pickled_fn, self._fn = b"", pickle.loads(pickled_fn)
            self._pickled_fn = pickled_fn
        return self._fn


def _processor() -> str:
    """Return the part of this machine that a timing depends on: the processor's name and number of CPUs."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = next(
            line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")
        )
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{os.cpu_count()} × {name}"


def no_op() -> None:
    """Stands for the function of a worker to which none was sent yet."""
