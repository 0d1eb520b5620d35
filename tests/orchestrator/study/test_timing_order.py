"""The timing order: predictions compared with a slow reference implementation, and decisions on synthetic costs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.recipe import Origin, Recipe
from orchestrator.pareto.front import Objective
from orchestrator.study import timing_order
from orchestrator.study.contenders import Rival
from orchestrator.study.events import Cost, StudyPlan
from orchestrator.study.timing_order import Timing, next_timed, predict_latency

ORIGINAL = Cost(size_bytes=200, decode_macs=1000, linears=20)
PLAN = StudyPlan(
    original=Recipe(Origin("model", "data", 0)),
    original_cost=ORIGINAL,
    objectives=(Objective("size_bytes"), Objective("accuracy", "max"), Objective("decode_ms")),
    candidates=9,
    meters=(),
    timers=(),
    timed=frozenset({"decode_ms"}),
    materials_digest="m",
)
some_costs = st.lists(
    st.builds(Cost, st.integers(20, 200), st.integers(100, 1000), st.integers(2, 20)), min_size=1, max_size=9
)


def milliseconds(cost: Cost) -> float:
    return 2 + 3 * cost.decode_macs / 1000 + cost.linears / 20 + 4 * cost.size_bytes / 200


@given(some_costs, some_costs, st.integers(0, 9))
def test_what_is_foretold_is_the_mean_of_all_that_could_be_so_by_its_likelihood(
    known: list[Cost], asked: list[Cost], seed: int
) -> None:
    generator = np.random.default_rng(seed)
    timings = [(cost, Timing(milliseconds(cost) * generator.uniform(0.9, 1.1), 0.3)) for cost in known]
    unit = np.mean([one.value for _, one in timings])
    rows = np.array([[1, c.decode_macs / 1000, c.linears / 20, c.size_bytes / 200] for c in (*known, *asked)])
    weights, means, squares = [], [], []
    for misfit in timing_order._MODEL_ERRORS:
        # The joint normal distribution of all times, given those that were seen (Bishop 2006, eq. 2.81).
        joint = 0.25 * rows @ rows.T + misfit**2 * np.eye(len(rows))
        seen = len(known)
        joint[:seen, :seen] += np.diag([(one.error / unit) ** 2 for _, one in timings])
        apart = np.array([one.value / unit for _, one in timings]) - 0.25 * rows[:seen].sum(axis=1)
        inverse = np.linalg.inv(joint[:seen, :seen])
        weights.append(np.exp(-apart @ inverse @ apart / 2) / np.sqrt(np.linalg.det(joint[:seen, :seen])))
        mean = 0.25 * rows[seen:].sum(axis=1) + joint[seen:, :seen] @ inverse @ apart
        variance = joint[seen:, seen:] - joint[seen:, :seen] @ inverse @ joint[:seen, seen:]
        means.append(mean)
        squares.append(variance.diagonal() + mean**2)
    share = np.array(weights) / np.sum(weights)
    expected = share @ np.array(means)
    deviation = np.sqrt(share @ np.array(squares) - expected**2)
    found = predict_latency(timings, asked, ORIGINAL)
    np.testing.assert_allclose(found[0], unit * expected, rtol=1e-6)
    np.testing.assert_allclose(found[1], unit * deviation, rtol=1e-4)


def test_times_that_follow_the_costs_are_found_and_the_error_is_no_smaller_than_it_should_be() -> None:
    generator = np.random.default_rng(0)
    misses = []
    for _ in range(200):
        costs = [
            Cost(
                int(generator.integers(20, 200)),
                int(generator.integers(100, 1000)),
                int(generator.integers(2, 20)),
            )
            for _ in range(9)
        ]
        known = [(cost, Timing(milliseconds(cost) + generator.normal(0, 0.3), 0.3)) for cost in costs[:8]]
        mean, deviation = predict_latency(known, costs[8:], ORIGINAL)
        misses.append((mean[0] - milliseconds(costs[8])) / deviation[0])
    assert np.mean(np.abs(misses) > 2) < 0.05
    assert np.std(misses) > 0.3


def rival(size: int, accuracy: float, macs: int = 1000) -> Rival:
    return Rival({"size_bytes": size, "accuracy": accuracy}, Cost(size, macs, 20))


RIVALS = {"best": rival(50, 0.4), "larger": rival(80, 0.5), "worse": rival(90, 0.3, macs=900)}


def test_those_as_good_as_no_other_are_timed_first_however_slow() -> None:
    order = []
    waiting = ["worse", "best", "larger"]
    timings = {"best": {"decode_ms": Timing(1.0, 0.01)}, "original": {"decode_ms": Timing(9.0, 0.1)}}
    while (id := next_timed(waiting, RIVALS, timings, PLAN)) is not None:
        waiting.remove(id)
        order.append(id)
    assert order[:2] == ["best", "larger"]


@pytest.mark.parametrize("error", [0.01, 5.0])
def test_who_is_surely_slower_than_one_that_is_better_in_the_rest_is_not_timed(error: float) -> None:
    sizes = range(20, 200, 20)
    rivals = {str(size): rival(size, size / 1000) for size in sizes}
    beaten = rivals | {"beaten": rival(170, 0.05, macs=990)}
    timings = {id: {"decode_ms": Timing(milliseconds(one.cost), error)} for id, one in rivals.items()}
    assert next_timed(["beaten"], beaten, timings, PLAN) == (None if error < 1 else "beaten")


def test_a_rival_that_was_not_timed_beats_nobody() -> None:
    original = {"original": {"decode_ms": Timing(9.0, 0.001)}}
    assert next_timed(["worse"], RIVALS, original, PLAN) == "worse"
    assert next_timed(["worse"], RIVALS, {}, PLAN) == "worse"


def test_nobody_waits_nobody_is_next() -> None:
    assert next_timed([], RIVALS, {}, PLAN) is None
