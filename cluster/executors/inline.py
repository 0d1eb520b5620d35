"""Run tasks in this process, one after another."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from cluster.executors.admission import Admission
from cluster.executors.executor import Capacity, NodeType, Resources, cores
from cluster.executors.gang import run_gang
from cluster.executors.task import TaskResult, run_task


class InlineExecutor:
    """Runs one task in this process in each `wait`, which returns when that task has ended.

    `slots` is only the number of tasks that a caller should submit ahead. A task that KeyboardInterrupt stops is
    dropped.
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
            raise ValueError(f"{key} is pending already; wait for its result or cancel it first")
        self._admission.add(self._submitted, resources)
        self._calls[self._submitted] = (key, fn, args, resources.ranks)
        self._tickets[key] = self._submitted
        self._submitted += 1

    def wait(self, timeout: float | None = None) -> list[TaskResult]:
        ticket = self._admission.next()
        if ticket is None:
            return []
        key, fn, args, ranks = self._calls[ticket]
        try:
            if ranks == 1:
                return [run_task(key, fn, args)]
            return [run_gang(key, fn, args, ranks)]
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
