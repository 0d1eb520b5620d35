"""Improvement: how much more volume a candidate is expected to add to what a front dominates."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.special import ndtr

from orchestrator.pareto.warping import Scale

Points = Float[NDArray[np.float64], "points objectives"]
Vector = Float[NDArray[np.float64], " candidates"]
Lengths = Float[NDArray[np.float64], "candidates edges"]


@dataclass(frozen=True)
class Expected:
    """What the losses of some candidates in one objective are believed to be: normal with that mean and deviation, of
    the losses as seen on that scale; known where the deviations are 0."""

    mean: Vector
    deviation: Vector
    scale: Scale = field(default_factory=Scale)

    @property
    def median(self) -> Vector:
        """In losses."""
        return self.scale.losses(self.mean)

    def below(self, edges: NDArray[np.float64], boldness: float = 1.0) -> Lengths:
        """E[(edge − loss)⁺] for each candidate and each edge, both on the scale; deviations are taken
        as so many times themselves."""
        away = edges[None, :] - self.mean[:, None]
        if not self.deviation.any():
            return np.asarray(np.maximum(away, 0.0))
        spread = np.maximum(boldness * self.deviation, 1e-12)[:, None]
        at = away / spread
        return np.asarray(spread * (at * ndtr(at) + np.exp(-0.5 * at**2) / np.sqrt(2 * np.pi)))

    def chance_below(self, edges: NDArray[np.float64]) -> Lengths:
        """The probability for each candidate and each edge, both on the scale, that the loss is below it."""
        away = edges[None, :] - self.mean[:, None]
        if not self.deviation.any():
            return np.asarray(away > 0, dtype=np.float64)
        return np.asarray(ndtr(away / np.maximum(self.deviation, 1e-12)[:, None]))


def expected_improvement(
    front: Points, reference: NDArray[np.float64], candidates: Sequence[Expected], boldness: float = 1.0
) -> Vector:
    """The expected hypervolume improvement of candidates, one `Expected` for each objective, all independent.

    What the front leaves below the reference is cut into boxes; a candidate adds to each the part between itself and
    the box's upper corner, whose expected lengths are in closed form (Yang et al. 2019,
    doi:10.1016/j.swevo.2018.10.007). Losses: smaller is better; all on the candidates' scales.
    """
    low, high = cells(front, reference)
    total = np.ones((len(candidates[0].mean), len(low)))
    for column, one in enumerate(candidates):
        edges, places = np.unique(np.concatenate([low[:, column], high[:, column]]), return_inverse=True)
        finite = np.isfinite(edges)
        lengths = np.zeros((len(one.mean), len(edges)))  # nothing is below minus infinity
        lengths[:, finite] = one.below(edges[finite], boldness)
        total *= lengths[:, places[len(low) :]] - lengths[:, places[: len(low)]]
    return np.asarray(np.maximum(total, 0.0).sum(axis=1))


def chance_to_add(front: Points, limits: NDArray[np.float64], candidates: Sequence[Expected]) -> Vector:
    """How likely each candidate is at most to keep the limits and to be beaten by no member of the front: as likely as
    with the one member, or the one limit, that leaves the least chance. Where one objective is uncertain that is exact.
    """
    beaten = np.ones((len(candidates[0].mean), len(front)))
    keeps = np.ones(len(candidates[0].mean))
    for column, one in enumerate(candidates):
        beaten *= 1 - one.chance_below(front[:, column])
        if one.deviation.any():
            keeps = np.minimum(keeps, one.chance_below(limits[column : column + 1])[:, 0])
    return np.asarray(np.minimum(keeps, 1 - beaten.max(axis=1, initial=0.0)))


def cells(front: Points, reference: NDArray[np.float64]) -> tuple[Points, Points]:
    """Boxes, as lower and upper corners, that fill what no point of the front dominates below the reference. They
    touch and do not overlap; their lower corners reach to minus infinity."""
    return _swept(front[(front < reference).all(axis=1)], reference)


def _swept(points: Points, reference: NDArray[np.float64]) -> tuple[Points, Points]:
    """Slab by slab along the last objective: between two neighbours' values the same points matter."""
    if len(reference) == 1:
        best = points.min() if len(points) else reference[0]
        return np.array([[-np.inf]]), np.array([[best]])
    if len(reference) == 2:
        return _staircase(points, reference)
    edges = [-np.inf, *np.unique(points[:, -1]), reference[-1]]
    lows, highs = [], []
    for start, end in itertools.pairwise(edges):
        low, high = _swept(points[points[:, -1] <= start][:, :-1], reference[:-1])
        lows.append(np.column_stack([low, np.full(len(low), start)]))
        highs.append(np.column_stack([high, np.full(len(high), end)]))
    return np.concatenate(lows), np.concatenate(highs)


def _staircase(points: Points, reference: NDArray[np.float64]) -> tuple[Points, Points]:
    points = points[np.lexsort((points[:, 0], points[:, 1]))]
    best = np.minimum.accumulate(np.append(reference[0], points[:, 0]))
    steps = best[1:] < best[:-1]
    heights = points[steps, 1]
    right = np.append(reference[0], points[steps, 0])
    low = np.column_stack([np.full(len(right), -np.inf), np.append(-np.inf, heights)])
    high = np.column_stack([right, np.append(heights, reference[1])])
    return low, high
