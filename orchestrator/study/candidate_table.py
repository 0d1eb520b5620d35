"""The candidates of a study, with the counts that follow from their states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Set as AbstractSet

from orchestrator.study.candidate import Candidate, State
from orchestrator.study.racing import Race
from orchestrator.study.trie import RecipeTrie


class CandidateTable:
    """The newest version of each candidate. It keeps the counts of open candidates in the trie, and the race."""

    def __init__(self, nodes: RecipeTrie, race: Race) -> None:
        self._nodes = nodes
        self._race = race
        self.by_id: dict[str, Candidate] = {}
        self.states: Counter[State] = Counter()
        """Number of candidates in each state."""
        self._open: set[str] = set()

    @property
    def open(self) -> AbstractSet[str]:
        """The ids of the candidates that are waiting or running."""
        return self._open

    def put(self, candidate: Candidate) -> None:
        """Add a candidate, or replace its earlier version."""
        earlier = self.by_id.get(candidate.id)
        self.by_id[candidate.id] = candidate
        if earlier is not None:
            self.states[earlier.state] -= 1
        self.states[candidate.state] += 1
        self._count_open(candidate)
        if candidate.failure is not None:
            self._race.remove(candidate.id)
        elif candidate.measurement is not None:
            cost = self._nodes[candidate.id].cost
            assert cost is not None, "every measured candidate has a cost"
            self._race.report(candidate.id, candidate.measurement, cost, candidate.fidelity)

    def _count_open(self, candidate: Candidate) -> None:
        is_open = candidate.state in ("waiting", "running")
        if is_open and candidate.id not in self._open:
            self._open.add(candidate.id)
            self._nodes.count_open(self._nodes[candidate.id], +1)
        elif not is_open and candidate.id in self._open:
            self._open.remove(candidate.id)
            self._nodes.count_open(self._nodes[candidate.id], -1)
