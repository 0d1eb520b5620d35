"""What every technique promises, run over every file of jobs/techniques and every family of models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jobs import techniques
from jobs.calibration.statistics import Statistics
from jobs.context import Context
from jobs.models import families, layers, loading, placement
from jobs.models.families import Family
from jobs.models.model import Model
from jobs.technique import Technique

GENTLE = {
    "anneal_rank": {"steps": 2},
    "drop_layers": {"count": 1},
    "distill": {"steps": 2},
    "finetune": {"steps": 2},
    "gradual_prune": {"steps": 2},
    "prune_heads": {"ratio": 0.5},
    "prune_hidden": {"ratio": 0.5},
    "qat": {"steps": 2},
    "synthesize": {"steps": 2, "samples": 4, "tokens": 16},
}
"""Options for techniques whose defaults are too strong, too weak or too slow for a model of 4 blocks."""

TYPICAL = ("llama", "gpt2", "bert")
"""Families that differ most: what does not hang on where things lie is tested on these only."""

Tiny = Callable[..., Path]


@pytest.fixture(params=techniques.names())
def technique(request: pytest.FixtureRequest) -> type[Technique]:
    return techniques.load(request.param)


def context_for(original: Path, workdir: Path, device: str = "cpu") -> Context:
    tokens = torch.randint(3, 512, (8, 32), generator=torch.Generator().manual_seed(0))
    return Context(
        Statistics(workdir / "statistics", "parent"),
        workdir,
        seed=0,
        calibration=tokens,
        training=tokens,
        teacher=lambda: placement.move_all(loading.load(original, device)),
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


def done_by(technique: type[Technique], *names: str) -> list[Family]:
    """Those of these families that the technique does."""
    every = map(families.family, names)
    return [family for family in every if technique.refusal(family, family.tasks[0]) is None]


@pytest.mark.parametrize("family", [families.family(name) for name in families.names()], ids=families.names())
def test_it_works_on_every_family_or_says_why_not(
    technique: type[Technique], family: Family, device: str, tiny: Tiny, tmp_path: Path
) -> None:
    step = step_of(technique)
    folder = tiny(family.name)
    original = loading.original_layout(folder)
    reason = technique.refusal(family, family.tasks[0])
    if reason is not None:
        told = rf"{technique.name()} does not support {family.name} \({family.tasks[0]}\): "
        with pytest.raises(ValueError, match=told) as refused:
            step.output_layout(original)
        assert str(refused.value).endswith(reason)
        return
    expected = step.output_layout(original)
    made = step.compress(model := loading.load(folder, device), context_for(folder, tmp_path, device))
    assert made is model
    assert {tensor.device.type for tensor in made.module.state_dict().values()} == {"cpu"}
    if step.exact:
        assert made.layout() == expected
    else:
        assert made.layout().size_bytes() <= expected.size_bytes() + 4096
        assert made.layout().tensors().keys() == expected.tensors().keys()
    if technique.kind == "recovery":
        assert expected == original
    else:
        assert expected.size_bytes() < original.size_bytes()
    loading.save(made, tmp_path / "made", {})
    assert (tmp_path / "made" / loading.WEIGHTS).stat().st_size == made.layout().size_bytes()
    again = loading.load(tmp_path / "made")
    assert again.layout() == made.layout()
    assert torch.isfinite(outputs(made)).all()
    assert torch.equal(outputs(made), outputs(again))
    assert again.config.num_hidden_layers == made.config.num_hidden_layers == len(made.blocks)


def test_it_works_on_a_classifier_or_says_why_not(
    technique: type[Technique], device: str, tiny: Tiny, tmp_path: Path
) -> None:
    for name in TYPICAL:
        family, folder = families.family(name), tiny(name, "classification")
        layout = loading.original_layout(folder)
        if technique.refusal(family, "classification") is not None:
            with pytest.raises(
                ValueError, match=rf"{technique.name()} does not support {name} \(classification\)"
            ):
                step_of(technique).output_layout(layout)
            continue
        context = context_for(folder, tmp_path / name, device)
        made = step_of(technique).compress(loading.load(folder, device), context)
        loading.save(made, tmp_path / name / "made", {})
        with torch.no_grad():
            rows = torch.arange(3, 19).unsqueeze(0)
            assert torch.equal(made.answer(rows), loading.load(tmp_path / name / "made").answer(rows))


def test_it_declares_what_it_is(technique: type[Technique]) -> None:
    assert technique.kind in ("depth", "width", "rank", "bits", "sparsity", "recovery")
    assert technique.paper
    assert technique.needs <= {"calibration", "teacher", "gradients", "training"}
    assert done_by(technique, *families.names())
    assert technique.accepts
    assert technique.__doc__


def test_its_defaults_are_valid_and_every_option_is_explained(technique: type[Technique]) -> None:
    step = technique()
    assert not step.is_noop
    for field in dataclasses.fields(technique):
        assert getattr(step, field.name) in field.metadata["domain"]
        assert field.metadata["help"]


def test_an_option_outside_its_domain_is_refused_by_name(technique: type[Technique]) -> None:
    for name in technique.domains():
        with pytest.raises(ValueError, match=rf"{technique.name()}\.{name}=.*is outside"):
            technique.of({name: "absurd"})


def test_the_same_seed_gives_the_same_weights(
    technique: type[Technique], device: str, tiny: Tiny, tmp_path: Path
) -> None:
    folder = tiny(done_by(technique, *TYPICAL)[0].name)
    one, two = (
        step_of(technique).compress(
            loading.load(folder, device), context_for(folder, tmp_path / name, device)
        )
        for name in ("one", "two")
    )
    if device == "cuda" and technique.needs & {"gradients", "teacher", "training"}:
        # CUDA's backward passes add up in whatever order they finish.
        torch.testing.assert_close(outputs(one), outputs(two), rtol=0.05, atol=0.05)
        return
    first, second = one.module.state_dict(), two.module.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_identity_changes_nothing(technique: type[Technique], tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny(done_by(technique, *TYPICAL)[0].name)
    layout = loading.original_layout(folder)
    before = outputs(loading.load(folder))
    for name, domain in technique.domains().items():
        for value in (getattr(domain, "low", None), getattr(domain, "high", None)):
            if value is None or not (step := technique.of({name: value})).is_noop:
                continue
            assert step.output_layout(layout) == layout
            left = step.compress(loading.load(folder), context_for(folder, tmp_path))
            assert torch.equal(outputs(left), before)


def test_weights_that_are_not_finite_are_refused(
    technique: type[Technique], device: str, tiny: Tiny, tmp_path: Path
) -> None:
    if technique.kind == "recovery":
        pytest.skip("its training notices a loss that is not finite")
    for family in done_by(technique, *TYPICAL):
        folder = tiny(family.name)
        model = loading.load(folder, device)
        for layer in model.linears().values():
            torch.nn.init.constant_(layer.get_parameter("weight"), float("nan"))
        with pytest.raises((ValueError, FloatingPointError), match=r"NaN|nan"):
            step_of(technique).compress(model, context_for(folder, tmp_path / family.name, device))


def test_linears_of_a_form_it_does_not_accept_are_refused_before_it_starts(
    technique: type[Technique], tiny: Tiny
) -> None:
    if "packed" in technique.accepts:
        pytest.skip("it accepts packed linears")
    packed = loading.original_layout(tiny(done_by(technique, *TYPICAL)[0].name)).packed(
        layers.Packing(4, 32, False)
    )
    with pytest.raises(ValueError, match=f"{technique.name()}.*packed"):
        step_of(technique).output_layout(packed)
