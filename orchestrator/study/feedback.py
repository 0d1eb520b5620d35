"""Feedback: the results of candidates that the search learns from, and rejections before execution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jobs.job import Failure
from jobs.knobs import Value
from jobs.measurement.measurement import Measurement
from orchestrator.pareto.front import Objective
from orchestrator.study.candidate import Candidate
from orchestrator.study.events import CandidateProposed, Cost, StudyPlan, Tell
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


def rejection(event: CandidateProposed, objectives: Sequence[Objective]) -> tuple[Candidate, Failure] | None:
    """Return the rejected candidate and the failure to report to the search; None if the candidate can run.

    Candidates that cannot be built or that break the size limit are rejected.
    """
    if event.cost is None:
        failure = Failure("invalid", event.refused or "the recipe cannot be applied to this model")
        return Candidate(event.recipe, "failed", 0, event.choices, failure=failure), failure
    size_bytes = event.cost.size_bytes
    for objective in objectives:
        if objective.metric == "size_bytes" and objective.broken_by(size_bytes):
            reason = f"size_bytes={size_bytes} breaks the limit of {objective.limit:g}"
            candidate = Candidate(event.recipe, "over_limit", size_bytes, event.choices)
            return candidate, Failure("invalid", reason)
    return None
