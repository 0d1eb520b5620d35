"""The service loop with hopeless candidates: cancellation, ledger entries, and the state after a kill."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from cluster.executors.inline import InlineExecutor
from cluster.executors.task import TaskResult
from jobs.job import Job, Outcome
from jobs.knobs import Value
from jobs.recipe import Recipe
from orchestrator.persistence.ledger import Ledger
from orchestrator.planning.cost import CostModel
from orchestrator.planning.prepared_study import PreparedStudy
from orchestrator.search.search import Choices, Result
from orchestrator.service.loop import Service, replay
from orchestrator.service.status import line, status_of
from orchestrator.study import study as studies
from orchestrator.study.candidate import Candidate
from orchestrator.study.events import CandidateStopped, Event, ServiceStarted, SlotsChanged
from orchestrator.study.study import Study
from orchestrator.tracking import NoTracker
from orchestrator.worker.work import WorkerContext, work

SKIPPED: dict[str, Value] = {
    "depth": "skip", "depth.drop_layers.count": 1, "width": "skip", "width.prune_ffn.ratio": 0.2,
    "bits": "rtn", "bits.rtn.bits": 8, "bits.rtn.group": 32,
}  # fmt: skip
FIRST, DOOMED = SKIPPED, {**SKIPPED, "width": "prune_ffn"}


class ListSearch:
    """Proposes choices of a list; reports that `doomed` has no chance as soon as it received a result."""

    def __init__(self, choices: Sequence[Choices], doomed: Choices) -> None:
        self._remaining, self._doomed = list(choices), doomed
        self.results: list[Result] = []

    def ask(self, n: int) -> list[dict[str, Value]]:
        proposed, self._remaining = self._remaining[:n], self._remaining[n:]
        return [dict(choices) for choices in proposed]

    def tell(self, results: Sequence[Result]) -> None:
        self.results += results

    def probability_of_improvement(self, pending: Sequence[Choices]) -> list[float]:
        probabilities = []
        for choices in pending:
            hopeless = self.results and choices == self._doomed
            probabilities.append(0.0 if hopeless else 1.0)
        return probabilities


class NoOutput:
    def record(self, candidate: Candidate) -> None:
        pass

    def turn(self, study: Study) -> None:
        pass


class KilledError(Exception):
    """Stands for the end of the process."""


class DyingLedger(Ledger):
    """A ledger whose process dies directly after it committed the stop of a candidate."""

    stopped = False

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with super().transaction():
            yield
        if self.stopped:
            raise KilledError

    def append(self, event: Event) -> None:
        super().append(event)
        self.stopped = isinstance(event, CandidateStopped)


def service(
    ready: PreparedStudy, ledger: Ledger, search_algorithm: ListSearch, executed: list[Job]
) -> Service:
    context = WorkerContext(
        ready.materials, ready.config.store, ready.folder.scratch, ready.folder.path / "cache"
    )

    def do(job: Job) -> Outcome:
        executed.append(job)
        return work(job, context)

    study = Study(ready.plan)
    replay(study, ledger, search_algorithm)
    executor = InlineExecutor(slots=2)
    return Service(
        study, ready, CostModel.of(ready), search_algorithm, executor, ledger, NoTracker(), do, NoOutput()
    )


def recipe(ready: PreparedStudy, choices: Choices) -> Recipe:
    return ready.space.recipe(ready.plan.original.origin, choices)


@pytest.fixture
def ready(prepared: Callable[..., PreparedStudy], monkeypatch: pytest.MonkeyPatch) -> PreparedStudy:
    monkeypatch.setattr(studies, "WORTH_STOPPING_SECONDS", 0.0)  # the jobs of a tiny model take less time
    return prepared("search.candidates=2")


def test_a_hopeless_candidate_is_cancelled_cleaned_up_and_recorded(ready: PreparedStudy) -> None:
    doomed = recipe(ready, DOOMED)
    search_algorithm, executed = ListSearch([FIRST, DOOMED], DOOMED), list[Job]()
    ledger = Ledger(ready.folder.ledger)
    checkpoint = ready.folder.checkpoints / recipe(ready, {**DOOMED, "bits": "skip"}).id
    checkpoint.mkdir(parents=True)
    loop = service(ready, ledger, search_algorithm, executed)
    loop.run()
    assert [job.recipe for job in executed] == [ready.plan.original, recipe(ready, FIRST)]
    assert loop.executor.wait() == []
    assert (DOOMED, None) in search_algorithm.results
    assert not checkpoint.exists()
    candidate = loop.study.candidates[doomed.id]
    assert (candidate.state, candidate.stopped) == (
        "stopped",
        "its chance to add to the front was down to 0.00%",
    )
    assert CandidateStopped(doomed.id, candidate.stopped) in [event for _, event in ledger.events()]
    assert loop.study.proposed == 2
    status = status_of("tiny", loop.study, None, 0.0, 0)
    assert (status.measured, status.stopped, status.ended) == (2, 1, 3)
    assert "1 stopped" in line(status)


def test_a_process_killed_before_the_cancellation_does_not_run_the_stopped_candidate_after_a_restart(
    ready: PreparedStudy,
) -> None:
    doomed = recipe(ready, DOOMED)
    executed: list[Job] = []
    ledger = DyingLedger(ready.folder.ledger)
    with pytest.raises(KilledError):
        service(ready, ledger, ListSearch([FIRST, DOOMED], DOOMED), executed).run()
    ledger.close()
    search_algorithm = ListSearch([], DOOMED)
    resumed = service(ready, Ledger(ready.folder.ledger), search_algorithm, executed)
    resumed.run()
    assert resumed.study.stage == "done"
    assert resumed.study.candidates[doomed.id].state == "stopped"
    assert (DOOMED, None) in search_algorithm.results
    assert [job.recipe for job in executed] == [ready.plan.original, recipe(ready, FIRST)]


def test_the_study_uses_the_slots_of_a_growing_cluster(ready: PreparedStudy) -> None:
    class Growing(InlineExecutor):
        """An executor that gains one slot after each turn."""

        def wait(self, timeout: float | None = None) -> list[TaskResult]:
            self._slots += 1
            return super().wait(timeout)

    ledger = Ledger(ready.folder.ledger)
    loop = service(ready, ledger, ListSearch([FIRST, DOOMED], {}), [])
    loop.executor = Growing(slots=1)
    loop.run()
    slots = [event.slots for _, event in ledger.events() if isinstance(event, ServiceStarted | SlotsChanged)]
    assert slots == list(range(1, len(slots) + 1))
    assert len(slots) > 2
    assert loop.study.slots == slots[-1]


def test_a_candidate_with_a_chance_is_not_stopped(ready: PreparedStudy) -> None:
    executed: list[Job] = []
    loop = service(ready, Ledger(ready.folder.ledger), ListSearch([FIRST, DOOMED], {}), executed)
    loop.run()
    assert loop.study.states["measured"] == 3
