"""Describe the techniques for `slimfront techniques`: options, needs, and the models that each refuses."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jobs import techniques
from jobs.models import families
from jobs.models.families import Task
from jobs.technique import Technique


@dataclass(frozen=True)
class Option:
    """One option of a technique, as text."""

    name: str
    default: str
    domain: str
    """The allowed values."""
    help: str


@dataclass(frozen=True)
class Entry:
    """The description of one technique."""

    name: str
    kind: str
    version: int
    about: str
    paper: str
    needs: tuple[str, ...]
    works_on: tuple[str, ...]
    produces: tuple[str, ...]
    families: tuple[str, ...]
    refuses: Mapping[str, Mapping[Task, str]]
    """The reasons for refused models, by family and task."""
    options: tuple[Option, ...]

    def refusals(self) -> dict[str, list[str]]:
        """Return the refused models by reason.

        A model is the name of a task (all families), of a family (all its tasks), or `gpt2 for classification`.
        """
        pairs: dict[str, list[tuple[str, Task]]] = {}
        for family, by_task in self.refuses.items():
            for task, reason in by_task.items():
                pairs.setdefault(reason, []).append((family, task))
        return {reason: _grouped(refused) for reason, refused in pairs.items()}


def entries(names: Sequence[str]) -> list[Entry]:
    """Describe the techniques of these names. Raises LookupError for an unknown name."""
    return [_entry(techniques.load(name)) for name in names]


def _entry(technique: type[Technique]) -> Entry:
    refuses = {}
    for name in families.names():
        reasons = _refusals(technique, name)
        if reasons:
            refuses[name] = reasons
    options = []
    for field in dataclasses.fields(technique):
        domain, help = str(field.metadata["domain"]), field.metadata["help"]
        options.append(Option(field.name, str(field.default), domain, help))
    return Entry(
        name=technique.name(),
        kind=technique.kind,
        version=technique.version,
        about=(inspect.getdoc(technique) or "").partition("\n\n")[0].replace("\n", " "),
        paper=technique.paper,
        needs=tuple(sorted(technique.needs)),
        works_on=tuple(sorted(technique.accepts)),
        produces=tuple(sorted(technique.produces)),
        families=tuple(
            name for name in families.names() if families.family(name).tasks[0] not in refuses.get(name, {})
        ),
        refuses=refuses,
        options=tuple(options),
    )


def _refusals(technique: type[Technique], family_name: str) -> dict[Task, str]:
    """Return the reasons by task for which a technique refuses models of this family."""
    family = families.family(family_name)
    reasons = {}
    for task in family.tasks:
        reason = technique.refusal(family, task)
        if reason is not None:
            reasons[task] = reason
    return reasons


def _grouped(refused: Sequence[tuple[str, Task]]) -> list[str]:
    """Name these pairs of family and task with the fewest words: grouped by family first, or by task first."""
    by_family, by_task = _grouped_by(refused, (0, 1)), _grouped_by(refused, (1, 0))
    return min(by_family, by_task, key=len)


def _grouped_by(refused: Sequence[tuple[str, Task]], order: tuple[int, int]) -> list[str]:
    """Replace complete groups of pairs by their common family or task.

    order: the positions in a pair (0: family, 1: task) in the order in which groups are formed.
    """
    all_pairs = [(name, task) for name in families.names() for task in families.family(name).tasks]
    names: list[str] = []
    remaining = list(refused)
    for position in order:
        for value in dict.fromkeys(pair[position] for pair in remaining):
            group = [pair for pair in all_pairs if pair[position] == value]
            if all(pair in remaining for pair in group):
                names.append(value)
                remaining = [pair for pair in remaining if pair not in group]
    return names + [f"{family} for {task}" for family, task in remaining]
