"""The durations of finished jobs, the estimates of remaining work, and the slot time that sharing saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.job import Job, Success
from jobs.recipe import Recipe
from jobs.technique import Technique
from orchestrator.study.events import StudyPlan
from orchestrator.study.latency_estimate import TIMING_SECONDS


@dataclass
class MeanDuration:
    """The mean duration of one kind of work, per job and per unit of work."""

    seconds: float = 0.0
    """Total of all jobs."""
    count: int = 0
    work: float = 0.0
    """Total of the quantity that the duration is proportional to, such as updates of the weights."""

    @property
    def mean(self) -> float:
        """Mean duration of a job in seconds; 0 before the first one."""
        return self.seconds / self.count if self.count else 0.0

    def expected(self, work: float) -> float:
        """Return the expected duration of this amount of work in seconds."""
        return self.seconds / self.work * work

    def add(self, seconds: float, work: float = 1) -> None:
        self.seconds += seconds
        self.count += 1
        self.work += work


@dataclass(frozen=True)
class RemainingWork:
    """The work that is still needed for the front if no more candidates are proposed."""

    recipes: Sequence[Recipe]
    """Models that must be built for open candidates."""
    open_candidates: int
    full_evaluations: int
    """Number of candidates that may be on the front and were not measured on the full evaluation."""
    timings: int


class DurationModel:
    """The mean durations of each technique, of a measurement on the first rung, and of a timing."""

    def __init__(self, plan: StudyPlan) -> None:
        self._plan = plan
        self._techniques: dict[str, MeanDuration] = {}
        self._measurements = MeanDuration()
        self._timings = MeanDuration()

    def record(self, job: Job, success: Success, built: bool) -> None:
        """Add the durations of a job. built: the job built the model, which did not exist before.

        Jobs of the original are skipped: it is not built, and it is measured and timed in one job.
        """
        if not job.recipe.steps:
            return
        if built and success.seconds > 0:
            step = job.recipe.steps[-1]
            self._techniques.setdefault(step.name(), MeanDuration()).add(success.seconds, _work(step))
        if job.meters == self._plan.meters and job.fidelity == self._plan.rungs[0]:
            self._measurements.add(success.measurement.seconds)
        if job.meters == self._plan.timers:
            self._timings.add(success.measurement.seconds)

    def seconds(self, recipes: Sequence[Recipe]) -> float:
        """Return the expected slot time of the last step of each recipe plus one measurement.

        A technique that was not used yet is expected to take as long as the mean of the others. Before any job has
        finished, each step and the measurement count 1.
        """
        typical = self._typical_step_seconds()
        total = 0.0
        for recipe in recipes:
            step = recipe.steps[-1]
            technique = self._techniques.get(step.name())
            total += typical if technique is None else technique.expected(_work(step))
        return (self._measurements.mean or typical) + total

    def _typical_step_seconds(self) -> float:
        means = [technique.mean for technique in self._techniques.values()]
        if not means:
            means = [self._measurements.mean or 1.0]
        return sum(means) / len(means)

    def seconds_to_finish(self, work: RemainingWork, original_seconds: float, slots: int) -> float:
        """Return the expected wall-clock time of this work in seconds.

        Models and evaluations use all slots; timings run one after the other. original_seconds: the duration of the
        original's job, which contains a full evaluation and the timings.
        """
        open_seconds = 0.0
        if work.open_candidates:
            open_seconds = self.seconds(work.recipes) + (work.open_candidates - 1) * self._measurements.mean
        # An upper bound: the full evaluation takes at most as much longer as it is larger than the first rung.
        full_seconds = min(
            original_seconds, self._measurements.mean / self._plan.rungs[0] or original_seconds
        )
        timing_seconds = self._timings.mean or max(
            original_seconds - full_seconds, min(original_seconds, TIMING_SECONDS)
        )
        parallel_seconds = open_seconds + work.full_evaluations * full_seconds
        return parallel_seconds / slots + work.timings * timing_seconds


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


def _work(step: Technique) -> int:
    """The quantity that the duration of a step is proportional to: its updates of the weights, if it has any."""
    return max(1, step.updates)
