"""Hints: known metrics that are no objectives are features of the models."""

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


def harm(choices: Choices) -> float:
    return sum(WEIGHTS[knob] * 4.0 ** -float(choices[knob]) for knob in SPACE)


def plain(choices: Choices) -> dict[str, float]:
    return {"size_bytes": sum(float(value) for value in choices.values())}


def hinting(choices: Choices) -> dict[str, float]:
    return {**plain(choices), "predicted": harm(choices)}


def evaluator_of(known_metrics: KnownMetrics) -> tuple[SpaceEncoder, CandidateEvaluator]:
    encoder = SpaceEncoder(SPACE)
    evaluator = CandidateEvaluator(encoder, OBJECTIVES, known_metrics, np.random.default_rng(0))
    evaluator.update_deterministic_objectives(evaluator.space_sample)
    return encoder, evaluator


def test_a_hint_is_one_feature_more_and_no_objective() -> None:
    (_, without), (_, with_hint) = evaluator_of(plain), evaluator_of(hinting)
    assert with_hint.features.count == without.features.count + 1
    assert with_hint.deterministic_objectives.tolist() == [True, False]


def test_what_goes_with_a_hint_is_learned_from_few_results() -> None:
    def error(known_metrics: KnownMetrics, seed: int) -> float:
        encoder, evaluator = evaluator_of(known_metrics)
        generator = np.random.default_rng(seed)
        few, new = encoder.levelled(20, generator), encoder.levelled(200, generator)
        loss = [np.array([1 + harm(encoder.choices(point)) for point in points]) for points in (few, new)]
        model = ObjectiveModel(evaluator.features)
        model.fit(evaluator.evaluate(few).rows, loss[0], evaluator.space_sample.rows)
        predicted = model.predict(evaluator.evaluate(new).rows).median
        return float(np.abs(np.log(predicted) - np.log(loss[1])).mean())

    with_hint, without = (
        sum(error(known_metrics, seed) for seed in (1, 2, 3)) for known_metrics in (hinting, plain)
    )
    assert with_hint < 0.7 * without


def test_choices_without_a_hint_are_believed_about_too() -> None:
    def known_metrics(choices: Choices) -> dict[str, float]:
        return plain(choices) if choices["bits.0"] == 2 else hinting(choices)

    trying = search.make("surrogate", SPACE, OBJECTIVES, known_metrics)
    for _ in range(12):
        proposals: list[dict[str, Value]] = trying.ask(1)
        trying.tell([(choices, {**plain(choices), "loss": 1 + harm(choices)}) for choices in proposals])
    assert len(trying.ask(2)) == 2
