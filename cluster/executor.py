"""Executor: where work runs. The same code runs inline in tests and on Ray."""

from __future__ import annotations

from collections.abc import Callable
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


class Executor(Protocol):
    """Runs `fn(*args)` somewhere. Functions and arguments must pickle.

    At most `slots` pieces of work run at once; more may be submitted and wait their turn. Exclusive work
    waits until everything else here has ended and holds others back while it runs; other waiting work
    goes first, so that exclusive pieces run together.
    """

    slots: int

    def submit(self, key: str, fn: Callable[..., Any], *args: Any, resources: Resources) -> None:
        """Queue a piece of work. ValueError if `key` is under way, or if `resources` can never be had."""

    def wait(self, timeout: float | None = None) -> list[Ended]:
        """What ended since the last call; waits for the first up to `timeout` seconds, then returns [].
        Returns [] at once where nothing is under way."""

    def cancel(self, key: str) -> None:
        """Stop or forget this piece of work; nothing is reported for it. Unknown keys are ignored."""

    def close(self) -> None:
        """End all workers. Safe to call twice."""
