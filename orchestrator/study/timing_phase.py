"""The timing phase: which candidates are timed, in which order, and when no more timings are needed.

Timings run one after the other at the end of a study, so that a machine whose speed drifts does so for all candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from orchestrator.study.candidate import Candidate
from orchestrator.study.contenders import Rival, contenders
from orchestrator.study.events import StudyPlan
from orchestrator.study.timing_order import Timing, next_timed
from orchestrator.study.trie import RecipeNode, RecipeTrie


class TimingPhase:
    """Selects the next candidate to time. It reads the study's nodes and candidates and modifies neither."""

    def __init__(self, plan: StudyPlan, nodes: RecipeTrie, candidates: Mapping[str, Candidate]) -> None:
        self._plan = plan
        self._nodes = nodes
        self._candidates = candidates
        self.started = False
        self._contenders: dict[str, Rival] | None = None

    def restart(self) -> None:
        """Return to the phases before, since more candidates may be measured first."""
        self.started = False
        self.forget_contenders()

    def forget_contenders(self) -> None:
        """Determine the contenders anew at the next timing, since a measurement changed."""
        self._contenders = None

    @property
    def untimed(self) -> int:
        """Number of candidates that may be on the front and have no timings, although they could be timed."""
        return len(self._untimed_ids()) if self._plan.timers and self.started else 0

    def next_node(self) -> RecipeNode | None:
        """Return the candidate to time next; None if there is none or all others are certainly dominated.

        The original comes first, since it has to be timed under the same conditions.
        """
        if not self._plan.timers:
            return None
        if self._contenders is None:
            self._contenders = self.possible_front(
                candidate
                for candidate in self._candidates.values()
                if candidate.measurement and candidate.fidelity >= 1
            )
        waiting = [id for id in self._untimed_ids() if self._nodes[id].job is None]
        original_id = self._plan.original.id
        if original_id in waiting:
            return self._nodes[original_id]
        if not waiting:
            return None
        timings = {}
        for id in (*self._contenders, original_id):
            reliable = self._reliable_timings(id)
            if reliable:
                timings[id] = reliable
        next_id = next_timed(waiting, self._contenders, timings, self._plan)
        return None if next_id is None else self._nodes[next_id]

    def possible_front(self, candidates: Iterable[Candidate]) -> dict[str, Rival]:
        """Return those of the candidates, by id, that are measured and may be on the front."""
        rivals = {}
        for candidate in candidates:
            if candidate.measurement is not None:
                cost = self._nodes[candidate.id].cost
                assert cost is not None, "every measured candidate has a cost"
                rivals[candidate.id] = Rival(candidate.measurement.metrics, cost)
        possible = contenders(rivals, self._plan)
        return {id: rival for id, rival in rivals.items() if id in possible}

    def _untimed_ids(self) -> list[str]:
        """The original and the contenders, without those that were timed or failed."""
        ids = dict.fromkeys((self._plan.original.id, *(self._contenders or ())))
        return [id for id in ids if not self._nodes[id].timed and self._nodes[id].failure is None]

    def _reliable_timings(self, id: str) -> Mapping[str, Timing]:
        """The timings of a candidate by metric; empty if any of them is missing or unreliable."""
        measurement = self._candidates[id].measurement
        if measurement is None or self._plan.timed - (measurement.metrics.keys() - {*measurement.unreliable}):
            return {}
        return {
            metric: Timing(measurement.metrics[metric], measurement.errors.get(metric, 0.0))
            for metric in self._plan.timed
        }
