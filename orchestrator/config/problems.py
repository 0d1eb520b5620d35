"""The problems of a study file, and the error that reports them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class InvalidStudyError(ValueError):
    """Every problem of a study, one line each: `file:line key: got X, expected Y`."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = list(lines)


@dataclass(frozen=True)
class Problem:
    """A problem at one key of a study file."""

    key: str
    message: str
    """`got X, expected Y`."""
