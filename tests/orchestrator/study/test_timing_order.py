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


def latency_ms(cost: Cost) -> float:
    return 2 + 3 * cost.decode_macs / 1000 + cost.linears / 20 + 4 * cost.size_bytes / 200


@given(some_costs, some_costs, st.integers(0, 9))
def test_the_prediction_is_the_likelihood_weighted_mean_of_all_models(
    timed_costs: list[Cost], new_costs: list[Cost], seed: int
) -> None:
    generator = np.random.default_rng(seed)
    timings = [(cost, Timing(latency_ms(cost) * generator.uniform(0.9, 1.1), 0.3)) for cost in timed_costs]
    unit = np.mean([timing.value for _, timing in timings])
    rows = np.array(
        [
            [1, cost.decode_macs / 1000, cost.linears / 20, cost.size_bytes / 200]
            for cost in (*timed_costs, *new_costs)
        ]
    )
    weights, means, squares = [], [], []
    for model_error in timing_order._MODEL_ERRORS:
        # The joint normal distribution of all times, given the measured ones (Bishop 2006, eq. 2.81).
        joint = 0.25 * rows @ rows.T + model_error**2 * np.eye(len(rows))
        count = len(timed_costs)
        joint[:count, :count] += np.diag([(timing.error / unit) ** 2 for _, timing in timings])
        residuals = np.array([timing.value / unit for _, timing in timings]) - 0.25 * rows[:count].sum(axis=1)
        inverse = np.linalg.inv(joint[:count, :count])
        weights.append(
            np.exp(-residuals @ inverse @ residuals / 2) / np.sqrt(np.linalg.det(joint[:count, :count]))
        )
        mean = 0.25 * rows[count:].sum(axis=1) + joint[count:, :count] @ inverse @ residuals
        variance = joint[count:, count:] - joint[count:, :count] @ inverse @ joint[:count, count:]
        means.append(mean)
        squares.append(variance.diagonal() + mean**2)
    share = np.array(weights) / np.sum(weights)
    expected = share @ np.array(means)
    deviation = np.sqrt(share @ np.array(squares) - expected**2)
    predicted = predict_latency(timings, new_costs, ORIGINAL)
    np.testing.assert_allclose(predicted[0], unit * expected, rtol=1e-6)
    np.testing.assert_allclose(predicted[1], unit * deviation, rtol=1e-4)


def test_latencies_that_follow_the_costs_are_predicted_with_a_sufficient_error() -> None:
    generator = np.random.default_rng(0)
    normalized_errors = []
    for _ in range(200):
        costs = [
            Cost(
                int(generator.integers(20, 200)),
                int(generator.integers(100, 1000)),
                int(generator.integers(2, 20)),
            )
            for _ in range(9)
        ]
        timings = [(cost, Timing(latency_ms(cost) + generator.normal(0, 0.3), 0.3)) for cost in costs[:8]]
        mean, deviation = predict_latency(timings, costs[8:], ORIGINAL)
        normalized_errors.append((mean[0] - latency_ms(costs[8])) / deviation[0])
    assert np.mean(np.abs(normalized_errors) > 2) < 0.05
    assert np.std(normalized_errors) > 0.3


def rival(size: int, accuracy: float, macs: int = 1000) -> Rival:
    return Rival({"size_bytes": size, "accuracy": accuracy}, Cost(size, macs, 20))


RIVALS = {"best": rival(50, 0.4), "larger": rival(80, 0.5), "worse": rival(90, 0.3, macs=900)}


def test_nondominated_candidates_are_timed_first_even_if_they_are_slow() -> None:
    order = []
    waiting = ["worse", "best", "larger"]
    timings = {"best": {"decode_ms": Timing(1.0, 0.01)}, "original": {"decode_ms": Timing(9.0, 0.1)}}
    while (id := next_timed(waiting, RIVALS, timings, PLAN)) is not None:
        waiting.remove(id)
        order.append(id)
    assert order[:2] == ["best", "larger"]


@pytest.mark.parametrize("error", [0.01, 5.0])
def test_certainly_dominated_candidates_are_not_timed(error: float) -> None:
    sizes = range(20, 200, 20)
    rivals = {str(size): rival(size, size / 1000) for size in sizes}
    candidates = rivals | {"dominated": rival(170, 0.05, macs=990)}
    timings = {
        id: {"decode_ms": Timing(latency_ms(candidate.cost), error)} for id, candidate in rivals.items()
    }
    assert next_timed(["dominated"], candidates, timings, PLAN) == (None if error < 1 else "dominated")


def test_an_untimed_rival_dominates_no_candidate() -> None:
    original = {"original": {"decode_ms": Timing(9.0, 0.001)}}
    assert next_timed(["worse"], RIVALS, original, PLAN) == "worse"
    assert next_timed(["worse"], RIVALS, {}, PLAN) == "worse"


def test_without_pending_candidates_no_timing_is_next() -> None:
    assert next_timed([], RIVALS, {}, PLAN) is None
