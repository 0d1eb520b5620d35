"""WorkerPlan: requests, releases and assignments of workers, decided without processes and clock."""

from __future__ import annotations

import random as randoms

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.executors.autoscaling import (
    AGAIN_SECONDS,
    FIRST_LIMIT,
    GROUP,
    LINGER_SECONDS,
    CapacityEstimator,
    Node,
    Shape,
    WorkerPlan,
    label_set,
)
from cluster.executors.executor import Capacity, Resources

ANY: frozenset[tuple[str, str]] = frozenset()
LAPTOP = {"target": "laptop"}


class Cluster:
    """A plan whose requests are carried out, with its own clock: a worker gets a node when `give_node` is called."""

    def __init__(self, limit: int = 100, node_capacity: Capacity | None = None) -> None:
        self.plan = WorkerPlan(node_capacity)
        self.limits: dict[frozenset[tuple[str, str]], int] = {ANY: limit}
        self.now = 0.0
        self.requested: list[int] = []
        self.shapes: dict[int, Shape] = {}
        self.running: dict[int, tuple[int, ...]] = {}
        self.started, self.added = 0, 0

    def add(self, *needs: Resources) -> None:
        for task in needs:
            self.plan.add(self.added, task, self.now)
            self.added += 1
        self.step()

    def step(self) -> None:
        while (assigned := self.plan.next(self.now)) is not None:
            ticket, workers = assigned
            self.running[ticket] = workers
        change = self.plan.change(self.limits, self.now)
        for worker in change.release:
            self.plan.remove(worker)
            self.requested = [number for number in self.requested if number != worker]
        for shape in change.request:
            self.plan.request(self.started, shape)
            self.requested.append(self.started)
            self.shapes[self.started] = shape
            self.started += 1

    def give_node(self, node: Node) -> int:
        """Give the worker that was requested first a node."""
        worker = self.requested.pop(0)
        self.plan.ready(worker, node, self.now)
        self.step()
        return worker

    def end(self, ticket: int) -> None:
        del self.running[ticket]
        self.plan.end(ticket, self.now)
        self.step()

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.step()

    @property
    def workers(self) -> int:
        return self.plan.count({})


def nodes(count: int) -> list[Node]:
    return [Node(f"node {number}") for number in range(count)]


def test_a_worker_is_requested_for_each_waiting_task_up_to_the_limit_of_the_cluster() -> None:
    cluster = Cluster(limit=3)
    cluster.add(*[Resources()] * 2)
    assert cluster.workers == 2
    cluster.add(*[Resources()] * 5)
    assert cluster.workers == 3


def test_tasks_start_only_on_workers_that_have_a_node() -> None:
    cluster = Cluster()
    cluster.add(Resources(), Resources())
    assert not cluster.running
    worker = cluster.give_node(Node("a"))
    assert list(cluster.running.values()) == [(worker,)]


def test_a_worker_with_a_next_task_stays_and_an_idle_one_is_released_after_a_while() -> None:
    cluster = Cluster()
    cluster.add(Resources())
    worker = cluster.give_node(Node("a"))
    for _ in range(3):
        cluster.end(next(iter(cluster.running)))
        cluster.wait(LINGER_SECONDS - 0.1)
        cluster.add(Resources())
        assert list(cluster.running.values()) == [(worker,)]
    cluster.end(next(iter(cluster.running)))
    cluster.wait(LINGER_SECONDS)
    assert cluster.workers == 0


def test_a_requested_worker_is_released_when_its_task_was_cancelled() -> None:
    cluster = Cluster()
    cluster.plan.add(1, Resources(), cluster.now)
    cluster.step()
    assert cluster.workers == 1
    cluster.plan.end(1, cluster.now)
    cluster.step()
    cluster.wait(LINGER_SECONDS)
    assert cluster.workers == 0


def test_requests_beyond_the_limit_are_released_at_once_but_workers_with_a_node_are_not() -> None:
    cluster = Cluster()
    cluster.add(*[Resources()] * 4)
    for node in nodes(2):
        cluster.give_node(node)
    cluster.limits[ANY] = 1
    cluster.step()
    assert cluster.workers == 2
    assert len(cluster.running) == 2


def test_workers_hold_the_resources_of_the_largest_task_so_that_all_kinds_find_them_warm() -> None:
    cluster = Cluster()
    cluster.add(Resources(memory_gib=4, gpus=0.5), Resources(memory_gib=1))
    assert cluster.plan.requested({}) == [Shape(1, 0.5, 4)] * 1 + [Shape(1, 0.5, 4)]


def test_workers_of_labelled_nodes_hold_the_resources_of_the_tasks_with_these_labels() -> None:
    cluster = Cluster()
    cluster.add(Resources(memory_gib=4, gpus=0.5), Resources(memory_gib=1, labels=LAPTOP))
    assert cluster.plan.requested(LAPTOP) == [Shape(memory_gib=1, labels=LAPTOP)]


def test_a_larger_task_gets_a_larger_worker_which_replaces_one_that_is_too_small() -> None:
    cluster = Cluster(limit=1)
    cluster.add(Resources(memory_gib=1))
    cluster.give_node(Node("a"))
    cluster.add(Resources(memory_gib=4))
    assert not cluster.requested
    cluster.end(next(iter(cluster.running)))
    assert not cluster.running
    cluster.wait(LINGER_SECONDS)
    cluster.wait(0)
    assert cluster.plan.requested({}) == [Shape(memory_gib=4)]


def test_a_gang_takes_all_its_workers_at_once_and_they_wait_for_it() -> None:
    cluster = Cluster()
    cluster.add(Resources(ranks=3))
    workers = [cluster.give_node(node) for node in nodes(2)]
    assert not cluster.running
    cluster.wait(10 * LINGER_SECONDS)
    workers.append(cluster.give_node(Node("c")))
    assert [set(running) for running in cluster.running.values()] == [set(workers)]


def test_a_gang_prefers_workers_of_one_node() -> None:
    cluster = Cluster()
    cluster.add(*[Resources()] * 4)
    for name in "abbc":
        cluster.give_node(Node(name))
    for ticket in list(cluster.running):
        cluster.end(ticket)
    cluster.add(Resources(ranks=2))
    (workers,) = cluster.running.values()
    assert [cluster.plan.node_of(worker) for worker in workers] == [Node("b")] * 2


def test_exclusive_tasks_have_a_node_each_and_other_tasks_run_on_other_nodes() -> None:
    cluster = Cluster()
    cluster.add(*[Resources()] * 3)
    for name in "aab":
        cluster.give_node(Node(name))
    on_a, _, on_b = cluster.running
    cluster.add(Resources(exclusive=True))
    cluster.end(on_a)
    assert len(cluster.running) == 2  # the other worker of its node is busy
    cluster.end(on_b)
    assert len(cluster.running) == 2
    workers = cluster.running[[*cluster.running][-1]]
    assert cluster.plan.node_of(workers[0]) == Node("b")
    cluster.add(Resources())
    assert len(cluster.running) == 3


def test_exclusive_tasks_run_on_the_kind_of_node_of_the_first() -> None:
    cluster = Cluster()
    fast, slow = Node("a", {GROUP: "fast"}, "new"), Node("b", {GROUP: "slow"}, "old")
    cluster.add(Resources(exclusive=True), Resources(exclusive=True))
    cluster.give_node(fast)
    cluster.give_node(slow)
    assert len(cluster.running) == 1
    cluster.limits[label_set({GROUP: "fast"})] = 2
    cluster.step()
    assert cluster.plan.requested({GROUP: "fast"}) == [Shape(labels={GROUP: "fast"})]


def test_a_task_with_labels_gets_a_worker_that_was_requested_with_them_or_has_them_by_chance() -> None:
    cluster = Cluster()
    cluster.add(Resources(labels=LAPTOP))
    assert cluster.plan.requested(LAPTOP) == [Shape(labels=LAPTOP)]
    cluster = Cluster()
    cluster.add(Resources())
    cluster.give_node(Node("a", LAPTOP))
    cluster.end(next(iter(cluster.running)))
    cluster.add(Resources(labels=LAPTOP))
    assert len(cluster.running) == 1


def test_no_task_starts_on_a_draining_node() -> None:
    cluster = Cluster()
    cluster.add(Resources())
    cluster.give_node(Node("a"))
    cluster.end(next(iter(cluster.running)))
    cluster.plan.draining_nodes = {"a"}
    cluster.add(Resources())
    assert not cluster.running
    assert len(cluster.requested) == 1


def test_a_task_that_waits_for_a_requested_worker_does_not_delay_other_tasks() -> None:
    cluster = Cluster()
    cluster.add(Resources())
    cluster.give_node(Node("a"))
    cluster.add(Resources(labels=LAPTOP))
    for _ in range(20):
        cluster.add(Resources())
        cluster.end(next(iter(cluster.running)))
        assert len(cluster.running) == 1


def test_tasks_of_one_machine_share_its_memory() -> None:
    cluster = Cluster(node_capacity=Capacity(3, 8, 8))
    for number in range(3):
        cluster.plan.request(number, Shape(8, 0, 8))
        cluster.plan.ready(number, Node("here"), 0)
    cluster.add(Resources(memory_gib=5), Resources(memory_gib=5), Resources(memory_gib=3))
    assert len(cluster.running) == 2


def test_the_estimate_doubles_until_the_autoscaler_refuses() -> None:
    estimator = CapacityEstimator()
    assert estimator.limit == FIRST_LIMIT
    estimator.update(workers=FIRST_LIMIT - 1, refused=0, now=0)
    assert estimator.limit == FIRST_LIMIT  # the autoscaler may not have seen a request for more
    estimator.update(workers=4, refused=0, now=1)
    estimator.update(workers=8, refused=0, now=2)
    assert estimator.limit == 16
    estimator.update(workers=16, refused=5, now=3)
    assert estimator.limit == 11
    estimator.update(workers=11, refused=0, now=4)
    assert estimator.limit == 11
    estimator.update(workers=11, refused=0, now=3 + AGAIN_SECONDS)
    assert estimator.limit == 12
    estimator.update(workers=12, refused=12, now=200)
    assert estimator.limit == 1  # at least one worker is always requested


def test_a_fixed_limit_stays() -> None:
    estimator = CapacityEstimator(3)
    estimator.update(workers=3, refused=2, now=0)
    estimator.update(workers=3, refused=0, now=1)
    assert estimator.limit == 3


needs = st.builds(
    Resources,
    memory_gib=st.sampled_from([0.5, 2.0, 4.0]),
    ranks=st.sampled_from([1, 1, 1, 2, 3]),
    exclusive=st.booleans(),
    labels=st.sampled_from([{}, {}, {}, LAPTOP]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(needs, max_size=20), st.integers(3, 6), st.randoms(use_true_random=False))
def test_with_any_nodes_that_come_and_go_every_task_runs_and_exclusive_ones_run_alone(
    tasks: list[Resources], limit: int, random: randoms.Random
) -> None:
    """Nodes of two slots come and go in any order, up to the limit of each kind."""
    cluster = Cluster(limit)
    cluster.limits[label_set(LAPTOP)] = 3
    started: dict[int, int] = {}
    for ticket, task in enumerate(tasks):
        cluster.plan.add(ticket, task, cluster.now)
    cluster.step()
    for step in range(3000):
        if not cluster.running and not list(cluster.plan.waiting):
            break
        _check(cluster, tasks)
        choice = random.choice("pppeel")
        if choice == "p" and cluster.requested:
            shape = cluster.shapes[cluster.requested[0]]
            kind = "laptop" if shape.labels else "any"
            cluster.give_node(Node(f"{kind} {random.randrange(limit)}", dict(shape.labels), "same kind"))
        elif choice == "e" and cluster.running:
            cluster.end(random.choice(list(cluster.running)))
        elif choice == "l" and cluster.running and step < 500:
            ticket = random.choice(list(cluster.running))
            started[ticket] = started.get(ticket, 0) + 1
            for worker in cluster.running.pop(ticket):
                cluster.plan.remove(worker)
            cluster.plan.end(ticket, cluster.now)
            cluster.plan.add(ticket, tasks[ticket], cluster.now)
        cluster.wait(random.choice([0.0, 0.5, LINGER_SECONDS]))
    assert not cluster.running
    assert not list(cluster.plan.waiting)


def _check(cluster: Cluster, tasks: list[Resources]) -> None:
    busy: dict[str, set[int]] = {}
    for ticket, workers in cluster.running.items():
        assert len(set(workers)) == tasks[ticket].ranks
        for worker in workers:
            node = cluster.plan.node_of(worker)
            assert node is not None
            assert tasks[ticket].labels.items() <= node.labels.items()
            assert cluster.shapes[worker].covers(tasks[ticket])
            busy.setdefault(node.id, set()).add(ticket)
    for tickets in busy.values():
        assert len(tickets) == 1 or not any(tasks[ticket].exclusive for ticket in tickets)
    for key, limit in cluster.limits.items():
        assert cluster.plan.count(dict(key)) <= limit
