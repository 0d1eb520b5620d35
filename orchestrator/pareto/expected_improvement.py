"""Expected hypervolume improvement, and the probability that a candidate improves a front."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy  # its modules are imported at their first use: commands that only plan do not need them
from jaxtyping import Float
from numpy.typing import NDArray

from orchestrator.pareto.warping import Warping

Points = Float[NDArray[np.float64], "points objectives"]
Vector = Float[NDArray[np.float64], " candidates"]
Lengths = Float[NDArray[np.float64], "candidates edges"]

_MIN_DEVIATION = 1e-12
"""Smaller standard deviations count as this, so that divisions are defined."""


@dataclass(frozen=True)
class Prediction:
    """Normal distributions of the warped losses of several candidates in one objective."""

    mean: Vector
    deviation: Vector
    """Standard deviations; all 0 for an objective that is known exactly."""
    warping: Warping = field(default_factory=Warping)

    @property
    def median(self) -> Vector:
        """The median losses, not warped."""
        return self.warping.unwarp(self.mean)

    def expected_improvement(self, edges: NDArray[np.float64], exploration: float = 1.0) -> Lengths:
        """Return E[(edge − loss)⁺] for each candidate and each edge, both warped.

        exploration: a factor for the standard deviations.
        """
        distance = edges[None, :] - self.mean[:, None]
        if not self.deviation.any():
            return np.asarray(np.maximum(distance, 0.0))
        deviation = np.maximum(exploration * self.deviation, _MIN_DEVIATION)[:, None]
        z = distance / deviation
        return np.asarray(deviation * (z * scipy.special.ndtr(z) + np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)))

    def probability_below(self, edges: NDArray[np.float64]) -> Lengths:
        """Return P(loss < edge) for each candidate and each edge, both warped."""
        distance = edges[None, :] - self.mean[:, None]
        if not self.deviation.any():
            return np.asarray(distance > 0, dtype=np.float64)
        return np.asarray(scipy.special.ndtr(distance / np.maximum(self.deviation, _MIN_DEVIATION)[:, None]))


def expected_improvement(
    front: Points,
    reference: NDArray[np.float64],
    predictions: Sequence[Prediction],
    exploration: float = 1.0,
) -> Vector:
    """Return the expected hypervolume improvement of candidates.

    predictions: one per objective, assumed to be independent. front, reference: warped losses; smaller is better.

    The region below the reference that the front does not dominate is divided into boxes. A candidate adds to each box
    the part between itself and the upper corner, whose expected edge lengths are in closed form (Yang et al. 2019,
    doi:10.1016/j.swevo.2018.10.007).
    """
    low, high = cells(front, reference)
    volumes = np.ones((len(predictions[0].mean), len(low)))
    for column, prediction in enumerate(predictions):
        corners = np.concatenate([low[:, column], high[:, column]])
        edges, indices = np.unique(corners, return_inverse=True)
        finite = np.isfinite(edges)
        lengths = np.zeros((len(prediction.mean), len(edges)))  # no loss is below minus infinity
        lengths[:, finite] = prediction.expected_improvement(edges[finite], exploration)
        volumes *= lengths[:, indices[len(low) :]] - lengths[:, indices[: len(low)]]
    return np.asarray(np.maximum(volumes, 0.0).sum(axis=1))


def probability_of_improvement(
    front: Points, limits: NDArray[np.float64], predictions: Sequence[Prediction]
) -> Vector:
    """Return an upper bound of the probability that a candidate keeps the limits and no member dominates it.

    The bound is the smallest probability over single members and single limits; it is exact if only one objective is
    uncertain. front, limits: warped losses.
    """
    dominated = np.ones((len(predictions[0].mean), len(front)))
    within = np.ones(len(predictions[0].mean))
    for column, prediction in enumerate(predictions):
        dominated *= 1 - prediction.probability_below(front[:, column])
        if prediction.deviation.any():
            limit = limits[column : column + 1]
            within = np.minimum(within, prediction.probability_below(limit)[:, 0])
    return np.asarray(np.minimum(within, 1 - dominated.max(axis=1, initial=0.0)))


def cells(front: Points, reference: NDArray[np.float64]) -> tuple[Points, Points]:
    """Divide the region below the reference that the front does not dominate into boxes.

    Returns the lower and upper corners of boxes that touch and do not overlap; lower corners can be minus infinity.
    """
    return _slabs(front[(front < reference).all(axis=1)], reference)


def _slabs(points: Points, reference: NDArray[np.float64]) -> tuple[Points, Points]:
    """Divide along the last objective: between two neighbouring values the same points dominate."""
    if len(reference) == 1:
        best = points.min() if len(points) else reference[0]
        return np.array([[-np.inf]]), np.array([[best]])
    if len(reference) == 2:
        return _staircase(points, reference)
    edges = [-np.inf, *np.unique(points[:, -1]), reference[-1]]
    lows, highs = [], []
    for start, end in itertools.pairwise(edges):
        low, high = _slabs(points[points[:, -1] <= start][:, :-1], reference[:-1])
        lows.append(np.column_stack([low, np.full(len(low), start)]))
        highs.append(np.column_stack([high, np.full(len(high), end)]))
    return np.concatenate(lows), np.concatenate(highs)


def _staircase(points: Points, reference: NDArray[np.float64]) -> tuple[Points, Points]:
    """Divide the region of two objectives into one box per step of the front."""
    points = points[np.lexsort((points[:, 0], points[:, 1]))]
    best = np.minimum.accumulate(np.append(reference[0], points[:, 0]))
    steps = best[1:] < best[:-1]
    heights = points[steps, 1]
    right = np.append(reference[0], points[steps, 0])
    low = np.column_stack([np.full(len(right), -np.inf), np.append(-np.inf, heights)])
    high = np.column_stack([right, np.append(heights, reference[1])])
    return low, high
