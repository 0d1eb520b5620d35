"""Accounts: what is counted and asked for, what a killed process leaves, and a study that its budget ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from cluster.cloud.prices import Price
from cluster.executors.executor import NodeType
from cluster.executors.inline import InlineExecutor
from jobs.job import Job, Outcome
from orchestrator import search
from orchestrator.persistence.ledger import Ledger
from orchestrator.planning.candidates import KnownMetrics
from orchestrator.planning.cost import CostModel
from orchestrator.planning.prepared_study import PreparedStudy
from orchestrator.service.cost_meter import CostMeter, noted_bill
from orchestrator.service.loop import Service, replay
from orchestrator.study.budget import HOUR, Budget
from orchestrator.study.candidate import Candidate
from orchestrator.study.events import BudgetAllowance
from orchestrator.study.study import Study
from orchestrator.tracking import NoTracker
from orchestrator.worker.work import WorkerContext, work

GPU, HEAD, STRANGE = (
    NodeType("g6.2xlarge", "us-east-1", spot=True),
    NodeType("m7i.large", "us-east-1"),
    NodeType(),
)


class Cluster(InlineExecutor):
    """Runs inline, and has the nodes that the test says."""

    def __init__(self, nodes: Mapping[NodeType, int]) -> None:
        super().__init__()
        self.up = dict(nodes)

    def nodes(self) -> Mapping[NodeType, int]:
        return self.up


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


class Asked:
    """Says what the nodes of the test cost; notes who asked."""

    def __init__(self) -> None:
        self.kinds: list[NodeType] = []

    def __call__(self, kind: NodeType) -> Price | None:
        self.kinds.append(kind)
        known = {
            GPU: Price(0.6, "USD", "EC2", "2026-11-23"),
            HEAD: Price(0.1, "USD", "a table", "2026-09-24", True),
        }
        return known.get(kind)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.db")


def test_nodes_are_counted_every_few_seconds_and_each_kinds_price_is_asked_for_once(ledger: Ledger) -> None:
    cluster, clock, asked = Cluster({HEAD: 1}), Clock(), Asked()
    account = CostMeter(ledger, cluster, Budget(), None, clock, asked)
    clock.seconds += 1
    assert not account.turn()
    cluster.up = {HEAD: 1, GPU: 2}
    clock.seconds += HOUR - 1
    assert account.turn()
    clock.seconds += HOUR
    assert account.turn()
    assert account.bill.node_hours == pytest.approx(1 + 3)
    assert account.bill.money == pytest.approx(2 * 0.1 + 2 * 0.6)
    assert asked.kinds == [HEAD, GPU]
    head, gpu = account.bill.nodes
    assert (head.kind, head.at_most, head.source) == ("m7i.large in us-east-1", True, "a table")
    assert (gpu.kind, gpu.at_most, gpu.date) == ("g6.2xlarge in us-east-1 (spot)", False, "2026-11-23")


def test_a_process_goes_on_with_the_bill_of_one_that_was_killed_without_the_time_between(
    ledger: Ledger,
) -> None:
    clock = Clock()
    first = CostMeter(ledger, Cluster({GPU: 1}), Budget(), None, clock, Asked())
    clock.seconds += HOUR
    first.turn()
    clock.seconds += 4  # then it is killed: what was not counted yet is forgotten
    clock.seconds += 10 * HOUR
    second = CostMeter(ledger, Cluster({GPU: 1}), Budget(), None, clock, Asked())
    assert second.bill.node_hours == pytest.approx(1.0)
    clock.seconds += HOUR
    second.turn()
    assert second.bill.node_hours == pytest.approx(2.0)
    assert second.bill.seconds == pytest.approx(2 * HOUR)
    assert noted_bill(ledger) == second.bill


def test_a_price_in_the_study_is_asked_of_nobody_and_holds_for_what_was_used_before(ledger: Ledger) -> None:
    clock, asked = Clock(), Asked()
    before = CostMeter(ledger, Cluster({STRANGE: 1}), Budget(), None, clock, asked)
    clock.seconds += HOUR
    before.turn()
    assert before.bill.money is None
    after = CostMeter(ledger, Cluster({STRANGE: 1, GPU: 1}), Budget(), 3.0, clock, asked)
    clock.seconds += HOUR
    after.turn()
    assert after.bill.money == pytest.approx(9.0)
    assert asked.kinds == [STRANGE]


def test_what_was_used_is_noted_at_the_end_though_the_cluster_is_gone(ledger: Ledger) -> None:
    cluster, clock = Cluster({GPU: 2}), Clock()
    account = CostMeter(ledger, cluster, Budget(), None, clock, Asked())
    clock.seconds += HOUR
    cluster.nodes = lambda: pytest.fail("asked of a cluster that is gone")  # type: ignore[method-assign]
    account.settle()
    assert noted_bill(ledger).node_hours == pytest.approx(2.0)


class Unseen:
    def record(self, candidate: Candidate) -> None:
        pass

    def turn(self, study: Study) -> None:
        pass


def carried_on(
    ready: PreparedStudy, budget: Budget, clock: Clock, seconds: float, done: list[Job], nodes: int = 1
) -> Study:
    """The study, run by a process with such a budget until it ends; each job takes so many seconds."""
    place = WorkerContext(
        ready.materials, ready.config.store, ready.folder.scratch, ready.folder.path / "cache"
    )

    def do(job: Job) -> Outcome:
        done.append(job)
        clock.seconds += seconds
        return work(job, place)

    study = Study(ready.plan)
    costs = CostModel.of(ready)
    known = KnownMetrics(ready, costs, study)
    searching = search.make("random", ready.space.knobs(), ready.plan.objectives, known, 0)
    ledger = Ledger(ready.folder.ledger)
    replay(study, ledger, searching)
    executor = Cluster({GPU: nodes})
    account = CostMeter(ledger, executor, budget, None, clock, Asked())
    Service(study, ready, costs, searching, executor, ledger, NoTracker(), do, Unseen(), account).run()
    account.settle()
    ledger.close()
    return study


@pytest.mark.parametrize("budget", [Budget(hours=1.0), Budget(money=0.6 * 2)])
def test_a_study_ends_with_its_budget_and_goes_on_with_a_larger_one(
    prepared: Callable[..., PreparedStudy], budget: Budget
) -> None:
    ready, clock, done = prepared("search.algorithm=random"), Clock(), list[Job]()
    study = carried_on(ready, budget, clock, 1000.0, done, nodes=2)
    assert study.stage == "done"
    assert study.granted.work == "none"
    assert "is spent" in str(study.exhausted)
    assert 3 <= len(done) <= 5  # 1000 s each: the fourth ends after the budget does, and what runs may end
    assert study.original.measurement is not None
    again: list[Job] = []
    assert carried_on(ready, budget, clock, 1000.0, again, nodes=2).exhausted == study.exhausted
    assert again == []
    more = carried_on(ready, Budget(), clock, 1000.0, again, nodes=2)
    assert more.exhausted is None
    assert more.states["measured"] == 6
    assert not {job.id for job in done} & {job.id for job in again}


def test_what_has_no_price_ends_a_study_that_must_keep_to_money(
    prepared: Callable[..., PreparedStudy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Asked, "__call__", lambda self, kind: None)
    ready, done = prepared("search.algorithm=random"), list[Job]()
    study = carried_on(ready, Budget(money=20), Clock(), 1.0, done)
    assert [job.recipe for job in done] == [ready.plan.original]
    assert "the price of g6.2xlarge in us-east-1 (spot) is unknown" in str(study.exhausted)


def test_hours_are_those_that_a_study_runs(prepared: Callable[..., PreparedStudy]) -> None:
    ready, clock = prepared("search.candidates=1", "search.algorithm=random"), Clock()
    carried_on(ready, Budget(), clock, 100.0, [])
    clock.seconds += 1e6
    study = carried_on(
        prepared("search.candidates=2", "search.algorithm=random"), Budget(hours=1), clock, 100.0, []
    )
    assert study.granted == BudgetAllowance()
    with_bill = Ledger(ready.folder.ledger, read_only=True)
    assert 0 < noted_bill(with_bill).seconds < HOUR
