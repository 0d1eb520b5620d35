"""Latency is taken in a process of its own, with the target's threads, and says when it cannot be trusted."""

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
    task = "causal-lm" if "llama" in folder.name else "embedding"
    return ShippedModel(
        folder, folder, Materials(str(folder), task, TextSource(str(text_file), 1, 8), target=target)
    )  # type: ignore[arg-type]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One try, however noisy the machine that tests run on."""
    monkeypatch.setattr(timing, "_PATIENCE_S", 0.0)


@pytest.mark.usefixtures("quick")
def test_a_causal_model_is_timed_in_prefill_and_decode(tiny_llama: Path, text_file: Path) -> None:
    found = latency.measure(subject(tiny_llama, text_file))
    assert set(found.metrics) >= set(latency.METER.metrics)
    assert 0 < found.metrics["decode_ms"] <= found.metrics["decode_p90_ms"]
    assert set(found.errors) == {"prefill_ms", "decode_ms"}


@pytest.mark.usefixtures("quick")
def test_all_that_is_learned_of_the_same_processes_takes_one_timing(
    tiny_llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[Request] = []
    once = stopwatch.time_artifact
    monkeypatch.setattr(stopwatch, "time_artifact", lambda request: timed.append(request) or once(request))
    one = subject(tiny_llama, text_file)
    latency.measure(one)
    assert 0.05 < memory.measure(one).metrics["memory_gib"] < 4
    assert len(timed) == 1


def test_more_threads_than_processors_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match=r"target\.threads=4096, but only"):
        stopwatch.time_artifact(Request(str(tiny_llama), "torch", 4096, 8, 4, 512))


def test_a_failing_process_tells_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the timing process failed"):
        stopwatch.time_artifact(Request(str(tmp_path / "nowhere"), "torch", 1, 8, 4, 512))


def test_two_stopwatches_take_turns_as_often_as_they_are_asked(tiny_llama: Path) -> None:
    request = Request(str(tiny_llama), "torch", 1, 8, 4, 512)
    with stopwatch.started(request) as one, stopwatch.started(request) as other:
        found = paired_timing.turns(one, other, Turn(repeats=2, seconds=0.0), rounds=3)
    assert set(found) == {"prefill", "decode"}
    assert all(ms > 0 for both in found.values() for ms in both)


def summed(*tries: Timings) -> Measurement:
    return latency.summary(RepeatedTimings(tries))


def test_the_median_of_the_processes_counts_and_its_error_is_their_spread_where_that_is_more() -> None:
    steady = [Timings([10.0] * 10, [ms - 0.05, ms, ms + 0.05] * 5, 0.0) for ms in (1.0, 1.02, 1.2)]
    found = summed(*steady)
    assert found.unreliable == ()
    assert found.metrics["decode_ms"] == pytest.approx(1.02)
    assert found.errors == {"prefill_ms": 0.0, "decode_ms": pytest.approx(0.1)}
    assert summed(*[steady[0]] * 3).errors["decode_ms"] == pytest.approx(0.05)


def test_spread_timings_are_marked_unreliable_alone() -> None:
    found = summed(*[Timings([10.0] * 10, [1.0, 1.5, 2.0] * 5, load_share=0.0)] * 3)
    assert found.unreliable == ("decode_ms", "decode_p90_ms")


def test_the_frequency_is_told_where_the_system_tells_it() -> None:
    told = Timings([10.0] * 10, [1.0] * 10, 0.0, mhz=[3000.0, 3100.0, 2950.0])
    assert summed(told).metrics["cpu_mhz"] == 3000.0
    assert "cpu_mhz" not in summed(Timings([10.0] * 10, [1.0] * 10, 0.0)).metrics


def test_energy_is_that_of_the_processes_that_count(tiny_llama: Path, text_file: Path) -> None:
    one = subject(tiny_llama, text_file)
    tries = [Timings([10.0] * 10, [1.0] * 10, 0.0, token_joules=joules) for joules in (0.5, 0.7, 0.6)]
    one.__dict__["timed"] = RepeatedTimings((Timings([10.0] * 10, [1.0] * 10, 0.9, token_joules=5.0), *tries))
    found = energy.measure(one)
    assert found.metrics == {"token_joules": 0.6}
    assert found.errors == {"token_joules": pytest.approx(0.1)}
    assert found.unreliable == ()


def test_a_million_tokens_cost_their_time_at_the_given_price(tiny_llama: Path, text_file: Path) -> None:
    one = subject(tiny_llama, text_file, price_per_hour=0.72)
    one.__dict__["timed"] = RepeatedTimings((Timings([10.0] * 10, [5.0] * 10, 0.0),) * 3)
    # A million tokens at 5 ms are 5000 s, at 0.0002 a second.
    assert cost.measure(one).metrics == {"cost_per_million_tokens": pytest.approx(1.0)}


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system cannot pin threads")
def test_a_worker_of_one_thread_can_time_two(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two processors")
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, sys\n"
        "def told():\n"
        "    torch = sys.modules['torch']\n"
        f"    file = open({str(tmp_path / 'seen')!r}, 'w')\n"
        "    file.write(f'{torch.get_num_threads()} {len(os.sched_getaffinity(0))}')\n"
        "    file.close()\n"
        "atexit.register(told)\n"
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    request = Request(str(tiny_llama), "torch", 2, 8, 0, 512)
    stopwatch.time_artifact(request)
    assert (tmp_path / "seen").read_text() == "2 2"
