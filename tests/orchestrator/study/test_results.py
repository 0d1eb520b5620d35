"""The results that follow from the candidates of a study."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from jobs import techniques
from jobs.job import Failure
from jobs.measurement.measurement import Measurement, first_items
from jobs.recipe import Origin, Recipe
from orchestrator.pareto.front import Objective
from orchestrator.study.candidate import Candidate
from orchestrator.study.results import (
    Difference,
    Results,
    difference,
    front_snapshot,
    indistinguishable_objectives,
    judge,
    reasons,
)

ORIGIN = Origin("model", "data", 0)
ENVIRONMENT = {"cpu": "Xeon", "threads": "2"}
OBJECTIVES = [
    Objective("size_bytes", "min", limit=90.0),
    Objective("accuracy", "max"),
    Objective("decode_ms", "min"),
]


def candidate(dropped: int, size: float, accuracy: float, decode: float | None, **changes: Any) -> Candidate:
    recipe = Recipe(ORIGIN).then(techniques.load("drop_layers").of({"count": dropped}))
    values = {"size_bytes": float(size), "accuracy": accuracy}
    if decode is not None:
        values["decode_ms"] = decode
    measurement = Measurement(
        values, {"accuracy": 0.01}, changes.pop("unreliable", ()), changes.pop("environment", ENVIRONMENT)
    )
    fields = {"state": "measured", "artifact": f"sha-{dropped}", "measurement": measurement, **changes}
    return Candidate(recipe, size_bytes=int(size), **fields)


ORIGINAL = candidate(0, 100, 0.8, 10.0)


def judge_candidates(*candidates: Candidate) -> Results:
    return judge("study", OBJECTIVES, ORIGINAL, candidates)


def test_the_front_holds_measured_nondominated_candidates_within_the_limits() -> None:
    good, worse, small = candidate(1, 80, 0.7, 8.0), candidate(2, 80, 0.6, 9.0), candidate(3, 40, 0.5, 5.0)
    results = judge_candidates(good, worse, small)
    assert results.members == [small.id, good.id], "smallest first"
    assert results.standings[worse.id] == "dominated"


@pytest.mark.parametrize(
    ("incomparable", "standing"),
    [
        (candidate(4, 20, 0.9, None), "incomplete"),
        (candidate(4, 20, 0.9, 1.0, unreliable=("decode_ms",)), "unreliable"),
        (candidate(4, 20, 0.9, 1.0, environment={**ENVIRONMENT, "cpu": "EPYC"}), "other_environment"),
        (candidate(4, 95, 0.9, 1.0), "over_limit"),
        (candidate(4, 20, 0.9, 1.0, state="over_limit", measurement=None), "over_limit"),
        (candidate(4, 20, 0.9, 1.0, state="failed", failure=Failure("bug", "no")), "failed"),
        (candidate(4, 20, 0.9, 1.0, state="stopped", measurement=None, stopped="hopeless"), "stopped"),
        (candidate(4, 20, 0.9, 1.0, state="running", measurement=None), "waiting"),
    ],
)
def test_incomparable_candidates_are_excluded_from_the_front_and_counted(
    incomparable: Candidate, standing: str
) -> None:
    results = judge_candidates(incomparable, candidate(1, 80, 0.7, 8.0))
    assert results.standings[incomparable.id] == standing
    assert incomparable.id not in results.members
    assert front_snapshot(results).to_dict()["candidates"][standing] >= 1


def test_an_unreliable_metric_that_is_no_objective_excludes_no_candidate() -> None:
    noisy = candidate(4, 20, 0.9, 1.0, unreliable=("prefill_ms",))
    assert judge_candidates(noisy).members == [noisy.id]


def test_environments_are_compared_only_by_fields_that_both_state() -> None:
    detailed = candidate(4, 20, 0.9, 1.0, environment={**ENVIRONMENT, "openvino": "2026.4"})
    assert judge_candidates(detailed).standings[detailed.id] == "front"


def test_the_original_may_be_on_the_front() -> None:
    results = judge("study", [Objective("size_bytes"), Objective("accuracy", "max")], ORIGINAL, [])
    assert results.members == [ORIGINAL.id]


def test_a_later_candidate_replaces_an_earlier_one_of_the_same_recipe() -> None:
    results = judge_candidates(candidate(1, 80, 0.7, None), candidate(1, 80, 0.7, 8.0))
    assert len(results.members) == 1
    assert len(results.candidates) == 2


def test_the_json_of_the_front_has_the_fields_that_readers_rely_on() -> None:
    small = candidate(3, 40, 0.5, 5.0)
    front = json.loads(
        json.dumps(front_snapshot(judge_candidates(candidate(1, 80, 0.7, 8.0), small)).to_dict())
    )
    assert front["study"] == "study"
    assert front["objectives"][0] == {"metric": "size_bytes", "goal": "min", "limit": 90.0}
    assert front["original"] == {
        "metrics": {"size_bytes": 100.0, "accuracy": 0.8, "decode_ms": 10.0}, "errors": {"accuracy": 0.01},
        "environment": {"cpu": "Xeon", "threads": "2"},
    }  # fmt: skip
    assert front["members"][0] == {
        "id": small.id,
        "recipe": str(small.recipe),
        "metrics": {"size_bytes": 40.0, "accuracy": 0.5, "decode_ms": 5.0},
        "errors": {"accuracy": 0.01},
        "environment": {"cpu": "Xeon", "threads": "2"},
        "differences": {},
        "artifact": "sha-3",
    }
    assert front["picks"]["smallest"] == small.id


def test_the_hypervolume_is_relative_to_that_of_a_free_model_as_accurate_as_the_original() -> None:
    results = judge_candidates(candidate(3, 40, 0.6, 5.0))
    assert results.reference == {"size_bytes": 100.0, "accuracy": 0.0, "decode_ms": 10.0}
    assert results.hypervolume == pytest.approx(0.6 * (0.6 / 0.8) * 0.5)


def test_perplexity_is_bounded_by_twice_the_originals() -> None:
    def measured(dropped: int, size: int, perplexity: float) -> Candidate:
        measurement = Measurement({"size_bytes": float(size), "perplexity": perplexity})
        return candidate(dropped, size, 0.0, None, measurement=measurement)

    objectives = [Objective("size_bytes"), Objective("perplexity", "min")]
    results = judge("study", objectives, measured(0, 100, 40.0), [measured(1, 50, 50.0)])
    assert results.reference == {"size_bytes": 100.0, "perplexity": 80.0}
    assert results.hypervolume == pytest.approx(0.5 * 30 / 40)


def test_without_a_measured_original_there_is_a_front_but_no_hypervolume() -> None:
    unmeasured = candidate(0, 100, 0.8, 10.0, state="running", measurement=None)
    results = judge("study", OBJECTIVES, unmeasured, [candidate(3, 40, 0.6, 5.0)])
    assert len(results.members) == 1
    assert front_snapshot(results).to_dict()["hypervolume"] is None


def with_items(candidate: Candidate, *items: float) -> Candidate:
    assert candidate.measurement is not None
    return dataclasses.replace(
        candidate, measurement=dataclasses.replace(candidate.measurement, items={"accuracy": items})
    )


def test_candidates_are_compared_item_by_item() -> None:
    original = with_items(ORIGINAL, 0.9, 0.5, 0.1)
    small = with_items(candidate(1, 80, 0.4, 8.0), 0.8, 0.4, 0.0)
    assert difference(small, original, "accuracy") == Difference(pytest.approx(-0.1), pytest.approx(0.0), 3)
    mixed = with_items(small, 0.8, 0.4, 0.3)
    mixed_difference = difference(mixed, original, "accuracy")
    assert mixed_difference == Difference(pytest.approx(0.0), pytest.approx(0.1), 3)  # of -0.1, -0.1, 0.2
    snapshot = front_snapshot(judge("study", OBJECTIVES, original, [mixed])).to_dict()
    member = next(member for member in snapshot["members"] if member["id"] == mixed.id)
    assert member["differences"] == {
        "accuracy": {"value": pytest.approx(0.0), "error": pytest.approx(0.1), "items": 3},
    }


def test_models_are_compared_on_the_items_that_both_were_measured_on() -> None:
    fewer = with_items(candidate(1, 80, 0.4, 8.0), 0.8, 0.4)
    common_difference = difference(fewer, with_items(ORIGINAL, 0.9, 0.5, 0.1), "accuracy")
    assert common_difference == Difference(pytest.approx(-0.1), pytest.approx(0.0), 2)
    assert difference(fewer, ORIGINAL, "accuracy") is None


def test_the_first_items_of_a_perplexity_equal_a_measurement_of_only_the_first_windows() -> None:
    def perplexity(losses: list[float]) -> Measurement:
        mean = sum(losses) / len(losses)
        items = [math.exp(mean) * (1 + loss - mean) for loss in losses]
        return Measurement({"perplexity": math.exp(mean)}, items={"perplexity": items})

    losses = [2.0, 3.5, 1.0, 4.0, 0.5]
    first_windows = perplexity(losses[:2]).items["perplexity"]
    assert first_items(perplexity(losses), "perplexity", 2) == pytest.approx(first_windows)


def test_reasons_of_failures_are_counted() -> None:
    candidates = [candidate(n, 80 + n, 0.4, 8.0) for n in range(1, 4)]
    messages = ["no such layer\nat line 3", "no such layer", "NaN"]
    failed = [
        dataclasses.replace(candidate, state="failed", measurement=None, failure=Failure("bug", message))
        for candidate, message in zip(candidates, messages, strict=True)
    ]
    results = judge("study", OBJECTIVES, ORIGINAL, failed)
    assert reasons(results) == [(2, "bug: no such layer"), (1, "bug: NaN")]


def test_objectives_that_differ_only_by_chance_are_reported_as_indistinguishable() -> None:
    near = with_items(candidate(1, 70, 0.5, 8.0), 0.8, 0.4, 0.3)
    similar = with_items(candidate(2, 75, 0.51, 8.0), 0.7, 0.5, 0.33)
    different = with_items(candidate(3, 80, 0.9, 8.0), 0.95, 0.9, 0.85)
    assert indistinguishable_objectives(judge("study", OBJECTIVES, ORIGINAL, [near, similar])) == ["accuracy"]
    assert (
        indistinguishable_objectives(judge("study", OBJECTIVES, ORIGINAL, [near, similar, different])) == []
    )
