"""The Ray actor that runs tasks, and where it runs."""

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
    """Where a worker is: the machine, its address, the process, the node as placing goes."""

    machine: str
    address: str
    pid: int
    node: Node


class Worker:
    """One warm process: what a piece of work loads and caches stays for the next one."""

    def __init__(self) -> None:
        die_with_parent()  # Ray alone let busy workers write for half a minute after their node was gone
        draining.watch()
        self._packed, self._fn = b"", no_op

    def run(self, key: str, packed: bytes, args: tuple[Any, ...]) -> TaskResult:
        return run_task(key, self._unpacked(packed), args)

    def run_rank(
        self,
        key: str,
        packed: bytes,
        args: tuple[Any, ...],
        ranks: tuple[int, int, int],
        met: tuple[str, int],
    ) -> TaskResult:
        """Do one rank's part of a gang's piece. ranks: its number, how many there are, its number on this node."""
        return run_rank(key, pickle.loads(packed), args, Rank(*ranks, *met))

    def meet(self, address: str) -> tuple[str, int]:
        """Where the ranks of a gang may meet, whose first is here."""
        return address, free_port()

    def where(self) -> WorkerLocation:
        import ray

        here = ray.get_runtime_context()
        labels: Mapping[str, Any] = here.get_node_labels()
        node = Node(here.get_node_id(), dict(labels), _processor())
        address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        return WorkerLocation(socket.gethostname(), address, os.getpid(), node)

    def load(self, packed: bytes) -> None:
        """Make the function ready: this process imports what it needs."""
        self._unpacked(packed)

    def _unpacked(self, packed: bytes) -> Callable[..., Any]:
        """The function of the last piece, if it is that again, as it mostly is."""
        if packed != self._packed:
            self._packed, self._fn = b"", pickle.loads(packed)
            self._packed = packed
        return self._fn


def _processor() -> str:
    """What of this machine a timing depends on: its processor's name, how many there are."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = next(
            line.partition(":")[2].strip() for line in told.splitlines() if line.startswith("model name")
        )
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{os.cpu_count()} × {name}"


def no_op() -> None:
    """Stands where no function was sent yet."""
