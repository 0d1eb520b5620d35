"""Racing: which candidates to promote to the next rung, a larger share of the evaluation.

Like asynchronous successive halving (Li et al. 2020, arXiv:1810.05934), it promotes candidates one by one as slots
become free. Unlike it, the criterion is the expected hypervolume improvement, since a study has several objectives.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from jobs.measurement.measurement import Measurement, first_items
from orchestrator.pareto.expected_improvement import Prediction, expected_improvement
from orchestrator.pareto.front import Objective, hypervolume, nondominated
from orchestrator.study.events import Cost, StudyPlan
from orchestrator.study.latency_estimate import share
from orchestrator.study.results import bound

MIN_IMPROVEMENT = 3e-4
"""Promote a candidate whose expected improvement exceeds this share of the hypervolume. Chosen on synthetic studies of
80 and 300 candidates (`benchmarks.racing`), where most fronts are within 0.5 % of those of full evaluations."""
MAX_MISSING_SHARE = 1e-3
"""Promote the best candidate, too, if all candidates that wait would together add more than this share of the
hypervolume. Chosen with `MIN_IMPROVEMENT`."""
LIMIT_STANDARD_ERRORS = 2.0
"""A measurement beyond a limit by more standard errors than this certainly breaks it: 2 % of errors are larger."""
BOUND_STANDARD_ERRORS = 4.0
"""No candidate is better than its mean by more standard errors than this: 1 in 30,000 is."""
MIN_ITEMS = 4
"""Fewer items do not determine their own variance: that of Student's t with n - 1 degrees of freedom is finite from 4
items on."""
UNPREDICTED_ERROR = 0.1
"""Relative error of estimated times that no latency table predicted. An assumption, not measured."""

Points = Float[NDArray[np.float64], "candidates objectives"]
Rows = Int[NDArray[np.int64], " candidates"]
Values = Float[NDArray[np.float64], " candidates"]


def next_fidelity(rungs: Sequence[float], fidelity: float) -> float | None:
    """Return the next rung; None on the last one. Rungs rise, and the last is 1."""
    return next((rung for rung in rungs if rung > fidelity), None)


class Race:
    """All measured candidates, each with its rung, and the choice of the next promotion.

    All objectives are losses; timed ones are estimates. Some parts of a text are harder than others, so measurements
    on a part are compared item by item: with the original for the candidate's value, and with the nearest promoted
    candidate for its improvement. A new result updates one row. With a single rung the race ignores all results.
    """

    def __init__(self, plan: StudyPlan) -> None:
        self._plan = plan
        self._last_level = len(plan.rungs) - 1
        self._ids: list[str] = []
        self._rows: dict[str, int] = {}
        self._measurements: list[Measurement] = []
        self._item_tables: dict[tuple[str, int], _ItemTable] = {}
        # One row per candidate. Level: the index of its rung, -1 for candidates that failed.
        self._levels = np.zeros(0, dtype=np.int64)
        self._over_limit = np.zeros(0, dtype=np.bool_)
        self._item_counts = np.zeros((0, len(plan.objectives)), dtype=np.int64)
        self._points = np.zeros((0, len(plan.objectives)))
        self._errors = np.zeros((0, len(plan.objectives)))
        self._limits = np.array([_limit(objective, plan) for objective in plan.objectives])

    def report(self, id: str, measurement: Measurement, cost: Cost, fidelity: float) -> None:
        """Add a measured candidate, or update it after a measurement on a larger share.

        The original, which is measured on the full evaluation, comes first; LookupError otherwise.
        """
        if self._last_level == 0:
            return
        if not self._ids and id != self._plan.original.id:
            raise LookupError(f"{id} cannot race before the original")
        if id not in self._rows:
            self._add_row(id)
        row = self._rows[id]
        level = sum(rung <= fidelity for rung in self._plan.rungs) - 1
        if self._levels[row] == level:
            return  # timings do not affect promotions
        self._measurements[row] = measurement
        for table in self._item_tables.values():
            table.forget(row)
        self._levels[row] = level
        self._over_limit[row] = any(
            _certainly_breaks_limit(objective, measurement) for objective in self._plan.objectives
        )
        self._item_counts[row] = [
            len(measurement.items.get(objective.metric, ())) for objective in self._plan.objectives
        ]
        for column in range(len(self._plan.objectives)):
            self._points[row, column], self._errors[row, column] = self._estimate(row, column, cost)

    def remove(self, id: str) -> None:
        """Exclude a candidate that failed."""
        if id in self._rows:
            self._levels[self._rows[id]] = -1

    def next_promotion(self, running: Collection[str]) -> str | None:
        """Return the candidate to measure on the next rung; None if no promotion is worth its cost.

        Candidates on the lowest rung come first; among them, that with the largest expected improvement of the
        candidates on higher rungs. Those in `running` are being measured and count as promoted, at their mean.
        """
        if self._last_level == 0:
            return None
        active = np.zeros(len(self._ids), dtype=np.bool_)
        active[[self._rows[id] for id in running if id in self._rows]] = True
        reference = self._reference()
        for level in range(self._last_level):
            on_rung = self._levels == level
            waiting = np.flatnonzero(on_rung & ~active & ~self._over_limit)
            promoted = np.flatnonzero((self._levels > level) | (on_rung & active))
            max_missing = MAX_MISSING_SHARE * (level + 1) / self._last_level
            row = self._best_promotion(waiting, promoted, reference, max_missing)
            if row is not None:
                return self._ids[row]
        return None

    def _best_promotion(
        self, waiting: Rows, promoted: Rows, reference: NDArray[np.float64], max_missing: float
    ) -> int | None:
        """The waiting candidate with the largest expected improvement of those promoted; None if it is too small.

        It is large enough by itself, or if all waiting candidates together add more than `max_missing`.
        """
        front_rows = promoted[nondominated(self._points[promoted], self._loss_objectives)]
        front = self._points[front_rows]
        lower_bounds = self._points[waiting] - BOUND_STANDARD_ERRORS * self._errors[waiting]
        dominated = (lower_bounds >= reference).any(axis=1)
        for point in front:
            dominated |= np.logical_and.reduce(
                [lower_bounds[:, column] >= loss for column, loss in enumerate(point)]
            )
        waiting = waiting[~dominated]
        if not len(waiting):
            return None
        unknown = waiting[~np.isfinite(self._errors[waiting]).all(axis=1)]
        if len(unknown):
            return int(unknown[0])
        predictions = self._predict(waiting, front_rows)
        improvements = expected_improvement(front, reference, predictions)
        best = int(improvements.argmax())
        means = np.column_stack([prediction.mean for prediction in predictions])
        total = hypervolume(np.vstack([front, means]), reference)
        missing = total - hypervolume(front, reference)
        if improvements[best] > MIN_IMPROVEMENT * total or missing > max_missing * total:
            return int(waiting[best])
        return None

    def _predict(self, waiting: Rows, front_rows: Rows) -> list[Prediction]:
        """The losses of the waiting candidates on the full evaluation, for each objective.

        Evaluated objectives are the loss of the nearest member of the front plus the paired difference to it: that
        member is the one whose volume a candidate would replace.
        """
        points, front = self._points[waiting], self._points[front_rows]
        extent = np.maximum(np.ptp(np.vstack([points, front]), axis=0), 1e-300)
        distances = [
            abs(values[:, None] - front_values[None]) / scale
            for values, front_values, scale in zip(points.T, front.T, extent, strict=True)
        ]
        nearest = front_rows[np.maximum.reduce(distances).argmin(axis=1)]
        predictions = []
        for column, objective in enumerate(self._plan.objectives):
            mean, error = points[:, column], self._errors[waiting, column]
            if _is_evaluated(objective, self._plan):
                difference, error = self._paired_difference(waiting, nearest, column)
                mean = self._points[nearest, column] + difference
            predictions.append(Prediction(mean, error))
        return predictions

    def _add_row(self, id: str) -> None:
        self._rows[id] = len(self._ids)
        self._ids.append(id)
        self._measurements.append(Measurement({}))
        unknown = np.zeros((1, len(self._plan.objectives)))
        self._levels = np.append(self._levels, -1)
        self._over_limit = np.append(self._over_limit, False)
        self._item_counts = np.vstack([self._item_counts, unknown.astype(np.int64)])
        self._points = np.vstack([self._points, unknown])
        self._errors = np.vstack([self._errors, unknown])

    def _estimate(self, row: int, column: int, cost: Cost) -> tuple[float, float]:
        """A candidate's loss in one objective and its standard error; infinite if the items do not determine it."""
        objective = self._plan.objectives[column]
        if objective.metric in self._plan.timed:
            relative = share(objective.metric, cost, self._plan.original_cost)
            return relative, relative * self._plan.prediction_errors.get(objective.metric, UNPREDICTED_ERROR)
        if objective.metric == "size_bytes":
            return float(cost.size_bytes), 0.0
        loss = objective.loss(self._measurements[row].metrics[objective.metric])
        if self._levels[row] == self._last_level:
            return loss, 0.0
        if min(self._item_counts[row, column], self._item_counts[0, column]) < MIN_ITEMS:
            return loss, math.inf
        rows = np.array([row])
        difference, error = self._paired_difference(rows, 0 * rows, column)
        original = objective.loss(self._measurements[0].metrics[objective.metric])
        return original + float(difference[0]), float(error[0])

    def _paired_difference(self, rows: Rows, rivals: Rows, column: int) -> tuple[Values, Values]:
        """Each candidate's loss minus that of its rival on the full evaluation, and the standard error.

        It follows from the items that both were measured on: a sample, without replacement, of the items of the
        original (Cochran 1977, eq. 2.20). The factor (n - 1) / (n - 3) is the variance of Student's t, since few
        items determine their own variance badly.
        """
        objective = self._plan.objectives[column]
        count = int(min(self._item_counts[rows, column].min(), self._item_counts[rivals, column].min()))
        key = objective.metric, count
        table = self._item_tables.setdefault(key, _ItemTable(*key))
        differences = table.rows(rows, self._measurements) - table.rows(rivals, self._measurements)
        unread = max(0.0, 1 - count / self._item_counts[0, column])
        error = differences.std(axis=1, ddof=1) * math.sqrt(unread / count * (count - 1) / (count - 3))
        return objective.loss(1.0) * differences.mean(axis=1), error

    @property
    def _loss_objectives(self) -> list[Objective]:
        """The objectives for values that are losses already."""
        return [Objective(objective.metric) for objective in self._plan.objectives]

    def _reference(self) -> Float[NDArray[np.float64], " objectives"]:
        """The reference point of the hypervolume, in losses.

        It is that of the report if any candidate is within it, else a point just beyond all candidates.
        """
        metrics = self._measurements[0].metrics
        bounds = self._points[0].copy()
        for column, objective in enumerate(self._plan.objectives):
            if _is_evaluated(objective, self._plan):
                bounds[column] = objective.loss(bound(objective, metrics[objective.metric]))
        bounds = np.asarray(np.minimum(bounds, self._limits))
        racing = self._points[self._levels >= 0]
        if (racing < bounds).all(axis=1).any():
            return bounds
        beyond = racing.max(axis=0) + 0.1 * np.ptp(racing, axis=0) + 1e-9 * np.abs(racing).max(axis=0)
        return np.asarray(np.minimum(beyond, self._limits))


class _ItemTable:
    """The first `count` items of a metric, one row per candidate, filled in when a row is first read."""

    def __init__(self, metric: str, count: int) -> None:
        self._metric, self._count = metric, count
        self._values = np.zeros((0, count))
        self._filled = np.zeros(0, dtype=np.bool_)

    def rows(
        self, rows: Rows, measurements: Sequence[Measurement]
    ) -> Float[NDArray[np.float64], "candidates items"]:
        missing = len(measurements) - len(self._filled)
        if missing > 0:
            added = max(missing, len(self._filled))  # double the size, so that rows are seldom copied
            self._values = np.vstack([self._values, np.empty((added, self._count))])
            self._filled = np.append(self._filled, np.zeros(added, dtype=np.bool_))
        for row in rows[~self._filled[rows]].tolist():
            self._values[row] = first_items(measurements[row], self._metric, self._count)
            self._filled[row] = True
        return np.asarray(self._values[rows])

    def forget(self, row: int) -> None:
        self._filled[row : row + 1] = False


def _is_evaluated(objective: Objective, plan: StudyPlan) -> bool:
    """Whether an objective is measured on the evaluation; sizes are exact before, and timings come later."""
    return objective.metric not in plan.timed and objective.metric != "size_bytes"


def _limit(objective: Objective, plan: StudyPlan) -> float:
    """The smallest loss that breaks the limit; infinite without a limit and for times, which are not measured yet."""
    if objective.limit is None or objective.metric in plan.timed:
        return math.inf
    return float(np.nextafter(objective.loss(objective.limit), math.inf))


def _certainly_breaks_limit(objective: Objective, measurement: Measurement) -> bool:
    items = measurement.items.get(objective.metric, ())
    error = measurement.errors.get(objective.metric, math.inf)
    if objective.limit is None or len(items) < MIN_ITEMS:
        return False
    excess = objective.loss(measurement.metrics[objective.metric]) - objective.loss(objective.limit)
    return excess > LIMIT_STANDARD_ERRORS * error
