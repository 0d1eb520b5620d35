"""Racing: which candidates are worth measuring on more of the evaluation, by what is known of them so far."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from jobs.job import Measurement
from orchestrator.estimate import share
from orchestrator.events import Cost, Plan
from orchestrator.front import Objective, nondominated
from orchestrator.results import paired
from orchestrator.search.improvement import Expected, expected_improvement

CHANCE = 2.0
"""A candidate may be better than it looked by so many standard errors of its difference to others."""
WORTH = 2.5e-3
"""The share of the front's volume that a candidate must be able to add to be measured on more."""
FEWEST_ITEMS = 4
"""Fewer items tell nothing of their own spread."""
GUESSED = 0.1
"""By so much, relatively, a time is taken to err that no table of operations foretold."""

Points = Float[NDArray[np.float64], "runners objectives"]


@dataclass(frozen=True)
class Runner:
    """One candidate in the race. fidelity: the share of the evaluation that it was measured on."""

    measurement: Measurement
    cost: Cost
    fidelity: float


def next_fidelity(rungs: Sequence[float], fidelity: float) -> float | None:
    """The rung above; None at the top. Rungs rise, and the last is 1."""
    return next((rung for rung in rungs if rung > fidelity), None)


def promoted(
    runners: Mapping[str, Runner], plan: Plan, aside: Collection[str] = ()
) -> tuple[str | None, set[str]]:
    """Who is to be measured on more next, None where nobody is left; and who was met that is not worth it now. Those on
    the lowest rung come first, and of them those on the front. `aside` are not looked at: they are measured now, or
    were not worth it."""
    race = _Race(runners, plan)
    waiting = sorted(
        (id for id, one in runners.items() if id not in aside and next_fidelity(plan.rungs, one.fidelity)),
        key=lambda id: (runners[id].fidelity, id not in race.front),
    )
    outrun: set[str] = set()
    for id in waiting:
        if race.worth(id):
            return id, outrun
        outrun.add(id)
    return None, outrun


class _Race:
    """Where all stand: objectives as losses, timed ones by what they are estimated to be. `front` holds who is on it by
    what is known so far. What was measured on parts of the evaluation is compared through the original, which was
    measured on all of it: one part is harder than another."""

    def __init__(self, runners: Mapping[str, Runner], plan: Plan) -> None:
        self._runners, self._plan = runners, plan
        self._ids = list(runners)
        self._rows = {id: row for row, id in enumerate(self._ids)}
        self._points = np.array([self._point(one) for one in runners.values()])
        signs = [Objective(objective.metric) for objective in plan.objectives]
        self._on_front = np.flatnonzero(nondominated(self._points, signs))
        self.front = {self._ids[row] for row in self._on_front}
        limits = np.array([np.inf if o.limit is None else o.loss(o.limit) for o in plan.objectives])
        timed = np.array([objective.metric in plan.timed for objective in plan.objectives])
        # What limits say of times counts once they are measured.
        self._limits = np.where(timed, np.inf, limits)
        front = self._points[self._on_front]
        extent = np.where(np.ptp(front, axis=0) > 0, np.ptp(front, axis=0), np.abs(front).max(axis=0))
        self._reference = np.minimum(front.max(axis=0) + 0.1 * extent, self._limits + 1e-9 * extent)
        self._volume = float(np.prod(np.maximum(self._reference - front.min(axis=0), 1e-12)))

    def worth(self, id: str) -> bool:
        """Whether a candidate may be within the limits, and is on the front or may add to it, as good as it may be."""
        one = self._runners[id]
        if any(_surely_broken(objective, one.measurement) for objective in _qualities(self._plan)):
            return False
        if id in self.front:
            return True
        mine = self._points[self._rows[id]]
        above = [row for row in self._on_front.tolist() if (self._points[row] <= mine).all()]
        hopes = np.array([self._hope(one, mine, row) for row in above])
        if not np.isfinite(hopes).all():
            return True
        gain = expected_improvement(
            self._points[self._on_front],
            self._reference,
            [Expected(column, np.zeros(1)) for column in hopes.max(axis=0)[:, None]],
        )
        return bool(gain[0] > WORTH * self._volume)

    def _hope(self, one: Runner, mine: NDArray[np.float64], row: int) -> NDArray[np.float64]:
        """What a candidate may be at best, compared with one that is better than it; minus infinity where nothing
        can be said."""
        rival = self._runners[self._ids[row]]
        found = []
        for column, objective in enumerate(self._plan.objectives):
            if objective.metric in self._plan.timed:
                error = self._plan.prediction_errors.get(objective.metric, GUESSED)
                found.append(mine[column] - abs(mine[column]) * error)
            elif objective.metric == "size_bytes":
                found.append(mine[column])
            else:
                apart = paired(one.measurement, rival.measurement, objective.metric)
                if apart is None or apart.items < FEWEST_ITEMS:
                    return np.full(len(mine), -np.inf)
                theirs = self._points[row, column]
                found.append(theirs + objective.loss(apart.value) - CHANCE * apart.error)
        return np.array(found)

    def _point(self, one: Runner) -> list[float]:
        return [self._loss(one, objective) for objective in self._plan.objectives]

    def _loss(self, one: Runner, objective: Objective) -> float:
        if objective.metric in self._plan.timed:
            return share(objective.metric, one.cost, self._plan.original_cost)
        if objective.metric == "size_bytes":
            return float(one.cost.size_bytes)
        value, original = one.measurement.metrics[objective.metric], self._runners[self._plan.original.id]
        apart = paired(one.measurement, original.measurement, objective.metric)
        if apart is not None and one.fidelity < original.fidelity:
            value = original.measurement.metrics[objective.metric] + apart.value
        return objective.loss(value)


def _qualities(plan: Plan) -> list[Objective]:
    """The objectives that the evaluation tells: neither known beforehand nor timed."""
    return [o for o in plan.objectives if o.metric not in plan.timed and o.metric != "size_bytes"]


def _surely_broken(objective: Objective, measurement: Measurement) -> bool:
    items = measurement.items.get(objective.metric, ())
    error = measurement.errors.get(objective.metric, math.inf)
    if objective.limit is None or len(items) < FEWEST_ITEMS:
        return False
    beyond = objective.loss(measurement.metrics[objective.metric]) - objective.loss(objective.limit)
    return beyond > CHANCE * error
