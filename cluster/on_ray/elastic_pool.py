"""ElasticPool: the workers of a cluster, as many as tasks wait for, so that an autoscaler adds and removes nodes."""

from __future__ import annotations

import functools
import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from cluster.executors.autoscaling import CapacityEstimator, LabelSet, WorkerPlan, label_set
from cluster.executors.executor import Capacity, ExecutorUnavailableError, Resources
from cluster.on_ray.cluster_state import ClusterMonitor, ClusterSnapshot, demand, describe
from cluster.on_ray.worker import WorkerLocation
from cluster.on_ray.worker_pool import RayWorkers, bundle

START_SECONDS = 900.0
"""The time that a cluster has to provide a worker when none is left: a cloud's GPU may take 10 minutes."""
INFEASIBLE_SECONDS = 20.0
"""An idle cluster's report that no node could hold a worker is trusted after this time."""
FAILED_STARTS = 5
"""After this many workers in a row that ended before their first task, no more are started."""
SNAPSHOT_SECONDS = 1.0
"""The interval between two snapshots of the cluster."""
SEEN_SECONDS = 2.0
"""The time that a request may take to reach the cluster's autoscaler."""
MAX_GIB = 2**16
"""No node has so much memory. Far larger numbers overflow Ray's autoscaler, which then stops."""


@dataclass(frozen=True)
class ElasticPoolEvents:
    """The connection of an ElasticPool to its executor."""

    post: Callable[[Callable[[], None]], None]
    """Runs a function under the executor's lock, after earlier events."""
    on_node_lost: Callable[[int, str], None]
    """Receives a worker and the id of its node, which is lost; called under the lock."""


class ElasticPool:
    """Requests a worker for each waiting task, up to the size that the cluster could have, and releases idle ones.

    Each worker holds the resources of the largest task so far. A thread takes snapshots of the cluster.
    """

    def __init__(
        self,
        workers: RayWorkers,
        connect_monitor: Callable[[], ClusterMonitor],
        events: ElasticPoolEvents,
        slots: int | None = None,
        start_seconds: float = START_SECONDS,
    ) -> None:
        self.plan = WorkerPlan()
        self.failure: ExecutorUnavailableError | None = None
        self._workers = workers
        self._events = events
        self._fixed_limit = slots
        self._capacity = Capacity(slots or 2**31, memory_gib=MAX_GIB, gpus=math.inf)
        self._start_seconds = start_seconds
        self._estimators: dict[LabelSet, CapacityEstimator] = {}
        self._requested_at = time.monotonic()
        self._infeasible_since: float | None = None
        self._failed_starts = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._monitor, args=(connect_monitor,), name="slimfront-monitor", daemon=True
        )

    @property
    def slots(self) -> int:
        limits = [estimator.limit for estimator in self._estimators.values()]
        return max(limits, default=CapacityEstimator(self._fixed_limit).limit)

    def check(self, needs: Resources) -> None:
        self._capacity.check(needs)

    def start(self) -> None:
        self._thread.start()

    def adjust(self) -> None:
        now = time.monotonic()
        limits = {key: estimator.limit for key, estimator in self._estimators.items()}
        change = self.plan.change(limits, now)
        for worker in change.release:
            self.remove(worker)
        for shape in change.request:
            self._estimators.setdefault(label_set(shape.labels), CapacityEstimator(self._fixed_limit))
            self.plan.request(self._workers.start(bundle(shape), shape.labels), shape)
            self._requested_at = now

    def preload(self, pickled_fn: bytes) -> None:
        """Do nothing: workers come one by one, each to a task that waits for it."""

    def locate(self, worker: int, answer: Future[WorkerLocation]) -> None:
        if worker not in self._workers:
            return
        error = answer.exception()
        if error is not None:
            self.remove(worker)
            self._failed_starts += 1
            if self._failed_starts == FAILED_STARTS:
                self.failure = ExecutorUnavailableError(f"workers do not start: {error}")
            return
        location = answer.result()
        self._workers.locate(worker, location)
        self._failed_starts = 0
        self.plan.ready(worker, location.node, time.monotonic())

    def remove(self, worker: int) -> None:
        self._workers.remove(worker)
        self.plan.remove(worker)
        self._requested_at = time.monotonic()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _monitor(self, connect_monitor: Callable[[], ClusterMonitor]) -> None:
        """The thread: take snapshots of the cluster."""
        monitor = connect_monitor()
        while not self._closed.wait(SNAPSHOT_SECONDS):
            snapshot = monitor.snapshot()
            if snapshot is not None:
                self._events.post(functools.partial(self._process, snapshot))

    def _process(self, snapshot: ClusterSnapshot) -> None:
        """Take in the state of the cluster: lost nodes, and requests that its autoscaler cannot place."""
        now = time.monotonic()
        self.plan.draining_nodes = snapshot.draining_nodes
        for worker in self.plan.workers_on(snapshot.dead_nodes):
            node = self.plan.node_of(worker)
            assert node is not None  # workers_on lists workers with a node
            self._events.on_node_lost(worker, node.id)
        infeasible = sum(self._update_limit(key, snapshot, now) for key in self._estimators)
        # A growing cluster that others use may place later what it cannot place now.
        is_idle = not (snapshot.has_autoscaler and snapshot.is_busy) and not self.plan.running
        if infeasible > 0 and is_idle:
            self._infeasible_since = self._infeasible_since or now
        else:
            self._infeasible_since = None
        self._fail_if_unschedulable(snapshot, now)

    def _update_limit(self, key: LabelSet, snapshot: ClusterSnapshot, now: float) -> int:
        """Update the estimate for workers with these labels; return how many requests no node can hold."""
        labels, estimator = dict(key), self._estimators[key]
        requested = Counter(demand(bundle(shape), labels) for shape in self.plan.requested(labels))
        if not snapshot.has_autoscaler:
            estimator.limit = self._fixed_limit or max(1, snapshot.cpus)
            return sum(not snapshot.has_node_for(request) for request in requested)
        if snapshot.autoscaler_saw <= self._requested_at + SEEN_SECONDS:
            return 0  # the autoscaler may not have seen the latest requests
        refused = (requested & Counter(snapshot.infeasible)).total()
        estimator.update(self.plan.count(labels), refused, now)
        return refused

    def _fail_if_unschedulable(self, snapshot: ClusterSnapshot, now: float) -> None:
        """Set `failure` if the cluster does not provide the requested workers."""
        waiting = self.plan.waiting
        if self.failure or not waiting or self.plan.running:
            return
        request = f"{describe(waiting[0])} ({len(waiting)} waiting)"
        since = self._infeasible_since
        if since is not None and now - since >= INFEASIBLE_SECONDS:
            largest = snapshot.largest_node
            history = f"; its nodes have had at most {largest} each" if largest else ""
            reason = f"no node that this cluster could have holds {request}{history}"
        elif now - self.plan.progress_at >= self._start_seconds:
            reason = (
                f"no worker came within {self._start_seconds:g} s for {request}; "
                f"the cluster has {snapshot.resources}"
            )
        else:
            return
        self.failure = ExecutorUnavailableError(f"{reason}. Request less, or let the cluster have more")
