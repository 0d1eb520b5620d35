"""Places: choices as points. What a surrogate compares choices by, and how it gets from one to the next."""

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

MANY = 16
"""A knob with more values than that is changed by a share of its range, one with fewer by steps."""
_CROSSED = 0.3
_CHANGES = 1.5
_NEAR = 0.7
_AROUND = (0.0, 0.1, 0.3)

Points = Float[NDArray[np.float64], "points knobs"]
Active = Bool[NDArray[np.bool_], "points knobs"]


@dataclass(frozen=True)
class Axis:
    """One knob as numbers from 0 to 1, along its values' order where they have one.

    values: of a knob that takes one of some, in that order; none of a range.
    count: how many values there are; 0 where there is no end of them.
    parent: the column of a knob, and the place there, without which this knob does nothing.
    hint: whether it is no knob but what is foretold by all of them.
    """

    name: str
    domain: Domain
    values: tuple[Value, ...]
    count: int
    ordered: bool
    parent: tuple[int, float] | None = None
    hint: bool = False

    def place(self, value: Value) -> float:
        """Raises ValueError for a value outside the domain."""
        if isinstance(self.domain, Choice):
            same = (at for at, known in enumerate(self.values) if value in Choice((known,)))
            at = next(same, None)
            if at is None:
                raise ValueError(f"{self.name}={value} is not in {self.domain}")
            return at / max(self.count - 1, 1)
        low, high, number = float(self.domain.low), float(self.domain.high), float(value)
        if high <= low:
            return 0.0
        if self.domain.log:
            return math.log(number / low) / math.log(high / low)
        return (number - low) / (high - low)

    def value(self, place: float) -> Value:
        return self.values_at(np.array([place]))[0]

    def values_at(self, places: NDArray[np.float64]) -> list[Value]:
        if isinstance(self.domain, Choice):
            indices = np.round(places * (self.count - 1)).astype(np.intp)
            return [self.values[index] for index in indices.tolist()]
        return [self._number(place) for place in places.tolist()]

    def _number(self, place: float) -> Value:
        assert isinstance(self.domain, Range)
        low, high = float(self.domain.low), float(self.domain.high)
        number = low * (high / low) ** place if self.domain.log else low + place * (high - low)
        number = min(max(round(number) if self.domain.integer else number, self.domain.low), self.domain.high)
        return self.domain.normal(number)

    def settled(self, places: NDArray[np.float64]) -> NDArray[np.float64]:
        """Each place moved to that of the nearest value."""
        if self.count == 0:
            return places
        if isinstance(self.domain, Choice):
            return np.asarray(np.round(places * (self.count - 1)) / max(self.count - 1, 1))
        low, high = float(self.domain.low), float(self.domain.high)
        if high <= low:
            return np.zeros_like(places)
        if self.domain.log:
            whole = np.clip(np.round(low * (high / low) ** places), low, high)
            return np.asarray(np.log(whole / low) / math.log(high / low))
        return np.asarray((np.clip(np.round(low + places * (high - low)), low, high) - low) / (high - low))


class SpaceEncoder:
    """A space as a cube. Choices that mean the same are one point: a knob A.B.C (or A.B.C.D) acts only where the knob A
    is B, and stands at its first value elsewhere."""

    def __init__(self, space: Space) -> None:
        self.axes = _axes(space)
        self._free = np.array([axis.count != 1 for axis in self.axes])

    def none(self) -> Points:
        return np.zeros((0, len(self.axes)))

    def point(self, choices: Choices) -> NDArray[np.float64]:
        """Raises ValueError, or LookupError for a knob that is missing, where the choices are none of the space."""
        raw = np.array([[axis.place(choices[axis.name]) for axis in self.axes]])
        return np.asarray(np.where(self.active(raw), raw, 0.0)[0])

    def acting(self, choices: Choices) -> dict[str, Value]:
        """The same choices, with knobs that do nothing at their first value; as they are where they are none of the
        space."""
        try:
            acts = self.active(self.point(choices)[None])[0]
        except (ValueError, LookupError):
            return dict(choices)
        return {
            axis.name: choices[axis.name] if does else axis.value(0.0)
            for axis, does in zip(self.axes, acts, strict=True)
        }

    def choices(self, point: NDArray[np.float64]) -> dict[str, Value]:
        return self.choices_at(point[None])[0]

    def choices_at(self, points: Points) -> list[dict[str, Value]]:
        """Of each point; knob by knob, which takes a fraction of the time where points are many."""
        names = [axis.name for axis in self.axes]
        columns = [axis.values_at(points[:, column]) for column, axis in enumerate(self.axes)]
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]

    def active(self, points: Points) -> Active:
        """Which knobs do something."""
        found = np.ones(points.shape, dtype=np.bool_)
        for column, axis in enumerate(self.axes):
            if axis.parent is not None:
                found[:, column] = np.abs(points[:, axis.parent[0]] - axis.parent[1]) < 1e-9
        return found

    def uniform(self, count: int, generator: np.random.Generator) -> Points:
        points = generator.random((count, len(self.axes)))
        for column, axis in enumerate(self.axes):
            if axis.count and (isinstance(axis.domain, Choice) or not axis.domain.log):
                # Each value as often as another, the first and the last too.
                points[:, column] = generator.integers(axis.count, size=count) / max(axis.count - 1, 1)
        return self._settled(points)

    def levelled(self, count: int, generator: np.random.Generator) -> Points:
        """Points whose ordered knobs stand near one level, each point's own. Where knobs are many, those drawn one by
        one are all alike in what adds up over them; these are spread."""
        points = self.uniform(count, generator)
        around = generator.normal(size=points.shape) * generator.choice(_AROUND, size=(count, 1))
        level = generator.random((count, 1)) + around
        ordered = np.array([axis.ordered for axis in self.axes])
        points[:, ordered] = np.clip(level, 0.0, 1.0)[:, ordered]
        return self._settled(points)

    def neighbours(self, parents: Points, count: int, generator: np.random.Generator) -> Points:
        """Parents, crossed with another now and then, with one knob or some changed: by a little where it has an order,
        to anything else."""
        first, second = generator.integers(len(parents), size=(2, count))
        points = parents[first].copy()
        crossed = (generator.random(count) < _CROSSED)[:, None] & (generator.random(points.shape) < 0.5)
        points[crossed] = parents[second][crossed]
        acting = self.active(points) & self._free
        rate = np.minimum(_CHANGES / np.maximum(acting.sum(axis=1), 1), 0.7)[:, None]
        lot = generator.random(points.shape) * acting
        changed = acting & ((lot >= 1 - rate) | (lot == lot.max(axis=1, keepdims=True)))
        anywhere = generator.random(points.shape)
        for column, axis in enumerate(self.axes):
            rows = np.flatnonzero(changed[:, column])
            moved = anywhere[rows, column]
            if axis.ordered and axis.count != 2:
                near = generator.random(len(rows)) < _NEAR
                step = _steps(axis, len(rows), generator)
                moved = np.where(near, points[rows, column] + step, moved)
            points[rows, column] = moved
        points = np.clip(points, 0.0, 1.0)
        # A knob that its parent's change woke stands at its first value: it may be anywhere.
        woken = self.active(self._settled(points)) & self._free & ~acting
        points[woken] = anywhere[woken]
        return self._settled(points)

    def _settled(self, points: Points) -> Points:
        """On values, and what does nothing at its first."""
        for column, axis in enumerate(self.axes):
            points[:, column] = axis.settled(points[:, column])
        points[~self.active(points)] = 0.0
        return points


def _steps(axis: Axis, count: int, generator: np.random.Generator) -> NDArray[np.float64]:
    if 0 < axis.count <= MANY:
        sign = np.where(generator.random(count) < 0.5, -1.0, 1.0)
        return np.asarray(sign * generator.geometric(0.7, size=count) / (axis.count - 1))
    return np.asarray(generator.choice((0.03, 0.15), size=count) * generator.normal(size=count))


def _axes(space: Space) -> list[Axis]:
    plain = [_axis(name, domain) for name, domain in space.items()]
    return [dataclasses.replace(axis, parent=_parent(axis.name, plain)) for axis in plain]


def _axis(name: str, domain: Domain) -> Axis:
    if isinstance(domain, Choice):
        values = tuple(sorted(domain.values)) if domain.ordered else domain.values
        return Axis(name, domain, values, len(values), domain.ordered)
    if domain.low == domain.high:
        return Axis(name, domain, (), 1, True)
    whole = math.floor(domain.high) - math.ceil(domain.low) + 1
    return Axis(name, domain, (), whole if domain.integer else 0, True)


def _parent(name: str, axes: Sequence[Axis]) -> tuple[int, float] | None:
    """Of a knob called A.B.C or A.B.C.D, the knob A at B, where there is such a one."""
    first, *rest = name.split(".")
    column = next((column for column, axis in enumerate(axes) if axis.name == first), None)
    if column is None:
        return None
    values = (".".join(rest[:length]) for length in range(len(rest) - 1, 0, -1))
    value = next((value for value in values if value in axes[column].values), None)
    return None if value is None else (column, axes[column].place(value))
