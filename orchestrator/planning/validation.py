"""Check the values of a study and report each problem."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jobs import data, meters, parallel, runtimes
from jobs.compression import masks
from jobs.materials import Materials
from jobs.measurement.meter import Reads
from jobs.meters import lm_eval_tasks
from jobs.models import loading
from jobs.models.families import TASKS, Task, family
from orchestrator import search
from orchestrator.config.problems import Problem
from orchestrator.config.schema import StudyConfig
from orchestrator.planning.job_resources import slots_of
from orchestrator.planning.search_space import SearchSpace


def refusals(space: SearchSpace, folder: Path, task: Task) -> list[Problem]:
    """The techniques of the space that do not do models of this family for this task, with the reason."""
    kind = family(loading.family_of(folder))
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


def stage_refusals(space: SearchSpace, stage: Any) -> list[Problem]:
    """Why this ZeRO stage, if the study names one, is not for all that trains."""
    if stage == "auto":
        return []
    used = [option.technique for option in space.options() if option.technique.trains()]
    lower = sorted({one.name() for one in used if one.highest_stage < stage})
    sparse = any("sparse" in option.technique.produces for option in space.options())
    if sparse and stage > masks.highest_stage(sparse=True):
        lower += sorted(one.name() for one in used if "sparse" in one.accepts)
    expected = f"got {stage}, expected auto or at most {masks.highest_stage(sparse=True)}"
    why = "read whole weights while they train, or hold the zeros of pruned ones"
    return [Problem("cluster.zero_stage", f"{expected}: {', '.join(lower)} {why}")] if lower else []


Check = Callable[..., None]


def check_values(config: StudyConfig, check: Check) -> None:
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
    given, stages = cluster.zero_stage, range(parallel.HIGHEST_STAGE + 1)
    known = given == "auto" or (given in stages and not isinstance(given, bool))
    check(
        "cluster.zero_stage", (known, f"got {given!r}, expected auto or one of {', '.join(map(str, stages))}")
    )
    given = cluster.device_gib
    positive = isinstance(given, int | float) and not isinstance(given, bool) and given > 0
    check("cluster.device_gib", (given == "auto" or positive, f"got {given!r}, expected auto or more than 0"))


def check_data(
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
