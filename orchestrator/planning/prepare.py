"""Prepare a study: check its file completely, and fix everything that a run needs. Starts and writes nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cluster.storage.open import check_store, is_remote
from jobs import meters
from jobs.models import loading, sources, tokenizers, weight_check
from jobs.models.families import TASKS, Task
from jobs.models.layout import Layout
from jobs.prediction.latency_model import Table
from jobs.recipe import Origin, Recipe
from orchestrator.config.load import Loaded
from orchestrator.config.problems import InvalidStudyError
from orchestrator.config.schema import StudyConfig, unless_auto
from orchestrator.pareto.front import Objective
from orchestrator.persistence.study_folder import home
from orchestrator.planning.address_checks import check_addresses
from orchestrator.planning.cost import cost_of
from orchestrator.planning.input_files import fetch_inputs
from orchestrator.planning.model_checks import check_options, check_size_limit
from orchestrator.planning.parse_space import SHALLOW, Depth, parse
from orchestrator.planning.prepared_study import PreparedStudy
from orchestrator.planning.problem_list import ProblemList
from orchestrator.planning.study_materials import data_digest, materials_of, measuring_digest
from orchestrator.planning.study_meters import choose_meters, rungs_of
from orchestrator.planning.validation import check_data, check_techniques, check_values, check_zero_stage
from orchestrator.study.budget import Budget
from orchestrator.study.events import StudyPlan

_TABLE_MODELS, _CANDIDATES_FOR_TABLE = 32, 64
"""With `search.table: auto`: the models that are timed for the latency table, and the candidates from which on timing
them pays."""


def prepare(loaded: Loaded) -> PreparedStudy:
    """Check a study and prepare it. Raises InvalidStudyError with every problem of the study."""
    problems = ProblemList(loaded.problems)
    config = fetch_inputs(loaded.config, home(loaded.config.store), problems)
    check_values(config, problems)
    check_addresses(config, problems)
    task: Task = next((name for name in TASKS if name == config.task), "causal-lm")
    original = _read_original(config.model, problems)
    folder, layout = original or (None, None)
    depth = SHALLOW if layout is None else Depth(layout.depth, len(layout.linears))
    space, space_problems = parse(config.space, config.search.order == "any", depth)
    if not problems.has_below("space"):
        problems.add(*space_problems)
    if folder is not None:
        task_of_model = loading.task_of(folder)
        problems.check("task", config.task, config.task == task_of_model, task_of_model)
        check_techniques(space, folder, task, problems)
    if layout is not None:
        check_options(space, layout, problems)
    check_zero_stage(space, config.cluster, problems)
    if is_remote(config.store):
        expected = "a bucket to read and write, as s3://bucket/prefix"
        problems.attempt("store", lambda: check_store(config.store), expected)
    materials = materials_of(config, task)
    names = choose_meters(config, task, materials, problems)
    check_data(materials, names, space, folder, problems)
    if folder is not None and layout is not None and not problems.has_below("space"):
        check_size_limit(config, space, layout, materials.target, folder, problems)
    model_digest = ""
    if folder is not None:
        model_digest = loading.digest(folder)
        problems.attempt("model", lambda: weight_check.check_values(folder, model_digest), "finite weights")
    if problems.problems or folder is None or layout is None:  # one of them is None only after a problem
        raise InvalidStudyError([loaded.located(problem) for problem in problems.problems])
    exclusive = [name for name in names if meters.load(name).exclusive]
    timed: set[str] = set().union(*(meters.load(name).metrics for name in exclusive))
    plan = StudyPlan(
        original=Recipe(Origin(model_digest, data_digest(materials), config.search.seed)),
        original_cost=cost_of(layout, materials.target, folder),
        objectives=objectives_of(config),
        candidates=config.search.candidates,
        meters=tuple(name for name in names if name not in exclusive),
        timers=tuple(exclusive),
        timed=frozenset(timed & set(config.objectives)),
        materials_digest=measuring_digest(materials),
        rungs=rungs_of(config, materials, names),
    )
    budget = Budget(config.budget.money, config.budget.hours)
    return PreparedStudy(config, loaded.text, space, materials, folder, layout, plan, budget)


def _read_original(source: str, problems: ProblemList) -> tuple[Path, Layout] | None:
    """Return the folder and the layout of the original; None, with a problem, unless config, weights and tokenizer fit
    each other. The values of the weights are not read yet."""
    expected = "a model folder, a hub id or package:NAME"
    folder = problems.attempt("model", lambda: sources.locate(source), expected)
    if folder is None:
        return None

    def read() -> Layout:
        weight_check.check_weights(folder)
        tokenizers.check_vocabulary(folder)
        return loading.original_layout(folder)

    layout = problems.attempt("model", read, "a model whose config, weights and tokenizer belong together")
    if layout is None:
        return None
    return folder, layout


def objectives_of(config: StudyConfig) -> tuple[Objective, ...]:
    return tuple(
        Objective(metric, "max" if spec.goal == "max" else "min", spec.limit)
        for metric, spec in config.objectives.items()
    )


def table_models(config: StudyConfig) -> int:
    """The number of models that are timed, at most, to fit the latency table; 0 for no table."""
    models = unless_auto(config.search.table)
    if models is not None:
        return models
    return _TABLE_MODELS if config.search.candidates >= _CANDIDATES_FOR_TABLE else 0


def with_table(prepared: PreparedStudy, table: Table) -> PreparedStudy:
    """The same study with latencies predicted by a table of operations."""
    cost = cost_of(prepared.layout, prepared.materials.target, prepared.original, table)
    plan = dataclasses.replace(prepared.plan, original_cost=cost, prediction_errors=table.errors)
    return dataclasses.replace(prepared, plan=plan, table=table)
