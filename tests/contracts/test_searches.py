"""The contract of all searches, run over every file NAME_search.py in orchestrator/search."""

from __future__ import annotations

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


def size_metric(choices: Mapping[str, Value]) -> dict[str, float]:
    return {"size_bytes": (10 - float(choices["depth"])) * float(choices["bits"]) * float(choices["keep"])}


def measure(choices: Mapping[str, Value]) -> dict[str, float]:
    return {
        **size_metric(choices),
        "accuracy": 1.0 - 0.05 * float(choices["depth"]) - 1 / float(choices["bits"]),
    }


# Each `ask` of Optuna's Gaussian process takes seconds.
NAMES = [
    pytest.param(name, marks=[pytest.mark.slow, pytest.mark.timeout(1200)] * (name == "gp"))
    for name in search.names()
]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run_study(name: str, seed: int = 0, rounds: int = 20) -> list[dict[str, Value]]:
    searcher = search.make(name, SPACE, OBJECTIVES, size_metric, seed)
    proposals = []
    for _ in range(rounds):
        batch = searcher.ask(3)
        searcher.tell([(choices, measure(choices)) for choices in batch])
        proposals += batch
    return proposals


def test_choices_cover_every_knob_with_a_valid_value_of_its_type(name: str) -> None:
    for choices in run_study(name):
        assert choices.keys() == SPACE.keys()
        for knob, domain in SPACE.items():
            assert choices[knob] in domain
            assert type(choices[knob]) is type(domain.normal(choices[knob]))


def test_no_proposal_breaks_a_limit_that_is_checked_in_advance(name: str) -> None:
    assert all(not SIZE.broken_by(size_metric(choices)["size_bytes"]) for choices in run_study(name))


def test_no_proposal_is_repeated(name: str) -> None:
    proposals = [tuple(choices.items()) for choices in run_study(name)]
    assert len(proposals) == 60
    assert len(set(proposals)) == len(proposals)


def test_the_seed_determines_the_proposals(name: str) -> None:
    assert run_study(name, seed=7) == run_study(name, seed=7)
    assert run_study(name, seed=7) != run_study(name, seed=8)


def test_a_limit_that_no_point_meets_is_reported_with_the_nearest_value(name: str) -> None:
    searcher = search.make(name, SPACE, [Objective("size_bytes", "min", limit=1.0)], size_metric, seed=0)
    with pytest.raises(LookupError, match=r"size_bytes has the limit 1, the nearest value was [34]"):
        searcher.ask(1)


def test_a_small_space_is_exhausted_without_repetition(name: str) -> None:
    searcher = search.make(name, {"bits": Choice((3, 4, 8))}, [Objective("accuracy", "max")], seed=0)
    assert sorted(choices["bits"] for choices in searcher.ask(5)) == [3, 4, 8]
    assert searcher.ask(1) == []


def test_points_with_results_from_elsewhere_are_not_proposed(name: str) -> None:
    searcher = search.make(name, {"bits": Choice((3, 4, 8))}, [Objective("accuracy", "max")], seed=0)
    searcher.tell([({"bits": 3}, {"accuracy": 0.5}), ({"bits": 8}, Failure("diverged", "NaN"))])
    assert searcher.ask(3) == [{"bits": 4}]


def test_results_may_arrive_late_twice_and_out_of_order(name: str) -> None:
    searcher = search.make(name, SPACE, OBJECTIVES, size_metric, seed=0)
    pending = [choices for _ in range(20) for choices in searcher.ask(2)]
    results = [(choices, measure(choices)) for choices in reversed(pending)]
    searcher.tell(results[:25])
    pending = searcher.ask(4)
    searcher.tell(results)
    searcher.tell(results)
    assert len(pending + searcher.ask(4)) == 8


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_metric_counts_as_a_failure(name: str, value: float) -> None:
    with_value, with_failure = (search.make(name, SPACE, OBJECTIVES, size_metric, seed=0) for _ in range(2))
    for _ in range(15):
        batch, same_batch = with_value.ask(4), with_failure.ask(4)
        assert batch == same_batch
        results = [(choices, measure(choices)) for choices in batch[1:]]
        with_value.tell([*results, (batch[0], {"accuracy": value})])
        with_failure.tell([*results, (batch[0], Failure("diverged", ""))])


def test_a_repeated_result_is_ignored(name: str) -> None:
    told_once, told_twice = (search.make(name, SPACE, OBJECTIVES, size_metric, seed=0) for _ in range(2))
    for _ in range(15):
        batch, same_batch = told_once.ask(3), told_twice.ask(3)
        assert batch == same_batch
        results = [(choices, measure(choices)) for choices in batch]
        told_once.tell(results)
        told_twice.tell(results)
        told_twice.tell([(choices, metrics | {"accuracy": 9.0}) for choices, metrics in results])


def test_a_search_continues_if_every_candidate_fails(name: str) -> None:
    searcher = search.make(name, SPACE, OBJECTIVES, size_metric, seed=0)
    for _ in range(10):
        searcher.tell([(choices, Failure("bug", "broken")) for choices in searcher.ask(4)])
    assert len(searcher.ask(4)) == 4


def test_a_result_outside_the_space_is_accepted(name: str) -> None:
    searcher = search.make(name, SPACE, OBJECTIVES, size_metric, seed=0)
    choices = searcher.ask(1)[0]
    searcher.tell([({**choices, "bits": 2}, {"size_bytes": 1.0, "accuracy": 0.1})])
    assert len(searcher.ask(3)) == 3


def test_a_search_prints_nothing_and_emits_no_warnings(name: str, capfd: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_study(name, rounds=10)
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize("count", [1, 3, 4])
def test_one_to_four_objectives_are_searched(name: str, count: int) -> None:
    objectives = [Objective(f"metric_{number}") for number in range(count)]
    searcher = search.make(name, SPACE, objectives, seed=0)
    for _ in range(8):
        batch = searcher.ask(5)
        results = []
        for choices in batch:
            metrics = {objective.metric: float(choices["keep"]) for objective in objectives}
            results.append((choices, metrics))
        searcher.tell(results)
    assert len(batch) == 5


def test_an_abandoned_proposal_is_not_proposed_again(name: str) -> None:
    searcher = search.make(name, {"bits": Choice((3, 4, 8))}, [Objective("accuracy", "max")], seed=0)
    (first,) = searcher.ask(1)
    searcher.tell([(first, None)])
    assert sorted(choices["bits"] for choices in [first, *searcher.ask(3)]) == [3, 4, 8]
    # A resumed study reports it to a new search, which has not proposed it.
    resumed = search.make(name, {"bits": Choice((3, 4, 8))}, [Objective("accuracy", "max")], seed=0)
    resumed.tell([({"bits": 3}, None)])
    assert sorted(choices["bits"] for choices in resumed.ask(3)) == [4, 8]


def test_the_probability_of_improvement_is_1_before_any_result(name: str) -> None:
    searcher = search.make(name, SPACE, OBJECTIVES, size_metric, 0, FIRST)
    proposals = searcher.ask(4)
    assert searcher.probability_of_improvement(proposals) == [1.0] * 4
    assert searcher.probability_of_improvement([]) == []


FIRST = [
    {"depth": depth, "keep": 0.5, "rate": 1e-3, "bits": 4, "order": "prune", "recover": True}
    for depth in (6, 0, 5, 4)  # the second one exceeds the limit
]


def test_initial_points_within_the_limits_are_proposed_first(name: str) -> None:
    limited = Objective("size_bytes", "min", limit=15.0)
    searcher = search.make(name, SPACE, [limited, OBJECTIVES[1]], size_metric, 0, FIRST)
    proposals = searcher.ask(2)
    assert proposals == [FIRST[0], FIRST[2]]
    searcher.tell([(choices, measure(choices)) for choices in proposals])
    later_proposals = searcher.ask(4)
    assert later_proposals[0] == FIRST[3]
    assert len(later_proposals) == 4
    assert not any(choices in FIRST for choices in later_proposals[1:])


def test_an_initial_point_with_a_result_is_not_proposed(name: str) -> None:
    searcher = search.make(name, SPACE, OBJECTIVES, size_metric, 0, FIRST)
    searcher.tell([(FIRST[0], measure(FIRST[0]))])
    assert FIRST[0] not in searcher.ask(5)
