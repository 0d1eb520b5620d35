"""Forecast: what a study would do, before it does anything: distinct jobs, what is shared, sizes, time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from cluster.storage.store import ArtifactStore
from jobs import meters
from jobs.job import Success, outcome_from_dict
from jobs.technique import Technique
from orchestrator.persistence.ledger import Ledger
from orchestrator.planning.job_resources import slots_of
from orchestrator.planning.prepare import Prepared, table_models
from orchestrator.search.search import Search
from orchestrator.service.cost_meter import noted_bill
from orchestrator.study.budget import HOUR, Nodes, describe_forecast, given_price, summary
from orchestrator.study.events import CandidateProposed
from orchestrator.study.latency_estimate import TIMING_SECONDS

ASSUMED_FLOPS = 1e11
"""Operations a second of one slot, where nothing like the job has run here yet: one core of a server CPU."""

TABLE_SECONDS = 12.0
"""One model of the table of operations: written, loaded and timed beside the original."""


@dataclass(frozen=True)
class Forecast:
    """proposals: a sample of what the search would try first. steps: all their steps; jobs: the distinct ones.

    found: how many of these jobs the store holds already. seconds: of slot time, for what is left.
    shared_seconds, found_seconds: of slot time, that the steps which are not distinct and the jobs that are found would
        take.
    measured: whether the times come from jobs that ran here, or from the count of operations.
    """

    proposals: Sequence[CandidateProposed]
    steps: int
    jobs: int
    found: int
    seconds: float
    shared_seconds: float
    found_seconds: float
    measured: bool


def forecast(prepared: Prepared, search: Search, store: ArtifactStore) -> Forecast:
    """Ask the search for as many candidates as the study may try, and count. Nothing is run."""
    proposals: dict[str, CandidateProposed] = {}
    misses = 0
    while len(proposals) < prepared.config.search.candidates and misses < 200:
        asked = search.ask(1)
        if not asked:
            break
        proposal = prepared.propose(asked[0])
        misses = misses + 1 if proposal.recipe.id in proposals else 0
        proposals.setdefault(proposal.recipe.id, proposal)
    possible = [p for p in proposals.values() if p.cost is not None]
    lineages = [p.recipe.lineage()[1:] for p in possible]
    distinct = {recipe.id: recipe for lineage in lineages for recipe in lineage}
    found = {id for id in distinct if store.record(f"artifacts/{id}") is not None}
    known = seconds_by_technique(store)
    seconds = {id: _seconds(recipe.steps[-1], prepared, known) for id, recipe in distinct.items()}
    unshared = sum(seconds[recipe.id] for lineage in lineages for recipe in lineage)
    there = sum(seconds[id] for id in found)
    steps = sum(seconds.values()) - there
    evaluation = prepared.materials.evaluation
    tokens = 0 if evaluation is None else evaluation.samples * evaluation.tokens
    measuring = len(possible) * known.get("measuring", _forward(prepared) * tokens / ASSUMED_FLOPS)
    timing = len(possible) / 2 * TIMING_SECONDS if prepared.plan.timers else 0.0
    timing += table_models(prepared.config) * TABLE_SECONDS if prepared.plan.timed else 0.0
    return Forecast(
        list(proposals.values()), sum(map(len, lineages)), len(distinct), len(found),
        steps + measuring + timing, unshared - sum(seconds.values()), there, bool(known),
    )  # fmt: skip


def costs(prepared: Prepared, found: Forecast) -> list[str]:
    """What a study will use of nodes and money, as far as anybody can tell, and what it has used."""
    config = prepared.config
    given = config.cluster.price_per_hour
    price = None if given is None else Nodes("", **given_price(given))
    node_hours, unknown = None, "nothing like it has run here"
    if found.measured and config.cluster.address:
        unknown = f"it is about {found.seconds / HOUR:.2f} hours of slots, on nodes that the cluster chooses"
    elif found.measured:
        node_hours = found.seconds / slots_of(config) / HOUR
    lines = describe_forecast(node_hours, unknown, price, prepared.budget)
    file = prepared.folder / "ledger.db"
    if file.is_file():
        ledger = Ledger(file, read_only=True)
        bill = noted_bill(ledger)
        ledger.close()
        if said := summary(bill if given is None else bill.priced_at(given), prepared.budget):
            lines.append(f"Until now: {said}.")
    return lines


def seconds_by_technique(store: ArtifactStore) -> Mapping[str, float]:
    """The mean seconds that each technique's step, and `measuring`, took in all that the store remembers."""
    seen: dict[str, list[float]] = {}
    for key in store.records("results/"):
        record = store.record(key)
        if record is None:
            continue
        steps, outcome = record["recipe"]["steps"], outcome_from_dict(record["result"])
        if not isinstance(outcome, Success) or any(meters.load(m).exclusive for m in record["meters"]):
            continue
        seen.setdefault("measuring", []).append(outcome.measurement.seconds)
        if steps and outcome.seconds > 0.01:
            seen.setdefault(steps[-1]["technique"], []).append(outcome.seconds)
    return {name: fmean(values) for name, values in seen.items()}


def _seconds(step: Technique, prepared: Prepared, known: Mapping[str, float]) -> float:
    """Of making one step."""
    return known.get(step.name(), _operations(step, prepared) / ASSUMED_FLOPS)


def _forward(prepared: Prepared) -> float:
    """Operations of the model for one token: a multiply and an add per weight."""
    return 2.0 * prepared.layout.parameters()


def _operations(step: Technique, prepared: Prepared) -> float:
    forward, tokens = _forward(prepared), 0
    if "calibration" in step.needs and prepared.materials.calibration is not None:
        source = prepared.materials.calibration
        tokens += 3 * source.samples * source.tokens  # the pass, and about twice as much for the statistics
    if "training" in step.needs and prepared.materials.training is not None:
        options = step.options()
        sequences = int(options.get("steps", 0)) * int(options.get("batch", 1))
        tokens += 4 * sequences * prepared.materials.training.tokens  # forward, backward twice, teacher
    return forward * tokens + 50.0 * prepared.layout.parameters()
