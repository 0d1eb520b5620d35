"""Problems of a study file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class InvalidStudyError(ValueError):
    """All that is wrong with a study, one line each: `file:line key: got X, expected Y`."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = list(lines)


@dataclass(frozen=True)
class Problem:
    """Something wrong with the study: at which key, what was given, what is expected."""

    key: str
    message: str
