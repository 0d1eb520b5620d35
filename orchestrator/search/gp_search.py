"""Gaussian processes, and what a choice is expected to add to the hypervolume (Daulton et al. 2020,
arXiv:2006.05078), by Optuna."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.pareto.front import Objective
from orchestrator.search.on_optuna import Draws, OptunaSearch, gp
from orchestrator.search.search import Known, Space

FIRST = 10
"""Results before processes are fitted; Optuna's own number."""

TRIES = 2
"""Draws by the processes before a proposal turns to uniform ones. Each fits every objective anew and takes a
tenth of a second and more, and what comes out a second time is mostly what came out before."""


class GpSearch(OptunaSearch):
    """One process per objective and per limit on what was measured; outstanding choices count as far as the
    processes foretell them."""

    def __init__(self, space: Space, objectives: Sequence[Objective], known: Known, seed: int) -> None:
        super().__init__(space, objectives, known, seed, Draws(gp(FIRST, seed), FIRST, TRIES))
