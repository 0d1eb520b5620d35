"""SearchSpace: ordered stages of techniques, their knobs narrowed by the study. Choices in, recipes out."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jobs import techniques
from jobs.knobs import Choice, Domain, Range, Value, profile
from jobs.recipe import Origin, Recipe
from jobs.technique import Technique, check_order
from orchestrator.config.problems import Problem

SKIP = "skip"
ORDER = "order"
_THEN = ", "
_MOST_STAGES = 6
"""720 orders: with more stages, most of the search would go into their order."""
_CORNERS = 2**6
"""So many combinations of ends at most: each costs the layout of a model."""
Choices = Mapping[str, Value]
"""What a search chose: a technique (or `skip`) per stage, and a value for every knob, used or not."""


@dataclass(frozen=True)
class Spread:
    """What an option may be where it is searched block by block, or linear by linear: `runs` knobs of this domain,
    each for a run of neighbours.

    by_linear: whether linears are told apart, and not blocks alone; grouped: whether a run is more than one.
    """

    domain: Domain
    runs: int
    by_linear: bool
    grouped: bool


@dataclass(frozen=True)
class Depth:
    """How many parts a model has that may be treated each in its own way."""

    blocks: int = 1
    linears: int = 1


SHALLOW = Depth()


@dataclass(frozen=True)
class Option:
    """One technique that a stage may take, with the domains of the options that are searched and the fixed rest.

    spread: the options that are searched block by block, or linear by linear.
    """

    technique: type[Technique]
    searched: Mapping[str, Domain]
    fixed: Mapping[str, Value]
    spread: Mapping[str, Spread] = field(default_factory=dict)

    def knobs(self) -> dict[str, Domain]:
        """Each of its knobs by its name within the technique."""
        every = {f"{name}.{run}": one.domain for name, one in self.spread.items() for run in range(one.runs)}
        return {**self.searched, **every}

    def step(self, chosen: Choices) -> Technique:
        """The technique with these values of its knobs, by their names within it."""
        options = {name: _rounded(chosen[name]) for name in self.searched}
        for name, one in self.spread.items():
            options[name] = profile([_rounded(chosen[f"{name}.{run}"]) for run in range(one.runs)])
        return self.technique.of({**self.fixed, **options})


@dataclass(frozen=True)
class SearchSpace:
    """stages: in the order in which they are applied; every stage may also be skipped.

    orders: where the order is searched as well, all that make sense, each as the stages' names.
    """

    stages: Mapping[str, tuple[Option, ...]]
    orders: tuple[tuple[str, ...], ...] = ()

    def knobs(self) -> dict[str, Domain]:
        """Every knob by its full name: `STAGE` chooses the technique, `STAGE.TECHNIQUE.OPTION` its option, and
        `STAGE.TECHNIQUE.OPTION.RUN` that of one run of blocks or linears, where each is searched; `order`, where it
        is searched, names the stages from the first to the last."""
        found: dict[str, Domain] = {}
        if self.orders:
            found[ORDER] = Choice(tuple(_THEN.join(order) for order in self.orders))
        for stage, options in self.stages.items():
            found[stage] = Choice((SKIP, *(option.technique.name() for option in options)))
            for option in options:
                for name, domain in option.knobs().items():
                    found[f"{stage}.{option.technique.name()}.{name}"] = domain
        return found

    def recipe(self, origin: Origin, choices: Choices) -> Recipe:
        """The recipe of these choices. Steps that change nothing, and recoveries of nothing, are left out."""
        recipe = Recipe(origin)
        order = str(choices[ORDER]).split(_THEN) if self.orders else self.stages
        for stage in order:
            for option in self.stages[stage]:
                name = option.technique.name()
                if choices[stage] != name:
                    continue
                if option.technique.recovers() and not recipe.steps:
                    continue
                chosen = {knob: choices[f"{stage}.{name}.{knob}"] for knob in option.knobs()}
                recipe = recipe.then(option.step(chosen))
        return recipe

    def alone(self) -> Iterator[list[dict[str, Value]]]:
        """For each technique, the choices that take it by itself, its options at the ends of what is searched; of more
        than six options not all combinations."""
        others = {name: _ends(domain)[0] for name, domain in self.knobs().items()}
        others |= dict.fromkeys(self.stages, SKIP)
        for stage, options in self.stages.items():
            for option in options:
                name = option.technique.name()
                ends = {f"{stage}.{name}.{knob}": _ends(domain) for knob, domain in option.searched.items()}
                # Where each block chooses, all choose alike.
                spread = {f"{stage}.{name}.{knob}": one for knob, one in option.spread.items()}
                ends |= {knob: _ends(one.domain) for knob, one in spread.items()}
                found = []
                for values in itertools.islice(itertools.product(*ends.values()), _CORNERS):
                    chosen = dict(zip(ends, values, strict=True))
                    for knob, one in spread.items():
                        value = chosen.pop(knob)
                        chosen |= {f"{knob}.{run}": value for run in range(one.runs)}
                    found.append({**others, stage: name, **chosen})
                yield found

    def needs(self) -> set[str]:
        """What any technique of the space needs (calibration, teacher, training …)."""
        return {need for option in self.options() for need in option.technique.needs}

    @property
    def by_linear(self) -> bool:
        """Whether some option may differ from linear to linear."""
        return any(one.by_linear for option in self.options() for one in option.spread.values())

    def options(self) -> Iterator[Option]:
        return itertools.chain.from_iterable(self.stages.values())

    def size(self) -> float:
        """How many different choices there are; infinite with a continuous knob."""
        total = float(max(1, len(self.orders)))
        for options in self.stages.values():
            total *= 1 + sum(_count(option.knobs()) for option in options)
        return total


def parse(
    given: Mapping[str, Any], any_order: bool = False, depth: Depth = SHALLOW
) -> tuple[SearchSpace, list[Problem]]:
    """The space that the study's `space:` describes, and all that is wrong with it.

    An option's value may be one value (fixed), a list (one of these) or `{low, high}` (anything between); or
    `{choices: [...], each: layer}` or `{low, high, each: layer}`, which every block chooses for itself, or with
    `each: linear` every linear, or with `groups: COUNT` beside it every run of neighbours.
    any_order: search the order of the stages too, among all that the techniques' forms allow.
    depth: the original's.
    """
    problems: list[Problem] = []
    stages: dict[str, tuple[Option, ...]] = {}
    for stage, alternatives in given.items():
        key = f"space.{stage}"
        if not isinstance(alternatives, Mapping) or not alternatives:
            problems.append(Problem(key, f"got {alternatives!r}, expected techniques with their options"))
            continue
        options = [
            _option(f"{key}.{name}", str(name), given, depth, problems)
            for name, given in alternatives.items()
        ]
        stages[str(stage)] = tuple(option for option in options if option is not None)
    if not given:
        problems.append(Problem("space", "got no stage, expected at least one"))
    space = SearchSpace(stages)
    if ORDER in stages and any_order:
        problems.append(Problem(f"space.{ORDER}", "got a stage of this name, expected another: it is a knob"))
    if not problems and any_order:
        return _in_any_order(space)
    if not problems:
        problems += _order_problems(space)
    return space, problems


def _in_any_order(space: SearchSpace) -> tuple[SearchSpace, list[Problem]]:
    """The same space with every order of its stages that makes sense, the given one first if it does."""
    if len(space.stages) > _MOST_STAGES:
        message = f"got {len(space.stages)} stages, expected at most {_MOST_STAGES} to search their order"
        return space, [Problem("space", message)]
    possible = [
        order
        for order in itertools.permutations(space.stages)
        if not _order_problems(SearchSpace({stage: space.stages[stage] for stage in order}))
    ]
    if not possible:
        return space, _order_problems(space)
    return SearchSpace(space.stages, tuple(possible)), []


def _rounded(value: Value) -> Value:
    """Three significant digits: a recipe that a person can read and type, and finer differences are noise."""
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _option(key: str, name: str, given: Any, depth: Depth, problems: list[Problem]) -> Option | None:
    try:
        technique = techniques.load(name)
    except LookupError as error:
        problems.append(Problem(key, f"got {name}, expected a technique: {error}"))
        return None
    if given is not None and not isinstance(given, Mapping):
        problems.append(Problem(key, f"got {given!r}, expected the options of {name}: {_known(technique)}"))
        return None
    searched: dict[str, Domain] = {}
    fixed: dict[str, Value] = {}
    spread: dict[str, Spread] = {}
    for option, value in (given or {}).items():
        valid = technique.domains().get(str(option))
        if valid is None:
            near = difflib.get_close_matches(str(option), technique.domains(), n=1)
            hint = f", did you mean {near[0]}?" if near else f" ({_known(technique)})"
            problems.append(Problem(f"{key}.{option}", f"got {option}, expected an option of {name}{hint}"))
            continue
        try:
            if isinstance(value, Mapping) and "each" in value:
                spread[str(option)] = _spread(technique, str(option), value, depth)
                continue
            narrowed = _narrow(valid, value)
        except ValueError as error:
            problems.append(Problem(f"{key}.{option}", str(error)))
            continue
        if isinstance(narrowed, (Range, Choice)):
            searched[str(option)] = narrowed
        else:
            fixed[str(option)] = narrowed
    return Option(technique, searched, fixed, spread)


def _spread(technique: type[Technique], option: str, given: Mapping[str, Any], depth: Depth) -> Spread:
    """What an option may be for each block or linear by itself, or each run of them."""
    each, valid = given["each"], technique.domains()[option]
    able = {"layer": sorted(technique.by_block), "linear": sorted(technique.by_linear)}
    if each not in able:
        raise ValueError(f"got each: {each}, expected each: layer or each: linear")
    if option not in able[each]:
        may = f"only {' and '.join(able[each])} may" if able[each] else f"no option of {technique.name()} may"
        raise ValueError(f"got each: {each}, expected one for all: {may} differ by {each}")
    most = depth.linears if each == "linear" else depth.blocks
    runs = given.get("groups", most)
    if runs not in Range(1, most, integer=True):
        raise ValueError(
            f"got groups: {runs}, expected a whole number from 1 to {most}, as many as there are"
        )
    rest = {key: value for key, value in given.items() if key not in ("each", "groups")}
    narrowed = _narrow(valid, rest["choices"] if rest.keys() == {"choices"} else rest)
    if not isinstance(narrowed, (Range, Choice)):
        raise ValueError(f"got choices: {rest['choices']}, expected a list")
    return Spread(narrowed, int(runs), each == "linear", "groups" in given)


def _narrow(valid: Domain, given: Any) -> Domain | Value:
    """The part of a valid domain that `given` asks to search, or the one value to fix."""
    if isinstance(given, Mapping):
        return _narrow_range(valid, given)
    if isinstance(given, (list, tuple)):
        if not given:
            raise ValueError("got an empty list, expected at least one value")
        values = tuple(_valid_value(valid, value) for value in given)
        if len(set(values)) != len(values):
            raise ValueError(f"got {list(given)}, expected each value once")
        return Choice(values)
    return _valid_value(valid, given)


def _narrow_range(valid: Domain, given: Mapping[str, Any]) -> Range:
    if not isinstance(valid, Range):
        raise ValueError(f"got a range, expected one or some of {valid}")
    if set(given) != {"low", "high"}:
        raise ValueError(f"got {dict(given)}, expected {{low: …, high: …}} within {valid}")
    low, high = float(_valid_value(valid, given["low"])), float(_valid_value(valid, given["high"]))
    if low >= high:
        raise ValueError(f"got low={low:g} and high={high:g}, expected low below high")
    return dataclasses.replace(valid, low=low, high=high)


def _valid_value(valid: Domain, value: Any) -> Value:
    if value not in valid:
        raise ValueError(f"got {value!r}, expected a value in {valid}")
    return valid.normal(value)


def _order_problems(space: SearchSpace) -> list[Problem]:
    """Every stage that can't stand where it stands, told once."""
    found: dict[str, Problem] = {}
    stages = list(space.stages)
    for picked in itertools.product(*space.stages.values()):
        steps = [option.technique for option in picked]
        for length in range(1, len(steps) + 1):
            try:
                check_order(steps[:length])
            except ValueError as error:
                found.setdefault(stages[length - 1], Problem(f"space.{stages[length - 1]}", f"got {error}"))
                break
        for stage, problem in _shifted(dict(zip(stages, picked, strict=True))):
            found.setdefault(stage, problem)
    return list(found.values())


def _shifted(picked: Mapping[str, Option]) -> Iterator[tuple[str, Problem]]:
    """The options that every block chooses for itself, after a step that leaves fewer blocks to choose."""
    depth = None
    for stage, option in picked.items():
        for name in (name for name, one in option.spread.items() if not one.grouped and depth is not None):
            message = (
                f"got each after {depth}, which leaves fewer layers; expected groups: COUNT beside it, "
                f"whose values spread over the layers that are left, or {stage} before the stage of {depth}"
            )
            yield stage, Problem(f"space.{stage}.{option.technique.name()}.{name}", message)
        if option.technique.kind == "depth":
            depth = option.technique.name()


def _known(technique: type[Technique]) -> str:
    return ", ".join(f"{name} in {domain}" for name, domain in technique.domains().items())


def _ends(domain: Domain) -> tuple[Value, ...]:
    """The least and the largest value of numbers, else the first."""
    if isinstance(domain, Range):
        return domain.normal(domain.low), domain.normal(domain.high)
    numbers = [value for value in domain.values if not isinstance(value, (str, bool))]
    return (min(numbers), max(numbers)) if len(numbers) == len(domain.values) else domain.values[:1]


def _count(searched: Mapping[str, Domain]) -> float:
    total = 1.0
    for domain in searched.values():
        if isinstance(domain, Choice):
            total *= len(domain.values)
        else:
            total *= domain.high - domain.low + 1 if domain.integer else float("inf")
    return total
