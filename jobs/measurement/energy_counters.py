"""The energy counters of this machine. The one door to NVML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

_POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Counter:
    """A counter of the energy that a chip has drawn."""

    name: str
    read: Callable[[], int]
    """Returns the current value in microjoules."""
    wraps_at: int | None = None
    """The value at which it restarts from 0; None if it never does."""


def counters(powercap: Path = _POWERCAP) -> list[Counter]:
    """Return the readable counters of all processor packages (RAPL, Intel and AMD) and GPUs (NVML).

    They count everything that the chips draw, for all processes, also while idle.
    """
    return [*_packages(powercap), *_gpus()]


def missing(powercap: Path = _POWERCAP) -> str | None:
    """Return the reason why energy cannot be measured here, with a cure if there is one; None if it can."""
    if counters(powercap):
        return None
    zones = _zones(powercap)
    if zones:
        return (
            f"{zones[0] / 'energy_uj'} cannot be read by this user: chmod a+r {powercap}/*/energy_uj as root"
        )
    return f"this machine has no energy counter (no {powercap}/intel-rapl:0, no GPU known to NVML)"


class Tally:
    """The energy that counters have counted since its creation."""

    def __init__(self, counters: Sequence[Counter]) -> None:
        self._counters = counters
        self._start = [counter.read() for counter in counters]

    def joules(self) -> float:
        """Return the energy since the creation. It must be less than one round of a counter, which takes minutes."""
        return sum(
            spent_joules(counter, start, counter.read())
            for counter, start in zip(self._counters, self._start, strict=True)
        )


def spent_joules(counter: Counter, before: int, after: int) -> float:
    """Return the energy between two readings, with less than one round between them."""
    microjoules = after - before
    if after < before:
        microjoules += counter.wraps_at or 0
    return microjoules / 1e6


def _zones(powercap: Path) -> list[Path]:
    """Return one folder per package: its cores and its platform have folders that count the same energy again."""
    names = {file.parent: file.read_text() for file in powercap.glob("intel-rapl:*/name")}
    return sorted(folder for folder, name in names.items() if name.startswith("package"))


def _packages(powercap: Path) -> list[Counter]:
    counters = []
    for zone in _zones(powercap):
        try:
            read = _reader(zone / "energy_uj")
            read()
            counters.append(Counter(zone.name, read, int((zone / "max_energy_range_uj").read_text())))
        except (OSError, ValueError):
            continue
    return counters


def _reader(file: Path) -> Callable[[], int]:
    return lambda: int(file.read_text())


def _gpus() -> list[Counter]:
    try:
        import pynvml
    except ModuleNotFoundError:
        return []
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(n) for n in range(pynvml.nvmlDeviceGetCount())]
        counters = [Counter(f"gpu:{n}", _gpu_reader(pynvml, handle)) for n, handle in enumerate(handles)]
        for counter in counters:
            counter.read()
    except pynvml.NVMLError:  # no driver, or a GPU older than these counters
        return []
    return counters


def _gpu_reader(nvml: object, handle: object) -> Callable[[], int]:
    read: Callable[[object], int] = nvml.nvmlDeviceGetTotalEnergyConsumption  # type: ignore[attr-defined]
    return lambda: 1000 * read(handle)
