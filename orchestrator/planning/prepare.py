"""Prepare: from a study file to everything that a study needs, or every reason why it can't run. Starts nothing."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from cluster.executors.executor import Resources
from cluster.storage.open import check_store, is_remote
from jobs import data, formats, meters, parallel
from jobs.job import Job
from jobs.knobs import Value
from jobs.materials import Materials, Target, TaskSource, TextSource
from jobs.meters import lm_eval_tasks
from jobs.models import loading, memory, tokenizers
from jobs.models import sources as sources_module
from jobs.models.families import TASKS, Task
from jobs.models.layout import Layout
from jobs.parallel import WORKER_GIB, Sharing
from jobs.prediction.latency_model import Table
from jobs.recipe import Origin, Recipe
from orchestrator.config.load import Loaded
from orchestrator.config.problems import InvalidStudyError, Problem
from orchestrator.config.schema import Evaluation, StudyConfig, Tasks, Text
from orchestrator.pareto.front import Objective
from orchestrator.persistence.study_folder import home
from orchestrator.planning import input_files, layer_sensitivity
from orchestrator.planning.cost import MAX_CACHED_COSTS, MAX_CACHED_LAYOUTS, cost_of, shipped_as
from orchestrator.planning.initial_design import MAX_INITIAL_POINTS
from orchestrator.planning.job_resources import share_of_gpu
from orchestrator.planning.layer_sensitivity import Allocations, Levels
from orchestrator.planning.search_space import SHALLOW, Choices, Depth, SearchSpace, parse
from orchestrator.planning.validation import check_data, check_values, refusals, stage_refusals
from orchestrator.search.search import SECONDS
from orchestrator.study.budget import Budget
from orchestrator.study.events import CandidateProposed, Cost, StudyPlan
from orchestrator.study.latency_estimate import estimates
from orchestrator.study.study import Study

T = TypeVar("T")


_FIRST_RUNG = 1 / 64
FIRST_RUNG_BEFORE = 1 / 16
"""What studies begin with that earlier versions began, which did not note it."""
_RUNGS_APART = 4
_FEWEST_WINDOWS = 8
"""Of text, that candidates are compared on: fewer tell too little of how far they vary."""


@dataclass(frozen=True)
class Prepared:
    """A study that is ready to run: valid, its model found, its data read once, its plan fixed.

    original: the folder of the model; layout: its own.
    """

    config: StudyConfig
    text: str
    space: SearchSpace
    materials: Materials
    original: Path
    layout: Layout
    plan: StudyPlan
    table: Table | None = None
    levels: Levels | None = None

    @property
    def folder(self) -> Path:
        """Where the study's own files lie: ledger, front, report, outbox."""
        return home(self.config.store) / self.config.name

    @property
    def budget(self) -> Budget:
        return Budget(self.config.budget.money, self.config.budget.hours)

    @property
    def digest(self) -> str:
        """The digest of all that decides a study's results, but not of how many candidates it tries, where, or for what
        money."""
        decides = [
            self.plan.original.id,
            self.plan.materials_digest,
            [
                (
                    stage,
                    option.technique.name(),
                    option.technique.version,
                    str(option.searched),
                    str(option.fixed),
                    *([str(option.spread)] if option.spread else []),
                )
                for stage, options in self.space.stages.items()
                for option in options
            ],
            list(self.space.orders),
            [(o.metric, o.goal, o.limit) for o in self.plan.objectives],
            self.config.search.algorithm,
        ]
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]

    def propose(self, choices: Choices) -> CandidateProposed:
        """The proposal that these choices make, with its cost, or why no such model can be."""
        recipe = self.space.recipe(self.plan.original.origin, choices)
        try:
            return CandidateProposed(recipe, choices, self._cost(recipe))
        except ValueError as error:
            return CandidateProposed(recipe, choices, None, str(error))

    def resources(self, job: Job, alone: bool, slots: int) -> Resources:
        """What a job asks of the executor. On a cluster timings run on the nodes that the study names for them, and
        hold no GPU, since timers run on processors."""
        ranks = self.ranks(job, slots)
        memory_gib = self.memory_gib(job, ranks)
        if self._times(job):
            labels = self.config.cluster.timing if self.config.cluster.address else {}
            return Resources(0.0, 1.0, memory_gib, ranks, alone, labels)
        return Resources(self._gpus(memory_gib), 1.0, memory_gib, ranks, alone)

    def _gpus(self, memory_gib: float) -> float:
        """The GPUs that a job, or each of its ranks, holds on a cluster."""
        cluster = self.config.cluster
        if cluster.address is None:
            return 0.0
        if cluster.gpus != "auto":
            return float(cluster.gpus)
        return share_of_gpu(memory_gib, self.sharing.device_gib or math.inf)

    def _times(self, job: Job) -> bool:
        return not set(self.plan.timers).isdisjoint(job.meters)

    def memory_gib(self, job: Job, ranks: int = 1) -> float:
        """About how much memory a job takes, or each of its ranks, from the original's size: what slots share is
        divided by it.

        Held in bf16 with its statistics and one layer in fp32, about 4 bytes a weight more than the file; of training
        `jobs.parallel` tells; squared gradients are summed in fp32, beside activations.
        """
        weights = self.layout.parameters()
        step = job.recipe.steps[-1] if job.recipe.steps else None
        if step is not None and step.trains():
            device_gib = self.sharing.device_gib or math.inf
            stage = self.sharing.stage(weights, ranks, device_gib, step.highest_stage)
            return round(parallel.training_gib(weights, stage, ranks), 3)
        squares = step is not None and "gradients" in step.needs
        return round(WORKER_GIB + (12 if squares else 6) * weights / 2**30, 3)

    def ranks(self, job: Job, slots: int) -> int:
        """Over how many of the slots a job is spread: one that trains as the study says, or by itself over as few as
        hold it; any other, and one whose model was made before, runs on one."""
        step = job.recipe.steps[-1] if job.recipe.steps else None
        made = job.before is not None or self._times(job)
        if step is None or not step.trains() or made:
            return 1
        asked, device_gib = self.config.cluster.ranks, self.sharing.device_gib
        if asked != "auto":
            return int(asked)
        if device_gib is None:
            return 1
        return parallel.ranks_for(self.layout.parameters(), device_gib, slots, step.highest_stage)

    @property
    def sharing(self) -> Sharing:
        """How trainings are spread over ranks. The memory of a device is known where the study tells it, or a GPU that
        is seen here."""
        cluster = self.config.cluster
        told = [cluster.zero_stage, cluster.micro_batch, cluster.device_gib]
        stage, rows, device_gib = (None if one == "auto" else one for one in told)
        if device_gib is None and torch.cuda.is_available():
            device_gib = memory.device_gib()
        return Sharing(stage, rows, device_gib)

    def known(self, choices: Choices, study: Study | None = None) -> Mapping[str, float]:
        """What needs no evaluation: the size, or a bound of it; once levels of blocks were compared, how far its
        predictions are taken to be from the original's. By the study so far also what timings are taken to be, once the
        original is timed, and how long trying these choices would take. Nothing where they make no model."""
        recipe = self._remembered(self.space.recipe(self.plan.original.origin, choices))
        try:
            cost = self._cost(recipe)
        except ValueError:
            return {}
        found = {"size_bytes": float(cost.size_bytes)}
        divergence = None if self.levels is None else self.levels.divergence(self.space, choices)
        if divergence is not None:
            found[layer_sensitivity.PREDICTED_KL] = divergence
        if study is None:
            return found
        original = study.original.measurement
        if original is not None:
            found |= estimates(cost, self.plan, original)
        return {**found, SECONDS: study.seconds(recipe)}

    def opening(self) -> list[dict[str, Value]]:
        """What the search begins with: where options differ by block, what is solved from the levels of blocks; else,
        with the surrogate, which would learn it late or never, what anybody would try first."""
        limit = next((one.limit for one in self.plan.objectives if one.metric == "size_bytes"), None)
        count = min(MAX_INITIAL_POINTS, self.config.search.candidates // 4)
        size = lambda choices: self.known(choices).get("size_bytes")  # noqa: E731
        if self.levels is not None:
            return Allocations.of(self.space, self.levels, size).spread(limit, count)
        return self._alone(limit)[:count] if self.config.search.algorithm == "surrogate" else []

    def _alone(self, limit: float | None) -> list[dict[str, Value]]:
        """Each technique that makes the model smaller, by itself: as little as it may within the limit, then as much as
        it may."""
        least, most = [], []
        for some in self.space.alone():
            sized = [(self.known(choices).get("size_bytes", math.inf), choices) for choices in some]
            bound = min(self.plan.original_cost.size_bytes - 1, math.inf if limit is None else limit)
            sized = sorted((one for one in sized if one[0] <= bound), key=lambda one: one[0])
            if sized and sized[-1][0] > sized[0][0]:
                least.append(sized[-1])
            most += sized[:1]
        return [choices for part in (least, most) for _, choices in sorted(part, key=lambda one: one[0])]

    @functools.cached_property
    def _remembered(self) -> Callable[[Recipe], Recipe]:
        """The same recipe, as one object, which knows its id and its lineage once it was asked for them."""
        return functools.lru_cache(MAX_CACHED_COSTS)(lambda recipe: recipe)

    @functools.cached_property
    def _cost(self) -> Callable[[Recipe], Cost]:
        """The cost of a recipe. ValueError where it makes no model, or none that the target can run. A search asks for
        hundreds of costs to propose one candidate, many of them again and again, and most share what comes first."""

        @functools.lru_cache(MAX_CACHED_COSTS)
        def cost(recipe: Recipe) -> Cost:
            found = layout(recipe)
            formats.check(shipped_as(self.materials.target), found)
            return cost_of(found, self.materials.target, self.original, self.table)

        @functools.lru_cache(MAX_CACHED_LAYOUTS)
        def layout(recipe: Recipe) -> Layout:
            parent = recipe.parent
            return self.layout if parent is None else recipe.steps[-1].output_layout(layout(parent))

        return cost

    def with_levels(self, found: Levels) -> Prepared:
        """The same study with the damage of each level of each block known."""
        return dataclasses.replace(self, levels=found)

    def with_table(self, table: Table) -> Prepared:
        """The same study with latencies predicted by a table of operations."""
        cost = cost_of(self.layout, self.materials.target, self.original, table)
        plan = dataclasses.replace(self.plan, original_cost=cost, prediction_errors=table.errors)
        return dataclasses.replace(self, plan=plan, table=table)


def prepare(loaded: Loaded) -> Prepared:
    """Check all of a study and make it ready. Raises InvalidStudy with every problem there is."""
    config = loaded.config
    problems = list(loaded.problems)
    wrong = {problem.key for problem in problems}

    def check(key: str, *conditions: tuple[bool, str]) -> None:
        for holds, message in conditions:
            if not holds and key not in wrong:
                wrong.add(key)
                problems.append(Problem(key, message))

    def attempt(key: str, do: Callable[[], T], expected: str) -> T | None:
        if key in wrong:
            return None
        try:
            return do()
        except (ValueError, LookupError, OSError) as error:
            wrong.add(key)
            problems.append(Problem(key, f"got {error}, expected {expected}"))
            return None

    config = input_files.fetched(config, home(config.store), attempt)
    check_values(config, check)
    task: Task = next((one for one in TASKS if one == config.task), "causal-lm")
    folder = attempt(
        "model", lambda: sources_module.locate(config.model), "a model folder, a hub id or package:NAME"
    )
    layout = None if folder is None else attempt("model", lambda: loading.original_layout(folder), "a model")
    depth = SHALLOW if layout is None else Depth(layout.depth, len(layout.linears))
    space, space_problems = parse(config.space, config.search.order == "any", depth)
    if "space" not in wrong:
        problems += space_problems
    if folder is not None:
        check(
            "task",
            (
                config.task == loading.task_of(folder),
                f"got {config.task}, expected {loading.task_of(folder)}",
            ),
        )
        attempt("model", lambda: tokenizers.check_vocabulary(folder), "a model and its own tokenizer")
        problems += refusals(space, folder, task)
    if "cluster.zero_stage" not in wrong:
        problems += stage_refusals(space, config.cluster.zero_stage)
    if is_remote(config.store):
        attempt(
            "store", lambda: check_store(config.store), "a bucket to read and write, as s3://bucket/prefix"
        )
    materials = _materials(config, task)
    plan_meters = _meters(config, task, materials, attempt)
    check_data(config, materials, plan_meters, space, folder, problems, wrong)
    if problems or folder is None or layout is None:
        raise InvalidStudyError([loaded.located(problem) for problem in problems])
    origin = Origin(loading.digest(folder), _data_digest(materials), config.search.seed)
    timed = frozenset(
        m for name in plan_meters if meters.load(name).exclusive for m in meters.load(name).metrics
    )
    plan = StudyPlan(
        original=Recipe(origin),
        original_cost=cost_of(layout, materials.target, folder),
        objectives=objectives_of(config),
        candidates=config.search.candidates,
        meters=tuple(name for name in plan_meters if not meters.load(name).exclusive),
        timers=tuple(name for name in plan_meters if meters.load(name).exclusive),
        timed=timed & set(config.objectives),
        materials_digest=_measuring_digest(materials),
        rungs=rungs_of(config, materials, plan_meters),
    )
    return Prepared(config, loaded.text, space, materials, folder, layout, plan)


def objectives_of(config: StudyConfig) -> tuple[Objective, ...]:
    return tuple(
        Objective(metric, "max" if spec.goal == "max" else "min", spec.limit)
        for metric, spec in config.objectives.items()
    )


def rungs_of(
    config: StudyConfig, materials: Materials, names: Sequence[str], first: float = _FIRST_RUNG
) -> tuple[float, ...]:
    """The shares of the evaluation that candidates are measured on, one after the other; by themselves they begin with
    `first`, or as much more as makes some windows."""
    if config.search.rungs != "auto":
        return (*map(float, config.search.rungs), 1.0)
    reads = {meters.load(name).reads for name in names} - {None}
    if reads != {"evaluation"} or materials.evaluation is None:
        return (1.0,)
    first = max(first, _FEWEST_WINDOWS / materials.evaluation.samples)
    found = [first * _RUNGS_APART**rung for rung in range(3)]
    return (*(rung for rung in found if rung <= 1 / 2), 1.0)


def table_models(config: StudyConfig) -> int:
    """How many models are timed before the search, at most, to predict how fast the others are."""
    if config.search.table == "auto":
        return 32 if config.search.candidates >= 64 else 0
    return int(config.search.table)


def _materials(config: StudyConfig, task: Task) -> Materials:
    target = config.target
    return Materials(
        model=config.model,
        task=task,
        evaluation=None if config.data.evaluation is None else _source(config.data.evaluation),
        calibration=None if config.data.calibration is None else _source(config.data.calibration),
        training=None if config.data.train is None else _source(config.data.train),
        choices=config.data.choices,
        labelled=config.data.labelled,
        tasks=None if config.data.tasks is None else _tasks(config.data.tasks),
        target=Target(
            target.runtime, target.threads, target.prompt_tokens, target.new_tokens, target.price_per_hour
        ),
    )


def _source(text: Text | Evaluation) -> TextSource:
    samples, tokens = (
        (text.samples, text.tokens)
        if isinstance(text, Text)
        else (text.tokens // max(text.window, 1), text.window)
    )
    part = (text.part[0], text.part[-1]) if text.part else (0.0, 0.0)
    return TextSource(text.path, samples, tokens, part, dict(text.where))


def _tasks(tasks: Tasks) -> TaskSource:
    return TaskSource(tuple(tasks.names), tasks.folder, tasks.items, tasks.shots)


def _meters(
    config: StudyConfig, task: Task, materials: Materials, attempt: Callable[..., str | None]
) -> tuple[str, ...]:
    """The meters that the objectives ask for; the size is always taken, and the text where there is a text. Where
    anything is timed, all is taken that can be learned of the same processes."""
    found = {"size"}

    def able(metric: str) -> str:
        name = meters.meter_of(metric, task)
        if metric not in meters.load(name).metrics:
            raise ValueError(f"{metric}, which tells of the machine and not of a model")
        reason = meters.load(name).missing(materials.target)
        if reason is not None:
            raise ValueError(f"{metric}, which cannot be measured here: {reason}")
        return name

    for metric in config.objectives:
        what = f"a metric of task {task} that this machine can measure"
        name = attempt(f"objectives.{metric}", lambda metric=metric: able(metric), what)
        if name is not None:
            found.add(name)
    if any(meters.load(name).exclusive for name in found):
        every = {name: meters.load(name) for name in meters.names()}
        found |= {
            name
            for name, meter in every.items()
            if meter.exclusive and task in meter.tasks and meter.missing(materials.target) is None
        }
    if task == "causal-lm" and materials.evaluation is not None:
        found.add("text")
    if materials.choices is not None:
        found.add("choices")
    if materials.tasks is not None:
        name = attempt("data.tasks", lambda: able("task_score"), f"tasks that task {task} can be measured on")
        found |= {name} if name is not None else set()
    return tuple(sorted(found))


def _data_digest(materials: Materials) -> str:
    """The digest of what steps read."""
    sources = (materials.calibration, materials.training)
    return _digest([None if source is None else data.digest(source) for source in sources])


def _measuring_digest(materials: Materials) -> str:
    """The digest of what meters read, and of the target that they measure for."""
    files = [
        None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
        for file in (materials.choices, materials.labelled)
    ]
    target = materials.target
    text = None if materials.evaluation is None else data.digest(materials.evaluation)
    parts = [text, *files, materials.task]
    asked = [target.runtime, target.threads, target.prompt_tokens, target.new_tokens]
    priced = [] if target.price_per_hour is None else [target.price_per_hour]
    tasks = [] if materials.tasks is None else [lm_eval_tasks.digest(materials.tasks)]
    return _digest([*parts, *asked, *priced, *tasks])


def _digest(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
