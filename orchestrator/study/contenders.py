"""Contenders: which candidates may still be on the front, by all that is known before they are timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from orchestrator.pareto.front import Metrics, losses
from orchestrator.study.events import Cost, StudyPlan
from orchestrator.study.latency_estimate import surely_no_slower


@dataclass(frozen=True)
class Rival:
    """What a candidate was measured at, and what it costs."""

    metrics: Metrics
    cost: Cost


def contenders(rivals: Mapping[str, Rival], plan: StudyPlan) -> frozenset[str]:
    """The ids of those within the limits to which no other is surely at least as good: better by what is measured,
    and by its cost no slower.

    The work grows with the candidates times the contenders, not with the candidates' square.
    """
    untimed = [objective for objective in plan.objectives if objective.metric not in plan.timed]
    ids, known = list(rivals), list(rivals.values())
    values = np.array([losses(one.metrics, untimed) for one in known]).reshape(len(known), len(untimed))
    costs = np.array([[one.cost.decode_macs, one.cost.linears, one.cost.size_bytes] for one in known])
    alive = np.ones(len(known), dtype=np.bool_)
    for row in range(len(known)):
        if alive[row]:
            # Whatever a beaten one beats in this way, the one that beats it beats too: it needs no look.
            worse = (values >= values[row]).all(axis=1) & (values > values[row]).any(axis=1)
            alive &= ~(worse & (costs >= costs[row]).all(axis=1))
    found = set()
    for row in np.flatnonzero(alive).tolist():
        one = known[row]
        if any(objective.broken_by(one.metrics[objective.metric]) for objective in untimed):
            continue
        better = (values <= values[row]).all(axis=1) & (values < values[row]).any(axis=1)
        if not any(
            surely_no_slower(known[other].cost, one.cost, plan.timed, plan.prediction_errors)
            for other in np.flatnonzero(better).tolist()
        ):
            found.add(ids[row])
    return frozenset(found)
