"""Study: events in, commands out. All decisions about what runs when, with no clock, no I/O and no threads."""

from __future__ import annotations

import dataclasses
import itertools
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from jobs.job import Failure, Job, Success
from jobs.knobs import Value
from jobs.measurement.measurement import Measurement
from jobs.recipe import Recipe
from orchestrator.study.candidate import Candidate, State
from orchestrator.study.contenders import Rival, contenders
from orchestrator.study.durations import TechniqueDuration, work_of
from orchestrator.study.events import (
    AttemptEnded,
    AttemptStarted,
    BudgetAllowance,
    Cancel,
    CandidateProposed,
    CandidateStopped,
    Command,
    Cost,
    Event,
    Record,
    Run,
    ServiceStarted,
    SlotsChanged,
    Stage,
    StudyPlan,
    Tell,
)
from orchestrator.study.latency_estimate import TIMING_SECONDS, estimates, predictions
from orchestrator.study.racing import Race, next_fidelity
from orchestrator.study.savings import Savings
from orchestrator.study.timing_order import Timing, next_timed
from orchestrator.study.trie import RecipeNode

ALL_FAILED = 20
"""When so many candidates have failed and none came out, no more are tried."""
MAX_BUG_ATTEMPTS = 3
"""An unexplained failure is tried this often before the candidate is given up as poison."""
WORTH_STOPPING_SECONDS = 20.0
"""What takes less of a slot is not ended once it is under way: half of it is done by then, on average, and a worker
that is killed takes some seconds to come back."""
MORE_FOR_STOPPED = 4
"""Others take the place of what was stopped, or the front would be worse, but no more than one in so many: where much
is stopped, little is left to find."""


class Study:
    """The state of one study. `handle` takes events in any order, repeated or late, and counts each result once.

    The same events make the same study: replaying the ledger rebuilds it, attempt numbers and all.
    """

    def __init__(self, plan: StudyPlan) -> None:
        self.plan = plan
        self.candidates: dict[str, Candidate] = {}
        self.states: Counter[State] = Counter()
        """How many candidates are in each state."""
        self._ended_by_search: str | None = None
        self.granted = BudgetAllowance()
        """What the budget allows."""
        self.reused = 0
        """How many steps candidates have in common with one before them."""
        self.proposed = 0
        """How many candidates the search has proposed that may run; the original is none of them."""
        self._found = Savings()
        self._nodes: dict[str, RecipeNode] = {}
        self._by_job: dict[str, str] = {}
        self._timing = False
        self.slots = 1
        """How many jobs can run at once, as far as it was told."""
        self._race = Race(plan)
        self._took: dict[str, TechniqueDuration] = {}
        self._measuring, self._timings_took = TechniqueDuration(), TechniqueDuration()
        # What follows from the nodes and candidates, kept beside them: it is asked for at every turn.
        self._busy: set[str] = set()
        self._open: set[str] = set()
        self._contenders: dict[str, Rival] | None = None
        self._original_id = plan.original.id
        self._enter(plan.original, {}, plan.original_cost)

    @property
    def original(self) -> Candidate:
        return self.candidates[self._original_id]

    @property
    def savings(self) -> Savings:
        """What sharing has spared until now; a step that has not been made yet counts no seconds."""
        steps = (node for node in self._nodes.values() if node.parent is not None)
        seconds = sum((node.uses - 1) * node.exclusive_subtree_seconds for node in steps)
        return dataclasses.replace(self._found, steps=self.reused, steps_seconds=seconds)

    @property
    def exhausted(self) -> str | None:
        """Why no more is proposed, though more candidates were allowed."""
        came_out = self.states["measured"] - (self.original.state == "measured")
        if self._ended_by_search is None and self.states["failed"] >= ALL_FAILED and came_out == 0:
            return f"the first {self.states['failed']} candidates all failed"
        if self.granted.work == "none" or self.proposed < self.allowed:
            return self._ended_by_search or self.granted.reason
        return self._ended_by_search

    @property
    def allowed(self) -> int:
        """How many candidates may be proposed: another one for each that was stopped, up to a quarter more."""
        return self.plan.candidates + min(self.states["stopped"], self.plan.candidates // MORE_FOR_STOPPED)

    @property
    def running(self) -> int:
        """How many jobs are under way or ready to be."""
        return len(self._busy)

    @property
    def timings_left(self) -> int:
        """How many timings are left, those under way among them, if none of them is spared by others."""
        return self.untimed if self.stage == "timing" else 0

    @property
    def untimed(self) -> int:
        """How many that may be on the front have no timings, though they could."""
        return len(self._untimed()) if self.plan.timers and self._timing else 0

    @property
    def waiting(self) -> int:
        """How many candidates are neither measured nor given up."""
        return len(self._open)

    @property
    def stage(self) -> Stage:
        if not self._timing:
            return "racing" if self._proposed_all and not self._open else "searching"
        return "timing" if self.running else "done"

    def seconds(self, recipe: Recipe) -> float:
        """What trying a recipe would take of one slot: the steps that nobody has made or makes now, each as long as its
        technique took so far on average (for each update of the weights, where it trains), and measuring. Of a
        technique that was not tried yet nothing is known but what others took; while nothing at all was tried, each
        step counts as one, and measuring too."""
        return self._seconds([one for one in recipe.lineage()[1:] if not self._comes(one.id)])

    @property
    def seconds_to_finish(self) -> float:
        """What the front would still take by the clock if nothing more were proposed, about: candidates under way,
        then reading all of the evaluation with whoever may be on the front by now, on all slots, then timing these, one
        after the other. 0 before the original was measured: there is nothing to finish."""
        original = self.original.measurement
        if original is None:
            return 0.0
        making = [
            node.recipe
            for node in self._nodes.values()
            if node.open > 0 and node.artifact is None and node.parent is not None
        ]
        under_way = (
            self._seconds(making) + (len(self._open) - 1) * self._measuring.mean if self._open else 0.0
        )
        first = self.plan.rungs[0]
        # Reading all takes as much longer as there is more of it, at most; the original was read and timed in one go.
        whole = min(original.seconds, self._measuring.mean / first or original.seconds)
        known = self._timings_took.mean
        timing = known or max(original.seconds - whole, min(original.seconds, TIMING_SECONDS))
        measured = [one for one in self.candidates.values() if one.measurement is not None]
        found = {*self._found_contenders(measured), self._original_id}
        reading = sum(self.candidates[id].fidelity < 1 for id in found) * whole
        timings = sum(not self._nodes[id].timed for id in found) * timing if self.plan.timers else 0.0
        return (under_way + reading) / self.slots + timings

    def _comes(self, id: str) -> bool:
        """Whether somebody has made this model, makes it or will."""
        node = self._nodes.get(id)
        return node is not None and (node.artifact is not None or node.open > 0 or node.failure is not None)

    def _seconds(self, recipes: Sequence[Recipe]) -> float:
        """What the last step of each of these and measuring once would take."""
        known = [took.mean for took in self._took.values()] or [self._measuring.mean or 1.0]
        typical = sum(known) / len(known)
        steps = (one.steps[-1] for one in recipes)
        making = (
            self._took[step.name()].of(work_of(step)) if step.name() in self._took else typical
            for step in steps
        )
        return (self._measuring.mean or typical) + sum(making)

    def wants(self, slots: int) -> bool:
        """Whether one more proposal is wanted now, so that none of `slots` has to wait for work.

        Candidates may wait for one shared prefix; their number is bounded, so that a search that learns is
        not asked for everything before it has heard of anything. Nothing is made before the original.
        """
        if self._nodes[self._original_id].artifact is None:
            return False
        if self._timing or self.exhausted is not None or self.original.failure is not None:
            return False
        return self.proposed < self.allowed and self.running <= slots and len(self._open) < 4 * slots

    @property
    def stoppable(self) -> list[Candidate]:
        """Who may be given up so that something is saved. What is made already is only measured, what others need is
        made anyway: neither is among them."""
        found = []
        for id in sorted(self._open):
            alone = self._alone(self._nodes[id])
            if not alone:
                continue
            waits = all(node.job is None for node in alone)
            if waits or self._seconds([node.recipe for node in alone]) >= WORTH_STOPPING_SECONDS:
                found.append(self.candidates[id])
        return found

    def _alone(self, node: RecipeNode) -> list[RecipeNode]:
        """What has to be made for this candidate and for nobody else, itself first; nothing where it is there already
        or others need it."""
        own = itertools.takewhile(lambda one: one.artifact is None and one.open == 1, self._upwards(node))
        return [] if node.id == self._original_id else list(own)

    def _upwards(self, node: RecipeNode) -> Iterator[RecipeNode]:
        """This node and those that it comes from, up to the original."""
        yield node
        while node.parent is not None:
            node = self._nodes[node.parent]
            yield node

    def handle(self, event: Event) -> list[Command]:
        """Take one event in; what is to be done because of it."""
        if isinstance(event, ServiceStarted):
            commands = self._handle_began(event)
        elif isinstance(event, SlotsChanged):
            self.slots, commands = event.slots, []
        elif isinstance(event, CandidateProposed):
            commands = self._handle_proposed(event)
        elif isinstance(event, AttemptStarted):
            commands = self._handle_started(event)
        elif isinstance(event, AttemptEnded):
            commands = self._handle_ended(event)
        elif isinstance(event, CandidateStopped):
            commands = self._handle_stopped(event)
        elif isinstance(event, BudgetAllowance):
            self.granted = event
            commands = []
        else:
            self._ended_by_search = event.reason
            commands = []
        return commands + self._turn()

    def _handle_began(self, event: ServiceStarted) -> list[Command]:
        if event.granted != self.granted:
            self.granted = event.granted
            self._timing, self._contenders = False, None
        for node in self._nodes.values():
            node.job = None
            if node.failure is not None and node.failure.kind == "disk_full":
                self._revive(node)
        self._busy.clear()
        self.slots = event.slots
        return [command for node in list(self._nodes.values()) for command in self._next(node)]

    def _revive(self, node: RecipeNode) -> None:
        """Let a node be tried again: what it failed of is mended by who takes the study up."""
        node.failure, node.failed_attempts = None, 0
        if node.wanted:
            candidate = self.candidates[node.id]
            state: State = "waiting" if candidate.measurement is None else "measured"
            self._keep(dataclasses.replace(candidate, state=state, failure=None))
        self._timing, self._contenders = False, None

    def _handle_proposed(self, event: CandidateProposed) -> list[Command]:
        known = self.candidates.get(event.recipe.id)
        if known is not None:
            return self._told(known, event.choices)
        if event.cost is None:
            failure = Failure("invalid", event.refused or "the recipe cannot be applied to this model")
            failed = Candidate(event.recipe, "failed", 0, event.choices, failure=failure)
            self._keep(failed)
            self.proposed += 1
            return [Record(failed), Tell(event.choices, failure)]
        broken = [
            o for o in self.plan.objectives if o.metric == "size_bytes" and o.broken_by(event.cost.size_bytes)
        ]
        if broken:
            over = Candidate(event.recipe, "over_limit", event.cost.size_bytes, event.choices)
            self._keep(over)
            why = f"size_bytes={event.cost.size_bytes} breaks the limit of {broken[0].limit:g}"
            return [Record(over), Tell(event.choices, Failure("invalid", why))]
        self.proposed += 1
        return self._add_candidate(event.recipe, event.choices, event.cost)

    def _enter(self, recipe: Recipe, choices: Mapping[str, Value], cost: Cost) -> list[RecipeNode]:
        """Put a candidate and its lineage into the trie; the nodes from the original to it."""
        nodes: list[RecipeNode] = []
        for step in recipe.lineage():
            id, parent = step.id, nodes[-1].id if nodes else None
            nodes.append(self._nodes.setdefault(id, RecipeNode(step, id, parent)))
        nodes[0].uses += 1
        for above, below in itertools.pairwise(nodes):
            self.reused += below.uses > 0
            below.uses += 1
            above.children[below.id] = None
        nodes[-1].wanted, nodes[-1].cost = True, cost
        self._keep(Candidate(recipe, "waiting", cost.size_bytes, choices))
        return nodes

    def _add_candidate(self, recipe: Recipe, choices: Mapping[str, Value], cost: Cost) -> list[Command]:
        nodes = self._enter(recipe, choices, cost)
        failed = next((node for node in nodes if node.failure is not None), None)
        if failed is not None:
            return self._fail(nodes[-1], _inherited(failed))
        return [command for node in nodes for command in self._next(node)]

    def _handle_started(self, event: AttemptStarted) -> list[Command]:
        node = self._node_of(event.job_id)
        if node is None or not node.wanted or node.measured or node.failure is not None:
            return []
        return self._update(node, "running")

    def _handle_ended(self, event: AttemptEnded) -> list[Command]:
        node = self._node_of(event.job_id)
        if node is None or node.job is None or node.job.id != event.job_id or event.attempt != node.attempt:
            return []  # late or repeated: this attempt was given up, or its result is counted already
        job, node.job = node.job, None
        self._busy.discard(node.id)
        if isinstance(event.outcome, Failure):
            return self._handle_failure(node, job, event.outcome)
        return self._handle_success(node, job, event.outcome)

    def _handle_stopped(self, event: CandidateStopped) -> list[Command]:
        alone = self._alone(self._nodes[event.id]) if event.id in self._open else []
        if not alone:
            return []  # late or repeated, or more has come of it since
        commands: list[Command] = []
        for node in alone:
            if node.job is not None:
                commands.append(Cancel(node.job, node.attempt))
                node.job = None
                self._busy.discard(node.id)
        for node in self._upwards(alone[0]):
            node.uses -= 1
            self.reused -= node.parent is not None and node.uses > 0
        alone[0].wanted = False
        before = self.candidates[event.id]
        stopped = dataclasses.replace(
            before, state="stopped", stopped=event.reason, attempts=alone[0].attempt
        )
        self._keep(stopped)
        return [*commands, Record(stopped), *self._told(stopped, stopped.choices)]

    def _handle_success(self, node: RecipeNode, job: Job, success: Success) -> list[Command]:
        new = node.artifact is None
        self._note_seconds(node, job, success, new)
        self._take_account(node, success, new)
        node.artifact, node.exclusive, node.failed_attempts = success.artifact, False, 0
        commands: list[Command] = []
        if job.meters:
            node.timed = node.timed or job.meters == self.plan.timers
            candidate = self.candidates[node.id]
            before = candidate.measurement
            rungs = dict(candidate.rungs)
            if job.meters[: len(self.plan.meters)] == self.plan.meters:
                self._contenders = None  # of what is known now, which has changed
                if before is not None and node.fidelity < job.fidelity:
                    rungs[node.fidelity] = {metric: before.metrics[metric] for metric in before.items}
                node.fidelity = job.fidelity
            news = _compact(success.measurement)
            measurement = news if before is None else before.joined(news)
            commands += self._update(
                node, "measured", measurement=measurement, artifact=success.artifact,
                predicted=self._predicted(node, measurement), fidelity=node.fidelity, rungs=rungs,
            )  # fmt: skip
            if before is None:
                commands += self._told(self.candidates[node.id], candidate.choices)
        commands += self._next(node)
        if new:
            for child in node.children:
                commands += self._next(self._nodes[child])
        return commands

    def _note_seconds(self, node: RecipeNode, job: Job, success: Success, new: bool) -> None:
        if not node.recipe.steps:
            return
        if new and success.seconds > 0:
            step = node.recipe.steps[-1]
            self._took.setdefault(step.name(), TechniqueDuration()).add(success.seconds, work_of(step))
        if job.meters == self.plan.meters and job.fidelity == self.plan.rungs[0]:
            self._measuring.add(success.measurement.seconds)
        if job.meters == self.plan.timers:
            self._timings_took.add(success.measurement.seconds)

    def _take_account(self, node: RecipeNode, success: Success, new: bool) -> None:
        """Note what was spared by what was there. new: the node had no artifact before."""
        before, measuring = self._found, success.measurement.seconds
        if new:
            node.exclusive_subtree_seconds = success.seconds + success.saved_seconds
        if success.found:
            spent = before.jobs_seconds + success.seconds + measuring
            self._found = dataclasses.replace(before, jobs=before.jobs + 1, jobs_seconds=spent)
        else:
            spared = before.statistics_seconds + success.saved_seconds
            self._found = dataclasses.replace(before, statistics_seconds=spared)

    def _handle_failure(self, node: RecipeNode, job: Job, failure: Failure) -> list[Command]:
        if failure.kind == "preempted":
            return self._next(node)
        node.failed_attempts += 1
        again = {
            "out_of_memory": 2,
            "bug": MAX_BUG_ATTEMPTS,
            "timeout": MAX_BUG_ATTEMPTS,
            "disk_full": MAX_BUG_ATTEMPTS,
        }.get(failure.kind, 1)
        if node.failed_attempts < again:
            node.exclusive = failure.kind == "out_of_memory"
            return self._next(node)
        return self._fail(node, failure)

    def _fail(self, node: RecipeNode, failure: Failure) -> list[Command]:
        """Give a node up, and with it all that was to be made from it."""
        node.failure = failure
        commands: list[Command] = []
        if node.wanted:
            candidate = self.candidates[node.id]
            commands += self._update(node, "failed", failure=failure)
            if candidate.measurement is None:
                commands += self._told(self.candidates[node.id], candidate.choices)
        if node.artifact is None:
            for child in node.children:
                if self._nodes[child].failure is None:
                    commands += self._fail(self._nodes[child], _inherited(node))
        return commands

    def _next(self, node: RecipeNode) -> list[Command]:
        """The job that this node needs now, if it is ready for one."""
        if node.job is not None or node.failure is not None or self.granted.work == "none":
            return []
        if node.artifact is None and node.open == 0:
            return []  # who needed it was given up
        if node.parent is not None and self._nodes[node.parent].artifact is None:
            return []
        if node.parent is None and not node.measured:
            # Everything waits for the original anyway: it is measured and timed in one go.
            return [self._run(node, (*self.plan.meters, *self.plan.timers), bool(self.plan.timers))]
        if node.artifact is None or (node.wanted and not node.measured):
            meters, fidelity = (self.plan.meters, self.plan.rungs[0]) if node.wanted else ((), 1.0)
            return [self._run(node, meters, node.exclusive, fidelity)]
        return []

    def _timings(self) -> list[Command]:
        """The timings to begin now: no more than there are slots, since each tells which others are worth it."""
        found: list[Command] = []
        while self.running < self.slots:
            id = self._next_timed()
            if id is None:
                break
            found.append(self._run(self._nodes[id], self.plan.timers, exclusive=True))
        return found

    def _next_timed(self) -> str | None:
        if not self.plan.timers:
            return None
        if self._contenders is None:
            self._contenders = self._found_contenders(
                [one for one in self.candidates.values() if one.measurement and one.fidelity >= 1]
            )
        waiting = [id for id in self._untimed() if self._nodes[id].job is None]
        if self._original_id in waiting:
            return self._original_id
        timings = {
            id: found for id in (*self._contenders, self._original_id) if (found := self._timings_of(id))
        }
        return next_timed(waiting, self._contenders, timings, self.plan) if waiting else None

    def _untimed(self) -> list[str]:
        """The original and the contenders, without those that were timed or cannot be."""
        ids = dict.fromkeys((self._original_id, *(self._contenders or ())))
        return [id for id in ids if not self._nodes[id].timed and self._nodes[id].failure is None]

    def _timings_of(self, id: str) -> Mapping[str, Timing]:
        """What was timed of a candidate; nothing where any of it is unreliable."""
        measurement = self.candidates[id].measurement
        if measurement is None or self.plan.timed - (measurement.metrics.keys() - {*measurement.unreliable}):
            return {}
        return {
            metric: Timing(measurement.metrics[metric], measurement.errors.get(metric, 0.0))
            for metric in self.plan.timed
        }

    def _found_contenders(self, candidates: Sequence[Candidate]) -> dict[str, Rival]:
        """Those of the candidates, all of them measured, that may be on the front."""
        measured = [(one.id, one.measurement) for one in candidates if one.measurement is not None]
        rivals = {id: Rival(one.metrics, self._cost(id)) for id, one in measured}
        found = contenders(rivals, self.plan)
        return {id: rival for id, rival in rivals.items() if id in found}

    def _cost(self, id: str) -> Cost:
        cost = self._nodes[id].cost
        assert cost is not None, "every candidate that runs has a known cost"
        return cost

    def _predicted(self, node: RecipeNode, measurement: Measurement) -> Mapping[str, float]:
        """What was predicted of what is measured now, but of the original, which predictions are relative to."""
        original = self.original.measurement
        if node.cost is None or original is None or node.parent is None:
            return {}
        found = predictions(node.cost, self.plan.original_cost, original.metrics)
        return {metric: value for metric, value in found.items() if metric in measurement.metrics}

    def _turn(self) -> list[Command]:
        """When there is nothing more to propose, fill slots with measurements on more of the evaluation, of those who
        may be on the front; when there are none, go on to the timings. Nothing where the budget allows nothing more."""
        if self.granted.work == "none":
            self._timing = self._timing or not self.running
            return []
        if self._timing:
            return self._timings()
        if self.original.state == "waiting" or not self._proposed_all:
            return []
        raced = self._raced()
        if raced or self.running:
            return raced
        self._timing = True
        return self._timings()

    @property
    def _proposed_all(self) -> bool:
        return self.exhausted is not None or self.proposed >= self.allowed or self.original.state == "failed"

    def _raced(self) -> list[Command]:
        found: list[Command] = []
        if len(self.plan.rungs) == 1 or self.original.measurement is None:
            return found
        while self.running <= self.slots:
            id = self._race.promoted(self._busy)
            if id is None:
                break
            node = self._nodes[id]
            above = next_fidelity(self.plan.rungs, node.fidelity)
            assert above is not None, "who is promoted is not at the top"
            found.append(self._run(node, self.plan.meters, node.exclusive, above, node.fidelity))
        return found

    def _run(
        self,
        node: RecipeNode,
        meters: Sequence[str],
        exclusive: bool,
        fidelity: float = 1.0,
        after: float = 0.0,
    ) -> Run:
        job = Job(node.recipe, tuple(meters), self.plan.materials_digest, fidelity, after)
        node.job = job
        node.attempt += 1
        self._busy.add(node.id)
        self._by_job[job.id] = node.id
        return Run(job, node.attempt, exclusive)

    def _node_of(self, job_id: str) -> RecipeNode | None:
        recipe_id = self._by_job.get(job_id)
        return None if recipe_id is None else self._nodes[recipe_id]

    def _update(self, node: RecipeNode, state: State, **changes: object) -> list[Command]:
        before = self.candidates[node.id]
        after = dataclasses.replace(before, state=state, attempts=node.attempt, **changes)  # type: ignore[arg-type]
        self._keep(after)
        return [Record(after)] if state in ("measured", "failed") else []

    def _keep(self, candidate: Candidate) -> None:
        """Put a candidate, new or changed, in its place, and bring up to date what follows from all of them."""
        before = self.candidates.get(candidate.id)
        self.candidates[candidate.id] = candidate
        if before is not None:
            self.states[before.state] -= 1
        self.states[candidate.state] += 1
        opened = candidate.state in ("waiting", "running")
        if opened != (candidate.id in self._open):
            for node in self._upwards(self._nodes[candidate.id]):
                node.open += 1 if opened else -1
            (self._open.add if opened else self._open.discard)(candidate.id)
        if len(self.plan.rungs) == 1:
            return
        if candidate.failure is not None:
            self._race.leave(candidate.id)
        elif candidate.measurement is not None:
            cost = self._cost(candidate.id)
            self._race.enter(candidate.id, candidate.measurement, cost, candidate.fidelity)

    def _told(self, candidate: Candidate, choices: Mapping[str, Value]) -> list[Command]:
        """What to tell the search of a candidate that has ended; nothing of one that is under way."""
        if not choices:
            return []
        if candidate.failure is not None:
            return [Tell(choices, candidate.failure)]
        if candidate.state == "over_limit":
            return [Tell(choices, Failure("invalid", "breaks the size limit"))]
        if candidate.state == "stopped":
            return [Tell(choices, None)]
        if candidate.measurement is None:
            return []
        original = self.original.measurement
        foretold = {} if original is None else estimates(self._cost(candidate.id), self.plan, original)
        metrics = {**foretold, **candidate.measurement.metrics}
        return [Tell(choices, metrics)]


def _compact(measurement: Measurement) -> Measurement:
    """The same, with its items as bare numbers: a study holds those of thousands of candidates."""
    items = {metric: array("d", values) for metric, values in measurement.items.items()}
    return dataclasses.replace(measurement, items=items)


def _inherited(node: RecipeNode) -> Failure:
    assert node.failure is not None
    return Failure(node.failure.kind, f"its prefix {node.recipe} failed: {node.failure.message}")
