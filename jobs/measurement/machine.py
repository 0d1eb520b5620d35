"""Machine: the processors that a measurement runs on, and what else happens on them meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class MachineLoad:
    """What a watch saw of some processors. others: the share of their time that was neither idle nor this
    process's, time that a hypervisor took away included. mhz: their mean frequency at every look, nothing where
    the system does not tell it. throttled: how often heat or power slowed one down, as far as the system counts.
    """

    others: float
    mhz: list[float]
    throttled: int


class LoadMonitor:
    """Watches some processors from when it is made."""

    def __init__(self, processors: Sequence[int], cpus: Path = _CPUS) -> None:
        self._processors = processors
        self._cpus = cpus
        self._mhz: list[float] = []
        self._throttled = self._throttles()
        self._start = self._read()
        self.look()

    def look(self) -> None:
        """Note the frequency now: to be called between pieces of work, while the processors are warm."""
        # Not psutil.cpu_freq: without cpufreq it gives what /proc/cpuinfo says, in a virtual machine a constant.
        found = [
            self._number(processor, "cpufreq/scaling_cur_freq", missing=0) for processor in self._processors
        ]
        if found and all(found):
            self._mhz.append(sum(found) / len(found) / 1000)

    def seen(self) -> MachineLoad:
        self.look()
        wall, busy, own = (now - then for now, then in zip(self._read(), self._start, strict=True))
        others = max(0.0, (busy - own) / (wall * len(self._processors)))
        return MachineLoad(others, self._mhz, self._throttles() - self._throttled)

    def _read(self) -> tuple[float, float, float]:
        import psutil

        each = psutil.cpu_times(percpu=True)
        times = [each[processor] for processor in self._processors if processor < len(each)]
        # Linux counts the time of guests within user and nice already.
        idle = ("idle", "iowait", "guest", "guest_nice")
        busy = sum(sum(one) - sum(getattr(one, name, 0.0) for name in idle) for one in times)
        return time.perf_counter(), busy, time.process_time()

    def _throttles(self) -> int:
        counts = ("thermal_throttle/core_throttle_count", "thermal_throttle/package_throttle_count")
        return sum(self._number(one, name, missing=0) for one in self._processors for name in counts)

    def _number(self, processor: int, name: str, missing: int) -> int:
        try:
            return int((self._cpus / f"cpu{processor}" / name).read_text())
        except (OSError, ValueError):
            return missing


def processors(cpus: Path = _CPUS) -> list[int]:
    """The processors that this process may use: one of each core first, then the others of these cores, so
    that as many threads as there are cores do not share one."""
    if not hasattr(os, "sched_getaffinity"):
        return list(range(os.cpu_count() or 1))
    lent = sorted(os.sched_getaffinity(0))
    cores: dict[str, list[int]] = {}
    for processor in lent:
        cores.setdefault(_core(processor, cpus), []).append(processor)
    return sorted(lent, key=lambda one: (cores[_core(one, cpus)].index(one), one))


def pin_threads(chosen: Sequence[int]) -> None:
    """Let this process, and the threads that it starts from now on, run on these processors alone."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, chosen)


def peak_memory_bytes() -> int | None:
    """The most memory that this process ever held, None where the system does not tell."""
    # Not getrusage: its peak begins with that of the process that started this one.
    if not _STATUS.is_file():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def _core(processor: int, cpus: Path) -> str:
    """The processors that share a core with this one, as the system writes them; itself where it does not."""
    file = cpus / f"cpu{processor}" / "topology" / "thread_siblings_list"
    return file.read_text().strip() if file.is_file() else str(processor)
