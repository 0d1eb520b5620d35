"""Feedback: the results that the search learns from."""

from __future__ import annotations

from collections.abc import Mapping

from jobs.job import Failure
from jobs.knobs import Value
from jobs.measurement.measurement import Measurement
from orchestrator.study.candidate import Candidate
from orchestrator.study.events import Cost, StudyPlan, Tell
from orchestrator.study.latency_estimate import estimates


def search_feedback(
    candidate: Candidate,
    choices: Mapping[str, Value],
    cost: Cost | None,
    plan: StudyPlan,
    original: Measurement | None,
) -> list[Tell]:
    """Return the command that reports the outcome of these choices; none for a candidate that has not ended.

    Metrics that are timed later are estimated from the measurement of the original.
    """
    if not choices:
        return []
    if candidate.failure is not None:
        return [Tell(choices, candidate.failure)]
    if candidate.state == "over_limit":
        return [Tell(choices, Failure("invalid", "breaks the size limit"))]
    if candidate.state == "stopped":
        return [Tell(choices, None)]
    if candidate.measurement is None:
        return []
    metrics = {}
    if original is not None:
        assert cost is not None, "every measured candidate has a cost"
        metrics = estimates(cost, plan, original)
    return [Tell(choices, {**metrics, **candidate.measurement.metrics})]
