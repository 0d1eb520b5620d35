"""Executor: where work runs. The same code runs inline in tests and on Ray."""

from __future__ import annotations

import math
import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Resources:
    """What one piece of work needs. `exclusive`: nothing else of ours runs on its node meanwhile."""

    gpus: float = 0.0
    cpus: float = 1.0
    memory_gib: float = 0.0
    ranks: int = 1
    exclusive: bool = False


@dataclass(frozen=True)
class Ended:
    """One piece of work that ended: with `value`, or with `lost` saying why no value came back.

    Work reports its own failures as values. `lost` is what the executor saw: the process died, the node
    went away, or an exception escaped. `preempted` tells a machine that went away from code that failed.
    """

    key: str
    value: Any = None
    lost: str | None = None
    preempted: bool = False


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

    At most `slots` pieces of work run at once; more may be submitted and wait their turn. Exclusive work
    waits until everything else here has ended and holds others back while it runs; other waiting work
    goes first, so that exclusive pieces run together.
    """

    slots: int

    def submit(self, key: str, fn: Callable[..., Any], *args: Any, resources: Resources) -> None:
        """Queue a piece of work. ValueError if `key` is under way, or if `resources` can never be had.
        A key is under way until `wait` has reported it or it was cancelled."""

    def wait(self, timeout: float | None = None) -> list[Ended]:
        """What ended since the last call; waits for the first up to `timeout` seconds, then returns [].
        Returns [] at once where nothing is under way."""

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
        if needs.ranks != 1:
            raise ValueError(
                f"ranks={needs.ranks}: gangs of several ranks are not supported; ask for ranks=1"
            )
        for what in ("cpus", "memory_gib", "gpus"):
            asked, most = getattr(needs, what), getattr(self, what)
            if not 0 <= asked <= most:
                raise ValueError(f"{what}={asked:g} can never be had here: from 0 to {most:g}; ask for less")


class Admission:
    """Decides which waiting piece may start now. Knows no processes and no clock.

    Pieces start in the order they came. One that must wait for processors or memory may be overtaken by
    later, smaller ones, but at most `PATIENCE` times: then nothing starts before it. An exclusive piece
    starts only when nothing runs and no other kind waits, so who keeps adding other work holds it back.
    """

    PATIENCE = 8

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self._waiting: dict[int, Resources] = {}
        self._running: dict[int, Resources] = {}
        self._overtaken: dict[int, int] = {}

    def add(self, ticket: int, needs: Resources) -> None:
        self.capacity.check(needs)
        self._waiting[ticket] = needs
        self._overtaken[ticket] = 0

    def next(self) -> int | None:
        """The piece that may start now, counted as running from here on; None if none may."""
        shared = [ticket for ticket, needs in self._waiting.items() if not needs.exclusive]
        for position, ticket in enumerate(shared or self._waiting):
            if self._fits(self._waiting[ticket]):
                for passed in shared[:position]:
                    self._overtaken[passed] += 1
                self._running[ticket] = self._waiting.pop(ticket)
                return ticket
            if self._overtaken[ticket] >= self.PATIENCE:
                return None
        return None

    def end(self, ticket: int) -> None:
        """This piece neither waits nor runs any more."""
        self._waiting.pop(ticket, None)
        self._running.pop(ticket, None)
        self._overtaken.pop(ticket, None)

    def _fits(self, needs: Resources) -> bool:
        running = self._running.values()
        if needs.exclusive:
            return not running
        if len(running) >= self.capacity.slots or any(other.exclusive for other in running):
            return False
        # The sums' rounding must not keep out a piece that fits exactly.
        cpus = math.fsum(other.cpus for other in running) + needs.cpus
        memory_gib = math.fsum(other.memory_gib for other in running) + needs.memory_gib
        return cpus <= self.capacity.cpus + 1e-9 and memory_gib <= self.capacity.memory_gib + 1e-9


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_piece(key: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> Ended:
    """Run `fn(*args)` here. What escapes it comes back as text: not every exception survives pickling.
    The first line of `lost` is the exception, its traceback follows."""
    try:
        return Ended(key, fn(*args))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the worker boundary
        summary = traceback.format_exception_only(error)[-1].strip()
        return Ended(key, lost=f"{summary}\n{''.join(traceback.format_exception(error))}")


class InlineExecutor:
    """Runs the work in this process, one piece in each `wait`, which returns when that piece has ended.

    `slots` only says how much a caller may want to submit ahead. A piece that KeyboardInterrupt stops is
    forgotten.
    """

    def __init__(self, slots: int = 1, memory_gib: float = math.inf, gpus: float = 0.0) -> None:
        self.slots = slots
        self._admission = Admission(Capacity(slots, max(slots, cores()), memory_gib, gpus))
        self._calls: dict[int, tuple[str, Callable[..., Any], tuple[Any, ...]]] = {}
        self._tickets: dict[str, int] = {}
        self._submitted = 0
        self._closed = False

    def submit(self, key: str, fn: Callable[..., Any], *args: Any, resources: Resources) -> None:
        if self._closed:
            raise RuntimeError("this executor is closed")
        if key in self._tickets:
            raise ValueError(f"{key} is under way already; wait for it or cancel it first")
        self._admission.add(self._submitted, resources)
        self._calls[self._submitted] = (key, fn, args)
        self._tickets[key] = self._submitted
        self._submitted += 1

    def wait(self, timeout: float | None = None) -> list[Ended]:
        ticket = self._admission.next()
        if ticket is None:
            return []
        key, fn, args = self._calls[ticket]
        try:
            return [run_piece(key, fn, args)]
        finally:
            self.cancel(key)

    def cancel(self, key: str) -> None:
        ticket = self._tickets.pop(key, None)
        if ticket is not None:
            self._admission.end(ticket)
            del self._calls[ticket]

    def nodes(self) -> Mapping[NodeType, int]:
        return {NodeType(): 1}

    def close(self) -> None:
        for key in list(self._tickets):
            self.cancel(key)
        self._closed = True
