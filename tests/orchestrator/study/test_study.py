"""Tests of `Study` through events alone: late, repeated and out of order."""

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
from orchestrator.study.durations import Savings
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


def measured(accuracy: float, size: float = 50, **metrics: float) -> Success:
    return Success("artifact", 1, Measurement({"size_bytes": size, "accuracy": accuracy, **metrics}), 1.0)


def timed(ms: float, error: float = 0.5) -> Success:
    return Success("artifact", 1, Measurement({"decode_ms": ms}, {"decode_ms": error}), 0.0)


def order_of_timings(study: Study, run: Run, latencies: dict[Recipe, float] | None = None) -> list[Recipe]:
    """Return the recipes in the order of their timings, starting with `run`.

    `latencies` holds milliseconds for each recipe; without it, each recipe takes 5 ms.
    """
    order = []
    while True:
        order.append(run.job.recipe)
        next_runs = runs(end(study, run, timed(5.0 if latencies is None else latencies[run.job.recipe])))
        if not next_runs:
            return order
        (run,) = next_runs


def runs(commands: list[Command]) -> list[Run]:
    return [command for command in commands if isinstance(command, Run)]


def only_run(commands: list[Command]) -> Run:
    (run,) = runs(commands)
    return run


def end(study: Study, run: Run, outcome: Success | Failure) -> list[Command]:
    return study.handle(AttemptEnded(run.job.id, run.attempt, outcome))


def start_study(plan: StudyPlan, slots: int = 1) -> tuple[Study, Run]:
    """Return a study that measures its original, and the run of that measurement."""
    study = Study(plan)
    return study, only_run(study.handle(ServiceStarted(slots)))


DROPPED = ORIGINAL.then(DROP(count=1))
QUANTIZED = DROPPED.then(RTN(bits=4))


def test_everything_waits_for_the_original() -> None:
    study, original = start_study(plan())
    assert runs(study.handle(proposal(DROPPED))) == []
    assert only_run(end(study, original, measured(0.5))).job.recipe == DROPPED


def test_a_shared_prefix_runs_once() -> None:
    study, original = start_study(plan(candidates=2))
    end(study, original, measured(0.5))
    first = only_run(study.handle(proposal(DROPPED.then(RTN(bits=4)))))
    assert first.job == Job(DROPPED, (), "m")
    assert runs(study.handle(proposal(DROPPED.then(RTN(bits=8))))) == []
    children = runs(end(study, first, measured(0.0)))
    assert [run.job.recipe.steps[-1] for run in children] == [RTN(bits=4), RTN(bits=8)]
    assert study.reused == 1


def test_savings_are_the_duration_of_the_shared_work() -> None:
    study, original = start_study(plan(candidates=3))
    end(study, original, measured(0.5))
    (first,) = runs(study.handle(proposal(DROPPED.then(RTN(bits=4)))))
    study.handle(proposal(DROPPED.then(RTN(bits=8))))
    # The job took 2 s. Cached statistics saved 3 s more.
    prefix_result = dataclasses.replace(measured(0.0), seconds=2.0, saved_seconds=3.0)
    four_bit, eight_bit = runs(end(study, first, prefix_result))
    end(study, four_bit, measured(0.4))
    measurement = dataclasses.replace(measured(0.3).measurement, seconds=4.0)
    end(study, eight_bit, Success("artifact", 1, measurement, seconds=1.0, found=True))
    assert study.savings == Savings(
        steps=1, steps_seconds=5.0, statistics_seconds=3.0, jobs=1, jobs_seconds=5.0
    )
    assert study.savings.seconds == 13.0


def test_an_intermediate_model_that_becomes_a_candidate_is_measured_without_a_second_run_of_its_steps() -> (
    None
):
    study, original = start_study(plan(candidates=2))
    end(study, original, measured(0.5))
    prefix = only_run(study.handle(proposal(QUANTIZED)))
    assert runs(study.handle(proposal(DROPPED))) == []
    next_runs = runs(end(study, prefix, measured(0.0)))
    assert [(run.job.recipe, run.job.meters) for run in next_runs] == [
        (DROPPED, ("text",)),
        (QUANTIZED, ("text",)),
    ]


def test_a_repeated_result_is_counted_once() -> None:
    study, original = start_study(plan())
    end(study, original, measured(0.5))
    run = only_run(study.handle(proposal(DROPPED)))
    assert end(study, run, measured(0.4)) != []
    assert end(study, run, measured(0.9)) == []
    assert study.candidates[DROPPED.id].measurement == measured(0.4).measurement


def test_a_late_result_of_an_earlier_attempt_is_ignored() -> None:
    study, original = start_study(plan())
    end(study, original, measured(0.5))
    first = only_run(study.handle(proposal(DROPPED)))
    second = only_run(end(study, first, Failure("preempted", "the node went away")))
    assert second.attempt == first.attempt + 1
    assert end(study, first, measured(0.9)) == []
    end(study, second, measured(0.4))
    assert study.candidates[DROPPED.id].measurement == measured(0.4).measurement


def test_results_of_unknown_jobs_are_ignored() -> None:
    study, _ = start_study(plan())
    assert study.handle(AttemptEnded("nobody", 1, measured(0.4))) == []
    assert study.handle(AttemptStarted("nobody", 1)) == []


@pytest.mark.parametrize(
    ("kind", "max_attempts"),
    [("invalid", 1), ("diverged", 1), ("out_of_memory", 2), ("bug", 3), ("timeout", 3)],
)
def test_the_number_of_attempts_depends_on_the_kind_of_failure(kind: str, max_attempts: int) -> None:
    study, original = start_study(plan())
    end(study, original, measured(0.5))
    run = only_run(study.handle(proposal(DROPPED)))
    attempts = 1
    while runs(commands := end(study, run, Failure(kind, "why"))):  # type: ignore[arg-type]
        run = only_run(commands)
        attempts += 1
        assert run.exclusive == (kind == "out_of_memory")
    assert attempts == max_attempts
    candidate = study.candidates[DROPPED.id]
    assert candidate.state == "failed"
    assert candidate.failure == Failure(kind, "why")  # type: ignore[arg-type]
    assert Tell({"choice": DROPPED.id}, candidate.failure) in commands


def test_a_preempted_attempt_is_never_counted_against_the_candidate() -> None:
    study, original = start_study(plan())
    end(study, original, measured(0.5))
    run = only_run(study.handle(proposal(DROPPED)))
    for _ in range(20):
        run = only_run(end(study, run, Failure("preempted", "spot")))
    end(study, run, measured(0.4))
    assert study.candidates[DROPPED.id].state == "measured"


def test_candidates_that_need_a_failed_prefix_fail_and_the_study_continues() -> None:
    study, original = start_study(plan(candidates=2))
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
    study, original = start_study(plan(limit=60))
    end(study, original, measured(0.5))
    commands = study.handle(proposal(DROPPED, size=61))
    assert runs(commands) == []
    assert study.candidates[DROPPED.id].state == "over_limit"
    assert [type(command) for command in commands] == [Record, Tell]
    assert study.proposed == 0
    assert runs(study.handle(proposal(QUANTIZED, size=60))) != []


def test_an_invalid_proposal_fails_without_running() -> None:
    study, _ = start_study(plan())
    commands = study.handle(CandidateProposed(DROPPED, {"choice": 1}, None, "count is too large"))
    assert runs(commands) == []
    assert study.candidates[DROPPED.id].failure == Failure("invalid", "count is too large")


def test_a_candidate_proposed_twice_is_reported_again_and_counted_once() -> None:
    study, original = start_study(plan())
    end(study, original, measured(0.5))
    end(study, only_run(study.handle(proposal(DROPPED))), measured(0.4))
    commands = study.handle(CandidateProposed(DROPPED, {"other": "choices"}, Cost(50, 500, 10)))
    assert commands == [Tell({"other": "choices"}, {"size_bytes": 50, "accuracy": 0.4})]
    assert study.proposed == 1


def test_timings_run_last_and_only_for_candidates_that_may_be_on_the_front() -> None:
    study, original = start_study(plan(candidates=2, timers=True))
    assert original.exclusive
    assert original.job.meters == ("text", "latency")
    end(study, original, measured(0.5, size=100, decode_ms=10.0))
    good, bad = ORIGINAL.then(RTN(bits=4)), ORIGINAL.then(RTN(bits=3))
    better = only_run(study.handle(proposal(good, size=50)))
    worse = only_run(study.handle(proposal(bad, size=60)))
    assert runs(end(study, worse, measured(0.3, size=60))) == []
    assert study.stage == "searching"
    original_timing = only_run(end(study, better, measured(0.4, size=50)))
    assert original_timing == Run(Job(ORIGINAL, ("latency",), "m"), 2, exclusive=True)
    assert study.stage == "timing"
    timing = only_run(end(study, original_timing, timed(8.0)))
    assert timing == Run(Job(good, ("latency",), "m"), 2, exclusive=True)
    assert study.original.measurement is not None
    assert study.original.measurement.metrics["decode_ms"] == 8.0
    end(study, timing, timed(5.0))
    measurement = study.candidates[good.id].measurement
    assert measurement is not None
    assert measurement.metrics == {"size_bytes": 50, "accuracy": 0.4, "decode_ms": 5.0}
    assert study.stage == "done"


def test_a_dominated_candidate_that_computes_less_may_still_be_the_fastest() -> None:
    study, original = start_study(plan(candidates=2, timers=True))
    end(study, original, measured(0.5, size=100, decode_ms=10.0))
    good, lean = ORIGINAL.then(RTN(bits=4)), ORIGINAL.then(PRUNE(ratio=0.5))
    first = only_run(study.handle(proposal(good, size=50, macs=1000)))
    second = only_run(study.handle(proposal(lean, size=60, macs=500)))
    end(study, first, measured(0.4, size=50))
    original_timing = only_run(end(study, second, measured(0.3, size=60)))
    assert order_of_timings(study, original_timing) == [ORIGINAL, good, lean]


@pytest.mark.parametrize(("size", "is_timed"), [(90, False), (56, True)])
def test_a_dominated_candidate_is_not_timed_if_earlier_timings_predict_that_it_is_slower(
    size: int, is_timed: bool
) -> None:
    """Latency is proportional to the size, one millisecond for ten bytes, and timings have an error of 0.5 ms."""
    study, original = start_study(plan(candidates=6, timers=True))
    end(study, original, measured(0.5, size=100, decode_ms=10.0))
    front = [ORIGINAL.then(DROP(count=count)) for count in (1, 2, 3, 4, 5)]
    for index, recipe in enumerate(front):
        run = only_run(study.handle(proposal(recipe, size=50 + index, macs=1000)))
        end(study, run, measured(0.4 + index / 100, size=50 + index))
    lean = ORIGINAL.then(PRUNE(ratio=0.5))
    run = only_run(study.handle(proposal(lean, size=size, macs=990)))
    original_timing = only_run(end(study, run, measured(0.3, size=size)))
    latencies = {ORIGINAL: 10.0, lean: size / 10} | {
        recipe: 5 + index / 10 for index, recipe in enumerate(front)
    }
    order = order_of_timings(study, original_timing, latencies)
    assert order[:6] == [ORIGINAL, *front]
    assert order[6:] == ([lean] if is_timed else [])
    assert study.stage == "done"


def test_at_most_one_timing_is_pending_per_slot() -> None:
    study, original = start_study(plan(candidates=3, timers=True), slots=2)
    end(study, original, measured(0.5, size=100, decode_ms=10.0))
    recipes = [ORIGINAL.then(RTN(bits=bits)) for bits in (2, 3, 4)]
    for index, recipe in enumerate(recipes):
        commands = end(
            study,
            only_run(study.handle(proposal(recipe, size=50 + index))),
            measured(0.4 + index / 10, size=50 + index),
        )
    original_timing, first_timing = runs(commands)
    assert [original_timing.job.recipe, first_timing.job.recipe] == [ORIGINAL, recipes[0]]
    assert study.timings_left == 4
    assert only_run(end(study, first_timing, timed(5.0))).job.recipe == recipes[1]
    assert study.timings_left == 3
    assert only_run(study.handle(SlotsChanged(3))).job.recipe == recipes[2]


def test_a_preempted_timing_is_retried() -> None:
    study, original = start_study(plan(candidates=1, timers=True))
    end(study, original, measured(0.5, size=100, decode_ms=10.0))
    run = only_run(study.handle(proposal(DROPPED)))
    timing = only_run(end(study, run, measured(0.4)))
    retry = only_run(end(study, timing, Failure("preempted", "the node went away")))
    assert (retry.job, retry.attempt) == (timing.job, timing.attempt + 1)


def test_the_search_receives_estimates_of_metrics_that_are_timed_later() -> None:
    study, original = start_study(plan(candidates=2, timers=True))
    end(study, original, measured(0.5, size=100, decode_ms=10.0))
    commands = end(study, only_run(study.handle(proposal(DROPPED, macs=500))), measured(0.4))
    (report,) = [command for command in commands if isinstance(command, Tell)]
    assert report.result == {"size_bytes": 50, "accuracy": 0.4, "decode_ms": 5.0}
    recorded = [command.candidate for command in commands if isinstance(command, Record)]
    assert recorded[0].measurement is not None
    assert "decode_ms" not in recorded[0].measurement.metrics


def test_predictions_relative_to_the_original_replace_multiply_adds() -> None:
    study, original = start_study(plan(candidates=2, timers=True, predicted=20.0))
    end(study, original, measured(0.5, size=100, decode_ms=10.0))
    run = only_run(study.handle(proposal(DROPPED, macs=500, decode_ms=16.0)))
    (report,) = [command for command in end(study, run, measured(0.4)) if isinstance(command, Tell)]
    assert report.result == {"size_bytes": 50, "accuracy": 0.4, "decode_ms": 8.0}


def test_predictions_are_stored_next_to_measurements() -> None:
    study, original = start_study(plan(candidates=1, timers=True, predicted=20.0))
    end(study, original, measured(0.5, size=100, decode_ms=10.0))
    run = only_run(study.handle(proposal(DROPPED, decode_ms=16.0)))
    original_timing = only_run(end(study, run, measured(0.4)))
    assert study.candidates[DROPPED.id].predicted == {}
    end(study, only_run(end(study, original_timing, timed(12.0))), timed(10.0))
    # The machine is slower than at the start: the original takes 12 ms now.
    assert study.candidates[DROPPED.id].predicted == {"decode_ms": pytest.approx(9.6)}
    assert study.original.predicted == {}


@pytest.mark.parametrize(("predicted", "is_timed"), [(15.0, False), (12.0, True)])
def test_a_dominated_candidate_is_not_timed_if_it_is_predicted_slower_by_more_than_the_prediction_error(
    predicted: float, is_timed: bool
) -> None:
    study, original = start_study(plan(candidates=2, timers=True, predicted=20.0))
    end(study, original, measured(0.5, size=100, decode_ms=10.0))
    good, lean = ORIGINAL.then(RTN(bits=4)), ORIGINAL.then(PRUNE(ratio=0.5))
    first = only_run(study.handle(proposal(good, size=50, macs=1000, decode_ms=10.0)))
    second = only_run(study.handle(proposal(lean, size=60, macs=500, decode_ms=predicted)))
    end(study, first, measured(0.4, size=50))
    original_timing = only_run(end(study, second, measured(0.3, size=60)))
    assert (lean in order_of_timings(study, original_timing)) is is_timed


def test_a_study_ends_when_the_search_is_exhausted() -> None:
    study, original = start_study(plan(candidates=10))
    end(study, original, measured(0.5))
    run = only_run(study.handle(proposal(DROPPED)))
    study.handle(SearchExhausted("every choice was proposed"))
    assert not study.wants(slots=2)
    end(study, run, measured(0.4))
    assert study.stage == "done"


SPENT = BudgetAllowance("none", "the budget of 2 hours is spent")
FINISH_PENDING = BudgetAllowance("finish_pending", "the budget of 2 hours is spent, but for 5 minutes")


def measured_within(seconds: float, accuracy: float = 0.4) -> Success:
    """Return a measurement that took this many seconds."""
    measurement = dataclasses.replace(measured(accuracy).measurement, seconds=seconds)
    return Success("artifact", 1, measurement, seconds=0.0)


def test_at_the_end_of_the_budget_proposals_stop_and_possible_front_members_are_timed() -> None:
    study, original = start_study(plan(candidates=5, timers=True))
    end(study, original, measured(0.5, decode_ms=10.0))
    running = only_run(study.handle(proposal(QUANTIZED)))
    assert study.wants(2)
    assert study.handle(FINISH_PENDING) == []
    assert not study.wants(2)
    last_step = only_run(end(study, running, measured(0.0)))
    timing = only_run(end(study, last_step, measured(0.4)))
    assert order_of_timings(study, timing) == [ORIGINAL, QUANTIZED]
    assert (study.stage, study.exhausted, study.untimed) == ("done", FINISH_PENDING.reason, 0)


def test_a_budget_that_ends_while_no_job_runs_starts_the_timings() -> None:
    study, original = start_study(plan(candidates=5, timers=True))
    end(study, original, measured(0.5, decode_ms=10.0))
    assert only_run(study.handle(FINISH_PENDING)).job.meters == ("latency",)


def test_a_spent_budget_starts_no_job_and_lets_running_jobs_end() -> None:
    study, original = start_study(plan(candidates=5, timers=True))
    end(study, original, measured(0.5, decode_ms=10.0))
    running = only_run(study.handle(proposal(QUANTIZED)))
    study.handle(SPENT)
    assert study.stage != "done"
    assert runs(end(study, running, measured(0.0))) == []
    assert (study.stage, study.exhausted) == ("done", SPENT.reason)
    assert (study.waiting, study.untimed) == (1, 1)


def test_a_preempted_attempt_is_not_retried_when_the_budget_is_spent() -> None:
    study, original = start_study(plan(candidates=5))
    end(study, original, measured(0.5))
    running = only_run(study.handle(proposal(DROPPED)))
    study.handle(SPENT)
    assert runs(end(study, running, Failure("preempted", "the node went away"))) == []
    assert study.stage == "done"


def test_timings_beyond_the_budget_are_skipped() -> None:
    study, original = start_study(plan(candidates=1, timers=True))
    end(study, original, measured(0.5, decode_ms=10.0))
    timing = only_run(end(study, only_run(study.handle(proposal(DROPPED))), measured(0.4)))
    study.handle(SPENT)
    assert runs(end(study, timing, timed(10.0))) == []
    assert (study.stage, study.untimed) == ("done", 1)


def test_a_study_resumed_with_more_budget_continues() -> None:
    study, original = start_study(plan(candidates=5, timers=True))
    end(study, original, measured(0.5, decode_ms=10.0))
    running = only_run(study.handle(proposal(QUANTIZED)))
    study.handle(SPENT)
    end(study, running, measured(0.0))
    assert only_run(study.handle(ServiceStarted(1, BudgetAllowance()))).job.recipe == QUANTIZED
    assert study.exhausted is None
    assert study.wants(2)
    assert (study.stage, study.untimed) == ("searching", 0)


@pytest.mark.parametrize("budget", [SPENT, FINISH_PENDING])
def test_a_study_resumed_without_more_budget_starts_no_candidates(
    budget: BudgetAllowance,
) -> None:
    study, original = start_study(plan(candidates=5))
    end(study, original, measured(0.5))
    study.handle(proposal(QUANTIZED))
    study.handle(budget)
    resumed = runs(study.handle(ServiceStarted(1, budget)))
    assert [run.job.recipe for run in resumed] == ([] if budget is SPENT else [DROPPED])
    assert (study.stage == "done") == (budget is SPENT)
    assert not study.wants(2)


def test_a_study_with_all_its_candidates_did_not_end_early() -> None:
    study, original = start_study(plan(candidates=1))
    end(study, original, measured(0.5))
    running = only_run(study.handle(proposal(DROPPED)))
    study.handle(FINISH_PENDING)
    end(study, running, measured(0.4))
    assert (study.stage, study.exhausted) == ("done", None)


def test_the_time_to_finish_covers_running_jobs_and_timings_of_possible_front_members() -> None:
    study, original = start_study(plan(candidates=5, timers=True))
    assert study.seconds_to_finish == 0
    with_timing = dataclasses.replace(measured(0.5, decode_ms=10.0).measurement, seconds=50.0)
    end(study, original, Success("artifact", 1, with_timing, seconds=0.0))
    # No model was measured without a timing yet, so the duration of a timing is assumed to be its minimum.
    assert study.seconds_to_finish == pytest.approx(11.0)
    first = only_run(study.handle(proposal(DROPPED)))
    end(study, first, measured_within(20.0))
    # The original took 50 s with its timing, 30 s more than a measurement. Both models may be on the front.
    assert study.seconds_to_finish == pytest.approx(2 * 30.0)
    # A technique that was not tried yet is assumed to take the typical time: in this study, that of measuring.
    study.handle(proposal(ORIGINAL.then(RTN(bits=4))))
    assert study.seconds_to_finish == pytest.approx(2 * 30.0 + 20.0 + 20.0)


def test_the_time_to_finish_covers_the_full_evaluation_of_a_partly_evaluated_candidate() -> None:
    with_rungs = dataclasses.replace(plan(candidates=5), rungs=(0.25, 1.0))
    study, original = start_study(with_rungs, slots=2)
    end(study, original, measured_within(40.0, 0.5))
    assert study.seconds_to_finish == 0
    end(study, only_run(study.handle(proposal(DROPPED))), measured_within(8.0))
    assert study.seconds_to_finish == pytest.approx(8.0 / 0.25 / 2)


def test_a_failed_original_ends_the_study() -> None:
    study, original = start_study(plan())
    study.handle(proposal(DROPPED))
    end(study, original, Failure("invalid", "no such model"))
    assert not study.wants(slots=2)
    assert study.stage == "done"
    assert study.candidates[DROPPED.id].state == "failed"


def test_proposals_are_requested_while_a_slot_could_become_idle_and_not_all_at_once() -> None:
    study, original = start_study(plan(candidates=100))
    assert not study.wants(slots=2)  # no candidate can run before the original is measured
    end(study, original, measured(0.5))
    proposals = 0
    while study.wants(slots=2):
        proposals += 1
        study.handle(proposal(ORIGINAL.then(PRUNE(ratio=proposals / 200))))
    assert 2 < proposals < 10


def test_replaying_the_events_rebuilds_the_study_after_any_number_of_kills() -> None:
    events = []
    study = Study(plan(candidates=3, timers=True))

    def send(event: object) -> list[Command]:
        events.append(event)
        return study.handle(event)  # type: ignore[arg-type]

    original = only_run(send(ServiceStarted()))
    send(AttemptEnded(original.job.id, original.attempt, measured(0.5, size=100, decode_ms=10.0)))
    prefix = only_run(send(proposal(QUANTIZED)))
    send(AttemptStarted(prefix.job.id, prefix.attempt))
    send(proposal(DROPPED))
    # The process is killed. The intermediate model is a candidate now, and its job has another id.
    resumed = runs(send(ServiceStarted()))
    assert [run.job.meters for run in resumed] == [("text",)]
    send(AttemptEnded(prefix.job.id, prefix.attempt, measured(0.0)))  # late, from the killed process's worker
    assert study.candidates[DROPPED.id].measurement is None
    commands = send(AttemptEnded(resumed[0].job.id, resumed[0].attempt, measured(0.4)))
    send(AttemptEnded(only_run(commands).job.id, only_run(commands).attempt, measured(0.3, size=20)))
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
def test_incremental_summaries_equal_those_computed_from_all_candidates(
    steps: list[tuple[int, int, str]], timers: bool, order: random.Random
) -> None:
    study = Study(plan(candidates=100, timers=timers, limit=90))
    waiting = runs(study.handle(ServiceStarted()))
    standings = Standings("study", study.plan.objectives, study.original.id, study.candidates)

    def process(commands: list[Command]) -> None:
        waiting.extend(runs(commands))
        for command in commands:
            if isinstance(command, Cancel):
                waiting.remove(next(run for run in waiting if run.job == command.job))
            if isinstance(command, Record):
                standings.take(command.candidate.id)

    def end_random_run(kind: str, value: int) -> None:
        run = waiting.pop(order.randrange(len(waiting)))
        study.handle(AttemptStarted(run.job.id, run.attempt))
        success = measured(
            value / 10, size=40 + 10 * value, **({"decode_ms": float(value)} if timers else {})
        )
        process(end(study, run, success if kind == "measured" else Failure(kind, "why")))  # type: ignore[arg-type]

    def check() -> None:
        assert study.states + Counter() == Counter(candidate.state for candidate in study.candidates.values())
        candidates = list(study.candidates.values())
        assert standings.results() == judge("study", study.plan.objectives, study.original, candidates)

    for count, value, kind in steps:
        recipe = ORIGINAL.then(DROP(count=count)).then(RTN(bits={2: 2, 3: 4, 4: 8}[value]))
        process(study.handle(proposal(recipe, size=40 + 20 * value)))
        if kind == "stopped":
            process(study.handle(CandidateStopped(order.choice(list(study.candidates)), "hopeless")))
        elif waiting:
            end_random_run(kind, value)
        check()
    process(study.handle(SearchExhausted("enough")))
    while waiting:
        end_random_run("measured", order.randint(1, 9))
        check()


def test_pending_proposals_are_bounded_while_no_job_ends() -> None:
    study, original = start_study(plan(candidates=10_000))
    end(study, original, measured(0.5))
    for slots in (2, 50):
        while study.wants(slots):
            # All candidates wait for one prefix: only the first of them has a job.
            study.handle(proposal(DROPPED.then(PRUNE(ratio=study.proposed / 20_000))))
        assert study.proposed == 4 * slots


def test_a_late_start_does_not_revive_a_failed_candidate() -> None:
    study, original = start_study(plan())
    end(study, original, measured(0.5))
    run = only_run(study.handle(proposal(DROPPED)))
    end(study, run, Failure("invalid", "no"))
    assert study.handle(AttemptStarted(run.job.id, run.attempt)) == []
    assert study.candidates[DROPPED.id].state == "failed"


def try_failing_candidates(study: Study, failure: Failure) -> int:
    """Return the number of candidates that are tried when each of them fails."""
    trials = 0
    while study.wants(1):
        trials += 1
        commands = study.handle(proposal(ORIGINAL.then(PRUNE(ratio=round(0.001 * trials, 3)))))
        while attempts := runs(commands):
            commands = end(study, attempts[0], failure)
    return trials


def test_a_search_whose_candidates_all_fail_ends_with_the_reason() -> None:
    study, original = start_study(plan(candidates=100))
    end(study, original, measured(0.5))
    assert try_failing_candidates(study, Failure("invalid", "no such layer")) == 20
    assert study.exhausted == "the first 20 candidates all failed"
    assert study.stage == "done"


def test_one_successful_candidate_lets_a_failing_search_continue() -> None:
    study, original = start_study(plan(candidates=30))
    end(study, original, measured(0.5))
    end(study, only_run(study.handle(proposal(DROPPED))), measured(0.4))
    assert try_failing_candidates(study, Failure("invalid", "no such layer")) == 29


def test_a_search_that_ended_with_a_full_disk_continues_when_it_is_resumed() -> None:
    study, original = start_study(plan(candidates=100))
    end(study, original, measured(0.5))
    assert try_failing_candidates(study, Failure("disk_full", "no space")) == 20
    resumed = runs(study.handle(ServiceStarted()))
    assert len(resumed) == 20
    assert study.exhausted is None
    for run in resumed:
        end(study, run, measured(0.4))
    assert study.wants(1)


def test_a_longer_training_takes_longer() -> None:
    study, original = start_study(plan(candidates=5))
    end(study, original, measured(0.5))
    trained = only_run(study.handle(proposal(ORIGINAL.then(DISTILL(steps=16)))))
    end(study, trained, Success("artifact", 1, Measurement({"accuracy": 0.4}, seconds=3.0), 8.0))
    assert study.seconds(ORIGINAL.then(DISTILL(steps=64))) == 3.0 + 32.0
    assert study.seconds(ORIGINAL.then(DISTILL(steps=4))) == 3.0 + 2.0


def test_a_candidate_that_shares_steps_takes_less_time() -> None:
    study, original = start_study(plan(candidates=5))
    assert study.seconds(QUANTIZED) == 3  # two steps and a measurement, while no durations are known
    end(study, original, measured(0.5))
    dropped = only_run(study.handle(proposal(DROPPED)))
    result = Success("artifact", 1, Measurement({"accuracy": 0.4}, seconds=3.0), 7.0)
    end(study, dropped, result)
    assert study.seconds(DROPPED) == 3.0
    assert study.seconds(QUANTIZED) == 3.0 + 7.0  # rtn is assumed to take the average time of all steps
    assert study.seconds(ORIGINAL.then(DROP(count=2)).then(RTN(bits=4))) == 3.0 + 7.0 + 7.0


def cancellations(commands: list[Command]) -> list[Cancel]:
    return [command for command in commands if isinstance(command, Cancel)]


def test_stopping_a_candidate_cancels_the_jobs_that_only_it_needs() -> None:
    study, original = start_study(plan(candidates=3))
    end(study, original, measured(0.5))
    prefix = only_run(study.handle(proposal(QUANTIZED)))
    independent = only_run(study.handle(proposal(ORIGINAL.then(RTN(bits=4)))))
    assert study.running == 2
    commands = study.handle(CandidateStopped(QUANTIZED.id, "hopeless"))
    assert cancellations(commands) == [Cancel(prefix.job, prefix.attempt)]
    stopped = study.candidates[QUANTIZED.id]
    assert (stopped.state, stopped.stopped) == ("stopped", "hopeless")
    assert commands[1:] == [Record(stopped), Tell({"choice": QUANTIZED.id}, None)]
    assert (study.running, study.proposed, study.reused) == (1, 2, 0)
    assert study.handle(CandidateStopped(QUANTIZED.id, "again")) == []
    assert end(study, prefix, measured(0.9)) == []  # it ended before it could be cancelled
    assert study.candidates[QUANTIZED.id] == stopped
    end(study, independent, measured(0.4))
    assert study.wants(slots=1)


def test_a_prefix_that_another_candidate_needs_continues_when_one_is_stopped() -> None:
    study, original = start_study(plan(candidates=3))
    end(study, original, measured(0.5))
    prefix = only_run(study.handle(proposal(QUANTIZED)))
    sibling = DROPPED.then(RTN(bits=8))
    study.handle(proposal(sibling))
    assert study.reused == 1
    assert cancellations(study.handle(CandidateStopped(QUANTIZED.id, "hopeless"))) == []
    assert (study.running, study.reused) == (1, 0)
    assert only_run(end(study, prefix, measured(0.0))).job.recipe == sibling


def test_prefixes_of_other_candidates_finished_candidates_and_the_original_are_not_stopped() -> None:
    study, original = start_study(plan(candidates=3))
    assert study.handle(CandidateStopped(ORIGINAL.id, "hopeless")) == []
    end(study, original, measured(0.5))
    dropped = only_run(study.handle(proposal(DROPPED)))
    study.handle(proposal(QUANTIZED))
    assert study.handle(CandidateStopped(DROPPED.id, "hopeless")) == []
    (quantized,) = runs(end(study, dropped, measured(0.4)))
    assert study.handle(CandidateStopped(DROPPED.id, "hopeless")) == []
    assert study.candidates[DROPPED.id].state == "measured"
    study.handle(proposal(QUANTIZED.then(PRUNE(ratio=0.5))))
    retry = end(study, quantized, Failure("bug", "once"))
    assert study.handle(CandidateStopped(QUANTIZED.id, "hopeless")) == []
    assert runs(retry) != []
    assert study.handle(CandidateStopped("unheard of", "hopeless")) == []


def test_a_stopped_candidate_stays_stopped_after_a_restart_and_a_second_proposal() -> None:
    study, original = start_study(plan(candidates=3))
    end(study, original, measured(0.5))
    study.handle(proposal(QUANTIZED))
    study.handle(CandidateStopped(QUANTIZED.id, "hopeless"))
    assert runs(study.handle(ServiceStarted())) == []
    assert study.handle(CandidateProposed(QUANTIZED, {"other": 1}, Cost(50, 500, 10))) == [
        Tell({"other": 1}, None)
    ]
    assert study.candidates[QUANTIZED.id].state == "stopped"
    # A candidate derived from a stopped one produces its model, but measures only the new candidate.
    deeper = QUANTIZED.then(PRUNE(ratio=0.5))
    prefix = only_run(study.handle(proposal(deeper)))
    assert (prefix.job.recipe, prefix.attempt) == (DROPPED, 2)
    intermediate = only_run(end(study, prefix, measured(0.0)))
    assert intermediate.job == Job(QUANTIZED, (), "m")
    final = only_run(end(study, intermediate, measured(0.0)))
    assert final.job.recipe == deeper
    assert study.candidates[QUANTIZED.id].state == "stopped"


def test_only_candidates_whose_stop_saves_time_are_stoppable() -> None:
    study, original = start_study(plan(candidates=10))
    assert study.stoppable == []
    end(study, original, measured(0.5))
    slow, fast = ORIGINAL.then(PRUNE(ratio=0.5)), ORIGINAL.then(RTN(bits=3))
    for recipe, seconds in ((ORIGINAL.then(PRUNE(ratio=0.4)), 100.0), (ORIGINAL.then(RTN(bits=4)), 1.0)):
        run = only_run(study.handle(proposal(recipe)))
        end(study, run, Success("artifact", 1, Measurement({"accuracy": 0.4}, seconds=2.0), seconds))
    study.handle(proposal(slow))
    study.handle(proposal(fast))
    assert [candidate.recipe for candidate in study.stoppable] == [slow]
    study.handle(proposal(QUANTIZED))
    study.handle(proposal(DROPPED.then(RTN(bits=8))))  # both wait for their shared prefix
    waiting = {QUANTIZED.id, DROPPED.then(RTN(bits=8)).id}
    assert {candidate.id for candidate in study.stoppable} == {slow.id, *waiting}
    study.handle(CandidateStopped(slow.id, "hopeless"))
    assert {candidate.id for candidate in study.stoppable} == waiting


def test_new_candidates_replace_stopped_ones_up_to_a_quarter() -> None:
    study, original = start_study(plan(candidates=8))
    end(study, original, measured(0.5))
    trials = 0
    while study.wants(slots=10):
        trials += 1
        recipe = ORIGINAL.then(PRUNE(ratio=trials / 100))
        run = only_run(study.handle(proposal(recipe)))
        if trials <= 4:
            study.handle(CandidateStopped(recipe.id, "hopeless"))
        else:
            end(study, run, measured(0.4))
    assert trials == study.allowed == 8 + 2
    assert study.states == {"stopped": 4, "measured": 1 + 6, "waiting": 0}


def test_steps_of_a_stopped_candidate_are_not_assumed_to_be_shared() -> None:
    study, original = start_study(plan(candidates=5))
    end(study, original, measured(0.5))
    initial_seconds = study.seconds(QUANTIZED)
    study.handle(proposal(QUANTIZED))
    assert study.seconds(QUANTIZED) < initial_seconds
    study.handle(CandidateStopped(QUANTIZED.id, "hopeless"))
    assert study.seconds(QUANTIZED) == initial_seconds


ACTIONS = st.sampled_from(["propose", "propose", "end", "end", "late", "stop", "stop", "began", "grant"])


@given(st.lists(st.tuples(ACTIONS, st.integers(1, 3), st.integers(2, 4)), max_size=40), st.randoms())
def test_the_study_ends_and_can_be_rebuilt_whenever_candidates_are_stopped(
    steps: list[tuple[str, int, int]], order: random.Random
) -> None:
    events: list[Event] = []
    study = Study(plan(candidates=100))
    active_runs: dict[tuple[str, int], Run] = {}
    ended_runs: list[Run] = []

    def send(event: Event) -> None:
        events.append(event)
        if isinstance(event, ServiceStarted):
            ended_runs.extend(active_runs.values())
            active_runs.clear()
        for command in study.handle(event):
            if isinstance(command, Run):
                assert (command.job.id, command.attempt) not in active_runs
                active_runs[command.job.id, command.attempt] = command
            elif isinstance(command, Cancel):
                ended_runs.append(active_runs.pop((command.job.id, command.attempt)))

    def end_random_run() -> None:
        run = active_runs.pop(order.choice(list(active_runs)))
        ended_runs.append(run)
        accuracy = order.random()
        outcome = measured(accuracy) if accuracy > 0.2 else Failure("bug", "why")
        send(AttemptEnded(run.job.id, run.attempt, outcome))

    def check() -> None:
        assert study.running == len(active_runs)
        for candidate in study.candidates.values():
            assert (candidate.state == "stopped") == (candidate.stopped is not None)
            assert candidate.state != "stopped" or candidate.measurement is None

    send(ServiceStarted())
    for kind, count, bits in steps:
        recipe = ORIGINAL.then(DROP(count=count))
        recipe = recipe if bits == 3 else recipe.then(RTN(bits={2: 2, 4: 4}[bits]))
        if kind == "propose":
            send(proposal(recipe))
        elif kind == "stop":
            send(CandidateStopped(recipe.id, "hopeless"))
        elif kind == "began":
            send(ServiceStarted(1, order.choice([BudgetAllowance(), FINISH_PENDING, SPENT])))
        elif kind == "grant":
            send(order.choice([FINISH_PENDING, SPENT]))
        elif kind == "end" and active_runs:
            end_random_run()
        elif kind == "late" and ended_runs:
            ended_run = order.choice(ended_runs)
            candidates = dict(study.candidates)
            send(AttemptEnded(ended_run.job.id, ended_run.attempt, measured(0.99)))
            assert study.candidates == candidates
        check()
    send(SPENT)
    while active_runs:
        end_random_run()
        check()
    assert study.stage == "done"
    send(ServiceStarted(1, BudgetAllowance()))
    send(SearchExhausted("enough"))
    while active_runs:
        end_random_run()
        check()
    assert study.stage == "done"
    assert not {"waiting", "running"} & {candidate.state for candidate in study.candidates.values()}
    copy = Study(study.plan)
    for event in events:
        copy.handle(event)
    assert copy.candidates == study.candidates
    assert (copy.running, copy.stage, copy.reused) == (study.running, study.stage, study.reused)
