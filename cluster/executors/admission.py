"""Decide which queued tasks may start. Pure: no thread, no clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cluster.executors.executor import Capacity, Resources, T


class TaskQueue:
    """The waiting tasks, by ticket, and the rule that selects the next one.

    Tasks start in the order of submission. Later tasks that fit may overtake a task that does not fit yet, but at most
    `PATIENCE` times: then no task starts before it. An exclusive task starts only if no other kind waits, so a caller
    that keeps submitting other tasks delays it.
    """

    PATIENCE = 8

    def __init__(self) -> None:
        self._waiting: dict[int, Resources] = {}
        self._overtaken: dict[int, int] = {}

    def __iter__(self) -> Iterator[Resources]:
        return iter(self._waiting.values())

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, ticket: int, needs: Resources) -> None:
        self._waiting[ticket] = needs
        self._overtaken[ticket] = 0

    def remove(self, ticket: int) -> None:
        self._waiting.pop(ticket, None)
        self._overtaken.pop(ticket, None)

    def next(
        self,
        assign: Callable[[Resources], T | None],
        has_pending_worker: Callable[[Resources], bool] | None = None,
    ) -> tuple[int, T] | None:
        """Remove the task that may start now and return it with its assignment; None if no task may start.

        `assign` returns the assignment of a task, or None if the task does not fit. Others may overtake a task without
        limit while `has_pending_worker` is true of it.
        """
        shared = [ticket for ticket, needs in self._waiting.items() if not needs.exclusive]
        skipped: list[int] = []
        for ticket in shared or list(self._waiting):
            needs = self._waiting[ticket]
            assignment = assign(needs)
            if assignment is not None:
                for skipped_ticket in skipped:
                    self._overtaken[skipped_ticket] += 1
                self.remove(ticket)
                return ticket, assignment
            if shared and not (has_pending_worker is not None and has_pending_worker(needs)):
                if self._overtaken[ticket] >= self.PATIENCE:
                    return None
                skipped.append(ticket)
        return None


class Admission:
    """Selects the task of a queue that may start now on one machine; an exclusive task runs alone."""

    PATIENCE = TaskQueue.PATIENCE

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self._queue = TaskQueue()
        self._running: dict[int, Resources] = {}

    def add(self, ticket: int, needs: Resources) -> None:
        """Queue a task. ValueError if this machine can never provide its resources."""
        self.capacity.check(needs)
        self._queue.add(ticket, needs)

    def next(self) -> int | None:
        """Return the task that may start now, and count it as running; None if no task may start."""
        assigned = self._queue.next(self._if_it_fits)
        if assigned is None:
            return None
        ticket, needs = assigned
        self._running[ticket] = needs
        return ticket

    def end(self, ticket: int) -> None:
        """Remove a waiting or running task."""
        self._queue.remove(ticket)
        self._running.pop(ticket, None)

    def _if_it_fits(self, needs: Resources) -> Resources | None:
        running = self._running.values()
        if needs.exclusive:
            fits = not running
        else:
            is_locked = any(task.exclusive for task in running)
            fits = not is_locked and self.capacity.fits([*running, needs])
        if not fits:
            return None
        return needs
