"""Searches: what to try next. One file, one algorithm: `NAME_search.py` is the algorithm called NAME.

The suffix keeps `random` and the like from shadowing modules of the same name, and tells algorithms from
what they share. A search knows nothing of models: it sees knobs, numbers and limits.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from jobs.job import Failure
from jobs.knobs import Choice, Domain, Range, Value
from jobs.lookup import module_of
from orchestrator.front import Objective

Choices = Mapping[str, Value]
Result = tuple[Choices, Mapping[str, float] | Failure | None]
Known = Callable[[Choices], Mapping[str, float]]
Space = Mapping[str, Domain]

SUFFIX = "_search"
SECONDS = "seconds"
"""What `known` may give beside metrics: how long evaluating a choice would take, as far as that is known now."""


class Search(Protocol):
    """Asked for choices, told what came of them; in any order, with any number of asks outstanding.

    The same seed and the same calls in the same order give the same choices.
    """

    def ask(self, n: int) -> list[dict[str, Value]]:
        """Up to n choices that were neither asked nor told before; fewer where no new ones are found.

        None of them breaks a limit by its known values. Raises LookupError where every choice does.
        """
        ...

    def tell(self, results: Sequence[Result]) -> None:
        """Learn from results, asked for or not, in any order; each choice's result counts once.

        NaN and infinite metrics count as failures. A result without some objective waits for one that
        has them all, and a success takes the place of an earlier failure. None: what was asked is given up, from which
        nothing is learned.
        """
        ...

    def chances(self, awaited: Sequence[Choices]) -> list[float]:
        """Of choices that are under way, how likely each is to add to the front of what was told, by what is believed
        now; 1 where nothing is believed."""
        ...


def nothing_known(choices: Choices) -> Mapping[str, float]:
    """The `known` of a study in which everything has to be measured."""
    return {}


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
    from orchestrator.search.opening import Opening
    from orchestrator.search.proposals import Proposals

    return Opening(search, first, Proposals(objectives, known))


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
