"""What every technique promises, run over every file of jobs/techniques."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jobs import families, layers, models, techniques
from jobs.context import Context
from jobs.models import Model
from jobs.statistics import Statistics
from jobs.technique import Technique

GENTLE = {
    "drop_layers": {"count": 1},
    "distill": {"steps": 2},
    "finetune": {"steps": 2},
    "synthesize": {"steps": 2, "samples": 4, "tokens": 16},
}
"""Options for techniques whose defaults are too strong, or too slow, for a model of 4 blocks."""


@pytest.fixture(params=techniques.names())
def technique(request: pytest.FixtureRequest) -> type[Technique]:
    return techniques.load(request.param)


@pytest.fixture(params=families.names())
def original(request: pytest.FixtureRequest, technique: type[Technique]) -> Path:
    """The tiny model of each family that the technique does."""
    family = families.family(request.param)
    reason = technique.refusal(family, family.tasks[0])
    if reason is not None:
        pytest.skip(f"{technique.name()} does not do {request.param}: {reason}")
    folder: Path = request.getfixturevalue("tiny")(request.param)
    return folder


@pytest.fixture
def context(original: Path, tmp_path: Path) -> Context:
    return context_for(original, tmp_path)


def context_for(original: Path, workdir: Path) -> Context:
    tokens = torch.randint(3, 512, (8, 32), generator=torch.Generator().manual_seed(0))
    return Context(
        Statistics(workdir / "statistics", "parent"),
        workdir,
        seed=0,
        calibration=tokens,
        training=tokens,
        teacher=lambda: models.load(original),
        teacher_statistics=Statistics(workdir / "statistics", "original"),
    )


def step_of(technique: type[Technique]) -> Technique:
    known = technique.domains()
    gentle = GENTLE.get(technique.name(), {})
    return technique.of({name: value for name, value in gentle.items() if name in known})


def outputs(model: Model) -> Tensor:
    tokens = torch.randint(3, 512, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.answer(tokens)


def test_it_declares_what_it_is(technique: type[Technique]) -> None:
    assert technique.kind in ("depth", "width", "rank", "bits", "recovery")
    assert technique.paper
    assert technique.needs <= {"calibration", "teacher", "gradients", "training"}
    for family in map(families.family, families.names()):
        for task in family.tasks:
            reason = technique.refusal(family, task)
            assert reason is None or reason
    assert technique.accepts
    assert technique.__doc__


def test_its_defaults_are_valid_and_every_option_is_explained(technique: type[Technique]) -> None:
    step = technique()
    assert not step.identity
    for field in dataclasses.fields(technique):
        assert getattr(step, field.name) in field.metadata["domain"]
        assert field.metadata["help"]


def test_an_option_outside_its_domain_is_refused_by_name(technique: type[Technique]) -> None:
    for name in technique.domains():
        with pytest.raises(ValueError, match=rf"{technique.name()}\.{name}=.*is outside"):
            technique.of({name: "absurd"})


def test_the_outline_is_the_layout_and_the_size_of_what_is_written(
    technique: type[Technique], original: Path, context: Context
) -> None:
    step = step_of(technique)
    model = models.load(original)
    expected = step.outline(models.original_layout(original))
    made = step.compress(model, context)
    assert made is model
    assert made.layout() == expected
    models.save(made, context.workdir / "made", {})
    assert (context.workdir / "made" / models.WEIGHTS).stat().st_size == expected.size_bytes()


def test_a_written_model_computes_what_it_did_in_memory(
    technique: type[Technique], original: Path, context: Context
) -> None:
    made = step_of(technique).compress(models.load(original), context)
    models.save(made, context.workdir / "made", {})
    again = models.load(context.workdir / "made")
    assert torch.isfinite(outputs(made)).all()
    assert torch.equal(outputs(made), outputs(again))
    assert again.layout() == made.layout()
    assert again.config.num_hidden_layers == made.config.num_hidden_layers == len(made.blocks)


def test_the_same_seed_gives_the_same_weights(
    technique: type[Technique], original: Path, context: Context, tmp_path: Path
) -> None:
    one = step_of(technique).compress(models.load(original), context)
    two = step_of(technique).compress(models.load(original), context_for(original, tmp_path / "again"))
    first, second = one.module.state_dict(), two.module.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_identity_changes_nothing(technique: type[Technique], original: Path, context: Context) -> None:
    for name, domain in technique.domains().items():
        for value in (getattr(domain, "low", None), getattr(domain, "high", None)):
            if value is None or not (step := technique.of({name: value})).identity:
                continue
            layout = models.original_layout(original)
            assert step.outline(layout) == layout
            before = outputs(models.load(original))
            assert torch.equal(outputs(step.compress(models.load(original), context)), before)


def test_weights_that_are_not_finite_are_refused(
    technique: type[Technique], original: Path, context: Context
) -> None:
    if technique.kind == "recovery":
        pytest.skip("its training notices a loss that is not finite")
    model = models.load(original)
    for layer in model.linears().values():
        torch.nn.init.constant_(layer.get_parameter("weight"), float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        step_of(technique).compress(model, context)


def test_linears_of_a_form_it_does_not_accept_are_refused_before_it_starts(
    technique: type[Technique], original: Path
) -> None:
    if "packed" in technique.accepts:
        pytest.skip("it accepts packed linears")
    packed = models.original_layout(original).packed(layers.Packing(4, 32, False))
    with pytest.raises(ValueError, match=f"{technique.name()}.*packed"):
        step_of(technique).outline(packed)
