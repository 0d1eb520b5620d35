"""The surrogate search and its parts: encoding, Gaussian processes, expected improvement."""

from __future__ import annotations

import math
from collections.abc import Mapping

import moocore
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jobs.job import Failure
from jobs.knobs import Choice, Range, Value
from orchestrator import search
from orchestrator.pareto.expected_improvement import (
    Prediction,
    cells,
    expected_improvement,
    probability_of_improvement,
)
from orchestrator.pareto.front import Objective, ParetoFront
from orchestrator.pareto.warping import Warping
from orchestrator.search.encoding import SpaceEncoder
from orchestrator.search.features import Features
from orchestrator.search.gaussian_process import GaussianProcess, ObjectiveModel, _Covariance
from orchestrator.search.search import Search

SPACE = {
    "depth": Range(0, 6, integer=True),
    "keep": Range(0.3, 1.0),
    "rate": Range(1e-5, 1e-2, log=True),
    "steps": Range(1, 100, integer=True, log=True),
    "bits": Choice((8, 3, 4)),
    "one": Choice((5,)),
    "stage": Choice(("skip", "svd", "asvd")),
    "stage.svd.rank": Choice((16, 32, 64)),
    "stage.asvd.alpha": Range(0.0, 1.0),
}


def make_encoder() -> SpaceEncoder:
    return SpaceEncoder(SPACE)


# Encoding


def test_encoded_choices_are_decoded_without_loss() -> None:
    encoder = make_encoder()
    for point in encoder.uniform(200, np.random.default_rng(0)):
        choices = encoder.choices(point)
        assert all(choices[knob] in domain for knob, domain in SPACE.items())
        np.testing.assert_allclose(encoder.point(choices), point, atol=1e-9)


def test_ordered_values_are_encoded_in_their_order_whatever_the_order_of_the_list() -> None:
    encoder = make_encoder()
    base = encoder.choices(encoder.uniform(1, np.random.default_rng(0))[0])
    coordinates = [encoder.point({**base, "bits": bits})[4] for bits in (3, 4, 8)]
    assert coordinates == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("draw", ["uniform", "levelled", "neighbours"])
def test_sampled_points_have_valid_values_and_inactive_knobs_their_first_value(draw: str) -> None:
    encoder, generator = make_encoder(), np.random.default_rng(1)
    points = encoder.uniform(300, generator)
    if draw == "levelled":
        points = encoder.levelled(300, generator)
    if draw == "neighbours":
        points = encoder.neighbours(points, 300, generator)
    for point in points:
        choices = encoder.choices(point)
        np.testing.assert_allclose(encoder.point(choices), point, atol=1e-9)
        assert choices["stage"] == "svd" or choices["stage.svd.rank"] == 16
        assert choices["stage"] == "asvd" or choices["stage.asvd.alpha"] == 0.0


def test_a_neighbour_differs_from_its_parent_in_few_active_knobs() -> None:
    encoder = SpaceEncoder({f"x{i}": Choice((1, 2, 3, 4)) for i in range(40)})
    generator = np.random.default_rng(2)
    parent = encoder.uniform(1, generator)
    changed = (encoder.neighbours(parent, 500, generator) != parent).sum(axis=1)
    assert changed.max() < 12
    assert 0.8 < changed.mean() < 3


def test_equivalent_choices_are_proposed_once() -> None:
    algorithm = search.make("surrogate", {"stage": Choice(("skip", "svd")), "stage.svd.rank": Choice((1, 2, 3))}, [
        Objective("error")
    ])  # fmt: skip
    proposals = algorithm.ask(10)
    assert len(proposals) == 4
    assert sorted(choices["stage.svd.rank"] for choices in proposals if choices["stage"] == "svd") == [
        1,
        2,
        3,
    ]


# Gaussian processes


def rows_of(encoder: SpaceEncoder, count: int, seed: int) -> tuple[Features, np.ndarray]:
    points = encoder.uniform(count, np.random.default_rng(seed))
    features = Features(encoder.axes)
    return features, features.rows(points, encoder.active(points))


def test_rows_hold_effects_and_distances_of_active_knobs() -> None:
    encoder = SpaceEncoder({"bits": Choice((2, 4, 8)), "kind": Choice(("a", "b"))})
    features = Features(encoder.axes)
    points = np.array([[0.0, 0.0], [0.5, 1.0], [1.0, 0.0]])
    rows = features.rows(points, encoder.active(points))
    differences = rows[:, None, features.distances] - rows[None, :, features.distances]
    squares = [[0, 0.25 + 1, 1], [0.25 + 1, 0, 0.25 + 1], [1, 0.25 + 1, 0]]
    np.testing.assert_allclose((differences**2).sum(axis=2), squares)
    effects = rows[:, features.effects]
    np.testing.assert_allclose(effects[:, :2] * math.sqrt(2), [[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5]])
    np.testing.assert_allclose(effects[:, 2:], [[0.5, -0.5], [-0.5, 0.5], [0.5, -0.5]])


def test_the_gradient_of_the_evidence_equals_finite_differences() -> None:
    features, rows = rows_of(make_encoder(), 30, 0)
    generator = np.random.default_rng(0)
    y = generator.normal(size=30)
    parameters = generator.normal(size=2 * features.count + 3) * 0.5 - 0.5
    _, gradient = _Covariance.of(parameters, features).evidence(rows, y)
    for index in range(len(parameters)):
        step = np.zeros(len(parameters))
        step[index] = 1e-5
        higher, _ = _Covariance.of(parameters + step, features).evidence(rows, y)
        lower, _ = _Covariance.of(parameters - step, features).evidence(rows, y)
        assert gradient[index] == pytest.approx((higher - lower) / 2e-5, rel=1e-4, abs=1e-5)


def test_the_evidence_is_a_normal_density_and_predictions_are_its_conditionals() -> None:
    features, rows = rows_of(make_encoder(), 24, 1)
    y = np.sin(3 * rows[:, features.distances].sum(axis=1))
    process = GaussianProcess(features)
    process.fit(rows[:16], y[:16])
    covariance = process._covariance
    observed_covariance = covariance.between(rows[:16], rows[:16]) + covariance.noise * np.eye(16)
    scaled = (y[:16] - y[:16].mean()) / y[:16].std()
    assert covariance.evidence(rows[:16], scaled)[0] == pytest.approx(
        float(stats.multivariate_normal.logpdf(scaled, cov=observed_covariance))
    )
    cross_covariance = covariance.between(rows[16:], rows[:16])
    mean, deviation = process.predict(rows[16:])
    np.testing.assert_allclose(
        mean,
        y[:16].mean() + y[:16].std() * cross_covariance @ np.linalg.solve(observed_covariance, scaled),
        rtol=1e-6,
    )
    variance = np.diag(
        covariance.between(rows[16:], rows[16:])
        - cross_covariance @ np.linalg.solve(observed_covariance, cross_covariance.T)
    )
    np.testing.assert_allclose(deviation, y[:16].std() * np.sqrt(variance), rtol=1e-4)


def test_incremental_updates_equal_a_fit_to_all_results() -> None:
    features, rows = rows_of(make_encoder(), 240, 1)
    y = np.sin(3 * rows[:, features.distances].sum(axis=1))
    process = GaussianProcess(features)
    process.fit(rows[:210], y[:210])
    learned = process._covariance
    for subset in (slice(0, 210), slice(0, 211), slice(0, 214), slice(1, 215), slice(5, 215)):
        process.fit(rows[subset], y[subset])
        assert process._covariance is learned
        observed, values = rows[subset], y[subset]
        observed_covariance = learned.between(observed, observed) + learned.noise * np.eye(len(observed))
        cross_covariance = learned.between(rows[215:], observed)
        mean, deviation = process.predict(rows[215:])
        scaled = (values - values.mean()) / values.std()
        np.testing.assert_allclose(
            mean,
            values.mean() + values.std() * cross_covariance @ np.linalg.solve(observed_covariance, scaled),
            rtol=1e-6,
        )
        variance = np.diag(
            learned.between(rows[215:], rows[215:])
            - cross_covariance @ np.linalg.solve(observed_covariance, cross_covariance.T)
        )
        np.testing.assert_allclose(deviation, values.std() * np.sqrt(variance), rtol=1e-4)
        assert np.array_equal(process.mean(rows[215:]), mean)


def test_pending_results_reduce_the_deviation_as_if_they_equalled_their_predictions() -> None:
    features, rows = rows_of(make_encoder(), 40, 1)
    y = np.sin(3 * rows[:, features.distances].sum(axis=1))
    process = GaussianProcess(features)
    process.fit(rows[:20], y[:20])
    observed, pending, new_rows = rows[:20], rows[20:23], rows[23:]
    mean, deviation = process.predict(new_rows, pending)
    assert np.array_equal(mean, process.predict(new_rows)[0])
    covariance, observed_and_pending = process._covariance, np.concatenate([observed, pending])
    joint_covariance = covariance.between(
        observed_and_pending, observed_and_pending
    ) + covariance.noise * np.eye(23)
    cross_covariance = covariance.between(new_rows, observed_and_pending)
    variance = np.diag(
        covariance.between(new_rows, new_rows)
        - cross_covariance @ np.linalg.solve(joint_covariance, cross_covariance.T)
    )
    np.testing.assert_allclose(deviation, y[:20].std() * np.sqrt(variance), rtol=1e-4)
    assert (process.predict(pending, pending)[1] < 0.7 * process.predict(pending)[1]).all()


def test_additive_effects_of_many_knobs_are_learned_from_few_results() -> None:
    encoder = SpaceEncoder({f"x{i}": Choice((2, 3, 4, 8)) for i in range(30)})
    features, rows = rows_of(encoder, 220, 3)
    generator = np.random.default_rng(3)
    weights = np.where(generator.random(30) < 0.2, generator.normal(size=30), 0.02)
    values = encoder.uniform(220, np.random.default_rng(3)) ** 2 @ weights
    process = GaussianProcess(features)
    process.fit(rows[:70], values[:70])
    mean, deviation = process.predict(rows[70:])
    assert np.corrcoef(mean, values[70:])[0, 1] > 0.95
    # The predicted deviations cover the errors and are small relative to the values.
    assert np.sqrt(np.mean(((mean - values[70:]) / deviation) ** 2)) < 1.5
    assert deviation.mean() < 0.3 * values.std()


def test_pure_interactions_of_knobs_are_learned() -> None:
    encoder = SpaceEncoder({"a": Range(-1.0, 1.0), "b": Range(-1.0, 1.0), "c": Range(-1.0, 1.0)})
    features, rows = rows_of(encoder, 200, 4)
    points = 2 * encoder.uniform(200, np.random.default_rng(4)) - 1
    values = points[:, 0] * points[:, 1]
    process = GaussianProcess(features)
    process.fit(rows[:60], values[:60])
    assert np.corrcoef(process.predict(rows[60:])[0], values[60:])[0, 1] > 0.9


def test_noise_is_distinguished_from_effects() -> None:
    features, rows = rows_of(make_encoder(), 120, 5)
    process = GaussianProcess(features)
    process.fit(rows, np.random.default_rng(5).normal(size=120))
    mean, _ = process.predict(rows)
    assert mean.std() < 0.5


def test_multiplicative_objectives_are_modelled_by_their_logarithm_and_additive_ones_are_not() -> None:
    encoder = SpaceEncoder({f"x{i}": Range(0.0, 1.0) for i in range(5)})
    features, rows = rows_of(encoder, 60, 6)
    total = encoder.uniform(60, np.random.default_rng(6)).sum(axis=1)
    multiplicative, additive = ObjectiveModel(features), ObjectiveModel(features)
    multiplicative.fit(rows, np.exp(2 * total), rows)
    additive.fit(rows, total, rows)
    assert multiplicative.predict(rows).warping.logarithm
    assert not additive.predict(rows).warping.logarithm


def test_one_result_and_equal_results_can_be_modelled() -> None:
    features, rows = rows_of(make_encoder(), 10, 7)
    for count in (1, 10):
        process = ObjectiveModel(features)
        process.fit(rows[:count], np.full(count, 3.0), rows)
        assert np.isfinite(process.predict(rows).mean).all()


def test_warping_compresses_outliers_and_keeps_the_order() -> None:
    losses = np.array([1.0, 1.1, 1.2, 1.3, 1.4, 5.0, 1e3, 1e9])
    for logarithm in (False, True):
        warping = Warping.fit(losses[:6], logarithm)
        warped = warping.warp(losses)
        assert (np.diff(warped) > 0).all()
        np.testing.assert_allclose(warping.unwarp(warped), losses, rtol=1e-9)
        assert np.ptp(warped) < 40 * np.ptp(warped[:5])
        slopes = (warping.warp(losses * (1 + 1e-7)) - warping.warp(losses * (1 - 1e-7))) / (2e-7 * losses)
        assert warping.log_derivative(losses) == pytest.approx(float(np.log(slopes).sum()), rel=1e-5)


# Expected improvement

fronts = st.integers(1, 4).flatmap(
    lambda objectives: st.lists(
        st.lists(st.integers(0, 8), min_size=objectives, max_size=objectives), min_size=1, max_size=12
    )
)


@given(fronts)
@settings(max_examples=80, deadline=None)
def test_the_cells_partition_the_nondominated_space(front: list[list[int]]) -> None:
    points = np.array(front, dtype=np.float64)
    reference = np.full(points.shape[1], 7.0)
    low, high = cells(points, reference)
    volume = float(np.prod(high - np.maximum(low, -1.0), axis=1).sum())
    dominated = float(moocore.hypervolume(points, ref=reference))
    assert volume + dominated == pytest.approx(8.0 ** points.shape[1])


@given(fronts, st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_the_expected_improvement_of_known_values_is_their_gain_of_hypervolume(
    front: list[list[int]], seed: int
) -> None:
    points = np.array(front, dtype=np.float64)
    reference = np.full(points.shape[1], 7.0)
    candidates = np.random.default_rng(seed).uniform(0, 9, size=(5, points.shape[1]))
    predictions = [Prediction(column, np.zeros(5)) for column in candidates.T]
    initial = moocore.hypervolume(points, ref=reference)
    gains = [
        moocore.hypervolume(np.vstack([points, candidate]), ref=reference) - initial
        for candidate in candidates
    ]
    np.testing.assert_allclose(expected_improvement(points, reference, predictions), gains, atol=1e-9)


def test_the_expected_improvement_is_the_mean_of_sampled_improvements() -> None:
    generator = np.random.default_rng(0)
    front = np.array([[1.0, 4.0], [2.0, 2.5], [4.0, 1.0]])
    reference = np.array([6.0, 6.0])
    size, quality = 1.5, generator.normal(3.0, 1.0, size=4000)
    initial = moocore.hypervolume(front, ref=reference)
    improvements = [
        moocore.hypervolume(np.vstack([front, [size, value]]), ref=reference) - initial for value in quality
    ]
    predictions = [Prediction(np.array([size]), np.zeros(1)), Prediction(np.array([3.0]), np.ones(1))]
    assert expected_improvement(front, reference, predictions)[0] == pytest.approx(
        np.mean(improvements), rel=0.05
    )


# The search


def additive_problem(knobs: int) -> tuple[Mapping[str, Choice], np.ndarray]:
    space = {f"layer{i}": Choice((2, 3, 4, 8)) for i in range(knobs)}
    weights = np.exp(np.random.default_rng(9).normal(size=knobs))
    return space, weights


def test_the_surrogate_exceeds_other_searches_on_bits_of_many_layers() -> None:
    space, weights = additive_problem(24)
    layer_loss = {2: 3.0, 3: 0.8, 4: 0.2, 8: 0.0}
    objectives = [Objective("size"), Objective("perplexity")]

    def size(choices: Mapping[str, Value]) -> dict[str, float]:
        return {"size": float(sum(float(bits) for bits in choices.values()))}

    def volume(name: str) -> float:
        algorithm, front = search.make(name, space, objectives, size, seed=0), ParetoFront(objectives)
        for turn in range(60):
            for choices in algorithm.ask(1):
                losses = [
                    weight * layer_loss[int(bits)]
                    for weight, bits in zip(weights, choices.values(), strict=True)
                ]
                metrics = {**size(choices), "perplexity": 30 * math.exp(sum(losses) / weights.sum())}
                algorithm.tell([(choices, metrics)])
                front.add(str(turn), metrics)
        return front.hypervolume({"size": 200.0, "perplexity": 200.0})

    surrogate = volume("surrogate")
    assert surrogate > 1.05 * max(volume("random"), volume("nsga2"), volume("tpe"))


def test_failing_choices_are_proposed_less() -> None:
    space = {"technique": Choice(("good", "broken")), **{f"x{i}": Range(0.0, 1.0) for i in range(6)}}
    algorithm = search.make("surrogate", space, [Objective("error")], seed=0)
    broken_proposals = 0
    for turn in range(40):
        for choices in algorithm.ask(1):
            fails = choices["technique"] == "broken"
            broken_proposals += fails and turn >= 15
            error = sum(float(choices[f"x{i}"]) - 0.4 for i in range(6)) ** 2
            algorithm.tell([(choices, Failure("bug", "") if fails else {"error": error})])
    assert broken_proposals <= 6


def test_a_batch_is_diverse() -> None:
    space, weights = additive_problem(8)
    objectives = [Objective("size"), Objective("loss")]

    def size(choices: Mapping[str, Value]) -> dict[str, float]:
        return {"size": float(sum(float(bits) for bits in choices.values()))}

    algorithm = search.make("surrogate", space, objectives, size, seed=0)
    for _ in range(20):
        (choices,) = algorithm.ask(1)
        loss = sum(weight / float(bits) for weight, bits in zip(weights, choices.values(), strict=True))
        algorithm.tell([(choices, {**size(choices), "loss": float(loss)})])
    assert len({size(choices)["size"] for choices in algorithm.ask(8)}) >= 5


def test_an_objective_may_become_known_during_the_search() -> None:
    measured: dict[str, float] = {}
    space = {"bits": Choice((2, 3, 4, 8)), "ratio": Range(0.0, 1.0)}

    def known_metrics(choices: Mapping[str, Value]) -> dict[str, float]:
        return {"decode_ms": measured["unit"] * float(choices["bits"])} if measured else {}

    objectives = [Objective("decode_ms", limit=10.0), Objective("error")]
    algorithm = search.make("surrogate", space, objectives, known_metrics, seed=0)
    for turn in range(25):
        for choices in algorithm.ask(1):
            decode_ms = 2.0 * float(choices["bits"])
            assert turn <= 12 or decode_ms <= 10
            algorithm.tell([(choices, {"decode_ms": decode_ms, "error": float(choices["ratio"])})])
        if turn == 12:
            measured["unit"] = 2.0


def search_with_results(results: int) -> Search:
    """Return a search with this many results, whose loss increases with x and decreases with size."""
    space = {"x": Range(0.0, 1.0), "size": Range(0, 9, integer=True)}
    objectives = [Objective("size"), Objective("loss", limit=30.0)]
    algorithm = search.make(
        "surrogate", space, objectives, lambda choices: {"size": float(choices["size"])}, seed=0
    )
    for turn in range(results):
        choices = {"x": round(0.1 + 0.9 * (0.618 * turn % 1), 3), "size": turn % 10}
        loss = 10 * choices["x"] + 20 - choices["size"] + 0.2 * math.sin(3 * turn)
        algorithm.tell([(choices, {"loss": loss})])
    return algorithm


def test_certainly_dominated_choices_have_no_probability_of_improvement() -> None:
    dominated, better, smaller = {"x": 0.95, "size": 8}, {"x": 0.0, "size": 9}, {"x": 0.02, "size": 0}
    probabilities = search_with_results(30).probability_of_improvement([dominated, better, smaller])
    assert probabilities[0] < 0.01
    assert min(probabilities[1:]) > 0.1
    assert search_with_results(11).probability_of_improvement([dominated]) == [1.0]


def test_choices_over_a_limit_have_no_probability_of_improvement_and_incomplete_choices_may_have_any() -> (
    None
):
    space = {"x": Range(0.0, 1.0), "size": Range(0, 9, integer=True)}
    algorithm = search.make("surrogate", space, [Objective("loss", limit=5.0)], seed=0)
    for turn in range(20):
        algorithm.tell([({"x": turn / 19, "size": turn % 10}, {"loss": 100.0 - 10 * turn / 19})])
    assert algorithm.probability_of_improvement([{"x": 0.5, "size": 3}])[0] < 1e-6
    assert algorithm.probability_of_improvement([{"x": 0.5}]) == [1.0]


def test_the_deviation_of_results_is_calibrated_by_leave_one_out_errors() -> None:
    generator = np.random.default_rng(0)
    encoder = SpaceEncoder({f"x{i}": Range(0.0, 1.0) for i in range(3)})
    points = encoder.uniform(25, generator)
    features = Features(encoder.axes)
    rows = features.rows(points, encoder.active(points))
    values = points[:, 0] + np.sin(40 * points[:, 1])
    process = GaussianProcess(features)
    process.fit(rows, values)
    noise = process._covariance.noise
    covariance = process._covariance.between(rows, rows) + noise * np.eye(25)
    y = (values - values.mean()) / values.std()
    errors, predicted_deviations = [], []
    for index in range(25):
        remaining = np.arange(25) != index
        weights = np.linalg.solve(covariance[np.ix_(remaining, remaining)], covariance[remaining, index])
        errors.append(y[index] - weights @ y[remaining])
        predicted_deviations.append(
            math.sqrt(covariance[index, index] - weights @ covariance[remaining, index])
        )
    new_rows = encoder.uniform(40, generator)
    new_rows = features.rows(new_rows, encoder.active(new_rows))
    calibration = math.sqrt(np.mean(np.square(np.divide(errors, predicted_deviations))))
    calibrated = max(calibration, 1.0) * np.hypot(
        process.predict(new_rows)[1], values.std() * math.sqrt(noise)
    )
    minimum = values.std() * math.sqrt(np.mean(np.square(errors)))
    mean, deviation = process.predict_result(new_rows)
    np.testing.assert_allclose(mean, process.predict(new_rows)[0])
    np.testing.assert_allclose(deviation, np.maximum(calibrated, minimum), rtol=1e-6)


@pytest.mark.parametrize("uncertain", [1, 2])
def test_the_probability_of_improvement_is_at_least_that_of_many_samples(uncertain: int) -> None:
    generator = np.random.default_rng(uncertain)
    front = np.array([[0.1, 0.9, 0.5], [0.4, 0.5, 0.5], [0.8, 0.2, 0.5], [0.5, 0.5, 0.1]])
    limits = np.array([np.inf, np.inf, 0.9])
    means = generator.uniform(0.2, 1.0, (20, 3))
    deviations = np.array([0.0, 0.2 * (uncertain > 1), 0.2])
    predictions = [
        Prediction(mean, np.full(20, deviation)) for mean, deviation in zip(means.T, deviations, strict=True)
    ]
    probabilities = probability_of_improvement(front, limits, predictions)
    samples = means + deviations * generator.normal(size=(20_000, 20, 3))
    dominated = (samples[:, :, None] >= front).all(axis=3).any(axis=2)
    frequencies = (~dominated & (samples <= limits).all(axis=2)).mean(axis=0)
    assert (probabilities >= frequencies - 0.015).all()
    assert probabilities.min() < 0.2
    without_limits = probability_of_improvement(front, np.full(3, np.inf), predictions)
    if uncertain == 1:
        np.testing.assert_allclose(without_limits, 1 - dominated.mean(axis=0), atol=0.015)


def test_the_search_continues_if_noise_exceeds_the_differences() -> None:
    generator = np.random.default_rng(0)
    algorithm = search.make("surrogate", SPACE, [Objective("a"), Objective("b", "max")], seed=0)
    for _ in range(30):
        algorithm.tell(
            [(choices, {"a": generator.normal(), "b": generator.normal()}) for choices in algorithm.ask(1)]
        )
    assert len(algorithm.ask(4)) == 4


def test_reported_choices_are_not_evaluated_again_at_each_result() -> None:
    evaluated: list[tuple[Value, ...]] = []

    def known_metrics(choices: Mapping[str, Value]) -> dict[str, float]:
        evaluated.append(tuple(choices.values()))
        return {"size": float(choices["x0"])}

    space = {f"x{index}": Range(0, 9, integer=True) for index in range(8)}
    algorithm = search.make("surrogate", space, [Objective("size"), Objective("loss")], known_metrics)
    reported = []
    for _ in range(30):
        (choices,) = algorithm.ask(1)
        reported.append(tuple(choices.values()))
        algorithm.tell([(choices, {"loss": float(sum(reported[-1]))})])
    evaluated.clear()
    algorithm.ask(1)
    assert evaluated
    assert not set(reported[:-1]) & set(evaluated)


def test_of_equally_promising_choices_the_cheaper_is_tried_first() -> None:
    space = {"kind": Choice(("cheap", "dear")), **{f"x{i}": Range(0.0, 1.0) for i in range(3)}}

    def known_metrics(choices: Mapping[str, Value]) -> dict[str, float]:
        return {"seconds": 1.0 if choices["kind"] == "cheap" else 50.0}

    algorithm = search.make("surrogate", space, [Objective("a"), Objective("b")], known_metrics, seed=0)
    kinds = []
    for _ in range(30):
        for choices in algorithm.ask(1):
            kinds.append(choices["kind"])
            x = [float(choices[f"x{i}"]) for i in range(3)]
            algorithm.tell([(choices, {"a": x[0] + x[2], "b": 1 - x[0] + x[1]})])
    assert kinds[10:].count("cheap") > 15
