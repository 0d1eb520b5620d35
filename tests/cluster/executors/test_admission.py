"""Admission: which task may start now, decided without processes and clock."""

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
    queue = Admission(Capacity(slots, cpus, memory_gib))
    for ticket, task in enumerate(waiting):
        queue.add(ticket, task)
    return queue


def started(admission: Admission) -> list[int]:
    return list(iter(admission.next, None))


def test_tasks_start_in_the_order_of_submission_until_the_slots_are_full() -> None:
    queue = admission(Resources(), Resources(), Resources())
    assert started(queue) == [0, 1]
    queue.end(0)
    assert started(queue) == [2]


def test_tasks_that_fit_the_memory_exactly_run_together() -> None:
    assert started(admission(*[Resources(memory_gib=0.1)] * 3, slots=3, memory_gib=0.3)) == [0, 1, 2]


def test_a_smaller_task_overtakes_a_task_that_waits_for_memory() -> None:
    queue = admission(Resources(memory_gib=6), Resources(memory_gib=6), Resources(memory_gib=1))
    assert started(queue) == [0, 2]


def test_a_task_that_was_overtaken_often_is_next() -> None:
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


def test_exclusive_tasks_start_alone_when_no_other_kind_waits() -> None:
    exclusive = Resources(exclusive=True)
    queue = admission(exclusive, Resources(), exclusive, Resources(), Resources())
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


def test_a_waiting_task_that_is_removed_lets_the_next_ones_start() -> None:
    queue = admission(Resources(), Resources(exclusive=True), Resources(), slots=1)
    assert started(queue) == [0]
    queue.end(2)
    queue.end(0)
    assert started(queue) == [1]


@pytest.mark.parametrize("slots", [0, -1])
def test_an_executor_needs_a_slot(slots: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Capacity(slots)


def test_a_refusal_names_the_allowed_range() -> None:
    with pytest.raises(ValueError, match=r"memory_gib=9 is not available here: from 0 to 8"):
        admission(Resources(memory_gib=9))
    with pytest.raises(ValueError, match="memory_gib=nan"):
        admission(Resources(memory_gib=float("nan")))


@given(st.lists(needs, max_size=30), st.randoms(use_true_random=False))
def test_in_any_order_of_ends_resources_are_never_exceeded_and_all_tasks_start(tasks, random) -> None:
    queue = admission(*tasks, slots=3)
    running: list[int] = []
    done: list[int] = []
    while len(done) < len(tasks):
        running += started(queue)
        assert running, "nothing runs and nothing may start"
        now = [tasks[ticket] for ticket in running]
        assert len(now) <= 3
        assert sum(task.memory_gib for task in now) <= 8 + 1e-6
        assert sum(task.cpus for task in now) <= 4
        assert len(now) == 1 or not any(task.exclusive for task in now)
        ended = random.choice(running)
        running.remove(ended)
        done.append(ended)
        queue.end(ended)
    assert sorted(done) == list(range(len(tasks)))
