"""Choose the meters of a study, and the shares of the evaluation text on which candidates are compared."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from jobs import meters
from jobs.materials import Materials
from jobs.models.families import Task
from orchestrator.config.schema import StudyConfig
from orchestrator.planning.problem_list import ProblemList

FIRST_RUNG = 1 / 64
FIRST_RUNG_OF_OLD_STUDIES = 1 / 16
"""The first share of studies that version 0.1.0 began. Their ledgers do not record it."""
_RUNG_RATIO = 4
"""Each share is this many times the one before."""
_MIN_WINDOWS = 8
"""Windows of text on which candidates are compared, at least: fewer estimate the variation between windows badly."""


def choose_meters(
    config: StudyConfig, task: Task, materials: Materials, problems: ProblemList
) -> tuple[str, ...]:
    """The names of the meters that the objectives need, and of further ones: the size, quality on the data that the
    study names and, if anything is timed, every meter that needs a timed process as well."""
    chosen = {"size"}
    expected = f"a metric of task {task} that this machine can measure"
    for metric in config.objectives:
        meter = problems.attempt(
            f"objectives.{metric}", partial(_meter_of, metric, task, materials), expected
        )
        if meter is not None:
            chosen.add(meter)
    if any(meters.load(name).exclusive for name in chosen):
        chosen |= _exclusive_meters(task, materials)
    if task == "causal-lm" and materials.evaluation is not None:
        chosen.add("text")
    if materials.choices is not None:
        chosen.add("choices")
    if materials.tasks is not None:
        expected = f"tasks that task {task} can be measured on"
        meter = problems.attempt("data.tasks", partial(_meter_of, "task_score", task, materials), expected)
        if meter is not None:
            chosen.add(meter)
    return tuple(sorted(chosen))


def rungs_of(
    config: StudyConfig, materials: Materials, names: Sequence[str], first: float = FIRST_RUNG
) -> tuple[float, ...]:
    """The shares of the evaluation that candidates are measured on in turn; the last is 1.

    names: of all meters. With `rungs: auto` the first share is `first`, or more if that is too few windows.
    """
    if config.search.rungs != "auto":
        return (*map(float, config.search.rungs), 1.0)
    reads = {meters.load(name).reads for name in names} - {None}
    if reads != {"evaluation"} or materials.evaluation is None:
        return (1.0,)
    first = max(first, _MIN_WINDOWS / materials.evaluation.samples)
    shares = [first * _RUNG_RATIO**rung for rung in range(3)]
    return (*(share for share in shares if share <= 1 / 2), 1.0)


def _meter_of(metric: str, task: Task, materials: Materials) -> str:
    """The meter that measures a metric. ValueError or LookupError if none can do so on this machine."""
    name = meters.meter_of(metric, task)
    if metric not in meters.load(name).metrics:
        raise ValueError(f"{metric}, which describes the machine and not a model")
    reason = meters.load(name).missing(materials.target)
    if reason is not None:
        raise ValueError(f"{metric}, which cannot be measured here: {reason}")
    return name


def _exclusive_meters(task: Task, materials: Materials) -> set[str]:
    """All meters that run in a timed process, and can do so on this machine."""
    usable = set()
    for name in meters.names():
        meter = meters.load(name)
        if meter.exclusive and task in meter.tasks and meter.missing(materials.target) is None:
            usable.add(name)
    return usable
