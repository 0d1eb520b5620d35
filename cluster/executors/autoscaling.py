"""Workforce: which workers to want of a cluster, whom to let go, and which of them does which piece. All decisions,
with no processes, no clock and no Ray: who calls carries them out, and says what time it is."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from cluster.executors.admission import TaskQueue
from cluster.executors.executor import Capacity, Resources

Labels = Mapping[str, str]

GROUP = "ray.io/node-group"
"""The label that tells which of a cluster's node types a node is of, where nodes have it."""
LINGER_SECONDS = 2.0
"""So long a worker is kept that nothing waits for: what follows on a piece comes at once and finds it warm."""
FIRST_LIMIT = 4
"""So many workers are wanted of a growing cluster before anything is known of how large it may be."""
AGAIN_SECONDS = 120.0
"""After so long one more is asked for than a cluster could have: others may have left it, or its bounds been raised."""


@dataclass(frozen=True)
class Node:
    """A machine as far as placing work goes. kind: what a timing on it depends on, such as its processor."""

    id: str
    labels: Labels = field(default_factory=dict)
    kind: str = ""


@dataclass(frozen=True)
class Shape:
    """What a worker holds of its node, on which nodes it may be."""

    cpus: float = 1.0
    gpus: float = 0.0
    memory_gib: float = 0.0
    labels: Labels = field(default_factory=dict)

    def covers(self, needs: Resources) -> bool:
        return needs.cpus <= self.cpus and needs.gpus <= self.gpus and needs.memory_gib <= self.memory_gib

    def joined(self, other: Shape) -> Shape:
        """The smallest that is at least both; with the labels of this one."""
        return Shape(
            max(self.cpus, other.cpus),
            max(self.gpus, other.gpus),
            max(self.memory_gib, other.memory_gib),
            self.labels,
        )


@dataclass
class WorkerSlot:
    """A worker: wanted while it has no node, busy while it has a ticket. spare_since: from when on nothing waits for
    it; free_since: when it did its last piece."""

    shape: Shape
    node: Node | None = None
    ticket: int | None = None
    spare_since: float | None = None
    free_since: float = 0.0


@dataclass(frozen=True)
class Change:
    """What to do about a workforce: workers of these shapes to ask for, workers by number to let go."""

    want: tuple[Shape, ...] = ()
    let_go: tuple[int, ...] = ()


class WorkerPlan:
    """Workers by number, and the pieces that wait for them or run on them, by ticket.

    A worker is *wanted* until it is placed on a node; then it is *ready* or *busy*. A piece runs on ready workers only,
    on as many at once as it has ranks or on none. An exclusive one runs where nothing else does, and all of them on
    nodes of one kind: that of the first. `together` is what the pieces on one node share.
    """

    def __init__(self, together: Capacity | None = None) -> None:
        self._together = together
        self._line = TaskQueue()
        self._members: dict[int, WorkerSlot] = {}
        self._running: dict[int, Resources] = {}
        self._timing: Node | None = None
        self._largest: dict[frozenset[tuple[str, str]], Shape] = {}
        self.leaving: Collection[str] = ()
        """Nodes that are about to go: nothing new starts there."""

    @property
    def waiting(self) -> Iterable[Resources]:
        return self._line

    @property
    def running(self) -> Collection[int]:
        return self._running

    def add(self, ticket: int, needs: Resources) -> None:
        """A piece waits."""
        self._line.add(ticket, needs)
        key = key_of(needs.labels)
        self._largest[key] = self._largest.get(key, Shape(labels=needs.labels)).joined(_shape(needs))

    def end(self, ticket: int, now: float) -> None:
        """This piece neither waits nor runs any more; its workers are ready again."""
        self._line.remove(ticket)
        self._running.pop(ticket, None)
        for member in self._members.values():
            if member.ticket == ticket:
                member.ticket, member.free_since = None, now

    def want(self, worker: int, shape: Shape) -> None:
        """A worker was asked for."""
        self._members[worker] = WorkerSlot(shape)

    def ready(self, worker: int, node: Node, now: float) -> None:
        """A worker is on this node. Unknown ones are ignored: they were let go before it came to that."""
        if worker in self._members:
            self._members[worker].node = node
            self._members[worker].free_since = now

    def lose(self, worker: int) -> None:
        """A worker is gone. What it did is to be ended by who calls."""
        self._members.pop(worker, None)

    def on(self, nodes: Collection[str]) -> list[int]:
        """The workers on these nodes."""
        return [
            number for number, one in self._members.items() if one.node is not None and one.node.id in nodes
        ]

    def node_of(self, worker: int) -> Node | None:
        return self._members[worker].node if worker in self._members else None

    def shape_of(self, worker: int) -> Shape:
        return self._members[worker].shape

    def awaited(self, worker: int) -> bool:
        """Whether anything waits that this worker could do."""
        return any(self._may(self._members[worker], needs) for needs in self._line)

    def count(self, labels: Labels) -> int:
        """How many workers there are that were asked for with these labels."""
        return sum(one.shape.labels == labels for one in self._members.values())

    def wanted(self, labels: Labels) -> list[Shape]:
        """What was asked for with these labels and is not there yet."""
        return [
            one.shape for one in self._members.values() if one.node is None and one.shape.labels == labels
        ]

    def next(self) -> tuple[int, tuple[int, ...]] | None:
        """The piece that may start now and its workers, counted as busy from here on; None if none may."""
        if all(one.ticket is not None or one.node is None for one in self._members.values()):
            return None  # as mostly, however many wait
        found = self._line.next(self._placed, self._awaited)
        if found is None:
            return None
        ticket, (needs, workers) = found
        self._running[ticket] = needs
        for worker in workers:
            self._members[worker].ticket, self._members[worker].spare_since = ticket, None
        if needs.exclusive and self._timing is None:
            self._timing = self._members[workers[0]].node
        return ticket, workers

    def change(self, limits: Mapping[frozenset[tuple[str, str]], int], now: float) -> Change:
        """Workers to ask for, so that each waiting piece has its own, and to let go, which nothing waits for. `limits`:
        how many the cluster could have, by the labels that they are asked for with."""
        free = {number: one for number, one in self._members.items() if one.ticket is None}
        lacking: list[Shape] = []
        for needs in self._line:
            for _ in range(needs.ranks):
                found = next(
                    (number for number in self._ordered(free) if self._may(free[number], needs)), None
                )
                if found is None:
                    lacking.append(self._asked(needs))
                else:
                    free.pop(found).spare_since = None
        let_go = self._spare(free, now)
        wanted: list[Shape] = []
        for shape in lacking:
            labels = shape.labels
            held = self.count(labels) + sum(one.labels == labels for one in wanted)
            if held < limits.get(key_of(labels), FIRST_LIMIT):
                wanted.append(shape)
        return Change(tuple(wanted), tuple(let_go + self._refused(limits, let_go)))

    def _spare(self, free: Mapping[int, WorkerSlot], now: float) -> list[int]:
        for one in free.values():
            if one.spare_since is None:
                one.spare_since = now
        return [
            number
            for number, one in free.items()
            if one.spare_since is not None and now - one.spare_since >= LINGER_SECONDS
        ]

    def _refused(self, limits: Mapping[frozenset[tuple[str, str]], int], gone: Collection[int]) -> list[int]:
        """Those that are wanted beyond what the cluster could have, the latest first."""
        found: list[int] = []
        for key, limit in limits.items():
            held = [
                number
                for number, one in self._members.items()
                if key_of(one.shape.labels) == key and number not in gone
            ]
            wanted = [number for number in held if self._members[number].node is None]
            found += wanted[::-1][: max(0, len(held) - limit)]
        return found

    def _ordered(self, free: Mapping[int, WorkerSlot]) -> list[int]:
        """Those who are ready before those who are wanted."""
        return sorted(free, key=lambda number: free[number].node is None)

    def _asked(self, needs: Resources) -> Shape:
        """The worker to ask for: as large as any piece for the same nodes so far, lest each kind of piece have its own,
        and warm none."""
        if needs.exclusive and not needs.labels and self._timing is not None and GROUP in self._timing.labels:
            return Shape(labels={GROUP: self._timing.labels[GROUP]}).joined(_shape(needs))
        return self._largest[key_of(needs.labels)]

    def _may(self, member: WorkerSlot, needs: Resources) -> bool:
        """Whether a worker is one for this piece, now or when it comes to be."""
        if not member.shape.covers(needs) or (member.node is not None and member.node.id in self.leaving):
            return False
        if member.node is None:
            return needs.labels.items() <= member.shape.labels.items()
        alike = not needs.exclusive or self._timing is None or member.node.kind == self._timing.kind
        return alike and needs.labels.items() <= member.node.labels.items()

    def _awaited(self, needs: Resources) -> bool:
        """Whether enough workers for this piece are on their way or there."""
        found = sum(one.ticket is None and self._may(one, needs) for one in self._members.values())
        coming = any(one.node is None and self._may(one, needs) for one in self._members.values())
        return coming and found >= needs.ranks

    def _placed(self, needs: Resources) -> tuple[Resources, tuple[int, ...]] | None:
        """As many ready workers as this piece has ranks, on as few nodes as may be; None where they are not there."""
        by_node: dict[str, list[int]] = {}
        for number, member in self._members.items():
            if member.ticket is None and member.node is not None and self._may(member, needs):
                by_node.setdefault(member.node.id, []).append(number)
        busy = self._pieces_on(by_node)
        found: list[int] = []
        for node, numbers in sorted(by_node.items(), key=lambda one: -len(one[1])):
            if (needs.exclusive and busy[node]) or any(self._running[one].exclusive for one in busy[node]):
                continue
            # The last one to end a piece is the warmest.
            numbers.sort(key=lambda number: self._members[number].free_since, reverse=True)
            while numbers and len(found) < needs.ranks and self._holds(busy[node], needs, len(found) + 1):
                found.append(numbers.pop(0))
        return (needs, tuple(found)) if len(found) == needs.ranks else None

    def _pieces_on(self, nodes: Collection[str]) -> dict[str, set[int]]:
        found: dict[str, set[int]] = {node: set() for node in nodes}
        for one in self._members.values():
            if one.ticket is not None and one.node is not None and one.node.id in found:
                found[one.node.id].add(one.ticket)
        return found

    def _holds(self, busy: Collection[int], needs: Resources, ranks: int) -> bool:
        if self._together is None or needs.exclusive:
            return True
        piece = Resources(cpus=needs.cpus, memory_gib=needs.memory_gib, ranks=ranks)
        return self._together.holds([*(self._running[one] for one in busy), piece])


class CapacityEstimator:
    """How many workers a cluster that grows could have, learned from what its autoscaler refuses.

    Nothing else tells it: Ray keeps the node types and their bounds to its autoscaler. So more is wanted, twice as many
    at a time, until it reports that it can't place some; those are too many.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._given = limit
        self.limit = limit or FIRST_LIMIT
        self._known = False
        self._again = 0.0

    def take(self, held: int, refused: int, now: float) -> None:
        """The autoscaler has seen that `held` workers are there or wanted, and can't place `refused` of them."""
        if self._given is not None:
            return
        if refused > 0:
            self.limit, self._known, self._again = max(1, held - refused), True, now + AGAIN_SECONDS
        elif held >= self.limit and not self._known:
            self.limit *= 2
        elif held >= self.limit and now >= self._again:
            self.limit, self._again = self.limit + 1, now + AGAIN_SECONDS


def key_of(labels: Labels) -> frozenset[tuple[str, str]]:
    return frozenset(labels.items())


def _shape(needs: Resources) -> Shape:
    return Shape(needs.cpus, needs.gpus, needs.memory_gib)
