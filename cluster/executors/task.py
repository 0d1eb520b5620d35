"""Piece: one call that an executor makes, and what came of it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TaskResult:
    """One piece of work that ended: with `value`, or with `lost` saying why no value came back.

    Work reports its own failures as values. `lost` is what the executor saw: the process died, the node
    went away, or an exception escaped. `preempted` tells a machine that went away from code that failed.
    """

    key: str
    value: Any = None
    error: str | None = None
    preempted: bool = False


def run_task(key: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> TaskResult:
    """Run `fn(*args)` here. What escapes it comes back as text: not every exception survives pickling.
    The first line of `lost` is the exception, its traceback follows."""
    try:
        return TaskResult(key, fn(*args))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the worker boundary
        summary = traceback.format_exception_only(error)[-1].strip()
        return TaskResult(key, error=f"{summary}\n{''.join(traceback.format_exception(error))}")
