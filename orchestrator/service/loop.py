"""Service: the one loop. Search, Study, Executor, Ledger and Tracker, one event at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from cluster.executors import executor
from cluster.executors.executor import Executor
from jobs.job import Failure, Job, Outcome
from orchestrator.persistence.ledger import Ledger
from orchestrator.persistence.study_folder import CHECKPOINTS
from orchestrator.planning.prepare import Prepared
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
"""How long the loop sleeps at most where nothing ends: how often progress is shown."""

DUPLICATES_IN_A_ROW = 200
"""So many proposals without a new recipe among them, and the space is taken to be exhausted."""

HOPELESS = 0.001
"""A candidate under way whose chance to add to the front is less is given up. It is asked for after every result, and
so is below 1 in 100 at some time for too many that would have added to the front (docs/search.md)."""

ALLOWED = ("none", "finish_pending", "all")
"""What a budget may allow, the least first."""

Work = Callable[[Job], Outcome | None]
"""None is what ranks but the first return."""


class Watch(Protocol):
    """Looks on. What it does takes time from the loop."""

    def record(self, candidate: Candidate) -> None:
        """What is known of a candidate now: it ended, or was timed. The study has it already."""

    def turn(self, study: Study) -> None:
        """The loop has gone round once."""


@dataclass
class Service:
    """What one process needs to carry a study on. `work` must pickle. account: None where nobody counts the cost."""

    study: Study
    prepared: Prepared
    search: Search
    executor: Executor
    ledger: Ledger
    tracker: Tracker
    work: Work
    watch: Watch
    account: CostMeter | None = None

    def run(self) -> None:
        """Carry the study on to its end. Interrupted anywhere, the next `run` of a new process goes on there."""
        self._take(ServiceStarted(self.executor.slots, self._granted()))
        while self.study.stage != "done":
            self._mind_the_budget()
            if self.study.slots != self.executor.slots:
                self._take(SlotsChanged(self.executor.slots))
            self._propose()
            news = self.executor.wait(WAIT_SECONDS)
            self._take(*map(_event, news))
            if news:
                self._stop()
            self.watch.turn(self.study)

    def _granted(self) -> BudgetAllowance:
        """What the budget allows now."""
        if self.account is None or self.account.budget == Budget():
            return BudgetAllowance()
        return self.account.granted(self.study.seconds_to_finish)

    def _mind_the_budget(self) -> None:
        """Allow less when the budget comes to its end; more only when a process takes the study up."""
        if self.account is None or not self.account.turn():
            return
        now, before = self._granted(), self.study.granted
        if ALLOWED.index(now.work) < ALLOWED.index(before.work):
            self._take(now)

    def _propose(self) -> None:
        duplicates = 0
        while self.study.wants(self.executor.slots):
            try:
                asked = self.search.ask(1)
            except LookupError as error:
                self._take(SearchExhausted(str(error)))
                return
            if not asked:
                self._take(SearchExhausted("every choice of the space was proposed"))
                return
            proposal = self.prepared.propose(asked[0])
            if proposal.recipe.id not in self.study.candidates:
                duplicates = 0
                self._take(proposal)
                continue
            # Choices that differ only in the knobs of skipped stages are one candidate: it is told, not counted.
            duplicates += 1
            self._carry_out(self.study.handle(proposal))
            if duplicates >= DUPLICATES_IN_A_ROW:
                self._take(SearchExhausted(f"{duplicates} proposals in a row brought no new recipe"))
                return

    def _stop(self) -> None:
        """Give up who can hardly add to the front any more, by what the search believes now."""
        awaited = self.study.stoppable
        if not awaited:
            return
        chances = self.search.probability_of_improvement([candidate.choices for candidate in awaited])
        for candidate, chance in zip(awaited, chances, strict=True):
            if chance < HOPELESS:
                reason = f"its chance to add to the front was down to {chance:.2%}"
                self._take(CandidateStopped(candidate.id, reason))

    def _take(self, *events: Event) -> None:
        """Record the events and what is to start because of them, then act: a kill between any two loses nothing. What
        the study knew of events that were not recorded yet, it forgets with its process."""
        if not events:
            return
        with self.ledger.together():
            commands = [command for event in events for command in self._decide(event)]
        self._carry_out(commands)

    def _decide(self, event: Event) -> list[Command]:
        """Record one event; what it asks for, with what that starts."""
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
        resources = self.prepared.resources(command.job, command.exclusive, self.executor.slots)
        key = f"{command.job.id}#{command.attempt}"
        self.executor.submit(key, self.work, command.job, resources=resources)

    def _cancel(self, command: Cancel) -> None:
        self.executor.cancel(f"{command.job.id}#{command.attempt}")
        forget_training(command.job.recipe, self.prepared.folder / CHECKPOINTS, self.prepared.config.store)


def _event(ended: executor.Ended) -> AttemptEnded:
    """What the executor reports, as the study takes it."""
    job_id, _, attempt = ended.key.rpartition("#")
    outcome = ended.value
    if ended.error is not None:
        outcome = Failure("preempted" if ended.preempted else "bug", ended.error)
    return AttemptEnded(job_id, int(attempt), outcome)


def replay(study: Study, ledger: Ledger, search: Search) -> None:
    """Bring a new study to where the ledger is, and tell the search of all that has ended."""
    for _, event in ledger.events():
        for command in study.handle(event):
            if isinstance(command, Tell):
                search.tell([(command.choices, command.result)])
