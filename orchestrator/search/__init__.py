"""Searches: what to try next. One file, one algorithm: `NAME_search.py` is the algorithm called NAME.

The suffix keeps `random` and the like from shadowing modules of the same name, and tells algorithms from
what they share. A search knows nothing of models: it sees knobs, numbers and limits.
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
from orchestrator.search.search import Choices, Known, Search, Space, nothing_known

SUFFIX = "_search"


def names() -> list[str]:
    """Every algorithm there is, in alphabetical order, read from the files of this folder."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name.removesuffix(SUFFIX) for name in found if name.endswith(SUFFIX))


def make(
    name: str,
    space: Mapping[str, Domain | Mapping[str, Any]],
    objectives: Sequence[Objective],
    known: Known = nothing_known,
    seed: int = 0,
    first: Sequence[Choices] = (),
) -> Search:
    """A new search of that algorithm.

    space: each knob's domain, or plain data for it: `{"low": 1, "high": 8, "type": "int"}` (also
        `"log": true`) or `{"choices": [...], "ordered": true}`; ordered choices may be given in any order.
    known: the metrics of a choice that need no evaluation, exact; asked often, so it must be quick. Where it also gives
        `seconds`, a search may prefer what adds more for each of them; they may change from call to call. What else it
        tells beside objectives are hints: numbers that what must be measured is taken to go with.
    first: choices to ask before any others.

    Raises LookupError for an unknown name, ValueError for a space or objectives that cannot be searched.
    """
    algorithm = _algorithm(name)
    if not objectives:
        raise ValueError("a search needs at least one objective")
    domains = {knob: _domain(knob, given) for knob, given in space.items()}
    search: Search = algorithm(domains, tuple(objectives), known, seed)
    if not first:
        return search

    return InitialPoints(search, first, Proposals(objectives, known))


def _algorithm(name: str) -> Callable[[Space, tuple[Objective, ...], Known, int], Search]:
    module = module_of("search", name, names(), f"{__name__}.{name}{SUFFIX}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__ and hasattr(value, "tell")
    ]
    if len(found) != 1:
        raise LookupError(f"{module.__name__} must define exactly one search, it defines {len(found)}")
    return found[0]


def _domain(knob: str, given: Domain | Mapping[str, Any]) -> Domain:
    if isinstance(given, Range | Choice):
        domain = given
    elif "choices" in given:
        values = sorted(given["choices"]) if given.get("ordered") else given["choices"]
        domain = Choice(tuple(values))
    elif "low" in given and "high" in given:
        domain = Range(given["low"], given["high"], given.get("type") == "int", bool(given.get("log")))
    else:
        raise ValueError(f"{knob}={dict(given)} is no domain; give low and high, or choices")
    if isinstance(domain, Choice) and not domain.values:
        raise ValueError(f"{knob} has no values to choose from")
    if isinstance(domain, Range) and not domain.low <= domain.high:
        raise ValueError(f"{knob}: low={domain.low:g} is above high={domain.high:g}")
    return domain
