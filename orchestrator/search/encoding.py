"""Encoding: choices as points of a unit cube, and random points for a search."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from jobs.knobs import Choice, Domain, Range, Value
from orchestrator.search.search import Choices, Space

MAX_STEPPED_VALUES = 16
"""Knobs with at most this number of values change by steps between neighbours, others by a share of their range."""
_CROSSOVER_PROBABILITY = 0.3
"""Share of neighbours with two parents. This constant and the next five were chosen by hand."""
_MEAN_CHANGES = 1.5
"""Mean number of changed knobs of a neighbour; at least one changes."""
_LOCAL_PROBABILITY = 0.7
"""Probability that a changed ordered knob moves to a nearby value; else it is drawn from the whole range."""
_STEP_PROBABILITY = 0.7
"""Parameter of the geometric distribution of steps along the values: most changes are a single step."""
_RANGE_DEVIATIONS = (0.03, 0.15)
"""Standard deviations of changes, as shares of a range: fine ones and coarse ones."""
_LEVEL_DEVIATIONS = (0.0, 0.1, 0.3)
"""Standard deviations of knobs around the common level of a levelled point."""

Points = Float[NDArray[np.float64], "points knobs"]
Active = Bool[NDArray[np.bool_], "points knobs"]


@dataclass(frozen=True)
class Axis:
    """One knob as numbers from 0 to 1, its positions; ordered values have ascending positions."""

    name: str
    domain: Domain
    values: tuple[Value, ...]
    """The values of a choice, in the order of their positions; empty for a range."""
    count: int
    """Number of values; 0 for a continuous range."""
    ordered: bool
    parent: tuple[int, float] | None = None
    """The column and the position of another knob that this one requires to be active."""
    hint: bool = False
    """Not a knob, but a number that is predicted from all knobs."""

    def position(self, value: Value) -> float:
        """Return the position of a value. ValueError if it is outside the domain."""
        if isinstance(self.domain, Choice):
            for index, choice in enumerate(self.values):
                if value in Choice((choice,)):
                    return index / max(self.count - 1, 1)
            raise ValueError(f"{self.name}={value} is not in {self.domain}")
        low, high, number = float(self.domain.low), float(self.domain.high), float(value)
        if high <= low:
            return 0.0
        if self.domain.log:
            return math.log(number / low) / math.log(high / low)
        return (number - low) / (high - low)

    def value(self, position: float) -> Value:
        return self.values_at(np.array([position]))[0]

    def values_at(self, positions: NDArray[np.float64]) -> list[Value]:
        if isinstance(self.domain, Choice):
            indices = np.round(positions * (self.count - 1)).astype(np.intp)
            return [self.values[index] for index in indices.tolist()]
        return [self._number(position) for position in positions.tolist()]

    def _number(self, position: float) -> Value:
        assert isinstance(self.domain, Range)
        low, high = float(self.domain.low), float(self.domain.high)
        number = low * (high / low) ** position if self.domain.log else low + position * (high - low)
        if self.domain.integer:
            number = round(number)
        return self.domain.normal(min(max(number, self.domain.low), self.domain.high))

    def round(self, positions: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the positions of the nearest values."""
        if self.count == 0:
            return positions
        if isinstance(self.domain, Choice):
            return np.asarray(np.round(positions * (self.count - 1)) / max(self.count - 1, 1))
        low, high = float(self.domain.low), float(self.domain.high)
        if high <= low:
            return np.zeros_like(positions)
        if self.domain.log:
            numbers = np.clip(np.round(low * (high / low) ** positions), low, high)
            return np.asarray(np.log(numbers / low) / math.log(high / low))
        numbers = np.clip(np.round(low + positions * (high - low)), low, high)
        return np.asarray((numbers - low) / (high - low))


class SpaceEncoder:
    """Encodes choices of a space as points, and draws random points.

    Equivalent choices are the same point: a knob A.B.C (or A.B.C.D) is active only if the knob A has the value B, and
    is at position 0 otherwise.
    """

    def __init__(self, space: Space) -> None:
        self.axes = _axes(space)
        self._variable = np.array([axis.count != 1 for axis in self.axes])

    def none(self) -> Points:
        """Return an array of no points."""
        return np.zeros((0, len(self.axes)))

    def point(self, choices: Choices) -> NDArray[np.float64]:
        """Return the point of these choices. ValueError for a value outside the space, LookupError for none."""
        positions = np.array([[axis.position(choices[axis.name]) for axis in self.axes]])
        return np.asarray(np.where(self.active(positions), positions, 0.0)[0])

    def canonical(self, choices: Choices) -> dict[str, Value]:
        """Return the choices with inactive knobs at their first value; unchanged if they are outside the space."""
        try:
            active = self.active(self.point(choices)[None])[0]
        except (ValueError, LookupError):
            return dict(choices)
        return {
            axis.name: choices[axis.name] if is_active else axis.value(0.0)
            for axis, is_active in zip(self.axes, active, strict=True)
        }

    def choices(self, point: NDArray[np.float64]) -> dict[str, Value]:
        return self.choices_at(point[None])[0]

    def choices_at(self, points: Points) -> list[dict[str, Value]]:
        """Return the choices of each point. It decodes knob by knob, which is faster for many points."""
        names = [axis.name for axis in self.axes]
        columns = [axis.values_at(points[:, column]) for column, axis in enumerate(self.axes)]
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]

    def active(self, points: Points) -> Active:
        """Return whether each knob has an effect."""
        active = np.ones(points.shape, dtype=np.bool_)
        for column, axis in enumerate(self.axes):
            if axis.parent is not None:
                active[:, column] = np.abs(points[:, axis.parent[0]] - axis.parent[1]) < 1e-9
        return active

    def uniform(self, count: int, generator: np.random.Generator) -> Points:
        """Draw points whose knobs are independent and uniform."""
        points = generator.random((count, len(self.axes)))
        for column, axis in enumerate(self.axes):
            if axis.count and (isinstance(axis.domain, Choice) or not axis.domain.log):
                # All values are equally likely, the first and the last included.
                points[:, column] = generator.integers(axis.count, size=count) / max(axis.count - 1, 1)
        return self._rounded(points)

    def levelled(self, count: int, generator: np.random.Generator) -> Points:
        """Draw points whose ordered knobs are all near one level, which differs from point to point.

        Sums over many independent knobs are nearly the same for all uniform points; for levelled points they vary.
        """
        points = self.uniform(count, generator)
        offsets = generator.normal(size=points.shape) * generator.choice(_LEVEL_DEVIATIONS, size=(count, 1))
        levels = generator.random((count, 1)) + offsets
        ordered = np.array([axis.ordered for axis in self.axes])
        points[:, ordered] = np.clip(levels, 0.0, 1.0)[:, ordered]
        return self._rounded(points)

    def neighbours(self, parents: Points, count: int, generator: np.random.Generator) -> Points:
        """Draw points that differ from a parent in one or some knobs. Some have two parents, knob by knob at random.

        Most changes of an ordered knob are small; an unordered one takes any value.
        """
        first, second = generator.integers(len(parents), size=(2, count))
        points = parents[first].copy()
        has_two_parents = (generator.random(count) < _CROSSOVER_PROBABILITY)[:, None]
        crossed = has_two_parents & (generator.random(points.shape) < 0.5)
        points[crossed] = parents[second][crossed]
        active = self.active(points) & self._variable
        rate = np.minimum(_MEAN_CHANGES / np.maximum(active.sum(axis=1), 1), 0.7)[:, None]
        draws = generator.random(points.shape) * active
        changed = active & ((draws >= 1 - rate) | (draws == draws.max(axis=1, keepdims=True)))
        uniform = generator.random(points.shape)
        for column, axis in enumerate(self.axes):
            rows = np.flatnonzero(changed[:, column])
            moved = uniform[rows, column]
            if axis.ordered and axis.count != 2:
                is_local = generator.random(len(rows)) < _LOCAL_PROBABILITY
                step = _steps(axis, len(rows), generator)
                moved = np.where(is_local, points[rows, column] + step, moved)
            points[rows, column] = moved
        points = np.clip(points, 0.0, 1.0)
        # Knobs that became active by a change of their parent are at position 0: draw them as well.
        activated = self.active(self._rounded(points)) & self._variable & ~active
        points[activated] = uniform[activated]
        return self._rounded(points)

    def _rounded(self, points: Points) -> Points:
        """Move the points, in place, to the nearest values, and inactive knobs to position 0."""
        for column, axis in enumerate(self.axes):
            points[:, column] = axis.round(points[:, column])
        points[~self.active(points)] = 0.0
        return points


def _steps(axis: Axis, count: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Draw local changes of an ordered knob."""
    if 0 < axis.count <= MAX_STEPPED_VALUES:
        sign = np.where(generator.random(count) < 0.5, -1.0, 1.0)
        return np.asarray(sign * generator.geometric(_STEP_PROBABILITY, size=count) / (axis.count - 1))
    return np.asarray(generator.choice(_RANGE_DEVIATIONS, size=count) * generator.normal(size=count))


def _axes(space: Space) -> list[Axis]:
    axes = [_axis(name, domain) for name, domain in space.items()]
    return [dataclasses.replace(axis, parent=_parent(axis.name, axes)) for axis in axes]


def _axis(name: str, domain: Domain) -> Axis:
    if isinstance(domain, Choice):
        values = tuple(sorted(domain.values)) if domain.ordered else domain.values
        return Axis(name, domain, values, len(values), domain.ordered)
    if domain.low == domain.high:
        return Axis(name, domain, (), 1, True)
    count = 0
    if domain.integer:
        count = math.floor(domain.high) - math.ceil(domain.low) + 1
    return Axis(name, domain, (), count, True)


def _parent(name: str, axes: Sequence[Axis]) -> tuple[int, float] | None:
    """The column of the knob A and its position at B, for a knob called A.B.C or A.B.C.D; None without such a knob."""
    parent, *parts = name.split(".")
    for column, axis in enumerate(axes):
        if axis.name == parent:
            for length in range(len(parts) - 1, 0, -1):
                value = ".".join(parts[:length])
                if value in axis.values:
                    return column, axis.position(value)
            return None
    return None
