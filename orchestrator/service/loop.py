"""The event loop of a study: it connects search, study, executor, ledger and tracker, one event at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from cluster.executors.executor import Executor
from cluster.executors.task import TaskResult
from jobs.job import Failure, Job, Outcome
from orchestrator.persistence.ledger import Ledger
from orchestrator.planning.candidates import propose
from orchestrator.planning.cost import CostModel
from orchestrator.planning.job_resources import JobResources
from orchestrator.planning.prepared_study import PreparedStudy
from orchestrator.search.search import Search
from orchestrator.service.cost_meter import CostMeter
from orchestrator.study.budget import Budget
from orchestrator.study.candidate import Candidate
from orchestrator.study.events import (
    AttemptEnded,
    AttemptStarted,
    BudgetAllowance,
    Cancel,
    CandidateStopped,
    Command,
    Event,
    Record,
    Run,
    SearchExhausted,
    ServiceStarted,
    SlotsChanged,
    Tell,
)
from orchestrator.study.study import Study
from orchestrator.tracking import Tracker
from orchestrator.worker.work import forget_training

WAIT_SECONDS = 1.0
"""The longest wait for a result: how often progress is shown if no job ends."""

DUPLICATES_IN_A_ROW = 200
"""After this many proposals in a row without a new recipe the space is assumed to be exhausted."""

HOPELESS = 0.001
"""A running candidate with a lower probability of improving the front is stopped. The probability is computed after
every result; a limit of 0.01 would stop too many candidates that would have improved the front (docs/search.md)."""

ALLOWED = ("none", "finish_pending", "all")
"""The work that a budget may allow, in increasing order."""

Work = Callable[[Job], Outcome | None]
"""Does a job. Ranks other than the first return None."""


class Watch(Protocol):
    """Observes a study. Its calls block the loop."""

    def record(self, candidate: Candidate) -> None:
        """Called when a candidate ended or was timed, after the study has processed it."""

    def turn(self, study: Study) -> None:
        """Called once in each iteration of the loop."""


@dataclass
class Service:
    """The state that one process needs to run a study."""

    study: Study
    prepared: PreparedStudy
    costs: CostModel
    search: Search
    executor: Executor
    ledger: Ledger
    tracker: Tracker
    work: Work
    """Must pickle: it is sent to workers."""
    watch: Watch
    meter: CostMeter | None = None
    """Counts the cost; None if no budget applies."""
    resources: JobResources = field(init=False)

    def __post_init__(self) -> None:
        self.resources = JobResources.for_study(self.prepared)

    def run(self) -> None:
        """Run the study to its end. If this is interrupted anywhere, `run` of a new process resumes there."""
        self._take(ServiceStarted(self.executor.slots, self._allowance()))
        while self.study.stage != "done":
            self._update_allowance()
            if self.study.slots != self.executor.slots:
                self._take(SlotsChanged(self.executor.slots))
            self._propose()
            results = self.executor.wait(WAIT_SECONDS)
            self._take(*map(_attempt_ended, results))
            if results:
                self._stop_hopeless_candidates()
            self.watch.turn(self.study)

    def _allowance(self) -> BudgetAllowance:
        if self.meter is None or self.meter.budget == Budget():
            return BudgetAllowance()
        return self.meter.granted(self.study.seconds_to_finish)

    def _update_allowance(self) -> None:
        """Reduce the allowed work as the budget is used up. It is increased only when a new process starts."""
        if self.meter is None or not self.meter.turn():
            return
        allowance = self._allowance()
        if ALLOWED.index(allowance.work) < ALLOWED.index(self.study.granted.work):
            self._take(allowance)

    def _propose(self) -> None:
        duplicates = 0
        while self.study.wants(self.executor.slots):
            try:
                choices = self.search.ask(1)
            except LookupError as error:
                self._take(SearchExhausted(str(error)))
                return
            if not choices:
                self._take(SearchExhausted("every choice of the space was proposed"))
                return
            proposal = propose(self.prepared, self.costs, choices[0])
            if proposal.recipe.id not in self.study.candidates:
                duplicates = 0
                self._take(proposal)
                continue
            # Choices that differ only in knobs of skipped stages make the same candidate. The search receives its
            # result again; the ledger does not record it, and it does not count as a candidate.
            duplicates += 1
            self._carry_out(self.study.handle(proposal))
            if duplicates >= DUPLICATES_IN_A_ROW:
                self._take(SearchExhausted(f"{duplicates} proposals in a row brought no new recipe"))
                return

    def _stop_hopeless_candidates(self) -> None:
        """Stop the candidates that will hardly improve the front, by the current model of the search."""
        pending = self.study.stoppable
        if not pending:
            return
        chances = self.search.probability_of_improvement([candidate.choices for candidate in pending])
        for candidate, chance in zip(pending, chances, strict=True):
            if chance < HOPELESS:
                reason = f"its chance to add to the front was down to {chance:.2%}"
                self._take(CandidateStopped(candidate.id, reason))

    def _take(self, *events: Event) -> None:
        """Record events and the attempts that they start, then act: a kill at any point loses nothing. State of the
        study that comes from unrecorded events is lost with its process."""
        if not events:
            return
        commands: list[Command] = []
        with self.ledger.transaction():
            for event in events:
                commands += self._decide(event)
        self._carry_out(commands)

    def _decide(self, event: Event) -> list[Command]:
        """Record one event. Returns its commands, and those of the attempts that it starts."""
        self.ledger.append(event)
        commands: list[Command] = []
        for command in self.study.handle(event):
            commands.append(command)
            if isinstance(command, Run):
                commands += self._decide(AttemptStarted(command.job.id, command.attempt))
        return commands

    def _carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Run):
                self._run(command)
            elif isinstance(command, Cancel):
                self._cancel(command)
            elif isinstance(command, Tell):
                self.search.tell([(command.choices, command.result)])
            elif isinstance(command, Record):
                self.tracker.record(command.candidate)
                self.watch.record(command.candidate)

    def _run(self, command: Run) -> None:
        resources = self.resources.of(command.job, command.exclusive, self.executor.slots)
        key = f"{command.job.id}#{command.attempt}"
        self.executor.submit(key, self.work, command.job, resources=resources)

    def _cancel(self, command: Cancel) -> None:
        self.executor.cancel(f"{command.job.id}#{command.attempt}")
        forget_training(command.job.recipe, self.prepared.folder.checkpoints, self.prepared.config.store)


def _attempt_ended(result: TaskResult) -> AttemptEnded:
    """The event for a result of the executor."""
    job_id, _, attempt = result.key.rpartition("#")
    outcome = result.value
    if result.error is not None:
        outcome = Failure("preempted" if result.preempted else "bug", result.error)
    return AttemptEnded(job_id, int(attempt), outcome)


def replay(study: Study, ledger: Ledger, search: Search) -> None:
    """Restore a new study from its ledger, and tell the search all results."""
    for _, event in ledger.events():
        for command in study.handle(event):
            if isinstance(command, Tell):
                search.tell([(command.choices, command.result)])
