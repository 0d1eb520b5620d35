"""The contract of all searches; every file NAME_search.py in orchestrator/search is tested."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping
from typing import Any

import pytest

from jobs.job import Failure
from jobs.knobs import Choice, Range, Value
from orchestrator import search
from orchestrator.pareto.front import Objective

SPACE = {
    "depth": Range(0, 6, integer=True),
    "keep": Range(0.3, 1.0),
    "rate": Range(1e-5, 1e-2, log=True),
    "bits": Choice((3, 4, 8)),
    "order": Choice(("prune", "factorize")),
    "recover": Choice((True, False)),
}
SIZE = Objective("size_bytes", "min", limit=60.0)
OBJECTIVES = (SIZE, Objective("accuracy", "max"))


def size(choices: Mapping[str, Value]) -> dict[str, float]:
    return {"size_bytes": (10 - float(choices["depth"])) * float(choices["bits"]) * float(choices["keep"])}


def measured(choices: Mapping[str, Value]) -> dict[str, float]:
    return {**size(choices), "accuracy": 1.0 - 0.05 * float(choices["depth"]) - 1 / float(choices["bits"])}


# Optuna's Gaussian process takes seconds an ask.
NAMES = [
    pytest.param(name, marks=[pytest.mark.slow, pytest.mark.timeout(1200)] * (name == "gp"))
    for name in search.names()
]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def study(name: str, seed: int = 0, rounds: int = 20) -> list[dict[str, Value]]:
    trying = search.make(name, SPACE, OBJECTIVES, size, seed)
    seen = []
    for _ in range(rounds):
        choices = trying.ask(3)
        trying.tell([(one, measured(one)) for one in choices])
        seen += choices
    return seen


def test_choices_cover_every_knob_with_a_valid_value_of_its_type(name: str) -> None:
    for choices in study(name):
        assert choices.keys() == SPACE.keys()
        for knob, domain in SPACE.items():
            assert choices[knob] in domain
            assert type(choices[knob]) is type(domain.normal(choices[knob]))


def test_no_choice_breaks_a_limit_that_is_known_beforehand(name: str) -> None:
    assert all(not SIZE.broken_by(size(choices)["size_bytes"]) for choices in study(name))


def test_no_choice_is_proposed_twice(name: str) -> None:
    seen = [tuple(choices.items()) for choices in study(name)]
    assert len(seen) == 60
    assert len(set(seen)) == len(seen)


def test_the_same_seed_gives_the_same_choices_and_another_gives_others(name: str) -> None:
    assert study(name, seed=7) == study(name, seed=7)
    assert study(name, seed=7) != study(name, seed=8)


def test_a_limit_that_nothing_keeps_is_named_with_the_nearest_value_seen(name: str) -> None:
    hopeless = search.make(name, SPACE, [Objective("size_bytes", "min", limit=1.0)], size, seed=0)
    with pytest.raises(LookupError, match=r"size_bytes has the limit 1, the nearest value was [34]"):
        hopeless.ask(1)


def test_a_small_space_runs_out_instead_of_repeating_itself(name: str) -> None:
    trying = search.make(name, {"bits": Choice((3, 4, 8))}, [Objective("accuracy", "max")], seed=0)
    assert sorted(choices["bits"] for choices in trying.ask(5)) == [3, 4, 8]
    assert trying.ask(1) == []


def test_what_was_told_unasked_is_not_proposed_again(name: str) -> None:
    trying = search.make(name, {"bits": Choice((3, 4, 8))}, [Objective("accuracy", "max")], seed=0)
    trying.tell([({"bits": 3}, {"accuracy": 0.5}), ({"bits": 8}, Failure("diverged", "NaN"))])
    assert trying.ask(3) == [{"bits": 4}]


def test_many_asks_may_be_outstanding_and_be_told_out_of_order_late_and_twice(name: str) -> None:
    trying = search.make(name, SPACE, OBJECTIVES, size, seed=0)
    outstanding = [choices for _ in range(20) for choices in trying.ask(2)]
    results = [(choices, measured(choices)) for choices in reversed(outstanding)]
    trying.tell(results[:25])
    outstanding = trying.ask(4)
    trying.tell(results)
    trying.tell(results)
    assert len(outstanding + trying.ask(4)) == 8


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_no_number_counts_as_a_failure(name: str, bad: float) -> None:
    told_nan, told_failure = (search.make(name, SPACE, OBJECTIVES, size, seed=0) for _ in range(2))
    for _ in range(15):
        choices, same = told_nan.ask(4), told_failure.ask(4)
        assert choices == same
        told_nan.tell([(one, measured(one)) for one in choices[1:]] + [(choices[0], {"accuracy": bad})])
        told_failure.tell([(one, measured(one)) for one in same[1:]] + [(same[0], Failure("diverged", ""))])


def test_a_result_told_again_changes_nothing(name: str) -> None:
    once, twice = (search.make(name, SPACE, OBJECTIVES, size, seed=0) for _ in range(2))
    for _ in range(15):
        choices, same = once.ask(3), twice.ask(3)
        assert choices == same
        once.tell([(one, measured(one)) for one in choices])
        twice.tell([(one, measured(one)) for one in same])
        twice.tell([(one, measured(one) | {"accuracy": 9.0}) for one in same])


def test_a_study_where_everything_fails_goes_on(name: str) -> None:
    trying = search.make(name, SPACE, OBJECTIVES, size, seed=0)
    for _ in range(10):
        trying.tell([(choices, Failure("bug", "broken")) for choices in trying.ask(4)])
    assert len(trying.ask(4)) == 4


def test_a_result_outside_the_space_is_taken_without_complaint(name: str) -> None:
    trying = search.make(name, SPACE, OBJECTIVES, size, seed=0)
    choices = trying.ask(1)[0]
    trying.tell([({**choices, "bits": 2}, {"size_bytes": 1.0, "accuracy": 0.1})])
    assert len(trying.ask(3)) == 3


def test_a_search_says_nothing_and_leaves_the_warnings_alone(name: str, capfd: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study(name, rounds=10)
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize("count", [1, 3, 4])
def test_one_to_four_objectives_are_searched(name: str, count: int) -> None:
    objectives = [Objective(f"metric_{number}") for number in range(count)]
    trying = search.make(name, SPACE, objectives, seed=0)
    for turn in itertools.count(1):
        choices = trying.ask(5)
        trying.tell([(one, {o.metric: float(one["keep"]) for o in objectives}) for one in choices])
        if turn == 8:
            break
    assert len(choices) == 5


def test_what_is_given_up_is_forgotten_and_not_proposed_again(name: str) -> None:
    trying = search.make(name, {"bits": Choice((3, 4, 8))}, [Objective("accuracy", "max")], seed=0)
    (first,) = trying.ask(1)
    trying.tell([(first, None)])
    assert sorted(one["bits"] for one in [first, *trying.ask(3)]) == [3, 4, 8]
    # A study that is taken up again tells it to a search that has not asked.
    resumed = search.make(name, {"bits": Choice((3, 4, 8))}, [Objective("accuracy", "max")], seed=0)
    resumed.tell([({"bits": 3}, None)])
    assert sorted(one["bits"] for one in resumed.ask(3)) == [4, 8]


def test_nothing_is_said_of_chances_before_anything_is_told(name: str) -> None:
    trying = search.make(name, SPACE, OBJECTIVES, size, 0, FIRST)
    asked = trying.ask(4)
    assert trying.probability_of_improvement(asked) == [1.0] * 4
    assert trying.probability_of_improvement([]) == []


FIRST = [
    {"depth": depth, "keep": 0.5, "rate": 1e-3, "bits": 4, "order": "prune", "recover": True}
    for depth in (6, 0, 5, 4)  # the second is over the limit
]


def test_what_a_search_is_to_begin_with_is_asked_first_but_for_what_breaks_a_limit(name: str) -> None:
    limited = Objective("size_bytes", "min", limit=15.0)
    trying = search.make(name, SPACE, [limited, OBJECTIVES[1]], size, 0, FIRST)
    asked = trying.ask(2)
    assert asked == [FIRST[0], FIRST[2]]
    trying.tell([(one, measured(one)) for one in asked])
    later = trying.ask(4)
    assert later[0] == FIRST[3]
    assert len(later) == 4
    assert not any(one in FIRST for one in later[1:])


def test_what_was_told_before_is_not_asked_though_it_should_come_first(name: str) -> None:
    trying = search.make(name, SPACE, OBJECTIVES, size, 0, FIRST)
    trying.tell([(FIRST[0], measured(FIRST[0]))])
    assert FIRST[0] not in trying.ask(5)
