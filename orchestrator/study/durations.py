"""How long jobs took, and how long jobs of their kind will take."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.technique import Technique


@dataclass
class TechniqueDuration:
    """How long something took so far. work: in all, in what its time grows with."""

    seconds: float = 0.0
    count: int = 0
    work: float = 0.0

    @property
    def mean(self) -> float:
        return self.seconds / self.count if self.count else 0.0

    def of(self, work: float) -> float:
        """What so much work is expected to take."""
        return self.seconds / self.work * work

    def add(self, seconds: float, work: float = 1) -> None:
        self.seconds += seconds
        self.count += 1
        self.work += work


def work_of(step: Technique) -> int:
    return max(1, step.updates)
