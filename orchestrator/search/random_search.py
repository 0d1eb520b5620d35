"""Random search: uniform choices within the limits, the baseline of every other algorithm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jobs.knobs import Value
from orchestrator.pareto.front import Objective
from orchestrator.search.proposals import Proposals, uniform
from orchestrator.search.search import Choices, KnownMetrics, Result, Space


class RandomSearch:
    """Learns nothing from results."""

    def __init__(
        self, space: Space, objectives: Sequence[Objective], known_metrics: KnownMetrics, seed: int
    ) -> None:
        self._space = space
        self._proposals = Proposals(objectives, known_metrics)
        self._generator = np.random.default_rng(seed)

    def ask(self, n: int) -> list[dict[str, Value]]:
        return self._proposals.draw(n, lambda: uniform(self._space, self._generator))

    def tell(self, results: Sequence[Result]) -> None:
        self._proposals.new_results(results)

    def probability_of_improvement(self, pending: Sequence[Choices]) -> list[float]:
        return [1.0] * len(pending)
