"""Racing: which candidates are promoted to a larger share of the evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from jobs import techniques
from jobs.job import Failure, Success
from jobs.measurement.measurement import Measurement, standard_error
from jobs.recipe import Origin, Recipe
from orchestrator.pareto.front import Objective, ParetoFront
from orchestrator.study.events import (
    AttemptEnded,
    AttemptStarted,
    CandidateProposed,
    Command,
    Cost,
    Event,
    Run,
    ServiceStarted,
    StudyPlan,
)
from orchestrator.study.racing import Race
from orchestrator.study.results import judge, metrics, rank_flips
from orchestrator.study.study import Study

ORIGINAL = Recipe(Origin("model", "data", 0))
DROP, PRUNE = techniques.load("drop_layers"), techniques.load("prune_ffn")
WINDOWS = 128
RUNGS = (1 / 16, 1 / 4, 1.0)


def plan(candidates: int = 2, rungs: Sequence[float] = RUNGS, limit: float | None = None) -> StudyPlan:
    return StudyPlan(
        original=ORIGINAL, original_cost=Cost(1000, 1000, 10),
        objectives=(Objective("size_bytes"), Objective("loss", limit=limit)),
        candidates=candidates, meters=("text",), timers=(), timed=frozenset(), materials_digest="m",
        rungs=tuple(rungs),
    )  # fmt: skip


def measurement(items: Sequence[float]) -> Measurement:
    mean = math.fsum(items) / len(items)
    return Measurement({"loss": mean}, {"loss": standard_error(items)}, items={"loss": list(items)})


@dataclass(frozen=True)
class Runner:
    items: Sequence[float]
    size: int
    fidelity: float


def runner(items: Sequence[float], size: int, fidelity: float = 1 / 16) -> Runner:
    return Runner(items, size, fidelity)


HARD = [3.0, 1.0, 2.0, 5.0, 2.5, 4.0, 1.5, 3.5]
"""A hard item is hard for all models: losses vary far more between items than between models."""


OF_ORIGINAL = runner([item + 0.5 for item in HARD * 16], 1000, 1.0)


def promotion_order(plan: StudyPlan, original: Runner = OF_ORIGINAL, **runners: Runner) -> list[str]:
    """Return the ids of promoted runners in order; the original, which can gain little, races too."""
    race = Race(plan)
    for id, runner in {ORIGINAL.id: original, **runners}.items():
        race.report(id, measurement(runner.items), Cost(runner.size, 1000, 10), runner.fidelity)
    promoted: list[str] = []
    while (id := race.next_promotion(promoted)) is not None:
        promoted.append(id)
    return promoted


def test_a_certainly_worse_candidate_of_equal_size_is_not_promoted_even_if_items_vary() -> None:
    bad = [item + 0.1 + 0.01 * (-1) ** index for index, item in enumerate(HARD)]
    promoted = promotion_order(
        plan(), good=runner(HARD, 500), bad=runner(bad, 500), bad_but_small=runner(bad, 400)
    )
    assert set(promoted) == {"good", "bad_but_small"}


def test_a_candidate_whose_loss_may_be_higher_by_chance_is_promoted() -> None:
    noisy = [item + 0.1 + 0.8 * (-1) ** index for index, item in enumerate(HARD)]
    assert promotion_order(plan(), good=runner(HARD, 500), noisy=runner(noisy, 500)) == ["good", "noisy"]


def test_a_candidate_with_a_negligible_improvement_is_not_promoted() -> None:
    hardly = [item - 1e-4 for item in HARD]
    assert len(promotion_order(plan(), good=runner(HARD, 500), hardly=runner(hardly, 501))) == 1


def test_small_improvements_with_a_large_sum_are_promoted() -> None:
    similar = {}
    for index in range(12):
        items = [item - 0.0008 * index for item in HARD]
        similar[f"n{index}"] = runner(items, 500 + index)
    promoted = promotion_order(plan(), **similar)
    assert 1 < len(promoted) < 12


def test_a_candidate_measured_on_harder_items_is_not_assumed_to_be_worse() -> None:
    easy_later = [*HARD, *(item - 2 for item in HARD)]
    original = runner([item + 0.5 for item in easy_later * 8], 1000, 1.0)
    longer = runner(easy_later * 2, 500, 1 / 4)
    better = runner([item - 0.1 for item in HARD], 500)
    # Its mean is higher by 0.9, but it is better by 0.1. After its promotion the other runner adds nothing.
    assert promotion_order(plan(), original, longer=longer, better=better)[:1] == ["better"]


def test_few_items_eliminate_no_candidate() -> None:
    promoted = promotion_order(plan(), good=runner([1.0, 1.0, 1.0], 500), bad=runner([2.0, 2.0, 2.0], 500))
    assert promoted == ["good", "bad"]


def test_a_candidate_that_certainly_breaks_a_limit_is_not_promoted() -> None:
    assert promotion_order(plan(limit=0.5), small=runner(HARD, 500)) == []
    assert promotion_order(plan(limit=2.9), small=runner(HARD, 500)) == ["small"]


def test_a_useless_candidate_is_promoted_only_if_all_are_useless() -> None:
    useless = runner([item + 5 for item in HARD], 300)
    assert promotion_order(plan(), good=runner(HARD, 500), useless=useless) == ["good"]
    assert promotion_order(plan(), useless=useless) == ["useless"]


def test_the_lowest_rung_comes_first_with_its_largest_improvement() -> None:
    promoted = promotion_order(
        plan(), top=runner(HARD * 16, 500, 1.0), higher=runner(HARD * 4, 450, 1 / 4),
        second=runner([item - 0.1 for item in HARD], 380), first=runner(HARD, 300),
    )  # fmt: skip
    assert promoted == ["first", "second", "higher"]


def test_a_failed_candidate_leaves_the_race() -> None:
    race = Race(plan())
    for id, candidate in {ORIGINAL.id: OF_ORIGINAL, "small": runner(HARD, 500)}.items():
        race.report(id, measurement(candidate.items), Cost(candidate.size, 1000, 10), candidate.fidelity)
    assert race.next_promotion(()) == "small"
    race.remove("small")
    assert race.next_promotion(()) is None


def test_a_candidate_cannot_race_before_the_original_is_reported() -> None:
    with pytest.raises(LookupError, match="before the original"):
        Race(plan()).report("small", measurement(HARD), Cost(500, 1000, 10), 1 / 16)


# Races within a study


def recipes(count: int) -> list[Recipe]:
    return [ORIGINAL.then(PRUNE(ratio=round(0.001 * (1 + number), 3))) for number in range(count)]


class Evaluations:
    """Evaluations of models with similar sizes and losses on windows of very different losses."""

    def __init__(self, count: int, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.sizes = {recipe.id: int(generator.integers(300, 900)) for recipe in recipes(count)}
        mean_losses = {id: 3 + 400 / size + generator.exponential(0.15) for id, size in self.sizes.items()}
        windows = generator.normal(size=WINDOWS)
        self.items = {
            id: loss + windows + 0.1 * generator.normal(size=WINDOWS) for id, loss in mean_losses.items()
        }
        self.items[ORIGINAL.id] = 3.2 + windows
        self.read = 0.0

    def __call__(self, run: Run) -> Success:
        items = self.items[run.job.recipe.id][: math.ceil(run.job.fidelity * WINDOWS)]
        self.read += run.job.fidelity - run.job.after
        return Success("artifact", 1, measurement(items.tolist()), 1.0)


def runs(commands: Sequence[Command]) -> list[Run]:
    return [command for command in commands if isinstance(command, Run)]


def run_race(
    count: int, rungs: Sequence[float], seed: int = 0, slots: int = 2, events: list[Event] | None = None
) -> tuple[Study, Evaluations]:
    """Run a study of `count` candidates on `slots` slots to its end and append its events to `events`."""
    evaluations = Evaluations(count, seed)
    study = Study(plan(count, rungs))
    queue: list[Run] = []

    def send(event: Event) -> None:
        if events is not None:
            events.append(event)
        for command in study.handle(event):
            if isinstance(command, Run):
                send(AttemptStarted(command.job.id, command.attempt))
                queue.append(command)

    send(ServiceStarted(slots))
    waiting = recipes(count)
    while queue or waiting:
        while waiting and study.wants(slots):
            recipe = waiting.pop()
            cost = Cost(evaluations.sizes[recipe.id], 1000, 10)
            send(CandidateProposed(recipe, {"ratio": recipe.id}, cost))
        run = queue.pop(0)
        send(AttemptEnded(run.job.id, run.attempt, evaluations(run)))
    assert study.stage == "done"
    return study, evaluations


def front(study: Study) -> Mapping[str, Mapping[str, float]]:
    results = judge("race", study.plan.objectives, study.original, list(study.candidates.values()))
    return results.front.members


@pytest.mark.parametrize("seed", range(4))
def test_a_race_finds_the_front_with_a_fraction_of_the_evaluation(seed: int) -> None:
    full_study, full_evaluations = run_race(80, (1.0,), seed)
    raced_study, partial_evaluations = run_race(80, RUNGS, seed)
    reference = {"size_bytes": 1000.0, "loss": 6.0}
    full_hypervolume = ParetoFront(full_study.plan.objectives, dict(front(full_study))).hypervolume(reference)
    raced_hypervolume = ParetoFront(raced_study.plan.objectives, dict(front(raced_study))).hypervolume(
        reference
    )
    assert raced_hypervolume > 0.995 * full_hypervolume
    fully_evaluated = sum(candidate.fidelity == 1 for candidate in raced_study.candidates.values())
    assert fully_evaluated <= 1.3 * len(front(raced_study)) + 2
    assert partial_evaluations.read < 0.35 * full_evaluations.read


def test_front_members_have_a_full_evaluation_and_eliminated_candidates_a_partial_one() -> None:
    study, _ = run_race(40, RUNGS)
    results = judge("race", study.plan.objectives, study.original, list(study.candidates.values()))
    assert all(study.candidates[id].fidelity == 1 for id in results.members)
    eliminated = [id for id, standing in results.standings.items() if standing == "eliminated"]
    assert len(eliminated) > 10
    assert all(study.candidates[id].fidelity < 1 for id in eliminated)
    assert all(metrics(study.candidates[id])["loss"] for id in eliminated)


def test_a_race_fills_the_slots_and_no_more() -> None:
    study = Study(plan(candidates=12))
    evaluations = Evaluations(12)
    (original,) = runs(study.handle(ServiceStarted(3)))
    study.handle(AttemptEnded(original.job.id, 1, evaluations(original)))
    started = []
    for recipe in recipes(12):
        size = evaluations.sizes[recipe.id]
        started += study.handle(CandidateProposed(recipe, {"ratio": recipe.id}, Cost(size, 1000, 10)))
    for run in runs(started):
        assert run.job.fidelity == 1 / 16
        study.handle(AttemptEnded(run.job.id, run.attempt, evaluations(run)))
        assert study.running <= 12
    assert study.stage == "racing"
    assert study.running == 4  # one job is queued, so that no slot becomes idle


def test_no_candidate_runs_before_the_original_is_measured() -> None:
    study = Study(plan(candidates=1))
    (original,) = runs(study.handle(ServiceStarted(2)))
    study.handle(AttemptStarted(original.job.id, original.attempt))
    assert study.handle(CandidateProposed(recipes(1)[0], {"ratio": 1}, Cost(500, 9, 9))) == []


def test_a_killed_race_resumes_where_it_stopped() -> None:
    def replay(events: list[object]) -> Study:
        study = Study(plan(candidates=3))
        for event in events:
            study.handle(event)  # type: ignore[arg-type]
        return study

    evaluations = Evaluations(3)
    events: list[object] = [ServiceStarted(1)]
    study = replay(events)
    queue = runs(Study(plan(candidates=3)).handle(ServiceStarted(1)))
    proposals = [
        CandidateProposed(recipe, {"ratio": recipe.id}, Cost(500 - index, 1000, 10))
        for index, recipe in enumerate(recipes(3))
    ]
    while study.stage == "searching":
        run = queue.pop(0)
        event = AttemptEnded(run.job.id, run.attempt, evaluations(run))
        events.append(event)
        queue += runs(study.handle(event))
        while proposals and study.wants(1):
            events.append(proposals.pop())
            queue += runs(study.handle(events[-1]))  # type: ignore[arg-type]
    resumed = replay(events)
    restarted = runs(resumed.handle(ServiceStarted(1)))
    assert {(run.job.id, run.attempt) for run in restarted} == {
        (run.job.id, run.attempt + 1) for run in queue
    }
    assert {(run.job.fidelity, run.job.after) for run in restarted} == {(1 / 4, 1 / 16)}


def test_a_race_resumes_from_events_that_other_decisions_produced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[Event] = []
    with monkeypatch.context() as earlier:
        earlier.setattr("orchestrator.study.racing.MIN_IMPROVEMENT", 1e-5)
        run_race(40, RUNGS, events=events)
    study, evaluations = Study(plan(40)), Evaluations(40)
    for event in events:
        study.handle(event)
    queue = runs(study.handle(ServiceStarted(2)))
    while queue:
        run = queue.pop(0)
        queue += runs(study.handle(AttemptEnded(run.job.id, run.attempt, evaluations(run))))
    assert study.stage == "done"
    assert all(study.candidates[id].fidelity == 1 for id in front(study))
    full_study, _ = run_race(40, (1.0,))
    reference = {"size_bytes": 1000.0, "loss": 6.0}
    full_hypervolume = ParetoFront(full_study.plan.objectives, dict(front(full_study))).hypervolume(reference)
    raced_hypervolume = ParetoFront(study.plan.objectives, dict(front(study))).hypervolume(reference)
    assert raced_hypervolume > 0.99 * full_hypervolume
    measured = [candidate for candidate in study.candidates.values() if candidate.measurement is not None]
    assert len(measured) == 41


def test_a_failure_while_racing_fails_the_candidate() -> None:
    study = Study(plan(candidates=1))
    evaluations = Evaluations(1)
    (original,) = runs(study.handle(ServiceStarted(1)))
    study.handle(AttemptEnded(original.job.id, 1, evaluations(original)))
    (first,) = runs(study.handle(CandidateProposed(recipes(1)[0], {}, Cost(500, 9, 9))))
    (second,) = runs(study.handle(AttemptEnded(first.job.id, 1, evaluations(first))))
    study.handle(AttemptEnded(second.job.id, second.attempt, Failure("invalid", "no")))
    assert study.candidates[recipes(1)[0].id].state == "failed"
    assert study.stage == "done"


def test_pairs_that_change_their_order_between_rungs_are_counted() -> None:
    study, _ = run_race(40, RUNGS)
    results = judge("race", study.plan.objectives, study.original, list(study.candidates.values()))
    flips = rank_flips(results)
    assert [(flip.metric, flip.low, flip.high) for flip in flips] == [
        ("loss", 1 / 16, 1 / 4),
        ("loss", 1 / 4, 1.0),
    ]
    assert all(0 <= flip.flipped <= flip.pairs for flip in flips)
    assert flips[0].pairs > flips[1].pairs > 0
