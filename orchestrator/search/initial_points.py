"""Initial points: choices that a search proposes first, whatever its algorithm."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.knobs import Value
from orchestrator.search.proposals import Key, Proposals, key
from orchestrator.search.search import Choices, Result, Search


class InitialPoints:
    """A search that proposes given choices before those of another search.

    Choices that break a known limit or were already reported are skipped.
    """

    def __init__(self, search: Search, initial: Sequence[Choices], proposals: Proposals) -> None:
        self._search = search
        self._proposals = proposals
        self._initial = {key(choices): dict(choices) for choices in reversed(initial)}
        self._proposed: set[Key] = set()

    def ask(self, n: int) -> list[dict[str, Value]]:
        proposals: list[dict[str, Value]] = []
        while self._initial and len(proposals) < n:
            choices_key, choices = self._initial.popitem()
            if not self._proposals.broken_limits(choices):
                self._proposed.add(choices_key)
                proposals.append(choices)
        while len(proposals) < n:
            try:
                more = self._search.ask(n - len(proposals))
            except LookupError:
                if not proposals:
                    raise
                break
            if not more:
                break
            proposals += [choices for choices in more if key(choices) not in self._proposed]
        return proposals

    def tell(self, results: Sequence[Result]) -> None:
        for choices, _ in results:
            self._initial.pop(key(choices), None)
        self._search.tell(results)

    def probability_of_improvement(self, pending: Sequence[Choices]) -> list[float]:
        return self._search.probability_of_improvement(pending)
