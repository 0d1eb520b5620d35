"""Savings: the work that sharing has spared a study, by the seconds that the same work took."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Savings:
    """Each part in slot time, as if every candidate had been made alone.

    steps: that candidates have in common with one before them; steps_seconds: what making these took, once each.
    statistics_seconds: what steps would have taken more, had they not found statistics of their parent.
    jobs: whose results the store held; jobs_seconds: what making and measuring them took whoever ran them.
    """

    steps: int = 0
    steps_seconds: float = 0.0
    statistics_seconds: float = 0.0
    jobs: int = 0
    jobs_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return self.steps_seconds + self.statistics_seconds + self.jobs_seconds
