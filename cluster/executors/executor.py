"""Executor: where work runs. The same code runs inline in tests and on Ray."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from cluster.executors.task import TaskResult as Ended

T = TypeVar("T")


@dataclass(frozen=True)
class Resources:
    """What one piece of work needs. `exclusive`: nothing else of ours runs on its node meanwhile. `labels`: what a node
    must be labelled with. With several `ranks` the same call is made so often at once, each with as much of the rest.
    """

    gpus: float = 0.0
    cpus: float = 1.0
    memory_gib: float = 0.0
    ranks: int = 1
    exclusive: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)


class ExecutorUnavailableError(RuntimeError):
    """No work can be done any more, in one line with the reason. What ended before is kept."""


@dataclass(frozen=True)
class NodeType:
    """What kind of machine a node is. name: the cloud's word (g6.2xlarge) or the cluster's, empty where nobody tells;
    region: the cloud's; spot: whether the cloud may take it back."""

    name: str = ""
    region: str = ""
    spot: bool = False

    def __str__(self) -> str:
        place = f" in {self.region}" if self.region else ""
        return f"{self.name or 'node'}{place}{' (spot)' if self.spot else ''}"


class Executor(Protocol):
    """Runs `fn(*args)` somewhere. Functions and arguments must pickle.

    More may be submitted than run at once; they wait their turn. Exclusive work waits until everything else on some
    node has ended and holds others back from it while it runs; other waiting work goes first, so that exclusive
    pieces run together.
    """

    @property
    def slots(self) -> int:
        """How many pieces could run at once: what is worth having under way. Of a cluster that grows it is what the
        cluster could have as far as that is known now, so ask again."""

    def submit(self, key: str, fn: Callable[..., Any], *args: Any, resources: Resources) -> None:
        """Queue a piece of work. ValueError if `key` is under way, or if `resources` can never be had.
        A key is under way until `wait` has reported it or it was cancelled."""

    def wait(self, timeout: float | None = None) -> list[Ended]:
        """What ended since the last call; waits for the first up to `timeout` seconds, then returns [].
        Returns [] at once where nothing is under way. Raises Unavailable where nothing will end any more."""

    def cancel(self, key: str) -> None:
        """Stop or forget this piece of work; nothing is reported for it. Unknown keys are ignored."""

    def nodes(self) -> Mapping[NodeType, int]:
        """How many nodes of which kind are up now, whoever uses them. Asks the cluster: to be called seldom."""

    def close(self) -> None:
        """End all workers and forget all work. Safe to call twice."""


@dataclass(frozen=True)
class Capacity:
    """What an executor can give at once. `gpus` is the share of one slot, the rest is for all together."""

    slots: int
    cpus: float = math.inf
    memory_gib: float = math.inf
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise ValueError(f"slots={self.slots}: an executor needs at least 1")

    def check(self, needs: Resources) -> None:
        """ValueError if a piece with these needs could not start even with everything else at rest."""
        if not 1 <= needs.ranks <= self.slots:
            raise ValueError(
                f"ranks={needs.ranks} can never be had here: from 1 to {self.slots}; ask for less"
            )
        for what, asked, most in (
            ("cpus", needs.cpus * needs.ranks, self.cpus),
            ("memory_gib", needs.memory_gib * needs.ranks, self.memory_gib),
            ("gpus", needs.gpus, self.gpus),
        ):
            if not 0 <= asked <= most:
                raise ValueError(f"{what}={asked:g} can never be had here: from 0 to {most:g}; ask for less")

    def holds(self, running: Collection[Resources]) -> bool:
        """Whether these pieces may run at once, as far as slots, processors and memory go."""
        # The sums' rounding must not keep out a piece that fits exactly.
        return (
            sum(one.ranks for one in running) <= self.slots
            and math.fsum(one.cpus * one.ranks for one in running) <= self.cpus + 1e-9
            and math.fsum(one.memory_gib * one.ranks for one in running) <= self.memory_gib + 1e-9
        )


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
