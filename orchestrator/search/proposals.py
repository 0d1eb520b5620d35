"""Proposals: what every search shares. Choices are new, keep the limits that are known, and count once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jobs.job import Failure
from jobs.knobs import Choice, Domain, Value
from orchestrator.pareto.front import Metrics, Objective
from orchestrator.search.search import Choices, Known, Result, Space

TRIES = 2000
"""How many draws one proposal may take. `known` is quick (shapes only), a wasted evaluation is not."""

Key = tuple[tuple[str, type, Value], ...]


def key(choices: Choices) -> Key:
    """Equal choices have equal keys. The type is part of it: True is not 1."""
    return tuple((name, type(value), value) for name, value in sorted(choices.items()))


def uniform(space: Space, generator: np.random.Generator) -> dict[str, Value]:
    """Choices drawn uniformly, each knob by itself (on a log scale where its range says so)."""
    return {knob: _drawn(domain, generator) for knob, domain in space.items()}


def _drawn(domain: Domain, generator: np.random.Generator) -> Value:
    if isinstance(domain, Choice):
        return domain.values[int(generator.integers(len(domain.values)))]
    if domain.log:
        # A whole number stands for the half on either side of it, or the two ends would come up less often.
        margin = 0.5 if domain.integer else 0.0
        value = math.exp(generator.uniform(math.log(domain.low - margin), math.log(domain.high + margin)))
        value = min(max(round(value) if domain.integer else value, domain.low), domain.high)
        return domain.normal(value)
    if domain.integer:
        return int(generator.integers(math.ceil(domain.low), math.floor(domain.high) + 1))
    return domain.normal(generator.uniform(domain.low, domain.high))


class Proposals:
    """What was proposed and what was told, so that no choice is proposed or counted twice."""

    def __init__(self, objectives: Sequence[Objective], known: Known) -> None:
        self.objectives = tuple(objectives)
        self._known = known
        self._seen: set[Key] = set()
        self._told: dict[Key, bool] = {}

    def draw(self, n: int, sample: Callable[[], dict[str, Value]]) -> list[dict[str, Value]]:
        """Up to n new choices within the known limits, each from at most TRIES calls of `sample`.

        Fewer where all that were drawn within the limits are seen already. Raises LookupError where none
        was within the limits, naming the limit and the nearest value seen.
        """
        accepted: list[dict[str, Value]] = []
        while len(accepted) < n:
            choices = self._draw_one(sample)
            if choices is None:
                break
            self._seen.add(key(choices))
            accepted.append(choices)
        return accepted

    def take(self, choices: Choices) -> None:
        """Count choices that were found otherwise as proposed."""
        self._seen.add(key(choices))

    def _draw_one(self, sample: Callable[[], dict[str, Value]]) -> dict[str, Value] | None:
        nearest: dict[Objective, float] = {}
        only_breakers = True
        for _ in range(TRIES):
            choices = sample()
            if key(choices) in self._seen:
                # What was asked or told is no reason to say that the limits cannot be kept.
                only_breakers = only_breakers and bool(self.broken(choices))
                continue
            broken = self.broken(choices)
            if not broken:
                return choices
            for objective, value in broken.items():
                nearest[objective] = min(value, nearest.get(objective, value), key=objective.loss)
        if only_breakers and nearest:
            raise LookupError(self._refusal(nearest))
        return None

    def broken(self, choices: Choices) -> dict[Objective, float]:
        """The limits that these choices break by what is known of them, and the values that do."""
        known = self._known(choices)
        return {
            objective: known[objective.metric]
            for objective in self.objectives
            if objective.metric in known and objective.broken_by(known[objective.metric])
        }

    def news(self, results: Sequence[Result]) -> list[tuple[dict[str, Value], Metrics | None]]:
        """The results that count: choices with a value of every objective, or with None for a failure."""
        found = []
        for choices, outcome in results:
            mark = key(choices)
            self._seen.add(mark)
            if outcome is None:
                continue
            metrics = self._complete(choices, outcome)
            if metrics == {} or self._told.get(mark) or (metrics is None and mark in self._told):
                continue
            self._told[mark] = metrics is not None
            found.append((dict(choices), metrics))
        return found

    def _complete(self, choices: Choices, outcome: Mapping[str, float] | Failure) -> Metrics | None:
        """None for a failure, nothing while an objective is missing."""
        if isinstance(outcome, Failure):
            return None
        metrics = {**self._known(choices), **outcome}
        if any(not math.isfinite(metrics.get(objective.metric, 0.0)) for objective in self.objectives):
            return None
        if any(objective.metric not in metrics for objective in self.objectives):
            return {}
        return {objective.metric: metrics[objective.metric] for objective in self.objectives}

    def _refusal(self, nearest: Mapping[Objective, float]) -> str:
        reasons = "; ".join(
            f"{objective.metric} has the limit {objective.limit:g}, the nearest value seen was {value:g}"
            for objective, value in nearest.items()
        )
        return f"none of {TRIES} choices is within the limits: {reasons}; raise the limit or widen the space"
