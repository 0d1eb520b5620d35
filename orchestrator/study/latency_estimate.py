"""Estimate: what is not measured yet, told from what a candidate computes. Estimates steer and are no results."""

from __future__ import annotations

import math
from collections.abc import Mapping

from jobs.measurement.measurement import Measurement
from orchestrator.study.events import Cost, StudyPlan

TIMING_SECONDS = 11.0
"""One exclusive latency measurement of a small model, with the starts of its processes."""

_FOLLOWS = {
    "prefill_p90_ms": ("prefill_ms",),
    "decode_p90_ms": ("decode_ms",),
    "token_joules": ("decode_ms", "prefill_ms"),
    "cost_per_million_tokens": ("decode_ms", "prefill_ms"),
}
"""The prediction that a metric goes with: the first that there is."""


def share(metric: str, cost: Cost, original: Cost) -> float:
    """What a candidate is taken to need of what the original does: by the predictions where a table of operations
    gave any, of memory as its file is big, else by multiply-adds."""
    name = _prediction_of(metric, cost, original)
    if name is not None:
        return cost.predicted[name] / original.predicted[name]
    if metric == "memory_gib":
        return cost.size_bytes / original.size_bytes
    return cost.decode_macs / original.decode_macs


def estimates(cost: Cost, plan: StudyPlan, original: Measurement) -> dict[str, float]:
    """What a candidate is taken to need in the objectives that are timed later, by what the original needed."""
    return {
        metric: original.metrics[metric] * share(metric, cost, plan.original_cost)
        for metric in plan.timed & original.metrics.keys()
    }


def predictions(cost: Cost, original: Cost, measured: Mapping[str, float]) -> dict[str, float]:
    """What a table of operations says of a candidate, in the time of a machine on which the original took as long
    as was measured; nothing where there is no table."""
    return {
        metric: cost.predicted[metric] / original.predicted[metric] * measured[metric]
        for metric in cost.predicted.keys() & original.predicted.keys() & measured.keys()
    }


def surely_no_slower(theirs: Cost, mine: Cost, timed: frozenset[str], errors: Mapping[str, float]) -> bool:
    """Whether one candidate cannot need more than another in what is timed, but for noise: it has no more of
    anything, or is predicted to need less by more than both predictions err."""
    if (
        theirs.decode_macs <= mine.decode_macs
        and theirs.linears <= mine.linears
        and theirs.size_bytes <= mine.size_bytes
    ):
        return True
    names = [_prediction_of(metric, theirs, mine) for metric in timed]
    return bool(names) and all(
        name is not None
        and theirs.predicted[name] * (1 + errors.get(name, math.inf))
        < mine.predicted[name] * (1 - errors.get(name, math.inf))
        for name in names
    )


def _prediction_of(metric: str, *costs: Cost) -> str | None:
    names = _FOLLOWS.get(metric, (metric,))
    return next((name for name in names if all(name in cost.predicted for cost in costs)), None)
