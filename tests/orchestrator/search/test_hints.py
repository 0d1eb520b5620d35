"""What is known beside objectives is a feature: what must be measured is believed to go with it."""

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
    return {**plain(choices), "foretold": harm(choices)}


def survey(known: KnownMetrics) -> tuple[SpaceEncoder, CandidateEvaluator]:
    places = SpaceEncoder(SPACE)
    made = CandidateEvaluator(places, OBJECTIVES, known, np.random.default_rng(0))
    made.update_deterministic_objectives(made.space_sample)
    return places, made


def test_a_hint_is_one_feature_more_and_no_objective() -> None:
    (_, without), (_, with_hint) = survey(plain), survey(hinting)
    assert with_hint.features.count == without.features.count + 1
    assert with_hint.deterministic_objectives.tolist() == [True, False]


def test_what_goes_with_a_hint_is_learned_from_few_results() -> None:
    def error(known: KnownMetrics, seed: int) -> float:
        places, made = survey(known)
        generator = np.random.default_rng(seed)
        few, others = places.levelled(20, generator), places.levelled(200, generator)
        loss = [np.array([1 + harm(places.choices(point)) for point in points]) for points in (few, others)]
        belief = ObjectiveModel(made.features)
        belief.fit(made.evaluate(few).rows, loss[0], made.space_sample.rows)
        foretold = belief.predict(made.evaluate(others).rows).median
        return float(np.abs(np.log(foretold) - np.log(loss[1])).mean())

    with_hint, without = (sum(error(known, seed) for seed in (1, 2, 3)) for known in (hinting, plain))
    assert with_hint < 0.7 * without


def test_choices_without_a_hint_are_believed_about_too() -> None:
    def known(choices: Choices) -> dict[str, float]:
        return plain(choices) if choices["bits.0"] == 2 else hinting(choices)

    trying = search.make("surrogate", SPACE, OBJECTIVES, known)
    for _ in range(12):
        asked: list[dict[str, Value]] = trying.ask(1)
        trying.tell([(one, {**plain(one), "loss": 1 + harm(one)}) for one in asked])
    assert len(trying.ask(2)) == 2
