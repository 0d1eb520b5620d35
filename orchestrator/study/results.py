"""Results: a study's outcome as plain data, built purely from its candidates. What the report and MLflow show."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from jobs.measurement.measurement import Measurement, first_items, standard_error
from orchestrator.pareto.front import PICKS, Metrics, Objective, ParetoFront
from orchestrator.study.candidate import Candidate
from orchestrator.study.front_snapshot import Difference, FrontMember, FrontSnapshot, MeasuredModel

Standing = Literal[
    "front",
    "dominated",
    "over_limit",
    "unreliable",
    "other_environment",
    "incomplete",
    "eliminated",
    "failed",
    "stopped",
    "waiting",
]
"""Where a candidate stands. elsewhere: measured in another environment than the original, so not comparable;
incomplete: measured, but not in every objective; outrun: measured on a part of the evaluation, by which it
would add next to nothing to the front; stopped: given up before it was measured; waiting: not measured yet."""

COSTS = ("_bytes", "_gib", "_ms", "_joules", "cost_per_million_tokens")
"""The units of what a model costs; any other metric says how good it is."""


@dataclass(frozen=True)
class Results:
    """by_id: all candidates, the original among them; members: the ids on the front, smallest first.

    The original is what everything is compared with, whether or not it is on the front itself.
    """

    study: str
    objectives: list[Objective]
    original: Candidate
    by_id: Mapping[str, Candidate]
    members: list[str]
    standings: Mapping[str, Standing]

    @property
    def candidates(self) -> list[Candidate]:
        return list(self.by_id.values())

    @property
    def front(self) -> ParetoFront:
        return ParetoFront(self.objectives, {id: metrics(self.by_id[id]) for id in self.members})

    @property
    def reference(self) -> dict[str, float] | None:
        """The point that bounds the hypervolume; None until the original is measured in every objective.

        What costs no less than the original is worth nothing: size, time and energy are bounded by its own.
        Quality is bounded by what is of no use: a score of 0, an error (perplexity) twice the original's.
        """
        original = metrics(self.original)
        if any(objective.metric not in original for objective in self.objectives):
            return None
        return {o.metric: bound(o, original[o.metric]) for o in self.objectives}

    @property
    def hypervolume(self) -> float | None:
        """Of the front, as a share of what a model as good as the original would have at no cost at all."""
        reference, original = self.reference, metrics(self.original)
        if reference is None or not self.members:
            return None
        whole = math.prod(
            bound if metric.endswith(COSTS) else abs(bound - original[metric])
            for metric, bound in reference.items()
        )
        return self.front.hypervolume(reference) / whole if whole else None

    @property
    def picks(self) -> dict[str, str]:
        """The members that have a name (knee, smallest, …), as far as the objectives tell."""
        front = self.front
        found: dict[str, str] = {}
        for name in PICKS:
            try:
                found[name] = front.pick(name)
            except LookupError:
                continue
        return found


def judge(
    study: str, objectives: Sequence[Objective], original: Candidate, candidates: Sequence[Candidate]
) -> Results:
    """The results of these candidates; the original counts as one, whether it is listed or not.

    A later candidate of the same id replaces an earlier one.
    """
    by_id = {candidate.id: candidate for candidate in (original, *candidates)}
    by_id[original.id] = original
    return Standings(study, objectives, original.id, by_id).results()


class Standings:
    """Where the candidates of a study that goes on stand, brought up to date one candidate at a time.

    fidelity: the share of the evaluation that counts at least. by_id is the study's own and is only read here. What
    `results` gives is what `judge` finds of all of them, without comparing all of them again.
    """

    def __init__(
        self,
        study: str,
        objectives: Sequence[Objective],
        original: str,
        by_id: Mapping[str, Candidate],
        fidelity: float = 1.0,
    ) -> None:
        self.objectives = list(objectives)
        self.fidelity = fidelity
        self._study = study
        self._original = original
        self._by_id = by_id
        self._judge_all()

    def take(self, id: str) -> None:
        """This candidate has ended, or more is known of it."""
        if id == self._original or self._own.get(id) == "front":
            # Others were compared with what it was before: who it kept off the front may be on it now.
            self._judge_all()
            return
        one = self._by_id[id]
        self._own[id] = self._judged(one)
        if self._own[id] == "front":
            self._front.add(id, metrics(one))

    def results(self) -> Results:
        """All of it as it is now; a candidate that `take` was not told of yet is waiting."""
        standings = {id: self._standing_of(id) for id in self._by_id}
        members = sorted(self._front.members, key=lambda id: (metrics(self._by_id[id])["size_bytes"], id))
        return Results(
            self._study, self.objectives, self._by_id[self._original], dict(self._by_id), members, standings
        )

    def _standing_of(self, id: str) -> Standing:
        own = self._own.get(id, "waiting")
        return "dominated" if own == "front" and id not in self._front.members else own

    def _judged(self, one: Candidate) -> Standing:
        if one.state == "measured" and one.fidelity < self.fidelity:
            return "eliminated"
        return _standing(one, self.objectives, self._by_id[self._original])

    def _judge_all(self) -> None:
        self._own = {id: self._judged(one) for id, one in self._by_id.items()}
        compared = {id: metrics(self._by_id[id]) for id, own in self._own.items() if own == "front"}
        self._front = ParetoFront(self.objectives, compared)


def bound(objective: Objective, original: float) -> float:
    """What bounds the hypervolume in one objective, by what the original has; see `Results.reference`."""
    if objective.metric.endswith(COSTS):
        return original
    if objective.goal == "max" and original > 0:
        return 0.0
    return original + (abs(original) if objective.goal == "min" else -abs(original))


def metrics(candidate: Candidate) -> Metrics:
    """What is known of a candidate: its exact size, and what was measured."""
    measured = candidate.measurement.metrics if candidate.measurement else {}
    return {"size_bytes": float(candidate.size_bytes), **measured}


def errors(candidate: Candidate) -> Mapping[str, float]:
    return candidate.measurement.errors if candidate.measurement else {}


def difference(one: Candidate, other: Candidate, metric: str) -> Difference | None:
    """`one` against `other`; see `paired`."""
    if one.measurement is None or other.measurement is None:
        return None
    return paired(one.measurement, other.measurement, metric)


def paired(one: Measurement, other: Measurement, metric: str) -> Difference | None:
    """`one` against `other`, item by item of what both were measured on, so that what is hard for both drops out; None
    where there is nothing. That the items are the same is for the caller to know: those of one study are, and who was
    measured on fewer has the first ones."""
    count = min(len(one.items.get(metric, ())), len(other.items.get(metric, ())))
    mine, theirs = first_items(one, metric, count), first_items(other, metric, count)
    apart = [a - b for a, b in zip(mine, theirs, strict=True)]
    return Difference(statistics.fmean(apart), standard_error(apart), len(apart)) if apart else None


def reasons(results: Results) -> list[tuple[int, str]]:
    """What candidates failed of, the most frequent first, as how many did and why."""
    failures = (one.failure for one in results.candidates if one.failure is not None)
    said = Counter(
        f"{failure.kind.replace('_', ' ')}: {failure.message.splitlines()[0]}" for failure in failures
    )
    return [(count, reason) for reason, count in said.most_common()]


def indistinguishable_objectives(results: Results) -> list[str]:
    """The objectives in which no two members of the front differ by more than twice the error of that difference."""
    pairs = list(itertools.combinations([results.by_id[id] for id in results.members], 2))
    found = []
    for metric in (objective.metric for objective in results.objectives):
        apart = [difference(one, other, metric) for one, other in pairs]
        known = [one for one in apart if one is not None]
        if known and all(abs(one.value) <= 2 * one.error for one in known):
            found.append(metric)
    return found


@dataclass(frozen=True)
class Flips:
    """Of so many pairs that were measured on both shares of the evaluation, how many changed their order."""

    metric: str
    low: float
    high: float
    flipped: int
    pairs: int


def rank_flips(results: Results) -> list[Flips]:
    """From each rung to the next, for each objective that the evaluation tells."""
    known: dict[str, list[dict[float, float]]] = {}
    for one in results.candidates:
        if one.measurement is not None and one.rungs:
            ladder = {**one.rungs, one.fidelity: one.measurement.metrics}
            for metric in one.measurement.items:
                known.setdefault(metric, []).append(
                    {rung: at[metric] for rung, at in ladder.items() if metric in at}
                )
    found = []
    for metric in (objective.metric for objective in results.objectives if objective.metric in known):
        rungs = sorted({rung for ladder in known[metric] for rung in ladder})
        for low, high in itertools.pairwise(rungs):
            both = [(ladder[low], ladder[high]) for ladder in known[metric] if {low, high} <= ladder.keys()]
            orders = [(a[0] - b[0]) * (a[1] - b[1]) for a, b in itertools.combinations(both, 2)]
            found.append(Flips(metric, low, high, sum(order < 0 for order in orders), len(orders)))
    return found


def prediction_errors(candidate: Candidate) -> dict[str, float]:
    """By how much, relatively, what was predicted of a candidate was off what was measured, by metric."""
    known = metrics(candidate)
    return {metric: value / known[metric] - 1 for metric, value in candidate.predicted.items()}


def front_snapshot(results: Results) -> FrontSnapshot:
    """The front as stored data."""
    original = results.original
    return FrontSnapshot(
        study=results.study,
        objectives=tuple(results.objectives),
        original=_measured(original),
        members=tuple(_front_member(results.by_id[id], original) for id in results.members),
        picks=results.picks,
        reference=results.reference,
        hypervolume=results.hypervolume,
        candidates=Counter(results.standings.values()),
    )


def _front_member(candidate: Candidate, original: Candidate) -> FrontMember:
    differences = {}
    for metric in metrics(candidate):
        apart = difference(candidate, original, metric)
        if apart is not None:
            differences[metric] = apart
    return FrontMember(
        candidate.id, str(candidate.recipe), _measured(candidate), differences, candidate.artifact
    )


def _measured(candidate: Candidate) -> MeasuredModel:
    environment = candidate.measurement.environment if candidate.measurement else {}
    return MeasuredModel(metrics(candidate), errors(candidate), environment)


def _standing(candidate: Candidate, objectives: Sequence[Objective], original: Candidate) -> Standing:
    """Where a candidate stands by itself; "front" still means no more than that it may be compared."""
    if candidate.state in ("failed", "over_limit", "stopped"):
        return candidate.state
    known, measurement = metrics(candidate), candidate.measurement
    if any(o.metric in known and o.broken_by(known[o.metric]) for o in objectives):
        return "over_limit"
    if measurement is None or candidate.state != "measured":
        return "waiting"
    if any(o.metric not in known for o in objectives):
        return "incomplete"
    if any(o.metric in measurement.unreliable for o in objectives):
        return "unreliable"
    if not _comparable(measurement, original.measurement):
        return "other_environment"
    return "front"


def _comparable(one: Measurement, other: Measurement | None) -> bool:
    """Whether both were measured in one environment: in nothing that both state do they differ."""
    return other is None or not differing(one.environment, other.environment)


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """What two environments both state, and not alike."""
    return sorted(name for name in one.keys() & other.keys() if one[name] != other[name])
