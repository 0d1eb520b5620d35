"""The contract of all techniques, run over every file of jobs/techniques and every model family."""

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
"""Families that differ most: properties that do not depend on module paths are tested on these only."""

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


def make_step(technique: type[Technique]) -> Technique:
    domains = technique.domains()
    gentle = GENTLE.get(technique.name(), {})
    return technique.of({name: value for name, value in gentle.items() if name in domains})


def compute_outputs(model: Model) -> Tensor:
    tokens = torch.randint(3, 512, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.answer(tokens)


def supported_families(technique: type[Technique], *names: str) -> list[Family]:
    """Return the named families that the technique supports."""
    candidates = map(families.family, names)
    return [family for family in candidates if technique.refusal(family, family.tasks[0]) is None]


@pytest.mark.parametrize("family", [families.family(name) for name in families.names()], ids=families.names())
def test_every_family_is_compressed_or_refused_with_a_reason(
    technique: type[Technique], family: Family, device: str, tiny: Tiny, tmp_path: Path
) -> None:
    step = make_step(technique)
    folder = tiny(family.name)
    original = loading.original_layout(folder)
    reason = technique.refusal(family, family.tasks[0])
    if reason is not None:
        message = rf"{technique.name()} does not support {family.name} \({family.tasks[0]}\): "
        with pytest.raises(ValueError, match=message) as refused:
            step.output_layout(original)
        assert str(refused.value).endswith(reason)
        return
    expected = step.output_layout(original)
    compressed = step.compress(model := loading.load(folder, device), context_for(folder, tmp_path, device))
    assert compressed is model
    assert {tensor.device.type for tensor in compressed.module.state_dict().values()} == {"cpu"}
    if step.exact:
        assert compressed.layout() == expected
    else:
        assert compressed.layout().size_bytes() <= expected.size_bytes() + 4096
        assert compressed.layout().tensors().keys() == expected.tensors().keys()
    if technique.kind == "recovery":
        assert expected == original
    else:
        assert expected.size_bytes() < original.size_bytes()
    loading.save(compressed, tmp_path / "made", {})
    assert (tmp_path / "made" / loading.WEIGHTS).stat().st_size == compressed.layout().size_bytes()
    loaded = loading.load(tmp_path / "made")
    assert loaded.layout() == compressed.layout()
    assert torch.isfinite(compute_outputs(compressed)).all()
    assert torch.equal(compute_outputs(compressed), compute_outputs(loaded))
    assert loaded.config.num_hidden_layers == compressed.config.num_hidden_layers == len(compressed.blocks)


def test_a_classifier_is_compressed_or_refused_with_a_reason(
    technique: type[Technique], device: str, tiny: Tiny, tmp_path: Path
) -> None:
    for name in TYPICAL:
        family, folder = families.family(name), tiny(name, "classification")
        layout = loading.original_layout(folder)
        if technique.refusal(family, "classification") is not None:
            with pytest.raises(
                ValueError, match=rf"{technique.name()} does not support {name} \(classification\)"
            ):
                make_step(technique).output_layout(layout)
            continue
        context = context_for(folder, tmp_path / name, device)
        compressed = make_step(technique).compress(loading.load(folder, device), context)
        loading.save(compressed, tmp_path / name / "made", {})
        with torch.no_grad():
            rows = torch.arange(3, 19).unsqueeze(0)
            assert torch.equal(compressed.answer(rows), loading.load(tmp_path / name / "made").answer(rows))


def test_a_technique_declares_its_properties(technique: type[Technique]) -> None:
    assert technique.kind in ("depth", "width", "rank", "bits", "sparsity", "recovery")
    assert technique.paper
    assert technique.needs <= {"calibration", "teacher", "gradients", "training"}
    assert supported_families(technique, *families.names())
    assert technique.accepts
    assert technique.__doc__


def test_defaults_are_valid_and_every_option_has_a_help_text(technique: type[Technique]) -> None:
    step = technique()
    assert not step.is_noop
    for field in dataclasses.fields(technique):
        assert getattr(step, field.name) in field.metadata["domain"]
        assert field.metadata["help"]


def test_an_option_outside_its_domain_is_refused_with_its_name(technique: type[Technique]) -> None:
    for name in technique.domains():
        with pytest.raises(ValueError, match=rf"{technique.name()}\.{name}=.*is outside"):
            technique.of({name: "absurd"})


def test_the_same_seed_gives_the_same_weights(
    technique: type[Technique], device: str, tiny: Tiny, tmp_path: Path
) -> None:
    folder = tiny(supported_families(technique, *TYPICAL)[0].name)
    first_model, second_model = (
        make_step(technique).compress(
            loading.load(folder, device), context_for(folder, tmp_path / name, device)
        )
        for name in ("one", "two")
    )
    if device == "cuda" and technique.needs & {"gradients", "teacher", "training"}:
        # The backward passes of CUDA sum in no fixed order.
        torch.testing.assert_close(
            compute_outputs(first_model), compute_outputs(second_model), rtol=0.05, atol=0.05
        )
        return
    first, second = first_model.module.state_dict(), second_model.module.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_no_op_changes_nothing(technique: type[Technique], tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny(supported_families(technique, *TYPICAL)[0].name)
    layout = loading.original_layout(folder)
    original_outputs = compute_outputs(loading.load(folder))
    for name, domain in technique.domains().items():
        for value in (getattr(domain, "low", None), getattr(domain, "high", None)):
            if value is None or not (step := technique.of({name: value})).is_noop:
                continue
            assert step.output_layout(layout) == layout
            unchanged = step.compress(loading.load(folder), context_for(folder, tmp_path))
            assert torch.equal(compute_outputs(unchanged), original_outputs)


def test_non_finite_weights_are_refused(
    technique: type[Technique], device: str, tiny: Tiny, tmp_path: Path
) -> None:
    if technique.kind == "recovery":
        pytest.skip("its training detects a non-finite loss")
    for family in supported_families(technique, *TYPICAL):
        folder = tiny(family.name)
        model = loading.load(folder, device)
        for layer in model.linears().values():
            torch.nn.init.constant_(layer.get_parameter("weight"), float("nan"))
        with pytest.raises((ValueError, FloatingPointError), match=r"NaN|nan"):
            make_step(technique).compress(model, context_for(folder, tmp_path / family.name, device))


def test_linears_of_an_unsupported_form_are_refused_before_the_step_starts(
    technique: type[Technique], tiny: Tiny
) -> None:
    if "packed" in technique.accepts:
        pytest.skip("it accepts packed linears")
    packed = loading.original_layout(tiny(supported_families(technique, *TYPICAL)[0].name)).packed(
        layers.Packing(4, 32, False)
    )
    with pytest.raises(ValueError, match=f"{technique.name()}.*packed"):
        make_step(technique).output_layout(packed)
