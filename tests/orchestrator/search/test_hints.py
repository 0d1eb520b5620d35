"""Hints are known metrics that are not objectives; the models use them as features."""

from __future__ import annotations

import numpy as np

from jobs.knobs import Choice, Value
from orchestrator import search
from orchestrator.pareto.front import Objective
from orchestrator.search.candidate_pool import CandidateEvaluator
from orchestrator.search.encoding import SpaceEncoder
from orchestrator.search.gaussian_process import ObjectiveModel
from orchestrator.search.search import Choices, KnownMetrics

SPACE = {f"bits.{block}": Choice((2, 3, 4, 8)) for block in range(24)}
WEIGHTS = {knob: float(weight) for knob, weight in zip(SPACE, np.geomspace(1, 100, 24), strict=True)}
OBJECTIVES = [Objective("size_bytes"), Objective("loss")]


def true_loss(choices: Choices) -> float:
    return sum(WEIGHTS[knob] * 4.0 ** -float(choices[knob]) for knob in SPACE)


def metrics_without_hint(choices: Choices) -> dict[str, float]:
    return {"size_bytes": sum(float(value) for value in choices.values())}


def metrics_with_hint(choices: Choices) -> dict[str, float]:
    return {**metrics_without_hint(choices), "predicted": true_loss(choices)}


def evaluator_of(known_metrics: KnownMetrics) -> tuple[SpaceEncoder, CandidateEvaluator]:
    encoder = SpaceEncoder(SPACE)
    evaluator = CandidateEvaluator(encoder, OBJECTIVES, known_metrics, np.random.default_rng(0))
    evaluator.update_deterministic_objectives(evaluator.space_sample)
    return encoder, evaluator


def test_a_hint_adds_a_feature_and_no_objective() -> None:
    (_, without), (_, with_hint) = evaluator_of(metrics_without_hint), evaluator_of(metrics_with_hint)
    assert with_hint.features.count == without.features.count + 1
    assert with_hint.deterministic_objectives.tolist() == [True, False]


def test_a_metric_correlated_with_a_hint_is_learned_from_few_results() -> None:
    def error(known_metrics: KnownMetrics, seed: int) -> float:
        encoder, evaluator = evaluator_of(known_metrics)
        generator = np.random.default_rng(seed)
        training_points, test_points = encoder.levelled(20, generator), encoder.levelled(200, generator)
        training_losses = np.array([1 + true_loss(encoder.choices(point)) for point in training_points])
        test_losses = np.array([1 + true_loss(encoder.choices(point)) for point in test_points])
        model = ObjectiveModel(evaluator.features)
        model.fit(evaluator.evaluate(training_points).rows, training_losses, evaluator.space_sample.rows)
        predicted = model.predict(evaluator.evaluate(test_points).rows).median
        return float(np.abs(np.log(predicted) - np.log(test_losses)).mean())

    with_hint = sum(error(metrics_with_hint, seed) for seed in (1, 2, 3))
    without = sum(error(metrics_without_hint, seed) for seed in (1, 2, 3))
    assert with_hint < 0.7 * without


def test_choices_without_a_hint_are_modelled_too() -> None:
    def known_metrics(choices: Choices) -> dict[str, float]:
        return metrics_without_hint(choices) if choices["bits.0"] == 2 else metrics_with_hint(choices)

    algorithm = search.make("surrogate", SPACE, OBJECTIVES, known_metrics)
    for _ in range(12):
        proposals: list[dict[str, Value]] = algorithm.ask(1)
        algorithm.tell(
            [
                (choices, {**metrics_without_hint(choices), "loss": 1 + true_loss(choices)})
                for choices in proposals
            ]
        )
    assert len(algorithm.ask(2)) == 2
