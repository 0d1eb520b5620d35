"""The order of stages is a knob if the study asks for it, and only valid orders are tried."""

from __future__ import annotations

from typing import Any

from jobs.knobs import Choice
from jobs.recipe import Origin
from orchestrator.planning.parse_space import parse

ORIGIN = Origin("model", "data", 0)
STAGES: dict[str, Any] = {
    "depth": {"drop_layers": {"count": 1}},
    "recover": {"distill": {"steps": 8}},
    "bits": {"rtn": {"bits": 4}},
}


def test_the_order_of_the_file_is_fixed_unless_the_study_searches_it() -> None:
    space, problems = parse(STAGES)
    assert not problems
    assert "order" not in space.knobs()


def test_every_valid_order_is_a_choice() -> None:
    space, problems = parse(STAGES, any_order=True)
    assert not problems
    # Distillation is never first, since the original needs no recovery, nor after rtn: packed integers cannot train.
    assert space.knobs()["order"] == Choice(("depth, recover, bits",))
    two, _ = parse({name: STAGES[name] for name in ("depth", "bits")}, any_order=True)
    assert two.knobs()["order"] == Choice(("depth, bits", "bits, depth"))


def test_a_recipe_takes_its_steps_in_the_chosen_order() -> None:
    space, _ = parse({name: STAGES[name] for name in ("depth", "bits")}, any_order=True)
    choices = {"depth": "drop_layers", "bits": "rtn", "order": "bits, depth"}
    assert [step.name() for step in space.recipe(ORIGIN, choices).steps] == ["rtn", "drop_layers"]
    back = {**choices, "order": "depth, bits"}
    assert [step.name() for step in space.recipe(ORIGIN, back).steps] == ["drop_layers", "rtn"]
    assert space.size() == 2 * 2 * 2


def test_stages_without_a_valid_order_are_reported() -> None:
    _, problems = parse({"one": STAGES["bits"], "two": {"gptq": {"bits": 4}}}, any_order=True)
    assert [problem.key for problem in problems] == ["space.two"]


def test_a_stage_named_order_is_refused_if_the_order_is_a_knob() -> None:
    _, problems = parse({"order": STAGES["bits"]}, any_order=True)
    assert [problem.key for problem in problems] == ["space.order"]
