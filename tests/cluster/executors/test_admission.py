"""What may start now: decided without processes or a clock, and tested so."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.executors.admission import Admission
from cluster.executors.executor import Capacity, Resources

needs = st.builds(
    Resources,
    cpus=st.sampled_from([1.0, 2.0, 4.0]),
    memory_gib=st.floats(0, 8),
    exclusive=st.booleans(),
)


def admission(*waiting: Resources, slots: int = 2, cpus: float = 4, memory_gib: float = 8) -> Admission:
    made = Admission(Capacity(slots, cpus, memory_gib))
    for ticket, one in enumerate(waiting):
        made.add(ticket, one)
    return made


def started(admission: Admission) -> list[int]:
    return list(iter(admission.next, None))


def test_pieces_start_in_the_order_they_came_until_the_slots_are_full() -> None:
    queue = admission(Resources(), Resources(), Resources())
    assert started(queue) == [0, 1]
    queue.end(0)
    assert started(queue) == [2]


def test_pieces_that_fit_the_memory_exactly_run_together() -> None:
    assert started(admission(*[Resources(memory_gib=0.1)] * 3, slots=3, memory_gib=0.3)) == [0, 1, 2]


def test_a_smaller_piece_overtakes_one_that_waits_for_memory() -> None:
    queue = admission(Resources(memory_gib=6), Resources(memory_gib=6), Resources(memory_gib=1))
    assert started(queue) == [0, 2]


def test_a_piece_that_was_overtaken_often_is_next() -> None:
    queue = admission(Resources(memory_gib=6), Resources(memory_gib=6))
    small = Resources(memory_gib=1)
    assert started(queue) == [0]
    for ticket in range(2, 2 + Admission.PATIENCE):
        queue.add(ticket, small)
        assert started(queue) == [ticket]
        queue.end(ticket)
    queue.add(100, small)
    assert started(queue) == []
    queue.end(0)
    assert started(queue) == [1, 100]


def test_exclusive_pieces_start_alone_when_no_other_kind_waits() -> None:
    alone = Resources(exclusive=True)
    queue = admission(alone, Resources(), alone, Resources(), Resources())
    assert started(queue) == [1, 3]
    queue.end(1)
    assert started(queue) == [4]
    queue.end(4)
    assert started(queue) == []
    queue.end(3)
    assert started(queue) == [0]
    queue.add(5, Resources())
    assert started(queue) == []
    queue.end(0)
    assert started(queue) == [5]


def test_a_waiting_piece_that_ends_frees_those_behind_it() -> None:
    queue = admission(Resources(), Resources(exclusive=True), Resources(), slots=1)
    assert started(queue) == [0]
    queue.end(2)
    queue.end(0)
    assert started(queue) == [1]


@pytest.mark.parametrize("slots", [0, -1])
def test_an_executor_needs_a_slot(slots: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Capacity(slots)


def test_a_refusal_says_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"memory_gib=9 is not available here: from 0 to 8"):
        admission(Resources(memory_gib=9))
    with pytest.raises(ValueError, match="memory_gib=nan"):
        admission(Resources(memory_gib=float("nan")))


@given(st.lists(needs, max_size=30), st.randoms(use_true_random=False))
def test_whatever_ends_first_nothing_is_over_committed_and_all_start(pieces, random) -> None:
    queue = admission(*pieces, slots=3)
    running: list[int] = []
    done: list[int] = []
    while len(done) < len(pieces):
        running += started(queue)
        assert running, "nothing runs and nothing may start"
        now = [pieces[ticket] for ticket in running]
        assert len(now) <= 3
        assert sum(one.memory_gib for one in now) <= 8 + 1e-6
        assert sum(one.cpus for one in now) <= 4
        assert len(now) == 1 or not any(one.exclusive for one in now)
        ended = random.choice(running)
        running.remove(ended)
        done.append(ended)
        queue.end(ended)
    assert sorted(done) == list(range(len(pieces)))
