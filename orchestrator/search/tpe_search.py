"""The tree-structured Parzen estimator for several objectives (Ozaki et al. 2022,
doi:10.1613/jair.1.13188), by Optuna."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.pareto.front import Objective
from orchestrator.search.on_optuna import Draws, OptunaSearch, tpe
from orchestrator.search.search import KnownMetrics, Space

FIRST = 10
"""Number of results before the densities of good and bad choices are fitted; Optuna's default."""

TRIES = 20
"""Maximum number of draws from the density of good choices per proposal, before uniform draws; each takes
milliseconds."""


class TpeSearch(OptunaSearch):
    """Draws choices with a high ratio of the density of good choices to that of bad ones, all knobs together. Pending
    choices count as bad ones (a constant lie)."""

    def __init__(
        self, space: Space, objectives: Sequence[Objective], known_metrics: KnownMetrics, seed: int
    ) -> None:
        super().__init__(space, objectives, known_metrics, seed, Draws(tpe(FIRST, seed), FIRST, TRIES))
