"""Contenders against the slow obvious version: every candidate compared with every other."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from jobs.recipe import Origin, Recipe
from orchestrator.pareto.front import Objective, dominates
from orchestrator.study.contenders import Rival, contenders
from orchestrator.study.events import Cost, StudyPlan
from orchestrator.study.latency_estimate import surely_no_slower

# Few different values, so that ties come up often.
some = st.integers(1, 4)
predicted = st.one_of(st.just({}), st.fixed_dictionaries({"decode_ms": st.sampled_from([1.0, 2.0, 3.0])}))
costs = st.builds(Cost, some, some, some, predicted)
metrics = st.fixed_dictionaries({"size_bytes": some.map(float), "accuracy": some.map(float)})
rivals = st.lists(st.builds(Rival, metrics, costs), max_size=12)


def plan(limit: float | None, timed: frozenset[str]) -> StudyPlan:
    objectives = (
        Objective("size_bytes", "min", limit),
        Objective("accuracy", "max"),
        Objective("decode_ms", "min"),
    )
    origin = Recipe(Origin("model", "data", 0))
    return StudyPlan(origin, Cost(4, 4, 4), objectives, 9, (), (), timed, "m", {"decode_ms": 0.1})


def compared_with_all(known: dict[str, Rival], plan: StudyPlan) -> set[str]:
    untimed = [o for o in plan.objectives if o.metric not in plan.timed]
    return {
        id
        for id, one in known.items()
        if not any(o.broken_by(one.metrics[o.metric]) for o in untimed)
        and not any(
            dominates(other.metrics, one.metrics, untimed)
            and surely_no_slower(other.cost, one.cost, plan.timed, plan.prediction_errors)
            for other in known.values()
        )
    }


@given(rivals, st.sampled_from([None, 2.0]))
def test_contenders_are_those_that_no_other_is_surely_at_least_as_good_as(
    members: list[Rival], limit: float | None
) -> None:
    known = {str(number): one for number, one in enumerate(members)}
    asked = plan(limit, frozenset({"decode_ms"}))
    assert contenders(known, asked) == compared_with_all(known, asked)


@given(rivals)
def test_where_all_is_timed_everyone_is_a_contender(members: list[Rival]) -> None:
    known = {str(number): one for number, one in enumerate(members)}
    assert contenders(known, plan(None, frozenset({"size_bytes", "accuracy", "decode_ms"}))) == set(known)
