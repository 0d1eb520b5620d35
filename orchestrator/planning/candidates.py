"""Turn the choices of a search into proposals, and into the metrics that are known without an evaluation."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from jobs.recipe import Recipe
from orchestrator.planning import layer_sensitivity
from orchestrator.planning.cost import MAX_CACHED_COSTS, CostModel
from orchestrator.planning.prepared_study import PreparedStudy
from orchestrator.planning.search_space import Choices
from orchestrator.search.search import SECONDS
from orchestrator.study.events import CandidateProposed
from orchestrator.study.latency_estimate import estimates
from orchestrator.study.study import Study


def propose(prepared: PreparedStudy, costs: CostModel, choices: Choices) -> CandidateProposed:
    """The proposal of these choices, with its cost or with the reason why there is no such model."""
    recipe = prepared.space.recipe(prepared.plan.original.origin, choices)
    try:
        return CandidateProposed(recipe, choices, costs.cost(recipe))
    except ValueError as error:
        return CandidateProposed(recipe, choices, None, str(error))


class KnownMetrics:
    """The metrics of choices that are known without an evaluation. A search reads them before it proposes.

    These are the size and, where options differ by block, the predicted divergence. With a study also estimates of
    the timed metrics, once the original is timed, and the seconds that evaluating the choices would take.
    """

    def __init__(self, prepared: PreparedStudy, costs: CostModel, study: Study | None = None) -> None:
        self._prepared, self._costs, self._study = prepared, costs, study
        self._shared = functools.lru_cache(MAX_CACHED_COSTS)(_same_recipe)

    def __call__(self, choices: Choices) -> Mapping[str, float]:
        """Empty if the choices make no model that the target can run."""
        prepared = self._prepared
        recipe = self._shared(prepared.space.recipe(prepared.plan.original.origin, choices))
        try:
            cost = self._costs.cost(recipe)
        except ValueError:
            return {}
        metrics = {"size_bytes": float(cost.size_bytes)}
        if prepared.levels is not None:
            divergence = prepared.levels.divergence(prepared.space, choices)
            if divergence is not None:
                metrics[layer_sensitivity.PREDICTED_KL] = divergence
        if self._study is None:
            return metrics
        original = self._study.original.measurement
        if original is not None:
            metrics |= estimates(cost, prepared.plan, original)
        return {**metrics, SECONDS: self._study.seconds(recipe)}

    def size_bytes(self, choices: Choices) -> float | None:
        """The size of the file; None if the choices make no model that the target can run."""
        return self(choices).get("size_bytes")


def _same_recipe(recipe: Recipe) -> Recipe:
    """The recipe itself; cached, equal recipes become one object, which keeps its id and lineage once computed."""
    return recipe
