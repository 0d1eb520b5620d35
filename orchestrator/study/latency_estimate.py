"""Estimates of metrics that are timed later, from the costs of candidates. They steer the search and are no results."""

from __future__ import annotations

import math
from collections.abc import Mapping

from jobs.measurement.measurement import Measurement
from orchestrator.study.events import Cost, StudyPlan

TIMING_SECONDS = 11.0
"""Duration of one exclusive latency measurement of a small model, including the start of its processes; measured."""

_PROXIES = {
    "prefill_p90_ms": ("prefill_ms",),
    "decode_p90_ms": ("decode_ms",),
    "token_joules": ("decode_ms", "prefill_ms"),
    "cost_per_million_tokens": ("decode_ms", "prefill_ms"),
}
"""Predicted metrics that another metric is assumed to be proportional to; the first available one counts."""


def share(metric: str, cost: Cost, original: Cost) -> float:
    """Return the estimated metric of a candidate, divided by that of the original.

    It follows from the predictions if both have one, for memory from the sizes, else from the multiply-adds.
    """
    name = _predicted_metric(metric, cost, original)
    if name is not None:
        return cost.predicted[name] / original.predicted[name]
    if metric == "memory_gib":
        return cost.size_bytes / original.size_bytes
    return cost.decode_macs / original.decode_macs


def estimates(cost: Cost, plan: StudyPlan, original: Measurement) -> dict[str, float]:
    """Return estimates of the timed objectives of a candidate, relative to the measurement of the original."""
    return {
        metric: original.metrics[metric] * share(metric, cost, plan.original_cost)
        for metric in plan.timed & original.metrics.keys()
    }


def predictions(cost: Cost, original: Cost, measured: Mapping[str, float]) -> dict[str, float]:
    """Return the latency table's predictions for a candidate; empty without a table.

    They are scaled to the machine's current speed, at which the original has the metrics `measured`.
    """
    return {
        metric: cost.predicted[metric] / original.predicted[metric] * measured[metric]
        for metric in cost.predicted.keys() & original.predicted.keys() & measured.keys()
    }


def surely_no_slower(
    cost: Cost, other_cost: Cost, timed: frozenset[str], errors: Mapping[str, float]
) -> bool:
    """Whether a candidate is no slower than another one in all timed metrics, apart from noise.

    True if it has no more multiply-adds, layers and bytes, or if all predictions are lower by more than their errors.
    """
    if (
        cost.decode_macs <= other_cost.decode_macs
        and cost.linears <= other_cost.linears
        and cost.size_bytes <= other_cost.size_bytes
    ):
        return True
    if not timed:
        return False
    for metric in timed:
        name = _predicted_metric(metric, cost, other_cost)
        if name is None:
            return False
        error = errors.get(name, math.inf)
        upper = cost.predicted[name] * (1 + error)
        if not upper < other_cost.predicted[name] * (1 - error):
            return False
    return True


def _predicted_metric(metric: str, *costs: Cost) -> str | None:
    """The predicted metric that this one is proportional to; None if a cost has no such prediction."""
    for name in _PROXIES.get(metric, (metric,)):
        if all(name in cost.predicted for cost in costs):
            return name
    return None
