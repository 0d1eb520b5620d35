"""Forecast a study before it runs: its distinct jobs, shared steps, sizes, time and cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from cluster.storage.store import ArtifactStore
from jobs import meters
from jobs.job import Success
from jobs.technique import Technique
from orchestrator.persistence.ledger import Ledger
from orchestrator.persistence.records import ArtifactRecords
from orchestrator.planning.candidates import propose
from orchestrator.planning.cost import CostModel
from orchestrator.planning.job_resources import local_slots
from orchestrator.planning.prepare import table_models
from orchestrator.planning.prepared_study import PreparedStudy
from orchestrator.search.search import Search
from orchestrator.service.cost_meter import noted_bill
from orchestrator.study.budget import HOUR, Nodes, describe_forecast, given_price, summary
from orchestrator.study.events import CandidateProposed
from orchestrator.study.latency_estimate import TIMING_SECONDS

ASSUMED_FLOPS = 1e11
"""Operations per second of one slot, if the store has no similar job to compare with: one core of a server CPU."""

TABLE_SECONDS = 12.0
"""The time to write, load and time one model of the latency table, in pairs with the original."""

_MAX_DUPLICATES = 200
"""After this many proposals in a row without a new recipe the space is assumed to be exhausted."""

_CALIBRATION_PASSES, _TRAINING_PASSES = 3, 4
"""Forward passes over a token: for statistics, the pass and about twice as much; for training, forward, backward, which
takes twice as long, and the teacher's forward."""

_OPERATIONS_PER_WEIGHT = 50.0
"""The operations of any step on each weight, roughly."""

_MEASURING = "measuring"
"""The name under which the times of measurements are averaged."""


@dataclass(frozen=True)
class Forecast:
    """The expected work of a study."""

    proposals: Sequence[CandidateProposed]
    """The candidates that the search would propose first."""
    steps: int
    """The number of steps of all proposals."""
    jobs: int
    """The number of distinct jobs that make these steps."""
    found: int
    """The number of these jobs whose results the store has already."""
    seconds: float
    """The slot time of the other jobs."""
    shared_seconds: float
    """The slot time that is saved as proposals share steps."""
    found_seconds: float
    """The slot time that is saved by the results of the store."""
    measured: bool
    """Whether times are averages of earlier jobs; else they are estimated from operations."""


def forecast(
    prepared: PreparedStudy, cost_model: CostModel, search: Search, store: ArtifactStore
) -> Forecast:
    """Ask the search for as many candidates as the study may try, and add up their jobs. Runs nothing."""
    proposals = _proposals(prepared, cost_model, search)
    possible = [proposal for proposal in proposals if proposal.cost is not None]
    means = seconds_by_technique(store)
    seconds: dict[str, float] = {}
    step_count, unshared_seconds = 0, 0.0
    for proposal in possible:
        for recipe in proposal.recipe.lineage()[1:]:
            if recipe.id not in seconds:
                seconds[recipe.id] = _step_seconds(recipe.steps[-1], prepared, means)
            step_count += 1
            unshared_seconds += seconds[recipe.id]
    records = ArtifactRecords(store)
    existing = [id for id in seconds if records.named(id) is not None]
    existing_seconds = sum(seconds[id] for id in existing)
    step_seconds = sum(seconds.values())
    return Forecast(
        proposals=proposals,
        steps=step_count,
        jobs=len(seconds),
        found=len(existing),
        seconds=step_seconds - existing_seconds + _measuring_seconds(len(possible), prepared, means),
        shared_seconds=unshared_seconds - step_seconds,
        found_seconds=existing_seconds,
        measured=bool(means),
    )


def costs(prepared: PreparedStudy, expected: Forecast) -> list[str]:
    """Lines on the node hours and the money that a study is expected to use, and on those that it has used."""
    cluster = prepared.config.cluster
    price = None
    if cluster.price_per_hour is not None:
        price = Nodes("", **given_price(cluster.price_per_hour))
    node_hours, reason = None, "nothing like it has run here"
    if expected.measured and cluster.address:
        reason = (
            f"it is about {expected.seconds / HOUR:.2f} hours of slots, on nodes that the cluster chooses"
        )
    elif expected.measured:
        node_hours = expected.seconds / local_slots(prepared.config) / HOUR
    lines = describe_forecast(node_hours, reason, price, prepared.budget)
    file = prepared.folder.ledger
    if file.is_file():
        ledger = Ledger(file, read_only=True)
        bill = noted_bill(ledger)
        ledger.close()
        if cluster.price_per_hour is not None:
            bill = bill.priced_at(cluster.price_per_hour)
        spent = summary(bill, prepared.budget)
        if spent:
            lines.append(f"Until now: {spent}.")
    return lines


def seconds_by_technique(store: ArtifactStore) -> Mapping[str, float]:
    """The mean seconds of each technique's steps, and of `measuring`, over all results of the store."""
    samples: dict[str, list[float]] = {}
    for result in ArtifactRecords(store).results():
        outcome = result.outcome
        is_timing = any(meters.load(name).exclusive for name in result.meters)
        if not isinstance(outcome, Success) or is_timing:
            continue
        samples.setdefault(_MEASURING, []).append(outcome.measurement.seconds)
        if result.techniques and outcome.seconds > 0.01:
            samples.setdefault(result.techniques[-1], []).append(outcome.seconds)
    return {name: fmean(values) for name, values in samples.items()}


def _proposals(prepared: PreparedStudy, cost_model: CostModel, search: Search) -> list[CandidateProposed]:
    """The first proposals of a search with distinct recipes."""
    proposals: dict[str, CandidateProposed] = {}
    duplicates = 0
    while len(proposals) < prepared.config.search.candidates and duplicates < _MAX_DUPLICATES:
        choices = search.ask(1)
        if not choices:
            break
        proposal = propose(prepared, cost_model, choices[0])
        if proposal.recipe.id in proposals:
            duplicates += 1
        else:
            duplicates = 0
            proposals[proposal.recipe.id] = proposal
    return list(proposals.values())


def _measuring_seconds(count: int, prepared: PreparedStudy, means: Mapping[str, float]) -> float:
    """The slot time to measure this many candidates, to time half of them, and to fit the latency table."""
    evaluation = prepared.materials.evaluation
    tokens = 0 if evaluation is None else evaluation.samples * evaluation.tokens
    assumed = _operations_per_token(prepared) * tokens / ASSUMED_FLOPS
    seconds = count * means.get(_MEASURING, assumed)
    if prepared.plan.timers:
        seconds += count / 2 * TIMING_SECONDS
    if prepared.plan.timed:
        seconds += table_models(prepared.config) * TABLE_SECONDS
    return seconds


def _step_seconds(step: Technique, prepared: PreparedStudy, means: Mapping[str, float]) -> float:
    return means.get(step.name(), _operations(step, prepared) / ASSUMED_FLOPS)


def _operations_per_token(prepared: PreparedStudy) -> float:
    """The operations of a forward pass: a multiplication and an addition for each weight."""
    return 2.0 * prepared.layout.parameters()


def _operations(step: Technique, prepared: PreparedStudy) -> float:
    calibration, training = prepared.materials.calibration, prepared.materials.training
    tokens = 0
    if "calibration" in step.needs and calibration is not None:
        tokens += _CALIBRATION_PASSES * calibration.samples * calibration.tokens
    if "training" in step.needs and training is not None:
        options = step.options()
        sequences = int(options.get("steps", 0)) * int(options.get("batch", 1))
        tokens += _TRAINING_PASSES * sequences * training.tokens
    return _operations_per_token(prepared) * tokens + _OPERATIONS_PER_WEIGHT * prepared.layout.parameters()
