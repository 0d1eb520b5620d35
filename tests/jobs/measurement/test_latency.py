"""Latency is timed in a separate process with the target's threads, and unreliable timings are marked."""

import os
from pathlib import Path

import pytest

from jobs.materials import Materials, Target, TextSource
from jobs.measurement import paired_timing, stopwatch, timing
from jobs.measurement.measurement import Measurement
from jobs.measurement.meter import ShippedModel
from jobs.measurement.stopwatch import Request, Timings, Turn
from jobs.measurement.timing import RepeatedTimings
from jobs.meters import cost, energy, latency, memory


def subject(folder: Path, text_file: Path, price_per_hour: float | None = None) -> ShippedModel:
    target = Target(threads=1, prompt_tokens=8, new_tokens=4, price_per_hour=price_per_hour)
    task = "embedding"
    if "llama" in folder.name:
        task = "causal-lm"
    return ShippedModel(
        folder, folder, Materials(str(folder), task, TextSource(str(text_file), 1, 8), target=target)
    )  # type: ignore[arg-type]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow a single try, also on a noisy machine."""
    monkeypatch.setattr(timing, "_PATIENCE_S", 0.0)


@pytest.mark.usefixtures("quick")
def test_a_causal_model_is_timed_in_prefill_and_decode(tiny_llama: Path, text_file: Path) -> None:
    measurement = latency.measure(subject(tiny_llama, text_file))
    assert set(measurement.metrics) >= set(latency.METER.metrics)
    assert 0 < measurement.metrics["decode_ms"] <= measurement.metrics["decode_p90_ms"]
    assert set(measurement.errors) == {"prefill_ms", "decode_ms"}


@pytest.mark.usefixtures("quick")
def test_latency_and_memory_share_one_timing(
    tiny_llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[Request] = []
    time_artifact = stopwatch.time_artifact
    monkeypatch.setattr(
        stopwatch, "time_artifact", lambda request: requests.append(request) or time_artifact(request)
    )
    model = subject(tiny_llama, text_file)
    latency.measure(model)
    assert 0.05 < memory.measure(model).metrics["memory_gib"] < 4
    assert len(requests) == 1


def test_more_threads_than_cpus_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match=r"target\.threads=4096, but only"):
        stopwatch.time_artifact(Request(str(tiny_llama), "torch", 4096, 8, 4, 512))


def test_a_failed_timing_process_reports_its_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the timing process failed"):
        stopwatch.time_artifact(Request(str(tmp_path / "nowhere"), "torch", 1, 8, 4, 512))


def test_two_stopwatches_alternate_for_the_requested_rounds(tiny_llama: Path) -> None:
    request = Request(str(tiny_llama), "torch", 1, 8, 4, 512)
    with stopwatch.started(request) as first, stopwatch.started(request) as second:
        times_ms = paired_timing.turns(first, second, Turn(repeats=2, seconds=0.0), rounds=3)
    assert set(times_ms) == {"prefill", "decode"}
    assert all(ms > 0 for both in times_ms.values() for ms in both)


def summarize(*tries: Timings) -> Measurement:
    return latency.summary(RepeatedTimings(tries))


def test_the_median_of_the_processes_is_reported_with_the_larger_error() -> None:
    steady = [Timings([10.0] * 10, [ms - 0.05, ms, ms + 0.05] * 5, 0.0) for ms in (1.0, 1.02, 1.2)]
    measurement = summarize(*steady)
    assert measurement.unreliable == ()
    assert measurement.metrics["decode_ms"] == pytest.approx(1.02)
    assert measurement.errors == {"prefill_ms": 0.0, "decode_ms": pytest.approx(0.1)}
    assert summarize(*[steady[0]] * 3).errors["decode_ms"] == pytest.approx(0.05)


def test_only_metrics_with_a_large_spread_are_marked_unreliable() -> None:
    measurement = summarize(*[Timings([10.0] * 10, [1.0, 1.5, 2.0] * 5, load_share=0.0)] * 3)
    assert measurement.unreliable == ("decode_ms", "decode_p90_ms")


def test_the_cpu_frequency_is_reported_if_available() -> None:
    timings = Timings([10.0] * 10, [1.0] * 10, 0.0, mhz=[3000.0, 3100.0, 2950.0])
    assert summarize(timings).metrics["cpu_mhz"] == 3000.0
    assert "cpu_mhz" not in summarize(Timings([10.0] * 10, [1.0] * 10, 0.0)).metrics


def test_energy_is_measured_on_the_chosen_processes(tiny_llama: Path, text_file: Path) -> None:
    model = subject(tiny_llama, text_file)
    tries = [Timings([10.0] * 10, [1.0] * 10, 0.0, token_joules=joules) for joules in (0.5, 0.7, 0.6)]
    model.__dict__["timed"] = RepeatedTimings(
        (Timings([10.0] * 10, [1.0] * 10, 0.9, token_joules=5.0), *tries)
    )
    measurement = energy.measure(model)
    assert measurement.metrics == {"token_joules": 0.6}
    assert measurement.errors == {"token_joules": pytest.approx(0.1)}
    assert measurement.unreliable == ()


def test_the_cost_of_a_million_tokens_is_their_time_at_the_given_price(
    tiny_llama: Path, text_file: Path
) -> None:
    model = subject(tiny_llama, text_file, price_per_hour=0.72)
    model.__dict__["timed"] = RepeatedTimings((Timings([10.0] * 10, [5.0] * 10, 0.0),) * 3)
    # A million tokens of 5 ms take 5000 s, at a price of 0.0002 per second.
    assert cost.measure(model).metrics == {"cost_per_million_tokens": pytest.approx(1.0)}


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system cannot pin threads")
def test_a_worker_with_one_thread_can_time_two_threads(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two CPUs")
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, sys\n"
        "def write_limits():\n"
        "    torch = sys.modules['torch']\n"
        f"    file = open({str(tmp_path / 'seen')!r}, 'w')\n"
        "    file.write(f'{torch.get_num_threads()} {len(os.sched_getaffinity(0))}')\n"
        "    file.close()\n"
        "atexit.register(write_limits)\n"
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    request = Request(str(tiny_llama), "torch", 2, 8, 0, 512)
    stopwatch.time_artifact(request)
    assert (tmp_path / "seen").read_text() == "2 2"
