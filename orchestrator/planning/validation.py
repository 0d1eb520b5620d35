"""Check the values of a study, and report each problem with its key."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from jobs import data, meters, parallel, runtimes
from jobs.compression import masks
from jobs.materials import Materials, TextSource
from jobs.measurement.meter import Reads
from jobs.meters import labels, lm_eval_tasks
from jobs.models import loading
from jobs.models.families import TASKS, Task, family
from jobs.parallel import WORKER_GIB
from orchestrator import search
from orchestrator.config.problems import Problem
from orchestrator.config.schema import ClusterSpec, StudyConfig
from orchestrator.planning.job_resources import local_slots
from orchestrator.planning.problem_list import ProblemList
from orchestrator.planning.search_space import SearchSpace

_WHOLE = "auto or a whole number from"
_MIN_STALL_SECONDS = 1.0
"""The shortest time without a report after which a worker may be ended. It reports after each step of a training."""


@dataclass(frozen=True)
class Check:
    """A row of the table of checks: a key, its value, whether the value is valid, and which values are."""

    key: str
    value: object
    holds: bool
    expected: str


def check_values(config: StudyConfig, problems: ProblemList) -> None:
    """Check all ranges and names that can be checked without reading a file of the study."""
    for check in itertools.chain(
        _study_checks(config), _target_checks(config), _search_checks(config),
        _cluster_checks(config), _training_checks(config), _budget_checks(config),
    ):  # fmt: skip
        problems.check(check.key, check.value, check.holds, check.expected)


def _study_checks(config: StudyConfig) -> Iterator[Check]:
    name_is_plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.name) is not None
    yield Check("name", config.name, name_is_plain, "letters, digits, '.', '_' and '-'")
    yield Check("task", config.task, config.task in TASKS, f"one of {', '.join(TASKS)}")
    yield Check("objectives", "none", bool(config.objectives), "at least one metric with its goal")
    for metric, objective in config.objectives.items():
        goal = objective.goal
        yield Check(f"objectives.{metric}.goal", goal, goal in ("min", "max"), "min or max")
    evaluation = config.data.evaluation
    if evaluation is not None:
        tokens, window = evaluation.tokens, evaluation.window
        yield Check("data.evaluation.tokens", tokens, tokens >= 1, "at least 1")
        yield Check("data.evaluation.window", window, 2 <= window <= tokens, f"2 to tokens={tokens}")


def _target_checks(config: StudyConfig) -> Iterator[Check]:
    target = config.target
    yield Check("target.prompt_tokens", target.prompt_tokens, target.prompt_tokens >= 1, "at least 1")
    yield Check("target.new_tokens", target.new_tokens, target.new_tokens >= 1, "at least 1")
    cores = os.cpu_count() or 1
    # On a cluster the node that runs timings checks its own cores; this machine runs none.
    enough = target.threads <= cores or config.cluster.address is not None
    expected = f"1 to {cores}, the cores of this machine"
    yield Check("target.threads", target.threads, target.threads >= 1 and enough, expected)
    names = runtimes.names()
    is_runtime = target.runtime in names
    yield Check("target.runtime", target.runtime, is_runtime, f"one of {', '.join(names)}")
    if is_runtime:
        reason = runtimes.load(target.runtime).missing()
        yield Check("target.runtime", target.runtime, reason is None, f"a runtime that runs here: {reason}")
    price = target.price_per_hour
    yield Check("target.price_per_hour", price, price is None or price > 0, "more than 0")


def _search_checks(config: StudyConfig) -> Iterator[Check]:
    spec, names = config.search, search.names()
    yield Check("search.candidates", spec.candidates, spec.candidates >= 1, "at least 1")
    yield Check("search.seed", spec.seed, spec.seed >= 0, "at least 0")
    yield Check("search.algorithm", spec.algorithm, spec.algorithm in names, f"one of {', '.join(names)}")
    yield Check("search.table", spec.table, _auto_or_whole(spec.table, 0), f"{_WHOLE} 0")
    yield Check("search.order", spec.order, spec.order in ("given", "any"), "given or any")
    expected = "auto or rising shares between 0 and 1, such as [0.1, 0.3]"
    yield Check("search.rungs", spec.rungs, spec.rungs == "auto" or _are_rising_shares(spec.rungs), expected)


def _cluster_checks(config: StudyConfig) -> Iterator[Check]:
    spec = config.cluster
    yield Check("cluster.slots", spec.slots, _auto_or_whole(spec.slots, 1), f"{_WHOLE} 1")
    if isinstance(spec.slots, int) and spec.address is None:
        max_slots = max(1, int(psutil.virtual_memory().total / 2**30 / WORKER_GIB))
        expected = f"at most {max_slots}: each worker of this machine needs {WORKER_GIB} GiB of memory"
        yield Check("cluster.slots", spec.slots, spec.slots <= max_slots, expected)
    limit_is_valid = spec.memory_gib is None or spec.memory_gib > 0
    yield Check("cluster.memory_gib", spec.memory_gib, limit_is_valid, "more than 0")
    gpus_are_valid = spec.gpus == "auto" or (_is_number(spec.gpus) and 0 <= float(spec.gpus) < math.inf)
    yield Check("cluster.gpus", spec.gpus, gpus_are_valid, "auto or a number from 0")
    if _is_number(spec.gpus) and spec.address is None:
        uses_none = float(spec.gpus) == 0
        yield Check("cluster.gpus", spec.gpus, uses_none, "0 or auto, or cluster.address with it")
    can_be_shared = spec.gpus != "auto" or spec.device_gib != "auto"
    yield Check("cluster.gpus", spec.gpus, can_be_shared, "cluster.device_gib with it")
    yield Check("cluster.start_seconds", spec.start_seconds, spec.start_seconds > 0, "more than 0")
    stall_is_valid = spec.stall_seconds is None or spec.stall_seconds >= _MIN_STALL_SECONDS
    expected = f"at least {_MIN_STALL_SECONDS:g}, or null: a single step of a job may take seconds"
    yield Check("cluster.stall_seconds", spec.stall_seconds, stall_is_valid, expected)


def _training_checks(config: StudyConfig) -> Iterator[Check]:
    spec = config.cluster
    yield Check("cluster.ranks", spec.ranks, _auto_or_whole(spec.ranks, 1), f"{_WHOLE} 1")
    slots_are_known = isinstance(spec.slots, int) or (spec.slots == "auto" and spec.address is None)
    if isinstance(spec.ranks, int) and slots_are_known:
        slots = local_slots(config)
        yield Check("cluster.ranks", spec.ranks, spec.ranks <= slots, f"at most the {slots} slots")
    rows = spec.micro_batch
    yield Check("cluster.micro_batch", rows, _auto_or_whole(rows, 1), f"{_WHOLE} 1")
    stages = range(parallel.HIGHEST_STAGE + 1)
    stage = spec.zero_stage
    stage_is_valid = stage == "auto" or (stage in stages and not isinstance(stage, bool))
    yield Check("cluster.zero_stage", stage, stage_is_valid, f"auto or one of {', '.join(map(str, stages))}")
    device_gib = spec.device_gib
    device_is_valid = device_gib == "auto" or (_is_number(device_gib) and float(device_gib) > 0)
    yield Check("cluster.device_gib", device_gib, device_is_valid, "auto or more than 0")


def _budget_checks(config: StudyConfig) -> Iterator[Check]:
    node_price, money, hours = config.cluster.price_per_hour, config.budget.money, config.budget.hours
    for key, amount in (
        ("cluster.price_per_hour", node_price), ("budget.money", money), ("budget.hours", hours),
    ):  # fmt: skip
        yield Check(key, amount, amount is None or 0 < amount < math.inf, "more than 0")
    on_cluster = config.cluster.address is not None or "RAY_ADDRESS" in os.environ
    has_price = money is None or node_price is not None or on_cluster
    expected = "cluster.price_per_hour with it: what an hour of this machine costs"
    yield Check("budget.money", money, has_price, expected)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _auto_or_whole(value: object, low: int) -> bool:
    is_whole = isinstance(value, int) and not isinstance(value, bool) and value >= low
    return value == "auto" or is_whole


def _are_rising_shares(rungs: object) -> bool:
    """Whether these are numbers above 0, below 1, each above the one before."""
    if not isinstance(rungs, list):
        return False
    low = 0.0
    for rung in rungs:
        if not isinstance(rung, int | float) or not low < rung < 1:
            return False
        low = rung
    return True


def check_techniques(space: SearchSpace, folder: Path, task: Task, problems: ProblemList) -> None:
    """Report each technique of the space that does not support this model's family or task, with the reason."""
    kind = family(loading.family_of(folder))
    for stage, options in space.stages.items():
        for option in options:
            reason = option.technique.refusal(kind, task)
            if reason is not None:
                name = option.technique.name()
                message = f"{name} does not support {kind.name} ({task}): {reason}"
                problems.add(Problem(f"space.{stage}.{name}", message))


def check_zero_stage(space: SearchSpace, cluster: ClusterSpec, problems: ProblemList) -> None:
    """Report a ZeRO stage at which some technique of the space cannot train."""
    stage = cluster.zero_stage
    if not isinstance(stage, int) or problems.has("cluster.zero_stage"):
        return
    trained = [option.technique for option in space.options() if option.technique.trains()]
    unsupported = sorted({technique.name() for technique in trained if technique.highest_stage < stage})
    sparse = any("sparse" in option.technique.produces for option in space.options())
    highest = masks.highest_stage(sparse=True)
    if sparse and stage > highest:
        unsupported += sorted(technique.name() for technique in trained if "sparse" in technique.accepts)
    if unsupported:
        reason = "read whole weights while they train, or keep pruned weights at zero"
        expected = f"auto or at most {highest}: {', '.join(unsupported)} {reason}"
        problems.check("cluster.zero_stage", stage, False, expected)


def check_data(
    materials: Materials,
    meter_names: Sequence[str],
    space: SearchSpace,
    folder: Path | None,
    problems: ProblemList,
) -> None:
    """Report each text and each set of items that is needed and missing, unreadable or too short.

    folder: of the original model, whose tokenizer counts the tokens; None if it was not found.
    """
    meter_by_reads = {meters.load(name).reads: name for name in meter_names}
    measured_by = meter_by_reads.get("evaluation")
    reason = None if measured_by is None else f"{measured_by} is measured on it"
    _check_text("data.evaluation", materials.evaluation, reason, folder, problems)
    _check_text(
        "data.calibration",
        materials.calibration,
        _reason_of(space, {"calibration", "gradients"}),  # gradients are computed on the calibration text
        folder,
        problems,
    )
    _check_text("data.train", materials.training, _reason_of(space, {"training"}), folder, problems)
    trains = _reason_of(space, {"training"}) is not None
    if trains and not problems.has_below("data.evaluation") and not problems.has_below("data.train"):
        _check_overlap(materials, problems)
    sources: tuple[tuple[Reads, object, Callable[[Any], object], str], ...] = (
        ("choices", materials.choices, data.choices, "a .jsonl of items"),
        ("labelled", materials.labelled, partial(_read_labelled, folder=folder), "a .jsonl of items"),
        ("tasks", materials.tasks, lm_eval_tasks.check, "names of lm-eval's tasks"),
    )
    for reads, source, read, expected in sources:
        key = f"data.{reads}"
        if source is None:
            if reads in meter_by_reads:
                problems.add(Problem(key, f"got nothing, expected {expected}: an objective needs it"))
            continue
        if problems.has(key):
            continue
        try:
            read(source)
        except (ValueError, OSError) as error:
            problems.add(Problem(key, f"got {error}"))


def _read_labelled(path: str, folder: Path | None) -> None:
    """Read labelled texts, and compare the labels with the model's if its folder is known."""
    if folder is None:
        data.labelled(path)
    else:
        labels.check_labels(path, folder)


def _check_overlap(materials: Materials, problems: ProblemList) -> None:
    """Report an evaluation text that is contained in the training text: quality would be measured on learned text."""
    evaluation, training = materials.evaluation, materials.training
    if evaluation is None or training is None:
        return
    if data.overlap(evaluation, training) == 1:
        message = (
            "got a text that is all in data.train, expected another text, or another part of the same one"
        )
        problems.add(Problem("data.evaluation", message))


def _reason_of(space: SearchSpace, needs: set[str]) -> str | None:
    """Why a text is needed; None if no technique needs it."""
    names = sorted({option.technique.name() for option in space.options() if option.technique.needs & needs})
    if not names:
        return None
    return f"{', '.join(names)} {'needs' if len(names) == 1 else 'need'} it"


def _check_text(
    key: str, source: TextSource | None, reason: str | None, folder: Path | None, problems: ProblemList
) -> None:
    """reason: why the text is needed; None if it is optional."""
    if source is None:
        if reason is not None and not problems.has(key):
            problems.add(Problem(key, f"got nothing, expected a text: {reason}"))
        return
    if problems.has_below(key):
        return
    try:
        data.check(source)
        if folder is not None:
            data.check_positions(source.tokens, folder)
            data.check_windows(source, folder)
    except (ValueError, OSError) as error:
        problems.add(Problem(key, f"got {error}"))
