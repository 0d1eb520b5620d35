"""Savings: the slot time that a study saved by sharing work."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from jobs.job import Success


@dataclass(frozen=True)
class Savings:
    """The slot time that was saved, compared with building every candidate from the original by itself."""

    steps: int = 0
    """Number of steps that candidates share with an earlier one."""
    steps_seconds: float = 0.0
    """Time that repeating these steps would have taken."""
    statistics_seconds: float = 0.0
    """Time that steps would have taken in addition without statistics of their parent."""
    jobs: int = 0
    """Number of jobs whose results were already in the store."""
    jobs_seconds: float = 0.0
    """Time that these jobs took when they ran, including their measurements."""

    @property
    def seconds(self) -> float:
        return self.steps_seconds + self.statistics_seconds + self.jobs_seconds

    def plus_job(self, success: Success) -> Savings:
        """Return the savings after this job, apart from those of shared steps."""
        if success.found:
            seconds = self.jobs_seconds + success.seconds + success.measurement.seconds
            return dataclasses.replace(self, jobs=self.jobs + 1, jobs_seconds=seconds)
        statistics_seconds = self.statistics_seconds + success.saved_seconds
        return dataclasses.replace(self, statistics_seconds=statistics_seconds)
