"""A noisy process is followed by another; where too few were quiet, what is left is marked."""

from collections.abc import Callable, Iterator

import pytest

from jobs.measurement.stopwatch import Timings
from jobs.measurement.timing import RepeatedTimings, noisy, time_quietly


def steady(ms: float = 1.0, **disturbed: object) -> Timings:
    return Timings([10 * ms] * 10, [ms] * 10, **{"load_share": 0.0, **disturbed})  # type: ignore[arg-type]


def spread_out(by: float) -> Timings:
    return Timings([10.0] * 10, [1.0, 1.0 + by] * 5, 0.0)


def in_order(*timings: Timings) -> Callable[[], Timings]:
    left = iter(timings)
    return lambda: next(left)


def clock(*seconds: float) -> Callable[[], float]:
    left: Iterator[float] = iter(seconds)
    return lambda: next(left)


def test_three_quiet_processes_are_enough() -> None:
    found = time_quietly(in_order(*[steady()] * 3), clock(*range(9)))
    assert len(found.tries) == 3
    assert found.reliable("prefill")
    assert found.reliable("decode")


def test_a_noisy_process_is_replaced_by_another() -> None:
    tries = [steady(1.0), spread_out(1.0), steady(1.1), steady(1.2)]
    found = time_quietly(in_order(*tries), clock(*range(9)))
    assert found.tries == tuple(tries)
    assert found.chosen("decode") == [tries[0], tries[2], tries[3]]
    assert found.chosen("prefill") == tries[:3]
    assert found.reliable("decode")


def test_on_a_machine_that_stays_noisy_the_least_noisy_stand_and_are_marked() -> None:
    tries = [spread_out(by) for by in (0.9, 0.5, 0.8, 0.6, 1.0, 0.7, 1.1)]
    found = time_quietly(in_order(*tries), clock(*range(9)))
    assert found.tries == tuple(tries)
    assert found.chosen("decode") == [tries[1], tries[3], tries[5]]
    assert not found.reliable("decode")
    assert found.reliable("prefill")


def test_no_process_is_started_when_patience_is_at_its_end() -> None:
    found = time_quietly(in_order(steady(), steady()), clock(0.0, 60.0, 91.0))
    assert len(found.tries) == 2
    assert not found.reliable("decode")


def test_processes_that_disagree_are_not_relied_on() -> None:
    assert RepeatedTimings((steady(1.0), steady(1.1), steady(1.19))).reliable("decode")
    assert not RepeatedTimings((steady(1.0), steady(1.1), steady(1.3))).reliable("decode")


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
def test_a_machine_that_was_busy_or_slowed_down_disturbs_every_part(
    disturbed: dict[str, object], expected: bool
) -> None:
    timings = steady(**disturbed)  # type: ignore[arg-type]
    assert noisy(timings, "prefill") is expected
    assert noisy(timings, "decode") is expected


def test_prefill_alone_is_timed_where_nothing_is_decoded() -> None:
    found = time_quietly(in_order(*[Timings([10.0] * 10, [], 0.0)] * 3), clock(*range(9)))
    assert len(found.tries) == 3
    assert found.reliable("prefill")
