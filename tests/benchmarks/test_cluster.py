"""The benchmark of clusters detects results that are lost or counted twice, and compares numbers with goals."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.cluster import Number, miscounted
from jobs.job import Failure, Success
from jobs.measurement.measurement import Measurement
from jobs.recipe import Origin, Recipe
from jobs.techniques.rtn import Rtn
from orchestrator.study.events import AttemptEnded, AttemptStarted, CandidateProposed, Event, ServiceStarted

ORIGINAL = Recipe(Origin("m", "d", 0))
FOUR_BITS, EIGHT_BITS = (ORIGINAL.then(Rtn(bits=bits)) for bits in (4, 8))
DONE = Success("a" * 64, 1, Measurement({"accuracy": 0.5}), 1.0)
LOST = Failure("preempted", "the node went away")
EVENTS: list[Event] = [
    ServiceStarted(),
    AttemptStarted("o", 1),
    CandidateProposed(FOUR_BITS, {}, None),
    AttemptStarted("a", 1),
    CandidateProposed(EIGHT_BITS, {}, None),
    AttemptStarted("b", 1),
    AttemptEnded("o", 1, DONE),
    AttemptEnded("a", 1, LOST),
    AttemptStarted("a", 2),
    AttemptEnded("b", 1, DONE),
    AttemptEnded("a", 2, DONE),
]
STORED = {"o", "a", "b"}
RUNS = "MLflow has {} finished runs of 2 candidates and the original"
FINISHED = Counter([ORIGINAL.id, FOUR_BITS.id, EIGHT_BITS.id])


def test_two_attempts_with_one_result_are_counted_once() -> None:
    assert miscounted(EVENTS, 2, STORED, FINISHED) == []


@pytest.mark.parametrize(
    ("study", "faults"),
    [
        ((EVENTS, 3, STORED, FINISHED), ["2 candidates instead of 3"]),
        ((EVENTS[:-1], 2, {"o", "b"}, FINISHED), ["1 jobs have no result"]),
        (([*EVENTS, AttemptEnded("a", 1, DONE)], 2, STORED, FINISHED), ["1 jobs have several results in the ledger"]),
        ((EVENTS, 2, {"o", "a"}, FINISHED), ["the store holds 2 results, the ledger 3"]),
        ((EVENTS, 2, STORED, FINISHED + Counter([FOUR_BITS.id])), [RUNS.format(4)]),
        ((EVENTS, 2, STORED, FINISHED - Counter([FOUR_BITS.id])), [RUNS.format(2)]),
        ((EVENTS, 2, STORED, Counter()), [RUNS.format(0)]),
    ],
)  # fmt: skip
def test_lost_and_repeated_results_are_reported(study: tuple, faults: list[str]) -> None:
    assert miscounted(*study) == faults


def test_a_number_meets_its_goal_from_the_right_side() -> None:
    assert str(Number("seconds", 31.0, " s", 30)) == "seconds 31 s (goal ≤ 30 s: missed)"
    assert (
        str(Number("utilisation", 92.34, " %", 90, is_minimum=True))
        == "utilisation 92.3 % (goal ≥ 90 %: met)"
    )
    assert str(Number("kills", 10, "")) == "kills 10"
