"""Timing order: which candidate is timed next, and which need not be, by what those that were timed say of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from orchestrator.pareto.front import losses
from orchestrator.study.contenders import Rival
from orchestrator.study.events import Cost, StudyPlan

_SURE = 2.0
"""Standard deviations: chance alone makes as much of a difference in 1 case of 44."""
_MISFITS = np.geomspace(0.01, 0.3, 12)
"""By what share of the mean time timings may stray from what is linear in their costs."""
_PRIOR_MEAN, _PRIOR_DEVIATION = 0.25, 0.5
"""Of each coefficient, as a share of the mean time: any of the four may be what most of it goes into."""


@dataclass(frozen=True)
class Timing:
    """What one candidate needs of a timed objective. error: as in `Measurement.errors`."""

    value: float
    error: float


Timings = Mapping[str, Timing]
"""By objective, of all that are timed."""


def next_timed(
    waiting: Sequence[str], rivals: Mapping[str, Rival], timings: Mapping[str, Timings], plan: StudyPlan
) -> str | None:
    """Which of those waiting is timed next; None where all of them are surely beaten.

    First come those to whom no rival is better in what is measured already: however slow, they will be on the front.
    Then the likeliest of the others, as long as it may be faster than each timed rival that is better so.

    rivals: all that may be on the front. timings: of those timed reliably, and of the original where its own were.
    """
    untimed = [objective for objective in plan.objectives if objective.metric not in plan.timed]
    ids = list(rivals)
    values = np.array([losses(rivals[id].metrics, untimed) for id in ids]).reshape(len(ids), len(untimed))
    places = {id: place for place, id in enumerate(ids)}
    doubtful: dict[str, list[str]] = {}
    for id in waiting:
        mine = values[places[id]]
        better = np.flatnonzero((values <= mine).all(axis=1) & (values < mine).any(axis=1))
        if not len(better):
            return id
        doubtful[id] = [ids[place] for place in better if ids[place] in timings]
    if not doubtful or not timings:
        return next(iter(doubtful), None)
    costs = [rivals[id].cost for id in doubtful]
    known = {id: rivals[id].cost if id in rivals else plan.original_cost for id in timings}
    expected = {
        o: predict_latency(
            [(cost, timings[id][o.metric]) for id, cost in known.items()], costs, plan.original_cost
        )
        for o in plan.objectives
        if o.metric in plan.timed
    }

    def slower(row: int, other: str) -> float:
        """By how many standard deviations one of the doubtful is worse than another in every timed objective."""
        return min(
            objective.loss(mean[row] - timings[other][objective.metric].value)
            / math.hypot(deviation[row], timings[other][objective.metric].error)
            for objective, (mean, deviation) in expected.items()
        )

    surest = {
        id: max((slower(row, other) for other in better), default=-math.inf)
        for row, (id, better) in enumerate(doubtful.items())
    }
    likeliest = min(surest, key=lambda id: surest[id])
    return likeliest if surest[likeliest] < _SURE else None


def predict_latency(
    known: Sequence[tuple[Cost, Timing]], costs: Sequence[Cost], original: Cost
) -> tuple[Float[NDArray[np.float64], " costs"], Float[NDArray[np.float64], " costs"]]:
    """What candidates of these costs are expected to need, and its standard deviation, by what is known of others.

    Bayesian linear regression (Bishop 2006, §3.3) on multiply-adds, layers, bytes and a constant: errors of the timings
    are known, and beside them all stray by a share of their mean, over which is averaged by its likelihood.
    """
    unit = np.mean([one.value for _, one in known])
    rows, asked = _features([cost for cost, _ in known], original), _features(costs, original)
    values = np.array([one.value for _, one in known]) / unit - _PRIOR_MEAN * rows.sum(axis=1)
    errors = np.array([one.error for _, one in known]) / unit
    weights, means, variances = [], [], []
    for misfit in _MISFITS:
        covariance = _PRIOR_DEVIATION**2 * rows @ rows.T + np.diag(errors**2 + misfit**2)
        lower = np.linalg.cholesky(covariance)
        whitened = np.linalg.solve(lower, values)
        gain = np.linalg.solve(lower, _PRIOR_DEVIATION**2 * rows @ asked.T)
        weights.append(-0.5 * whitened @ whitened - np.log(lower.diagonal()).sum())
        means.append(_PRIOR_MEAN * asked.sum(axis=1) + gain.T @ whitened)
        prior = _PRIOR_DEVIATION**2 * np.square(asked).sum(axis=1)
        variances.append(prior - np.square(gain).sum(axis=0) + misfit**2)
    share = np.exp(np.array(weights) - max(weights))
    share /= share.sum()
    mean = share @ np.array(means)
    variance = share @ (np.array(variances) + np.square(np.array(means) - mean))
    return unit * mean, unit * np.sqrt(variance)


def _features(costs: Sequence[Cost], original: Cost) -> Float[NDArray[np.float64], "costs 4"]:
    return np.array(
        [
            (
                1.0,
                cost.decode_macs / original.decode_macs,
                cost.linears / original.linears,
                cost.size_bytes / original.size_bytes,
            )
            for cost in costs
        ]
    )
