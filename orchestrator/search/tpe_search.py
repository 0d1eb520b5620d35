"""The tree-structured Parzen estimator for several objectives (Ozaki et al. 2022,
doi:10.1613/jair.1.13188), by Optuna."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.pareto.front import Objective
from orchestrator.search.on_optuna import Draws, OptunaSearch, tpe
from orchestrator.search.search import Known, Space

FIRST = 10
"""Results before the densities of good and bad choices are told apart; Optuna's own number."""

TRIES = 20
"""Draws from the density of good choices before a proposal turns to uniform ones; each takes milliseconds."""


class TpeSearch(OptunaSearch):
    """Draws from the density of good choices where it is high against that of the others, all knobs at once.
    Outstanding choices count as bad ones meanwhile (a constant lie)."""

    def __init__(self, space: Space, objectives: Sequence[Objective], known: Known, seed: int) -> None:
        super().__init__(space, objectives, known, seed, Draws(tpe(FIRST, seed), FIRST, TRIES))
