"""Time one artifact in a process of its own, on pinned threads: `python -m jobs.measurement.stopwatch REQUEST`."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from jobs.measurement import energy_counters, machine
from jobs.measurement.machine import LoadMonitor

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Int

    from jobs.runtimes import Runner

_TIMEOUT_S = 900.0
_WARM_PREFILLS, _WARM_DECODES = 2, 4


@dataclass(frozen=True)
class Request:
    """The model to time and the workload."""

    folder: str
    runtime: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    """0 times the prefill alone."""
    vocabulary: int
    """Token ids are drawn below this number."""


@dataclass(frozen=True)
class Turn:
    """The minimum number of prefills and of decode steps, and the minimum seconds for each."""

    repeats: int = 10
    seconds: float = 0.5


@dataclass(frozen=True)
class Timings:
    """The timings of one process."""

    prefill_ms: list[float]
    """Every prefill."""
    decode_ms: list[float]
    """Every decode step."""
    load_share: float
    """See `machine.MachineLoad`, like the next two."""
    mhz: list[float] = dataclasses.field(default_factory=list)
    throttled: int = 0
    token_joules: float | None = None
    """Energy per decoded token, or per prompt token without new tokens; None without an energy counter."""
    peak_bytes: int | None = None
    """Peak memory of the process; None if the system does not report it."""


class Stopwatch:
    """A new process that has loaded an artifact, and computes only during its turn."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[str]) -> None:
        self._process = process
        self._errors = errors
        self._reply()  # the artifact is loaded

    def time(self, turn: Turn) -> Timings:
        """Let the process warm up and time, and return its timings. Raises as `started` does."""
        self._send(json.dumps(dataclasses.asdict(turn)))
        return Timings(**json.loads(self._reply()))

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the process has ended: reading its reply raises the reason

    def _reply(self) -> str:
        assert self._process.stdout is not None
        patience = threading.Timer(_TIMEOUT_S, self._process.kill)
        patience.start()
        try:
            line = self._process.stdout.readline()
        finally:
            patience.cancel()
        if line:
            return line
        code = self._process.wait()
        if code < 0:
            raise MemoryError(f"the timing process was killed by signal {-code}")
        self._errors.seek(0)
        raise RuntimeError(f"the timing process failed:\n{self._errors.read()[-2000:]}")


@contextmanager
def started(request: Request) -> Iterator[Stopwatch]:
    """Start a process that times an artifact; it ends with the context.

    Raises ValueError if fewer CPUs are available than `threads`, MemoryError if the process was killed, and
    RuntimeError with its output if it failed.
    """
    available = len(machine.processors())
    if request.threads > available:
        raise ValueError(
            f"target.threads={request.threads}, but only {available} CPUs are available to this process"
        )
    root = str(Path(__file__).parents[2])
    threads = str(request.threads)
    environment = {
        **os.environ,
        # The worker's own setting, often 1, would apply to the new process too.
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, "-m", "jobs.measurement.stopwatch", json.dumps(dataclasses.asdict(request))]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        try:
            yield Stopwatch(process, errors)
        except BaseException:
            process.kill()
            raise
        # The end of the context closes the input of the process, and so it ends.


def time_artifact(request: Request, turn: Turn = Turn()) -> Timings:
    """Time an artifact in a new process. Raises as `started` does."""
    with started(request) as stopwatch:
        return stopwatch.time(turn)


def main(request: Request, orders: IO[str], replies: IO[str]) -> None:
    """Load the artifact in this new process, then time it once for each line of `orders`."""
    pinned = machine.processors()[: request.threads]
    machine.pin_threads(pinned)
    import numpy as np  # after pinning: new threads inherit the affinity of the thread that starts them

    from jobs import runtimes

    runner = runtimes.load(request.runtime).start(Path(request.folder), request.threads)
    generator = np.random.default_rng(0)
    prompt = generator.integers(request.vocabulary, size=(1, request.prompt_tokens))
    tokens = generator.integers(request.vocabulary, size=(request.new_tokens, 1, 1))
    replies.write("ready\n")
    replies.flush()
    for order in orders:
        timings = _timings(runner, prompt, tokens, pinned, Turn(**json.loads(order)))
        replies.write(json.dumps(dataclasses.asdict(timings)) + "\n")
        replies.flush()


def _timings(
    runner: Runner,
    prompt: Int[np.ndarray, "1 tokens"],
    tokens: Int[np.ndarray, "steps 1 1"],
    pinned: list[int],
    turn: Turn,
) -> Timings:
    for _ in range(_WARM_PREFILLS):
        runner.prefill(prompt)
    for token in tokens[:_WARM_DECODES]:
        runner.decode(token)
    monitor, counters = LoadMonitor(pinned), energy_counters.counters()
    joules, prefills, decodes = 0.0, list[float](), list[float]()
    tally = energy_counters.Tally(counters)
    while len(prefills) < turn.repeats or sum(prefills) < turn.seconds:
        prefills.append(_seconds(runner.prefill, prompt))
    monitor.look()
    if not len(tokens):
        joules = tally.joules()
    while len(tokens) and (len(decodes) < turn.repeats or sum(decodes) < turn.seconds):
        runner.prefill(prompt)
        tally = energy_counters.Tally(counters)
        decodes += [_seconds(runner.decode, token) for token in tokens]
        joules += tally.joules()
        monitor.look()
    load = monitor.load()
    token_joules = None
    if counters:
        token_joules = joules / (len(decodes) or len(prefills) * prompt.shape[1])
    return Timings(
        [1000 * seconds for seconds in prefills],
        [1000 * seconds for seconds in decodes],
        load.load_share,
        load.mhz,
        load.throttled,
        token_joules,
        machine.peak_memory_bytes(),
    )


def _seconds(
    step: Callable[[Int[np.ndarray, "1 tokens"]], object], tokens: Int[np.ndarray, "1 tokens"]
) -> float:
    started = time.perf_counter()
    step(tokens)
    return time.perf_counter() - started


if __name__ == "__main__":
    # Output of libraries goes to stderr; stdout contains the replies alone.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    main(Request(**json.loads(sys.argv[1])), sys.stdin, replies)
