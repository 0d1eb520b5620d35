"""NSGA-II (Deb et al. 2002, doi:10.1109/4235.996017) by Optuna."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.pareto.front import Objective
from orchestrator.search.on_optuna import Draws, OptunaSearch, nsga2
from orchestrator.search.search import Known, Space

POPULATION = 20
"""Small against the usual 50 to 100: an evaluation costs minutes, and a study has some hundred of them."""

CHILDREN = 100
"""Draws from the population before a proposal turns to uniform ones."""


class Nsga2Search(OptunaSearch):
    """The first generation is uniform; later ones are bred from what was told. A choice that breaks a limit on
    what was measured ranks behind all that keep it."""

    def __init__(self, space: Space, objectives: Sequence[Objective], known: Known, seed: int) -> None:
        super().__init__(space, objectives, known, seed, Draws(nsga2(POPULATION, seed), POPULATION, CHILDREN))
