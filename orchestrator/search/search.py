"""The protocol of a search: `ask` returns choices, `tell` reports their results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from jobs.job import Failure
from jobs.knobs import Domain, Value

Choices = Mapping[str, Value]
"""A value per knob."""
Result = tuple[Choices, Mapping[str, float] | Failure | None]
"""Choices with their metrics, their failure, or None if they were given up."""
KnownMetrics = Callable[[Choices], Mapping[str, float]]
"""Returns the metrics of choices that need no evaluation; see `orchestrator.search.make`."""
Space = Mapping[str, Domain]

SECONDS = "seconds"
"""The key in the result of `KnownMetrics` for the expected duration of an evaluation."""


class Search(Protocol):
    """Proposes choices and learns from results, in any order and with any number of pending choices.

    The same seed and the same calls in the same order lead to the same choices.
    """

    def ask(self, n: int) -> list[dict[str, Value]]:
        """Return up to n choices that were neither proposed nor reported before; fewer if no new ones were found.

        Their known metrics are within all limits. LookupError if no choices in the space are.
        """
        ...

    def tell(self, results: Sequence[Result]) -> None:
        """Learn from results of proposed or other choices, in any order. Each result counts once.

        NaN and infinite metrics count as failures. A result without some objective is ignored until one with all of
        them is reported. A success replaces an earlier failure. Nothing is learned from choices that were given up.
        """
        ...

    def probability_of_improvement(self, pending: Sequence[Choices]) -> list[float]:
        """Return, for each of the pending choices, the probability that it improves the front of the results.

        1 if the search has no model.
        """
        ...


def nothing_known(choices: Choices) -> Mapping[str, float]:
    """The `KnownMetrics` of a study in which every metric must be measured."""
    return {}
