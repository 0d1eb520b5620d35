"""The protocol of a search: asked for choices, told their results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from jobs.job import Failure
from jobs.knobs import Domain, Value

Choices = Mapping[str, Value]
Result = tuple[Choices, Mapping[str, float] | Failure | None]
Known = Callable[[Choices], Mapping[str, float]]
Space = Mapping[str, Domain]

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

    def probability_of_improvement(self, awaited: Sequence[Choices]) -> list[float]:
        """Of choices that are under way, how likely each is to add to the front of what was told, by what is believed
        now; 1 where nothing is believed."""
        ...


def nothing_known(choices: Choices) -> Mapping[str, float]:
    """The `known` of a study in which everything has to be measured."""
    return {}
