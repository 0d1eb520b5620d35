"""RayExecutor: warm workers on Ray, on this machine or on a cluster. A door to Ray's core."""

from __future__ import annotations

import functools
import math
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import psutil

from cluster.executors.autoscaling import CapacityEstimator, Node, Shape, WorkerPlan, key_of
from cluster.executors.executor import Capacity, ExecutorUnavailableError, NodeType, Resources
from cluster.executors.gang import LOOPBACK, ends
from cluster.executors.task import TaskResult
from cluster.on_ray.cluster_state import ClusterMonitor, ClusterSnapshot, connect, demand, holds, said_of
from cluster.on_ray.fixed_pool import LOCAL_NODE, fixed_capacity
from cluster.on_ray.nodes import node_type
from cluster.on_ray.worker import Worker, WorkerLocation, no_op

DYING_SECONDS = 5.0
"""So long at most is waited for a killed process to be gone."""
STARTING_SECONDS = 900.0
"""So long a cluster has to give the first worker, or one when all are gone: a cloud's GPU may take ten minutes."""
REFUSED_SECONDS = 20.0
"""After so long of a cluster at rest, and of its autoscaler saying that no node could hold a worker, it is believed."""
FAILED_STARTS = 5
"""When so many workers in a row ended before they could do anything, the next one would too."""
LOOK_SECONDS = 1.0
"""How often a cluster is asked how it is."""
SEEN_SECONDS = 2.0
"""What is asked of a cluster may take so long to be seen by its autoscaler."""
MOST_GIB = 2**16
"""No node has so much memory. What is far beyond it overflows Ray's autoscaler, which then stands still."""


@dataclass
class RunningTask:
    """Work under way, waiting or running: on one worker, or on as many as it has ranks, the first of which tells its
    value. left: those that have not come back; ended: what is to be reported. A `cancelled` one is not reported."""

    key: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    workers: tuple[int, ...] = ()
    left: set[int] = field(default_factory=set)
    ended: TaskResult | None = None
    cancelled: bool = False

    @property
    def given_up(self) -> bool:
        return self.cancelled or self.ended is not None


class RayExecutor:
    """Runs work on warm Ray actors, its workers.

    Without an `address` (RAY_ADDRESS counts as one) it starts a Ray of its own on this machine, seen by
    this user only, and ends it in `close`; a driver that is killed takes it along. It then has a worker for each
    slot from the beginning to the end. `slots`, `memory_gib` and `gpus` default to what there is; `gpus` is shared out
    evenly over the slots.

    On a cluster it wants a worker for each piece that is under way, up to what the cluster could have (or `slots`), and
    lets go of who has nothing to do, so that an autoscaler adds and removes nodes with the work
    (cluster/executors/autoscaling.py).
    Each worker holds what the largest piece so far asked for. A piece whose node goes away is lost as preempted. `wait`
    raises Unavailable where no node could hold what is asked, or none came for `start_seconds`.

    A piece is only handed to an idle worker: the next one starts a call's latency (about a millisecond)
    after the last, and nothing waits in line behind a long piece while another slot is free. A thread
    hands out the work, so slots don't run dry while the caller thinks. When the first piece starts, the other workers
    of this machine import what its function needs, which may take as long as a short piece. A function is sent as it is
    at first: one that is submitted again must hold what it held. Neither pieces nor `env` may hold secrets: Ray shows
    them to whoever may see its state.

    `env` is set before a worker's process starts, as thread counts must be; by default each worker's
    mathematics uses one thread.
    """

    def __init__(
        self,
        slots: int | None = None,
        memory_gib: float | None = None,
        gpus: float | None = None,
        address: str | None = None,
        env: Mapping[str, str] | None = None,
        start_seconds: float = STARTING_SECONDS,
    ) -> None:
        address = address or os.environ.get("RAY_ADDRESS")
        self._ray, self._started_ray = connect(address, slots, gpus)
        self._env = {"env_vars": {**one_thread(), **(env or {})}}
        self._start_seconds = start_seconds
        self._given = slots
        self._capacity: Capacity | None = None
        self._share = 0.0
        self._workers: dict[int, Any] = {}
        self._places: dict[int, WorkerLocation] = {}
        self._hired = 0
        self._pieces: dict[int, RunningTask] = {}
        self._tickets: dict[str, int] = {}
        self._submitted = 0
        self._ended: dict[str, TaskResult] = {}
        self._loaded = False
        self._packed: tuple[Callable[..., Any], bytes] = no_op, b""
        self._rooms: dict[frozenset[tuple[str, str]], CapacityEstimator] = {}
        self._asked_at = self._stirred = time.monotonic()
        self._refused_since: float | None = None
        self._failed_starts = 0
        self._broken: ExecutorUnavailableError | None = None
        self._closed = threading.Event()
        self._changed = threading.Condition()
        self._news: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        if address in (None, "local"):
            self._capacity, self._share = fixed_capacity(
                self._ray.cluster_resources(), slots, memory_gib, gpus
            )
        self._workforce = WorkerPlan(self._capacity)
        self._threads = [threading.Thread(target=self._take_news, name="slimfront-ray", daemon=True)]
        if self._capacity is not None:
            for _ in range(self._capacity.slots):
                self._hire_here()
        else:
            self._threads.append(threading.Thread(target=self._look, name="slimfront-look", daemon=True))
        for thread in self._threads:
            thread.start()

    @property
    def slots(self) -> int:
        if self._capacity is not None:
            return self._capacity.slots
        with self._changed:
            return max(
                (room.limit for room in self._rooms.values()), default=CapacityEstimator(self._given).limit
            )

    def submit(self, key: str, fn: Callable[..., Any], *args: Any, resources: Resources) -> None:
        with self._changed:
            if self._closed.is_set():
                raise RuntimeError("this executor is closed")
            if key in self._tickets:
                raise ValueError(f"{key} is under way already; wait for it or cancel it first")
            (self._capacity or Capacity(self._given or 2**31, memory_gib=MOST_GIB, gpus=math.inf)).check(
                resources
            )
            if not self._pieces:
                self._stirred = time.monotonic()
            ticket = self._submitted
            self._workforce.add(ticket, resources)
            self._submitted += 1
            self._tickets[key] = ticket
            self._pieces[ticket] = RunningTask(key, fn, args)
            self._go_on()

    def wait(self, timeout: float | None = None) -> list[TaskResult]:
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self._ended and self._tickets:
                if self._broken:
                    raise self._broken
                left = min(deadline - time.monotonic(), threading.TIMEOUT_MAX)
                if left <= 0:
                    return []
                self._changed.wait(left)
            ended = list(self._ended.values())
            self._ended.clear()
            for one in ended:
                del self._tickets[one.key]
            return ended

    def cancel(self, key: str) -> None:
        with self._changed:
            self._ended.pop(key, None)
            ticket = self._tickets.pop(key, None)
            piece = None if ticket is None else self._pieces.get(ticket)
            if ticket is None or piece is None:
                return
            if not piece.workers:
                del self._pieces[ticket]
                self._workforce.end(ticket, time.monotonic())
            else:
                # It keeps its slot until its process is seen dead: what runs next may be exclusive.
                piece.cancelled = True
                self._kill(piece.left)
            self._go_on()
            self._changed.notify_all()

    def nodes(self) -> Mapping[NodeType, int]:
        return Counter(node_type(node["Labels"]) for node in self._ray.nodes() if node["Alive"])

    def close(self) -> None:
        with self._changed:
            if self._closed.is_set():
                return
            self._closed.set()
            self._pieces.clear()
            self._tickets.clear()
            self._ended.clear()
            self._changed.notify_all()
        self._news.put(None)
        for thread in self._threads:
            thread.join()
        self._kill(list(self._workers))
        if self._started_ray:
            self._ray.shutdown()

    def _take_news(self) -> None:
        """The thread: what came back or was seen, one after the other; then whoever may start does."""
        while take := self._news.get():
            with self._changed:
                if self._closed.is_set():
                    return
                try:
                    take()
                    self._go_on()
                except Exception as error:  # noqa: BLE001 - `wait` raises it
                    self._broken = ExecutorUnavailableError(f"Ray is gone: {error}")
                self._changed.notify_all()

    def _tell(self, take: Callable[..., None], *what: object) -> None:
        self._news.put(functools.partial(take, *what))

    def _go_on(self) -> None:
        while not self._closed.is_set() and (found := self._workforce.next()) is not None:
            self._start(*found)
        if self._capacity is None:
            self._adjust()

    def _start(self, ticket: int, workers: tuple[int, ...]) -> None:
        piece = self._pieces[ticket]
        piece.workers, piece.left = workers, set(workers)
        self._stirred = time.monotonic()
        try:
            packed = self._pack(piece.fn)
            self._load(packed)
            calls = self._called(piece, packed)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - such as what does not pickle
            failed: Future[Any] = Future()
            failed.set_exception(error)
            calls = dict.fromkeys(workers, failed)
        for worker, call in calls.items():
            call.add_done_callback(functools.partial(self._tell, self._settle, ticket, worker))

    def _called(self, piece: RunningTask, packed: bytes) -> dict[int, Future[Any]]:
        """The calls that do a piece, by worker."""
        actors = [self._workers[worker] for worker in piece.workers]
        if len(actors) == 1:
            return {piece.workers[0]: actors[0].run.remote(piece.key, packed, piece.args).future()}
        nodes = [self._workforce.node_of(worker) for worker in piece.workers]
        first = self._places.get(piece.workers[0])
        # Ray hands what the first worker answers on to the others: nobody waits for it here.
        met = actors[0].meet.remote(LOOPBACK if first is None else first.address)
        calls = {}
        for number, (worker, actor) in enumerate(zip(piece.workers, actors, strict=True)):
            ranks = (number, len(actors), nodes[:number].count(nodes[number]))
            calls[worker] = actor.run_rank.remote(piece.key, packed, piece.args, ranks, met).future()
        return calls

    def _pack(self, fn: Callable[..., Any]) -> bytes:
        """The function as it is sent. Most pieces have that of the one before, and pickling it may take longer than
        all else here, where it lies in a script."""
        if self._packed[0] is not fn:
            self._packed = fn, self._ray.cloudpickle.dumps(fn)
        return self._packed[1]

    def _load(self, packed: bytes) -> None:
        """Once, while the first piece imports the same: later, one that is exclusive may be well under way. Workers of
        a cluster come one by one, each to a piece that waits for it."""
        if self._loaded or self._capacity is None:
            return
        self._loaded = True
        for worker, actor in self._workers.items():
            if not any(worker in piece.workers for piece in self._pieces.values()):
                actor.load.remote(packed)

    def _settle(self, ticket: int, worker: int, done: Future[Any]) -> None:
        """A call came back: that of a piece, or of one of its ranks."""
        piece = self._pieces.get(ticket)
        if piece is None or worker not in piece.left:
            return  # its node was seen to be gone before
        error = done.exception()
        ended = done.result() if error is None else lost(piece.key, error)
        if piece.given_up or _process_is_gone(error):
            self._dismiss(worker)
        self._came_back(ticket, worker, ended)

    def _came_back(self, ticket: int, worker: int, ended: TaskResult) -> None:
        """What one worker tells of a piece. Where that ends it, other ranks are of no use any more."""
        piece = self._pieces[ticket]
        piece.left.discard(worker)
        if not piece.given_up and ends(piece.workers.index(worker), ended):
            piece.ended = ended
            self._kill(piece.left)
        if piece.left:
            return
        del self._pieces[ticket]
        self._stirred = time.monotonic()
        self._workforce.end(ticket, self._stirred)
        if not piece.cancelled and piece.ended is not None:
            self._ended[piece.key] = piece.ended

    def _hire_here(self) -> None:
        """A worker of this machine. It may be called at once: Ray keeps what it is to do until it is there."""
        anything = Shape(
            math.inf, self._share, math.inf
        )  # pieces share this machine, whichever worker does them
        number = self._hire(anything, _bundle(Shape(gpus=self._share)))
        self._workforce.ready(number, Node(LOCAL_NODE), time.monotonic())

    def _hire(self, shape: Shape, asked: Mapping[str, float]) -> int:
        """Ask Ray for a worker."""
        number, self._hired = self._hired, self._hired + 1
        actor = self._ray.remote(Worker).options(
            num_cpus=asked["CPU"], num_gpus=asked["GPU"], memory=asked["memory"] or None,
            label_selector=dict(shape.labels) or None,
            max_concurrency=1, max_restarts=0, max_task_retries=0, runtime_env=self._env,
        ).remote()  # fmt: skip
        self._workers[number] = actor
        self._workforce.want(number, shape)
        actor.where.remote().future().add_done_callback(functools.partial(self._tell, self._placed, number))
        return number

    def _placed(self, number: int, done: Future[WorkerLocation]) -> None:
        """A worker told where it is, or that it will never be."""
        if number not in self._workers:
            return
        if done.exception() is not None:
            if self._capacity is None:
                self._dismiss(number)
                self._failed_starts += 1
                if self._failed_starts == FAILED_STARTS:
                    self._broken = ExecutorUnavailableError(f"workers do not start: {done.exception()}")
            return
        self._places[number] = done.result()
        if self._capacity is None:
            self._failed_starts = 0
            self._workforce.ready(number, done.result().node, time.monotonic())
            if self._workforce.awaited(number):
                self._stirred = time.monotonic()

    def _dismiss(self, number: int) -> None:
        """Take a worker off, for good: one that is only out of reach must not come back and write what another does by
        then."""
        self._kill([number])
        self._see_dead(number)
        self._workers.pop(number, None)
        self._places.pop(number, None)
        self._workforce.lose(number)
        self._asked_at = time.monotonic()
        if self._capacity is not None:
            self._hire_here()

    def _kill(self, workers: Collection[int]) -> None:
        for worker in workers:
            if worker in self._workers:
                self._ray.kill(self._workers[worker])

    def _see_dead(self, number: int) -> None:
        """Wait until a killed worker's process is gone, if it is on this machine: Ray tells of its end a little before,
        and what is handed out next may need the machine for itself."""
        place = self._places.get(number)
        if place is None or place.machine != socket.gethostname():
            return
        deadline = time.monotonic() + DYING_SECONDS
        while _alive(place.pid) and time.monotonic() < deadline:
            time.sleep(0.005)

    def _adjust(self) -> None:
        """Ask a cluster for the workers that pieces wait for, and let go of those that none waits for."""
        now = time.monotonic()
        limits = {key: room.limit for key, room in self._rooms.items()}
        change = self._workforce.change(limits, now)
        for number in change.let_go:
            self._dismiss(number)
        for shape in change.want:
            self._rooms.setdefault(key_of(shape.labels), CapacityEstimator(self._given))
            self._hire(shape, _bundle(shape))
            self._asked_at = now

    def _look(self) -> None:
        """The other thread: ask a cluster how it is, now and then."""
        view = ClusterMonitor(self._ray)
        while not self._closed.wait(LOOK_SECONDS):
            seen = view.seen()
            if seen is not None:
                self._tell(self._saw, seen)

    def _saw(self, seen: ClusterSnapshot) -> None:
        """What the cluster told of itself: of nodes that are gone, and of what its autoscaler can't place."""
        now = time.monotonic()
        self._workforce.leaving = seen.leaving
        for number in self._workforce.on(seen.gone):
            self._lost_with_node(number)
        refused = 0
        for key, room in self._rooms.items():
            labels = dict(key)
            wanted = Counter(demand(_bundle(one), labels) for one in self._workforce.wanted(labels))
            if seen.scales and seen.seen_at > self._asked_at + SEEN_SECONDS:
                too_many = (wanted & Counter(seen.refused)).total()
                refused += too_many
                room.take(self._workforce.count(labels), too_many, now)
            elif not seen.scales:
                refused += sum(not any(holds(node, one) for node in seen.nodes) for one in wanted)
                room.limit = self._given or max(1, seen.cpus)
        # What a cluster that grows refuses while others use it, it may have later.
        at_rest = refused > 0 and not (seen.scales and seen.busy) and not self._workforce.running
        self._refused_since = (self._refused_since or now) if at_rest else None
        self._give_up_in_vain(seen, now)

    def _lost_with_node(self, number: int) -> None:
        node = self._places[number].node.id
        ticket = next((one for one, piece in self._pieces.items() if number in piece.left), None)
        self._dismiss(number)
        if ticket is not None:
            ended = TaskResult(self._pieces[ticket].key, error=f"the node {node} went away", preempted=True)
            self._came_back(ticket, number, ended)

    def _give_up_in_vain(self, seen: ClusterSnapshot, now: float) -> None:
        """Say that what is asked of the cluster does not come, where that is so."""
        waiting = list(self._workforce.waiting)
        if self._broken or not waiting or self._workforce.running:
            return
        asked = f"{said_of(waiting[0])} ({len(waiting)} waiting)"
        if self._refused_since is not None and now - self._refused_since >= REFUSED_SECONDS:
            had = f"; its nodes have had at most {seen.most} each" if seen.most else ""
            said = f"no node that this cluster could have holds {asked}{had}"
        elif now - self._stirred >= self._start_seconds:
            said = f"no worker came within {self._start_seconds:g} s for {asked}; the cluster has {seen.has}"
        else:
            return
        self._broken = ExecutorUnavailableError(f"{said}. Ask for less, or let the cluster have more")


def _bundle(shape: Shape) -> dict[str, float]:
    """What Ray is asked for, for a worker."""
    return {"CPU": shape.cpus, "GPU": shape.gpus, "memory": math.ceil(shape.memory_gib * 2**30)}


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def one_thread() -> dict[str, str]:
    """The environment in which each process computes with one thread."""
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def _process_is_gone(error: BaseException | None) -> bool:
    """Whether the worker itself was lost, and not only the call's arguments or result."""
    from ray import exceptions

    return isinstance(error, exceptions.RayError) and not isinstance(error, exceptions.RayTaskError)


def lost(key: str, error: BaseException) -> TaskResult:
    """What is reported of a piece whose call Ray gave up: a node that went away counts as preempted."""
    from ray import exceptions

    text = str(error)
    preempted = (
        isinstance(error, exceptions.ActorUnavailableError | exceptions.NodeDiedError)
        or (isinstance(error, exceptions.RayActorError) and error.preempted)
        or "its node has died" in text
    )
    return TaskResult(key, error=f"{type(error).__name__}: {text}", preempted=preempted)
