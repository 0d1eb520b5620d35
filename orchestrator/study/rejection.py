"""Candidates that are rejected before execution: they cannot be built, or they are too large."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.job import Failure
from orchestrator.pareto.front import Objective
from orchestrator.study.candidate import Candidate
from orchestrator.study.events import CandidateProposed


def rejection(event: CandidateProposed, objectives: Sequence[Objective]) -> tuple[Candidate, Failure] | None:
    """Return the rejected candidate and the failure to report to the search; None if the candidate can run."""
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
