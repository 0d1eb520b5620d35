"""Machine state is read where the system reports it, and is absent elsewhere."""

import os
from pathlib import Path

import pytest

from jobs.measurement import energy_counters, machine
from jobs.measurement.energy_counters import Counter, Tally, spent_joules
from jobs.measurement.machine import LoadMonitor


def write(file: Path, text: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{text}\n")


def test_frequency_and_throttling_are_read_for_the_monitored_cpus(tmp_path: Path) -> None:
    for processor, khz in ((0, 3_000_000), (1, 2_000_000), (2, 9_000_000)):
        write(tmp_path / f"cpu{processor}/cpufreq/scaling_cur_freq", khz)
        write(tmp_path / f"cpu{processor}/thermal_throttle/core_throttle_count", 7)
    monitor = LoadMonitor([0, 1], tmp_path)
    write(tmp_path / "cpu1/cpufreq/scaling_cur_freq", 1_000_000)
    write(tmp_path / "cpu1/thermal_throttle/core_throttle_count", 9)
    load = monitor.load()
    assert load.mhz == [2500.0, 2000.0]
    assert load.throttled == 2
    assert load.load_share >= 0


def test_values_that_the_system_does_not_report_are_absent(tmp_path: Path) -> None:
    load = LoadMonitor([0], tmp_path).load()
    assert load.mhz == []
    assert load.throttled == 0


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system cannot pin threads")
def test_one_cpu_of_each_core_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3})
    for processor, siblings in ((0, "0-1"), (1, "0-1"), (2, "2-3"), (3, "2-3")):
        write(tmp_path / f"cpu{processor}/topology/thread_siblings_list", siblings)
    assert machine.processors(tmp_path) == [0, 2, 1, 3]
    assert machine.processors(tmp_path / "nothing") == [0, 1, 2, 3]


def test_the_peak_memory_of_the_process_includes_a_large_allocation() -> None:
    peak = machine.peak_memory_bytes()
    if peak is None:
        pytest.skip("the system does not report it")
    allocation = bytearray(os.urandom(2**20) * 64)
    new_peak = machine.peak_memory_bytes()
    assert new_peak is not None
    assert new_peak >= peak
    assert new_peak > len(allocation)


def test_each_package_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy_counters, "_gpus", list)
    for zone, name in (("intel-rapl:0", "package-0"), ("intel-rapl:1", "psys"), ("intel-rapl:0:0", "core")):
        write(tmp_path / zone / "name", name)
        write(tmp_path / zone / "energy_uj", 5_000_000)
        write(tmp_path / zone / "max_energy_range_uj", 100_000_000)
    (counter,) = energy_counters.counters(tmp_path)
    tally = Tally([counter])
    write(tmp_path / "intel-rapl:0/energy_uj", 7_500_000)
    assert tally.joules() == 2.5
    assert energy_counters.missing(tmp_path) is None


def test_a_counter_overflow_is_handled() -> None:
    assert spent_joules(Counter("c", int, 100_000_000), 99_000_000, 1_000_000) == 2.0


def test_a_machine_without_energy_counters_gives_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy_counters, "_gpus", list)
    reason = energy_counters.missing(tmp_path)
    assert reason is not None
    assert "has no energy counter" in reason
