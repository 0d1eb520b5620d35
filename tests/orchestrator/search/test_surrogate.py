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


# Points


def test_choices_come_back_from_their_points() -> None:
    encoder = make_encoder()
    for point in encoder.uniform(200, np.random.default_rng(0)):
        choices = encoder.choices(point)
        assert all(choices[knob] in domain for knob, domain in SPACE.items())
        np.testing.assert_allclose(encoder.point(choices), point, atol=1e-9)


def test_values_stand_in_their_order_whatever_order_they_are_given_in() -> None:
    encoder = make_encoder()
    base = encoder.choices(encoder.uniform(1, np.random.default_rng(0))[0])
    along = [encoder.point({**base, "bits": bits})[4] for bits in (3, 4, 8)]
    assert along == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("draw", ["uniform", "levelled", "neighbours"])
def test_what_is_drawn_is_on_values_and_idle_knobs_are_at_their_first(draw: str) -> None:
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


def test_a_neighbour_differs_from_its_parent_in_few_knobs_that_matter() -> None:
    encoder = SpaceEncoder({f"x{i}": Choice((1, 2, 3, 4)) for i in range(40)})
    generator = np.random.default_rng(2)
    parent = encoder.uniform(1, generator)
    changed = (encoder.neighbours(parent, 500, generator) != parent).sum(axis=1)
    assert changed.max() < 12
    assert 0.8 < changed.mean() < 3


def test_choices_that_mean_the_same_are_asked_once() -> None:
    trying = search.make("surrogate", {"stage": Choice(("skip", "svd")), "stage.svd.rank": Choice((1, 2, 3))}, [
        Objective("error")
    ])  # fmt: skip
    asked = trying.ask(10)
    assert len(asked) == 4
    assert sorted(c["stage.svd.rank"] for c in asked if c["stage"] == "svd") == [1, 2, 3]


# Beliefs


def rows_of(encoder: SpaceEncoder, count: int, seed: int) -> tuple[Features, np.ndarray]:
    points = encoder.uniform(count, np.random.default_rng(seed))
    features = Features(encoder.axes)
    return features, features.rows(points, encoder.active(points))


def test_rows_tell_effects_and_distances_of_the_knobs_that_act() -> None:
    encoder = SpaceEncoder({"bits": Choice((2, 4, 8)), "kind": Choice(("a", "b"))})
    features = Features(encoder.axes)
    points = np.array([[0.0, 0.0], [0.5, 1.0], [1.0, 0.0]])
    rows = features.rows(points, encoder.active(points))
    apart = rows[:, None, features.distances] - rows[None, :, features.distances]
    squares = [[0, 0.25 + 1, 1], [0.25 + 1, 0, 0.25 + 1], [1, 0.25 + 1, 0]]
    np.testing.assert_allclose((apart**2).sum(axis=2), squares)
    effects = rows[:, features.effects]
    np.testing.assert_allclose(effects[:, :2] * math.sqrt(2), [[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5]])
    np.testing.assert_allclose(effects[:, 2:], [[0.5, -0.5], [-0.5, 0.5], [0.5, -0.5]])


def test_the_slope_of_the_evidence_is_that_of_its_differences() -> None:
    features, rows = rows_of(make_encoder(), 30, 0)
    generator = np.random.default_rng(0)
    y = generator.normal(size=30)
    at = generator.normal(size=2 * features.count + 3) * 0.5 - 0.5
    _, slope = _Covariance.of(at, features).evidence(rows, y)
    for number in range(len(at)):
        step = np.zeros(len(at))
        step[number] = 1e-5
        higher, _ = _Covariance.of(at + step, features).evidence(rows, y)
        lower, _ = _Covariance.of(at - step, features).evidence(rows, y)
        assert slope[number] == pytest.approx((higher - lower) / 2e-5, rel=1e-4, abs=1e-5)


def test_the_evidence_is_the_density_of_a_normal_and_predictions_are_its_conditionals() -> None:
    features, rows = rows_of(make_encoder(), 24, 1)
    y = np.sin(3 * rows[:, features.distances].sum(axis=1))
    process = GaussianProcess(features)
    process.fit(rows[:16], y[:16])
    covariance = process._covariance
    known = covariance.between(rows[:16], rows[:16]) + covariance.noise * np.eye(16)
    scaled = (y[:16] - y[:16].mean()) / y[:16].std()
    assert covariance.evidence(rows[:16], scaled)[0] == pytest.approx(
        float(stats.multivariate_normal.logpdf(scaled, cov=known))
    )
    across = covariance.between(rows[16:], rows[:16])
    mean, deviation = process.predict(rows[16:])
    np.testing.assert_allclose(
        mean, y[:16].mean() + y[:16].std() * across @ np.linalg.solve(known, scaled), rtol=1e-6
    )
    left = np.diag(covariance.between(rows[16:], rows[16:]) - across @ np.linalg.solve(known, across.T))
    np.testing.assert_allclose(deviation, y[:16].std() * np.sqrt(left), rtol=1e-4)


def test_results_that_are_added_or_changed_count_as_if_all_were_taken_in_at_once() -> None:
    features, rows = rows_of(make_encoder(), 240, 1)
    y = np.sin(3 * rows[:, features.distances].sum(axis=1))
    process = GaussianProcess(features)
    process.fit(rows[:210], y[:210])
    learned = process._covariance
    for some in (slice(0, 210), slice(0, 211), slice(0, 214), slice(1, 215), slice(5, 215)):
        process.fit(rows[some], y[some])
        assert process._covariance is learned
        had, values = rows[some], y[some]
        known = learned.between(had, had) + learned.noise * np.eye(len(had))
        across = learned.between(rows[215:], had)
        mean, deviation = process.predict(rows[215:])
        scaled = (values - values.mean()) / values.std()
        np.testing.assert_allclose(
            mean, values.mean() + values.std() * across @ np.linalg.solve(known, scaled), rtol=1e-6
        )
        left = np.diag(learned.between(rows[215:], rows[215:]) - across @ np.linalg.solve(known, across.T))
        np.testing.assert_allclose(deviation, values.std() * np.sqrt(left), rtol=1e-4)
        assert np.array_equal(process.mean(rows[215:]), mean)


def test_what_is_awaited_leaves_less_to_be_told_as_if_it_had_come_out_as_believed() -> None:
    features, rows = rows_of(make_encoder(), 40, 1)
    y = np.sin(3 * rows[:, features.distances].sum(axis=1))
    process = GaussianProcess(features)
    process.fit(rows[:20], y[:20])
    had, pending, others = rows[:20], rows[20:23], rows[23:]
    mean, deviation = process.predict(others, pending)
    assert np.array_equal(mean, process.predict(others)[0])
    covariance, both = process._covariance, np.concatenate([had, pending])
    known = covariance.between(both, both) + covariance.noise * np.eye(23)
    across = covariance.between(others, both)
    left = np.diag(covariance.between(others, others) - across @ np.linalg.solve(known, across.T))
    np.testing.assert_allclose(deviation, y[:20].std() * np.sqrt(left), rtol=1e-4)
    assert (process.predict(pending, pending)[1] < 0.7 * process.predict(pending)[1]).all()


def test_what_adds_up_over_many_knobs_is_learned_from_few_results() -> None:
    encoder = SpaceEncoder({f"x{i}": Choice((2, 3, 4, 8)) for i in range(30)})
    features, rows = rows_of(encoder, 220, 3)
    generator = np.random.default_rng(3)
    weights = np.where(generator.random(30) < 0.2, generator.normal(size=30), 0.02)
    values = encoder.uniform(220, np.random.default_rng(3)) ** 2 @ weights
    process = GaussianProcess(features)
    process.fit(rows[:70], values[:70])
    mean, deviation = process.predict(rows[70:])
    assert np.corrcoef(mean, values[70:])[0, 1] > 0.95
    # Errors are no larger than it says, and it says that it has learned most.
    assert np.sqrt(np.mean(((mean - values[70:]) / deviation) ** 2)) < 1.5
    assert deviation.mean() < 0.3 * values.std()


def test_knobs_that_only_act_together_are_learned_too() -> None:
    encoder = SpaceEncoder({"a": Range(-1.0, 1.0), "b": Range(-1.0, 1.0), "c": Range(-1.0, 1.0)})
    features, rows = rows_of(encoder, 200, 4)
    points = 2 * encoder.uniform(200, np.random.default_rng(4)) - 1
    values = points[:, 0] * points[:, 1]
    process = GaussianProcess(features)
    process.fit(rows[:60], values[:60])
    assert np.corrcoef(process.predict(rows[60:])[0], values[60:])[0, 1] > 0.9


def test_noise_is_told_from_effects() -> None:
    features, rows = rows_of(make_encoder(), 120, 5)
    process = GaussianProcess(features)
    process.fit(rows, np.random.default_rng(5).normal(size=120))
    mean, _ = process.predict(rows)
    assert mean.std() < 0.5


def test_what_multiplies_is_believed_by_its_logarithm_and_what_adds_is_not() -> None:
    encoder = SpaceEncoder({f"x{i}": Range(0.0, 1.0) for i in range(5)})
    features, rows = rows_of(encoder, 60, 6)
    total = encoder.uniform(60, np.random.default_rng(6)).sum(axis=1)
    multiplied, added = ObjectiveModel(features), ObjectiveModel(features)
    multiplied.fit(rows, np.exp(2 * total), rows)
    added.fit(rows, total, rows)
    assert multiplied.predict(rows).warping.logarithm
    assert not added.predict(rows).warping.logarithm


def test_one_result_and_equal_results_can_be_believed() -> None:
    features, rows = rows_of(make_encoder(), 10, 7)
    for count in (1, 10):
        process = ObjectiveModel(features)
        process.fit(rows[:count], np.full(count, 3.0), rows)
        assert np.isfinite(process.predict(rows).mean).all()


def test_what_is_far_out_is_seen_nearer_and_in_the_same_order() -> None:
    losses = np.array([1.0, 1.1, 1.2, 1.3, 1.4, 5.0, 1e3, 1e9])
    for logarithm in (False, True):
        warping = Warping.fit(losses[:6], logarithm)
        warped = warping.warp(losses)
        assert (np.diff(warped) > 0).all()
        np.testing.assert_allclose(warping.unwarp(warped), losses, rtol=1e-9)
        assert np.ptp(warped) < 40 * np.ptp(warped[:5])
        slopes = (warping.warp(losses * (1 + 1e-7)) - warping.warp(losses * (1 - 1e-7))) / (2e-7 * losses)
        assert warping.log_derivative(losses) == pytest.approx(float(np.log(slopes).sum()), rel=1e-5)


# Prediction improvement

fronts = st.integers(1, 4).flatmap(
    lambda objectives: st.lists(
        st.lists(st.integers(0, 8), min_size=objectives, max_size=objectives), min_size=1, max_size=12
    )
)


@given(fronts)
@settings(max_examples=80, deadline=None)
def test_the_boxes_are_what_the_front_leaves(front: list[list[int]]) -> None:
    points = np.array(front, dtype=np.float64)
    reference = np.full(points.shape[1], 7.0)
    low, high = cells(points, reference)
    volume = float(np.prod(high - np.maximum(low, -1.0), axis=1).sum())
    dominated = float(moocore.hypervolume(points, ref=reference))
    assert volume + dominated == pytest.approx(8.0 ** points.shape[1])


@given(fronts, st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_what_is_known_improves_by_what_it_adds_to_the_hypervolume(front: list[list[int]], seed: int) -> None:
    points = np.array(front, dtype=np.float64)
    reference = np.full(points.shape[1], 7.0)
    candidates = np.random.default_rng(seed).uniform(0, 9, size=(5, points.shape[1]))
    known = [Prediction(column, np.zeros(5)) for column in candidates.T]
    before = moocore.hypervolume(points, ref=reference)
    added = [moocore.hypervolume(np.vstack([points, one]), ref=reference) - before for one in candidates]
    np.testing.assert_allclose(expected_improvement(points, reference, known), added, atol=1e-9)


def test_an_expected_improvement_is_the_mean_of_improvements() -> None:
    generator = np.random.default_rng(0)
    front = np.array([[1.0, 4.0], [2.0, 2.5], [4.0, 1.0]])
    reference = np.array([6.0, 6.0])
    size, quality = 1.5, generator.normal(3.0, 1.0, size=4000)
    before = moocore.hypervolume(front, ref=reference)
    drawn = [moocore.hypervolume(np.vstack([front, [size, one]]), ref=reference) - before for one in quality]
    expected = [Prediction(np.array([size]), np.zeros(1)), Prediction(np.array([3.0]), np.ones(1))]
    assert expected_improvement(front, reference, expected)[0] == pytest.approx(np.mean(drawn), rel=0.05)


# The search


def additive(knobs: int) -> tuple[Mapping[str, Choice], np.ndarray]:
    return {f"layer{i}": Choice((2, 3, 4, 8)) for i in range(knobs)}, np.exp(
        np.random.default_rng(9).normal(size=knobs)
    )


def test_bits_of_many_layers_come_nearer_to_the_front_than_by_any_other_search() -> None:
    space, weights = additive(24)
    damage = {2: 3.0, 3: 0.8, 4: 0.2, 8: 0.0}
    objectives = [Objective("size"), Objective("perplexity")]

    def size(choices: Mapping[str, Value]) -> dict[str, float]:
        return {"size": float(sum(float(bits) for bits in choices.values()))}

    def volume(name: str) -> float:
        trying, front = search.make(name, space, objectives, size, seed=0), ParetoFront(objectives)
        for turn in range(60):
            for choices in trying.ask(1):
                lost = sum(w * damage[int(bits)] for w, bits in zip(weights, choices.values(), strict=True))
                metrics = {**size(choices), "perplexity": 30 * math.exp(lost / weights.sum())}
                trying.tell([(choices, metrics)])
                front.add(str(turn), metrics)
        return front.hypervolume({"size": 200.0, "perplexity": 200.0})

    ours = volume("surrogate")
    assert ours > 1.05 * max(volume("random"), volume("nsga2"), volume("tpe"))


def test_choices_that_fail_are_tried_less() -> None:
    space = {"technique": Choice(("good", "broken")), **{f"x{i}": Range(0.0, 1.0) for i in range(6)}}
    trying = search.make("surrogate", space, [Objective("error")], seed=0)
    broken = 0
    for turn in range(40):
        for choices in trying.ask(1):
            fails = choices["technique"] == "broken"
            broken += fails and turn >= 15
            outcome = (
                Failure("bug", "")
                if fails
                else {"error": sum(float(choices[f"x{i}"]) - 0.4 for i in range(6)) ** 2}
            )
            trying.tell([(choices, outcome)])
    assert broken <= 6


def test_a_batch_is_spread() -> None:
    space, weights = additive(8)
    objectives = [Objective("size"), Objective("loss")]

    def size(choices: Mapping[str, Value]) -> dict[str, float]:
        return {"size": float(sum(float(bits) for bits in choices.values()))}

    trying = search.make("surrogate", space, objectives, size, seed=0)
    for _ in range(20):
        trying.tell([
            (c, {**size(c), "loss": float(sum(w / float(b) for w, b in zip(weights, c.values(), strict=True)))})
            for c in trying.ask(1)
        ])  # fmt: skip
    assert len({size(choices)["size"] for choices in trying.ask(8)}) >= 5


def test_an_objective_may_become_known_while_the_search_goes_on() -> None:
    measured: dict[str, float] = {}
    space = {"bits": Choice((2, 3, 4, 8)), "ratio": Range(0.0, 1.0)}

    def known(choices: Mapping[str, Value]) -> dict[str, float]:
        return {"decode_ms": measured["unit"] * float(choices["bits"])} if measured else {}

    objectives = [Objective("decode_ms", limit=10.0), Objective("error")]
    trying = search.make("surrogate", space, objectives, known, seed=0)
    for turn in range(25):
        for choices in trying.ask(1):
            decode_ms = 2.0 * float(choices["bits"])
            assert turn <= 12 or decode_ms <= 10
            trying.tell([(choices, {"decode_ms": decode_ms, "error": float(choices["ratio"])})])
        if turn == 12:
            measured["unit"] = 2.0


def lesson(results: int) -> Search:
    """A search that was told of so many choices: what adds to the loss is x, and what takes from it is size."""
    space = {"x": Range(0.0, 1.0), "size": Range(0, 9, integer=True)}
    objectives = [Objective("size"), Objective("loss", limit=30.0)]
    trying = search.make("surrogate", space, objectives, lambda one: {"size": float(one["size"])}, seed=0)
    for turn in range(results):
        choices = {"x": round(0.1 + 0.9 * (0.618 * turn % 1), 3), "size": turn % 10}
        loss = 10 * choices["x"] + 20 - choices["size"] + 0.2 * math.sin(3 * turn)
        trying.tell([(choices, {"loss": loss})])
    return trying


def test_what_is_surely_beaten_has_no_chance_and_what_may_add_has_one() -> None:
    beaten, better, smaller = {"x": 0.95, "size": 8}, {"x": 0.0, "size": 9}, {"x": 0.02, "size": 0}
    chances = lesson(30).probability_of_improvement([beaten, better, smaller])
    assert chances[0] < 0.01
    assert min(chances[1:]) > 0.1
    assert lesson(11).probability_of_improvement([beaten]) == [1.0]


def test_what_surely_breaks_a_limit_has_no_chance_and_what_is_not_in_the_space_may_have_any() -> None:
    space = {"x": Range(0.0, 1.0), "size": Range(0, 9, integer=True)}
    trying = search.make("surrogate", space, [Objective("loss", limit=5.0)], seed=0)
    for turn in range(20):
        trying.tell([({"x": turn / 19, "size": turn % 10}, {"loss": 100.0 - 10 * turn / 19})])
    assert trying.probability_of_improvement([{"x": 0.5, "size": 3}])[0] < 1e-6
    assert trying.probability_of_improvement([{"x": 0.5}]) == [1.0]


def test_a_belief_is_no_surer_of_outcomes_than_it_was_right_of_each_result_by_the_others() -> None:
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
    errors, claimed = [], []
    for one in range(25):
        others = np.arange(25) != one
        weights = np.linalg.solve(covariance[np.ix_(others, others)], covariance[others, one])
        errors.append(y[one] - weights @ y[others])
        claimed.append(math.sqrt(covariance[one, one] - weights @ covariance[others, one]))
    new = encoder.uniform(40, generator)
    new = features.rows(new, encoder.active(new))
    surprise = math.sqrt(np.mean(np.square(np.divide(errors, claimed))))
    spread = max(surprise, 1.0) * np.hypot(process.predict(new)[1], values.std() * math.sqrt(noise))
    usual = values.std() * math.sqrt(np.mean(np.square(errors)))
    mean, deviation = process.predict_result(new)
    np.testing.assert_allclose(mean, process.predict(new)[0])
    np.testing.assert_allclose(deviation, np.maximum(spread, usual), rtol=1e-6)


@pytest.mark.parametrize("uncertain", [1, 2])
def test_the_chance_to_add_to_a_front_is_that_of_many_draws_or_more(uncertain: int) -> None:
    generator = np.random.default_rng(uncertain)
    front = np.array([[0.1, 0.9, 0.5], [0.4, 0.5, 0.5], [0.8, 0.2, 0.5], [0.5, 0.5, 0.1]])
    limits = np.array([np.inf, np.inf, 0.9])
    means = generator.uniform(0.2, 1.0, (20, 3))
    deviations = np.array([0.0, 0.2 * (uncertain > 1), 0.2])
    foretold = [Prediction(mean, np.full(20, one)) for mean, one in zip(means.T, deviations, strict=True)]
    found = probability_of_improvement(front, limits, foretold)
    drawn = means + deviations * generator.normal(size=(20_000, 20, 3))
    beaten = (drawn[:, :, None] >= front).all(axis=3).any(axis=2)
    happened = (~beaten & (drawn <= limits).all(axis=2)).mean(axis=0)
    assert (found >= happened - 0.015).all()
    assert found.min() < 0.2
    alone = probability_of_improvement(front, np.full(3, np.inf), foretold)
    if uncertain == 1:
        np.testing.assert_allclose(alone, 1 - beaten.mean(axis=0), atol=0.015)


def test_with_noise_larger_than_the_differences_the_search_goes_on() -> None:
    generator = np.random.default_rng(0)
    trying = search.make("surrogate", SPACE, [Objective("a"), Objective("b", "max")], seed=0)
    for _ in range(30):
        trying.tell(
            [(choices, {"a": generator.normal(), "b": generator.normal()}) for choices in trying.ask(1)]
        )
    assert len(trying.ask(4)) == 4


def test_what_was_told_is_not_surveyed_again_at_each_result() -> None:
    asked: list[tuple[Value, ...]] = []

    def known(choices: Mapping[str, Value]) -> dict[str, float]:
        asked.append(tuple(choices.values()))
        return {"size": float(choices["x0"])}

    space = {f"x{at}": Range(0, 9, integer=True) for at in range(8)}
    trying = search.make("surrogate", space, [Objective("size"), Objective("loss")], known)
    told = []
    for _ in range(30):
        (choices,) = trying.ask(1)
        told.append(tuple(choices.values()))
        trying.tell([(choices, {"loss": float(sum(told[-1]))})])
    asked.clear()
    trying.ask(1)
    assert asked
    assert not set(told[:-1]) & set(asked)


def test_of_what_adds_alike_the_cheaper_is_tried_first() -> None:
    space = {"kind": Choice(("cheap", "dear")), **{f"x{i}": Range(0.0, 1.0) for i in range(3)}}

    def known(choices: Mapping[str, Value]) -> dict[str, float]:
        return {"seconds": 1.0 if choices["kind"] == "cheap" else 50.0}

    trying = search.make("surrogate", space, [Objective("a"), Objective("b")], known, seed=0)
    kinds = []
    for _ in range(30):
        for choices in trying.ask(1):
            kinds.append(choices["kind"])
            x = [float(choices[f"x{i}"]) for i in range(3)]
            trying.tell([(choices, {"a": x[0] + x[2], "b": 1 - x[0] + x[1]})])
    assert kinds[10:].count("cheap") > 15
