"""Cost meters: node hours and prices, the bill after a killed process, and a study that its budget ends."""

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

GPU, HEAD, UNPRICED = (
    NodeType("g6.2xlarge", "us-east-1", spot=True),
    NodeType("m7i.large", "us-east-1"),
    NodeType(),
)


class Cluster(InlineExecutor):
    """Runs jobs inline and reports the nodes that the test sets."""

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


class RecordedPrices:
    """Returns prices of the test's node types and records each requested type."""

    def __init__(self) -> None:
        self.kinds: list[NodeType] = []

    def __call__(self, kind: NodeType) -> Price | None:
        self.kinds.append(kind)
        prices = {
            GPU: Price(0.6, "USD", "EC2", "2026-11-23"),
            HEAD: Price(0.1, "USD", "a table", "2026-09-24", True),
        }
        return prices.get(kind)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.db")


def test_nodes_are_counted_every_few_seconds_and_each_price_is_requested_once(ledger: Ledger) -> None:
    cluster, clock, prices = Cluster({HEAD: 1}), Clock(), RecordedPrices()
    meter = CostMeter(ledger, cluster, Budget(), None, clock, prices)
    clock.seconds += 1
    assert not meter.turn()
    cluster.up = {HEAD: 1, GPU: 2}
    clock.seconds += HOUR - 1
    assert meter.turn()
    clock.seconds += HOUR
    assert meter.turn()
    assert meter.bill.node_hours == pytest.approx(1 + 3)
    assert meter.bill.money == pytest.approx(2 * 0.1 + 2 * 0.6)
    assert prices.kinds == [HEAD, GPU]
    head, gpu = meter.bill.nodes
    assert (head.kind, head.at_most, head.source) == ("m7i.large in us-east-1", True, "a table")
    assert (gpu.kind, gpu.at_most, gpu.date) == ("g6.2xlarge in us-east-1 (spot)", False, "2026-11-23")


def test_a_bill_resumes_after_a_kill_without_the_time_in_between(
    ledger: Ledger,
) -> None:
    clock = Clock()
    first = CostMeter(ledger, Cluster({GPU: 1}), Budget(), None, clock, RecordedPrices())
    clock.seconds += HOUR
    first.turn()
    clock.seconds += 4  # the process is killed: the seconds since its last turn are lost
    clock.seconds += 10 * HOUR
    second = CostMeter(ledger, Cluster({GPU: 1}), Budget(), None, clock, RecordedPrices())
    assert second.bill.node_hours == pytest.approx(1.0)
    clock.seconds += HOUR
    second.turn()
    assert second.bill.node_hours == pytest.approx(2.0)
    assert second.bill.seconds == pytest.approx(2 * HOUR)
    assert noted_bill(ledger) == second.bill


def test_a_price_in_the_study_needs_no_request_and_applies_to_earlier_node_hours(ledger: Ledger) -> None:
    clock, prices = Clock(), RecordedPrices()
    unpriced_meter = CostMeter(ledger, Cluster({UNPRICED: 1}), Budget(), None, clock, prices)
    clock.seconds += HOUR
    unpriced_meter.turn()
    assert unpriced_meter.bill.money is None
    priced_meter = CostMeter(ledger, Cluster({UNPRICED: 1, GPU: 1}), Budget(), 3.0, clock, prices)
    clock.seconds += HOUR
    priced_meter.turn()
    assert priced_meter.bill.money == pytest.approx(9.0)
    assert prices.kinds == [UNPRICED]


def test_node_hours_are_stored_at_the_end_even_if_the_cluster_is_removed(ledger: Ledger) -> None:
    cluster, clock = Cluster({GPU: 2}), Clock()
    meter = CostMeter(ledger, cluster, Budget(), None, clock, RecordedPrices())
    clock.seconds += HOUR
    cluster.nodes = lambda: pytest.fail("the removed cluster was queried")  # type: ignore[method-assign]
    meter.settle()
    assert noted_bill(ledger).node_hours == pytest.approx(2.0)


class NoOutput:
    def record(self, candidate: Candidate) -> None:
        pass

    def turn(self, study: Study) -> None:
        pass


def run_study(
    ready: PreparedStudy, budget: Budget, clock: Clock, seconds: float, executed: list[Job], nodes: int = 1
) -> Study:
    """Run the study with this budget to its end as a new process would; each job takes `seconds`."""
    context = WorkerContext(
        ready.materials, ready.config.store, ready.folder.scratch, ready.folder.path / "cache"
    )

    def do(job: Job) -> Outcome:
        executed.append(job)
        clock.seconds += seconds
        return work(job, context)

    study = Study(ready.plan)
    costs = CostModel.of(ready)
    known_metrics = KnownMetrics(ready, costs, study)
    search_algorithm = search.make("random", ready.space.knobs(), ready.plan.objectives, known_metrics, 0)
    ledger = Ledger(ready.folder.ledger)
    replay(study, ledger, search_algorithm)
    executor = Cluster({GPU: nodes})
    meter = CostMeter(ledger, executor, budget, None, clock, RecordedPrices())
    Service(study, ready, costs, search_algorithm, executor, ledger, NoTracker(), do, NoOutput(), meter).run()
    meter.settle()
    ledger.close()
    return study


@pytest.mark.parametrize("budget", [Budget(hours=1.0), Budget(money=0.6 * 2)])
def test_a_study_ends_with_its_budget_and_resumes_with_a_larger_one(
    prepared: Callable[..., PreparedStudy], budget: Budget
) -> None:
    ready, clock, executed = prepared("search.algorithm=random"), Clock(), list[Job]()
    study = run_study(ready, budget, clock, 1000.0, executed, nodes=2)
    assert study.stage == "done"
    assert study.granted.work == "none"
    assert "is spent" in str(study.exhausted)
    assert 3 <= len(executed) <= 5  # 1000 s each: the fourth ends after the budget, and running jobs may end
    assert study.original.measurement is not None
    executed_later: list[Job] = []
    assert run_study(ready, budget, clock, 1000.0, executed_later, nodes=2).exhausted == study.exhausted
    assert executed_later == []
    extended = run_study(ready, Budget(), clock, 1000.0, executed_later, nodes=2)
    assert extended.exhausted is None
    assert extended.states["measured"] == 6
    assert not {job.id for job in executed} & {job.id for job in executed_later}


def test_an_unknown_price_ends_a_study_with_a_money_budget(
    prepared: Callable[..., PreparedStudy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RecordedPrices, "__call__", lambda self, kind: None)
    ready, executed = prepared("search.algorithm=random"), list[Job]()
    study = run_study(ready, Budget(money=20), Clock(), 1.0, executed)
    assert [job.recipe for job in executed] == [ready.plan.original]
    assert "the price of g6.2xlarge in us-east-1 (spot) is unknown" in str(study.exhausted)


def test_only_hours_in_which_a_study_runs_count(prepared: Callable[..., PreparedStudy]) -> None:
    ready, clock = prepared("search.candidates=1", "search.algorithm=random"), Clock()
    run_study(ready, Budget(), clock, 100.0, [])
    clock.seconds += 1e6
    study = run_study(
        prepared("search.candidates=2", "search.algorithm=random"), Budget(hours=1), clock, 100.0, []
    )
    assert study.granted == BudgetAllowance()
    ledger = Ledger(ready.folder.ledger, read_only=True)
    assert 0 < noted_bill(ledger).seconds < HOUR
