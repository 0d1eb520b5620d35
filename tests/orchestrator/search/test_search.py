"""Tests of the included searches and of `search.make`."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping

import numpy as np
import pytest

from jobs.job import Failure
from jobs.knobs import Choice, Range, Value
from orchestrator import search
from orchestrator.pareto.front import Objective, ParetoFront
from orchestrator.search.proposals import Proposals
from orchestrator.search.search import nothing_known

ERROR = Objective("error", "min")


def test_the_search_names_follow_the_files() -> None:
    assert {"random", "grid", "nsga2", "tpe", "gp"} <= set(search.names())


def test_an_unknown_search_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(LookupError, match="did you mean nsga2"):
        search.make("nsga3", {}, [ERROR])


@pytest.mark.parametrize(
    ("description", "domain"),
    [
        ({"low": 1, "high": 8, "type": "int"}, Range(1, 8, integer=True)),
        ({"low": 0.1, "high": 1.0, "log": True}, Range(0.1, 1.0, log=True)),
        ({"choices": [8, 3], "ordered": True}, Choice((3, 8))),
        ({"choices": ["b", "a"]}, Choice(("b", "a"))),
    ],
)
def test_plain_data_describes_a_domain(description: dict[str, object], domain: Range | Choice) -> None:
    for _ in range(5):
        (choices,) = search.make("random", {"knob": description}, [ERROR]).ask(1)
        assert choices["knob"] in domain


@pytest.mark.parametrize("description", [{"low": 2, "high": 1}, {"choices": []}, {"low": 1}])
def test_a_domain_without_values_is_refused_by_name(description: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="knob"):
        search.make("random", {"knob": description}, [ERROR])


def test_a_whole_number_on_a_log_scale_stays_in_range() -> None:
    space = {"steps": Range(1, 8, integer=True, log=True)}
    drawn = [choices["steps"] for choices in search.make("random", space, [ERROR]).ask(8)]
    assert sorted(drawn) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_success_replaces_a_failure_and_is_never_replaced() -> None:
    proposals = Proposals([ERROR], nothing_known)
    choices: dict[str, Value] = {"bits": 4}
    assert proposals.new_results([(choices, Failure("timeout", "slow"))]) == [(choices, None)]
    assert proposals.new_results([(choices, {"error": 1.0})]) == [(choices, {"error": 1.0})]
    assert proposals.new_results([(choices, {"error": 2.0}), (choices, Failure("bug", ""))]) == []


def test_a_result_waits_until_every_objective_has_a_value() -> None:
    proposals = Proposals([ERROR, Objective("decode_ms")], nothing_known)
    choices: dict[str, Value] = {"bits": 4}
    assert proposals.new_results([(choices, {"error": 1.0})]) == []
    assert proposals.new_results([(choices, {"error": 1.0, "decode_ms": 2.0})]) != []


def test_known_metrics_complete_a_result() -> None:
    proposals = Proposals([ERROR, Objective("size_bytes")], lambda choices: {"size_bytes": 7.0})
    assert proposals.new_results([({}, {"error": 1.0})]) == [({}, {"error": 1.0, "size_bytes": 7.0})]


def test_true_and_one_are_different_choices() -> None:
    algorithm = search.make("random", {"knob": Choice((1, True))}, [ERROR])
    assert sorted(type(choices["knob"]).__name__ for choices in algorithm.ask(3)) == ["bool", "int"]


@pytest.mark.parametrize("name", ["nsga2", "tpe"])
def test_a_learning_search_finds_a_better_front_than_random_choices(name: str) -> None:
    space = {f"x{number}": Range(0.0, 1.0) for number in range(8)}
    objectives = [Objective("f"), Objective("g")]

    def zdt1(choices: dict[str, Value]) -> dict[str, float]:
        """Zitzler et al. 2000, test function T1."""
        first, *remaining = (float(value) for value in choices.values())
        g = 1 + 9 * sum(remaining) / len(remaining)
        return {"f": first, "g": g * (1 - (first / g) ** 0.5)}

    def volume(name: str) -> float:
        algorithm = search.make(name, space, objectives, seed=1)
        front = ParetoFront(objectives)
        for turn in range(300):
            results = [(choices, zdt1(choices)) for choices in algorithm.ask(1)]
            algorithm.tell(results)
            for number, (_, metrics) in enumerate(results):
                front.add(f"{turn}.{number}", metrics)
        return front.hypervolume({"f": 1.1, "g": 6.0})

    assert volume(name) > 1.1 * volume("random")


@pytest.mark.parametrize("name", ["nsga2", "tpe"])
def test_a_search_avoids_choices_that_break_a_measured_limit(name: str) -> None:
    space = {"x": Range(0.0, 1.0), "y": Range(0.0, 1.0)}
    algorithm = search.make(name, space, [Objective("x"), Objective("y", "max", limit=0.9)], seed=0)
    within_limit = []
    for _ in range(30):
        results = [
            (choices, {"x": float(choices["x"]), "y": float(choices["y"])}) for choices in algorithm.ask(5)
        ]
        algorithm.tell(results)
        within_limit += [metrics["y"] >= 0.9 for _, metrics in results]
    assert sum(within_limit[-75:]) > 0.3 * 75, "one in ten uniform choices respects the limit"


GRID = {
    "layers": Range(1, 5, integer=True),
    "keep": Range(0.1, 10.0, log=True),
    "steps": Range(1, 1000, integer=True, log=True),
    "order": Choice(("prune", "factorize")),
}


def test_a_grid_has_every_combination_once_and_then_ends() -> None:
    algorithm = search.make("grid", GRID, [ERROR], seed=3)
    proposals = algorithm.ask(5000)
    values: dict[str, set[Value]] = {}
    for knob in GRID:
        values[knob] = {choices[knob] for choices in proposals}
    assert sorted(values["layers"]) == [1, 2, 3, 4, 5]
    assert sorted(values["keep"])[::4] == pytest.approx([0.1, 1.0, 10.0])
    assert min(values["steps"]) == 1
    assert max(values["steps"]) == 1000
    combinations = {tuple(choices.items()) for choices in proposals}
    assert (
        len(combinations) == len(proposals) == math.prod(len(knob_values) for knob_values in values.values())
    )
    assert algorithm.ask(1) == []


def test_a_grid_skips_only_choices_that_break_a_known_limit() -> None:
    def size(choices: Mapping[str, Value]) -> dict[str, float]:
        return {"size_bytes": float(choices["layers"]) * float(choices["keep"])}

    all_choices = search.make("grid", GRID, [ERROR]).ask(5000)
    limit = Objective("size_bytes", limit=1.0)
    allowed = search.make("grid", GRID, [ERROR, limit], size).ask(5000)
    assert allowed == [choices for choices in all_choices if size(choices)["size_bytes"] <= 1.0]


def test_the_first_grid_points_cover_a_space_that_is_too_large_to_exhaust() -> None:
    space = {f"layer{number}": Choice((2, 3, 4, 8)) for number in range(40)}
    proposals = search.make("grid", space, [ERROR]).ask(64)
    for knob, next_knob in itertools.pairwise(space):
        counts = Counter(choices[knob] for choices in proposals)
        assert set(counts) == {2, 3, 4, 8}
        assert max(counts.values()) <= 20, "16 are an even share"
        assert len({(choices[knob], choices[next_knob]) for choices in proposals}) >= 12


def test_a_grid_resumes_after_more_results_than_one_draw_examines() -> None:
    space = {f"layer{number}": Choice((2, 3, 4, 8)) for number in range(8)}
    interrupted = search.make("grid", space, [ERROR], seed=1)
    reported = interrupted.ask(4500)
    resumed = search.make("grid", space, [ERROR], seed=1)
    resumed.tell([(choices, {"error": 1.0}) for choices in reported])
    assert resumed.ask(3) == interrupted.ask(3)


def test_tpe_diversifies_proposals_while_a_choice_is_pending() -> None:
    algorithm = search.make("tpe", {"x": Range(0.0, 1.0)}, [ERROR], seed=0)
    for _ in range(30):
        (choices,) = algorithm.ask(1)
        algorithm.tell([(choices, {"error": (float(choices["x"]) - 0.3) ** 2})])
    assert np.ptp([float(choices["x"]) for choices in algorithm.ask(6)]) > 0.01
