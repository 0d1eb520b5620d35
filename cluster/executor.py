"""Executor: where work runs. The same code runs inline in tests and on Ray."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from cluster.gang import run_gang
from cluster.piece import Ended as Ended
from cluster.piece import run_piece as run_piece

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


class Unavailable(RuntimeError):  # noqa: N818 - it says what there is none of
    """No work can be done any more, in one line with the reason. What ended before is kept."""


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


class Line:
    """Who waits to start, and who is next. Knows no processes and no clock.

    Pieces start in the order they came. One that must wait may be overtaken by later, smaller ones, but at most
    `PATIENCE` times: then nothing starts before it. An exclusive piece starts only when no other kind waits, so who
    keeps adding other work holds it back.
    """

    PATIENCE = 8

    def __init__(self) -> None:
        self._waiting: dict[int, Resources] = {}
        self._overtaken: dict[int, int] = {}

    def __iter__(self) -> Iterator[Resources]:
        return iter(self._waiting.values())

    def add(self, ticket: int, needs: Resources) -> None:
        self._waiting[ticket] = needs
        self._overtaken[ticket] = 0

    def remove(self, ticket: int) -> None:
        self._waiting.pop(ticket, None)
        self._overtaken.pop(ticket, None)

    def next(
        self, place: Callable[[Resources], T | None], awaited: Callable[[Resources], bool] | None = None
    ) -> tuple[int, T] | None:
        """The piece that may start now and its place, which waits no more; None if none may. `place` finds one for
        a piece, or None; whoever has its place `awaited` lets others pass without end."""
        shared = [ticket for ticket, needs in self._waiting.items() if not needs.exclusive]
        passed: list[int] = []
        for ticket in shared or list(self._waiting):
            needs = self._waiting[ticket]
            found = place(needs)
            if found is not None:
                for one in passed:
                    self._overtaken[one] += 1
                self.remove(ticket)
                return ticket, found
            if shared and not (awaited is not None and awaited(needs)):
                if self._overtaken[ticket] >= self.PATIENCE:
                    return None
                passed.append(ticket)
        return None


class Admission:
    """Decides which piece of a `Line` may start now on one machine; an exclusive one only when nothing runs."""

    PATIENCE = Line.PATIENCE

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self._line = Line()
        self._running: dict[int, Resources] = {}

    def add(self, ticket: int, needs: Resources) -> None:
        self.capacity.check(needs)
        self._line.add(ticket, needs)

    def next(self) -> int | None:
        """The piece that may start now, counted as running from here on; None if none may."""
        found = self._line.next(self._placed)
        if found is None:
            return None
        ticket, needs = found
        self._running[ticket] = needs
        return ticket

    def end(self, ticket: int) -> None:
        """This piece neither waits nor runs any more."""
        self._line.remove(ticket)
        self._running.pop(ticket, None)

    def _placed(self, needs: Resources) -> Resources | None:
        running = self._running.values()
        if needs.exclusive:
            return None if running else needs
        alone = any(other.exclusive for other in running)
        return None if alone or not self.capacity.holds([*running, needs]) else needs


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class InlineExecutor:
    """Runs the work in this process, one piece in each `wait`, which returns when that piece has ended.

    `slots` only says how much a caller may want to submit ahead. A piece that KeyboardInterrupt stops is
    forgotten.
    """

    def __init__(self, slots: int = 1, memory_gib: float = math.inf, gpus: float = 0.0) -> None:
        self._slots = slots
        self._admission = Admission(Capacity(slots, max(slots, cores()), memory_gib, gpus))
        self._calls: dict[int, tuple[str, Callable[..., Any], tuple[Any, ...], int]] = {}
        self._tickets: dict[str, int] = {}
        self._submitted = 0
        self._closed = False

    @property
    def slots(self) -> int:
        return self._slots

    def submit(self, key: str, fn: Callable[..., Any], *args: Any, resources: Resources) -> None:
        if self._closed:
            raise RuntimeError("this executor is closed")
        if key in self._tickets:
            raise ValueError(f"{key} is under way already; wait for it or cancel it first")
        self._admission.add(self._submitted, resources)
        self._calls[self._submitted] = (key, fn, args, resources.ranks)
        self._tickets[key] = self._submitted
        self._submitted += 1

    def wait(self, timeout: float | None = None) -> list[Ended]:
        ticket = self._admission.next()
        if ticket is None:
            return []
        key, fn, args, ranks = self._calls[ticket]
        try:
            return [run_piece(key, fn, args) if ranks == 1 else run_gang(key, fn, args, ranks)]
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
