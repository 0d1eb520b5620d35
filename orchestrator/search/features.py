"""Features: points as rows of numbers that a Gaussian process compares."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from orchestrator.search.encoding import Active, Axis, Points

LEVELS = 9
"""A knob with more values is represented by its effect at this number of evenly spaced positions, with linear
interpolation between them."""

Rows = Float[NDArray[np.float64], "points features"]


class Features:
    """Computes rows of features. A row has two parts, and each knob has some columns in both.

    The inner product of the first part of two rows is the covariance of the additive effects of knobs. An ordered knob
    has one column per step between neighbouring values, so that similar values have similar effects, others have
    one column per value. Columns are centred, and 0 if the knob is inactive.

    The second part measures distances. The distance between the ends of an ordered knob, and between any two values of
    an unordered one, is 1. An inactive ordered knob is in the middle, an inactive unordered one at the origin.
    """

    def __init__(self, axes: Sequence[Axis]) -> None:
        self._axes = [(column, axis) for column, axis in enumerate(axes) if axis.count != 1]
        self.count = len(self._axes)
        """Number of knobs with more than one value."""
        self.hints = np.array([axis.hint for _, axis in self._axes], dtype=np.bool_)
        effects, distances = [], []
        for _, axis in self._axes:
            if axis.ordered:
                effects.append(min(axis.count or LEVELS, LEVELS) - 1)
                distances.append(1)
            else:
                effects.append(axis.count)
                distances.append(axis.count)
        self.effects = slice(0, sum(effects))
        """The columns of the first part."""
        self.distances = slice(sum(effects), sum(effects) + sum(distances))
        """The columns of the second part."""
        knobs = np.arange(self.count)
        self.knobs = np.concatenate([np.repeat(knobs, effects), np.repeat(knobs, distances)]).astype(np.int64)
        """The index of the knob of each column."""

    def rows(self, points: Points, active: Active) -> Rows:
        parts = [self._effects(axis, points[:, column], active[:, column]) for column, axis in self._axes]
        parts += [self._distances(axis, points[:, column], active[:, column]) for column, axis in self._axes]
        return np.concatenate([np.zeros((len(points), 0)), *parts], axis=1)

    def _effects(self, axis: Axis, positions: NDArray[np.float64], active: NDArray[np.bool_]) -> Rows:
        if axis.ordered:
            steps = min(axis.count or LEVELS, LEVELS) - 1
            passed = np.clip(positions[:, None] * steps - np.arange(steps), 0.0, 1.0)
            return (passed - 0.5) / math.sqrt(steps) * active[:, None]
        return (_one_hot(axis, positions) - 1 / axis.count) * active[:, None]

    def _distances(self, axis: Axis, positions: NDArray[np.float64], active: NDArray[np.bool_]) -> Rows:
        if axis.ordered:
            return np.where(active, positions, 0.5)[:, None]
        return _one_hot(axis, positions) / math.sqrt(2) * active[:, None]


def _one_hot(axis: Axis, positions: NDArray[np.float64]) -> Rows:
    indices = np.round(positions[:, None] * (axis.count - 1))
    return np.asarray(indices == np.arange(axis.count), dtype=np.float64)
