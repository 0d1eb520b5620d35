"""The search space of a study: ordered stages of techniques, and the knobs that a search chooses."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from jobs.knobs import Choice, Domain, Range, Value, profile
from jobs.recipe import Origin, Recipe
from jobs.technique import Technique

SKIP = "skip"
ORDER = "order"
_SEPARATOR = ", "
_MAX_CORNERS = 2**6
"""The number of combinations of extreme values that are tried for one technique: each costs the layout of a model."""
Choices = Mapping[str, Value]
"""A technique (or `skip`) for each stage, and a value for every knob, used or not."""


@dataclass(frozen=True)
class KnobsPerPart:
    """The knobs of an option that is searched for each block or linear, or for each run of neighbouring ones."""

    domain: Domain
    """The domain of each knob."""
    runs: int
    """The number of knobs."""
    by_linear: bool
    """Whether linears have their own values; otherwise blocks have."""
    grouped: bool
    """Whether the study gives the number of runs. Otherwise each part is a run of its own."""

    def names(self, option: str) -> list[str]:
        """Return the names of the knobs within the technique."""
        return [f"{option}.{run}" for run in range(self.runs)]


@dataclass(frozen=True)
class Option:
    """One technique that a stage may apply, with its searched and its fixed options."""

    technique: type[Technique]
    searched: Mapping[str, Domain]
    """Options with one value for the whole model."""
    fixed: Mapping[str, Value]
    per_part: Mapping[str, KnobsPerPart] = field(default_factory=dict)
    """Options with a value for each block, linear or run of them."""

    def knobs(self) -> dict[str, Domain]:
        """Return the domain of each knob by its name within the technique."""
        knobs = dict(self.searched)
        for option, part_knobs in self.per_part.items():
            knobs.update(dict.fromkeys(part_knobs.names(option), part_knobs.domain))
        return knobs

    def corners(self) -> Iterator[dict[str, Value]]:
        """Yield combinations of the extreme values of the knobs, by their names within the technique.

        Options of blocks, linears or runs have the same value everywhere. At most 64 combinations are yielded.
        """
        ends = {name: _ends(domain) for name, domain in self.searched.items()}
        ends |= {name: _ends(knobs.domain) for name, knobs in self.per_part.items()}
        for values in itertools.islice(itertools.product(*ends.values()), _MAX_CORNERS):
            corner: dict[str, Value] = {}
            for name, value in zip(ends, values, strict=True):
                names = [name]
                if name in self.per_part:
                    names = self.per_part[name].names(name)
                corner.update(dict.fromkeys(names, value))
            yield corner

    def step(self, values: Choices) -> Technique:
        """Return the technique with these values of its knobs, by their names within it."""
        options = {name: _rounded(values[name]) for name in self.searched}
        for option, part_knobs in self.per_part.items():
            options[option] = profile([_rounded(values[name]) for name in part_knobs.names(option)])
        return self.technique.of({**self.fixed, **options})


@dataclass(frozen=True)
class SearchSpace:
    """All recipes that a study may try."""

    stages: Mapping[str, tuple[Option, ...]]
    """In the order in which they are applied. Every stage may also be skipped."""
    orders: tuple[tuple[str, ...], ...] = ()
    """The valid orders of the stages, as their names, if the order is searched too."""

    def knobs(self) -> dict[str, Domain]:
        """Return every knob by its full name.

        `STAGE` chooses the technique, `STAGE.TECHNIQUE.OPTION` its option, `STAGE.TECHNIQUE.OPTION.RUN` the option of
        one run of blocks or linears, and `order` names the stages from the first to the last if the order is searched.
        """
        knobs: dict[str, Domain] = {}
        if self.orders:
            knobs[ORDER] = Choice(tuple(_SEPARATOR.join(order) for order in self.orders))
        for stage, options in self.stages.items():
            knobs[stage] = Choice((SKIP, *(option.technique.name() for option in options)))
            for option in options:
                for name, domain in option.knobs().items():
                    knobs[f"{stage}.{option.technique.name()}.{name}"] = domain
        return knobs

    def recipe(self, origin: Origin, choices: Choices) -> Recipe:
        """Return the recipe of these choices, without steps that change nothing and recoveries of the original."""
        recipe = Recipe(origin)
        order: list[str] = list(self.stages)
        if self.orders:
            order = str(choices[ORDER]).split(_SEPARATOR)
        for stage in order:
            for option in self.stages[stage]:
                name = option.technique.name()
                if choices[stage] != name:
                    continue
                if option.technique.recovers() and not recipe.steps:
                    continue
                values = {knob: choices[f"{stage}.{name}.{knob}"] for knob in option.knobs()}
                recipe = recipe.then(option.step(values))
        return recipe

    def single_techniques(self) -> Iterator[list[dict[str, Value]]]:
        """Yield for each technique the choices that apply it alone, its options at the ends of their domains.

        Options of blocks, linears or runs have the same value everywhere. A technique of more than six options gives
        only the first combinations.
        """
        defaults = {name: _ends(domain)[0] for name, domain in self.knobs().items()}
        defaults |= dict.fromkeys(self.stages, SKIP)
        for stage, options in self.stages.items():
            for option in options:
                name = option.technique.name()
                corners = []
                for corner in option.corners():
                    knobs = {f"{stage}.{name}.{knob}": value for knob, value in corner.items()}
                    corners.append({**defaults, stage: name, **knobs})
                yield corners

    def needs(self) -> set[str]:
        """Return the inputs that any technique of the space needs: calibration, teacher, training …"""
        return {need for option in self.options() for need in option.technique.needs}

    @property
    def by_linear(self) -> bool:
        """Whether an option may differ from linear to linear."""
        return any(knobs.by_linear for option in self.options() for knobs in option.per_part.values())

    def options(self) -> Iterator[Option]:
        return itertools.chain.from_iterable(self.stages.values())

    def size(self) -> float:
        """Return the number of different choices; infinite with a continuous knob."""
        total = float(max(1, len(self.orders)))
        for options in self.stages.values():
            total *= 1 + sum(_count(option.knobs()) for option in options)
        return total


def _rounded(value: Value) -> Value:
    """Return a number with three significant digits: people can read and type it, and finer differences are noise."""
    if isinstance(value, float):
        return float(f"{value:.3g}")
    return value


def _ends(domain: Domain) -> tuple[Value, ...]:
    """Return the lowest and the highest value of numbers, or the first of other values."""
    if isinstance(domain, Range):
        return domain.normal(domain.low), domain.normal(domain.high)
    numbers = [value for value in domain.values if not isinstance(value, (str, bool))]
    if len(numbers) == len(domain.values):
        return min(numbers), max(numbers)
    return domain.values[:1]


def _count(knobs: Mapping[str, Domain]) -> float:
    """Return the number of combinations of values."""
    total = 1.0
    for domain in knobs.values():
        if isinstance(domain, Choice):
            total *= len(domain.values)
        elif domain.integer:
            total *= domain.high - domain.low + 1
        else:
            total *= float("inf")
    return total
