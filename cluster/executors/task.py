"""Task: one call that an executor makes, and its result."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TaskResult:
    """The result of one task: a value, or an error if no value came back.

    A task reports its expected failures as values. An error comes from the executor: the process died, the node was
    lost, or an exception escaped.
    """

    key: str
    value: Any = None
    error: str | None = None
    """The exception or the reason in its first line; a traceback may follow."""
    preempted: bool = False
    """True if the node was taken away, false if the code failed."""


def run_task(key: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> TaskResult:
    """Run `fn(*args)` in this process. An escaping exception is returned as text, since not every exception pickles."""
    try:
        return TaskResult(key, fn(*args))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the worker boundary
        summary = traceback.format_exception_only(error)[-1].strip()
        return TaskResult(key, error=f"{summary}\n{''.join(traceback.format_exception(error))}")
