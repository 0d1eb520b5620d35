"""Gaussian processes and expected hypervolume improvement (Daulton et al. 2020, arXiv:2006.05078) by Optuna."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.pareto.front import Objective
from orchestrator.search.on_optuna import Draws, OptunaSearch, gp
from orchestrator.search.search import KnownMetrics, Space

FIRST = 10
"""Number of results before processes are fitted; Optuna's default."""

TRIES = 2
"""Maximum number of draws by the processes per proposal, before uniform draws. Each draw fits all processes again,
which takes a tenth of a second or more, and later draws mostly repeat the first one."""


class GpSearch(OptunaSearch):
    """One process per objective and per limit of a measured metric. Pending choices are predicted by the processes."""

    def __init__(
        self, space: Space, objectives: Sequence[Objective], known_metrics: KnownMetrics, seed: int
    ) -> None:
        super().__init__(space, objectives, known_metrics, seed, Draws(gp(FIRST, seed), FIRST, TRIES))
