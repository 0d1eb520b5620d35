"""Collect every problem of a study, at most one for each checked key."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from orchestrator.config.problems import Problem

T = TypeVar("T")


class ProblemList:
    """The problems found so far. A key that has a problem is not checked again: the next message would confuse."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        self._keys = {problem.key for problem in self.problems}

    def has(self, key: str) -> bool:
        return key in self._keys

    def has_below(self, key: str) -> bool:
        """Whether this key or a key below it has a problem."""
        return any(other.startswith(key) for other in self._keys)

    def add(self, *problems: Problem) -> None:
        self.problems += problems
        self._keys |= {problem.key for problem in problems}

    def check(self, key: str, value: object, holds: bool, expected: str) -> None:
        """Add a problem unless the condition holds."""
        if not holds and not self.has(key):
            self.add(Problem(key, f"got {value!r}, expected {expected}"))

    def attempt(self, key: str, action: Callable[[], T], expected: str) -> T | None:
        """The result of the action; None if it raises ValueError, LookupError or OSError, which adds a problem, and if
        the key has a problem already."""
        if self.has(key):
            return None
        try:
            return action()
        except (ValueError, LookupError, OSError) as error:
            self.add(Problem(key, f"got {error}, expected {expected}"))
            return None
