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
HERE = {"cpu": "Xeon", "threads": "2"}
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
        values, {"accuracy": 0.01}, changes.pop("unreliable", ()), changes.pop("environment", HERE)
    )
    fields = {"state": "measured", "artifact": f"sha-{dropped}", "measurement": measurement, **changes}
    return Candidate(recipe, size_bytes=int(size), **fields)


ORIGINAL = candidate(0, 100, 0.8, 10.0)


def of(*candidates: Candidate) -> Results:
    return judge("study", OBJECTIVES, ORIGINAL, candidates)


def test_the_front_is_what_is_measured_within_the_limits_and_not_dominated() -> None:
    good, worse, small = candidate(1, 80, 0.7, 8.0), candidate(2, 80, 0.6, 9.0), candidate(3, 40, 0.5, 5.0)
    results = of(good, worse, small)
    assert results.members == [small.id, good.id], "smallest first"
    assert results.standings[worse.id] == "dominated"


@pytest.mark.parametrize(
    ("odd", "standing"),
    [
        (candidate(4, 20, 0.9, None), "incomplete"),
        (candidate(4, 20, 0.9, 1.0, unreliable=("decode_ms",)), "unreliable"),
        (candidate(4, 20, 0.9, 1.0, environment={**HERE, "cpu": "EPYC"}), "other_environment"),
        (candidate(4, 95, 0.9, 1.0), "over_limit"),
        (candidate(4, 20, 0.9, 1.0, state="over_limit", measurement=None), "over_limit"),
        (candidate(4, 20, 0.9, 1.0, state="failed", failure=Failure("bug", "no")), "failed"),
        (candidate(4, 20, 0.9, 1.0, state="stopped", measurement=None, stopped="hopeless"), "stopped"),
        (candidate(4, 20, 0.9, 1.0, state="running", measurement=None), "waiting"),
    ],
)
def test_what_cannot_be_compared_is_kept_off_the_front_and_counted(odd: Candidate, standing: str) -> None:
    results = of(odd, candidate(1, 80, 0.7, 8.0))
    assert results.standings[odd.id] == standing
    assert odd.id not in results.members
    assert front_snapshot(results).to_dict()["candidates"][standing] >= 1


def test_an_unreliable_metric_that_is_no_objective_keeps_nothing_off_the_front() -> None:
    noisy = candidate(4, 20, 0.9, 1.0, unreliable=("prefill_ms",))
    assert of(noisy).members == [noisy.id]


def test_environments_differ_only_in_what_both_state() -> None:
    more = candidate(4, 20, 0.9, 1.0, environment={**HERE, "openvino": "2026.4"})
    assert of(more).standings[more.id] == "front"


def test_the_original_may_be_on_the_front_itself() -> None:
    results = judge("study", [Objective("size_bytes"), Objective("accuracy", "max")], ORIGINAL, [])
    assert results.members == [ORIGINAL.id]


def test_a_later_candidate_replaces_an_earlier_one_of_the_same_recipe() -> None:
    results = of(candidate(1, 80, 0.7, None), candidate(1, 80, 0.7, 8.0))
    assert len(results.members) == 1
    assert len(results.candidates) == 2


def test_the_front_as_json_has_what_readers_of_it_rely_on() -> None:
    small = candidate(3, 40, 0.5, 5.0)
    front = json.loads(json.dumps(front_snapshot(of(candidate(1, 80, 0.7, 8.0), small)).to_dict()))
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


def test_the_hypervolume_is_a_share_of_what_a_free_model_as_good_as_the_original_would_have() -> None:
    results = of(candidate(3, 40, 0.6, 5.0))
    assert results.reference == {"size_bytes": 100.0, "accuracy": 0.0, "decode_ms": 10.0}
    assert results.hypervolume == pytest.approx(0.6 * (0.6 / 0.8) * 0.5)


def test_perplexity_is_bounded_by_twice_the_originals() -> None:
    def measured(dropped: int, size: int, perplexity: float) -> Candidate:
        known = Measurement({"size_bytes": float(size), "perplexity": perplexity})
        return candidate(dropped, size, 0.0, None, measurement=known)

    objectives = [Objective("size_bytes"), Objective("perplexity", "min")]
    results = judge("study", objectives, measured(0, 100, 40.0), [measured(1, 50, 50.0)])
    assert results.reference == {"size_bytes": 100.0, "perplexity": 80.0}
    assert results.hypervolume == pytest.approx(0.5 * 30 / 40)


def test_without_a_measured_original_there_is_a_front_but_no_hypervolume() -> None:
    unmeasured = candidate(0, 100, 0.8, 10.0, state="running", measurement=None)
    results = judge("study", OBJECTIVES, unmeasured, [candidate(3, 40, 0.6, 5.0)])
    assert len(results.members) == 1
    assert front_snapshot(results).to_dict()["hypervolume"] is None


def with_items(one: Candidate, *items: float) -> Candidate:
    assert one.measurement is not None
    return dataclasses.replace(
        one, measurement=dataclasses.replace(one.measurement, items={"accuracy": items})
    )


def test_candidates_are_compared_item_by_item() -> None:
    original = with_items(ORIGINAL, 0.9, 0.5, 0.1)
    small = with_items(candidate(1, 80, 0.4, 8.0), 0.8, 0.4, 0.0)
    assert difference(small, original, "accuracy") == Difference(pytest.approx(-0.1), pytest.approx(0.0), 3)
    odd = with_items(small, 0.8, 0.4, 0.3)
    found = difference(odd, original, "accuracy")
    assert found == Difference(pytest.approx(0.0), pytest.approx(0.1), 3)  # of -0.1, -0.1, 0.2
    found_json = front_snapshot(judge("study", OBJECTIVES, original, [odd])).to_dict()
    member = next(one for one in found_json["members"] if one["id"] == odd.id)
    assert member["differences"] == {
        "accuracy": {"value": pytest.approx(0.0), "error": pytest.approx(0.1), "items": 3},
    }


def test_models_are_compared_on_what_both_were_measured_on() -> None:
    fewer = with_items(candidate(1, 80, 0.4, 8.0), 0.8, 0.4)
    found = difference(fewer, with_items(ORIGINAL, 0.9, 0.5, 0.1), "accuracy")
    assert found == Difference(pytest.approx(-0.1), pytest.approx(0.0), 2)
    assert difference(fewer, ORIGINAL, "accuracy") is None


def test_the_first_items_of_a_perplexity_are_those_of_the_first_windows_alone() -> None:
    def perplexity(losses: list[float]) -> Measurement:
        mean = sum(losses) / len(losses)
        items = [math.exp(mean) * (1 + loss - mean) for loss in losses]
        return Measurement({"perplexity": math.exp(mean)}, items={"perplexity": items})

    losses = [2.0, 3.5, 1.0, 4.0, 0.5]
    alone = perplexity(losses[:2]).items["perplexity"]
    assert first_items(perplexity(losses), "perplexity", 2) == pytest.approx(alone)


def test_reasons_of_failures_are_counted() -> None:
    bad = [candidate(n, 80 + n, 0.4, 8.0) for n in range(1, 4)]
    said = ["no such layer\nat line 3", "no such layer", "NaN"]
    failed = [
        dataclasses.replace(one, state="failed", measurement=None, failure=Failure("bug", text))
        for one, text in zip(bad, said, strict=True)
    ]
    results = judge("study", OBJECTIVES, ORIGINAL, failed)
    assert reasons(results) == [(2, "bug: no such layer"), (1, "bug: NaN")]


def test_a_front_that_chance_alone_tells_apart_says_so() -> None:
    near = with_items(candidate(1, 70, 0.5, 8.0), 0.8, 0.4, 0.3)
    other = with_items(candidate(2, 75, 0.51, 8.0), 0.7, 0.5, 0.33)
    far = with_items(candidate(3, 80, 0.9, 8.0), 0.95, 0.9, 0.85)
    assert indistinguishable_objectives(judge("study", OBJECTIVES, ORIGINAL, [near, other])) == ["accuracy"]
    assert indistinguishable_objectives(judge("study", OBJECTIVES, ORIGINAL, [near, other, far])) == []
