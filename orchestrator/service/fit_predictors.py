"""Fit the predictors of a search before it begins: the latency table, and the sensitivity of each block."""

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
from orchestrator.planning.cost import export_format
from orchestrator.planning.job_resources import JobResources
from orchestrator.planning.layer_sensitivity import Levels, uniform_steps
from orchestrator.planning.prepare import table_models, with_table
from orchestrator.planning.prepared_study import PreparedStudy
from orchestrator.search.proposals import uniform

_POOL = 200
"""Models of the space from which the most informative ones are chosen and timed."""
_TRIES_PER_MODEL = 10
"""Random choices for each model of the pool, at most: in a small space most repeat."""
_TABLE, _LEVELS = "table", "levels"
"""Keys of the ledger's notes, and keys of the tasks."""


def fit_predictors(prepared: PreparedStudy, ledger: Ledger, executor: Executor) -> PreparedStudy:
    """The study with its predictors: the latency table if it wants one, and the sensitivity of each block if options
    differ by block. They are read from the ledger, or fitted on a slot now and noted there.

    RuntimeError if fitting fails.
    """
    if prepared.plan.timed and table_models(prepared.config):
        record = ledger.noted(_TABLE)
        if record is None:
            record = json.dumps(_fit_table(prepared, executor))
            ledger.note(_TABLE, record)
        prepared = with_table(prepared, Table.from_dict(json.loads(record)))
    if uniform_steps(prepared.space) and prepared.materials.calibration is not None:
        record = ledger.noted(_LEVELS)
        if record is None:
            record = json.dumps(_measure_levels(prepared, executor))
            ledger.note(_LEVELS, record)
        sensitivities = {
            key: LayerSensitivity(tuple(fields["parts"]), fields["rest"])
            for key, fields in json.loads(record).items()
        }
        prepared = dataclasses.replace(prepared, levels=Levels(sensitivities))
    return prepared


def sampled(prepared: PreparedStudy, count: int, seed: int) -> list[Layout]:
    """Layouts of distinct models of the space, drawn uniformly; fewer than `count` if the space has not as many."""
    generator = np.random.default_rng(seed)
    form = formats.load(export_format(prepared.materials.target))
    layouts: dict[str, Layout] = {}
    for _ in range(_TRIES_PER_MODEL * count):
        choices = uniform(prepared.space.knobs(), generator)
        recipe = prepared.space.recipe(prepared.plan.original.origin, choices)
        try:
            layout = recipe.layout(prepared.layout)
        except ValueError:  # there is no such model
            continue
        if form.refusal(layout) is None:
            layouts.setdefault(recipe.id, layout)
        if len(layouts) == count:
            break
    return list(layouts.values())


def _fit_table(prepared: PreparedStudy, executor: Executor) -> Mapping[str, Any]:
    layouts = sampled(prepared, _POOL, prepared.config.search.seed)
    executor.submit(
        _TABLE, _as_data, make_table, prepared.materials, layouts, prepared.folder.cache.resolve(),
        table_models(prepared.config), resources=_resources(prepared, prepared.plan.timers),
    )  # fmt: skip
    return _wait_for(executor, "the table of operations", "; search.table=0 does without one")


def _measure_levels(prepared: PreparedStudy, executor: Executor) -> Mapping[str, Any]:
    executor.submit(
        _LEVELS, _as_data, compare_levels, prepared.materials, prepared.plan.original,
        uniform_steps(prepared.space), prepared.folder.cache.resolve(), prepared.space.by_linear,
        resources=_resources(prepared, ()),
    )  # fmt: skip
    return _wait_for(executor, "the sensitivity of each block", "")


def compare_levels(
    materials: Materials, original: Recipe, steps: Mapping[str, Technique], cache: Path, by_linear: bool
) -> dict[str, LayerSensitivity]:
    """The sensitivity of each block to each step, by the keys of the steps. by_linear: of each linear instead."""
    recipes = [original.then(step) for step in steps.values()]
    sensitivities = measure_layer_sensitivity(recipes, materials, cache, _no_report, by_linear)
    return dict(zip(steps, sensitivities, strict=True))


def _no_report(share: float, activity: str) -> None:
    pass


def _wait_for(executor: Executor, content: str, advice: str) -> Mapping[str, Any]:
    """The value of the only task. RuntimeError with the advice if it failed."""
    results = executor.wait(1.0)
    while not results:
        results = executor.wait(1.0)
    value: Mapping[str, Any] | Failure | None = results[0].value
    if value is None or isinstance(value, Failure):
        reason = results[0].error if value is None else value.message
        raise RuntimeError(f"{content} could not be made ({reason}){advice}")
    return value


def _as_data(fit: Callable[..., Any], *arguments: object) -> Mapping[str, Any] | Failure:
    """The predictor that `fit` makes, as plain data; runs on a worker."""
    try:
        predictor = fit(*arguments)
        if isinstance(predictor, dict):
            return {key: dataclasses.asdict(sensitivity) for key, sensitivity in predictor.items()}
        return dataclasses.asdict(predictor)
    except Exception as error:  # noqa: BLE001 - the worker boundary: failures cross it as data
        return failure(error)


def _resources(prepared: PreparedStudy, timers: tuple[str, ...]) -> Resources:
    """The resources of a job that holds two models, such as the original and another one; exclusive if it times."""
    job = Job(prepared.plan.original, timers, "")
    of_one = JobResources.for_study(prepared).of(job, bool(timers), slots=1)
    return dataclasses.replace(of_one, memory_gib=2 * of_one.memory_gib)
