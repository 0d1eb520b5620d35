"""Prepare: from a study file to everything that a study needs, or every reason why it can't run. Starts nothing."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from cluster.executor import Resources
from cluster.store import is_remote, reach
from jobs import data, formats, masks, memory, meters, models, runtimes, sharing
from jobs.families import TASKS, Task, family
from jobs.job import Job, Materials, Target, TaskSource, TextSource
from jobs.knobs import Value
from jobs.layout import Layout
from jobs.meter import Reads
from jobs.meters import lm_eval_tasks
from jobs.operations import Table, predict
from jobs.recipe import Origin, Recipe
from jobs.sharing import WORKER_GIB, Sharing
from orchestrator import inputs, levels, search
from orchestrator.budget import Budget
from orchestrator.config import Evaluation, InvalidStudy, Loaded, StudyConfig, Tasks, Text
from orchestrator.estimate import estimates
from orchestrator.events import Cost, Plan, Proposed
from orchestrator.front import Objective
from orchestrator.levels import Allocations, Levels
from orchestrator.places import home
from orchestrator.space import SHALLOW, Choices, Depth, Problem, SearchSpace, parse
from orchestrator.study import Study

T = TypeVar("T")


_FIRST_RUNG = 1 / 64
FIRST_RUNG_BEFORE = 1 / 16
"""What studies begin with that earlier versions began, which did not note it."""
_RUNGS_APART = 4
_FEWEST_WINDOWS = 8
"""Of text, that candidates are compared on: fewer tell too little of how far they vary."""
_COSTS, _LAYOUTS = 50_000, 500
"""So many are remembered."""
_OPENING = 8
"""So many choices, of a quarter of all that may be tried, are solved for before the search."""


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
    plan: Plan
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

    def propose(self, choices: Choices) -> Proposed:
        """The proposal that these choices make, with its cost, or why no such model can be."""
        recipe = self.space.recipe(self.plan.original.origin, choices)
        try:
            return Proposed(recipe, choices, self._cost(recipe))
        except ValueError as error:
            return Proposed(recipe, choices, None, str(error))

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
        `jobs.sharing` tells; squared gradients are summed in fp32, beside activations.
        """
        weights = self.layout.parameters()
        step = job.recipe.steps[-1] if job.recipe.steps else None
        if step is not None and step.trains():
            device_gib = self.sharing.device_gib or math.inf
            stage = self.sharing.stage(weights, ranks, device_gib, step.highest_stage)
            return round(sharing.training_gib(weights, stage, ranks), 3)
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
        return sharing.ranks_for(self.layout.parameters(), device_gib, slots, step.highest_stage)

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
            found[levels.METRIC] = divergence
        if study is None:
            return found
        original = study.original.measurement
        if original is not None:
            found |= estimates(cost, self.plan, original)
        return {**found, search.SECONDS: study.seconds(recipe)}

    def opening(self) -> list[dict[str, Value]]:
        """What the search begins with: where options differ by block, what is solved from the levels of blocks; else,
        with the surrogate, which would learn it late or never, what anybody would try first."""
        limit = next((one.limit for one in self.plan.objectives if one.metric == "size_bytes"), None)
        count = min(_OPENING, self.config.search.candidates // 4)
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
        return functools.lru_cache(_COSTS)(lambda recipe: recipe)

    @functools.cached_property
    def _cost(self) -> Callable[[Recipe], Cost]:
        """The cost of a recipe. ValueError where it makes no model, or none that the target can run. A search asks for
        hundreds of costs to propose one candidate, many of them again and again, and most share what comes first."""

        @functools.lru_cache(_COSTS)
        def cost(recipe: Recipe) -> Cost:
            found = layout(recipe)
            formats.check(shipped_as(self.materials.target), found)
            return cost_of(found, self.materials.target, self.original, self.table)

        @functools.lru_cache(_LAYOUTS)
        def layout(recipe: Recipe) -> Layout:
            parent = recipe.parent
            return self.layout if parent is None else recipe.steps[-1].outline(layout(parent))

        return cost

    def with_levels(self, found: Levels) -> Prepared:
        """The same study with the damage of each level of each block known."""
        return dataclasses.replace(self, levels=found)

    def with_table(self, table: Table) -> Prepared:
        """The same study with latencies predicted by a table of operations."""
        cost = cost_of(self.layout, self.materials.target, self.original, table)
        plan = dataclasses.replace(self.plan, original_cost=cost, prediction_errors=table.errors)
        return dataclasses.replace(self, plan=plan, table=table)


def shipped_as(target: Target) -> str:
    """The format that candidates are written in for a target."""
    return runtimes.load(target.runtime).FORMAT


def cost_of(layout: Layout, target: Target, original: Path, table: Table | None = None) -> Cost:
    """What is known of a model from its shapes, and a table of operations. The size is that of the file for the
    target."""
    try:
        predicted = {} if table is None else predict(layout, table)
    except LookupError:  # an operation that no model of the table did: as without a table
        predicted = {}
    size_bytes = formats.load(shipped_as(target)).size_bytes(layout, original)
    return Cost(size_bytes, layout.decode_macs(), len(layout.linears), predicted)


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

    config = inputs.fetched(config, home(config.store), attempt)
    _check_values(config, check)
    task: Task = next((one for one in TASKS if one == config.task), "causal-lm")
    folder = attempt("model", lambda: models.locate(config.model), "a model folder, a hub id or package:NAME")
    layout = None if folder is None else attempt("model", lambda: models.original_layout(folder), "a model")
    depth = SHALLOW if layout is None else Depth(layout.depth, len(layout.linears))
    space, space_problems = parse(config.space, config.search.order == "any", depth)
    if "space" not in wrong:
        problems += space_problems
    if folder is not None:
        check(
            "task",
            (config.task == models.task_of(folder), f"got {config.task}, expected {models.task_of(folder)}"),
        )
        attempt("model", lambda: models.check_vocabulary(folder), "a model and its own tokenizer")
        problems += _refusals(space, folder, task)
    if "cluster.zero_stage" not in wrong:
        problems += _stage_refusals(space, config.cluster.zero_stage)
    if is_remote(config.store):
        attempt("store", lambda: reach(config.store), "a bucket to read and write, as s3://bucket/prefix")
    materials = _materials(config, task)
    plan_meters = _meters(config, task, materials, attempt)
    _check_data(config, materials, plan_meters, space, folder, problems, wrong)
    if problems or folder is None or layout is None:
        raise InvalidStudy([loaded.located(problem) for problem in problems])
    origin = Origin(models.digest(folder), _data_digest(materials), config.search.seed)
    timed = frozenset(
        m for name in plan_meters if meters.load(name).exclusive for m in meters.load(name).metrics
    )
    plan = Plan(
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


def _refusals(space: SearchSpace, folder: Path, task: Task) -> list[Problem]:
    """The techniques of the space that do not do models of this family for this task, with the reason."""
    kind = family(models.family_of(folder))
    found = []
    for stage, options in space.stages.items():
        for option in options:
            reason = option.technique.refusal(kind, task)
            if reason is not None:
                name = option.technique.name()
                found.append(
                    Problem(f"space.{stage}.{name}", f"{name} does not do {kind.name} ({task}): {reason}")
                )
    return found


def _stage_refusals(space: SearchSpace, stage: Any) -> list[Problem]:
    """Why this ZeRO stage, if the study names one, is not for all that trains."""
    if stage == "auto":
        return []
    used = [option.technique for option in space.options() if option.technique.trains()]
    lower = sorted({one.name() for one in used if one.highest_stage < stage})
    sparse = any("sparse" in option.technique.leaves for option in space.options())
    if sparse and stage > masks.highest_stage(sparse=True):
        lower += sorted(one.name() for one in used if "sparse" in one.accepts)
    expected = f"got {stage}, expected auto or at most {masks.highest_stage(sparse=True)}"
    why = "read whole weights while they train, or hold the zeros of pruned ones"
    return [Problem("cluster.zero_stage", f"{expected}: {', '.join(lower)} {why}")] if lower else []


def objectives_of(config: StudyConfig) -> tuple[Objective, ...]:
    return tuple(
        Objective(metric, "max" if spec.goal == "max" else "min", spec.limit)
        for metric, spec in config.objectives.items()
    )


def slots_of(config: StudyConfig) -> int:
    """How many jobs run at once on this machine."""
    return os.cpu_count() or 1 if config.cluster.slots == "auto" else int(config.cluster.slots)


def share_of_gpu(memory_gib: float, device_gib: float) -> float:
    """The part of a GPU that a job holds, of which as many share it as its memory holds. Ray counts ten-thousandths."""
    jobs = max(1, math.floor(device_gib / memory_gib))
    return math.floor(10_000 / jobs) / 10_000


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


Check = Callable[..., None]


def _check_values(config: StudyConfig, check: Check) -> None:
    """Ranges and names that need no file to check."""
    name_ok = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.name) is not None
    check("name", (name_ok, f"got {config.name!r}, expected letters, digits, '.', '_' and '-'"))
    check(
        "task",
        (config.task in TASKS, f"got {config.task}, expected one of {', '.join(TASKS)}"),
    )
    check("objectives", (bool(config.objectives), "got none, expected at least one metric with its goal"))
    for metric, spec in config.objectives.items():
        goal = spec.goal
        check(f"objectives.{metric}.goal", (goal in ("min", "max"), f"got {goal!r}, expected min or max"))
    for key, value, low in (
        ("search.candidates", config.search.candidates, 1),
        ("search.seed", config.search.seed, 0),
        ("target.prompt_tokens", config.target.prompt_tokens, 1),
        ("target.new_tokens", config.target.new_tokens, 1),
    ):
        check(key, (value >= low, f"got {value}, expected at least {low}"))
    evaluation = config.data.evaluation
    if evaluation is not None:
        tokens, window = evaluation.tokens, evaluation.window
        check("data.evaluation.tokens", (tokens >= 1, f"got {tokens}, expected at least 1"))
        check(
            "data.evaluation.window",
            (2 <= window <= tokens, f"got {window}, expected 2 to tokens={tokens}"),
        )
    cores = os.cpu_count() or 1
    threads = config.target.threads
    check(
        "target.threads",
        # A cluster's head does not take times: the node that does refuses what it does not have.
        (
            1 <= threads <= cores or (threads >= 1 and config.cluster.address is not None),
            f"got {threads}, expected 1 to {cores}, the cores of this machine",
        ),
    )
    usable = runtimes.names()
    runtime = config.target.runtime
    known = runtime in usable
    lacking = runtimes.load(runtime).missing() if known else None
    check(
        "target.runtime",
        (known, f"got {runtime}, expected one of {', '.join(usable)}"),
        (lacking is None, f"got {runtime}, which does not run here: {lacking}"),
    )
    algorithm, algorithms = config.search.algorithm, search.names()
    check(
        "search.algorithm",
        (algorithm in algorithms, f"got {algorithm}, expected one of {', '.join(algorithms)}"),
    )
    table = config.search.table
    some = isinstance(table, int) and not isinstance(table, bool) and table >= 0
    check("search.table", (table == "auto" or some, f"got {table!r}, expected auto or a whole number from 0"))
    rungs = config.search.rungs
    rising = isinstance(rungs, list) and all(
        isinstance(rung, int | float) and low < rung < 1 for low, rung in itertools.pairwise([0.0, *rungs])
    )
    check(
        "search.rungs",
        (
            rungs == "auto" or rising,
            f"got {rungs!r}, expected auto or rising shares between 0 and 1, such as [0.1, 0.3]",
        ),
    )
    price = config.target.price_per_hour
    check("target.price_per_hour", (price is None or price > 0, f"got {price}, expected more than 0"))
    order = config.search.order
    check("search.order", (order in ("given", "any"), f"got {order}, expected given or any"))
    slots = config.cluster.slots
    whole = isinstance(slots, int) and not isinstance(slots, bool) and slots >= 1
    check(
        "cluster.slots", (slots == "auto" or whole, f"got {slots!r}, expected auto or a whole number from 1")
    )
    memory_gib = config.cluster.memory_gib
    check(
        "cluster.memory_gib",
        (memory_gib is None or memory_gib > 0, f"got {memory_gib}, expected more than 0"),
    )
    gpus = config.cluster.gpus
    number = isinstance(gpus, int | float) and not isinstance(gpus, bool) and 0 <= gpus < math.inf
    check(
        "cluster.gpus",
        (gpus == "auto" or number, f"got {gpus!r}, expected auto or a number from 0"),
        (
            gpus != "auto" or config.cluster.device_gib != "auto",
            "got auto, expected cluster.device_gib with it",
        ),
    )
    start = config.cluster.start_seconds
    check("cluster.start_seconds", (start > 0, f"got {start}, expected more than 0"))
    stall = config.cluster.stall_seconds
    check(
        "cluster.stall_seconds", (stall is None or stall > 0, f"got {stall}, expected more than 0, or null")
    )
    _check_budget(config, check)
    _check_sharing(config, check)


def _check_budget(config: StudyConfig, check: Check) -> None:
    for key, given in (
        ("cluster.price_per_hour", config.cluster.price_per_hour),
        ("budget.money", config.budget.money),
        ("budget.hours", config.budget.hours),
    ):
        some = given is None or 0 < given < math.inf
        check(key, (some, f"got {given}, expected more than 0"))
    on_cluster = config.cluster.address or "RAY_ADDRESS" in os.environ
    check(
        "budget.money",
        (
            config.budget.money is None or config.cluster.price_per_hour is not None or bool(on_cluster),
            f"got {config.budget.money}, expected cluster.price_per_hour with it: what an hour of this machine costs",
        ),
    )


def _check_sharing(config: StudyConfig, check: Check) -> None:
    cluster = config.cluster
    for name in ("ranks", "micro_batch"):
        given = getattr(cluster, name)
        whole = isinstance(given, int) and not isinstance(given, bool) and given >= 1
        told = f"got {given!r}, expected auto or a whole number from 1"
        check(f"cluster.{name}", (given == "auto" or whole, told))
    slots = cluster.slots
    if isinstance(cluster.ranks, int) and (
        isinstance(slots, int) or (slots, cluster.address) == ("auto", None)
    ):
        most = slots_of(config)
        check(
            "cluster.ranks",
            (cluster.ranks <= most, f"got {cluster.ranks}, expected at most the {most} slots"),
        )
    given, stages = cluster.zero_stage, range(sharing.HIGHEST_STAGE + 1)
    known = given == "auto" or (given in stages and not isinstance(given, bool))
    check(
        "cluster.zero_stage", (known, f"got {given!r}, expected auto or one of {', '.join(map(str, stages))}")
    )
    given = cluster.device_gib
    positive = isinstance(given, int | float) and not isinstance(given, bool) and given > 0
    check("cluster.device_gib", (given == "auto" or positive, f"got {given!r}, expected auto or more than 0"))


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
        name = meters.producing(metric, task)
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


def _check_data(
    config: StudyConfig,
    materials: Materials,
    plan_meters: Sequence[str],
    space: SearchSpace,
    folder: Path | None,
    problems: list[Problem],
    wrong: set[str],
) -> None:
    """That every text that is needed is there and long enough."""
    needs = space.needs()
    if "gradients" in needs:
        needs |= {"calibration"}  # the text that they are taken on
    needed_by = {
        need: [
            o.technique.name()
            for o in space.options()
            if need in o.technique.needs or (need == "calibration" and "gradients" in o.technique.needs)
        ]
        for need in needs
    }
    read_by = {reads: name for name in plan_meters if (reads := meters.load(name).reads) is not None}
    for key, source, need in (
        ("data.evaluation", materials.evaluation, "evaluation"),
        ("data.calibration", materials.calibration, "calibration"),
        ("data.train", materials.training, "training"),
    ):
        if source is None:
            if need == "evaluation" and need in read_by and key not in wrong:
                problems.append(
                    Problem(key, f"got nothing, expected a text: {read_by[need]} is measured on it")
                )
            elif need in needs and key not in wrong:
                who = ", ".join(sorted(set(needed_by[need])))
                problems.append(Problem(key, f"got nothing, expected a text: {who} needs it"))
            continue
        if any(other.startswith(key) for other in wrong):
            continue
        try:
            data.check(source)
            if folder is not None:
                data.windows_for(source, folder)
        except (ValueError, OSError) as error:
            problems.append(Problem(key, f"got {error}"))
    read: tuple[tuple[Reads, object, Callable[[Any], object], str], ...] = (
        ("choices", materials.choices, data.choices, "a .jsonl of items"),
        ("labelled", materials.labelled, data.labelled, "a .jsonl of items"),
        ("tasks", materials.tasks, lm_eval_tasks.check, "names of lm-eval's tasks"),
    )
    for reads, given, check_it, expected in read:
        if given is None:
            if reads in read_by:
                problems.append(
                    Problem(f"data.{reads}", f"got nothing, expected {expected}: an objective needs it")
                )
            continue
        if f"data.{reads}" in wrong:
            continue
        try:
            check_it(given)
        except (ValueError, OSError) as error:
            problems.append(Problem(f"data.{reads}", f"got {error}"))


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
