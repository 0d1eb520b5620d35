"""The loop where candidates become hopeless: what is ended, what is written down, what a kill leaves."""

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


class Listed:
    """Asks for choices of a list; says that one of them has no chance as soon as anything was told."""

    def __init__(self, choices: Sequence[Choices], doomed: Choices) -> None:
        self._left, self._doomed = list(choices), doomed
        self.told: list[Result] = []

    def ask(self, n: int) -> list[dict[str, Value]]:
        asked, self._left = self._left[:n], self._left[n:]
        return [dict(one) for one in asked]

    def tell(self, results: Sequence[Result]) -> None:
        self.told += results

    def probability_of_improvement(self, awaited: Sequence[Choices]) -> list[float]:
        return [0.0 if self.told and one == self._doomed else 1.0 for one in awaited]


class Unseen:
    def record(self, candidate: Candidate) -> None:
        pass

    def turn(self, study: Study) -> None:
        pass


class Killed(Exception):  # noqa: N818 - it stands for the end of the process
    pass


class MortalLedger(Ledger):
    """Its process dies when it has just written down for good that a candidate is stopped."""

    stopped = False

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with super().transaction():
            yield
        if self.stopped:
            raise Killed

    def append(self, event: Event) -> None:
        super().append(event)
        self.stopped = isinstance(event, CandidateStopped)


def service(ready: PreparedStudy, ledger: Ledger, searching: Listed, done: list[Job]) -> Service:
    place = WorkerContext(
        ready.materials, ready.config.store, ready.folder.scratch, ready.folder.path / "cache"
    )

    def do(job: Job) -> Outcome:
        done.append(job)
        return work(job, place)

    study = Study(ready.plan)
    replay(study, ledger, searching)
    executor = InlineExecutor(slots=2)
    return Service(study, ready, CostModel.of(ready), searching, executor, ledger, NoTracker(), do, Unseen())


def recipe(ready: PreparedStudy, choices: Choices) -> Recipe:
    return ready.space.recipe(ready.plan.original.origin, choices)


@pytest.fixture
def ready(prepared: Callable[..., PreparedStudy], monkeypatch: pytest.MonkeyPatch) -> PreparedStudy:
    monkeypatch.setattr(studies, "WORTH_STOPPING_SECONDS", 0.0)  # a tiny model's jobs take less
    return prepared("search.candidates=2")


def test_a_hopeless_candidate_is_ended_forgotten_and_written_down(ready: PreparedStudy) -> None:
    doomed = recipe(ready, DOOMED)
    searching, done = Listed([FIRST, DOOMED], DOOMED), list[Job]()
    ledger = Ledger(ready.folder.ledger)
    left = ready.folder.checkpoints / recipe(ready, {**DOOMED, "bits": "skip"}).id
    left.mkdir(parents=True)
    running = service(ready, ledger, searching, done)
    running.run()
    assert [job.recipe for job in done] == [ready.plan.original, recipe(ready, FIRST)]
    assert running.executor.wait() == []
    assert (DOOMED, None) in searching.told
    assert not left.exists()
    one = running.study.candidates[doomed.id]
    assert (one.state, one.stopped) == ("stopped", "its chance to add to the front was down to 0.00%")
    assert CandidateStopped(doomed.id, one.stopped) in [event for _, event in ledger.events()]
    assert running.study.proposed == 2
    status = status_of("tiny", running.study, None, 0.0, 0)
    assert (status.measured, status.stopped, status.ended) == (2, 1, 3)
    assert "1 stopped" in line(status)


def test_killed_before_it_could_end_what_is_stopped_the_next_process_does_not_run_it(
    ready: PreparedStudy,
) -> None:
    doomed = recipe(ready, DOOMED)
    done: list[Job] = []
    ledger = MortalLedger(ready.folder.ledger)
    with pytest.raises(Killed):
        service(ready, ledger, Listed([FIRST, DOOMED], DOOMED), done).run()
    ledger.close()
    searching = Listed([], DOOMED)
    again = service(ready, Ledger(ready.folder.ledger), searching, done)
    again.run()
    assert again.study.stage == "done"
    assert again.study.candidates[doomed.id].state == "stopped"
    assert (DOOMED, None) in searching.told
    assert [job.recipe for job in done] == [ready.plan.original, recipe(ready, FIRST)]


def test_the_study_follows_a_cluster_that_turns_out_to_be_larger(ready: PreparedStudy) -> None:
    class Growing(InlineExecutor):
        """Could have one slot more after each turn."""

        def wait(self, timeout: float | None = None) -> list[TaskResult]:
            self._slots += 1
            return super().wait(timeout)

    ledger = Ledger(ready.folder.ledger)
    running = service(ready, ledger, Listed([FIRST, DOOMED], {}), [])
    running.executor = Growing(slots=1)
    running.run()
    told = [event.slots for _, event in ledger.events() if isinstance(event, ServiceStarted | SlotsChanged)]
    assert told == list(range(1, len(told) + 1))
    assert len(told) > 2
    assert running.study.slots == told[-1]


def test_who_has_a_chance_is_not_stopped(ready: PreparedStudy) -> None:
    done: list[Job] = []
    running = service(ready, Ledger(ready.folder.ledger), Listed([FIRST, DOOMED], {}), done)
    running.run()
    assert running.study.states["measured"] == 3
