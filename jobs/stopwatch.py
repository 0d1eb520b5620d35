"""Stopwatch: times one artifact in a process of its own (`python -m jobs.stopwatch REQUEST`), on pinned threads."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_REPEATS = 10
"""At least so many prefills, and so many decode steps."""
_SECONDS = 2.0
"""At least so long is spent on prefills, and on decode steps."""
_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Request:
    """What to time. new_tokens 0 times prefill alone. vocabulary: token ids are drawn below it."""

    folder: str
    runtime: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    vocabulary: int


@dataclass(frozen=True)
class Timings:
    """Milliseconds of every prefill and every decode step. others: the share of the pinned processors'
    time that other processes took meanwhile."""

    prefill_ms: list[float]
    decode_ms: list[float]
    others: float


def time_artifact(request: Request) -> Timings:
    """Time an artifact in a new process that has computed nothing before.

    Raises ValueError where the machine lends fewer processors than `threads`, MemoryError where the
    process was killed, RuntimeError with what it wrote where it failed.
    """
    lent = len(_processors())
    if request.threads > lent:
        raise ValueError(f"target.threads={request.threads}, but this machine lends {lent} processors")
    root = str(Path(__file__).parent.parent)
    threads = str(request.threads)
    environment = {
        **os.environ,
        # A worker's own setting, often 1, would bind the new process too.
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, "-m", "jobs.stopwatch", json.dumps(dataclasses.asdict(request))]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    if done.returncode < 0:
        raise MemoryError(f"the timing process was killed by signal {-done.returncode}")
    if done.returncode > 0:
        raise RuntimeError(f"the timing process failed:\n{done.stderr[-2000:]}")
    return Timings(**json.loads(done.stdout.splitlines()[-1]))


def main(request: Request) -> Timings:
    """Time the artifact in this process, which must be a new one."""
    pinned = _processors()[: request.threads]
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, pinned)
    import torch  # after pinning: its threads start with the affinity of the one that starts them

    from jobs import runtimes

    torch.set_num_threads(request.threads)
    runner = runtimes.load(request.runtime).start(Path(request.folder), request.threads)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(request.vocabulary, (1, request.prompt_tokens), generator=generator)
    tokens = torch.randint(request.vocabulary, (request.new_tokens, 1, 1), generator=generator)

    for _ in range(2):
        runner.prefill(prompt)
    for token in tokens[:4]:
        runner.decode(token)
    busy = _Busy(pinned)
    prefills: list[float] = []
    while len(prefills) < _REPEATS or sum(prefills) < _SECONDS:
        prefills.append(_seconds(runner.prefill, prompt))
    decodes: list[float] = []
    while request.new_tokens and (len(decodes) < _REPEATS or sum(decodes) < _SECONDS):
        runner.prefill(prompt)
        decodes += [_seconds(runner.decode, token) for token in tokens]
    return Timings([1000 * one for one in prefills], [1000 * one for one in decodes], busy.others())


class _Busy:
    """What other processes take of some processors from now on."""

    def __init__(self, processors: list[int]) -> None:
        self._processors = processors
        self._start = self._read()

    def others(self) -> float:
        """The share of the processors' time since then that was neither idle nor this process's."""
        wall, busy, own = (now - then for now, then in zip(self._read(), self._start, strict=True))
        return max(0.0, (busy - own) / (wall * len(self._processors)))

    def _read(self) -> tuple[float, float, float]:
        import psutil

        each = psutil.cpu_times(percpu=True)
        times = [each[processor] for processor in self._processors if processor < len(each)]
        busy = sum(sum(one) - one.idle - getattr(one, "iowait", 0.0) for one in times)
        return time.perf_counter(), busy, time.process_time()


def _seconds(work: Callable[[Tensor], object], tokens: Tensor) -> float:
    started = time.perf_counter()
    work(tokens)
    return time.perf_counter() - started


def _processors() -> list[int]:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dataclasses.asdict(main(Request(**json.loads(sys.argv[1]))))) + "\n")
