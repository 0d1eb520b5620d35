"""Executor: the interface to where tasks run. The same tasks run inline in tests and on Ray."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from cluster.executors.task import TaskResult

T = TypeVar("T")


@dataclass(frozen=True)
class Resources:
    """The resources that one task needs; a task of several ranks needs them for each rank."""

    gpus: float = 0.0
    cpus: float = 1.0
    memory_gib: float = 0.0
    ranks: int = 1
    """The number of simultaneous calls of the task's function."""
    exclusive: bool = False
    """True if no other task of this executor may run on the same node meanwhile."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels that the node must have."""


class ExecutorUnavailableError(RuntimeError):
    """The executor can run no more tasks. The message is one line with the reason; earlier results stay valid."""


@dataclass(frozen=True)
class NodeType:
    """The type of a node, as far as its price depends on it."""

    name: str = ""
    """The cloud's name of the machine type (g6.2xlarge), or the cluster's; empty if unknown."""
    region: str = ""
    """The cloud's region; empty if unknown."""
    spot: bool = False
    """True if the cloud may take the node back."""

    def __str__(self) -> str:
        region = f" in {self.region}" if self.region else ""
        market = " (spot)" if self.spot else ""
        return f"{self.name or 'node'}{region}{market}"


class Executor(Protocol):
    """Runs tasks: calls of `fn(*args)`. Functions and arguments must pickle.

    A caller may submit more tasks than run at once; the others wait in a queue. An exclusive task waits until all other
    tasks on some node have ended, and no other task starts there while it runs. Other waiting tasks start first, so
    that exclusive tasks run one after another.
    """

    @property
    def slots(self) -> int:
        """The number of tasks that could run at once: a useful number of pending tasks.

        For a cluster that grows this is the current estimate of its largest size, and changes.
        """

    def submit(self, key: str, fn: Callable[..., Any], *args: Any, resources: Resources) -> None:
        """Queue a task. ValueError if `key` is pending, or if the executor can never provide `resources`.

        A key is pending until `wait` has reported its result or `cancel` was called.
        """

    def wait(self, timeout: float | None = None) -> list[TaskResult]:
        """Return the results since the last call. Wait up to `timeout` seconds for the first, then return [].

        Returns [] at once if no task is pending. ExecutorUnavailableError if no pending task can end any more.
        """

    def cancel(self, key: str) -> None:
        """Stop or remove a task; its result is not reported. Unknown keys are ignored."""

    def nodes(self) -> Mapping[NodeType, int]:
        """Count the nodes that are up now, by type, with or without tasks. Asks the cluster, so call it rarely."""

    def close(self) -> None:
        """Stop all workers and drop all tasks. May be called twice."""


@dataclass(frozen=True)
class Capacity:
    """The resources that an executor provides at once."""

    slots: int
    """The number of ranks that may run at once, over all tasks."""
    cpus: float = math.inf
    """Processors for all tasks together."""
    memory_gib: float = math.inf
    """Memory for all tasks together."""
    gpus: float = 0.0
    """The GPUs of one slot; may be a fraction."""

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise ValueError(f"slots={self.slots}: an executor needs at least 1")

    def check(self, needs: Resources) -> None:
        """Check that a task could start on an idle executor. ValueError if it could not."""
        if not 1 <= needs.ranks <= self.slots:
            raise ValueError(
                f"ranks={needs.ranks} is not available here: from 1 to {self.slots}; request fewer"
            )
        for name, requested, available in (
            ("cpus", needs.cpus * needs.ranks, self.cpus),
            ("memory_gib", needs.memory_gib * needs.ranks, self.memory_gib),
            ("gpus", needs.gpus, self.gpus),
        ):
            if not 0 <= requested <= available:
                raise ValueError(
                    f"{name}={requested:g} is not available here: from 0 to {available:g}; request less"
                )

    def fits(self, running: Collection[Resources]) -> bool:
        """Return whether these tasks fit together, by slots, processors and memory."""
        # The tolerance admits a task that fits exactly, in spite of the rounding of the sums.
        return (
            sum(needs.ranks for needs in running) <= self.slots
            and math.fsum(needs.cpus * needs.ranks for needs in running) <= self.cpus + 1e-9
            and math.fsum(needs.memory_gib * needs.ranks for needs in running) <= self.memory_gib + 1e-9
        )


def cores() -> int:
    """Return the number of CPUs that are available to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
