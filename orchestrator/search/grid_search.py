"""Grid search: all choices of a grid once, in an order whose first ones are spread over the whole space."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from jobs.knobs import Choice, Domain, Value
from orchestrator.pareto.front import Objective
from orchestrator.search.proposals import Proposals
from orchestrator.search.search import Choices, KnownMetrics, Result, Space

VALUES = 9
"""Number of grid values of a range that has more values: evenly spaced (by ratio on a logarithmic scale), with both
ends."""


class GridSearch:
    """Proposes all choices of the grid and learns nothing from results.

    The choices at each index are computed, and the grid is never stored. Limits are checked when choices come up; if
    hardly any choices are within them, `proposals.TRIES` others in a row end the search early.
    """

    def __init__(
        self, space: Space, objectives: Sequence[Objective], known_metrics: KnownMetrics, seed: int
    ) -> None:
        self._proposals = Proposals(objectives, known_metrics)
        self._values = {knob: _values(domain) for knob, domain in space.items()}
        self._size = math.prod(len(values) for values in self._values.values())
        self._seed = seed
        self._index = 0
        self._any_within_limits = False

    def ask(self, n: int) -> list[dict[str, Value]]:
        proposals: list[dict[str, Value]] = []
        while len(proposals) < n and self._index < self._size:
            try:
                proposals += self._proposals.draw(1, self._next)
            except LookupError:
                if not self._any_within_limits:
                    raise
                break
            self._any_within_limits = self._any_within_limits or bool(proposals)
        return proposals

    def tell(self, results: Sequence[Result]) -> None:
        self._proposals.new_results(results)

    def probability_of_improvement(self, pending: Sequence[Choices]) -> list[float]:
        return [1.0] * len(pending)

    def _next(self) -> dict[str, Value]:
        choices = self._at(self._index % self._size)
        self._index += 1
        return choices

    def _at(self, index: int) -> dict[str, Value]:
        """The choices at this index of the order. Each combination has exactly one index.

        The index is a number in mixed radix with one digit per knob, the fastest first. Each digit is shifted by a
        number that depends on the faster digits alone, which is a permutation of all combinations. The shifts pass
        through all values of the knob in random orders, so that slow digits vary from the start.
        """
        choices, slower, faster = {}, index, 1
        for number, (knob, values) in enumerate(self._values.items()):
            count = len(values)
            cycle, step = divmod(index % faster, count)
            shift = int(np.random.default_rng((self._seed, number, cycle)).permutation(count)[step])
            choices[knob] = values[(slower + shift) % count]
            slower, faster = slower // count, faster * count
        return choices


def _values(domain: Domain) -> Sequence[Value]:
    if isinstance(domain, Choice):
        return domain.values
    if domain.integer and math.floor(domain.high) - math.ceil(domain.low) < VALUES:
        return range(math.ceil(domain.low), math.floor(domain.high) + 1)
    space = np.geomspace if domain.log else np.linspace
    values = []
    for number in space(domain.low, domain.high, VALUES):
        value = float(min(max(number, domain.low), domain.high))
        values.append(domain.normal(round(value) if domain.integer else value))
    return tuple(dict.fromkeys(values))
