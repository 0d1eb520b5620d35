"""RayExecutor: warm workers on Ray, on this machine or on a cluster. The door to Ray's core."""

from __future__ import annotations

import ctypes
import json
import logging
import math
import os
import pickle
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType
from typing import Any

import psutil

from cluster import draining
from cluster.executor import Admission, Capacity, Ended, Resources, cores, run_piece

# Results larger than 100 KB pass through Ray's shared memory; ours are records, files go to the store.
OBJECT_STORE_BYTES = 150 * 2**20
DYING_SECONDS = 5.0
"""So long at most is waited for a killed process to be gone."""


class Worker:
    """One warm process: what a piece of work loads and caches stays for the next one."""

    def __init__(self) -> None:
        _die_with_parent()
        draining.watch()
        self._packed, self._fn = b"", _nothing

    def run(self, key: str, packed: bytes, args: tuple[Any, ...]) -> Ended:
        return run_piece(key, self._unpacked(packed), args)

    def where(self) -> tuple[str, int]:
        """The machine and the process that this is."""
        return socket.gethostname(), os.getpid()

    def load(self, packed: bytes) -> None:
        """Make the function ready: this process imports what it needs."""
        self._unpacked(packed)

    def _unpacked(self, packed: bytes) -> Callable[..., Any]:
        """The function of the last piece, if it is that again, as it mostly is."""
        if packed != self._packed:
            self._packed, self._fn = b"", pickle.loads(packed)
            self._packed = packed
        return self._fn


@dataclass
class _Piece:
    """Work under way, waiting or running on `worker`. A `cancelled` one is not reported."""

    key: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    worker: Any = None
    cancelled: bool = False


class RayExecutor:
    """Runs work on warm Ray actors, one for each slot.

    Without an `address` (RAY_ADDRESS counts as one) it starts a Ray of its own on this machine, seen by
    this user only, and ends it in `close`; a driver that is killed takes it along. `slots`, `memory_gib` and
    `gpus` default to what there is, on a cluster to what it has when this connects; `gpus` is shared out
    evenly over the slots. On several nodes memory is counted over all of them together.

    A piece is only handed to an idle worker: the next one starts a call's latency (about a millisecond)
    after the last, and nothing waits in line behind a long piece while another slot is free. A thread
    hands out the work, so slots don't run dry while the caller thinks. When the first piece starts, the other workers
    import what its function needs, which may take as long as a short piece. A function is sent as it is at first:
    one that is submitted again must hold what it held. Neither pieces nor `env` may hold secrets: Ray shows them
    to whoever may see its state.

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
    ) -> None:
        self._ray, self._started_ray = connect(address or os.environ.get("RAY_ADDRESS"), slots, gpus)
        have = self._ray.cluster_resources()
        self.slots = int(slots or max(1, have.get("CPU", 1)))
        share = (have.get("GPU", 0.0) if gpus is None else gpus) / self.slots
        memory = have.get("memory", math.inf) / 2**30 if memory_gib is None else memory_gib
        cpus = max(self.slots, have.get("CPU", 1), cores())
        self._admission = Admission(Capacity(self.slots, cpus, memory, share))
        self._actor = self._ray.remote(Worker).options(
            num_cpus=1, num_gpus=share, max_concurrency=1, max_restarts=0, max_task_retries=0,
            runtime_env={"env_vars": {**one_thread(), **(env or {})}},
        )  # fmt: skip
        self._where: dict[Any, Any] = {}
        self._idle = [self._new_worker() for _ in range(self.slots)]
        self._pieces: dict[int, _Piece] = {}
        self._tickets: dict[str, int] = {}
        self._submitted = 0
        self._ended: dict[str, Ended] = {}
        self._loaded = False
        self._packed: tuple[Callable[..., Any], bytes] = _nothing, b""
        self._broken: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._resolved: SimpleQueue[tuple[int, Future[Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._hand_out, name="slimfront-ray", daemon=True)
        self._thread.start()

    def submit(self, key: str, fn: Callable[..., Any], *args: Any, resources: Resources) -> None:
        with self._changed:
            if self._closed:
                raise RuntimeError("this executor is closed")
            if key in self._tickets:
                raise ValueError(f"{key} is under way already; wait for it or cancel it first")
            ticket = self._submitted
            self._admission.add(ticket, resources)
            self._submitted += 1
            self._tickets[key] = ticket
            self._pieces[ticket] = _Piece(key, fn, args)
            self._start_what_may()

    def wait(self, timeout: float | None = None) -> list[Ended]:
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self._ended and self._tickets:
                if self._broken:
                    raise RuntimeError("Ray is gone; start again, finished work is kept") from self._broken
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
            if piece.worker is None:
                self._forget(ticket)
            else:
                # It keeps its slot until its process is seen dead: what runs next may be exclusive.
                piece.cancelled = True
                self._ray.kill(piece.worker)
            self._start_what_may()
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            if self._closed:
                return
            self._closed = True
            workers = [*self._idle, *(piece.worker for piece in self._pieces.values() if piece.worker)]
            self._idle.clear()
            self._pieces.clear()
            self._tickets.clear()
            self._ended.clear()
            self._changed.notify_all()
        self._resolved.put(None)
        self._thread.join()
        for worker in workers:
            self._ray.kill(worker)
        if self._started_ray:
            self._ray.shutdown()

    def _hand_out(self) -> None:
        """The thread: each call that came back frees a worker, and the next piece starts on it."""
        while item := self._resolved.get():
            with self._changed:
                try:
                    self._settle(*item)
                    self._start_what_may()
                except Exception as error:  # noqa: BLE001 - `wait` raises it
                    self._broken = error
                self._changed.notify_all()

    def _start_what_may(self) -> None:
        while not self._closed and (ticket := self._admission.next()) is not None:
            piece = self._pieces[ticket]
            piece.worker = self._idle.pop()
            try:
                packed = self._pack(piece.fn)
                self._load(packed)
                future = piece.worker.run.remote(piece.key, packed, piece.args).future()
            except (Exception, SystemExit) as error:  # noqa: BLE001 - such as what does not pickle
                future = Future()
                future.set_exception(error)
            future.add_done_callback(lambda done, ticket=ticket: self._resolved.put((ticket, done)))

    def _pack(self, fn: Callable[..., Any]) -> bytes:
        """The function as it is sent. Most pieces have that of the one before, and pickling it may take longer than
        all else here, where it lies in a script."""
        if self._packed[0] is not fn:
            self._packed = fn, self._ray.cloudpickle.dumps(fn)
        return self._packed[1]

    def _load(self, packed: bytes) -> None:
        """Once, while the first piece imports the same: later, one that is exclusive may be well under way."""
        if self._loaded:
            return
        self._loaded = True
        for worker in self._idle:
            worker.load.remote(packed)

    def _settle(self, ticket: int, done: Future[Any]) -> None:
        if self._closed:
            return
        piece = self._pieces[ticket]
        error = done.exception()
        if piece.cancelled or _process_is_gone(error):
            # One that is only out of reach must not come back and write what another does by then.
            self._ray.kill(piece.worker)
            self._see_dead(piece.worker)
            self._idle.insert(0, self._new_worker())
        else:
            self._idle.append(piece.worker)
        self._forget(ticket)
        if not piece.cancelled:
            self._ended[piece.key] = done.result() if error is None else lost(piece.key, error)

    def _new_worker(self) -> Any:
        worker = self._actor.remote()
        self._where[worker] = worker.where.remote()
        return worker

    def _see_dead(self, worker: Any) -> None:
        """Wait until a killed worker's process is gone, if it is on this machine: Ray tells of its end a little before,
        and what is handed out next may need the machine for itself."""
        try:
            machine, pid = self._ray.get(self._where.pop(worker), timeout=0.1)
        except Exception:  # noqa: BLE001 - it died before it could tell
            return
        deadline = time.monotonic() + DYING_SECONDS
        while machine == socket.gethostname() and _alive(pid) and time.monotonic() < deadline:
            time.sleep(0.005)

    def _forget(self, ticket: int) -> None:
        del self._pieces[ticket]
        self._admission.end(ticket)


def _nothing() -> None:
    """Stands where no function was sent yet."""


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def one_thread() -> dict[str, str]:
    """The environment in which each process computes with one thread."""
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def _die_with_parent() -> None:
    """Kill this process when its raylet ends: Ray alone let busy workers write for half a minute more."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, see prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def connect(address: str | None, slots: int | None, gpus: float | None) -> tuple[ModuleType, bool]:
    """Ray, and whether this started it. It is imported only now: it reads its environment once."""
    local = address in (None, "local")
    _authenticate(local)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray prints each lost worker to our standard output; `wait` reports them.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    # Ray would run workers at a low priority: on a busy machine the timings would tell of the others.
    os.environ.setdefault("RAY_worker_niceness", "0")
    import ray

    if ray.is_initialized():
        return ray, False
    if not local:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        return ray, False
    ray.init(
        address="local", num_cpus=slots, num_gpus=None if gpus is None else math.ceil(gpus),
        include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
        object_store_memory=OBJECT_STORE_BYTES,
    )  # fmt: skip
    return ray, True


def _authenticate(local: bool) -> None:
    """Say explicitly whether Ray asks for a token: left unset it depends on how it is started.

    A Ray of our own gets a token that only this process and its children know. A cluster has been set up
    by someone: with the token found where Ray looks for it, or without.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return
    kept = Path.home() / ".ray" / "auth_token"
    has_token = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ or kept.exists()
    if local and not has_token:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ["RAY_AUTH_MODE"] = "token" if local or has_token else "disabled"


def _process_is_gone(error: BaseException | None) -> bool:
    """Whether the worker itself was lost, and not only the call's arguments or result."""
    from ray import exceptions

    return isinstance(error, exceptions.RayError) and not isinstance(error, exceptions.RayTaskError)


def lost(key: str, error: BaseException) -> Ended:
    """What is reported of a piece whose call Ray gave up: a node that went away counts as preempted."""
    from ray import exceptions

    text = str(error)
    preempted = (
        isinstance(error, exceptions.ActorUnavailableError | exceptions.NodeDiedError)
        or (isinstance(error, exceptions.RayActorError) and error.preempted)
        or "its node has died" in text
    )
    return Ended(key, lost=f"{type(error).__name__}: {text}", preempted=preempted)


def launcher_schema() -> dict[str, Any]:
    """Ray's JSON schema of the files of its cluster launcher, read from where Ray is installed; imports no Ray."""
    file = Path(str(metadata.distribution("ray").locate_file("ray/autoscaler/ray-schema.json")))
    schema: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return schema
