"""Which workers to want of a cluster, whom to let go and who does what: decided without processes, and tested so."""

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
    """A workforce with whoever does what it says, on a clock of its own: nodes come when `place` is called."""

    def __init__(self, limit: int = 100, node_capacity: Capacity | None = None) -> None:
        self.plan = WorkerPlan(node_capacity)
        self.limits: dict[frozenset[tuple[str, str]], int] = {ANY: limit}
        self.now = 0.0
        self.wanted: list[int] = []
        self.shapes: dict[int, Shape] = {}
        self.running: dict[int, tuple[int, ...]] = {}
        self.hired, self.added = 0, 0

    def add(self, *needs: Resources) -> None:
        for one in needs:
            self.plan.add(self.added, one, self.now)
            self.added += 1
        self.go_on()

    def go_on(self) -> None:
        while (found := self.plan.next(self.now)) is not None:
            self.running[found[0]] = found[1]
        change = self.plan.change(self.limits, self.now)
        for worker in change.release:
            self.plan.remove(worker)
            self.wanted = [one for one in self.wanted if one != worker]
        for shape in change.request:
            self.plan.request(self.hired, shape)
            self.wanted.append(self.hired)
            self.shapes[self.hired] = shape
            self.hired += 1

    def place(self, node: Node) -> int:
        """The worker that has waited longest is there."""
        worker = self.wanted.pop(0)
        self.plan.ready(worker, node, self.now)
        self.go_on()
        return worker

    def end(self, ticket: int) -> None:
        del self.running[ticket]
        self.plan.end(ticket, self.now)
        self.go_on()

    def later(self, seconds: float) -> None:
        self.now += seconds
        self.go_on()

    @property
    def held(self) -> int:
        return self.plan.count({})


def nodes(count: int) -> list[Node]:
    return [Node(f"node {number}") for number in range(count)]


def test_each_waiting_piece_has_a_worker_wanted_up_to_what_the_cluster_could_have() -> None:
    cluster = Cluster(limit=3)
    cluster.add(*[Resources()] * 2)
    assert cluster.held == 2
    cluster.add(*[Resources()] * 5)
    assert cluster.held == 3


def test_work_is_only_given_to_workers_that_are_there() -> None:
    cluster = Cluster()
    cluster.add(Resources(), Resources())
    assert not cluster.running
    worker = cluster.place(Node("a"))
    assert list(cluster.running.values()) == [(worker,)]


def test_who_does_the_next_piece_at_once_stays_and_who_has_nothing_to_do_goes_after_a_while() -> None:
    cluster = Cluster()
    cluster.add(Resources())
    worker = cluster.place(Node("a"))
    for _ in range(3):
        cluster.end(next(iter(cluster.running)))
        cluster.later(LINGER_SECONDS - 0.1)
        cluster.add(Resources())
        assert list(cluster.running.values()) == [(worker,)]
    cluster.end(next(iter(cluster.running)))
    cluster.later(LINGER_SECONDS)
    assert cluster.held == 0


def test_workers_that_nobody_waits_for_any_more_are_not_waited_for() -> None:
    cluster = Cluster()
    cluster.plan.add(1, Resources(), cluster.now)
    cluster.go_on()
    assert cluster.held == 1
    cluster.plan.end(1, cluster.now)
    cluster.go_on()
    cluster.later(LINGER_SECONDS)
    assert cluster.held == 0


def test_what_the_cluster_cannot_have_is_let_go_at_once_but_never_who_is_there() -> None:
    cluster = Cluster()
    cluster.add(*[Resources()] * 4)
    for node in nodes(2):
        cluster.place(node)
    cluster.limits[ANY] = 1
    cluster.go_on()
    assert cluster.held == 2
    assert len(cluster.running) == 2


def test_workers_hold_what_the_largest_piece_asked_for_so_that_all_kinds_find_them_warm() -> None:
    cluster = Cluster()
    cluster.add(Resources(memory_gib=4, gpus=0.5), Resources(memory_gib=1))
    assert cluster.plan.requested({}) == [Shape(1, 0.5, 4)] * 1 + [Shape(1, 0.5, 4)]


def test_workers_of_certain_nodes_hold_what_pieces_for_these_asked_for() -> None:
    cluster = Cluster()
    cluster.add(Resources(memory_gib=4, gpus=0.5), Resources(memory_gib=1, labels=LAPTOP))
    assert cluster.plan.requested(LAPTOP) == [Shape(memory_gib=1, labels=LAPTOP)]


def test_a_larger_piece_gets_a_larger_worker_in_the_place_of_one_that_is_too_small() -> None:
    cluster = Cluster(limit=1)
    cluster.add(Resources(memory_gib=1))
    cluster.place(Node("a"))
    cluster.add(Resources(memory_gib=4))
    assert not cluster.wanted
    cluster.end(next(iter(cluster.running)))
    assert not cluster.running
    cluster.later(LINGER_SECONDS)
    cluster.later(0)
    assert cluster.plan.requested({}) == [Shape(memory_gib=4)]


def test_a_gang_takes_all_its_workers_at_once_and_they_wait_for_it() -> None:
    cluster = Cluster()
    cluster.add(Resources(ranks=3))
    there = [cluster.place(node) for node in nodes(2)]
    assert not cluster.running
    cluster.later(10 * LINGER_SECONDS)
    there.append(cluster.place(Node("c")))
    assert [set(workers) for workers in cluster.running.values()] == [set(there)]


def test_a_gang_prefers_workers_of_one_node() -> None:
    cluster = Cluster()
    cluster.add(*[Resources()] * 4)
    for name in "abbc":
        cluster.place(Node(name))
    for ticket in list(cluster.running):
        cluster.end(ticket)
    cluster.add(Resources(ranks=2))
    (workers,) = cluster.running.values()
    assert [cluster.plan.node_of(worker) for worker in workers] == [Node("b")] * 2


def test_exclusive_pieces_have_a_node_each_and_others_go_on_elsewhere() -> None:
    cluster = Cluster()
    cluster.add(*[Resources()] * 3)
    for name in "aab":
        cluster.place(Node(name))
    on_a, _, on_b = cluster.running
    cluster.add(Resources(exclusive=True))
    cluster.end(on_a)
    assert len(cluster.running) == 2  # the other one of its node is busy
    cluster.end(on_b)
    assert len(cluster.running) == 2
    alone = cluster.running[[*cluster.running][-1]]
    assert cluster.plan.node_of(alone[0]) == Node("b")
    cluster.add(Resources())
    assert len(cluster.running) == 3


def test_exclusive_pieces_keep_to_the_kind_of_node_of_the_first() -> None:
    cluster = Cluster()
    fast, slow = Node("a", {GROUP: "fast"}, "new"), Node("b", {GROUP: "slow"}, "old")
    cluster.add(Resources(exclusive=True), Resources(exclusive=True))
    cluster.place(fast)
    cluster.place(slow)
    assert len(cluster.running) == 1
    cluster.limits[label_set({GROUP: "fast"})] = 2
    cluster.go_on()
    assert cluster.plan.requested({GROUP: "fast"}) == [Shape(labels={GROUP: "fast"})]


def test_a_piece_with_labels_gets_a_worker_there_or_one_that_was_placed_there_by_chance() -> None:
    cluster = Cluster()
    cluster.add(Resources(labels=LAPTOP))
    assert cluster.plan.requested(LAPTOP) == [Shape(labels=LAPTOP)]
    cluster = Cluster()
    cluster.add(Resources())
    cluster.place(Node("a", LAPTOP))
    cluster.end(next(iter(cluster.running)))
    cluster.add(Resources(labels=LAPTOP))
    assert len(cluster.running) == 1


def test_nothing_starts_on_a_node_that_is_about_to_go() -> None:
    cluster = Cluster()
    cluster.add(Resources())
    cluster.place(Node("a"))
    cluster.end(next(iter(cluster.running)))
    cluster.plan.draining_nodes = {"a"}
    cluster.add(Resources())
    assert not cluster.running
    assert len(cluster.wanted) == 1


def test_who_waits_for_a_worker_that_is_on_its_way_holds_nobody_up() -> None:
    cluster = Cluster()
    cluster.add(Resources())
    cluster.place(Node("a"))
    cluster.add(Resources(labels=LAPTOP))
    for _ in range(20):
        cluster.add(Resources())
        cluster.end(next(iter(cluster.running)))
        assert len(cluster.running) == 1


def test_pieces_of_one_machine_share_its_memory() -> None:
    cluster = Cluster(node_capacity=Capacity(3, 8, 8))
    for number in range(3):
        cluster.plan.request(number, Shape(8, 0, 8))
        cluster.plan.ready(number, Node("here"), 0)
    cluster.add(Resources(memory_gib=5), Resources(memory_gib=5), Resources(memory_gib=3))
    assert len(cluster.running) == 2


def test_room_is_doubled_until_the_autoscaler_refuses() -> None:
    room = CapacityEstimator()
    assert room.limit == FIRST_LIMIT
    room.update(workers=FIRST_LIMIT - 1, refused=0, now=0)
    assert room.limit == FIRST_LIMIT  # it may not even have been asked for more
    room.update(workers=4, refused=0, now=1)
    room.update(workers=8, refused=0, now=2)
    assert room.limit == 16
    room.update(workers=16, refused=5, now=3)
    assert room.limit == 11
    room.update(workers=11, refused=0, now=4)
    assert room.limit == 11
    room.update(workers=11, refused=0, now=3 + AGAIN_SECONDS)
    assert room.limit == 12
    room.update(workers=12, refused=12, now=200)
    assert room.limit == 1  # one goes on to be asked for


def test_room_that_is_given_stays() -> None:
    room = CapacityEstimator(3)
    room.update(workers=3, refused=2, now=0)
    room.update(workers=3, refused=0, now=1)
    assert room.limit == 3


needs = st.builds(
    Resources,
    memory_gib=st.sampled_from([0.5, 2.0, 4.0]),
    ranks=st.sampled_from([1, 1, 1, 2, 3]),
    exclusive=st.booleans(),
    labels=st.sampled_from([{}, {}, {}, LAPTOP]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(needs, max_size=20), st.integers(3, 6), st.randoms(use_true_random=False))
def test_whatever_comes_and_goes_every_piece_runs_and_never_beside_what_it_must_not(
    pieces: list[Resources], limit: int, random: randoms.Random
) -> None:
    """Nodes of two slots come in any order, and go; as many as the limits say, of either kind."""
    cluster = Cluster(limit)
    cluster.limits[label_set(LAPTOP)] = 3
    started: dict[int, int] = {}
    for ticket, piece in enumerate(pieces):
        cluster.plan.add(ticket, piece, cluster.now)
    cluster.go_on()
    for step in range(3000):
        if not cluster.running and not list(cluster.plan.waiting):
            break
        _check(cluster, pieces)
        choice = random.choice("pppeel")
        if choice == "p" and cluster.wanted:
            shape = cluster.shapes[cluster.wanted[0]]
            kind = "laptop" if shape.labels else "any"
            cluster.place(Node(f"{kind} {random.randrange(limit)}", dict(shape.labels), "all alike"))
        elif choice == "e" and cluster.running:
            cluster.end(random.choice(list(cluster.running)))
        elif choice == "l" and cluster.running and step < 500:
            ticket = random.choice(list(cluster.running))
            started[ticket] = started.get(ticket, 0) + 1
            lost = cluster.running.pop(ticket)
            for worker in lost:
                cluster.plan.remove(worker)
            cluster.plan.end(ticket, cluster.now)
            cluster.plan.add(ticket, pieces[ticket], cluster.now)
        cluster.later(random.choice([0.0, 0.5, LINGER_SECONDS]))
    assert not cluster.running
    assert not list(cluster.plan.waiting)


def _check(cluster: Cluster, pieces: list[Resources]) -> None:
    busy: dict[str, set[int]] = {}
    for ticket, workers in cluster.running.items():
        assert len(set(workers)) == pieces[ticket].ranks
        for worker in workers:
            node = cluster.plan.node_of(worker)
            assert node is not None
            assert pieces[ticket].labels.items() <= node.labels.items()
            assert cluster.shapes[worker].covers(pieces[ticket])
            busy.setdefault(node.id, set()).add(ticket)
    for tickets in busy.values():
        assert len(tickets) == 1 or not any(pieces[one].exclusive for one in tickets)
    for key, limit in cluster.limits.items():
        assert cluster.plan.count(dict(key)) <= limit
