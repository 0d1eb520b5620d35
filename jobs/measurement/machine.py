"""The processors that a measurement runs on, and the load on them during the measurement."""

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
    """The state of some processors during a measurement."""

    load_share: float
    """Share of their time that was neither idle nor this process's, including time stolen by a hypervisor."""
    mhz: list[float]
    """Mean frequency at every look; empty if the system does not report it."""
    throttled: int
    """How often heat or power slowed a processor down, as far as the system counts it."""


class LoadMonitor:
    """Monitors some processors from its creation on."""

    def __init__(self, processors: Sequence[int], cpus: Path = _CPUS) -> None:
        self._processors = processors
        self._cpus = cpus
        self._mhz: list[float] = []
        self._throttled = self._throttles()
        self._start = self._read()
        self.look()

    def look(self) -> None:
        """Record the current frequency. Call it between timings, while the processors are warm."""
        # Not psutil.cpu_freq: without cpufreq it reads /proc/cpuinfo, which is a constant in a virtual machine.
        khz = [
            self._number(processor, "cpufreq/scaling_cur_freq", missing=0) for processor in self._processors
        ]
        if khz and all(khz):
            self._mhz.append(sum(khz) / len(khz) / 1000)

    def load(self) -> MachineLoad:
        """Return the state of the processors since the creation of this monitor."""
        self.look()
        wall, busy, process = (now - then for now, then in zip(self._read(), self._start, strict=True))
        load_share = max(0.0, (busy - process) / (wall * len(self._processors)))
        return MachineLoad(load_share, self._mhz, self._throttles() - self._throttled)

    def _read(self) -> tuple[float, float, float]:
        import psutil

        all_times = psutil.cpu_times(percpu=True)
        # Linux counts the time of guests within user and nice already.
        idle = ("idle", "iowait", "guest", "guest_nice")
        busy = 0.0
        for processor in self._processors:
            if processor < len(all_times):
                times = all_times[processor]
                busy += sum(times) - sum(getattr(times, name, 0.0) for name in idle)
        return time.perf_counter(), busy, time.process_time()

    def _throttles(self) -> int:
        counts = ("thermal_throttle/core_throttle_count", "thermal_throttle/package_throttle_count")
        return sum(
            self._number(processor, name, missing=0) for processor in self._processors for name in counts
        )

    def _number(self, processor: int, name: str, missing: int) -> int:
        try:
            return int((self._cpus / f"cpu{processor}" / name).read_text())
        except (OSError, ValueError):
            return missing


def processors(cpus: Path = _CPUS) -> list[int]:
    """Return the processors that this process may use: first one of each core, then the second ones.

    So as many threads as there are cores do not share a core.
    """
    if not hasattr(os, "sched_getaffinity"):
        return list(range(os.cpu_count() or 1))
    available = sorted(os.sched_getaffinity(0))
    cores: dict[str, list[int]] = {}
    for processor in available:
        cores.setdefault(_core(processor, cpus), []).append(processor)
    return sorted(
        available, key=lambda processor: (cores[_core(processor, cpus)].index(processor), processor)
    )


def pin_threads(chosen: Sequence[int]) -> None:
    """Restrict this process, and the threads that it starts from now on, to these processors."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, chosen)


def peak_memory_bytes() -> int | None:
    """Return the peak memory of this process, or None if the system does not report it."""
    # Not getrusage: its peak includes that of the parent process.
    if not _STATUS.is_file():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def _core(processor: int, cpus: Path) -> str:
    """Return the processors that share a core with this one, as the system lists them, or itself."""
    file = cpus / f"cpu{processor}" / "topology" / "thread_siblings_list"
    return file.read_text().strip() if file.is_file() else str(processor)
