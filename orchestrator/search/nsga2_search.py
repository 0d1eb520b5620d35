"""NSGA-II (Deb et al. 2002, doi:10.1109/4235.996017) by Optuna."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.pareto.front import Objective
from orchestrator.search.on_optuna import Draws, OptunaSearch, nsga2
from orchestrator.search.search import KnownMetrics, Space

POPULATION = 20
"""Fewer than the usual 50 to 100, since an evaluation takes minutes and a study has some hundred of them."""

CHILDREN = 100
"""Maximum number of draws from the population per proposal, before uniform draws."""


class Nsga2Search(OptunaSearch):
    """The first generation is uniform; later ones descend from earlier results. Choices whose measurements break a
    limit rank behind all others."""

    def __init__(
        self, space: Space, objectives: Sequence[Objective], known_metrics: KnownMetrics, seed: int
    ) -> None:
        super().__init__(
            space, objectives, known_metrics, seed, Draws(nsga2(POPULATION, seed), POPULATION, CHILDREN)
        )
