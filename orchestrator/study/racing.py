"""Racing: which candidates are worth measuring on more of the evaluation, by what is known of them so far."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from jobs.measurement.measurement import Measurement, first_items
from orchestrator.pareto.expected_improvement import Expected, expected_improvement
from orchestrator.pareto.front import Objective, hypervolume, nondominated
from orchestrator.study.events import Cost, StudyPlan
from orchestrator.study.latency_estimate import share
from orchestrator.study.results import bound

WORTH = 3e-4
"""The share of the hypervolume that makes a candidate worth measuring on more, if it is expected to add so much."""
LEFT_OUT = 1e-3
"""The share of the hypervolume that may be missing without those who are not measured on all, as they are believed."""
CHANCE = 2.0
"""What is beyond a limit by so many standard errors surely breaks it."""
POSSIBLE = 4.0
"""Nobody is better than believed by more than so many standard errors."""
FEWEST_ITEMS = 4
"""Fewer items tell nothing of their own spread."""
GUESSED = 0.1
"""By so much, relatively, a time is taken to err that no table of operations foretold."""

Points = Float[NDArray[np.float64], "runners objectives"]
Rows = Int[NDArray[np.int64], " runners"]
Values = Float[NDArray[np.float64], " runners"]


def next_fidelity(rungs: Sequence[float], fidelity: float) -> float | None:
    """The rung above; None at the top. Rungs rise, and the last is 1."""
    return next((rung for rung in rungs if rung > fidelity), None)


class Race:
    """All who were measured, on whatever share of the evaluation, and who of them is to be measured on more.

    Objectives are losses here, timed ones what they are estimated to be. One part of a text is harder than another, so
    whoever was measured on a part is compared item by item: with the original to tell where it stands, and with its
    nearest rival of those ahead to tell what it may add to them. Only what one result changes is computed anew.
    """

    def __init__(self, plan: StudyPlan) -> None:
        self._plan = plan
        self._ids: list[str] = []
        self._rows: dict[str, int] = {}
        self._measurements: list[Measurement] = []
        self._stacks: dict[tuple[str, int], _Stack] = {}
        # A row for each runner. level: of the rung that it was measured on, -1 for who is out of the race.
        self._level = np.zeros(0, dtype=np.int64)
        self._broken = np.zeros(0, dtype=np.bool_)
        self._counts = np.zeros((0, len(plan.objectives)), dtype=np.int64)
        self._points = np.zeros((0, len(plan.objectives)))
        self._errors = np.zeros((0, len(plan.objectives)))
        self._limits = np.array([_limit(objective, plan) for objective in plan.objectives])

    def enter(self, id: str, measurement: Measurement, cost: Cost, fidelity: float) -> None:
        """A candidate was measured, or was on more. The original, which is measured on all at once, comes first."""
        if not self._ids and id != self._plan.original.id:
            raise LookupError(f"{id} cannot race before the original")
        if id not in self._rows:
            self._add(id)
        row = self._rows[id]
        level = sum(rung <= fidelity for rung in self._plan.rungs) - 1
        if self._level[row] == level:
            return  # what else was measured of it decides nothing here
        self._measurements[row] = measurement
        for stack in self._stacks.values():
            stack.forget(row)
        self._level[row] = level
        self._broken[row] = any(_surely_broken(o, measurement) for o in self._plan.objectives)
        self._counts[row] = [len(measurement.items.get(o.metric, ())) for o in self._plan.objectives]
        for column in range(len(self._plan.objectives)):
            self._points[row, column], self._errors[row, column] = self._placed(row, column, cost)

    def leave(self, id: str) -> None:
        """A candidate failed."""
        if id in self._rows:
            self._level[self._rows[id]] = -1

    def promoted(self, busy: Collection[str]) -> str | None:
        """Who is to be measured on more next; None where nobody is worth it. `busy` are measured now, and taken to turn
        out as believed. Those on the lowest rung come first, and of them who is expected to add most to those above."""
        active = np.zeros(len(self._ids), dtype=np.bool_)
        active[[self._rows[id] for id in busy if id in self._rows]] = True
        reference = self._reference()
        top = len(self._plan.rungs) - 1
        for level in range(top):
            waiting = np.flatnonzero((self._level == level) & ~active & ~self._broken)
            above = np.flatnonzero((self._level > level) | ((self._level == level) & active))
            row = self._worth(waiting, above, reference, LEFT_OUT * (level + 1) / top)
            if row is not None:
                return self._ids[row]
        return None

    def _worth(
        self, waiting: Rows, above: Rows, reference: NDArray[np.float64], left_out: float
    ) -> int | None:
        """Who of those that wait on one rung adds most to those above it, if that is worth it: if it is much by itself,
        or if with all who wait more than `left_out` would be missing."""
        ahead = above[nondominated(self._points[above], self._losses)]
        front = self._points[ahead]
        best = self._points[waiting] - POSSIBLE * self._errors[waiting]
        beaten = (best >= reference).any(axis=1)
        for point in front:
            beaten |= np.logical_and.reduce([best[:, at] >= loss for at, loss in enumerate(point)])
        waiting = waiting[~beaten]
        if not len(waiting):
            return None
        unknown = waiting[~np.isfinite(self._errors[waiting]).all(axis=1)]
        if len(unknown):
            return int(unknown[0])
        expected = self._expected(waiting, ahead)
        gains = expected_improvement(front, reference, expected)
        found = int(gains.argmax())
        believed = np.vstack([front, np.column_stack([one.mean for one in expected])])
        volume, there = hypervolume(believed, reference), hypervolume(front, reference)
        if gains[found] > WORTH * volume or volume - there > left_out * volume:
            return int(waiting[found])
        return None

    def _expected(self, waiting: Rows, ahead: Rows) -> list[Expected]:
        """What these are believed to be in each objective: what the evaluation tells, by the difference to the nearest
        of those ahead, which has lost most of what those that wait may lose."""
        mine, theirs = self._points[waiting], self._points[ahead]
        extent = np.maximum(np.ptp(np.vstack([mine, theirs]), axis=0), 1e-300)
        apart = [abs(a[:, None] - b[None]) / by for a, b, by in zip(mine.T, theirs.T, extent, strict=True)]
        rivals = ahead[np.maximum.reduce(apart).argmin(axis=1)]
        found = []
        for column, objective in enumerate(self._plan.objectives):
            mean, error = mine[:, column], self._errors[waiting, column]
            if _told(objective, self._plan):
                worse, error = self._apart(waiting, rivals, column)
                mean = self._points[rivals, column] + worse
            found.append(Expected(mean, error))
        return found

    def _add(self, id: str) -> None:
        self._rows[id] = len(self._ids)
        self._ids.append(id)
        self._measurements.append(Measurement({}))
        unknown = np.zeros((1, len(self._plan.objectives)))
        self._level = np.append(self._level, -1)
        self._broken = np.append(self._broken, False)
        self._counts = np.vstack([self._counts, unknown.astype(np.int64)])
        self._points = np.vstack([self._points, unknown])
        self._errors = np.vstack([self._errors, unknown])

    def _placed(self, row: int, column: int, cost: Cost) -> tuple[float, float]:
        """Where a runner stands in an objective, and the error of that; an infinite one where nothing tells it."""
        objective = self._plan.objectives[column]
        if objective.metric in self._plan.timed:
            needed = share(objective.metric, cost, self._plan.original_cost)
            return needed, needed * self._plan.prediction_errors.get(objective.metric, GUESSED)
        if objective.metric == "size_bytes":
            return float(cost.size_bytes), 0.0
        loss = objective.loss(self._measurements[row].metrics[objective.metric])
        if self._level[row] == len(self._plan.rungs) - 1:
            return loss, 0.0
        if min(self._counts[row, column], self._counts[0, column]) < FEWEST_ITEMS:
            return loss, math.inf
        one = np.array([row])
        worse, error = self._apart(one, 0 * one, column)
        original = objective.loss(self._measurements[0].metrics[objective.metric])
        return original + float(worse[0]), float(error[0])

    def _apart(self, rows: Rows, rivals: Rows, column: int) -> tuple[Values, Values]:
        """By how much each is worse than its rival on all of the evaluation, and the standard error of that, by the
        items that both were measured on. These are drawn from as many as the original has, without repetition (Cochran
        1977, eq. 2.20), and few items tell their own spread badly (the variance of Student's t is more than 1).
        """
        objective = self._plan.objectives[column]
        count = int(min(self._counts[rows, column].min(), self._counts[rivals, column].min()))
        key = objective.metric, count
        stack = self._stacks.setdefault(key, _Stack(*key))
        apart = stack.of(rows, self._measurements) - stack.of(rivals, self._measurements)
        unread = max(0.0, 1 - count / self._counts[0, column])
        error = apart.std(axis=1, ddof=1) * math.sqrt(unread / count * (count - 1) / (count - 3))
        return objective.loss(1.0) * apart.mean(axis=1), error

    @property
    def _losses(self) -> list[Objective]:
        """The objectives where all values are losses already."""
        return [Objective(objective.metric) for objective in self._plan.objectives]

    def _reference(self) -> Float[NDArray[np.float64], " objectives"]:
        """What bounds the hypervolume: as in a report, where anybody is within that, else just beyond all of them."""
        metrics = self._measurements[0].metrics
        bounds = self._points[0].copy()
        for column, objective in enumerate(self._plan.objectives):
            if _told(objective, self._plan):
                bounds[column] = objective.loss(bound(objective, metrics[objective.metric]))
        bounds = np.asarray(np.minimum(bounds, self._limits))
        racing = self._points[self._level >= 0]
        if (racing < bounds).all(axis=1).any():
            return bounds
        beyond = racing.max(axis=0) + 0.1 * np.ptp(racing, axis=0) + 1e-9 * np.abs(racing).max(axis=0)
        return np.asarray(np.minimum(beyond, self._limits))


class _Stack:
    """The first so many items of runners, a row for each of whom they were asked."""

    def __init__(self, metric: str, count: int) -> None:
        self._metric, self._count = metric, count
        self._values = np.zeros((0, count))
        self._known = np.zeros(0, dtype=np.bool_)

    def of(
        self, rows: Rows, measurements: Sequence[Measurement]
    ) -> Float[NDArray[np.float64], "runners items"]:
        missing = len(measurements) - len(self._known)
        if missing > 0:
            more = max(missing, len(self._known))  # so that rows are moved seldom
            self._values = np.vstack([self._values, np.empty((more, self._count))])
            self._known = np.append(self._known, np.zeros(more, dtype=np.bool_))
        for row in rows[~self._known[rows]].tolist():
            self._values[row] = first_items(measurements[row], self._metric, self._count)
            self._known[row] = True
        return np.asarray(self._values[rows])

    def forget(self, row: int) -> None:
        self._known[row : row + 1] = False


def _told(objective: Objective, plan: StudyPlan) -> bool:
    """Whether the evaluation tells an objective: it is neither known beforehand nor timed."""
    return objective.metric not in plan.timed and objective.metric != "size_bytes"


def _limit(objective: Objective, plan: StudyPlan) -> float:
    """As a loss, and just beyond it, since what is at the limit keeps it. What limits say of times counts once they are
    measured."""
    if objective.limit is None or objective.metric in plan.timed:
        return math.inf
    return float(np.nextafter(objective.loss(objective.limit), math.inf))


def _surely_broken(objective: Objective, measurement: Measurement) -> bool:
    items = measurement.items.get(objective.metric, ())
    error = measurement.errors.get(objective.metric, math.inf)
    if objective.limit is None or len(items) < FEWEST_ITEMS:
        return False
    beyond = objective.loss(measurement.metrics[objective.metric]) - objective.loss(objective.limit)
    return beyond > CHANCE * error
