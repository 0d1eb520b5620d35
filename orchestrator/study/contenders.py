"""Contenders: the candidates that may be on the front according to everything that is known before timings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from orchestrator.pareto.front import Metrics, losses
from orchestrator.study.events import Cost, StudyPlan
from orchestrator.study.latency_estimate import surely_no_slower


@dataclass(frozen=True)
class Rival:
    """The metrics and the cost of one measured candidate."""

    metrics: Metrics
    cost: Cost


def contenders(rivals: Mapping[str, Rival], plan: StudyPlan) -> frozenset[str]:
    """Return the ids of the candidates within the limits that no other one certainly dominates.

    A candidate is certainly dominated if another one is better by the untimed metrics and, by its cost, no slower. The
    run time is proportional to candidates times contenders.
    """
    untimed = [objective for objective in plan.objectives if objective.metric not in plan.timed]
    ids, candidates = list(rivals), list(rivals.values())
    values = np.array([losses(rival.metrics, untimed) for rival in candidates])
    values = values.reshape(len(candidates), len(untimed))
    costs = np.array(
        [[rival.cost.decode_macs, rival.cost.linears, rival.cost.size_bytes] for rival in candidates]
    )
    undominated = np.ones(len(candidates), dtype=np.bool_)
    for row in range(len(candidates)):
        # Dominated rows are skipped: the row that dominates one of them also dominates all that it dominates.
        if undominated[row]:
            worse = (values >= values[row]).all(axis=1) & (values > values[row]).any(axis=1)
            undominated &= ~(worse & (costs >= costs[row]).all(axis=1))
    contender_ids = set()
    for row in np.flatnonzero(undominated).tolist():
        rival = candidates[row]
        if any(objective.broken_by(rival.metrics[objective.metric]) for objective in untimed):
            continue
        better = (values <= values[row]).all(axis=1) & (values < values[row]).any(axis=1)
        if not any(
            surely_no_slower(candidates[better_row].cost, rival.cost, plan.timed, plan.prediction_errors)
            for better_row in np.flatnonzero(better).tolist()
        ):
            contender_ids.add(ids[row])
    return frozenset(contender_ids)
