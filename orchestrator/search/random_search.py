"""Random search: uniform choices within the limits. The yardstick for every other algorithm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jobs.knobs import Value
from orchestrator.pareto.front import Objective
from orchestrator.search.proposals import Proposals, uniform
from orchestrator.search.search import Choices, Known, Result, Space


class RandomSearch:
    def __init__(self, space: Space, objectives: Sequence[Objective], known: Known, seed: int) -> None:
        self._space = space
        self._proposals = Proposals(objectives, known)
        self._generator = np.random.default_rng(seed)

    def ask(self, n: int) -> list[dict[str, Value]]:
        return self._proposals.draw(n, lambda: uniform(self._space, self._generator))

    def tell(self, results: Sequence[Result]) -> None:
        self._proposals.news(results)

    def probability_of_improvement(self, awaited: Sequence[Choices]) -> list[float]:
        return [1.0] * len(awaited)
