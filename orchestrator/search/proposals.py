"""Proposals: the bookkeeping that all searches share, so that choices are new and each result counts once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jobs.job import Failure
from jobs.knobs import Choice, Domain, Value
from orchestrator.pareto.front import Metrics, Objective
from orchestrator.search.search import Choices, KnownMetrics, Result, Space

TRIES = 2000
"""Maximum number of draws per proposal: known metrics follow from shapes alone and take little time, compared with the
evaluation of choices that break a limit."""

Key = tuple[tuple[str, type, Value], ...]


def key(choices: Choices) -> Key:
    """Return the same key for equal choices. It contains the types, since True is not 1."""
    return tuple((name, type(value), value) for name, value in sorted(choices.items()))


def uniform(space: Space, generator: np.random.Generator) -> dict[str, Value]:
    """Draw uniform choices, each knob independently (on a logarithmic scale if its range has one)."""
    return {knob: _drawn(domain, generator) for knob, domain in space.items()}


def _drawn(domain: Domain, generator: np.random.Generator) -> Value:
    if isinstance(domain, Choice):
        return domain.values[int(generator.integers(len(domain.values)))]
    if domain.log:
        # An integer represents the half unit on either side, or the two ends would be drawn less often.
        margin = 0.5 if domain.integer else 0.0
        value = math.exp(generator.uniform(math.log(domain.low - margin), math.log(domain.high + margin)))
        if domain.integer:
            value = round(value)
        return domain.normal(min(max(value, domain.low), domain.high))
    if domain.integer:
        return int(generator.integers(math.ceil(domain.low), math.floor(domain.high) + 1))
    return domain.normal(generator.uniform(domain.low, domain.high))


class Proposals:
    """The choices that were proposed or reported; none of them is proposed or counted twice."""

    def __init__(self, objectives: Sequence[Objective], known_metrics: KnownMetrics) -> None:
        self.objectives = tuple(objectives)
        self._known_metrics = known_metrics
        self._proposed: set[Key] = set()
        self._succeeded: dict[Key, bool] = {}
        """Whether the counted result of these choices is a success."""

    def draw(self, n: int, sample: Callable[[], dict[str, Value]]) -> list[dict[str, Value]]:
        """Return up to n new choices within the known limits, each from at most `TRIES` calls of `sample`.

        Fewer if all sampled choices within the limits were proposed before. LookupError if no sampled choices are
        within the limits; its message names the limit and the nearest value.
        """
        accepted: list[dict[str, Value]] = []
        while len(accepted) < n:
            choices = self._draw_one(sample)
            if choices is None:
                break
            self.add(choices)
            accepted.append(choices)
        return accepted

    def add(self, choices: Choices) -> None:
        """Count choices as proposed."""
        self._proposed.add(key(choices))

    def _draw_one(self, sample: Callable[[], dict[str, Value]]) -> dict[str, Value] | None:
        nearest: dict[Objective, float] = {}
        all_break_limits = True
        for _ in range(TRIES):
            choices = sample()
            if key(choices) in self._proposed:
                # Choices within the limits show that the limits can be kept, although these are not new.
                all_break_limits = all_break_limits and bool(self.broken_limits(choices))
                continue
            broken = self.broken_limits(choices)
            if not broken:
                return choices
            for objective, value in broken.items():
                nearest[objective] = min(value, nearest.get(objective, value), key=objective.loss)
        if all_break_limits and nearest:
            raise LookupError(_no_choices_message(nearest))
        return None

    def broken_limits(self, choices: Choices) -> dict[Objective, float]:
        """Return the objectives whose limits these choices break by their known metrics, with the values."""
        metrics = self._known_metrics(choices)
        return {
            objective: metrics[objective.metric]
            for objective in self.objectives
            if objective.metric in metrics and objective.broken_by(metrics[objective.metric])
        }

    def new_results(self, results: Sequence[Result]) -> list[tuple[dict[str, Value], Metrics | None]]:
        """Return the results that count: choices with the metrics of all objectives, or None for a failure."""
        new = []
        for choices, outcome in results:
            self.add(choices)
            if outcome is None:
                continue
            metrics = self._objective_metrics(choices, outcome)
            earlier = self._succeeded.get(key(choices))
            if metrics == {} or earlier or (metrics is None and earlier is False):
                continue
            self._succeeded[key(choices)] = metrics is not None
            new.append((dict(choices), metrics))
        return new

    def _objective_metrics(self, choices: Choices, outcome: Mapping[str, float] | Failure) -> Metrics | None:
        """The metrics of all objectives; None for a failure, empty if some are missing."""
        if isinstance(outcome, Failure):
            return None
        metrics = {**self._known_metrics(choices), **outcome}
        if any(not math.isfinite(metrics.get(objective.metric, 0.0)) for objective in self.objectives):
            return None
        if any(objective.metric not in metrics for objective in self.objectives):
            return {}
        return {objective.metric: metrics[objective.metric] for objective in self.objectives}


def _no_choices_message(nearest: Mapping[Objective, float]) -> str:
    reasons = "; ".join(
        f"{objective.metric} has the limit {objective.limit:g}, the nearest value was {value:g}"
        for objective, value in nearest.items()
    )
    return f"none of {TRIES} choices is within the limits: {reasons}; raise the limit or widen the space"
