"""Results: the outcome of a study as plain data, computed from its candidates, for reports and MLflow."""

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
"""The place of a candidate in the results. `other_environment`: measured in another environment than the original, so
not comparable. `incomplete`: not measured in every objective. `eliminated`: measured on a part of the evaluation and
not promoted, since it would hardly improve the front. `stopped`: given up before it was measured. `waiting`: not
measured yet."""

COSTS = ("_bytes", "_gib", "_ms", "_joules", "cost_per_million_tokens")
"""The endings of metrics that are costs of a model; all other metrics are measures of quality."""


@dataclass(frozen=True)
class Results:
    """The candidates of a study with their standings."""

    study: str
    objectives: list[Objective]
    original: Candidate
    """The reference of all comparisons, whether or not it is on the front."""
    by_id: Mapping[str, Candidate]
    """All candidates, with the original."""
    members: list[str]
    """The ids of the candidates on the front, in ascending order of size."""
    standings: Mapping[str, Standing]

    @property
    def candidates(self) -> list[Candidate]:
        return list(self.by_id.values())

    @property
    def front(self) -> ParetoFront:
        return ParetoFront(self.objectives, {id: metrics(self.by_id[id]) for id in self.members})

    @property
    def reference(self) -> dict[str, float] | None:
        """The reference point of the hypervolume; None until the original is measured in every objective.

        Costs (size, time, energy) are bounded by those of the original. Quality is bounded by a useless model: a score
        of 0, or twice the original's error (perplexity).
        """
        original = metrics(self.original)
        if any(objective.metric not in original for objective in self.objectives):
            return None
        return {
            objective.metric: bound(objective, original[objective.metric]) for objective in self.objectives
        }

    @property
    def hypervolume(self) -> float | None:
        """The hypervolume of the front, relative to a model with the original's quality and no costs.

        None without a reference point or a front.
        """
        reference, original = self.reference, metrics(self.original)
        if reference is None or not self.members:
            return None
        lengths = []
        for metric, reference_value in reference.items():
            if metric.endswith(COSTS):
                lengths.append(reference_value)
            else:
                lengths.append(abs(reference_value - original[metric]))
        maximum = math.prod(lengths)
        return self.front.hypervolume(reference) / maximum if maximum else None

    @property
    def picks(self) -> dict[str, str]:
        """The ids of the members with a name (knee, smallest, …), for the names that the objectives define."""
        front = self.front
        picks: dict[str, str] = {}
        for name in PICKS:
            try:
                picks[name] = front.pick(name)
            except LookupError:
                continue
        return picks


def judge(
    study: str, objectives: Sequence[Objective], original: Candidate, candidates: Sequence[Candidate]
) -> Results:
    """Return the results of these candidates and the original, which may be among them.

    A later candidate replaces an earlier one with the same id.
    """
    by_id = {candidate.id: candidate for candidate in (original, *candidates)}
    by_id[original.id] = original
    return Standings(study, objectives, original.id, by_id).results()


class Standings:
    """The standings of a running study, updated one candidate at a time.

    `results` equals `judge` of all candidates without comparing all of them again.
    """

    def __init__(
        self,
        study: str,
        objectives: Sequence[Objective],
        original: str,
        by_id: Mapping[str, Candidate],
        fidelity: float = 1.0,
    ) -> None:
        """by_id: the candidates of the study, read but not modified. fidelity: candidates that were measured on a
        smaller share of the evaluation are eliminated."""
        self.objectives = list(objectives)
        self.fidelity = fidelity
        self._study = study
        self._original = original
        self._by_id = by_id
        self._judge_all()

    def take(self, id: str) -> None:
        """Update the standing of a candidate that changed."""
        if id == self._original or self._independent.get(id) == "front":
            # Other candidates were compared with its earlier version, which may have kept them off the front.
            self._judge_all()
            return
        candidate = self._by_id[id]
        self._independent[id] = self._judge(candidate)
        if self._independent[id] == "front":
            self._front.add(id, metrics(candidate))

    def results(self) -> Results:
        """Return the current results. Candidates that `take` was not called for are waiting."""
        standings = {id: self._standing_of(id) for id in self._by_id}
        members = sorted(self._front.members, key=lambda id: (metrics(self._by_id[id])["size_bytes"], id))
        return Results(
            self._study, self.objectives, self._by_id[self._original], dict(self._by_id), members, standings
        )

    def _standing_of(self, id: str) -> Standing:
        independent = self._independent.get(id, "waiting")
        if independent == "front" and id not in self._front.members:
            return "dominated"
        return independent

    def _judge(self, candidate: Candidate) -> Standing:
        if candidate.state == "measured" and candidate.fidelity < self.fidelity:
            return "eliminated"
        return _independent_standing(candidate, self.objectives, self._by_id[self._original])

    def _judge_all(self) -> None:
        self._independent = {id: self._judge(candidate) for id, candidate in self._by_id.items()}
        comparable = {}
        for id, standing in self._independent.items():
            if standing == "front":
                comparable[id] = metrics(self._by_id[id])
        self._front = ParetoFront(self.objectives, comparable)


def bound(objective: Objective, original: float) -> float:
    """Return the reference value of one objective, given that of the original; see `Results.reference`."""
    if objective.metric.endswith(COSTS):
        return original
    if objective.goal == "max" and original > 0:
        return 0.0
    if objective.goal == "min":
        return original + abs(original)
    return original + -abs(original)


def metrics(candidate: Candidate) -> Metrics:
    """Return the exact size and all measured metrics of a candidate."""
    size = {"size_bytes": float(candidate.size_bytes)}
    if candidate.measurement is None:
        return size
    return {**size, **candidate.measurement.metrics}


def errors(candidate: Candidate) -> Mapping[str, float]:
    """Return the standard errors of the measured metrics."""
    return candidate.measurement.errors if candidate.measurement else {}


def difference(candidate: Candidate, other: Candidate, metric: str) -> Difference | None:
    """Return the paired difference of two candidates; see `paired`."""
    if candidate.measurement is None or other.measurement is None:
        return None
    return paired(candidate.measurement, other.measurement, metric)


def paired(first: Measurement, second: Measurement, metric: str) -> Difference | None:
    """Return the difference first − second over the items that both contain; None without such items.

    The difficulty of items cancels out. The caller ensures that both measurements have the same items in the same
    order, as those of one study do: a measurement on a share of the evaluation has its first items.
    """
    count = min(len(first.items.get(metric, ())), len(second.items.get(metric, ())))
    if not count:
        return None
    pairs = zip(first_items(first, metric, count), first_items(second, metric, count), strict=True)
    differences = [a - b for a, b in pairs]
    return Difference(statistics.fmean(differences), standard_error(differences), count)


def reasons(results: Results) -> list[tuple[int, str]]:
    """Return the reasons of failures with the number of candidates, the most frequent first."""
    counts: Counter[str] = Counter()
    for candidate in results.candidates:
        failure = candidate.failure
        if failure is not None:
            counts[f"{failure.kind.replace('_', ' ')}: {failure.message.splitlines()[0]}"] += 1
    return [(count, reason) for reason, count in counts.most_common()]


def indistinguishable_objectives(results: Results) -> list[str]:
    """Return the objectives in which no two members of the front differ by more than two standard errors."""
    pairs = list(itertools.combinations([results.by_id[id] for id in results.members], 2))
    indistinguishable = []
    for objective in results.objectives:
        differences = [difference(first, second, objective.metric) for first, second in pairs]
        paired_differences = [value for value in differences if value is not None]
        if paired_differences and all(abs(value.value) <= 2 * value.error for value in paired_differences):
            indistinguishable.append(objective.metric)
    return indistinguishable


@dataclass(frozen=True)
class Flips:
    """The number of pairs of candidates whose order differs between two shares of the evaluation."""

    metric: str
    low: float
    """The smaller share."""
    high: float
    """The larger share."""
    flipped: int
    pairs: int
    """Number of pairs that were measured on both shares."""


def rank_flips(results: Results) -> list[Flips]:
    """Count the flips from each rung to the next one, for each evaluated objective."""
    by_metric = _metrics_by_rung(results)
    flips = []
    for metric in (objective.metric for objective in results.objectives if objective.metric in by_metric):
        candidates = by_metric[metric]
        rungs = sorted({rung for values in candidates for rung in values})
        for low, high in itertools.pairwise(rungs):
            both = [(values[low], values[high]) for values in candidates if {low, high} <= values.keys()]
            orders = [(a[0] - b[0]) * (a[1] - b[1]) for a, b in itertools.combinations(both, 2)]
            flips.append(Flips(metric, low, high, sum(order < 0 for order in orders), len(orders)))
    return flips


def _metrics_by_rung(results: Results) -> dict[str, list[dict[float, float]]]:
    """For each evaluated metric, the values of each promoted candidate by rung."""
    by_metric: dict[str, list[dict[float, float]]] = {}
    for candidate in results.candidates:
        if candidate.measurement is None or not candidate.rungs:
            continue
        rungs = {**candidate.rungs, candidate.fidelity: candidate.measurement.metrics}
        for metric in candidate.measurement.items:
            values = {rung: measured[metric] for rung, measured in rungs.items() if metric in measured}
            by_metric.setdefault(metric, []).append(values)
    return by_metric


def prediction_errors(candidate: Candidate) -> dict[str, float]:
    """Return the relative errors of a candidate's predictions, by metric."""
    measured = metrics(candidate)
    return {metric: value / measured[metric] - 1 for metric, value in candidate.predicted.items()}


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


def _independent_standing(
    candidate: Candidate, objectives: Sequence[Objective], original: Candidate
) -> Standing:
    """The standing of a candidate without the others: "front" if it may be compared with them."""
    if candidate.state in ("failed", "over_limit", "stopped"):
        return candidate.state
    values, measurement = metrics(candidate), candidate.measurement
    missing = False
    for objective in objectives:
        if objective.metric not in values:
            missing = True
        elif objective.broken_by(values[objective.metric]):
            return "over_limit"
    if measurement is None or candidate.state != "measured":
        return "waiting"
    if missing:
        return "incomplete"
    if any(objective.metric in measurement.unreliable for objective in objectives):
        return "unreliable"
    reference = original.measurement
    if reference is not None and differing(measurement.environment, reference.environment):
        return "other_environment"
    return "front"


def differing(environment: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Return the names of the properties that both environments state with different values."""
    return sorted(name for name in environment.keys() & other.keys() if environment[name] != other[name])
