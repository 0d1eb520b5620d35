"""The Study by events alone: late, repeated, out of order."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import techniques
from jobs.job import Failure, Job, Success
from jobs.measurement.measurement import Measurement
from jobs.recipe import Origin, Recipe
from orchestrator.pareto.front import Objective
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
    SearchExhausted,
    ServiceStarted,
    SlotsChanged,
    StudyPlan,
    Tell,
)
from orchestrator.study.results import Standings, judge
from orchestrator.study.savings import Savings
from orchestrator.study.study import Study

ORIGIN = Origin("model", "data", 0)
ORIGINAL = Recipe(ORIGIN)
DROP = techniques.load("drop_layers")
RTN = techniques.load("rtn")
PRUNE = techniques.load("prune_ffn")
DISTILL = techniques.load("distill")


def plan(
    candidates: int = 2, timers: bool = False, limit: float | None = None, predicted: float | None = None
) -> StudyPlan:
    objectives = [Objective("size_bytes", "min", limit), Objective("accuracy", "max")]
    if timers:
        objectives.append(Objective("decode_ms", "min"))
    return StudyPlan(
        original=ORIGINAL,
        original_cost=Cost(100, 1000, 10, {} if predicted is None else {"decode_ms": predicted}),
        objectives=tuple(objectives),
        candidates=candidates,
        meters=("text",),
        timers=("latency",) if timers else (),
        timed=frozenset({"decode_ms"} if timers else ()),
        materials_digest="m",
        prediction_errors={"decode_ms": 0.1},
    )


def proposal(recipe: Recipe, size: int = 50, macs: int = 500, **predicted: float) -> CandidateProposed:
    return CandidateProposed(recipe, {"choice": recipe.id}, Cost(size, macs, 10, predicted))


def measured(accuracy: float, size: float = 50, **more: float) -> Success:
    return Success("artifact", 1, Measurement({"size_bytes": size, "accuracy": accuracy, **more}), 1.0)


def timed(ms: float, error: float = 0.5) -> Success:
    return Success("artifact", 1, Measurement({"decode_ms": ms}, {"decode_ms": error}), 0.0)


def timed_after(study: Study, run: Run, took: dict[Recipe, float] | None = None) -> list[Recipe]:
    """The recipes that are timed from `run` on, one after the other; each takes so many milliseconds, or 5."""
    order = []
    while True:
        order.append(run.job.recipe)
        left = runs(end(study, run, timed(5.0 if took is None else took[run.job.recipe])))
        if not left:
            return order
        (run,) = left


def runs(commands: list[Command]) -> list[Run]:
    return [command for command in commands if isinstance(command, Run)]


def only_run(commands: list[Command]) -> Run:
    (run,) = runs(commands)
    return run


def end(study: Study, run: Run, outcome: Success | Failure) -> list[Command]:
    return study.handle(AttemptEnded(run.job.id, run.attempt, outcome))


def begun(plan: StudyPlan, slots: int = 1) -> tuple[Study, Run]:
    """A study whose original is being measured."""
    study = Study(plan)
    return study, only_run(study.handle(ServiceStarted(slots)))


DROPPED = ORIGINAL.then(DROP(count=1))
QUANTIZED = DROPPED.then(RTN(bits=4))


def test_everything_waits_for_the_original() -> None:
    study, original = begun(plan())
    assert runs(study.handle(proposal(DROPPED))) == []
    assert only_run(end(study, original, measured(0.5))).job.recipe == DROPPED


def test_a_shared_prefix_runs_once() -> None:
    study, original = begun(plan(candidates=2))
    end(study, original, measured(0.5))
    first = only_run(study.handle(proposal(DROPPED.then(RTN(bits=4)))))
    assert first.job == Job(DROPPED, (), "m")
    assert runs(study.handle(proposal(DROPPED.then(RTN(bits=8))))) == []
    children = runs(end(study, first, measured(0.0)))
    assert [run.job.recipe.steps[-1] for run in children] == [RTN(bits=4), RTN(bits=8)]
    assert study.reused == 1


def test_savings_are_what_shared_work_took_where_it_was_done() -> None:
    study, original = begun(plan(candidates=3))
    end(study, original, measured(0.5))
    (first,) = runs(study.handle(proposal(DROPPED.then(RTN(bits=4)))))
    study.handle(proposal(DROPPED.then(RTN(bits=8))))
    # Made in 2 s, and 3 s more without statistics that were there.
    made = dataclasses.replace(measured(0.0), seconds=2.0, saved_seconds=3.0)
    one, other = runs(end(study, first, made))
    end(study, one, measured(0.4))
    taken = dataclasses.replace(measured(0.3).measurement, seconds=4.0)
    end(study, other, Success("artifact", 1, taken, seconds=1.0, found=True))
    assert study.savings == Savings(
        steps=1, steps_seconds=5.0, statistics_seconds=3.0, jobs=1, jobs_seconds=5.0
    )
    assert study.savings.seconds == 13.0


def test_an_intermediate_model_that_becomes_a_candidate_is_measured_without_being_made_again() -> None:
    study, original = begun(plan(candidates=2))
    end(study, original, measured(0.5))
    prefix = only_run(study.handle(proposal(QUANTIZED)))
    assert runs(study.handle(proposal(DROPPED))) == []
    after = runs(end(study, prefix, measured(0.0)))
    assert [(run.job.recipe, run.job.meters) for run in after] == [
        (DROPPED, ("text",)),
        (QUANTIZED, ("text",)),
    ]


def test_a_repeated_result_is_counted_once() -> None:
    study, original = begun(plan())
    end(study, original, measured(0.5))
    run = only_run(study.handle(proposal(DROPPED)))
    assert end(study, run, measured(0.4)) != []
    assert end(study, run, measured(0.9)) == []
    assert study.candidates[DROPPED.id].measurement == measured(0.4).measurement


def test_a_late_writer_of_an_earlier_attempt_is_fenced_off() -> None:
    study, original = begun(plan())
    end(study, original, measured(0.5))
    first = only_run(study.handle(proposal(DROPPED)))
    second = only_run(end(study, first, Failure("preempted", "the node went away")))
    assert second.attempt == first.attempt + 1
    assert end(study, first, measured(0.9)) == []
    end(study, second, measured(0.4))
    assert study.candidates[DROPPED.id].measurement == measured(0.4).measurement


def test_results_of_unknown_jobs_are_ignored() -> None:
    study, _ = begun(plan())
    assert study.handle(AttemptEnded("nobody", 1, measured(0.4))) == []
    assert study.handle(AttemptStarted("nobody", 1)) == []


@pytest.mark.parametrize(
    ("kind", "tries"), [("invalid", 1), ("diverged", 1), ("out_of_memory", 2), ("bug", 3), ("timeout", 3)]
)
def test_how_often_a_failure_is_tried_follows_its_kind(kind: str, tries: int) -> None:
    study, original = begun(plan())
    end(study, original, measured(0.5))
    run = only_run(study.handle(proposal(DROPPED)))
    tried = 1
    while runs(commands := end(study, run, Failure(kind, "why"))):  # type: ignore[arg-type]
        run = only_run(commands)
        tried += 1
        assert run.exclusive == (kind == "out_of_memory")
    assert tried == tries
    candidate = study.candidates[DROPPED.id]
    assert candidate.state == "failed"
    assert candidate.failure == Failure(kind, "why")  # type: ignore[arg-type]
    assert Tell({"choice": DROPPED.id}, candidate.failure) in commands


def test_a_preempted_attempt_is_never_counted_against_the_candidate() -> None:
    study, original = begun(plan())
    end(study, original, measured(0.5))
    run = only_run(study.handle(proposal(DROPPED)))
    for _ in range(20):
        run = only_run(end(study, run, Failure("preempted", "spot")))
    end(study, run, measured(0.4))
    assert study.candidates[DROPPED.id].state == "measured"


def test_what_was_to_be_made_from_a_failed_prefix_fails_with_it_and_the_study_goes_on() -> None:
    study, original = begun(plan(candidates=2))
    end(study, original, measured(0.5))
    prefix = only_run(study.handle(proposal(QUANTIZED)))
    end(study, prefix, Failure("invalid", "no such block"))
    failure = study.candidates[QUANTIZED.id].failure
    assert failure is not None
    assert "no such block" in failure.message
    late = DROPPED.then(RTN(bits=8))
    assert runs(study.handle(proposal(late))) == []
    assert study.candidates[late.id].state == "failed"
    assert study.stage == "done"


def test_a_candidate_over_a_size_limit_never_runs() -> None:
    study, original = begun(plan(limit=60))
    end(study, original, measured(0.5))
    commands = study.handle(proposal(DROPPED, size=61))
    assert runs(commands) == []
    assert study.candidates[DROPPED.id].state == "over_limit"
    assert [type(command) for command in commands] == [Record, Tell]
    assert study.proposed == 0
    assert runs(study.handle(proposal(QUANTIZED, size=60))) != []


def test_a_proposal_that_cannot_be_made_fails_without_running() -> None:
    study, _ = begun(plan())
    commands = study.handle(CandidateProposed(DROPPED, {"choice": 1}, None, "count is too large"))
    assert runs(commands) == []
    assert study.candidates[DROPPED.id].failure == Failure("invalid", "count is too large")


def test_a_candidate_proposed_twice_is_told_again_and_counted_once() -> None:
    study, original = begun(plan())
    end(study, original, measured(0.5))
    end(study, only_run(study.handle(proposal(DROPPED))), measured(0.4))
    again = study.handle(CandidateProposed(DROPPED, {"other": "choices"}, Cost(50, 500, 10)))
    assert again == [Tell({"other": "choices"}, {"size_bytes": 50, "accuracy": 0.4})]
    assert study.proposed == 1


def test_timings_come_at_the_end_and_only_for_what_may_be_on_the_front() -> None:
    study, original = begun(plan(candidates=2, timers=True))
    assert original.exclusive
    assert original.job.meters == ("text", "latency")
    end(study, original, measured(0.5, size=100, decode_ms=10.0))
    good, bad = ORIGINAL.then(RTN(bits=4)), ORIGINAL.then(RTN(bits=3))
    better = only_run(study.handle(proposal(good, size=50)))
    worse = only_run(study.handle(proposal(bad, size=60)))
    assert runs(end(study, worse, measured(0.3, size=60))) == []
    assert study.stage == "searching"
    again = only_run(end(study, better, measured(0.4, size=50)))
    assert again == Run(Job(ORIGINAL, ("latency",), "m"), 2, exclusive=True)
    assert study.stage == "timing"
    timing = only_run(end(study, again, timed(8.0)))
    assert timing == Run(Job(good, ("latency",), "m"), 2, exclusive=True)
    assert study.original.measurement is not None
    assert study.original.measurement.metrics["decode_ms"] == 8.0
    end(study, timing, timed(5.0))
    measurement = study.candidates[good.id].measurement
    assert measurement is not None
    assert measurement.metrics == {"size_bytes": 50, "accuracy": 0.4, "decode_ms": 5.0}
    assert study.stage == "done"


def test_a_dominated_candidate_that_computes_less_may_still_be_the_fastest() -> None:
    study, original = begun(plan(candidates=2, timers=True))
    end(study, original, measured(0.5, size=100, decode_ms=10.0))
    good, lean = ORIGINAL.then(RTN(bits=4)), ORIGINAL.then(PRUNE(ratio=0.5))
    first = only_run(study.handle(proposal(good, size=50, macs=1000)))
    second = only_run(study.handle(proposal(lean, size=60, macs=500)))
    end(study, first, measured(0.4, size=50))
    again = only_run(end(study, second, measured(0.3, size=60)))
    assert timed_after(study, again) == [ORIGINAL, good, lean]


@pytest.mark.parametrize(("size", "worth_it"), [(90, False), (56, True)])
def test_a_dominated_candidate_is_not_timed_if_those_that_were_say_that_it_is_slower(
    size: int, worth_it: bool
) -> None:
    """In a world where time follows the bytes, ten of them a millisecond, and timings err by a half."""
    study, original = begun(plan(candidates=6, timers=True))
    end(study, original, measured(0.5, size=100, decode_ms=10.0))
    best = [ORIGINAL.then(DROP(count=count)) for count in (1, 2, 3, 4, 5)]
    for place, one in enumerate(best):
        run = only_run(study.handle(proposal(one, size=50 + place, macs=1000)))
        end(study, run, measured(0.4 + place / 100, size=50 + place))
    lean = ORIGINAL.then(PRUNE(ratio=0.5))
    run = only_run(study.handle(proposal(lean, size=size, macs=990)))
    again = only_run(end(study, run, measured(0.3, size=size)))
    took = {ORIGINAL: 10.0, lean: size / 10} | {one: 5 + place / 10 for place, one in enumerate(best)}
    order = timed_after(study, again, took)
    assert order[:6] == [ORIGINAL, *best]
    assert order[6:] == ([lean] if worth_it else [])
    assert study.stage == "done"


def test_no_more_timings_wait_than_there_are_slots() -> None:
    study, original = begun(plan(candidates=3, timers=True), slots=2)
    end(study, original, measured(0.5, size=100, decode_ms=10.0))
    recipes = [ORIGINAL.then(RTN(bits=bits)) for bits in (2, 3, 4)]
    for size, one in enumerate(recipes):
        last = end(
            study,
            only_run(study.handle(proposal(one, size=50 + size))),
            measured(0.4 + size / 10, size=50 + size),
        )
    again, first = runs(last)
    assert [again.job.recipe, first.job.recipe] == [ORIGINAL, recipes[0]]
    assert study.timings_left == 4
    assert only_run(end(study, first, timed(5.0))).job.recipe == recipes[1]
    assert study.timings_left == 3
    assert only_run(study.handle(SlotsChanged(3))).job.recipe == recipes[2]


def test_a_timing_that_was_preempted_is_begun_again() -> None:
    study, original = begun(plan(candidates=1, timers=True))
    end(study, original, measured(0.5, size=100, decode_ms=10.0))
    run = only_run(study.handle(proposal(DROPPED)))
    again = only_run(end(study, run, measured(0.4)))
    once_more = only_run(end(study, again, Failure("preempted", "the node went away")))
    assert (once_more.job, once_more.attempt) == (again.job, again.attempt + 1)


def test_a_search_that_learns_is_told_estimates_of_what_is_timed_later() -> None:
    study, original = begun(plan(candidates=2, timers=True))
    end(study, original, measured(0.5, size=100, decode_ms=10.0))
    commands = end(study, only_run(study.handle(proposal(DROPPED, macs=500))), measured(0.4))
    (told,) = [command for command in commands if isinstance(command, Tell)]
    assert told.result == {"size_bytes": 50, "accuracy": 0.4, "decode_ms": 5.0}
    recorded = [command.candidate for command in commands if isinstance(command, Record)]
    assert recorded[0].measurement is not None
    assert "decode_ms" not in recorded[0].measurement.metrics


def test_predictions_take_the_place_of_multiply_adds_relative_to_what_the_original_takes() -> None:
    study, original = begun(plan(candidates=2, timers=True, predicted=20.0))
    end(study, original, measured(0.5, size=100, decode_ms=10.0))
    run = only_run(study.handle(proposal(DROPPED, macs=500, decode_ms=16.0)))
    (told,) = [command for command in end(study, run, measured(0.4)) if isinstance(command, Tell)]
    assert told.result == {"size_bytes": 50, "accuracy": 0.4, "decode_ms": 8.0}


def test_what_was_predicted_is_kept_beside_what_was_measured() -> None:
    study, original = begun(plan(candidates=1, timers=True, predicted=20.0))
    end(study, original, measured(0.5, size=100, decode_ms=10.0))
    run = only_run(study.handle(proposal(DROPPED, decode_ms=16.0)))
    again = only_run(end(study, run, measured(0.4)))
    assert study.candidates[DROPPED.id].predicted == {}
    end(study, only_run(end(study, again, timed(12.0))), timed(10.0))
    # The machine is slower than at first: the original takes 12 ms by now.
    assert study.candidates[DROPPED.id].predicted == {"decode_ms": pytest.approx(9.6)}
    assert study.original.predicted == {}


@pytest.mark.parametrize(("predicted", "timed"), [(15.0, False), (12.0, True)])
def test_a_dominated_candidate_is_not_timed_if_it_is_predicted_slower_by_more_than_predictions_err(
    predicted: float, timed: bool
) -> None:
    study, original = begun(plan(candidates=2, timers=True, predicted=20.0))
    end(study, original, measured(0.5, size=100, decode_ms=10.0))
    good, lean = ORIGINAL.then(RTN(bits=4)), ORIGINAL.then(PRUNE(ratio=0.5))
    first = only_run(study.handle(proposal(good, size=50, macs=1000, decode_ms=10.0)))
    second = only_run(study.handle(proposal(lean, size=60, macs=500, decode_ms=predicted)))
    end(study, first, measured(0.4, size=50))
    again = only_run(end(study, second, measured(0.3, size=60)))
    assert (lean in timed_after(study, again)) is timed


def test_a_study_that_proposals_run_out_of_ends() -> None:
    study, original = begun(plan(candidates=10))
    end(study, original, measured(0.5))
    run = only_run(study.handle(proposal(DROPPED)))
    study.handle(SearchExhausted("every choice was proposed"))
    assert not study.wants(slots=2)
    end(study, run, measured(0.4))
    assert study.stage == "done"


SPENT = BudgetAllowance("none", "the budget of 2 hours is spent")
KEPT = BudgetAllowance("finish_pending", "the budget of 2 hours is spent, but for 5 minutes")


def taking(seconds: float, accuracy: float = 0.4) -> Success:
    """Measured, which took so long."""
    measurement = dataclasses.replace(measured(accuracy).measurement, seconds=seconds)
    return Success("artifact", 1, measurement, seconds=0.0)


def test_when_the_budget_ends_no_more_is_proposed_and_what_may_be_on_the_front_is_timed() -> None:
    study, original = begun(plan(candidates=5, timers=True))
    end(study, original, measured(0.5, decode_ms=10.0))
    running = only_run(study.handle(proposal(QUANTIZED)))
    assert study.wants(2)
    assert study.handle(KEPT) == []
    assert not study.wants(2)
    making = only_run(end(study, running, measured(0.0)))
    timing = only_run(end(study, making, measured(0.4)))
    assert timed_after(study, timing) == [ORIGINAL, QUANTIZED]
    assert (study.stage, study.exhausted, study.untimed) == ("done", KEPT.reason, 0)


def test_a_budget_that_ends_while_nothing_runs_leads_on_to_the_timings() -> None:
    study, original = begun(plan(candidates=5, timers=True))
    end(study, original, measured(0.5, decode_ms=10.0))
    assert only_run(study.handle(KEPT)).job.meters == ("latency",)


def test_when_the_budget_is_spent_nothing_begins_and_what_runs_ends() -> None:
    study, original = begun(plan(candidates=5, timers=True))
    end(study, original, measured(0.5, decode_ms=10.0))
    running = only_run(study.handle(proposal(QUANTIZED)))
    study.handle(SPENT)
    assert study.stage != "done"
    assert runs(end(study, running, measured(0.0))) == []
    assert (study.stage, study.exhausted) == ("done", SPENT.reason)
    assert (study.waiting, study.untimed) == (1, 1)


def test_a_preempted_attempt_does_not_begin_again_when_the_budget_is_spent() -> None:
    study, original = begun(plan(candidates=5))
    end(study, original, measured(0.5))
    running = only_run(study.handle(proposal(DROPPED)))
    study.handle(SPENT)
    assert runs(end(study, running, Failure("preempted", "the node went away"))) == []
    assert study.stage == "done"


def test_timings_that_did_not_fit_are_left_out() -> None:
    study, original = begun(plan(candidates=1, timers=True))
    end(study, original, measured(0.5, decode_ms=10.0))
    timing = only_run(end(study, only_run(study.handle(proposal(DROPPED))), measured(0.4)))
    study.handle(SPENT)
    assert runs(end(study, timing, timed(10.0))) == []
    assert (study.stage, study.untimed) == ("done", 1)


def test_a_study_that_is_taken_up_with_more_budget_goes_on() -> None:
    study, original = begun(plan(candidates=5, timers=True))
    end(study, original, measured(0.5, decode_ms=10.0))
    running = only_run(study.handle(proposal(QUANTIZED)))
    study.handle(SPENT)
    end(study, running, measured(0.0))
    assert only_run(study.handle(ServiceStarted(1, BudgetAllowance()))).job.recipe == QUANTIZED
    assert study.exhausted is None
    assert study.wants(2)
    assert (study.stage, study.untimed) == ("searching", 0)


@pytest.mark.parametrize("granted", [SPENT, KEPT])
def test_a_study_that_is_taken_up_with_no_more_budget_does_not_begin_candidates(
    granted: BudgetAllowance,
) -> None:
    study, original = begun(plan(candidates=5))
    end(study, original, measured(0.5))
    study.handle(proposal(QUANTIZED))
    study.handle(granted)
    found = runs(study.handle(ServiceStarted(1, granted)))
    assert [run.job.recipe for run in found] == ([] if granted is SPENT else [DROPPED])
    assert (study.stage == "done") == (granted is SPENT)
    assert not study.wants(2)


def test_a_study_with_all_its_candidates_did_not_end_early() -> None:
    study, original = begun(plan(candidates=1))
    end(study, original, measured(0.5))
    running = only_run(study.handle(proposal(DROPPED)))
    study.handle(KEPT)
    end(study, running, measured(0.4))
    assert (study.stage, study.exhausted) == ("done", None)


def test_what_is_left_to_finish_is_what_runs_and_the_timing_of_who_may_be_on_the_front() -> None:
    study, original = begun(plan(candidates=5, timers=True))
    assert study.seconds_to_finish == 0
    both = dataclasses.replace(measured(0.5, decode_ms=10.0).measurement, seconds=50.0)
    end(study, original, Success("artifact", 1, both, seconds=0.0))
    # Nobody was measured without being timed yet: what timing takes is taken to be what it can be at least.
    assert study.seconds_to_finish == pytest.approx(11.0)
    first = only_run(study.handle(proposal(DROPPED)))
    end(study, first, taking(20.0))
    # The original took 50 s with its timing, which is more than measuring by 30 s. Both may be on the front.
    assert study.seconds_to_finish == pytest.approx(2 * 30.0)
    # A technique that was not tried yet is taken to need what is typical: here, as long as measuring.
    study.handle(proposal(ORIGINAL.then(RTN(bits=4))))
    assert study.seconds_to_finish == pytest.approx(2 * 30.0 + 20.0 + 20.0)


def test_who_was_read_in_part_is_still_to_be_read_to_the_end() -> None:
    whole = dataclasses.replace(plan(candidates=5), rungs=(0.25, 1.0))
    study, original = begun(whole, slots=2)
    end(study, original, taking(40.0, 0.5))
    assert study.seconds_to_finish == 0
    end(study, only_run(study.handle(proposal(DROPPED))), taking(8.0))
    assert study.seconds_to_finish == pytest.approx(8.0 / 0.25 / 2)


def test_a_failed_original_ends_the_study() -> None:
    study, original = begun(plan())
    study.handle(proposal(DROPPED))
    end(study, original, Failure("invalid", "no such model"))
    assert not study.wants(slots=2)
    assert study.stage == "done"
    assert study.candidates[DROPPED.id].state == "failed"


def test_proposals_are_wanted_while_a_slot_could_run_dry_and_not_all_at_once() -> None:
    study, original = begun(plan(candidates=100))
    assert not study.wants(slots=2)  # before the original there is nothing to make anything from
    end(study, original, measured(0.5))
    asked = 0
    while study.wants(slots=2):
        asked += 1
        study.handle(proposal(ORIGINAL.then(PRUNE(ratio=asked / 200))))
    assert 2 < asked < 10


def test_replaying_the_events_rebuilds_the_study_after_any_number_of_kills() -> None:
    events = []
    study = Study(plan(candidates=3, timers=True))

    def take(event: object) -> list[Command]:
        events.append(event)
        return study.handle(event)  # type: ignore[arg-type]

    original = only_run(take(ServiceStarted()))
    take(AttemptEnded(original.job.id, original.attempt, measured(0.5, size=100, decode_ms=10.0)))
    prefix = only_run(take(proposal(QUANTIZED)))
    take(AttemptStarted(prefix.job.id, prefix.attempt))
    take(proposal(DROPPED))
    # A kill here; what was an intermediate model is a candidate now, and its job has another id.
    resumed = runs(take(ServiceStarted()))
    assert [run.job.meters for run in resumed] == [("text",)]
    take(AttemptEnded(prefix.job.id, prefix.attempt, measured(0.0)))  # late, from the killed process's worker
    assert study.candidates[DROPPED.id].measurement is None
    after = take(AttemptEnded(resumed[0].job.id, resumed[0].attempt, measured(0.4)))
    take(AttemptEnded(only_run(after).job.id, only_run(after).attempt, measured(0.3, size=20)))
    copy = Study(study.plan)
    for event in events:
        copy.handle(event)
    assert copy.candidates == study.candidates
    assert (copy.running, copy.stage, copy.reused) == (study.running, study.stage, study.reused)
    assert copy.savings == study.savings
    assert copy.candidates[DROPPED.id].measurement == measured(0.4).measurement


OUTCOMES = st.sampled_from(["measured", "measured", "measured", "invalid", "bug", "preempted", "stopped"])


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(2, 4), OUTCOMES), max_size=30),
    st.booleans(),
    st.randoms(),
)
def test_what_is_kept_beside_the_candidates_is_what_all_of_them_add_up_to(
    steps: list[tuple[int, int, str]], timers: bool, order: random.Random
) -> None:
    study = Study(plan(candidates=100, timers=timers, limit=90))
    waiting = runs(study.handle(ServiceStarted()))
    standings = Standings("study", study.plan.objectives, study.original.id, study.candidates)

    def take(commands: list[Command]) -> None:
        waiting.extend(runs(commands))
        for command in commands:
            if isinstance(command, Cancel):
                waiting.remove(next(run for run in waiting if run.job == command.job))
            if isinstance(command, Record):
                standings.take(command.candidate.id)

    def end_one(kind: str, value: int) -> None:
        run = waiting.pop(order.randrange(len(waiting)))
        study.handle(AttemptStarted(run.job.id, run.attempt))
        done = measured(value / 10, size=40 + 10 * value, **({"decode_ms": float(value)} if timers else {}))
        take(end(study, run, done if kind == "measured" else Failure(kind, "why")))  # type: ignore[arg-type]

    def check() -> None:
        assert study.states + Counter() == Counter(c.state for c in study.candidates.values())
        everyone = list(study.candidates.values())
        assert standings.results() == judge("study", study.plan.objectives, study.original, everyone)

    for count, value, kind in steps:
        recipe = ORIGINAL.then(DROP(count=count)).then(RTN(bits={2: 2, 3: 4, 4: 8}[value]))
        take(study.handle(proposal(recipe, size=40 + 20 * value)))
        if kind == "stopped":
            take(study.handle(CandidateStopped(order.choice(list(study.candidates)), "hopeless")))
        elif waiting:
            end_one(kind, value)
        check()
    take(study.handle(SearchExhausted("enough")))
    while waiting:
        end_one("measured", order.randint(1, 9))
        check()


def test_no_more_is_proposed_than_can_wait_however_long_nothing_ends() -> None:
    study, original = begun(plan(candidates=10_000))
    end(study, original, measured(0.5))
    for slots in (2, 50):
        while study.wants(slots):
            # One prefix that all wait for: only the first of them has a job.
            study.handle(proposal(DROPPED.then(PRUNE(ratio=study.proposed / 20_000))))
        assert study.proposed == 4 * slots


def test_a_late_start_does_not_bring_a_failed_candidate_back() -> None:
    study, original = begun(plan())
    end(study, original, measured(0.5))
    run = only_run(study.handle(proposal(DROPPED)))
    end(study, run, Failure("invalid", "no"))
    assert study.handle(AttemptStarted(run.job.id, run.attempt)) == []
    assert study.candidates[DROPPED.id].state == "failed"


def failing(study: Study, failure: Failure) -> int:
    """How many candidates are tried of which each fails."""
    tried = 0
    while study.wants(1):
        tried += 1
        commands = study.handle(proposal(ORIGINAL.then(PRUNE(ratio=round(0.001 * tried, 3)))))
        while attempts := runs(commands):
            commands = end(study, attempts[0], failure)
    return tried


def test_a_search_of_which_all_candidates_fail_ends_with_the_reason() -> None:
    study, original = begun(plan(candidates=100))
    end(study, original, measured(0.5))
    assert failing(study, Failure("invalid", "no such layer")) == 20
    assert study.exhausted == "the first 20 candidates all failed"
    assert study.stage == "done"


def test_one_candidate_that_came_out_keeps_a_failing_search_going() -> None:
    study, original = begun(plan(candidates=30))
    end(study, original, measured(0.5))
    end(study, only_run(study.handle(proposal(DROPPED))), measured(0.4))
    assert failing(study, Failure("invalid", "no such layer")) == 29


def test_a_search_that_a_full_disk_ended_goes_on_when_it_is_taken_up_again() -> None:
    study, original = begun(plan(candidates=100))
    end(study, original, measured(0.5))
    assert failing(study, Failure("disk_full", "no space")) == 20
    again = runs(study.handle(ServiceStarted()))
    assert len(again) == 20
    assert study.exhausted is None
    for run in again:
        end(study, run, measured(0.4))
    assert study.wants(1)


def test_a_longer_training_takes_longer() -> None:
    study, original = begun(plan(candidates=5))
    end(study, original, measured(0.5))
    made = only_run(study.handle(proposal(ORIGINAL.then(DISTILL(steps=16)))))
    end(study, made, Success("artifact", 1, Measurement({"accuracy": 0.4}, seconds=3.0), 8.0))
    assert study.seconds(ORIGINAL.then(DISTILL(steps=64))) == 3.0 + 32.0
    assert study.seconds(ORIGINAL.then(DISTILL(steps=4))) == 3.0 + 2.0


def test_what_shares_steps_takes_less_time() -> None:
    study, original = begun(plan(candidates=5))
    assert study.seconds(QUANTIZED) == 3  # two steps and measuring, while nothing tells how long they take
    end(study, original, measured(0.5))
    made = only_run(study.handle(proposal(DROPPED)))
    result = Success("artifact", 1, Measurement({"accuracy": 0.4}, seconds=3.0), 7.0)
    end(study, made, result)
    assert study.seconds(DROPPED) == 3.0
    assert study.seconds(QUANTIZED) == 3.0 + 7.0  # rtn is taken to be as long as all is on average
    assert study.seconds(ORIGINAL.then(DROP(count=2)).then(RTN(bits=4))) == 3.0 + 7.0 + 7.0


def cancels(commands: list[Command]) -> list[Cancel]:
    return [command for command in commands if isinstance(command, Cancel)]


def test_a_candidate_that_is_stopped_takes_along_what_is_made_for_it_alone() -> None:
    study, original = begun(plan(candidates=3))
    end(study, original, measured(0.5))
    prefix = only_run(study.handle(proposal(QUANTIZED)))
    other = only_run(study.handle(proposal(ORIGINAL.then(RTN(bits=4)))))
    assert study.running == 2
    commands = study.handle(CandidateStopped(QUANTIZED.id, "hopeless"))
    assert cancels(commands) == [Cancel(prefix.job, prefix.attempt)]
    stopped = study.candidates[QUANTIZED.id]
    assert (stopped.state, stopped.stopped) == ("stopped", "hopeless")
    assert commands[1:] == [Record(stopped), Tell({"choice": QUANTIZED.id}, None)]
    assert (study.running, study.proposed, study.reused) == (1, 2, 0)
    assert study.handle(CandidateStopped(QUANTIZED.id, "again")) == []
    assert end(study, prefix, measured(0.9)) == []  # it ended before it could be ended
    assert study.candidates[QUANTIZED.id] == stopped
    end(study, other, measured(0.4))
    assert study.wants(slots=1)


def test_what_others_need_goes_on_when_one_of_them_is_stopped() -> None:
    study, original = begun(plan(candidates=3))
    end(study, original, measured(0.5))
    prefix = only_run(study.handle(proposal(QUANTIZED)))
    sibling = DROPPED.then(RTN(bits=8))
    study.handle(proposal(sibling))
    assert study.reused == 1
    assert cancels(study.handle(CandidateStopped(QUANTIZED.id, "hopeless"))) == []
    assert (study.running, study.reused) == (1, 0)
    assert only_run(end(study, prefix, measured(0.0))).job.recipe == sibling


def test_a_candidate_that_others_are_made_from_is_not_stopped_nor_one_that_is_made_nor_the_original() -> None:
    study, original = begun(plan(candidates=3))
    assert study.handle(CandidateStopped(ORIGINAL.id, "hopeless")) == []
    end(study, original, measured(0.5))
    dropped = only_run(study.handle(proposal(DROPPED)))
    study.handle(proposal(QUANTIZED))
    assert study.handle(CandidateStopped(DROPPED.id, "hopeless")) == []
    (quantized,) = runs(end(study, dropped, measured(0.4)))
    assert study.handle(CandidateStopped(DROPPED.id, "hopeless")) == []
    assert study.candidates[DROPPED.id].state == "measured"
    study.handle(proposal(QUANTIZED.then(PRUNE(ratio=0.5))))
    again = end(study, quantized, Failure("bug", "once"))
    assert study.handle(CandidateStopped(QUANTIZED.id, "hopeless")) == []
    assert runs(again) != []
    assert study.handle(CandidateStopped("unheard of", "hopeless")) == []


def test_what_was_stopped_stays_so_in_a_new_process_and_when_it_is_proposed_again() -> None:
    study, original = begun(plan(candidates=3))
    end(study, original, measured(0.5))
    study.handle(proposal(QUANTIZED))
    study.handle(CandidateStopped(QUANTIZED.id, "hopeless"))
    assert runs(study.handle(ServiceStarted())) == []
    assert study.handle(CandidateProposed(QUANTIZED, {"other": 1}, Cost(50, 500, 10))) == [
        Tell({"other": 1}, None)
    ]
    assert study.candidates[QUANTIZED.id].state == "stopped"
    # Another that comes from what was stopped has it made, and nothing more is measured.
    deeper = QUANTIZED.then(PRUNE(ratio=0.5))
    prefix = only_run(study.handle(proposal(deeper)))
    assert (prefix.job.recipe, prefix.attempt) == (DROPPED, 2)
    through = only_run(end(study, prefix, measured(0.0)))
    assert through.job == Job(QUANTIZED, (), "m")
    last = only_run(end(study, through, measured(0.0)))
    assert last.job.recipe == deeper
    assert study.candidates[QUANTIZED.id].state == "stopped"


def test_only_who_saves_something_by_it_may_be_stopped() -> None:
    study, original = begun(plan(candidates=10))
    assert study.stoppable == []
    end(study, original, measured(0.5))
    long, short = ORIGINAL.then(PRUNE(ratio=0.5)), ORIGINAL.then(RTN(bits=3))
    for recipe, seconds in ((ORIGINAL.then(PRUNE(ratio=0.4)), 100.0), (ORIGINAL.then(RTN(bits=4)), 1.0)):
        run = only_run(study.handle(proposal(recipe)))
        end(study, run, Success("artifact", 1, Measurement({"accuracy": 0.4}, seconds=2.0), seconds))
    study.handle(proposal(long))
    study.handle(proposal(short))
    assert [one.recipe for one in study.stoppable] == [long]
    study.handle(proposal(QUANTIZED))
    study.handle(proposal(DROPPED.then(RTN(bits=8))))  # both wait for a prefix that both need
    waiting = {QUANTIZED.id, DROPPED.then(RTN(bits=8)).id}
    assert {one.id for one in study.stoppable} == {long.id, *waiting}
    study.handle(CandidateStopped(long.id, "hopeless"))
    assert {one.id for one in study.stoppable} == waiting


def test_others_take_the_place_of_what_was_stopped_up_to_a_quarter() -> None:
    study, original = begun(plan(candidates=8))
    end(study, original, measured(0.5))
    tried = 0
    while study.wants(slots=10):
        tried += 1
        one = ORIGINAL.then(PRUNE(ratio=tried / 100))
        run = only_run(study.handle(proposal(one)))
        if tried <= 4:
            study.handle(CandidateStopped(one.id, "hopeless"))
        else:
            end(study, run, measured(0.4))
    assert tried == study.allowed == 8 + 2
    assert study.states == {"stopped": 4, "measured": 1 + 6, "waiting": 0}


def test_what_was_stopped_is_not_taken_to_be_there_for_others() -> None:
    study, original = begun(plan(candidates=5))
    end(study, original, measured(0.5))
    before = study.seconds(QUANTIZED)
    study.handle(proposal(QUANTIZED))
    assert study.seconds(QUANTIZED) < before
    study.handle(CandidateStopped(QUANTIZED.id, "hopeless"))
    assert study.seconds(QUANTIZED) == before


HAPPENS = st.sampled_from(["propose", "propose", "end", "end", "late", "stop", "stop", "began", "grant"])


@given(st.lists(st.tuples(HAPPENS, st.integers(1, 3), st.integers(2, 4)), max_size=40), st.randoms())
def test_whatever_is_stopped_when_the_study_ends_and_can_be_rebuilt(
    steps: list[tuple[str, int, int]], order: random.Random
) -> None:
    events: list[Event] = []
    study = Study(plan(candidates=100))
    under_way: dict[tuple[str, int], Run] = {}
    gone: list[Run] = []

    def take(event: Event) -> None:
        events.append(event)
        if isinstance(event, ServiceStarted):
            gone.extend(under_way.values())
            under_way.clear()
        for command in study.handle(event):
            if isinstance(command, Run):
                assert (command.job.id, command.attempt) not in under_way
                under_way[command.job.id, command.attempt] = command
            elif isinstance(command, Cancel):
                gone.append(under_way.pop((command.job.id, command.attempt)))

    def end_one() -> None:
        run = under_way.pop(order.choice(list(under_way)))
        gone.append(run)
        accuracy = order.random()
        outcome = measured(accuracy) if accuracy > 0.2 else Failure("bug", "why")
        take(AttemptEnded(run.job.id, run.attempt, outcome))

    def check() -> None:
        assert study.running == len(under_way)
        for one in study.candidates.values():
            assert (one.state == "stopped") == (one.stopped is not None)
            assert one.state != "stopped" or one.measurement is None

    take(ServiceStarted())
    for kind, count, bits in steps:
        recipe = ORIGINAL.then(DROP(count=count))
        recipe = recipe if bits == 3 else recipe.then(RTN(bits={2: 2, 4: 4}[bits]))
        if kind == "propose":
            take(proposal(recipe))
        elif kind == "stop":
            take(CandidateStopped(recipe.id, "hopeless"))
        elif kind == "began":
            take(ServiceStarted(1, order.choice([BudgetAllowance(), KEPT, SPENT])))
        elif kind == "grant":
            take(order.choice([KEPT, SPENT]))
        elif kind == "end" and under_way:
            end_one()
        elif kind == "late" and gone:
            late = order.choice(gone)
            known = dict(study.candidates)
            take(AttemptEnded(late.job.id, late.attempt, measured(0.99)))
            assert study.candidates == known
        check()
    take(SPENT)
    while under_way:
        end_one()
        check()
    assert study.stage == "done"
    take(ServiceStarted(1, BudgetAllowance()))
    take(SearchExhausted("enough"))
    while under_way:
        end_one()
        check()
    assert study.stage == "done"
    assert not {"waiting", "running"} & {one.state for one in study.candidates.values()}
    copy = Study(study.plan)
    for event in events:
        copy.handle(event)
    assert copy.candidates == study.candidates
    assert (copy.running, copy.stage, copy.reused) == (study.running, study.stage, study.reused)
