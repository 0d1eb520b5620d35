"""Catalogue: what techniques there are, for whom, and why not for others."""

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
    """One option of a technique: its default and what it may be, as text, and what it does."""

    name: str
    default: str
    domain: str
    help: str


@dataclass(frozen=True)
class Entry:
    """What one technique is. refuses: by family and task, the reason why it does not do such models."""

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
    options: tuple[Option, ...]

    def refusals(self) -> dict[str, list[str]]:
        """The models that each reason is given for: a task's name for all that do it, a family's for all its
        tasks, or `gpt2 for classification`."""
        pairs: dict[str, list[tuple[str, Task]]] = {}
        for family, by_task in self.refuses.items():
            for task, reason in by_task.items():
                pairs.setdefault(reason, []).append((family, task))
        return {reason: _summed_up(found) for reason, found in pairs.items()}


def _summed_up(refused: Sequence[tuple[str, Task]]) -> list[str]:
    """As few words as say it: families as a whole first or tasks first, whichever is shorter."""
    return min((_named(refused, places) for places in ((0, 1), (1, 0))), key=len)


def _named(refused: Sequence[tuple[str, Task]], places: tuple[int, int]) -> list[str]:
    every = [(name, task) for name in families.names() for task in families.family(name).tasks]
    shown: list[str] = []
    left = list(refused)
    for place in places:
        for value in dict.fromkeys(pair[place] for pair in left):
            whole = [pair for pair in every if pair[place] == value]
            if all(pair in left for pair in whole):
                shown.append(value)
                left = [pair for pair in left if pair not in whole]
    return shown + [f"{family} for {task}" for family, task in left]


def entries(names: Sequence[str]) -> list[Entry]:
    """The techniques of these names; LookupError for one that there is not."""
    return [_entry(techniques.load(name)) for name in names]


def _entry(technique: type[Technique]) -> Entry:
    refuses = {
        family.name: by_task
        for family in map(families.family, families.names())
        if (
            by_task := {
                task: reason
                for task in family.tasks
                if (reason := technique.refusal(family, task)) is not None
            }
        )
    }
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
            one for one in families.names() if families.family(one).tasks[0] not in refuses.get(one, {})
        ),
        refuses=refuses,
        options=tuple(
            Option(field.name, str(field.default), str(field.metadata["domain"]), field.metadata["help"])
            for field in dataclasses.fields(technique)
        ),
    )
