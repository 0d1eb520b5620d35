"""Opening: choices that a search is to begin with, whatever the algorithm."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.knobs import Value
from orchestrator.search.proposals import Key, Proposals, key
from orchestrator.search.search import Choices, Result, Search


class InitialPoints:
    """A search that asks some choices before its own. Those that break a limit that is known, or were told already,
    are passed over."""

    def __init__(self, search: Search, first: Sequence[Choices], proposals: Proposals) -> None:
        self._search = search
        self._proposals = proposals
        self._first = {key(choices): dict(choices) for choices in reversed(first)}
        self._asked: set[Key] = set()

    def ask(self, n: int) -> list[dict[str, Value]]:
        found: list[dict[str, Value]] = []
        while self._first and len(found) < n:
            mark, choices = self._first.popitem()
            if not self._proposals.broken(choices):
                self._asked.add(mark)
                found.append(choices)
        while len(found) < n:
            try:
                own = self._search.ask(n - len(found))
            except LookupError:
                if not found:
                    raise
                break
            if not own:
                break
            found += [choices for choices in own if key(choices) not in self._asked]
        return found

    def tell(self, results: Sequence[Result]) -> None:
        for choices, _ in results:
            self._first.pop(key(choices), None)
        self._search.tell(results)

    def probability_of_improvement(self, awaited: Sequence[Choices]) -> list[float]:
        return self._search.probability_of_improvement(awaited)
