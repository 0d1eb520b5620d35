"""Foretelling: has made, before a search begins, what it goes by: a table of operations, the damage of levels."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cluster.executors.executor import Executor, Resources
from jobs import formats
from jobs.failures import failure
from jobs.job import Failure, Job
from jobs.materials import Materials
from jobs.models.layout import Layout
from jobs.prediction.latency_model import Table
from jobs.prediction.latency_table import make_table
from jobs.prediction.layer_sensitivity import LayerSensitivity, measure_layer_sensitivity
from jobs.recipe import Recipe
from jobs.technique import Technique
from orchestrator.persistence.ledger import Ledger
from orchestrator.persistence.study_folder import CACHE, home
from orchestrator.planning.cost import shipped_as
from orchestrator.planning.layer_sensitivity import Levels, uniform_steps
from orchestrator.planning.prepare import Prepared, table_models
from orchestrator.search.proposals import uniform

_POOL = 200
"""Models of the space from which the most telling ones are timed."""
_TABLE, _LEVELS = "table", "levels"


def fit_predictors(prepared: Prepared, ledger: Ledger, executor: Executor) -> Prepared:
    """The study with its table of operations, where it wants one, and the damage of each level of each block, where
    options differ by block: what the ledger noted, or made now, on a slot. Raises RuntimeError where that failed."""
    if prepared.plan.timed and table_models(prepared.config):
        table = _noted(_TABLE, ledger, lambda: _table(prepared, executor))
        prepared = prepared.with_table(Table.from_dict(table))
    if uniform_steps(prepared.space) and prepared.materials.calibration is not None:
        found = _noted(_LEVELS, ledger, lambda: _levels(prepared, executor))
        prepared = prepared.with_levels(Levels({key: _damage(one) for key, one in found.items()}))
    return prepared


def _noted(name: str, ledger: Ledger, make: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    noted = ledger.noted(name)
    if noted is None:
        noted = json.dumps(make())
        ledger.note(name, noted)
    found: Mapping[str, Any] = json.loads(noted)
    return found


def sampled(prepared: Prepared, count: int, seed: int) -> list[Layout]:
    """Layouts of distinct models that the study may propose, drawn uniformly; fewer where there are not so many."""
    generator = np.random.default_rng(seed)
    form = formats.load(shipped_as(prepared.materials.target))
    found: dict[str, Layout] = {}
    for _ in range(10 * count):
        recipe = prepared.space.recipe(
            prepared.plan.original.origin, uniform(prepared.space.knobs(), generator)
        )
        try:
            layout = recipe.layout(prepared.layout)
        except ValueError:  # choices that make no model
            continue
        if form.refusal(layout) is None:
            found.setdefault(recipe.id, layout)
        if len(found) == count:
            break
    return list(found.values())


def _table(prepared: Prepared, executor: Executor) -> Mapping[str, Any]:
    layouts = sampled(prepared, _POOL, prepared.config.search.seed)
    # Twice the original is held: beside it runs what it is compared with.
    executor.submit(
        _TABLE, _make, make_table, prepared.materials, layouts, _cache(prepared), table_models(prepared.config),
        resources=_twice(prepared, prepared.plan.timers),
    )  # fmt: skip
    return _awaited(executor, "the table of operations", "; search.table=0 does without one")


def _levels(prepared: Prepared, executor: Executor) -> Mapping[str, Any]:
    executor.submit(
        _LEVELS, _make, compare_levels, prepared.materials, prepared.plan.original, uniform_steps(prepared.space),
        _cache(prepared), prepared.space.by_linear, resources=_twice(prepared, ()),
    )  # fmt: skip
    return _awaited(executor, "the damage of each level", "")


def compare_levels(
    materials: Materials, original: Recipe, steps: Mapping[str, Technique], cache: Path, by_linear: bool
) -> dict[str, LayerSensitivity]:
    recipes = [original.then(step) for step in steps.values()]
    found = measure_layer_sensitivity(recipes, materials, cache, lambda share, what: None, by_linear)
    return dict(zip(steps, found, strict=True))


def _awaited(executor: Executor, what: str, cure: str) -> Mapping[str, Any]:
    while True:
        for ended in executor.wait(1.0):
            made: Mapping[str, Any] | Failure | None = ended.value
            if isinstance(made, Failure) or made is None:
                reason = made.message if isinstance(made, Failure) else ended.error
                raise RuntimeError(f"{what} could not be made ({reason}){cure}")
            return made


def _make(make: Callable[..., Any], *given: object) -> Mapping[str, Any] | Failure:
    """What is made, as plain data."""
    try:
        found = make(*given)
        if isinstance(found, dict):
            return {key: dataclasses.asdict(one) for key, one in found.items()}
        return dataclasses.asdict(found)
    except Exception as error:  # noqa: BLE001 - the worker boundary: failures cross it as data
        return failure(error)


def _twice(prepared: Prepared, timers: tuple[str, ...]) -> Resources:
    """What is asked for a job that holds twice the original; alone where it takes times."""
    once = prepared.resources(Job(prepared.plan.original, timers, ""), bool(timers), slots=1)
    return dataclasses.replace(once, memory_gib=2 * once.memory_gib)


def _cache(prepared: Prepared) -> Path:
    return home(prepared.config.store).resolve() / CACHE


def _damage(record: Mapping[str, Any]) -> LayerSensitivity:
    return LayerSensitivity(tuple(record["parts"]), record["rest"])
