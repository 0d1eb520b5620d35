"""Timing order: the candidate to time next, and the candidates that need no timing, given the timings so far."""

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

_CERTAIN_DEVIATIONS = 2.0
"""A difference of more standard deviations is certain: chance alone makes such a difference in 1 case of 44."""
_MODEL_ERRORS = np.geomspace(0.01, 0.3, 12)
"""Candidate values for the standard deviation of timings from the linear model, relative to the mean time: from the
noise of repeated timings to a model that explains little."""
_PRIOR_MEAN, _PRIOR_DEVIATION = 0.25, 0.5
"""Prior of each coefficient, relative to the mean time: each of the four may account for most of it."""


@dataclass(frozen=True)
class Timing:
    """The timing of one candidate in one objective."""

    value: float
    error: float
    """Standard error, as in `Measurement.errors`."""


Timings = Mapping[str, Timing]
"""The timings of one candidate, by objective."""


def next_timed(
    waiting: Sequence[str], rivals: Mapping[str, Rival], timings: Mapping[str, Timings], plan: StudyPlan
) -> str | None:
    """Return the candidate to time next; None if all waiting ones are certainly dominated.

    Candidates that no rival beats in the untimed objectives come first: they will be on the front at any speed. Of the
    others, the one with the best chance to be faster than all timed rivals that beat it comes first.

    rivals: all candidates that may be on the front. timings: the reliable ones, possibly with those of the original.
    """
    untimed = [objective for objective in plan.objectives if objective.metric not in plan.timed]
    ids = list(rivals)
    values = np.array([losses(rivals[id].metrics, untimed) for id in ids]).reshape(len(ids), len(untimed))
    rows = {id: row for row, id in enumerate(ids)}
    uncertain: dict[str, list[str]] = {}
    for id in waiting:
        losses_of_id = values[rows[id]]
        better = np.flatnonzero((values <= losses_of_id).all(axis=1) & (values < losses_of_id).any(axis=1))
        if not len(better):
            return id
        uncertain[id] = [ids[row] for row in better if ids[row] in timings]
    if not uncertain or not timings:
        return next(iter(uncertain), None)
    predicted = _predict_objectives(list(uncertain), rivals, timings, plan)
    largest_delay = {}
    for row, (id, timed_rivals) in enumerate(uncertain.items()):
        delays = [_delay(row, timings[rival], predicted, plan) for rival in timed_rivals]
        largest_delay[id] = max(delays, default=-math.inf)
    best = min(largest_delay, key=lambda id: largest_delay[id])
    return best if largest_delay[best] < _CERTAIN_DEVIATIONS else None


MeansAndDeviations = tuple[Float[NDArray[np.float64], " costs"], Float[NDArray[np.float64], " costs"]]
"""By candidate."""


def _predict_objectives(
    ids: Sequence[str], rivals: Mapping[str, Rival], timings: Mapping[str, Timings], plan: StudyPlan
) -> dict[str, MeansAndDeviations]:
    """Predict each timed objective of these candidates from the timings of others."""
    costs = [rivals[id].cost for id in ids]
    timed_costs = [rivals[id].cost if id in rivals else plan.original_cost for id in timings]
    predicted = {}
    for objective in plan.objectives:
        if objective.metric in plan.timed:
            values = [timing[objective.metric] for timing in timings.values()]
            samples = list(zip(timed_costs, values, strict=True))
            predicted[objective.metric] = predict_latency(samples, costs, plan.original_cost)
    return predicted


def _delay(row: int, rival: Timings, predicted: Mapping[str, MeansAndDeviations], plan: StudyPlan) -> float:
    """The smallest difference to a timed rival over all timed objectives, in standard deviations.

    Positive if the candidate in this row of the predictions is expected to be slower in all of them.
    """
    delays = []
    for objective in plan.objectives:
        if objective.metric in predicted:
            means, deviations = predicted[objective.metric]
            timing = rival[objective.metric]
            deviation = math.hypot(deviations[row], timing.error)
            delays.append(objective.loss(means[row] - timing.value) / deviation)
    return min(delays)


def predict_latency(
    samples: Sequence[tuple[Cost, Timing]], costs: Sequence[Cost], original: Cost
) -> MeansAndDeviations:
    """Predict the latency of candidates with these costs from the timings of others: means and standard deviations.

    Bayesian linear regression (Bishop 2006, §3.3) on multiply-adds, layers, bytes and a constant. The errors of the
    timings are given. In addition, timings deviate from the linear model by a share of their mean; the result is the
    average over candidate values of this share, weighted by their likelihood.
    """
    unit = np.mean([timing.value for _, timing in samples])
    features = _features([cost for cost, _ in samples], original)
    new_features = _features(costs, original)
    values = np.array([timing.value for _, timing in samples]) / unit - _PRIOR_MEAN * features.sum(axis=1)
    errors = np.array([timing.error for _, timing in samples]) / unit
    weights, means, variances = [], [], []
    for model_error in _MODEL_ERRORS:
        covariance = _PRIOR_DEVIATION**2 * features @ features.T + np.diag(errors**2 + model_error**2)
        factor = np.linalg.cholesky(covariance)
        whitened = np.linalg.solve(factor, values)
        gain = np.linalg.solve(factor, _PRIOR_DEVIATION**2 * features @ new_features.T)
        weights.append(-0.5 * whitened @ whitened - np.log(factor.diagonal()).sum())
        means.append(_PRIOR_MEAN * new_features.sum(axis=1) + gain.T @ whitened)
        prior = _PRIOR_DEVIATION**2 * np.square(new_features).sum(axis=1)
        variances.append(prior - np.square(gain).sum(axis=0) + model_error**2)
    probability = np.exp(np.array(weights) - max(weights))
    probability /= probability.sum()
    mean = probability @ np.array(means)
    variance = probability @ (np.array(variances) + np.square(np.array(means) - mean))
    return unit * mean, unit * np.sqrt(variance)


def _features(costs: Sequence[Cost], original: Cost) -> Float[NDArray[np.float64], "costs 4"]:
    """A constant and the costs relative to the original."""
    rows = []
    for cost in costs:
        macs = cost.decode_macs / original.decode_macs
        linears = cost.linears / original.linears
        rows.append((1.0, macs, linears, cost.size_bytes / original.size_bytes))
    return np.array(rows)
