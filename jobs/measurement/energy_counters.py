"""Power: the counters of energy that this machine has. The one door to NVML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

_POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Counter:
    """read: the microjoules it stands at. wraps_at: where it starts again from 0; None where it never does."""

    name: str
    read: Callable[[], int]
    wraps_at: int | None = None


def counters(powercap: Path = _POWERCAP) -> list[Counter]:
    """Those of all processor packages (RAPL, by Intel and AMD) and GPUs (NVML) that can be read here.

    They count all that the chips draw, idle ones too, whoever uses them.
    """
    return [*_packages(powercap), *_gpus()]


def missing(powercap: Path = _POWERCAP) -> str | None:
    """Why no energy can be measured here, with the cure where there is one; None where it can."""
    if counters(powercap):
        return None
    zones = _zones(powercap)
    if zones:
        return (
            f"{zones[0] / 'energy_uj'} cannot be read by this user: chmod a+r {powercap}/*/energy_uj as root"
        )
    return f"this machine has no counter of energy (no {powercap}/intel-rapl:0, no GPU that NVML tells of)"


class Tally:
    """The energy that some counters count from when it is made."""

    def __init__(self, of: Sequence[Counter]) -> None:
        self._of = of
        self._before = [one.read() for one in of]

    def joules(self) -> float:
        """Since then: less than one round of any counter, which lasts minutes."""
        return sum(
            spent_joules(one, before, one.read()) for one, before in zip(self._of, self._before, strict=True)
        )


def spent_joules(counter: Counter, before: int, after: int) -> float:
    """Between two readings with less than one round between them."""
    lost = counter.wraps_at or 0
    return (after - before + (lost if after < before else 0)) / 1e6


def _zones(powercap: Path) -> list[Path]:
    """One folder for each package: its cores, and the platform around it, have folders that count the same again."""
    names = {file.parent: file.read_text() for file in powercap.glob("intel-rapl:*/name")}
    return sorted(folder for folder, name in names.items() if name.startswith("package"))


def _packages(powercap: Path) -> list[Counter]:
    found = []
    for zone in _zones(powercap):
        try:
            read = _reader(zone / "energy_uj")
            read()
            found.append(Counter(zone.name, read, int((zone / "max_energy_range_uj").read_text())))
        except (OSError, ValueError):
            continue
    return found


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
        found = [Counter(f"gpu:{n}", _gpu_reader(pynvml, handle)) for n, handle in enumerate(handles)]
        for counter in found:
            counter.read()
    except pynvml.NVMLError:  # no driver, or a GPU older than these counters
        return []
    return found


def _gpu_reader(nvml: object, handle: object) -> Callable[[], int]:
    read: Callable[[object], int] = nvml.nvmlDeviceGetTotalEnergyConsumption  # type: ignore[attr-defined]
    return lambda: 1000 * read(handle)
