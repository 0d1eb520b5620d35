"""Search algorithms, which decide which choices to evaluate next. The algorithm NAME is in `NAME_search.py`.

The suffix avoids shadowing modules such as `random`, and separates algorithms from shared modules. A search is
independent of models: its inputs are knobs, numbers and limits.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jobs.knobs import Choice, Domain, Range
from jobs.plugins import module_of
from orchestrator.pareto.front import Objective
from orchestrator.search.initial_points import InitialPoints
from orchestrator.search.proposals import Proposals
from orchestrator.search.search import Choices, KnownMetrics, Search, Space, nothing_known

SUFFIX = "_search"


def names() -> list[str]:
    """Return the names of all algorithms, in alphabetical order, from the files in this folder."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name.removesuffix(SUFFIX) for name in modules if name.endswith(SUFFIX))


def make(
    name: str,
    space: Mapping[str, Domain | Mapping[str, Any]],
    objectives: Sequence[Objective],
    known_metrics: KnownMetrics = nothing_known,
    seed: int = 0,
    initial: Sequence[Choices] = (),
) -> Search:
    """Return a new search.

    space: each knob's domain, or plain data for it: `{"low": 1, "high": 8, "type": "int"}` (also
        `"log": true`) or `{"choices": [...], "ordered": true}`; ordered choices may be in any order.
    known_metrics: returns the metrics of choices that need no evaluation, exactly. It is called often, so it must be
        fast. `seconds` in its result is the expected duration of the evaluation, which may change between calls;
        searches may prefer a larger improvement per second. Other numbers that are no objectives are hints, which
        measured objectives are expected to correlate with.
    initial: choices to propose before all others.

    LookupError for an unknown name, ValueError for an invalid space or no objectives.
    """
    algorithm = _algorithm(name)
    if not objectives:
        raise ValueError("a search needs at least one objective")
    domains = {knob: _domain(knob, specification) for knob, specification in space.items()}
    search: Search = algorithm(domains, tuple(objectives), known_metrics, seed)
    if not initial:
        return search
    return InitialPoints(search, initial, Proposals(objectives, known_metrics))


def _algorithm(name: str) -> Callable[[Space, tuple[Objective, ...], KnownMetrics, int], Search]:
    module = module_of("search", name, names(), f"{__name__}.{name}{SUFFIX}")
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__ and hasattr(value, "tell")
    ]
    if len(classes) != 1:
        raise LookupError(f"{module.__name__} must define exactly one search, it defines {len(classes)}")
    return classes[0]


def _domain(knob: str, specification: Domain | Mapping[str, Any]) -> Domain:
    if isinstance(specification, Range | Choice):
        domain = specification
    elif "choices" in specification:
        values = specification["choices"]
        if specification.get("ordered"):
            values = sorted(values)
        domain = Choice(tuple(values))
    elif "low" in specification and "high" in specification:
        is_integer = specification.get("type") == "int"
        domain = Range(
            specification["low"], specification["high"], is_integer, bool(specification.get("log"))
        )
    else:
        raise ValueError(f"{knob}={dict(specification)} is no domain; give low and high, or choices")
    if isinstance(domain, Choice) and not domain.values:
        raise ValueError(f"{knob} has no values to choose from")
    if isinstance(domain, Range) and not domain.low <= domain.high:
        raise ValueError(f"{knob}: low={domain.low:g} is above high={domain.high:g}")
    return domain
