"""Parse the `space:` section of a study into a search space, and report each problem with its key."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jobs import techniques
from jobs.knobs import Choice, Domain, Range, Value
from jobs.technique import Technique, check_order
from orchestrator.config.problems import Problem
from orchestrator.planning.search_space import ORDER, KnobsPerPart, Option, SearchSpace

_MAX_STAGES = 6
"""The stages of a searched order: 720 orders. With more, most of the search would be spent on the order."""


@dataclass(frozen=True)
class Depth:
    """The numbers of blocks and linears of a model, which may each have their own option values."""

    blocks: int = 1
    linears: int = 1


SHALLOW = Depth()


def parse(
    section: Mapping[str, Any], any_order: bool = False, depth: Depth = SHALLOW
) -> tuple[SearchSpace, list[Problem]]:
    """Return the space that a study's `space:` section describes, and every problem in it.

    The value of an option is one value (fixed), a list (choices) or `{low, high}` (a range). An option may have a value
    for each block with `{choices: [...], each: layer}` or `{low, high, each: layer}`, for each linear with
    `each: linear`, and for each run of neighbours with `groups: COUNT` in addition.

    any_order: search the order of the stages too, among all orders that the techniques allow. depth: of the original.
    """
    problems: list[Problem] = []
    stages: dict[str, tuple[Option, ...]] = {}
    for stage, alternatives in section.items():
        key = f"space.{stage}"
        if not isinstance(alternatives, Mapping) or not alternatives:
            problems.append(Problem(key, f"got {alternatives!r}, expected techniques with their options"))
            continue
        options = [
            _option(f"{key}.{name}", str(name), values, depth, problems)
            for name, values in alternatives.items()
        ]
        stages[str(stage)] = tuple(option for option in options if option is not None)
    if not section:
        problems.append(Problem("space", "got no stage, expected at least one"))
    space = SearchSpace(stages)
    if ORDER in stages and any_order:
        problems.append(Problem(f"space.{ORDER}", "got a stage of this name, expected another: it is a knob"))
    if problems:
        return space, problems
    if any_order:
        return _with_orders(space)
    return space, _order_problems(space)


def _with_orders(space: SearchSpace) -> tuple[SearchSpace, list[Problem]]:
    """Return the same space with every valid order of its stages; the order of the file comes first if it is valid."""
    if len(space.stages) > _MAX_STAGES:
        message = f"got {len(space.stages)} stages, expected at most {_MAX_STAGES} to search their order"
        return space, [Problem("space", message)]
    orders = []
    for order in itertools.permutations(space.stages):
        if not _order_problems(SearchSpace({stage: space.stages[stage] for stage in order})):
            orders.append(order)
    if not orders:
        return space, _order_problems(space)
    return SearchSpace(space.stages, tuple(orders)), []


def _option(key: str, name: str, values: Any, depth: Depth, problems: list[Problem]) -> Option | None:
    """Return one technique of a stage, or None if it is unknown. Adds its problems."""
    try:
        technique = techniques.load(name)
    except LookupError as error:
        problems.append(Problem(key, f"got {name}, expected a technique: {error}"))
        return None
    if values is not None and not isinstance(values, Mapping):
        message = f"got {values!r}, expected the options of {name}: {_domains_text(technique)}"
        problems.append(Problem(key, message))
        return None
    searched: dict[str, Domain] = {}
    fixed: dict[str, Value] = {}
    per_part: dict[str, KnobsPerPart] = {}
    for option, value in (values or {}).items():
        valid = technique.domains().get(str(option))
        if valid is None:
            problems.append(Problem(f"{key}.{option}", _unknown_option(str(option), technique)))
            continue
        try:
            if isinstance(value, Mapping) and "each" in value:
                per_part[str(option)] = _knobs_per_part(technique, str(option), value, depth)
                continue
            narrowed = _narrow(valid, value)
        except ValueError as error:
            problems.append(Problem(f"{key}.{option}", str(error)))
            continue
        if isinstance(narrowed, (Range, Choice)):
            searched[str(option)] = narrowed
        else:
            fixed[str(option)] = narrowed
    return Option(technique, searched, fixed, per_part)


def _unknown_option(option: str, technique: type[Technique]) -> str:
    similar = difflib.get_close_matches(option, technique.domains(), n=1)
    hint = f" ({_domains_text(technique)})"
    if similar:
        hint = f", did you mean {similar[0]}?"
    return f"got {option}, expected an option of {technique.name()}{hint}"


def _knobs_per_part(
    technique: type[Technique], option: str, value: Mapping[str, Any], depth: Depth
) -> KnobsPerPart:
    """Return the knobs of an option whose value contains `each`. Raises ValueError with the problem."""
    each = value["each"]
    by_part = {"layer": sorted(technique.by_block), "linear": sorted(technique.by_linear)}
    if each not in by_part:
        raise ValueError(f"got each: {each}, expected each: layer or each: linear")
    if option not in by_part[each]:
        options = f"no option of {technique.name()} may"
        if by_part[each]:
            options = f"only {' and '.join(by_part[each])} may"
        raise ValueError(f"got each: {each}, expected one value for all: {options} differ by {each}")
    parts = {"layer": depth.blocks, "linear": depth.linears}[each]
    runs = value.get("groups", parts)
    if runs not in Range(1, parts, integer=True):
        raise ValueError(
            f"got groups: {runs}, expected a whole number from 1 to {parts}, the number of {each}s"
        )
    domain = {key: limit for key, limit in value.items() if key not in ("each", "groups")}
    if domain.keys() == {"choices"}:
        narrowed = _narrow(technique.domains()[option], domain["choices"])
    else:
        narrowed = _narrow(technique.domains()[option], domain)
    if not isinstance(narrowed, (Range, Choice)):
        raise ValueError(f"got choices: {domain['choices']}, expected a list")
    return KnobsPerPart(narrowed, int(runs), each == "linear", "groups" in value)


def _narrow(valid: Domain, value: Any) -> Domain | Value:
    """Return the part of a valid domain that is searched, or the one fixed value."""
    if isinstance(value, Mapping):
        return _narrow_range(valid, value)
    if isinstance(value, (list, tuple)):
        if not value:
            raise ValueError("got an empty list, expected at least one value")
        choices = tuple(_valid_value(valid, choice) for choice in value)
        if len(set(choices)) != len(choices):
            raise ValueError(f"got {list(value)}, expected each value once")
        return Choice(choices)
    return _valid_value(valid, value)


def _narrow_range(valid: Domain, limits: Mapping[str, Any]) -> Range:
    if not isinstance(valid, Range):
        raise ValueError(f"got a range, expected one or some of {valid}")
    if set(limits) != {"low", "high"}:
        raise ValueError(f"got {dict(limits)}, expected {{low: …, high: …}} within {valid}")
    low, high = float(_valid_value(valid, limits["low"])), float(_valid_value(valid, limits["high"]))
    if low >= high:
        raise ValueError(f"got low={low:g} and high={high:g}, expected low below high")
    return dataclasses.replace(valid, low=low, high=high)


def _valid_value(valid: Domain, value: Any) -> Value:
    if value not in valid:
        raise ValueError(f"got {value!r}, expected a value in {valid}")
    return valid.normal(value)


def _order_problems(space: SearchSpace) -> list[Problem]:
    """Return one problem for each stage that cannot follow the stages before it."""
    problems: dict[str, Problem] = {}
    stages = list(space.stages)
    for combination in itertools.product(*space.stages.values()):
        steps = [option.technique for option in combination]
        for length in range(1, len(steps) + 1):
            try:
                check_order(steps[:length])
            except ValueError as error:
                stage = stages[length - 1]
                problems.setdefault(stage, Problem(f"space.{stage}", f"got {error}"))
                break
        for stage, problem in _options_of_removed_blocks(dict(zip(stages, combination, strict=True))):
            problems.setdefault(stage, problem)
    return list(problems.values())


def _options_of_removed_blocks(option_by_stage: Mapping[str, Option]) -> Iterator[tuple[str, Problem]]:
    """Yield a problem for each option with a value per part that follows a removal of blocks: it has too many."""
    pruning = None
    for stage, option in option_by_stage.items():
        for name, knobs in option.per_part.items():
            if knobs.grouped or pruning is None:
                continue
            message = (
                f"got each after {pruning}, which leaves fewer layers; expected groups: COUNT in addition, "
                f"whose values spread over the remaining layers, or {stage} before the stage of {pruning}"
            )
            yield stage, Problem(f"space.{stage}.{option.technique.name()}.{name}", message)
        if option.technique.kind == "depth":
            pruning = option.technique.name()


def _domains_text(technique: type[Technique]) -> str:
    return ", ".join(f"{name} in {domain}" for name, domain in technique.domains().items())
