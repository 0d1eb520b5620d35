"""Survey: what is known of choices before they are measured, and the rows by which beliefs compare them."""

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
from orchestrator.search.search import SECONDS, Known

_DRAWN = 100
"""So many choices of each kind stand for all."""

_HELD = 2_000
"""So many rows are remembered, about."""
_LEAST_SECONDS = 1e-3
_FAR = 10.0
"""Hints that differ by such a factor are compared by their ratios."""

Hints = Float[NDArray[np.float64], "points hints"]
Losses = Float[NDArray[np.float64], "points objectives"]


@dataclass(frozen=True)
class Pool:
    """Choices as points; known: their losses, NaN where they have to be measured; seconds: what trying each would take,
    1 where nothing is known of that."""

    points: Points
    rows: Rows
    known: Losses
    seconds: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.points)

    def take(self, which: NDArray[np.intp] | NDArray[np.bool_]) -> Pool:
        return Pool(self.points[which], self.rows[which], self.known[which], self.seconds[which])

    def joined(self, other: Pool) -> Pool:
        return Pool(
            np.concatenate([self.points, other.points]),
            np.concatenate([self.rows, other.rows]),
            np.concatenate([self.known, other.known]),
            np.concatenate([self.seconds, other.seconds]),
        )


class CandidateEvaluator:
    """Which objectives are known beforehand shows as they appear. They are features too, beside the knobs: what has to
    be measured mostly goes with them (quality with size), and that is learned from few results. So are hints, whatever
    else is known from the start: what is measured is then learned as what it does beside them.

    everywhere: some choices of the whole space, drawn without looking at results.
    """

    def __init__(
        self,
        places: SpaceEncoder,
        objectives: Sequence[Objective],
        known: Known,
        generator: np.random.Generator,
    ) -> None:
        self._places = places
        self._objectives = tuple(objectives)
        self._known = known
        self._limits = np.array([np.inf if o.limit is None else o.loss(o.limit) for o in objectives])
        self._lines: dict[int, Axis] = {}
        self.foreknown: Bool[NDArray[np.bool_], " objectives"] = np.zeros(len(objectives), dtype=np.bool_)
        drawn = places.uniform(_DRAWN, generator), places.levelled(_DRAWN, generator)
        self._everywhere = np.concatenate(drawn)
        told = self._told(self._everywhere)
        self._hints = self._hinting(told)
        self._held: dict[bytes, NDArray[np.float64]] = {}
        self.features = Features([*places.axes, *self._hints.values()])
        self.everywhere = self._entered(self._everywhere, told)

    def enter(self, points: Points) -> Pool:
        return self._entered(points, self._told(points))

    def rows(self, points: Points) -> Rows:
        """The rows of points that are asked for again and again, such as what was told: each is made once."""
        marks = [point.tobytes() for point in points]
        if len(self._held) > _HELD:
            self._held = {}
        new = {mark: point for mark, point in zip(marks, points, strict=True) if mark not in self._held}
        if new:
            self._held |= dict(zip(new, self.enter(np.array(list(new.values()))).rows, strict=True))
        return np.array([self._held[mark] for mark in marks])

    def _told(self, points: Points) -> list[Mapping[str, float]]:
        return [self._known(choices) for choices in self._places.choices_at(points)]

    def _entered(self, points: Points, told: Sequence[Mapping[str, float]]) -> Pool:
        losses = [
            [o.loss(values[o.metric]) if o.metric in values else np.nan for o in self._objectives]
            for values in told
        ]
        known = np.array(losses, dtype=np.float64).reshape(len(points), len(self._objectives))
        seconds = np.array([max(values.get(SECONDS, 1.0), _LEAST_SECONDS) for values in told])
        hints = np.array([[one.get(name, np.nan) for name in self._hints] for one in told], dtype=np.float64)
        return Pool(
            points, self._rows(points, known, hints.reshape(len(points), len(self._hints))), known, seconds
        )

    def _hinting(self, told: Sequence[Mapping[str, float]]) -> dict[str, Axis]:
        """A line for each hint, over what it is anywhere; of ratios where these are far apart."""
        metrics = {SECONDS, *(objective.metric for objective in self._objectives)}
        found = {}
        for name in sorted({name for one in told for name in one} - metrics):
            values = np.array([one[name] for one in told if math.isfinite(one.get(name, math.nan))])
            above = values[values > 0]
            log = len(above) > 0 and values.min() >= 0 and values.max() > _FAR * above.min()
            low, high = float((above if log else values).min()), float(values.max())
            if low < high:
                found[name] = Axis(name, Range(low, high, log=log), (), 0, ordered=True, hint=True)
        return found

    def discovers(self, pool: Pool) -> bool:
        """Whether an objective turns out to be known that was not. Then rows are made otherwise than before: what was
        entered until now is to be entered anew, this pool too."""
        found = np.isfinite(pool.known).any(axis=0) & ~self.foreknown
        if not found.any():
            return False
        self.foreknown = self.foreknown | found
        known = self.enter(np.concatenate([self._everywhere, pool.points])).known
        for column in np.flatnonzero(self.foreknown):
            low, high = float(np.nanmin(known[:, column])), float(np.nanmax(known[:, column]))
            if low < high:
                self._lines[int(column)] = Axis(
                    self._objectives[column].metric, Range(low, high), (), 0, ordered=True
                )
        self.features = Features([*self._places.axes, *self._hints.values(), *self._lines.values()])
        self.everywhere = self.enter(self._everywhere)
        self._held = {}
        return True

    def within(self, pool: Pool) -> Pool:
        """Without what breaks a limit that is known, or lacks what is known of others: no such model can be made."""
        good = np.isfinite(pool.known) & (pool.known <= self._limits) | ~self.foreknown
        return pool.take(np.asarray(good.all(axis=1)))

    def _rows(self, points: Points, known: Losses, hints: Hints) -> Rows:
        lines = [
            np.nan_to_num((known[:, column] - axis.domain.low) / (axis.domain.high - axis.domain.low))
            for column, axis in self._lines.items()
            if isinstance(axis.domain, Range)
        ]
        acting = np.ones((len(points), len(lines)), dtype=np.bool_)
        places = [_along(line, hints[:, at]) for at, line in enumerate(self._hints.values())]
        return self.features.rows(
            np.column_stack([points, *places, *lines]),
            np.column_stack([self._places.active(points), np.isfinite(hints), acting]),
        )


def _along(line: Axis, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Places on a hint's line, its ends for what lies beyond them; 0 where there is no hint."""
    assert isinstance(line.domain, Range)
    low, high = float(line.domain.low), float(line.domain.high)
    clipped = np.nan_to_num(np.clip(values, low, high), nan=low)
    if line.domain.log:
        return np.asarray(np.log(clipped / low) / math.log(high / low))
    return np.asarray((clipped - low) / (high - low))
