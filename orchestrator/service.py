"""Service: the one loop. Search, Study, Executor, Ledger and Tracker, one event at a time."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.executor import Executor, Resources
from jobs.job import Failure, Job, Outcome
from orchestrator.events import Began, Command, Ended, Event, Exhausted, Record, Run, Started, Tell
from orchestrator.ledger import Ledger
from orchestrator.prepare import Prepared
from orchestrator.search import Search
from orchestrator.study import Study
from orchestrator.tracking import Tracker

WAIT_SECONDS = 1.0
"""How long the loop sleeps at most where nothing ends: how often progress is shown."""

DUPLICATES_IN_A_ROW = 200
"""So many proposals without a new recipe among them, and the space is taken to be exhausted."""

Work = Callable[[Job], Outcome]
Watch = Callable[[Study], None]


@dataclass
class Service:
    """What one process needs to carry a study on. `work` must pickle; `watch` is called after every turn."""

    study: Study
    prepared: Prepared
    search: Search
    executor: Executor
    ledger: Ledger
    tracker: Tracker
    work: Work
    watch: Watch

    def run(self) -> None:
        """Carry the study on to its end. Interrupted anywhere, the next `run` of a new process goes on there."""
        self._take(Began())
        while self.study.stage != "done":
            self._propose()
            for ended in self.executor.wait(WAIT_SECONDS):
                job_id, _, attempt = ended.key.rpartition("#")
                outcome = ended.value
                if ended.lost is not None:
                    outcome = Failure("preempted" if ended.preempted else "bug", ended.lost)
                self._take(Ended(job_id, int(attempt), outcome))
            self.watch(self.study)

    def _propose(self) -> None:
        duplicates = 0
        while self.study.wants(self.executor.slots):
            try:
                asked = self.search.ask(1)
            except LookupError as error:
                self._take(Exhausted(str(error)))
                return
            if not asked:
                self._take(Exhausted("every choice of the space was proposed"))
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
                self._take(Exhausted(f"{duplicates} proposals in a row brought no new recipe"))
                return

    def _take(self, event: Event) -> None:
        """Record the event, then decide, then act: a kill between any two loses nothing."""
        self.ledger.append(event)
        self._carry_out(self.study.handle(event))

    def _carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Run):
                self._run(command)
            elif isinstance(command, Tell):
                self.search.tell([(command.choices, command.result)])
            elif isinstance(command, Record):
                self.tracker.record(command.candidate)

    def _run(self, command: Run) -> None:
        self._take(Started(command.job.id, command.attempt))
        resources = Resources(memory_gib=self.prepared.memory_gib(command.job), exclusive=command.alone)
        self.executor.submit(
            f"{command.job.id}#{command.attempt}", self.work, command.job, resources=resources
        )


def replayed(prepared: Prepared, ledger: Ledger, search: Search) -> Study:
    """The study as the ledger holds it, the search told of all that has ended."""
    study = Study(prepared.plan)
    for _, event in ledger.events():
        for command in study.handle(event):
            if isinstance(command, Tell):
                search.tell([(command.choices, command.result)])
    return study


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold a study's folder against a second service. BlockingIOError where another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
