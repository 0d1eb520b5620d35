"""RayExecutor: runs tasks on warm workers of Ray, on this machine or on a cluster."""

from __future__ import annotations

import functools
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from cluster.executors.executor import ExecutorUnavailableError, NodeType, Resources
from cluster.executors.gang import LOOPBACK, decides_task
from cluster.executors.task import TaskResult
from cluster.on_ray.cluster_state import ClusterMonitor
from cluster.on_ray.connection import connect
from cluster.on_ray.elastic_pool import START_SECONDS, ElasticPool, ElasticPoolEvents
from cluster.on_ray.fixed_pool import FixedPool, local_capacity
from cluster.on_ray.nodes import node_type
from cluster.on_ray.worker import WorkerLocation, no_op
from cluster.on_ray.worker_pool import RayWorkers, WorkerPool


@dataclass
class RunningTask:
    """A task that waits or runs: on one worker, or on as many as it has ranks."""

    key: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    workers: tuple[int, ...] = ()
    """The workers of its ranks, in the order of the ranks; empty while it waits."""
    pending_workers: set[int] = field(default_factory=set)
    """The workers whose calls have not returned yet."""
    result: TaskResult | None = None
    """The result to report once all calls have returned."""
    is_cancelled: bool = False
    """True if no result is to be reported."""

    @property
    def is_decided(self) -> bool:
        """Whether further ranks cannot change the result."""
        return self.is_cancelled or self.result is not None


class RayExecutor:
    """Runs tasks on warm Ray actors, its workers.

    Without an `address` (RAY_ADDRESS counts as one) it starts a Ray on this machine, which only this user can reach,
    and stops it in `close`; the Ray also ends with a driver that is killed. There is a worker for each slot (see
    FixedPool). `slots`, `memory_gib` and `gpus` default to the machine's; `gpus` is divided evenly among the slots.

    On a cluster the number of workers follows the number of tasks, up to the size that the cluster could have, or
    `slots` (see ElasticPool). A task whose node is lost has a result with an error, as preempted. `wait` raises
    ExecutorUnavailableError if no node could hold a task, or no node came for `start_seconds`.

    A task is sent to an idle worker only: it starts a call's latency (about a millisecond) after the previous one, and
    no task waits behind a long one while another slot is free. A thread sends the tasks, so that slots stay busy while
    the caller computes. A function is pickled at its first use: one that is submitted again must be unchanged. Neither
    tasks nor `env` may contain secrets: Ray shows them to all users that can read its state.

    `env` is set before a worker's process starts, as thread counts require; by default each worker computes with one
    thread.
    """

    def __init__(
        self,
        slots: int | None = None,
        memory_gib: float | None = None,
        gpus: float | None = None,
        address: str | None = None,
        env: Mapping[str, str] | None = None,
        start_seconds: float = START_SECONDS,
    ) -> None:
        address = address or os.environ.get("RAY_ADDRESS")
        self._ray, self._started_ray = connect(address, slots, gpus)
        self._tasks: dict[int, RunningTask] = {}
        self._tickets: dict[str, int] = {}
        self._submitted = 0
        self._results: dict[str, TaskResult] = {}
        self._last_pickled: tuple[Callable[..., Any], bytes] = no_op, b""
        self._failure: ExecutorUnavailableError | None = None
        self._closed = threading.Event()
        self._changed = threading.Condition()
        self._events: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._workers = RayWorkers(self._ray, {**one_thread(), **(env or {})}, self._post_location)
        self._pool: WorkerPool
        if address in (None, "local"):
            capacity = local_capacity(self._ray.cluster_resources(), slots, memory_gib, gpus)
            self._pool = FixedPool(self._workers, capacity)
        else:
            monitor = functools.partial(ClusterMonitor, self._ray)
            events = ElasticPoolEvents(self._events.put, self._on_node_lost)
            self._pool = ElasticPool(self._workers, monitor, events, slots, start_seconds)
        self._thread = threading.Thread(target=self._process_events, name="slimfront-ray", daemon=True)
        self._pool.start()
        self._thread.start()

    @property
    def slots(self) -> int:
        with self._changed:
            return self._pool.slots

    def submit(self, key: str, fn: Callable[..., Any], *args: Any, resources: Resources) -> None:
        with self._changed:
            if self._closed.is_set():
                raise RuntimeError("this executor is closed")
            if key in self._tickets:
                raise ValueError(f"{key} is pending already; wait for its result or cancel it first")
            self._pool.check(resources)
            ticket, self._submitted = self._submitted, self._submitted + 1
            self._pool.plan.add(ticket, resources, time.monotonic())
            self._tickets[key] = ticket
            self._tasks[ticket] = RunningTask(key, fn, args)
            self._dispatch()

    def wait(self, timeout: float | None = None) -> list[TaskResult]:
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self._results and self._tickets:
                failure = self._failure or self._pool.failure
                if failure:
                    raise failure
                remaining_seconds = min(deadline - time.monotonic(), threading.TIMEOUT_MAX)
                if remaining_seconds <= 0:
                    return []
                self._changed.wait(remaining_seconds)
            results = list(self._results.values())
            self._results.clear()
            for result in results:
                del self._tickets[result.key]
            return results

    def cancel(self, key: str) -> None:
        with self._changed:
            self._results.pop(key, None)
            ticket = self._tickets.pop(key, None)
            if ticket is None or ticket not in self._tasks:
                return
            task = self._tasks[ticket]
            if task.workers:
                # It keeps its slot until its process has ended: the next task may be exclusive.
                task.is_cancelled = True
                self._workers.kill(task.pending_workers)
            else:
                del self._tasks[ticket]
                self._pool.plan.end(ticket, time.monotonic())
            self._dispatch()
            self._changed.notify_all()

    def nodes(self) -> Mapping[NodeType, int]:
        return Counter(node_type(node["Labels"]) for node in self._ray.nodes() if node["Alive"])

    def close(self) -> None:
        with self._changed:
            if self._closed.is_set():
                return
            self._closed.set()
            self._tasks.clear()
            self._tickets.clear()
            self._results.clear()
            self._changed.notify_all()
        self._events.put(None)
        self._thread.join()
        self._pool.close()
        self._workers.kill(list(self._workers))
        if self._started_ray:
            self._ray.shutdown()

    def _process_events(self) -> None:
        """The thread: process events one after another, and start the tasks that may start after each."""
        while event := self._events.get():
            with self._changed:
                if self._closed.is_set():
                    return
                try:
                    event()
                    self._dispatch()
                except Exception as error:  # noqa: BLE001 - `wait` raises it
                    self._failure = ExecutorUnavailableError(f"Ray is gone: {error}")
                self._changed.notify_all()

    def _dispatch(self) -> None:
        """Start all tasks that may start now."""
        plan = self._pool.plan
        while not self._closed.is_set() and (assigned := plan.next(time.monotonic())) is not None:
            self._start(*assigned)
        self._pool.adjust()

    def _start(self, ticket: int, workers: tuple[int, ...]) -> None:
        task = self._tasks[ticket]
        task.workers, task.pending_workers = workers, set(workers)
        try:
            pickled_fn = self._pickle(task.fn)
            self._pool.preload(pickled_fn)
            calls = self._call(task, pickled_fn)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - such as arguments that do not pickle
            failed: Future[Any] = Future()
            failed.set_exception(error)
            calls = dict.fromkeys(workers, failed)
        for worker, call in calls.items():
            call.add_done_callback(functools.partial(self._post_answer, ticket, worker))

    def _call(self, task: RunningTask, pickled_fn: bytes) -> dict[int, Future[Any]]:
        """Call the workers of a task; return the future answers by worker."""
        actors = [self._workers.actor(worker) for worker in task.workers]
        if len(actors) == 1:
            return {task.workers[0]: actors[0].run.remote(task.key, pickled_fn, task.args).future()}
        nodes = [self._pool.plan.node_of(worker) for worker in task.workers]
        location = self._workers.location(task.workers[0])
        address = LOOPBACK if location is None else location.address
        # Ray passes the answer of the first worker on to the others, without a wait in this process.
        meeting_point = actors[0].meeting_point.remote(address)
        calls = {}
        for rank, (worker, actor) in enumerate(zip(task.workers, actors, strict=True)):
            ranks = (rank, len(actors), nodes[:rank].count(nodes[rank]))
            answer = actor.run_rank.remote(task.key, pickled_fn, task.args, ranks, meeting_point)
            calls[worker] = answer.future()
        return calls

    def _pickle(self, fn: Callable[..., Any]) -> bytes:
        """Pickle a function. Consecutive tasks mostly have the same one, and pickling one of a script takes long."""
        if self._last_pickled[0] is not fn:
            self._last_pickled = fn, self._ray.cloudpickle.dumps(fn)
        return self._last_pickled[1]

    def _post_answer(self, ticket: int, worker: int, answer: Future[Any]) -> None:
        self._events.put(functools.partial(self._on_answer, ticket, worker, answer))

    def _post_location(self, worker: int, answer: Future[WorkerLocation]) -> None:
        self._events.put(functools.partial(self._pool.locate, worker, answer))

    def _on_answer(self, ticket: int, worker: int, answer: Future[Any]) -> None:
        """Process the return of a call: of a task, or of one of its ranks."""
        task = self._tasks.get(ticket)
        if task is None or worker not in task.pending_workers:
            return  # its node was lost before
        error = answer.exception()
        result = answer.result() if error is None else call_error(task.key, error)
        if task.is_decided or _is_worker_lost(error):
            self._pool.remove(worker)
        self._on_rank_result(ticket, worker, result)

    def _on_node_lost(self, worker: int, node: str) -> None:
        """Remove a worker of a lost node, and end the task that ran on it."""
        running = [ticket for ticket, task in self._tasks.items() if worker in task.pending_workers]
        self._pool.remove(worker)
        for ticket in running:
            key = self._tasks[ticket].key
            self._on_rank_result(
                ticket, worker, TaskResult(key, error=f"the node {node} was lost", preempted=True)
            )

    def _on_rank_result(self, ticket: int, worker: int, result: TaskResult) -> None:
        """Process the result of one worker of a task. If it decides the task, the other ranks are killed."""
        task = self._tasks[ticket]
        task.pending_workers.discard(worker)
        if not task.is_decided and decides_task(task.workers.index(worker), result):
            task.result = result
            self._workers.kill(task.pending_workers)
        if task.pending_workers:
            return
        del self._tasks[ticket]
        self._pool.plan.end(ticket, time.monotonic())
        if not task.is_cancelled and task.result is not None:
            self._results[task.key] = task.result


def one_thread() -> dict[str, str]:
    """Return the environment in which a process computes with one thread."""
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def _is_worker_lost(error: BaseException | None) -> bool:
    """Return whether the worker itself was lost, rather than the call's arguments or result."""
    from ray import exceptions

    return isinstance(error, exceptions.RayError) and not isinstance(error, exceptions.RayTaskError)


def call_error(key: str, error: BaseException) -> TaskResult:
    """Return the result of a task whose call failed in Ray; the loss of a node counts as preemption."""
    from ray import exceptions

    text = str(error)
    is_preempted = (
        isinstance(error, exceptions.ActorUnavailableError | exceptions.NodeDiedError)
        or (isinstance(error, exceptions.RayActorError) and error.preempted)
        or "its node has died" in text
    )
    return TaskResult(key, error=f"{type(error).__name__}: {text}", preempted=is_preempted)
