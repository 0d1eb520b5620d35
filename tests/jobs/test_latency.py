"""Latency is taken in a process of its own, with the target's threads, and says when it cannot be trusted."""

import os
from pathlib import Path

import pytest

from jobs import stopwatch
from jobs.job import Materials, Target, TextSource
from jobs.meter import Subject
from jobs.meters import latency
from jobs.stopwatch import Request, Timings


def subject(folder: Path, text_file: Path, threads: int = 1) -> Subject:
    target = Target(threads=threads, prompt_tokens=8, new_tokens=4)
    task = "causal-lm" if "llama" in folder.name else "embedding"
    return Subject(
        folder, folder, Materials(str(folder), task, TextSource(str(text_file), 1, 8), target=target)
    )  # type: ignore[arg-type]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One try, however noisy the machine that tests run on."""
    monkeypatch.setattr(latency, "_PATIENCE_S", 0.0)


@pytest.mark.usefixtures("quick")
def test_a_causal_model_is_timed_in_prefill_and_decode(tiny_llama: Path, text_file: Path) -> None:
    found = latency.measure(subject(tiny_llama, text_file))
    assert set(found.metrics) == set(latency.METER.metrics)
    assert 0 < found.metrics["decode_ms"] <= found.metrics["decode_p90_ms"]
    assert set(found.errors) == {"prefill_ms", "decode_ms"}


def test_more_threads_than_processors_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match=r"target\.threads=4096, but this machine lends"):
        stopwatch.time_artifact(Request(str(tiny_llama), "torch", 4096, 8, 4, 512))


def test_a_failing_process_tells_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the timing process failed"):
        stopwatch.time_artifact(Request(str(tmp_path / "nowhere"), "torch", 1, 8, 4, 512))


def test_steady_timings_are_reliable_and_their_error_is_half_their_spread() -> None:
    found = latency.summary(Timings([10.0] * 10, [1.00, 1.05, 1.10] * 5, others=0.0))
    assert found.unreliable == ()
    assert found.metrics["decode_ms"] == 1.05
    assert found.errors == {"prefill_ms": 0.0, "decode_ms": pytest.approx(0.05)}


def test_spread_timings_are_marked_unreliable_alone() -> None:
    found = latency.summary(Timings([10.0] * 10, [1.0, 1.5, 2.0] * 5, others=0.0))
    assert found.unreliable == ("decode_ms", "decode_p90_ms")


def test_timings_on_a_busy_machine_are_all_marked_unreliable() -> None:
    found = latency.summary(Timings([10.0] * 10, [1.0] * 10, others=0.5))
    assert set(found.unreliable) == set(found.metrics)


def test_a_noisy_try_is_repeated_and_the_quiet_one_stands(
    tiny_llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = iter([Timings([10.0, 30.0] * 5, [1.0] * 10, 0.0), Timings([9.0] * 10, [1.0] * 10, 0.0)])
    monkeypatch.setattr(latency, "time_artifact", lambda request: next(tries))
    found = latency.measure(subject(tiny_llama, text_file))
    assert found.metrics["prefill_ms"] == 9.0
    assert found.unreliable == ()


def test_after_three_noisy_tries_the_least_noisy_stands_and_is_marked(
    tiny_llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noisy = [Timings([10.0, spread] * 5, [1.0] * 10, 0.0) for spread in (40.0, 20.0, 30.0)]
    tries = iter(noisy)
    monkeypatch.setattr(latency, "time_artifact", lambda request: next(tries))
    found = latency.measure(subject(tiny_llama, text_file))
    assert found == latency.summary(noisy[1])
    assert found.unreliable == ("prefill_ms", "prefill_p90_ms")
    assert next(tries, None) is None


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
