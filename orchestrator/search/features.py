"""Features: points as rows of numbers by which a belief compares them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from orchestrator.search.encoding import Active, Axis, Points

LEVELS = 9
"""A knob with more values than that is told apart at so many places along its range, straight lines between."""

Rows = Float[NDArray[np.float64], "points features"]


class Features:
    """Each row has two parts, `effects` and `distances`, and in each every knob has some columns, `knobs` tells which.

    effects: their inner products are what knobs do by themselves. Steps up along the values where they have an order,
        so that near values have near effects, else one column a value; centred, and 0 where the knob does nothing.
    distances: their Euclidean distance is 1 from one end of a knob's range to the other, and between any two values
        without an order; half the way (or half the square) to where the knob does nothing.
    """

    def __init__(self, axes: Sequence[Axis]) -> None:
        self._axes = [(column, axis) for column, axis in enumerate(axes) if axis.count != 1]
        self.count = len(self._axes)
        self.hints = np.array([axis.hint for _, axis in self._axes], dtype=np.bool_)
        effects = [
            min(axis.count or LEVELS, LEVELS) - 1 if axis.ordered else axis.count for _, axis in self._axes
        ]
        distances = [1 if axis.ordered else axis.count for _, axis in self._axes]
        self.effects = slice(0, sum(effects))
        self.distances = slice(sum(effects), sum(effects) + sum(distances))
        each = np.arange(self.count)
        self.knobs = np.concatenate([np.repeat(each, effects), np.repeat(each, distances)]).astype(np.int64)

    def rows(self, points: Points, active: Active) -> Rows:
        parts = [self._effects(axis, points[:, at], active[:, at]) for at, axis in self._axes]
        parts += [self._distances(axis, points[:, at], active[:, at]) for at, axis in self._axes]
        return np.concatenate([np.zeros((len(points), 0)), *parts], axis=1)

    def _effects(self, axis: Axis, places: NDArray[np.float64], acting: NDArray[np.bool_]) -> Rows:
        if axis.ordered:
            steps = min(axis.count or LEVELS, LEVELS) - 1
            climbed = np.clip(places[:, None] * steps - np.arange(steps), 0.0, 1.0)
            return (climbed - 0.5) / math.sqrt(steps) * acting[:, None]
        return (_one_of(axis, places) - 1 / axis.count) * acting[:, None]

    def _distances(self, axis: Axis, places: NDArray[np.float64], acting: NDArray[np.bool_]) -> Rows:
        if axis.ordered:
            return np.where(acting, places, 0.5)[:, None]
        return _one_of(axis, places) / math.sqrt(2) * acting[:, None]


def _one_of(axis: Axis, places: NDArray[np.float64]) -> Rows:
    return np.asarray(np.round(places[:, None] * (axis.count - 1)) == np.arange(axis.count), dtype=np.float64)
