"""Run tasks in this process, one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from cluster.executors.admission import Admission
from cluster.executors.executor import Capacity, NodeType, Resources, cores
from cluster.executors.gang import run_gang
from cluster.executors.task import TaskResult as Ended
from cluster.executors.task import run_task as run_piece


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
