"""Contenders compared with a slow reference implementation, which compares every pair of candidates."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from jobs.recipe import Origin, Recipe
from orchestrator.pareto.front import Objective, dominates
from orchestrator.study.contenders import Rival, contenders
from orchestrator.study.events import Cost, StudyPlan
from orchestrator.study.latency_estimate import surely_no_slower

# A small range of values makes ties frequent.
small_integers = st.integers(1, 4)
predicted = st.one_of(st.just({}), st.fixed_dictionaries({"decode_ms": st.sampled_from([1.0, 2.0, 3.0])}))
costs = st.builds(Cost, small_integers, small_integers, small_integers, predicted)
metrics = st.fixed_dictionaries(
    {"size_bytes": small_integers.map(float), "accuracy": small_integers.map(float)}
)
rival_lists = st.lists(st.builds(Rival, metrics, costs), max_size=12)


def plan(limit: float | None, timed: frozenset[str]) -> StudyPlan:
    objectives = (
        Objective("size_bytes", "min", limit),
        Objective("accuracy", "max"),
        Objective("decode_ms", "min"),
    )
    origin = Recipe(Origin("model", "data", 0))
    return StudyPlan(origin, Cost(4, 4, 4), objectives, 9, (), (), timed, "m", {"decode_ms": 0.1})


def reference_contenders(rivals: dict[str, Rival], plan: StudyPlan) -> set[str]:
    untimed = [objective for objective in plan.objectives if objective.metric not in plan.timed]
    contender_ids = set()
    for id, candidate in rivals.items():
        breaks_limit = any(objective.broken_by(candidate.metrics[objective.metric]) for objective in untimed)
        is_dominated = any(
            dominates(rival.metrics, candidate.metrics, untimed)
            and surely_no_slower(rival.cost, candidate.cost, plan.timed, plan.prediction_errors)
            for rival in rivals.values()
        )
        if not breaks_limit and not is_dominated:
            contender_ids.add(id)
    return contender_ids


@given(rival_lists, st.sampled_from([None, 2.0]))
def test_contenders_equal_those_of_the_reference_implementation(
    members: list[Rival], limit: float | None
) -> None:
    rivals = {str(number): rival for number, rival in enumerate(members)}
    study_plan = plan(limit, frozenset({"decode_ms"}))
    assert contenders(rivals, study_plan) == reference_contenders(rivals, study_plan)


@given(rival_lists)
def test_all_candidates_are_contenders_if_all_objectives_are_timed(members: list[Rival]) -> None:
    rivals = {str(number): rival for number, rival in enumerate(members)}
    assert contenders(rivals, plan(None, frozenset({"size_bytes", "accuracy", "decode_ms"}))) == set(rivals)
