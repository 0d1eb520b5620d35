"""Measure the limits of one service: a study of ten thousand candidates, and a cluster of a thousand slots.

python -m benchmarks.scale [--candidates 10000] [--slots 1000] [--json FILE]

Ten thousand candidates run inline without work, so only the service is measured: its CPU time per candidate over the
first and the last tenth, the growth of its resident memory from before the start to the peak, each update of the front,
the replay of the ledger, and the commands `slimfront status` and `slimfront front`. Each candidate reports the values
of 512 items, as an evaluation does, because they are most of a candidate's memory in the service.

The cluster is simulated by discrete events. The simulated clock runs as fast as the real one while this process
computes, so all work of the service and of the simulation takes its real time, including the disk's. While the service
waits, the clock jumps to the next end of a job. Jobs start by the product's own `Admission`: at once if a slot is free,
else at the moment at which a slot becomes free, since the executor on Ray starts them without the service. The duration
of a job is log-normal with a mean of 30 s (σ of the logarithm 0.5) and depends on its id alone. Jobs start and report
without delay: the network and the workers are not simulated. Reported are

    busy                Σ of the jobs' slot seconds ÷ (slots × time), over the whole study: including the first job, the
                        original's, that all other jobs wait for, and the last jobs
    busy_in_between     the same from the first moment at which all slots are busy to the last start of a job
    service             the share of the simulated time in which the service computes
"""

from __future__ import annotations

import argparse
import heapq
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.overhead import accuracy_of, digest_of, empty_study, lognormal, unseen
from cluster.executors.admission import Admission
from cluster.executors.executor import Capacity, NodeType, Resources
from cluster.executors.inline import InlineExecutor
from cluster.executors.task import TaskResult, run_task
from jobs.job import Job, Outcome, Success
from jobs.measurement.measurement import Measurement
from orchestrator import search
from orchestrator.persistence.ledger import Ledger
from orchestrator.planning.candidates import KnownMetrics
from orchestrator.planning.cost import CostModel
from orchestrator.planning.prepared_study import PreparedStudy
from orchestrator.service.launch import launch
from orchestrator.service.loop import replay
from orchestrator.service.status import Status
from orchestrator.study.results import Standings
from orchestrator.study.study import Study

JOB_SECONDS = 30.0
SIGMA = 0.5
ITEMS = 512


def do_nothing(job: Job) -> Outcome:
    return Success(digest_of(job), 0, Measurement({"accuracy": accuracy_of(job)}), 0.0)


def report_items(job: Job) -> Outcome:
    """Return the outcome of `do_nothing` with a value of the metric for each item."""
    accuracy = accuracy_of(job)
    items = tuple(accuracy + number / ITEMS for number in range(ITEMS))
    return Success(digest_of(job), 0, Measurement({"accuracy": accuracy}, items={"accuracy": items}), 0.0)


def many_candidates(candidates: int) -> dict[str, float]:
    samples: list[tuple[float, int, int]] = []
    process = psutil.Process()

    def sample(status: Status) -> None:
        samples.append((time.process_time(), status.measured, process.memory_info().rss))

    with tempfile.TemporaryDirectory() as scratch:
        prepared = empty_study(Path(scratch), candidates, uri="none")
        initial_bytes = process.memory_info().rss
        start = time.process_time()
        launch(prepared, sample, executor=InlineExecutor(2), do=report_items)
        cpu_seconds = time.process_time() - start
        numbers = {
            "candidates": samples[-1][1] - 1,
            "growth_mb": (max(rss for _, _, rss in samples) - initial_bytes) / 1e6,
            "growth_with_report_mb": (process.memory_info().rss - initial_bytes) / 1e6,
            "cpu_ms": 1000 * cpu_seconds / candidates,
            "first_tenth_ms": _cpu_ms(
                [(cpu, done) for cpu, done, _ in samples if 0 < done <= candidates / 10]
            ),
            "last_tenth_ms": _cpu_ms([(cpu, done) for cpu, done, _ in samples if done > candidates * 0.9]),
            "ledger_mb": prepared.folder.ledger.stat().st_size / 1e6,
        }
        return {**numbers, **_time_replay(prepared), **_time_commands(prepared.folder.path)}


def _cpu_ms(samples: list[tuple[float, int]]) -> float:
    """Return the CPU time per candidate between the first and the last sample (CPU seconds, candidates)."""
    if len(samples) < 2:
        return float("nan")
    (began, first), (ended, last) = samples[0], samples[-1]
    return 1000 * (ended - began) / (last - first)


def _time_replay(prepared: PreparedStudy) -> dict[str, float]:
    """Return the seconds of a resume, and the milliseconds of adding a candidate to the front of thousands."""
    ledger = Ledger(prepared.folder.ledger, read_only=True)
    knobs = prepared.space.knobs()
    known_metrics = KnownMetrics(prepared, CostModel.of(prepared))
    searching = search.make("random", knobs, prepared.plan.objectives, known_metrics)
    began = time.perf_counter()
    study = Study(prepared.plan)
    replay(study, ledger, searching)
    seconds = time.perf_counter() - began
    ledger.close()
    original = study.original
    candidates = {original.id: original}
    standings = Standings("scale", prepared.plan.objectives, original.id, candidates)
    updates = []
    for id, candidate in study.candidates.items():
        if id != original.id:
            candidates[id] = candidate
            began = time.perf_counter()
            standings.take(id)
            updates.append(1000 * (time.perf_counter() - began))
    began = time.perf_counter()
    results = standings.results()
    return {
        "replay_seconds": seconds,
        "update_ms": median(updates),
        "update_worst_ms": max(updates),
        "results_ms": 1000 * (time.perf_counter() - began),
        "front": len(results.members),
    }


def _time_commands(folder: Path) -> dict[str, float]:
    """Return the wall and CPU seconds of two commands, each the best of three runs."""
    times = {}
    for name in ("status", "front"):
        walls, cpus = [], []
        for _ in range(3):
            began, usage_before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(
                [sys.executable, "-m", "orchestrator", name, folder], check=True, capture_output=True
            )
            usage = resource.getrusage(resource.RUSAGE_CHILDREN)
            walls.append(time.perf_counter() - began)
            user_seconds = usage.ru_utime - usage_before.ru_utime
            system_seconds = usage.ru_stime - usage_before.ru_stime
            cpus.append(user_seconds + system_seconds)
        times |= {f"{name}_seconds": min(walls), f"{name}_cpu_seconds": min(cpus)}
    return times


class SimulatedExecutor:
    """Slots on a simulated clock (see above). `seconds` returns the duration of a job from its key."""

    def __init__(self, slots: int, seconds: Callable[[str], float]) -> None:
        self.slots = slots
        self.spans: list[tuple[float, float]] = []
        """Start and end of each job, in simulated seconds."""
        self.jumped = 0.0
        self._seconds = seconds
        self._began = time.perf_counter()
        self._admission = Admission(Capacity(slots))
        self._waiting: dict[int, tuple[str, Callable[..., Any], tuple[Any, ...]]] = {}
        self._running: list[tuple[float, int, TaskResult]] = []
        self._ended: list[TaskResult] = []
        self._submitted = 0

    @property
    def now(self) -> float:
        return time.perf_counter() - self._began + self.jumped

    def submit(self, key: str, fn: Callable[..., Any], *args: Any, resources: Resources) -> None:
        self._settle()
        self._admission.add(self._submitted, resources)
        self._waiting[self._submitted] = (key, fn, args)
        self._submitted += 1
        self._start(self.now)

    def wait(self, timeout: float | None = None) -> list[TaskResult]:
        self._settle()
        if not self._ended and self._running:
            idle = max(0.0, self._running[0][0] - self.now)
            if timeout is not None:
                idle = min(idle, timeout)
            self.jumped += idle
            self._settle()
        ended, self._ended = self._ended, []
        return ended

    def cancel(self, key: str) -> None:
        raise NotImplementedError("the simulation cancels no job")

    def nodes(self) -> Mapping[NodeType, int]:
        return {NodeType(): self.slots}

    def close(self) -> None:
        pass

    def _settle(self) -> None:
        """Free the slots of jobs that have ended, each at the moment of its end."""
        while self._running and self._running[0][0] <= self.now:
            at, ticket, ended = heapq.heappop(self._running)
            self._ended.append(ended)
            self._admission.end(ticket)
            self._start(at)

    def _start(self, at: float) -> None:
        while (ticket := self._admission.next()) is not None:
            key, fn, args = self._waiting.pop(ticket)
            end = at + self._seconds(key)
            self.spans.append((at, end))
            heapq.heappush(self._running, (end, ticket, run_task(key, fn, args)))


def cluster(slots: int, candidates: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as scratch:
        prepared = empty_study(Path(scratch), candidates, uri="none")
        executor = SimulatedExecutor(slots, lambda key: lognormal(key, JOB_SECONDS, SIGMA))
        launch(prepared, unseen, executor=executor, do=do_nothing)
    began, ended = executor.spans[0][0], max(end for _, end in executor.spans)
    full, last = _all_busy(executor.spans, slots), max(start for start, _ in executor.spans)
    return {
        "slots": slots,
        "candidates": len(executor.spans) - 1,
        "seconds": ended - began,
        "busy": busy(executor.spans, began, ended) / (slots * (ended - began)),
        "busy_in_between": busy(executor.spans, full, last) / (slots * (last - full)),
        "service": 1 - executor.jumped / (executor.now or 1.0),
    }


def busy(spans: list[tuple[float, float]], since: float, until: float) -> float:
    """Return the slot seconds of these spans between two moments."""
    return sum(max(0.0, min(end, until) - max(start, since)) for start, end in spans)


def _all_busy(spans: list[tuple[float, float]], slots: int) -> float:
    """Return the first moment at which every slot is busy. Raises ValueError if there is none."""
    ends: list[float] = []
    for start, end in sorted(spans):
        while ends and ends[0] <= start:
            heapq.heappop(ends)
        heapq.heappush(ends, end)
        if len(ends) == slots:
            return start
    raise ValueError(f"{len(spans)} jobs never filled {slots} slots; give more candidates")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--candidates", type=int, default=10_000)
    parser.add_argument("--slots", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {
        "one service": many_candidates(options.candidates),
        "simulated cluster": cluster(options.slots, options.candidates),
    }
    for title, numbers in results.items():
        table = Table("number", "value", title=f"{title} ({platform.machine()})", title_justify="left")
        for name, value in numbers.items():
            table.add_row(name, f"{value:.4g}")
        Console().print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
