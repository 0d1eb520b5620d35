"""Dominance and hypervolume, compared with their laws, cases worked by hand, and moocore."""

from __future__ import annotations

import math

import moocore
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.pareto.front import (
    Objective,
    ParetoFront,
    dominates,
    hypervolume,
    losses,
    nondominated,
)

OBJECTIVES = [Objective("size_bytes", "min"), Objective("accuracy", "max"), Objective("decode_ms", "min")]
# A small range of values makes ties and equal points frequent.
values = st.integers(0, 4).map(float)
points = st.fixed_dictionaries({objective.metric: values for objective in OBJECTIVES})


def rows(members: list[dict[str, float]]) -> np.ndarray:
    table = []
    for member in members:
        table.append([member[objective.metric] for objective in OBJECTIVES])
    return np.array(table).reshape(-1, 3)


@given(points)
def test_nothing_dominates_itself(a: dict[str, float]) -> None:
    assert not dominates(a, dict(a), OBJECTIVES)


@given(points, points)
def test_two_points_never_dominate_each_other(a: dict[str, float], b: dict[str, float]) -> None:
    assert not (dominates(a, b, OBJECTIVES) and dominates(b, a, OBJECTIVES))


@given(points, points, points)
def test_dominance_is_transitive(a: dict[str, float], b: dict[str, float], c: dict[str, float]) -> None:
    if dominates(a, b, OBJECTIVES) and dominates(b, c, OBJECTIVES):
        assert dominates(a, c, OBJECTIVES)


def test_dominance_respects_the_direction_of_each_objective() -> None:
    better = {"size_bytes": 1.0, "accuracy": 0.9, "decode_ms": 5.0}
    assert dominates(better, {**better, "accuracy": 0.8}, OBJECTIVES)
    assert dominates(better, {**better, "size_bytes": 2.0}, OBJECTIVES)
    assert not dominates(better, {**better, "size_bytes": 2.0, "accuracy": 1.0}, OBJECTIVES)


@given(st.lists(points, max_size=12))
def test_the_mask_selects_rows_that_no_other_row_dominates(members: list[dict[str, float]]) -> None:
    expected = []
    for member in members:
        expected.append(not any(dominates(rival, member, OBJECTIVES) for rival in members))
    assert nondominated(rows(members), OBJECTIVES).tolist() == expected


@given(st.lists(points, max_size=12), st.randoms())
def test_the_front_is_the_same_in_any_order_of_adding(
    members: list[dict[str, float]], random: object
) -> None:
    order = list(range(len(members)))
    random.shuffle(order)  # type: ignore[attr-defined]
    front = ParetoFront(OBJECTIVES)
    for number in order:
        front.add(str(number), members[number])
    mask = nondominated(rows(members), OBJECTIVES)
    assert set(front.members) == {str(number) for number in np.flatnonzero(mask)}


@given(st.lists(points, max_size=8), points)
def test_add_returns_whether_the_point_is_on_the_front(
    members: list[dict[str, float]], new: dict[str, float]
) -> None:
    front = ParetoFront(OBJECTIVES, {str(number): member for number, member in enumerate(members)})
    assert front.add("new", new) == ("new" in front.members)


def test_equal_points_both_stay() -> None:
    point = {"size_bytes": 1.0, "accuracy": 0.9, "decode_ms": 5.0}
    front = ParetoFront(OBJECTIVES)
    assert front.add("a", point)
    assert front.add("b", point)
    assert set(front.members) == {"a", "b"}


def test_an_id_added_again_has_its_new_values() -> None:
    front = ParetoFront([Objective("size_bytes")])
    front.add("a", {"size_bytes": 1.0})
    front.add("a", {"size_bytes": 2.0})
    assert front.members == {"a": {"size_bytes": 2.0}}


@pytest.mark.parametrize(
    ("objective", "within", "broken"),
    [
        (Objective("size_bytes", "min", limit=120e6), 120e6, 120e6 + 1),
        (Objective("accuracy", "max", limit=0.5), 0.5, 0.49),
        (Objective("loss", "max", limit=-1.0), -1.0, -1.1),
    ],
)
def test_a_limit_applies_on_the_side_of_its_goal(objective: Objective, within: float, broken: float) -> None:
    assert not objective.broken_by(within)
    assert objective.broken_by(broken)
    front = ParetoFront([objective])
    assert not front.add("broken", {objective.metric: broken})
    assert front.add("within", {objective.metric: within})
    assert list(front.members) == ["within"]


def test_an_objective_without_a_limit_cannot_be_broken() -> None:
    assert not Objective("size_bytes").broken_by(1e30)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused_and_does_not_change_the_front(bad: float) -> None:
    front = ParetoFront([Objective("size_bytes")], {"a": {"size_bytes": 1.0}})
    with pytest.raises(ValueError, match="size_bytes"):
        front.add("a", {"size_bytes": bad})
    assert front.members == {"a": {"size_bytes": 1.0}}


def test_a_missing_metric_is_refused_by_name() -> None:
    with pytest.raises(LookupError, match=r"decode_ms has no value among size_bytes"):
        ParetoFront(OBJECTIVES[::2]).add("a", {"size_bytes": 1.0})


def test_a_goal_is_min_or_max() -> None:
    with pytest.raises(ValueError, match="maximise"):
        Objective("accuracy", "maximise")  # type: ignore[arg-type]


def test_the_hypervolume_of_a_case_worked_by_hand() -> None:
    assert hypervolume(np.array([[1.0, 3.0], [2.0, 1.0]]), np.array([4.0, 4.0])) == 3 * 1 + 2 * 3 - 2 * 1


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_hypervolume_agrees_with_moocore(count: int) -> None:
    generator = np.random.default_rng(count)
    for size in (1, 2, 17, 40):
        sample = generator.random((size, count)).round(2)  # rounding makes coordinates repeat
        reference = np.full(count, 0.9)
        assert hypervolume(sample, reference) == pytest.approx(
            moocore.hypervolume(sample, ref=reference), rel=1e-12, abs=1e-12
        )


def test_points_not_better_than_the_reference_add_nothing() -> None:
    reference = np.array([1.0, 1.0])
    assert hypervolume(np.array([[1.0, 0.0], [2.0, -5.0]]), reference) == 0.0
    assert hypervolume(np.empty((0, 2)), reference) == 0.0


@given(st.lists(points, min_size=1, max_size=8), points)
def test_an_additional_point_never_lowers_the_hypervolume(
    members: list[dict[str, float]], new: dict[str, float]
) -> None:
    reference = {"size_bytes": 5.0, "accuracy": -1.0, "decode_ms": 5.0}
    front = ParetoFront(OBJECTIVES, {str(number): member for number, member in enumerate(members)})
    initial = front.hypervolume(reference)
    added = front.add("new", new)
    final = front.hypervolume(reference)
    duplicate = new in members
    if added and not duplicate:
        assert final > initial
    else:
        assert final == pytest.approx(initial)


def test_losses_have_the_sign_that_makes_smaller_better() -> None:
    assert losses({"size_bytes": 2.0, "accuracy": 0.5, "decode_ms": 1.0}, OBJECTIVES) == (2.0, -0.5, 1.0)


def named_front() -> ParetoFront:
    return ParetoFront(
        OBJECTIVES,
        {
            "tiny": {"size_bytes": 10.0, "accuracy": 0.1, "decode_ms": 9.0},
            "quick": {"size_bytes": 90.0, "accuracy": 0.2, "decode_ms": 1.0},
            "good": {"size_bytes": 100.0, "accuracy": 0.9, "decode_ms": 10.0},
            "balanced": {"size_bytes": 30.0, "accuracy": 0.7, "decode_ms": 3.0},
        },
    )


def test_the_named_members_are_the_extremes_and_the_knee() -> None:
    front = named_front()
    assert front.pick("smallest") == "tiny"
    assert front.pick("fastest") == "quick"
    assert front.pick("most-accurate") == "good"
    assert front.pick("knee") == front.knee() == "balanced"


def test_of_equally_small_members_the_one_nearest_to_the_knee_is_the_smallest() -> None:
    front = named_front()
    front.add("tiny too", {"size_bytes": 10.0, "accuracy": 0.3, "decode_ms": 9.5})
    assert front.pick("smallest") == "tiny too"


def test_the_fastest_is_by_decoding_where_prefill_is_an_objective_too() -> None:
    objectives = [Objective("prefill_ms"), Objective("decode_ms")]
    members = {"a": {"prefill_ms": 1.0, "decode_ms": 2.0}, "b": {"prefill_ms": 2.0, "decode_ms": 1.0}}
    assert ParetoFront(objectives, members).pick("fastest") == "b"


def test_perplexity_counts_as_accuracy() -> None:
    objectives = [Objective("size_bytes"), Objective("perplexity", "min")]
    members = {"a": {"size_bytes": 1.0, "perplexity": 50.0}, "b": {"size_bytes": 2.0, "perplexity": 40.0}}
    assert ParetoFront(objectives, members).pick("most-accurate") == "b"


def test_a_pick_without_its_objective_is_refused() -> None:
    front = ParetoFront([Objective("size_bytes")], {"a": {"size_bytes": 1.0}})
    with pytest.raises(LookupError, match="fastest"):
        front.pick("fastest")
    with pytest.raises(LookupError, match="there are: knee"):
        front.pick("best")  # type: ignore[arg-type]


def test_an_empty_front_has_no_knee() -> None:
    with pytest.raises(LookupError, match="empty"):
        ParetoFront(OBJECTIVES).knee()
