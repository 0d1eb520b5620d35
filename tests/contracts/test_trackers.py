"""The contract of all trackers, run over every class with a method `record` in orchestrator/tracking."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import techniques
from jobs.job import Failure
from jobs.measurement.measurement import Measurement
from jobs.recipe import Origin, Recipe
from orchestrator import tracking
from orchestrator.pareto.front import Objective
from orchestrator.study.candidate import Candidate
from orchestrator.study.results import judge
from orchestrator.tracking import MLflowTracker, NoTracker, Tracker

OBJECTIVES = [Objective("size_bytes"), Objective("accuracy", "max")]
ORIGINAL = Recipe(Origin("model", "data", 0))

# No server listens at this address; a tracker must neither wait for it nor fail.
UNREACHABLE = "http://127.0.0.1:9"

MAKE: dict[type, Callable[[Path], Tracker]] = {
    NoTracker: lambda folder: NoTracker(),
    MLflowTracker: lambda folder: MLflowTracker(UNREACHABLE, folder / "outbox.sqlite"),
}

TRACKERS = [
    value
    for value in vars(tracking).values()
    if inspect.isclass(value) and hasattr(value, "record") and value is not Tracker
]


@pytest.fixture(params=TRACKERS, ids=lambda tracker_class: tracker_class.__name__)
def tracker(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    # Delivery is not tested here, and a process that cannot deliver would retry for minutes.
    monkeypatch.setattr(MLflowTracker, "_ensure_mirror", lambda self: None)
    return MAKE[request.param](tmp_path)


def candidates() -> list[Candidate]:
    dropped = [ORIGINAL.then(techniques.load("drop_layers").of({"count": count})) for count in (1, 2, 3, 4)]
    measured = Measurement({"size_bytes": 100.0, "accuracy": 0.8}, {"accuracy": 0.01})
    return [
        Candidate(ORIGINAL, "measured", 100, artifact="sha", measurement=measured),
        Candidate(dropped[0], "running", 90),
        Candidate(dropped[1], "failed", 80, failure=Failure("bug", "broken", "Traceback")),
        Candidate(dropped[2], "over_limit", 70),
        Candidate(dropped[3], "stopped", 60, stopped="hopeless"),
    ]


def test_candidates_in_any_state_can_be_recorded_twice(tracker: Tracker) -> None:
    for _ in range(2):
        tracker.start("study", "name: study\n", {"cpu": "Xeon"}, OBJECTIVES)
        for candidate in [*candidates(), *candidates()]:
            tracker.record(candidate)
        tracker.finish(judge("study", OBJECTIVES, candidates()[0], candidates()), "<html></html>")


def test_a_study_without_a_front_can_be_finished(tracker: Tracker) -> None:
    tracker.start("study", "", {}, OBJECTIVES)
    tracker.finish(judge("study", OBJECTIVES, candidates()[1], []), "")


def test_trackers_do_not_import_mlflow_into_the_service() -> None:
    code = "import sys, orchestrator.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
