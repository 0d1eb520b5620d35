"""Study: events in, commands out. It decides which job runs when, without a clock, I/O or threads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from jobs.job import Failure, FailureKind, Job, Success
from jobs.knobs import Value
from jobs.recipe import Recipe
from orchestrator.study.candidate import Candidate, State
from orchestrator.study.candidate_table import CandidateTable
from orchestrator.study.durations import DurationModel, RemainingWork, Savings
from orchestrator.study.events import (
    AttemptEnded,
    AttemptStarted,
    BudgetAllowance,
    CandidateProposed,
    CandidateStopped,
    Command,
    Cost,
    Event,
    Record,
    Run,
    SearchExhausted,
    ServiceStarted,
    SlotsChanged,
    Stage,
    StudyPlan,
    Tell,
)
from orchestrator.study.feedback import rejection, search_feedback
from orchestrator.study.job_table import JobTable
from orchestrator.study.latency_estimate import predictions
from orchestrator.study.racing import Race, next_fidelity
from orchestrator.study.timing_phase import TimingPhase
from orchestrator.study.trie import RecipeNode, RecipeTrie

MAX_INITIAL_FAILURES = 20
"""Stop proposing after this many failures if no candidate has succeeded."""
MAX_ATTEMPTS: Mapping[FailureKind, int] = {"out_of_memory": 2, "bug": 3, "timeout": 3, "disk_full": 3}
"""Attempts per job by the kind of its failure; 1 for other kinds, which every attempt would repeat. The second attempt
after `out_of_memory` has its node for itself. Preempted attempts are always repeated."""
WORTH_STOPPING_SECONDS = 20.0
"""Do not stop running candidates whose remaining work takes less slot time than this: half of it is done on average,
and a killed worker takes some seconds to restart."""
CANDIDATES_PER_REPLACEMENT = 4
"""Stopped candidates are replaced by new ones, up to one per this number of candidates: without replacements the front
would be worse, but where many candidates are stopped, few improvements are left."""
OPEN_PER_SLOT = 4
"""Maximum number of open candidates per slot: the search should learn from results before it proposes many."""


class Study:
    """The state of one study. `handle` accepts events in any order, repeated or late, and counts each result once.

    The same events produce the same study: replaying the ledger rebuilds it, including the numbers of attempts.
    """

    def __init__(self, plan: StudyPlan) -> None:
        self.plan = plan
        self.granted = BudgetAllowance()
        """The work that the budget allows."""
        self.proposed = 0
        """Number of candidates that the search proposed, without those over the size limit and the original."""
        self.slots = 1
        """Number of jobs that can run at the same time."""
        self._search_ended: str | None = None
        self._savings = Savings()
        self._nodes = RecipeTrie()
        self._jobs = JobTable(plan, self._nodes)
        self._durations = DurationModel(plan)
        self._race = Race(plan)
        self._table = CandidateTable(self._nodes, self._race)
        self.candidates: Mapping[str, Candidate] = self._table.by_id
        self.states: Mapping[State, int] = self._table.states
        """Number of candidates in each state."""
        self._timing = TimingPhase(plan, self._nodes, self.candidates)
        self._original_id = plan.original.id
        self._add_to_trie(plan.original, {}, plan.original_cost)

    @property
    def original(self) -> Candidate:
        return self.candidates[self._original_id]

    @property
    def reused(self) -> int:
        """Number of steps that candidates share with an earlier one."""
        return self._nodes.shared_steps

    @property
    def savings(self) -> Savings:
        return dataclasses.replace(
            self._savings, steps=self._nodes.shared_steps, steps_seconds=self._nodes.shared_seconds
        )

    @property
    def exhausted(self) -> str | None:
        """The reason why no more candidates are proposed although more are allowed; None if there is none."""
        measured = self.states["measured"] - (self.original.state == "measured")
        if self._search_ended is None and self.states["failed"] >= MAX_INITIAL_FAILURES and measured == 0:
            return f"the first {self.states['failed']} candidates all failed"
        if self.granted.work == "none" or self.proposed < self.allowed:
            return self._search_ended or self.granted.reason
        return self._search_ended

    @property
    def allowed(self) -> int:
        """Maximum number of proposed candidates: those of the plan, and replacements for stopped ones."""
        replacements = self.plan.candidates // CANDIDATES_PER_REPLACEMENT
        return self.plan.candidates + min(self.states["stopped"], replacements)

    @property
    def running(self) -> int:
        """Number of jobs that are running or queued in the executor."""
        return len(self._jobs)

    @property
    def timings_left(self) -> int:
        """Upper bound of the number of pending and running timings; 0 before the timing phase."""
        return self.untimed if self.stage == "timing" else 0

    @property
    def untimed(self) -> int:
        """Number of candidates that may be on the front and have no timings, although they could be timed."""
        return self._timing.untimed

    @property
    def waiting(self) -> int:
        """Number of candidates that are waiting or running."""
        return len(self._table.open)

    @property
    def stage(self) -> Stage:
        if not self._timing.started:
            if self._all_proposed and not self._table.open:
                return "racing"
            return "searching"
        if self.running:
            return "timing"
        return "done"

    def seconds(self, recipe: Recipe) -> float:
        """Return the expected slot time of a new candidate: its steps that are not planned yet, and its measurement."""
        prefixes = recipe.lineage()[1:]
        new = [prefix for prefix in prefixes if not self._nodes.is_planned(prefix.id)]
        return self._durations.seconds(new)

    @property
    def seconds_to_finish(self) -> float:
        """Expected wall-clock time until the front is complete if nothing more is proposed.

        It covers the open candidates, then full evaluations of all candidates that may be on the front, then their
        timings. 0 before the original was measured, since there is nothing to finish.
        """
        original = self.original.measurement
        if original is None:
            return 0.0
        front_ids = {*self._timing.possible_front(self.candidates.values()), self._original_id}
        timings = 0
        if self.plan.timers:
            timings = sum(not self._nodes[id].timed for id in front_ids)
        work = RemainingWork(
            recipes=self._nodes.unbuilt_recipes,
            open_candidates=len(self._table.open),
            full_evaluations=sum(self.candidates[id].fidelity < 1 for id in front_ids),
            timings=timings,
        )
        return self._durations.seconds_to_finish(work, original.seconds, self.slots)

    def wants(self, slots: int) -> bool:
        """Whether one more proposal is needed to keep this many slots busy. False until the original is measured."""
        if self._nodes[self._original_id].artifact is None or self.original.failure is not None:
            return False
        if self._timing.started or self.exhausted is not None or self.proposed >= self.allowed:
            return False
        return self.running <= slots and len(self._table.open) < OPEN_PER_SLOT * slots

    @property
    def stoppable(self) -> list[Candidate]:
        """The open candidates whose stop would save work: models must be built for them that no other one needs."""
        candidates = []
        for id in sorted(self._table.open):
            nodes = self._nodes.exclusive_nodes(self._nodes[id])
            if not nodes:
                continue
            queued = all(node.job is None for node in nodes)
            if queued or self._durations.seconds([node.recipe for node in nodes]) >= WORTH_STOPPING_SECONDS:
                candidates.append(self.candidates[id])
        return candidates

    def handle(self, event: Event) -> list[Command]:
        """Update the study; return the commands that follow from the event."""
        commands: list[Command] = []
        match event:
            case ServiceStarted():
                commands = self._handle_service_started(event)
            case SlotsChanged():
                self.slots = event.slots
            case CandidateProposed():
                commands = self._handle_proposed(event)
            case AttemptStarted():
                commands = self._handle_attempt_started(event)
            case AttemptEnded():
                commands = self._handle_attempt_ended(event)
            case CandidateStopped():
                commands = self._handle_stopped(event)
            case BudgetAllowance():
                self.granted = event
            case SearchExhausted():
                self._search_ended = event.reason
        return commands + self._advance_phase()

    def _handle_service_started(self, event: ServiceStarted) -> list[Command]:
        if event.granted != self.granted:
            self.granted = event.granted
            self._timing.restart()
        self._jobs.clear()
        for node in self._nodes:
            if node.failure is not None and node.failure.kind == "disk_full":
                self._retry_failed(node)
        self.slots = event.slots
        return [*self._start_jobs(list(self._nodes))]

    def _retry_failed(self, node: RecipeNode) -> None:
        """Forget a node's failure, whose cause may be removed before the study is resumed."""
        node.failure, node.failed_attempts = None, 0
        if node.is_candidate:
            candidate = self.candidates[node.id]
            state: State = "waiting" if candidate.measurement is None else "measured"
            self._table.put(dataclasses.replace(candidate, state=state, failure=None))
        self._timing.restart()

    def _handle_proposed(self, event: CandidateProposed) -> list[Command]:
        existing = self.candidates.get(event.recipe.id)
        if existing is not None:
            return [*self._search_feedback(existing, event.choices)]
        rejected = rejection(event, self.plan.objectives)
        if rejected is not None:
            candidate, failure = rejected
            self._table.put(candidate)
            self.proposed += candidate.state == "failed"
            return [Record(candidate), Tell(event.choices, failure)]
        assert event.cost is not None, "candidates without a cost are rejected"
        self.proposed += 1
        nodes = self._add_to_trie(event.recipe, event.choices, event.cost)
        for node in nodes:
            if node.failure is not None:
                return self._fail(nodes[-1], _prefix_failure(node.recipe, node.failure))
        return [*self._start_jobs(nodes)]

    def _add_to_trie(self, recipe: Recipe, choices: Mapping[str, Value], cost: Cost) -> list[RecipeNode]:
        nodes = self._nodes.add(recipe, cost)
        self._table.put(Candidate(recipe, "waiting", cost.size_bytes, choices))
        return nodes

    def _handle_attempt_started(self, event: AttemptStarted) -> list[Command]:
        node = self._jobs.node_of(event.job_id)
        if node is not None and node.is_candidate and not node.measured and node.failure is None:
            candidate = self.candidates[node.id]
            self._table.put(dataclasses.replace(candidate, state="running", attempts=node.attempt))
        return []

    def _handle_attempt_ended(self, event: AttemptEnded) -> list[Command]:
        finished = self._jobs.finish(event)
        if finished is None:
            return []  # late or repeated: the attempt was given up, or its result is counted already
        node, job = finished
        if isinstance(event.outcome, Failure):
            return self._handle_failure(node, event.outcome)
        return self._handle_success(node, job, event.outcome)

    def _handle_stopped(self, event: CandidateStopped) -> list[Command]:
        if event.id not in self._table.open:
            return []
        nodes = self._nodes.exclusive_nodes(self._nodes[event.id])
        if not nodes:
            return []  # the model was built since, or another candidate needs it
        cancellations = self._jobs.cancel(nodes)
        self._nodes.remove_candidate(nodes[0])
        stopped = dataclasses.replace(
            self.candidates[event.id], state="stopped", stopped=event.reason, attempts=nodes[0].attempt
        )
        self._table.put(stopped)
        return [*cancellations, Record(stopped), *self._search_feedback(stopped, stopped.choices)]

    def _handle_success(self, node: RecipeNode, job: Job, success: Success) -> list[Command]:
        built = node.artifact is None
        self._durations.record(job, success, built)
        self._savings = self._savings.plus_job(success)
        if built:
            node.build_seconds = success.seconds + success.saved_seconds
        node.artifact, node.exclusive, node.failed_attempts = success.artifact, False, 0
        commands: list[Command] = []
        if job.meters:
            commands += self._record_measurement(node, job, success)
        commands += self._start_jobs([node])
        if built:
            commands += self._start_jobs(self._nodes.children(node))
        return commands

    def _record_measurement(self, node: RecipeNode, job: Job, success: Success) -> list[Command]:
        node.timed = node.timed or job.meters == self.plan.timers
        if job.meters[: len(self.plan.meters)] == self.plan.meters:
            self._timing.forget_contenders()
            node.fidelity = job.fidelity
        candidate = self.candidates[node.id]
        measured = candidate.with_measurement(success.measurement, node.fidelity)
        measured = dataclasses.replace(measured, artifact=success.artifact, attempts=node.attempt)
        original = self.original.measurement
        if node.parent is not None and node.cost is not None and original is not None:
            predicted = predictions(node.cost, self.plan.original_cost, original.metrics)
            measured = measured.with_predictions(predicted)
        self._table.put(measured)
        commands: list[Command] = [Record(measured)]
        if candidate.measurement is None:
            commands += self._search_feedback(measured, measured.choices)
        return commands

    def _handle_failure(self, node: RecipeNode, failure: Failure) -> list[Command]:
        if failure.kind == "preempted":
            return [*self._start_jobs([node])]
        node.failed_attempts += 1
        if node.failed_attempts < MAX_ATTEMPTS.get(failure.kind, 1):
            node.exclusive = failure.kind == "out_of_memory"
            return [*self._start_jobs([node])]
        return self._fail(node, failure)

    def _fail(self, node: RecipeNode, failure: Failure) -> list[Command]:
        """Give up a node and, if its model does not exist, all its descendants."""
        node.failure = failure
        commands: list[Command] = []
        if node.is_candidate:
            candidate = self.candidates[node.id]
            failed = dataclasses.replace(candidate, state="failed", failure=failure, attempts=node.attempt)
            self._table.put(failed)
            commands.append(Record(failed))
            if candidate.measurement is None:
                commands += self._search_feedback(failed, failed.choices)
        if node.artifact is None:
            for child in self._nodes.children(node):
                if child.failure is None:
                    commands += self._fail(child, _prefix_failure(node.recipe, failure))
        return commands

    def _start_jobs(self, nodes: Sequence[RecipeNode]) -> list[Run]:
        return [] if self.granted.work == "none" else self._jobs.start_needed(nodes)

    def _advance_phase(self) -> list[Command]:
        """Start promotions to larger rungs once all candidates are proposed, and timings once no promotion is left."""
        if self.granted.work == "none":
            self._timing.started = self._timing.started or not self.running
            return []
        if self._timing.started:
            return self._start_timings()
        if self.original.state == "waiting" or not self._all_proposed:
            return []
        promotions = self._start_promotions()
        if promotions or self.running:
            return promotions
        self._timing.started = True
        return self._start_timings()

    @property
    def _all_proposed(self) -> bool:
        return self.exhausted is not None or self.proposed >= self.allowed or self.original.state == "failed"

    def _start_promotions(self) -> list[Command]:
        """Start measurements on the next rung, until one more job is queued than there are slots."""
        commands: list[Command] = []
        if self.original.measurement is None:
            return commands
        while self.running <= self.slots:
            id = self._race.next_promotion(self._jobs.busy)
            if id is None:
                break
            node = self._nodes[id]
            fidelity = next_fidelity(self.plan.rungs, node.fidelity)
            assert fidelity is not None, "promoted candidates are not on the last rung"
            commands.append(self._jobs.start(node, self.plan.meters, node.exclusive, fidelity, node.fidelity))
        return commands

    def _start_timings(self) -> list[Command]:
        """Start at most as many timings as there are slots, since each result may make others unnecessary."""
        commands: list[Command] = []
        while self.running < self.slots:
            node = self._timing.next_node()
            if node is None:
                break
            commands.append(self._jobs.start(node, self.plan.timers, exclusive=True))
        return commands

    def _search_feedback(self, candidate: Candidate, choices: Mapping[str, Value]) -> list[Tell]:
        cost = self._nodes[candidate.id].cost if candidate.measurement is not None else None
        return search_feedback(candidate, choices, cost, self.plan, self.original.measurement)


def _prefix_failure(prefix: Recipe, failure: Failure) -> Failure:
    return Failure(failure.kind, f"its prefix {prefix} failed: {failure.message}")
