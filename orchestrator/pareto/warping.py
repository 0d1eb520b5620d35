"""Scale: losses as a belief sees them, so that their differences are about as telling everywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

Vector = Float[NDArray[np.float64], " losses"]

_TINY = 1e-300
_REACH = 2.0
"""So many times the distance from the best tenth to the median, and a loss is far out."""


@dataclass(frozen=True)
class Scale:
    """Losses, or their logarithms; what is far worse than the median by its logarithm once more, for how bad a
    failure is says little of what is good (after Golovin et al. 2017, §3: what is bad is warped, what is good is not).

    middle, reach: beyond their sum, distances from the middle grow by their logarithm.
    """

    logarithm: bool = False
    middle: float = 0.0
    reach: float = math.inf

    @classmethod
    def of(cls, losses: Vector, logarithm: bool) -> Scale:
        seen = np.log(np.maximum(losses, _TINY)) if logarithm else losses
        best, middle = (float(q) for q in np.quantile(seen, [0.1, 0.5]))
        reach = _REACH * (middle - best)
        return cls(logarithm, middle, reach) if reach > 0 else cls(logarithm)

    def seen(self, losses: Vector) -> Vector:
        values = np.log(np.maximum(losses, _TINY)) if self.logarithm else losses
        far = values - self.middle > self.reach
        if not far.any():
            return values
        out = np.maximum((values - self.middle) / self.reach, 1.0)
        return np.where(far, self.middle + self.reach * (1 + np.log(out)), values)

    def losses(self, seen: Vector) -> Vector:
        """The losses that are seen so."""
        far = seen - self.middle > self.reach
        if far.any():
            out = np.minimum(np.maximum((seen - self.middle) / self.reach, 1.0) - 1, 50.0)
            seen = np.where(far, self.middle + self.reach * np.exp(out), seen)
        return np.exp(np.minimum(seen, 700.0)) if self.logarithm else seen

    def stretch(self, losses: Vector) -> float:
        """Σ ln |d seen / d loss|: what the density of the seen values is to be multiplied by."""
        values = np.log(np.maximum(losses, _TINY)) if self.logarithm else losses
        out = np.maximum((values - self.middle) / self.reach, 1.0)
        return -float(np.log(out).sum()) - (float(values.sum()) if self.logarithm else 0.0)
