"""The running jobs of a study, and the jobs that models need until they are measured for the first time."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from jobs.job import Job
from orchestrator.study.events import AttemptEnded, Cancel, Run, StudyPlan
from orchestrator.study.trie import RecipeNode, RecipeTrie


class JobTable:
    """Starts jobs and assigns their results to nodes. A node has at most one job at a time."""

    def __init__(self, plan: StudyPlan, nodes: RecipeTrie) -> None:
        self._plan = plan
        self._nodes = nodes
        self._busy: set[str] = set()
        self._node_by_job: dict[str, RecipeNode] = {}

    def __len__(self) -> int:
        return len(self._busy)

    @property
    def busy(self) -> AbstractSet[str]:
        """The ids of the recipes whose job is running or queued in the executor."""
        return self._busy

    def node_of(self, job_id: str) -> RecipeNode | None:
        return self._node_by_job.get(job_id)

    def start(
        self,
        node: RecipeNode,
        meters: Sequence[str],
        exclusive: bool,
        fidelity: float = 1.0,
        after: float = 0.0,
    ) -> Run:
        job = Job(node.recipe, tuple(meters), self._plan.materials_digest, fidelity, after)
        node.job = job
        node.attempt += 1
        self._busy.add(node.id)
        self._node_by_job[job.id] = node
        return Run(job, node.attempt, exclusive)

    def start_needed(self, nodes: Sequence[RecipeNode]) -> list[Run]:
        """Start the jobs of those of the nodes that must be built or measured for the first time and can be now."""
        runs = []
        for node in nodes:
            run = self._start_needed(node) if self._is_ready(node) else None
            if run is not None:
                runs.append(run)
        return runs

    def _is_ready(self, node: RecipeNode) -> bool:
        if node.job is not None or node.failure is not None:
            return False
        if node.artifact is None and node.open == 0:
            return False  # all candidates that needed it were given up
        return node.parent is None or self._nodes[node.parent].artifact is not None

    def _start_needed(self, node: RecipeNode) -> Run | None:
        meters, timers = self._plan.meters, self._plan.timers
        if node.parent is None and not node.measured:
            # All candidates wait for the original, so it is measured and timed in one job.
            return self.start(node, (*meters, *timers), bool(timers))
        if node.is_candidate and not node.measured:
            return self.start(node, meters, node.exclusive, self._plan.rungs[0])
        if node.artifact is None:
            return self.start(node, (), node.exclusive)
        return None

    def finish(self, event: AttemptEnded) -> tuple[RecipeNode, Job] | None:
        """Remove the job of this attempt; None if the event is late or repeated."""
        node = self._node_by_job.get(event.job_id)
        if node is None or node.job is None or node.job.id != event.job_id or event.attempt != node.attempt:
            return None
        job, node.job = node.job, None
        self._busy.discard(node.id)
        return node, job

    def cancel(self, nodes: Sequence[RecipeNode]) -> list[Cancel]:
        """Remove the jobs of these nodes; return the commands that cancel them."""
        commands = []
        for node in nodes:
            if node.job is not None:
                commands.append(Cancel(node.job, node.attempt))
                node.job = None
                self._busy.discard(node.id)
        return commands

    def clear(self) -> None:
        """Remove all jobs, which ended with the process that ran them."""
        for node in self._nodes:
            node.job = None
        self._busy.clear()
