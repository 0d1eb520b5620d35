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
    Cost,
    Event,
    Run,
    ServiceStarted,
    StudyPlan,
)
from orchestrator.study.racing import Race
from orchestrator.study.results import judge as judged
from orchestrator.study.results import metrics, rank_flips
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
"""What is hard is hard for all models: items vary far more than models do."""


OF_ORIGINAL = runner([item + 0.5 for item in HARD * 16], 1000, 1.0)


def order(plan: StudyPlan, original: Runner = OF_ORIGINAL, **runners: Runner) -> list[str]:
    """Who of these and the original, which has little to win, is promoted, one after the other."""
    race = Race(plan)
    for id, one in {ORIGINAL.id: original, **runners}.items():
        race.report(id, measurement(one.items), Cost(one.size, 1000, 10), one.fidelity)
    found: list[str] = []
    while (id := race.next_promotion(found)) is not None:
        found.append(id)
    return found


def test_who_is_surely_worse_and_no_smaller_is_not_promoted_though_items_vary() -> None:
    bad = [item + 0.1 + 0.01 * (-1) ** at for at, item in enumerate(HARD)]
    found = order(plan(), good=runner(HARD, 500), bad=runner(bad, 500), bad_but_small=runner(bad, 400))
    assert set(found) == {"good", "bad_but_small"}


def test_who_may_be_better_by_chance_is_promoted() -> None:
    noisy = [item + 0.1 + 0.8 * (-1) ** at for at, item in enumerate(HARD)]
    assert order(plan(), good=runner(HARD, 500), noisy=runner(noisy, 500)) == ["good", "noisy"]


def test_who_can_add_next_to_nothing_is_not_promoted() -> None:
    hardly = [item - 1e-4 for item in HARD]
    assert len(order(plan(), good=runner(HARD, 500), hardly=runner(hardly, 501))) == 1


def test_small_gains_that_are_much_together_are_promoted() -> None:
    small = {f"n{at}": runner([item - 0.0008 * at for item in HARD], 500 + at) for at in range(12)}
    found = order(plan(), **small)
    assert 1 < len(found) < 12


def test_who_was_measured_on_a_harder_part_is_not_taken_to_be_worse() -> None:
    easy_later = [*HARD, *(item - 2 for item in HARD)]
    original = runner([item + 0.5 for item in easy_later * 8], 1000, 1.0)
    longer = runner(easy_later * 2, 500, 1 / 4)
    better = runner([item - 0.1 for item in HARD], 500)
    # Its mean is higher by 0.9 and it is better by 0.1, after which the other has nothing to add.
    assert order(plan(), original, longer=longer, better=better)[:1] == ["better"]


def test_few_items_send_nobody_home() -> None:
    found = order(plan(), good=runner([1.0, 1.0, 1.0], 500), bad=runner([2.0, 2.0, 2.0], 500))
    assert found == ["good", "bad"]


def test_who_surely_breaks_a_limit_is_not_promoted() -> None:
    assert order(plan(limit=0.5), one=runner(HARD, 500)) == []
    assert order(plan(limit=2.9), one=runner(HARD, 500)) == ["one"]


def test_who_is_useless_is_promoted_only_where_all_are() -> None:
    useless = runner([item + 5 for item in HARD], 300)
    assert order(plan(), good=runner(HARD, 500), useless=useless) == ["good"]
    assert order(plan(), useless=useless) == ["useless"]


def test_the_lowest_rung_comes_first_and_of_it_who_adds_most() -> None:
    found = order(
        plan(), top=runner(HARD * 16, 500, 1.0), higher=runner(HARD * 4, 450, 1 / 4),
        second=runner([item - 0.1 for item in HARD], 380), first=runner(HARD, 300),
    )  # fmt: skip
    assert found == ["first", "second", "higher"]


def test_who_failed_is_out_of_the_race() -> None:
    race = Race(plan())
    for id, one in {ORIGINAL.id: OF_ORIGINAL, "one": runner(HARD, 500)}.items():
        race.report(id, measurement(one.items), Cost(one.size, 1000, 10), one.fidelity)
    assert race.next_promotion(()) == "one"
    race.remove("one")
    assert race.next_promotion(()) is None


def test_nobody_races_who_cannot_be_compared() -> None:
    with pytest.raises(LookupError, match="before the original"):
        Race(plan()).report("one", measurement(HARD), Cost(500, 1000, 10), 1 / 16)


# The study


def recipes(count: int) -> list[Recipe]:
    return [ORIGINAL.then(PRUNE(ratio=round(0.001 * (1 + number), 3))) for number in range(count)]


class Evaluations:
    """Models of sizes and losses that differ by little, on windows that differ by much."""

    def __init__(self, count: int, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.sizes = {one.id: int(generator.integers(300, 900)) for one in recipes(count)}
        worth = {id: 3 + 400 / size + generator.exponential(0.15) for id, size in self.sizes.items()}
        windows = generator.normal(size=WINDOWS)
        self.items = {id: loss + windows + 0.1 * generator.normal(size=WINDOWS) for id, loss in worth.items()}
        self.items[ORIGINAL.id] = 3.2 + windows
        self.read = 0.0

    def __call__(self, run: Run) -> Success:
        items = self.items[run.job.recipe.id][: math.ceil(run.job.fidelity * WINDOWS)]
        self.read += run.job.fidelity - run.job.after
        return Success("artifact", 1, measurement(items.tolist()), 1.0)


def raced(
    count: int, rungs: Sequence[float], seed: int = 0, slots: int = 2, events: list[Event] | None = None
) -> tuple[Study, Evaluations]:
    """A study of so many candidates, run through by a machine of so many slots. Its events are added to `events`."""
    evaluations = Evaluations(count, seed)
    study = Study(plan(count, rungs))
    queue: list[Run] = []

    def take(event: Event) -> None:
        if events is not None:
            events.append(event)
        for command in study.handle(event):
            if isinstance(command, Run):
                take(AttemptStarted(command.job.id, command.attempt))
                queue.append(command)

    take(ServiceStarted(slots))
    waiting = recipes(count)
    while queue or waiting:
        while waiting and study.wants(slots):
            recipe = waiting.pop()
            cost = Cost(evaluations.sizes[recipe.id], 1000, 10)
            take(CandidateProposed(recipe, {"ratio": recipe.id}, cost))
        run = queue.pop(0)
        take(AttemptEnded(run.job.id, run.attempt, evaluations(run)))
    assert study.stage == "done"
    return study, evaluations


def front(study: Study) -> Mapping[str, Mapping[str, float]]:
    found = judged("race", study.plan.objectives, study.original, list(study.candidates.values()))
    return found.front.members


@pytest.mark.parametrize("seed", range(4))
def test_a_race_finds_the_front_with_a_fraction_of_the_reading(seed: int) -> None:
    whole, all_of_it = raced(80, (1.0,), seed)
    race, some = raced(80, RUNGS, seed)
    reference = {"size_bytes": 1000.0, "loss": 6.0}
    full = ParetoFront(whole.plan.objectives, dict(front(whole))).hypervolume(reference)
    found = ParetoFront(race.plan.objectives, dict(front(race))).hypervolume(reference)
    assert found > 0.995 * full
    whole_readings = sum(one.fidelity == 1 for one in race.candidates.values())
    assert whole_readings <= 1.3 * len(front(race)) + 2
    assert some.read < 0.35 * all_of_it.read


def test_what_is_on_the_front_was_measured_on_all_and_the_others_say_that_they_were_not() -> None:
    study, _ = raced(40, RUNGS)
    results = judged("race", study.plan.objectives, study.original, list(study.candidates.values()))
    assert all(study.candidates[id].fidelity == 1 for id in results.members)
    outrun = [id for id, standing in results.standings.items() if standing == "eliminated"]
    assert len(outrun) > 10
    assert all(study.candidates[id].fidelity < 1 for id in outrun)
    assert all(metrics(study.candidates[id])["loss"] for id in outrun)


def test_a_race_fills_the_slots_and_no_more() -> None:
    study = Study(plan(candidates=12))
    evaluations = Evaluations(12)
    (original,) = (c for c in study.handle(ServiceStarted(3)) if isinstance(c, Run))
    study.handle(AttemptEnded(original.job.id, 1, evaluations(original)))
    started = []
    for recipe in recipes(12):
        size = evaluations.sizes[recipe.id]
        started += study.handle(CandidateProposed(recipe, {"ratio": recipe.id}, Cost(size, 1000, 10)))
    for run in [command for command in started if isinstance(command, Run)]:
        assert run.job.fidelity == 1 / 16
        study.handle(AttemptEnded(run.job.id, run.attempt, evaluations(run)))
        assert study.running <= 12
    assert study.stage == "racing"
    assert study.running == 4  # one waits, so that no slot does


def test_nobody_races_before_the_original_is_measured() -> None:
    study = Study(plan(candidates=1))
    (original,) = (c for c in study.handle(ServiceStarted(2)) if isinstance(c, Run))
    study.handle(AttemptStarted(original.job.id, original.attempt))
    assert study.handle(CandidateProposed(recipes(1)[0], {"ratio": 1}, Cost(500, 9, 9))) == []


def test_a_race_goes_on_where_it_was_killed() -> None:
    def again(events: list[object]) -> Study:
        study = Study(plan(candidates=3))
        for event in events:
            study.handle(event)  # type: ignore[arg-type]
        return study

    evaluations = Evaluations(3)
    events: list[object] = [ServiceStarted(1)]
    study = again(events)
    runs = [c for c in Study(plan(candidates=3)).handle(ServiceStarted(1)) if isinstance(c, Run)]
    proposals = [
        CandidateProposed(one, {"ratio": one.id}, Cost(500 - at, 1000, 10))
        for at, one in enumerate(recipes(3))
    ]
    while study.stage == "searching":
        run = runs.pop(0)
        event = AttemptEnded(run.job.id, run.attempt, evaluations(run))
        events.append(event)
        runs += [c for c in study.handle(event) if isinstance(c, Run)]
        while proposals and study.wants(1):
            events.append(proposals.pop())
            runs += [c for c in study.handle(events[-1]) if isinstance(c, Run)]  # type: ignore[arg-type]
    resumed = again(events)
    restarted = [c for c in resumed.handle(ServiceStarted(1)) if isinstance(c, Run)]
    assert {(run.job.id, run.attempt) for run in restarted} == {(run.job.id, run.attempt + 1) for run in runs}
    assert {(run.job.fidelity, run.job.after) for run in restarted} == {(1 / 4, 1 / 16)}


def test_events_of_a_race_that_was_decided_otherwise_are_taken_as_far_as_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[Event] = []
    with monkeypatch.context() as earlier:
        earlier.setattr("orchestrator.study.racing.MIN_IMPROVEMENT", 1e-5)
        raced(40, RUNGS, events=events)
    study, again = Study(plan(40)), Evaluations(40)
    for event in events:
        study.handle(event)
    queue = [command for command in study.handle(ServiceStarted(2)) if isinstance(command, Run)]
    while queue:
        run = queue.pop(0)
        queue += [
            one
            for one in study.handle(AttemptEnded(run.job.id, run.attempt, again(run)))
            if isinstance(one, Run)
        ]
    assert study.stage == "done"
    assert all(study.candidates[id].fidelity == 1 for id in front(study))
    whole, _ = raced(40, (1.0,))
    reference = {"size_bytes": 1000.0, "loss": 6.0}
    full = ParetoFront(whole.plan.objectives, dict(front(whole))).hypervolume(reference)
    found = ParetoFront(study.plan.objectives, dict(front(study))).hypervolume(reference)
    assert found > 0.99 * full
    measured = [one for one in study.candidates.values() if one.measurement is not None]
    assert len(measured) == 41


def test_a_failure_while_racing_fails_the_candidate() -> None:
    study = Study(plan(candidates=1))
    evaluations = Evaluations(1)
    (original,) = (c for c in study.handle(ServiceStarted(1)) if isinstance(c, Run))
    study.handle(AttemptEnded(original.job.id, 1, evaluations(original)))
    (first,) = (
        c for c in study.handle(CandidateProposed(recipes(1)[0], {}, Cost(500, 9, 9))) if isinstance(c, Run)
    )
    (second,) = (
        c for c in study.handle(AttemptEnded(first.job.id, 1, evaluations(first))) if isinstance(c, Run)
    )
    study.handle(AttemptEnded(second.job.id, second.attempt, Failure("invalid", "no")))
    assert study.candidates[recipes(1)[0].id].state == "failed"
    assert study.stage == "done"


def test_pairs_that_change_their_order_between_rungs_are_counted() -> None:
    study, _ = raced(40, RUNGS)
    results = judged("race", study.plan.objectives, study.original, list(study.candidates.values()))
    flips = rank_flips(results)
    assert [(one.metric, one.low, one.high) for one in flips] == [
        ("loss", 1 / 16, 1 / 4),
        ("loss", 1 / 4, 1.0),
    ]
    assert all(0 <= one.flipped <= one.pairs for one in flips)
    assert flips[0].pairs > flips[1].pairs > 0
