"""The candidate pool: choices with their properties that need no measurement, and their features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from jobs.knobs import Range
from orchestrator.pareto.front import Objective
from orchestrator.search.encoding import Axis, Points, SpaceEncoder
from orchestrator.search.features import Features, Rows
from orchestrator.search.search import SECONDS, KnownMetrics

_SAMPLE_SIZE = 100
"""Number of uniform and of levelled points in the sample of the space, enough for quantiles up to 0.9."""
_CACHED_ROWS = 2_000
"""Clear the cache of rows beyond this number, which is above the number of results that models learn from."""
_MIN_SECONDS = 1e-3
"""Expected durations below this count as this, so that divisions are defined."""
_LOG_RATIO = 10.0
"""Hints whose maximum is more than this factor above the minimum are compared by their ratios."""

Hints = Float[NDArray[np.float64], "points hints"]
Losses = Float[NDArray[np.float64], "points objectives"]


@dataclass(frozen=True)
class Pool:
    """Points with their properties before measurement, one row each."""

    points: Points
    rows: Rows
    """Features."""
    losses: Losses
    """The losses that are known without a measurement, else NaN."""
    seconds: NDArray[np.float64]
    """Expected duration of the evaluation; 1 if nothing is known of it."""

    def __len__(self) -> int:
        return len(self.points)

    def take(self, selection: NDArray[np.intp] | NDArray[np.bool_]) -> Pool:
        return Pool(
            self.points[selection], self.rows[selection], self.losses[selection], self.seconds[selection]
        )

    def joined(self, other: Pool) -> Pool:
        return Pool(
            np.concatenate([self.points, other.points]),
            np.concatenate([self.rows, other.rows]),
            np.concatenate([self.losses, other.losses]),
            np.concatenate([self.seconds, other.seconds]),
        )


class CandidateEvaluator:
    """Determines everything about choices that needs no measurement: deterministic objectives, hints, features.

    Deterministic objectives are those with known values, such as the size; the evaluator detects them when values
    appear. They and the hints are features beside the knobs, since measured objectives often correlate with them
    (quality with size), and the correlation is learned from few results.
    """

    def __init__(
        self,
        encoder: SpaceEncoder,
        objectives: Sequence[Objective],
        known_metrics: KnownMetrics,
        generator: np.random.Generator,
    ) -> None:
        self._encoder = encoder
        self._objectives = tuple(objectives)
        self._known_metrics = known_metrics
        limits = []
        for objective in objectives:
            limits.append(np.inf if objective.limit is None else objective.loss(objective.limit))
        self._limits = np.array(limits)
        self._objective_axes: dict[int, Axis] = {}
        self.deterministic_objectives: Bool[NDArray[np.bool_], " objectives"] = np.zeros(
            len(objectives), dtype=np.bool_
        )
        uniform = encoder.uniform(_SAMPLE_SIZE, generator)
        self._sample_points = np.concatenate([uniform, encoder.levelled(_SAMPLE_SIZE, generator)])
        metrics = self._metrics_of(self._sample_points)
        self._hint_axes = self._axes_of_hints(metrics)
        self._cached_rows: dict[bytes, NDArray[np.float64]] = {}
        self.features = Features([*encoder.axes, *self._hint_axes.values()])
        self.space_sample = self._pool(self._sample_points, metrics)
        """Points of the whole space, drawn independently of results."""

    def evaluate(self, points: Points) -> Pool:
        return self._pool(points, self._metrics_of(points))

    def rows(self, points: Points) -> Rows:
        """Return the features of points that are needed repeatedly, such as those of results; they are cached."""
        keys = [point.tobytes() for point in points]
        if len(self._cached_rows) > _CACHED_ROWS:
            self._cached_rows = {}
        new = {}
        for key, point in zip(keys, points, strict=True):
            if key not in self._cached_rows:
                new[key] = point
        if new:
            rows = self.evaluate(np.array(list(new.values()))).rows
            self._cached_rows |= dict(zip(new, rows, strict=True))
        return np.array([self._cached_rows[key] for key in keys])

    def update_deterministic_objectives(self, pool: Pool) -> bool:
        """Return whether the pool has known values of an objective that had none before.

        The features change then, so all pools must be evaluated again, this one too.
        """
        new = np.isfinite(pool.losses).any(axis=0) & ~self.deterministic_objectives
        if not new.any():
            return False
        self.deterministic_objectives = self.deterministic_objectives | new
        losses = self.evaluate(np.concatenate([self._sample_points, pool.points])).losses
        for column in np.flatnonzero(self.deterministic_objectives):
            low, high = float(np.nanmin(losses[:, column])), float(np.nanmax(losses[:, column]))
            if low < high:
                metric = self._objectives[column].metric
                self._objective_axes[int(column)] = Axis(metric, Range(low, high), (), 0, ordered=True)
        self.features = Features(
            [*self._encoder.axes, *self._hint_axes.values(), *self._objective_axes.values()]
        )
        self.space_sample = self.evaluate(self._sample_points)
        self._cached_rows = {}
        return True

    def feasible(self, pool: Pool) -> Pool:
        """Return the pool without points whose deterministic objectives break a limit or are unknown.

        Unknown ones belong to models that cannot be built.
        """
        keeps_limits = np.isfinite(pool.losses) & (pool.losses <= self._limits)
        feasible = keeps_limits | ~self.deterministic_objectives
        return pool.take(np.asarray(feasible.all(axis=1)))

    def _metrics_of(self, points: Points) -> list[Mapping[str, float]]:
        return [self._known_metrics(choices) for choices in self._encoder.choices_at(points)]

    def _pool(self, points: Points, metrics: Sequence[Mapping[str, float]]) -> Pool:
        losses = np.full((len(points), len(self._objectives)), np.nan)
        hints = np.full((len(points), len(self._hint_axes)), np.nan)
        seconds = np.ones(len(points))
        for row, values in enumerate(metrics):
            for column, objective in enumerate(self._objectives):
                if objective.metric in values:
                    losses[row, column] = objective.loss(values[objective.metric])
            for column, name in enumerate(self._hint_axes):
                hints[row, column] = values.get(name, np.nan)
            seconds[row] = max(values.get(SECONDS, 1.0), _MIN_SECONDS)
        return Pool(points, self._rows(points, losses, hints), losses, seconds)

    def _axes_of_hints(self, metrics: Sequence[Mapping[str, float]]) -> dict[str, Axis]:
        """An axis per hint: known metrics that are no objective and vary over the sample."""
        names = {name for values in metrics for name in values}
        names -= {SECONDS, *(objective.metric for objective in self._objectives)}
        axes = {}
        for name in sorted(names):
            hints = np.array([values.get(name, math.nan) for values in metrics], dtype=np.float64)
            hints = hints[np.isfinite(hints)]
            positive = hints[hints > 0]
            log = len(positive) > 0 and hints.min() >= 0 and hints.max() > _LOG_RATIO * positive.min()
            low, high = float((positive if log else hints).min()), float(hints.max())
            if low < high:
                axes[name] = Axis(name, Range(low, high, log=bool(log)), (), 0, ordered=True, hint=True)
        return axes

    def _rows(self, points: Points, losses: Losses, hints: Hints) -> Rows:
        columns = [points]
        for column, axis in enumerate(self._hint_axes.values()):
            columns.append(_hint_positions(axis, hints[:, column])[:, None])
        for column, axis in self._objective_axes.items():
            assert isinstance(axis.domain, Range)
            low, high = axis.domain.low, axis.domain.high
            columns.append(np.nan_to_num((losses[:, column] - low) / (high - low))[:, None])
        always = np.ones((len(points), len(self._objective_axes)), dtype=np.bool_)
        active = np.column_stack([self._encoder.active(points), np.isfinite(hints), always])
        return self.features.rows(np.column_stack(columns), active)


def _hint_positions(axis: Axis, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Positions on the axis of a hint; values beyond its ends are at the ends, and missing ones at 0."""
    assert isinstance(axis.domain, Range)
    low, high = float(axis.domain.low), float(axis.domain.high)
    clipped = np.nan_to_num(np.clip(values, low, high), nan=low)
    if axis.domain.log:
        return np.asarray(np.log(clipped / low) / math.log(high / low))
    return np.asarray((clipped - low) / (high - low))
