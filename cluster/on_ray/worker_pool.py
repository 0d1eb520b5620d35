"""WorkerPool: the interface to the workers of a RayExecutor, and the Ray actors behind it."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from types import ModuleType
from typing import Any, Protocol

import psutil

from cluster.executors.autoscaling import Shape, WorkerPlan
from cluster.executors.executor import ExecutorUnavailableError, Resources
from cluster.on_ray.worker import Worker, WorkerLocation

DYING_SECONDS = 5.0
"""The longest wait for the end of a killed process."""

Located = Callable[[int, Future[WorkerLocation]], None]
"""Receives the number of a worker and its location, or the error because of which it has none."""


class WorkerPool(Protocol):
    """Decides how many workers there are, and starts, replaces and removes them.

    All methods but `close` run under the executor's lock.
    """

    plan: WorkerPlan
    failure: ExecutorUnavailableError | None
    """The reason for which no worker will come any more."""

    @property
    def slots(self) -> int:
        """The number of tasks that could run at once."""

    def check(self, needs: Resources) -> None:
        """Check that these resources can be provided. ValueError if they never can."""

    def start(self) -> None:
        """Start the first workers, or the thread that follows the cluster."""

    def adjust(self) -> None:
        """Request the workers that tasks wait for, and release idle ones."""

    def preload(self, pickled_fn: bytes) -> None:
        """Let idle workers import the modules of the function that is about to run elsewhere."""

    def locate(self, worker: int, answer: Future[WorkerLocation]) -> None:
        """Take in the answer of a worker that was asked for its location."""

    def remove(self, worker: int) -> None:
        """Kill a worker, for good: one that is only out of reach must not return and write to files of other tasks."""

    def close(self) -> None:
        """Stop the pool's threads; the executor kills the workers."""


class RayWorkers:
    """The Ray actors of one executor, by number."""

    def __init__(self, ray: ModuleType, env_vars: Mapping[str, str], on_located: Located) -> None:
        self._ray = ray
        self._runtime_env = {"env_vars": dict(env_vars)}
        self._on_located = on_located
        self._actors: dict[int, Any] = {}
        self._locations: dict[int, WorkerLocation] = {}
        self._started = 0

    def __contains__(self, worker: int) -> bool:
        return worker in self._actors

    def __iter__(self) -> Iterator[int]:
        return iter(self._actors)

    def start(self, bundle: Mapping[str, float], labels: Mapping[str, str]) -> int:
        """Request a worker from Ray and return its number. `on_located` is called when it runs or has failed."""
        number, self._started = self._started, self._started + 1
        actor = self._ray.remote(Worker).options(
            num_cpus=bundle["CPU"], num_gpus=bundle["GPU"], memory=bundle["memory"] or None,
            label_selector=dict(labels) or None,
            max_concurrency=1, max_restarts=0, max_task_retries=0, runtime_env=self._runtime_env,
        ).remote()  # fmt: skip
        self._actors[number] = actor
        located: Future[WorkerLocation] = actor.location.remote().future()
        located.add_done_callback(lambda answer: self._on_located(number, answer))
        return number

    def actor(self, worker: int) -> Any:
        return self._actors[worker]

    def location(self, worker: int) -> WorkerLocation | None:
        return self._locations.get(worker)

    def locate(self, worker: int, location: WorkerLocation) -> None:
        self._locations[worker] = location

    def kill(self, workers: Collection[int]) -> None:
        """Kill these workers; unknown numbers are ignored."""
        for worker in workers:
            if worker in self._actors:
                self._ray.kill(self._actors[worker])

    def remove(self, worker: int) -> None:
        """Kill a worker, wait until its process has ended, and forget it."""
        self.kill([worker])
        self._wait_for_exit(worker)
        self._actors.pop(worker, None)
        self._locations.pop(worker, None)

    def _wait_for_exit(self, worker: int) -> None:
        """Wait until a killed process of this machine has ended.

        Ray reports its end a little before, and the next task may need the machine for itself.
        """
        location = self._locations.get(worker)
        if location is None or location.machine != socket.gethostname():
            return
        deadline = time.monotonic() + DYING_SECONDS
        while _is_alive(location.pid) and time.monotonic() < deadline:
            time.sleep(0.005)


def bundle(shape: Shape) -> dict[str, float]:
    """Return the resources of a worker under Ray's names."""
    return {"CPU": shape.cpus, "GPU": shape.gpus, "memory": math.ceil(shape.memory_gib * 2**30)}


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
