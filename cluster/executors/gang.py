"""Gang: one task that several processes run at once, its ranks, which communicate with each other.

Each rank calls the same `fn(*args)` in a fresh process, whose environment has the variables that torch.distributed
reads: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. The process is fresh because torch.distributed keeps a
process group for the life of its process.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import cloudpickle

from cluster.executors.task import TaskResult, run_task

LOOPBACK = "127.0.0.1"

# The child reads sys.path first: it needs it to import this module.
_CHILD = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from cluster.executors.gang import _child; _child()"
)


@dataclass(frozen=True)
class Rank:
    """One rank of a gang."""

    rank: int
    ranks: int
    """The number of ranks of the gang."""
    local_rank: int
    """The number of this rank among those on its machine."""
    address: str
    """The address on which rank 0 listens."""
    port: int

    def environment(self) -> dict[str, str]:
        """Return the variables that torch.distributed reads."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.ranks),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def run_rank(key: str, fn: Callable[..., Any], args: tuple[Any, ...], rank: Rank) -> TaskResult:
    """Run one rank in a child process and return its result; the result has an error if that process died.

    The child process ends with this call, and with the thread that made it.
    """
    with RankProcess(key, fn, args, rank) as process:
        return process.result()


def run_gang(key: str, fn: Callable[..., Any], args: tuple[Any, ...], ranks: int) -> TaskResult:
    """Run a task with this many ranks on this machine.

    The first rank result for which `decides_task` is true becomes the result of the task, and ends the other ranks.
    """
    port = free_port()
    results: SimpleQueue[tuple[int, TaskResult]] = SimpleQueue()
    processes = [
        RankProcess(key, fn, args, Rank(number, ranks, number, LOOPBACK, port)) for number in range(ranks)
    ]

    def run(number: int) -> None:
        with processes[number] as process:
            results.put((number, process.result()))

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(ranks)]
    try:
        for thread in threads:
            thread.start()
        while True:
            number, result = results.get()
            if decides_task(number, result):
                return result
    finally:
        for process in processes:
            process.kill()
        for thread in threads:
            if thread.ident is not None:
                thread.join()


def decides_task(rank: int, result: TaskResult) -> bool:
    """Return whether this rank's result is the result of the whole task.

    That holds for rank 0 always, and for other ranks if they failed or returned a value: a rank whose part is complete
    returns None.
    """
    return rank == 0 or result.error is not None or result.value is not None


class RankProcess:
    """The process of one rank, which ends with its `with` block. Any thread may call `kill`.

    On Linux the kernel kills the process when the thread that called `result` ends, and so when this process does.
    """

    def __init__(self, key: str, fn: Callable[..., Any], args: tuple[Any, ...], rank: Rank) -> None:
        self._key, self._fn, self._args, self._rank = key, fn, args, rank
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = False
        self._starting = threading.Lock()

    def __enter__(self) -> RankProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        if self._process is not None:
            self._process.wait()

    def result(self) -> TaskResult:
        """Start the process and wait for its result."""
        try:
            call = cloudpickle.dumps((self._fn, self._args))
        except Exception as error:  # noqa: BLE001 - pickling may raise any exception
            return self._failed(f"does not pickle: {type(error).__name__}: {error}")
        read_end, write_end = os.pipe()
        with open(read_end, "rb") as reader:
            try:
                process = self._start(write_end)
            finally:
                os.close(write_end)
            if process is None:
                return self._failed("was killed before it started")
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin as stdin:  # the process may die before it reads
                pickle.dump(sys.path, stdin)
                pickle.dump((self._key, call), stdin)
            pickled_result = reader.read()
        if process.wait() < 0:
            return self._failed(f"was killed by {signal.Signals(-process.returncode).name}")
        if not pickled_result:
            return self._failed(f"exited with {process.returncode} and returned no result")
        try:
            result: TaskResult = pickle.loads(pickled_result)
        except Exception as error:  # noqa: BLE001 - the import of the value's module may raise any exception
            return self._failed(f"returned a result that cannot be read: {type(error).__name__}: {error}")
        return result

    def kill(self) -> None:
        """End the process, or keep it from starting."""
        with self._starting:
            self._killed = True
            if self._process is not None:
                self._process.kill()

    def _start(self, write_end: int) -> subprocess.Popen[bytes] | None:
        with self._starting:
            if self._killed:
                return None
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, str(os.getpid()), str(write_end)],
                stdin=subprocess.PIPE,
                pass_fds=(write_end,),
                env={**os.environ, **self._rank.environment()},
            )
            return self._process

    def _failed(self, reason: str) -> TaskResult:
        return TaskResult(self._key, error=f"rank {self._rank.rank} of {self._rank.ranks} {reason}")


def free_port() -> int:
    """Return a port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def die_with_parent() -> None:
    """Let the kernel kill this process when the thread that started it ends. On Linux only."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, see prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _child() -> None:
    """The program of a rank's process: read the call from stdin, run it, write the result to the pipe."""
    parent, write_end = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent()
    if os.getppid() != parent:  # the parent died before prctl took effect
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    os.set_inheritable(write_end, False)
    key, call = pickle.load(sys.stdin.buffer)
    result = run_task(key, _run_pickled, (call,))
    try:
        pickled_result = cloudpickle.dumps(result)
    except Exception as error:  # noqa: BLE001 - pickling may raise any exception
        reason = f"its value does not pickle: {type(error).__name__}: {error}"
        pickled_result = pickle.dumps(TaskResult(key, error=reason))
    with open(write_end, "wb") as writer:
        writer.write(pickled_result)


def _run_pickled(call: bytes) -> Any:
    fn, args = pickle.loads(call)
    return fn(*args)
