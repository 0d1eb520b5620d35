"""FixedPool: the workers of a Ray on this machine, one for each slot from beginning to end."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from concurrent.futures import Future

from cluster.executors.autoscaling import Node, Shape, WorkerPlan
from cluster.executors.executor import Capacity, ExecutorUnavailableError, Resources, cores
from cluster.on_ray.worker import WorkerLocation
from cluster.on_ray.worker_pool import RayWorkers, bundle

LOCAL_NODE = "this machine"
"""The node of all workers of a Ray on this machine."""


class FixedPool:
    """A worker for each slot. A worker that is removed is replaced at once."""

    failure: ExecutorUnavailableError | None = None

    def __init__(self, workers: RayWorkers, capacity: Capacity) -> None:
        self.plan = WorkerPlan(capacity)
        self._workers = workers
        self._capacity = capacity
        self._is_preloaded = False

    @property
    def slots(self) -> int:
        return self._capacity.slots

    def check(self, needs: Resources) -> None:
        self._capacity.check(needs)

    def start(self) -> None:
        for _ in range(self._capacity.slots):
            self._start_worker()

    def adjust(self) -> None:
        """Do nothing: the number of workers does not change."""

    def preload(self, pickled_fn: bytes) -> None:
        """Preload once, while the first task imports the same modules.

        Later an exclusive task may run, which the imports of other workers would disturb.
        """
        if self._is_preloaded:
            return
        self._is_preloaded = True
        for worker in self.plan.idle_workers():
            self._workers.actor(worker).load.remote(pickled_fn)

    def locate(self, worker: int, answer: Future[WorkerLocation]) -> None:
        if worker in self._workers and answer.exception() is None:
            self._workers.locate(worker, answer.result())

    def remove(self, worker: int) -> None:
        self._workers.remove(worker)
        self.plan.remove(worker)
        self._start_worker()

    def close(self) -> None:
        """Do nothing: this pool has no threads."""

    def _start_worker(self) -> None:
        """Start a worker and count it as ready: Ray keeps its calls until its process runs."""
        # Tasks share the machine's processors and memory, whichever worker runs them; the plan's capacity limits these.
        unlimited = Shape(math.inf, self._capacity.gpus, math.inf)
        worker = self._workers.start(bundle(Shape(gpus=self._capacity.gpus)), labels={})
        self.plan.request(worker, unlimited)
        self.plan.ready(worker, Node(LOCAL_NODE), time.monotonic())


def local_capacity(
    ray_resources: Mapping[str, float], slots: int | None, memory_gib: float | None, gpus: float | None
) -> Capacity:
    """Return the capacity of a Ray on this machine; options that are None default to its resources.

    The GPUs are divided evenly among the slots.
    """
    count = int(slots or max(1, ray_resources.get("CPU", 1)))
    if gpus is None:
        gpus = ray_resources.get("GPU", 0.0)
    if memory_gib is None:
        memory_gib = ray_resources.get("memory", math.inf) / 2**30
    return Capacity(count, max(count, ray_resources.get("CPU", 1), cores()), memory_gib, gpus / count)
