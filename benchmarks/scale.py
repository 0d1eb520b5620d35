"""How far one service goes: ten thousand candidates in one study, and a thousand slots kept busy.

python -m benchmarks.scale [--candidates 10000] [--slots 1000] [--json FILE]

Ten thousand candidates run inline and do nothing, so that what is measured is the service alone: its CPU time per
candidate over the first and the last tenth, the growth of its resident memory from before it starts to the most it
held while it ran, each update of the front, replaying the ledger, and `slimfront status` and `slimfront front` as
commands. Each reports what an evaluation of 512 items would, which is most of what a service holds of it.

The cluster is simulated by discrete events. The simulated clock runs as fast as the real one while this process
computes, so that everything the service does, and the simulation besides, takes the time that it really took, on disk
too; while the service waits it jumps to the next end of a job. Jobs start by the product's own `Admission`: at once
where a slot is free, or else in the moment in which a slot comes free, as the executor on Ray hands them out without
the service. A job lasts a log-normal time with a mean of 30 s (σ of the logarithm 0.5), which its id alone decides,
and is started and reported without delay: the network and the workers are not simulated. Reported is

    busy share          Σ of the jobs' slot seconds ÷ (slots × time), over the whole study: with the first job, the
                        original's, that all others wait for, and with the last ones
    in between          the same from the moment in which all slots were busy first to the last start of a job
    service             the share of the simulated time in which the service computed
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


def nothing(job: Job) -> Outcome:
    return Success(digest_of(job), 0, Measurement({"accuracy": accuracy_of(job)}), 0.0)


def evaluated(job: Job) -> Outcome:
    """As `nothing`, with what each item adds to the metric."""
    accuracy = accuracy_of(job)
    items = tuple(accuracy + number / ITEMS for number in range(ITEMS))
    return Success(digest_of(job), 0, Measurement({"accuracy": accuracy}, items={"accuracy": items}), 0.0)


def many_candidates(candidates: int) -> dict[str, float]:
    samples: list[tuple[float, int, int]] = []
    process = psutil.Process()

    def note(status: Status) -> None:
        samples.append((time.process_time(), status.measured, process.memory_info().rss))

    with tempfile.TemporaryDirectory() as scratch:
        prepared = empty_study(Path(scratch), candidates, uri="none")
        held = process.memory_info().rss
        computed = time.process_time()
        launch(prepared, note, executor=InlineExecutor(2), do=evaluated)
        computed = time.process_time() - computed
        found = {
            "candidates": samples[-1][1] - 1,
            "growth_mb": (max(rss for _, _, rss in samples) - held) / 1e6,
            "growth_with_report_mb": (process.memory_info().rss - held) / 1e6,
            "cpu_ms": 1000 * computed / candidates,
            "first_tenth_ms": _cpu_ms([one for one in samples if 0 < one[1] <= candidates / 10]),
            "last_tenth_ms": _cpu_ms([one for one in samples if one[1] > candidates * 0.9]),
            "ledger_mb": prepared.folder.ledger.stat().st_size / 1e6,
        }
        return {**found, **_replaying(prepared), **_commands(prepared.folder.path)}


def _cpu_ms(samples: list[tuple[float, int, int]]) -> float:
    """Per candidate, between the first and the last of these samples."""
    if len(samples) < 2:
        return float("nan")
    (began, first, _), (ended, last, _) = samples[0], samples[-1]
    return 1000 * (ended - began) / (last - first)


def _replaying(prepared: PreparedStudy) -> dict[str, float]:
    """Seconds of a resume, and milliseconds of one candidate's entry into a front of thousands."""
    ledger = Ledger(prepared.folder.ledger, read_only=True)
    knobs = prepared.space.knobs()
    known = KnownMetrics(prepared, CostModel.of(prepared))
    searching = search.make("random", knobs, prepared.plan.objectives, known)
    began = time.perf_counter()
    study = Study(prepared.plan)
    replay(study, ledger, searching)
    seconds = time.perf_counter() - began
    ledger.close()
    original = study.original
    seen = {original.id: original}
    standings = Standings("scale", prepared.plan.objectives, original.id, seen)
    updates = []
    for id, candidate in study.candidates.items():
        if id != original.id:
            seen[id] = candidate
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


def _commands(folder: Path) -> dict[str, float]:
    """Wall and CPU seconds of what a user types, the best of three."""
    found = {}
    for name in ("status", "front"):
        walls, cpus = [], []
        for _ in range(3):
            began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(
                [sys.executable, "-m", "orchestrator", name, folder], check=True, capture_output=True
            )
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            walls.append(time.perf_counter() - began)
            cpus.append(after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime)
        found |= {f"{name}_seconds": min(walls), f"{name}_cpu_seconds": min(cpus)}
    return found


class SimulatedExecutor:
    """Slots whose jobs last as long as `seconds` says of their keys, on a simulated clock (see above).

    spans: from when to when each job ran, in simulated seconds.
    """

    def __init__(self, slots: int, seconds: Callable[[str], float]) -> None:
        self.slots = slots
        self.spans: list[tuple[float, float]] = []
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
            self.jumped += idle if timeout is None else min(idle, timeout)
            self._settle()
        ended, self._ended = self._ended, []
        return ended

    def cancel(self, key: str) -> None:
        raise NotImplementedError("nothing is cancelled here")

    def nodes(self) -> Mapping[NodeType, int]:
        return {NodeType(): self.slots}

    def close(self) -> None:
        pass

    def _settle(self) -> None:
        """What ended by now frees its slot in the moment in which it ended."""
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
        launch(prepared, unseen, executor=executor, do=nothing)
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
    """Slot seconds of these spans between two moments."""
    return sum(max(0.0, min(end, until) - max(start, since)) for start, end in spans)


def _all_busy(spans: list[tuple[float, float]], slots: int) -> float:
    """The first moment in which every slot was busy; ValueError where none was."""
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
    given = parser.parse_args()
    found = {
        "one service": many_candidates(given.candidates),
        "simulated cluster": cluster(given.slots, given.candidates),
    }
    for title, numbers in found.items():
        table = Table("what", "found", title=f"{title} ({platform.machine()})", title_justify="left")
        for name, value in numbers.items():
            table.add_row(name, f"{value:.4g}")
        Console().print(table)
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
