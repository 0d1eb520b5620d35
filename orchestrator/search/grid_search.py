"""Grid search: every choice of a grid once, in an order whose beginning is spread over the whole space."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from jobs.knobs import Choice, Domain, Value
from orchestrator.pareto.front import Objective
from orchestrator.search.proposals import Proposals
from orchestrator.search.search import Choices, Known, Result, Space

VALUES = 9
"""How many values stand for a range that has more: evenly spaced, both ends among them, by ratio on a log scale."""


class GridSearch:
    """Nothing is learned from results. Once all of the grid was proposed there is nothing more to ask for.

    The grid is never held: each place in the order is computed. Limits are looked at as choices come up, so
    where hardly any choice keeps them, a long run of others ends the search early.
    """

    def __init__(self, space: Space, objectives: Sequence[Objective], known: Known, seed: int) -> None:
        self._proposals = Proposals(objectives, known)
        self._values = {knob: _values(domain) for knob, domain in space.items()}
        self._size = math.prod(len(values) for values in self._values.values())
        self._seed = seed
        self._place = 0
        self._kept = False

    def ask(self, n: int) -> list[dict[str, Value]]:
        asked: list[dict[str, Value]] = []
        while len(asked) < n and self._place < self._size:
            try:
                asked += self._proposals.draw(1, self._next)
            except LookupError:
                if not self._kept:
                    raise
                break
            self._kept = self._kept or bool(asked)
        return asked

    def tell(self, results: Sequence[Result]) -> None:
        self._proposals.news(results)

    def probability_of_improvement(self, awaited: Sequence[Choices]) -> list[float]:
        return [1.0] * len(awaited)

    def _next(self) -> dict[str, Value]:
        choices = self._at(self._place % self._size)
        self._place += 1
        return choices

    def _at(self, place: int) -> dict[str, Value]:
        """The choices at this place of the order; every combination is at exactly one.

        Place is a number in mixed radix, one digit a knob, fastest first. Each digit is shifted by some number that
        follows from the faster ones, which leaves every combination at one place. The shifts go through all of
        the knob's values, each time in another random order, so that slow digits do not stand still.
        """
        choices, slower, faster = {}, place, 1
        for number, (knob, values) in enumerate(self._values.items()):
            count = len(values)
            turn, step = divmod(place % faster, count)
            shift = int(np.random.default_rng((self._seed, number, turn)).permutation(count)[step])
            choices[knob] = values[(slower + shift) % count]
            slower, faster = slower // count, faster * count
        return choices


def _values(domain: Domain) -> Sequence[Value]:
    if isinstance(domain, Choice):
        return domain.values
    if domain.integer and math.floor(domain.high) - math.ceil(domain.low) < VALUES:
        return range(math.ceil(domain.low), math.floor(domain.high) + 1)
    space = np.geomspace if domain.log else np.linspace
    points = (
        float(min(max(point, domain.low), domain.high)) for point in space(domain.low, domain.high, VALUES)
    )
    return tuple(dict.fromkeys(domain.normal(round(point) if domain.integer else point) for point in points))
