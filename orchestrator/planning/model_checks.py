"""Check a space against the layout of the original: options that the model cannot have, and limits out of reach."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from jobs.materials import Target
from jobs.models.layout import Layout
from jobs.technique import Technique
from orchestrator.config.problems import Problem
from orchestrator.config.schema import StudyConfig
from orchestrator.planning.cost import cost_of
from orchestrator.planning.problem_list import ProblemList
from orchestrator.planning.search_space import Option, SearchSpace

_SURELY = 2.0
"""A limit is out of reach if the smallest model is this many times larger: greedy choices may miss a smaller one."""


def check_options(space: SearchSpace, layout: Layout, problems: ProblemList) -> None:
    """Report each value of an option that no combination with the other options makes possible for the original."""
    for stage, options in space.stages.items():
        for option in options:
            if "dense" not in option.technique.accepts:
                continue  # it follows another technique, whose output is not known here
            for name, message in _impossible(option, layout):
                problems.add(Problem(f"space.{stage}.{option.technique.name()}.{name}", f"got {message}"))


def check_size_limit(
    config: StudyConfig,
    space: SearchSpace,
    layout: Layout,
    target: Target,
    folder: Path,
    problems: ProblemList,
) -> None:
    """Report a limit on size that no candidate of the space can reach."""
    objective = config.objectives.get("size_bytes")
    if objective is None or objective.limit is None or objective.goal != "min":
        return
    smallest = layout
    for options in space.stages.values():
        smallest = min((smallest, *_outputs(options, smallest)), key=lambda child: child.size_bytes())
    size_bytes = cost_of(smallest, target, folder).size_bytes
    expected = f"a limit that a candidate can reach: the smallest one found has {size_bytes:,} bytes"
    problems.check(
        "objectives.size_bytes.limit", objective.limit, size_bytes <= _SURELY * objective.limit, expected
    )


def _impossible(option: Option, layout: Layout) -> Iterator[tuple[str, str]]:
    """Yield each option name with a value that fails in all corners, and the message of the failure."""
    possible: set[tuple[str, object]] = set()
    failures: dict[tuple[str, object], str] = {}
    for values in option.corners():
        message = ""
        try:
            option.step(values).output_layout(layout)
        except ValueError as error:
            message = str(error)
        settings = [(name.partition(".")[0], value) for name, value in values.items()]
        settings += option.fixed.items()
        for setting in settings:
            if message:
                failures.setdefault(setting, message)
            else:
                possible.add(setting)
    reported: set[str] = set()
    for (name, value), message in failures.items():
        if (name, value) not in possible and f"{name}={value}" in message and name not in reported:
            reported.add(name)
            yield name, message


def _outputs(options: tuple[Option, ...], layout: Layout) -> Iterator[Layout]:
    for option in options:
        for values in option.corners():
            child = _output(option.step(values), layout)
            if child is not None:
                yield child


def _output(step: Technique, layout: Layout) -> Layout | None:
    try:
        return step.output_layout(layout)
    except ValueError:
        return None
