"""Warping: a monotone transformation of losses that makes equal differences about equally informative."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

Vector = Float[NDArray[np.float64], " losses"]

_MIN_LOSS = 1e-300
"""Losses below this count as this, so that their logarithm is finite."""
_REACH = 2.0
"""A loss is far worse than usual beyond this many distances from the best tenth to the median; chosen by hand."""


@dataclass(frozen=True)
class Warping:
    """Losses or their logarithms, with values far worse than the median compressed by a logarithm.

    Only bad values are compressed (after Golovin et al. 2017, §3): how bad a choice is says little about good ones.
    """

    logarithm: bool = False
    middle: float = 0.0
    reach: float = math.inf
    """Values more than this above `middle` are compressed: their distance from it grows logarithmically."""

    @classmethod
    def fit(cls, losses: Vector, logarithm: bool) -> Warping:
        """Return the warping for a sample of typical losses."""
        values = _scaled(losses, logarithm)
        best, middle = (float(quantile) for quantile in np.quantile(values, [0.1, 0.5]))
        reach = _REACH * (middle - best)
        if reach <= 0:
            return cls(logarithm)
        return cls(logarithm, middle, reach)

    def warp(self, losses: Vector) -> Vector:
        values = _scaled(losses, self.logarithm)
        far = values - self.middle > self.reach
        if not far.any():
            return values
        distance = np.maximum((values - self.middle) / self.reach, 1.0)
        return np.where(far, self.middle + self.reach * (1 + np.log(distance)), values)

    def unwarp(self, warped: Vector) -> Vector:
        """Return the losses with these warped values."""
        far = warped - self.middle > self.reach
        if far.any():
            exponent = np.minimum(np.maximum((warped - self.middle) / self.reach, 1.0) - 1, 50.0)
            warped = np.where(far, self.middle + self.reach * np.exp(exponent), warped)
        if self.logarithm:
            return np.exp(np.minimum(warped, 700.0))
        return warped

    def log_derivative(self, losses: Vector) -> float:
        """Return Σ ln |d warped / d loss|, which turns a log density of warped values into one of losses."""
        values = _scaled(losses, self.logarithm)
        distance = np.maximum((values - self.middle) / self.reach, 1.0)
        total = -float(np.log(distance).sum())
        if self.logarithm:
            total -= float(values.sum())
        return total


def _scaled(losses: Vector, logarithm: bool) -> Vector:
    """Return the losses or their logarithms."""
    if logarithm:
        return np.log(np.maximum(losses, _MIN_LOSS))
    return losses
