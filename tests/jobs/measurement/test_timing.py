"""Noisy timing processes are repeated; if too few are quiet, the least noisy are used and marked unreliable."""

from collections.abc import Callable, Iterator

import pytest

from jobs.measurement.stopwatch import Timings
from jobs.measurement.timing import RepeatedTimings, noisy, time_quietly


def make_steady(ms: float = 1.0, **disturbed: object) -> Timings:
    return Timings([10 * ms] * 10, [ms] * 10, **{"load_share": 0.0, **disturbed})  # type: ignore[arg-type]


def make_spread(spread: float) -> Timings:
    return Timings([10.0] * 10, [1.0, 1.0 + spread] * 5, 0.0)


def in_order(*timings: Timings) -> Callable[[], Timings]:
    remaining = iter(timings)
    return lambda: next(remaining)


def clock(*seconds: float) -> Callable[[], float]:
    remaining: Iterator[float] = iter(seconds)
    return lambda: next(remaining)


def test_three_quiet_processes_are_enough() -> None:
    result = time_quietly(in_order(*[make_steady()] * 3), clock(*range(9)))
    assert len(result.tries) == 3
    assert result.reliable("prefill")
    assert result.reliable("decode")


def test_a_noisy_process_is_replaced_by_another() -> None:
    tries = [make_steady(1.0), make_spread(1.0), make_steady(1.1), make_steady(1.2)]
    result = time_quietly(in_order(*tries), clock(*range(9)))
    assert result.tries == tuple(tries)
    assert result.chosen("decode") == [tries[0], tries[2], tries[3]]
    assert result.chosen("prefill") == tries[:3]
    assert result.reliable("decode")


def test_on_a_noisy_machine_the_least_noisy_processes_are_used_and_marked() -> None:
    tries = [make_spread(spread) for spread in (0.9, 0.5, 0.8, 0.6, 1.0, 0.7, 1.1)]
    result = time_quietly(in_order(*tries), clock(*range(9)))
    assert result.tries == tuple(tries)
    assert result.chosen("decode") == [tries[1], tries[3], tries[5]]
    assert not result.reliable("decode")
    assert result.reliable("prefill")


def test_no_process_is_started_after_the_time_limit() -> None:
    result = time_quietly(in_order(make_steady(), make_steady()), clock(0.0, 60.0, 91.0))
    assert len(result.tries) == 2
    assert not result.reliable("decode")


def test_processes_that_disagree_are_unreliable() -> None:
    assert RepeatedTimings((make_steady(1.0), make_steady(1.1), make_steady(1.19))).reliable("decode")
    assert not RepeatedTimings((make_steady(1.0), make_steady(1.1), make_steady(1.3))).reliable("decode")


@pytest.mark.parametrize(
    ("disturbed", "expected"),
    [
        ({}, False),
        ({"load_share": 0.11}, True),
        ({"throttled": 1}, True),
        ({"mhz": [3000.0, 2800.0]}, False),
        ({"mhz": [3000.0, 2600.0, 3000.0]}, True),
    ],
)
def test_a_busy_or_throttled_machine_makes_all_timings_noisy(
    disturbed: dict[str, object], expected: bool
) -> None:
    timings = make_steady(**disturbed)  # type: ignore[arg-type]
    assert noisy(timings, "prefill") is expected
    assert noisy(timings, "decode") is expected


def test_without_new_tokens_only_prefill_is_timed() -> None:
    result = time_quietly(in_order(*[Timings([10.0] * 10, [], 0.0)] * 3), clock(*range(9)))
    assert len(result.tries) == 3
    assert result.reliable("prefill")
