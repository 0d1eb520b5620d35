"""The front as stored data: written, read back, and read from files of earlier versions."""

from __future__ import annotations

import json
from typing import Any

from orchestrator.pareto.objective import Objective
from orchestrator.study.front_snapshot import Difference, FrontMember, FrontSnapshot, MeasuredModel

MEASURED = MeasuredModel({"size_bytes": 40.0, "accuracy": 0.5}, {"accuracy": 0.01}, {"cpu": "Xeon"})
SNAPSHOT = FrontSnapshot(
    study="tiny",
    objectives=(Objective("size_bytes", "min", 90.0), Objective("accuracy", "max")),
    original=MeasuredModel({"size_bytes": 100.0, "accuracy": 0.8}),
    members=(
        FrontMember("ab12", "rtn(bits=4)", MEASURED, {"accuracy": Difference(-0.3, 0.02, 32)}, "sha-1"),
    ),
    picks={"smallest": "ab12"},
    reference={"size_bytes": 100.0, "accuracy": 0.0},
    hypervolume=0.25,
    candidates={"front": 1, "dominated": 2},
)


def stored(snapshot: FrontSnapshot) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(json.dumps(snapshot.to_dict()))
    return content


def test_a_front_is_read_back_as_it_was_written() -> None:
    assert FrontSnapshot.from_dict(stored(SNAPSHOT)) == SNAPSHOT


def test_the_file_has_the_keys_that_programs_read() -> None:
    content = stored(SNAPSHOT)
    assert list(content) == [
        "study", "objectives", "original", "members", "picks", "reference", "hypervolume", "candidates",
    ]  # fmt: skip
    assert list(content["members"][0]) == [
        "id", "recipe", "metrics", "errors", "environment", "differences", "artifact",
    ]  # fmt: skip
    assert content["members"][0]["differences"]["accuracy"] == {"value": -0.3, "error": 0.02, "items": 32}


def test_standings_of_earlier_versions_are_read_under_their_current_names() -> None:
    content = {**stored(SNAPSHOT), "candidates": {"front": 1, "elsewhere": 2, "outrun": 3}}
    candidates = FrontSnapshot.from_dict(content).candidates
    assert candidates == {"front": 1, "other_environment": 2, "eliminated": 3}


def test_a_front_without_a_measured_original_has_no_reference() -> None:
    content = {**stored(SNAPSHOT), "members": [], "reference": None, "hypervolume": None}
    snapshot = FrontSnapshot.from_dict(content)
    assert snapshot.reference is None
    assert snapshot.to_dict() == content
