"""Decide which queued tasks may start. Pure: no thread, no clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cluster.executors.executor import Capacity, Resources, T


class TaskQueue:
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

    PATIENCE = TaskQueue.PATIENCE

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self._line = TaskQueue()
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
