"""WorkerPlan: which workers to request from a cluster, which to release, and which worker runs which task.

Pure decisions, without processes, clock or Ray: the caller carries them out and passes the time in.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from cluster.executors.admission import TaskQueue
from cluster.executors.executor import Capacity, Resources

Labels = Mapping[str, str]
LabelSet = frozenset[tuple[str, str]]
"""Labels as a key of a mapping."""

GROUP = "ray.io/node-group"
"""The label with the name of a node's type in the cluster, on nodes that have it."""
LINGER_SECONDS = 2.0
"""An idle worker is released after this time: the task that follows a result comes at once and finds it warm."""
FIRST_LIMIT = 4
"""The number of workers to request from a growing cluster before its largest size is estimated."""
AGAIN_SECONDS = 120.0
"""After this time one worker more than the estimate is requested: other programs may have left the cluster, or its
bounds may have been raised."""


@dataclass(frozen=True)
class Node:
    """A machine, as far as the placement of tasks depends on it."""

    id: str
    labels: Labels = field(default_factory=dict)
    kind: str = ""
    """The hardware on which a timing depends, such as the processor's name."""


@dataclass(frozen=True)
class Shape:
    """The resources that a worker holds, and the labels of the nodes on which it may be."""

    cpus: float = 1.0
    gpus: float = 0.0
    memory_gib: float = 0.0
    labels: Labels = field(default_factory=dict)

    def covers(self, needs: Resources) -> bool:
        return needs.cpus <= self.cpus and needs.gpus <= self.gpus and needs.memory_gib <= self.memory_gib

    def grown_to(self, needs: Resources) -> Shape:
        """Return the smallest shape that covers this one and a task, with the labels of this one."""
        return Shape(
            max(self.cpus, needs.cpus),
            max(self.gpus, needs.gpus),
            max(self.memory_gib, needs.memory_gib),
            self.labels,
        )


@dataclass
class WorkerSlot:
    """A worker: requested while it has no node, busy while it has a ticket, otherwise ready."""

    shape: Shape
    node: Node | None = None
    ticket: int | None = None
    """The task that runs on it."""
    idle_since: float | None = None
    """The time from which on no waiting task needs it."""
    free_since: float = 0.0
    """The time at which its last task ended."""


@dataclass(frozen=True)
class PlanChange:
    """The next steps of a plan."""

    request: tuple[Shape, ...] = ()
    """The shapes of the workers to request."""
    release: tuple[int, ...] = ()
    """The numbers of the workers to release."""


class WorkerPlan:
    """Workers by number, and the tasks that wait for them or run on them, by ticket.

    A worker is *requested* until it is on a node; then it is *ready* or *busy*. A task starts on ready workers only, on
    as many at once as it has ranks. An exclusive task runs on a node without other tasks, and all exclusive tasks run
    on nodes of one kind: that of the first.
    """

    def __init__(self, node_capacity: Capacity | None = None) -> None:
        """Plan for nodes on which tasks share `node_capacity`; by default each worker has its resources for itself."""
        self._node_capacity = node_capacity
        self._queue = TaskQueue()
        self._slots: dict[int, WorkerSlot] = {}
        self._running: dict[int, Resources] = {}
        self._exclusive_node: Node | None = None
        self._largest: dict[LabelSet, Shape] = {}
        self.draining_nodes: Collection[str] = ()
        """Nodes that are about to be taken away: no task starts there."""
        self.progress_at = 0.0
        """The time at which a task last started or ended, or a worker came that a task waits for."""

    @property
    def waiting(self) -> list[Resources]:
        return list(self._queue)

    @property
    def running(self) -> Collection[int]:
        return self._running

    def add(self, ticket: int, needs: Resources, now: float) -> None:
        """Add a waiting task."""
        if not self._running and not self._queue:
            self.progress_at = now
        self._queue.add(ticket, needs)
        key = label_set(needs.labels)
        self._largest[key] = self._largest.get(key, Shape(labels=needs.labels)).grown_to(needs)

    def end(self, ticket: int, now: float) -> None:
        """Remove a waiting or running task; its workers are ready again."""
        self._queue.remove(ticket)
        if self._running.pop(ticket, None) is not None:
            self.progress_at = now
        for slot in self._slots.values():
            if slot.ticket == ticket:
                slot.ticket, slot.free_since = None, now

    def request(self, worker: int, shape: Shape) -> None:
        """Add a worker that was requested and has no node yet."""
        self._slots[worker] = WorkerSlot(shape)

    def ready(self, worker: int, node: Node, now: float) -> None:
        """Note that a worker is on this node. A worker that was removed before is ignored."""
        if worker in self._slots:
            self._slots[worker].node = node
            self._slots[worker].free_since = now
            if self.is_needed(worker):
                self.progress_at = now

    def remove(self, worker: int) -> None:
        """Remove a worker. The caller ends the task that runs on it."""
        self._slots.pop(worker, None)

    def workers_on(self, nodes: Collection[str]) -> list[int]:
        """Return the workers on these nodes."""
        return [
            worker for worker, slot in self._slots.items() if slot.node is not None and slot.node.id in nodes
        ]

    def idle_workers(self) -> list[int]:
        """Return the workers that run no task."""
        return [worker for worker, slot in self._slots.items() if slot.ticket is None]

    def node_of(self, worker: int) -> Node | None:
        slot = self._slots.get(worker)
        return None if slot is None else slot.node

    def is_needed(self, worker: int) -> bool:
        """Return whether this worker could run any of the waiting tasks."""
        return any(self._can_run(self._slots[worker], needs) for needs in self._queue)

    def count(self, labels: Labels) -> int:
        """Count the workers that were requested with these labels."""
        return sum(slot.shape.labels == labels for slot in self._slots.values())

    def requested(self, labels: Labels) -> list[Shape]:
        """Return the shapes of the workers that were requested with these labels and have no node yet."""
        return [
            slot.shape for slot in self._slots.values() if slot.node is None and slot.shape.labels == labels
        ]

    def next(self, now: float) -> tuple[int, tuple[int, ...]] | None:
        """Return the task that may start now and its workers, and count them as busy; None if no task may start."""
        if all(slot.ticket is not None or slot.node is None for slot in self._slots.values()):
            return None  # the usual case, whatever the length of the queue
        assigned = self._queue.next(self._assign, self._has_pending_worker)
        if assigned is None:
            return None
        ticket, (needs, workers) = assigned
        self._running[ticket] = needs
        self.progress_at = now
        for worker in workers:
            self._slots[worker].ticket, self._slots[worker].idle_since = ticket, None
        if needs.exclusive and self._exclusive_node is None:
            self._exclusive_node = self._slots[workers[0]].node
        return ticket, workers

    def change(self, limits: Mapping[LabelSet, int], now: float) -> PlanChange:
        """Return the workers to request, one for each waiting rank, and the idle workers to release.

        `limits` is the number of workers that the cluster could have, by the labels with which they are requested.
        """
        free = {worker: slot for worker, slot in self._slots.items() if slot.ticket is None}
        missing = self._reserve(free)
        released = self._idle_too_long(free, now)
        requests: list[Shape] = []
        for shape in missing:
            same_labels = sum(request.labels == shape.labels for request in requests)
            if self.count(shape.labels) + same_labels < limits.get(label_set(shape.labels), FIRST_LIMIT):
                requests.append(shape)
        return PlanChange(tuple(requests), tuple(released + self._beyond(limits, released)))

    def _reserve(self, free: dict[int, WorkerSlot]) -> list[Shape]:
        """Take the workers that waiting tasks will use out of `free`; return the shapes that are missing."""
        missing: list[Shape] = []
        for needs in self._queue:
            for _ in range(needs.ranks):
                worker = self._suitable(free, needs)
                if worker is None:
                    missing.append(self._shape_to_request(needs))
                else:
                    free.pop(worker).idle_since = None
        return missing

    def _suitable(self, free: Mapping[int, WorkerSlot], needs: Resources) -> int | None:
        """Return a free worker for this task; ready workers come before requested ones."""
        for worker in sorted(free, key=lambda worker: free[worker].node is None):
            if self._can_run(free[worker], needs):
                return worker
        return None

    def _idle_too_long(self, free: Mapping[int, WorkerSlot], now: float) -> list[int]:
        workers = []
        for worker, slot in free.items():
            if slot.idle_since is None:
                slot.idle_since = now
            if now - slot.idle_since >= LINGER_SECONDS:
                workers.append(worker)
        return workers

    def _beyond(self, limits: Mapping[LabelSet, int], released: Collection[int]) -> list[int]:
        """Return the requested workers beyond the limits, the latest first."""
        workers: list[int] = []
        for key, limit in limits.items():
            remaining = [
                worker
                for worker, slot in self._slots.items()
                if label_set(slot.shape.labels) == key and worker not in released
            ]
            requested = [worker for worker in remaining if self._slots[worker].node is None]
            workers += requested[::-1][: max(0, len(remaining) - limit)]
        return workers

    def _shape_to_request(self, needs: Resources) -> Shape:
        """Return the shape to request for this task: as large as any task for the same nodes so far.

        With a shape for each kind of task no kind would find a warm worker.
        """
        node = self._exclusive_node
        if needs.exclusive and not needs.labels and node is not None and GROUP in node.labels:
            return Shape(labels={GROUP: node.labels[GROUP]}).grown_to(needs)
        return self._largest[label_set(needs.labels)]

    def _can_run(self, slot: WorkerSlot, needs: Resources) -> bool:
        """Return whether a worker may run this task, now or when it is on a node."""
        if not slot.shape.covers(needs) or (slot.node is not None and slot.node.id in self.draining_nodes):
            return False
        if slot.node is None:
            return needs.labels.items() <= slot.shape.labels.items()
        same_kind = (
            not needs.exclusive or self._exclusive_node is None or slot.node.kind == self._exclusive_node.kind
        )
        return same_kind and needs.labels.items() <= slot.node.labels.items()

    def _has_pending_worker(self, needs: Resources) -> bool:
        """Return whether enough free workers for this task exist, some of them without a node yet."""
        suitable = [slot for slot in self._slots.values() if self._can_run(slot, needs)]
        free = sum(slot.ticket is None for slot in suitable)
        return any(slot.node is None for slot in suitable) and free >= needs.ranks

    def _assign(self, needs: Resources) -> tuple[Resources, tuple[int, ...]] | None:
        """Return as many ready workers as this task has ranks, on few nodes; None if there are not enough."""
        by_node: dict[str, list[int]] = {}
        for worker, slot in self._slots.items():
            if slot.ticket is None and slot.node is not None and self._can_run(slot, needs):
                by_node.setdefault(slot.node.id, []).append(worker)
        running = self._running_on(by_node)
        workers: list[int] = []
        for node, free in sorted(by_node.items(), key=lambda entry: -len(entry[1])):
            is_locked = any(self._running[ticket].exclusive for ticket in running[node])
            if is_locked or (needs.exclusive and running[node]):
                continue
            # The worker that ended a task last is the warmest.
            free.sort(key=lambda worker: self._slots[worker].free_since, reverse=True)
            while free and len(workers) < needs.ranks and self._fits(running[node], needs, len(workers) + 1):
                workers.append(free.pop(0))
        if len(workers) < needs.ranks:
            return None
        return needs, tuple(workers)

    def _running_on(self, nodes: Collection[str]) -> dict[str, set[int]]:
        """Return the tickets of the tasks that run on each of these nodes."""
        tickets: dict[str, set[int]] = {node: set() for node in nodes}
        for slot in self._slots.values():
            if slot.ticket is not None and slot.node is not None and slot.node.id in tickets:
                tickets[slot.node.id].add(slot.ticket)
        return tickets

    def _fits(self, running: Collection[int], needs: Resources, ranks: int) -> bool:
        if self._node_capacity is None or needs.exclusive:
            return True
        task = Resources(cpus=needs.cpus, memory_gib=needs.memory_gib, ranks=ranks)
        return self._node_capacity.fits([*(self._running[ticket] for ticket in running), task])


class CapacityEstimator:
    """Estimates the number of workers that a growing cluster could have, from the requests that its autoscaler refuses.

    Ray does not publish the node types and their bounds. So the number of requests doubles until the autoscaler reports
    that it cannot place some of them.
    """

    def __init__(self, fixed_limit: int | None = None) -> None:
        """Estimate, or always return `fixed_limit` if the caller gives one."""
        self._is_fixed = fixed_limit is not None
        self.limit = fixed_limit or FIRST_LIMIT
        """The current estimate."""
        self._was_refused = False
        self._retry_at = 0.0

    def update(self, workers: int, refused: int, now: float) -> None:
        """Take in that the autoscaler knows of `workers` running or requested workers and cannot place `refused`."""
        if self._is_fixed:
            return
        if refused > 0:
            self.limit, self._was_refused = max(1, workers - refused), True
            self._retry_at = now + AGAIN_SECONDS
        elif workers >= self.limit and not self._was_refused:
            self.limit *= 2
        elif workers >= self.limit and now >= self._retry_at:
            self.limit, self._retry_at = self.limit + 1, now + AGAIN_SECONDS


def label_set(labels: Labels) -> LabelSet:
    return frozenset(labels.items())
