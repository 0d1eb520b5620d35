"""Gang: one piece of work done by several processes at once, its ranks, which talk to each other.

Each rank is the same `fn(*args)` in a fresh process, which finds in its environment what torch.distributed reads:
RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Fresh, because a process keeps the group it once made.
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

# The path first, then what this file is found by.
_CHILD = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from cluster.executors.gang import _child; _child()"
)


@dataclass(frozen=True)
class Rank:
    """One of the ranks of a gang. local_rank: its number on its machine. address, port: where rank 0 listens."""

    rank: int
    ranks: int
    local_rank: int
    address: str
    port: int

    def environment(self) -> dict[str, str]:
        """What torch.distributed reads of it."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.ranks),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def run_rank(key: str, fn: Callable[..., Any], args: tuple[Any, ...], rank: Rank) -> TaskResult:
    """Do one rank's part in a process of its own; what came of it, `lost` where that process died.

    Whatever ends this call, or the thread it runs in, ends that process too.
    """
    with RankProcess(key, fn, args, rank) as process:
        return process.ended()


def run_gang(key: str, fn: Callable[..., Any], args: tuple[Any, ...], ranks: int) -> TaskResult:
    """Do a piece by this many ranks on this machine.

    It ends, and the other ranks with it, as soon as `ends` says so of one of them: then what rank 0 returned is its
    value, or it is lost once, or a rank that can't go on has said why.
    """
    port = free_port()
    ended: SimpleQueue[tuple[int, TaskResult]] = SimpleQueue()
    processes = [RankProcess(key, fn, args, Rank(each, ranks, each, LOOPBACK, port)) for each in range(ranks)]

    def run(number: int) -> None:
        with processes[number] as process:
            ended.put((number, process.ended()))

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(ranks)]
    try:
        for thread in threads:
            thread.start()
        while True:
            number, one = ended.get()
            if ends(number, one):
                return one
    finally:
        for process in processes:
            process.kill()
        for thread in threads:
            if thread.ident is not None:
                thread.join()


def ends(rank: int, ended: TaskResult) -> bool:
    """Whether a gang ends with what came of this rank, which is then what came of the piece: of rank 0 always, of
    others where it is lost, or returned anything. Those whose part is done return None."""
    return rank == 0 or ended.error is not None or ended.value is not None


class RankProcess:
    """The process of one rank, which does not outlive the block of its `with`. `kill` may come from any thread.

    On Linux the kernel kills the process when the thread that called `ended` ends, and so when this process does.
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

    def ended(self) -> TaskResult:
        """Start the process and wait for what comes of it."""
        try:
            told = cloudpickle.dumps((self._fn, self._args))
        except Exception as error:  # noqa: BLE001 - whatever pickling raises
            return self._lost(f"does not pickle: {type(error).__name__}: {error}")
        results, writing = os.pipe()
        with open(results, "rb") as reading:
            try:
                process = self._started(writing)
            finally:
                os.close(writing)
            if process is None:
                return self._lost("was killed before it started")
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin as asking:  # it died before it could read
                pickle.dump(sys.path, asking)
                pickle.dump((self._key, told), asking)
            found = reading.read()
        if process.wait() < 0:
            return self._lost(f"was killed by {signal.Signals(-process.returncode).name}")
        if not found:
            return self._lost(f"exited with {process.returncode} and told nothing")
        try:
            ended: TaskResult = pickle.loads(found)
        except Exception as error:  # noqa: BLE001 - whatever the import of its module raises
            return self._lost(f"told what can't be read: {type(error).__name__}: {error}")
        return ended

    def kill(self) -> None:
        """End the process, or keep it from starting."""
        with self._starting:
            self._killed = True
            if self._process is not None:
                self._process.kill()

    def _started(self, writing: int) -> subprocess.Popen[bytes] | None:
        with self._starting:
            if self._killed:
                return None
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, str(os.getpid()), str(writing)],
                stdin=subprocess.PIPE,
                pass_fds=(writing,),
                env={**os.environ, **self._rank.environment()},
            )
            return self._process

    def _lost(self, why: str) -> TaskResult:
        return TaskResult(self._key, error=f"rank {self._rank.rank} of {self._rank.ranks} {why}")


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("", 0))
        return int(one.getsockname()[1])


def die_with_parent() -> None:
    """Let the kernel kill this process when the thread that started it ends. On Linux only."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, see prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _child() -> None:
    """What a rank's process does: read what to do, do it, write what came of it."""
    parent, writing = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent()
    if os.getppid() != parent:  # it died before it could be named
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    os.set_inheritable(writing, False)
    key, told = pickle.load(sys.stdin.buffer)
    ended = run_task(key, _call, (told,))
    try:
        found = cloudpickle.dumps(ended)
    except Exception as error:  # noqa: BLE001 - whatever pickling raises
        found = pickle.dumps(
            TaskResult(key, error=f"its value does not pickle: {type(error).__name__}: {error}")
        )
    with open(writing, "wb") as results:
        results.write(found)


def _call(told: bytes) -> Any:
    fn, args = pickle.loads(told)
    return fn(*args)
