"""Compute the cost of a candidate, its size and its operations, from its recipe."""

from __future__ import annotations

import functools
from pathlib import Path

from jobs import formats, runtimes
from jobs.materials import Target
from jobs.models.layout import Layout
from jobs.prediction.latency_model import Table, predict
from jobs.recipe import Recipe
from orchestrator.planning.prepared_study import PreparedStudy
from orchestrator.study.events import Cost

MAX_CACHED_COSTS, MAX_CACHED_LAYOUTS = 50_000, 500
"""Entries. A cost takes some hundred bytes, a layout some thousand for each layer."""


class CostModel:
    """The costs of recipes, cached: a search asks for hundreds of costs to propose one candidate, many of them
    repeatedly, and most recipes share their first steps."""

    def __init__(self, layout: Layout, original: Path, target: Target, table: Table | None = None) -> None:
        """layout and original: of the model that all recipes start from."""
        self._layout, self._original = layout, original
        self._target, self._table = target, table
        self._cached_cost = functools.lru_cache(MAX_CACHED_COSTS)(self._compute)
        self._cached_layout = functools.lru_cache(MAX_CACHED_LAYOUTS)(self._layout_of)

    @staticmethod
    def of(prepared: PreparedStudy) -> CostModel:
        return CostModel(prepared.layout, prepared.original, prepared.materials.target, prepared.table)

    def cost(self, recipe: Recipe) -> Cost:
        """The cost of a recipe. ValueError if a step cannot apply, or if the target cannot run the model."""
        return self._cached_cost(recipe)

    def _compute(self, recipe: Recipe) -> Cost:
        layout = self._cached_layout(recipe)
        formats.check(export_format(self._target), layout)
        return cost_of(layout, self._target, self._original, self._table)

    def _layout_of(self, recipe: Recipe) -> Layout:
        parent = recipe.parent
        if parent is None:
            return self._layout
        return recipe.steps[-1].output_layout(self._cached_layout(parent))


def export_format(target: Target) -> str:
    """The format in which candidates are written for a target."""
    return runtimes.load(target.runtime).FORMAT


def cost_of(layout: Layout, target: Target, original: Path, table: Table | None = None) -> Cost:
    """The cost of a model of this layout. Its size is the size of the file that is written for the target.

    original: the folder of the original model; table: predicts latencies, none are predicted without it.
    """
    try:
        predicted = {} if table is None else predict(layout, table)
    except LookupError:  # no timed model has one of these operations: no prediction, as without a table
        predicted = {}
    size_bytes = formats.load(export_format(target)).size_bytes(layout, original)
    return Cost(size_bytes, layout.decode_macs(), len(layout.linears), predicted)
