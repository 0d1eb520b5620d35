"""ASVD: scaled decompositions equal the paper's formula and reduce to SVD without scaling."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from jobs.calibration.statistics import Statistics
from jobs.context import Context
from jobs.models import loading
from jobs.models.model import Model
from jobs.techniques.asvd import Asvd, scales
from jobs.techniques.svd import Svd


def make_tokens() -> Tensor:
    return torch.randint(3, 512, (8, 32), generator=torch.Generator().manual_seed(0))


def compress(step: Svd | Asvd, original: Path) -> Model:
    return step.compress(
        loading.load(original), Context(Statistics(None, "key"), Path(), 0, calibration=make_tokens())
    )


def products(model: Model, original: Path) -> dict[str, Tensor]:
    return {
        name: model.module.get_submodule(f"{name}.u").weight.double()
        @ model.module.get_submodule(f"{name}.v").weight.double()
        for name in loading.load(original).linears()
    }


def test_without_scaling_the_result_equals_svd(tiny_llama: Path) -> None:
    scaled = products(compress(Asvd(keep=0.5, alpha=0.0), tiny_llama), tiny_llama)
    plain = products(compress(Svd(keep=0.5), tiny_llama), tiny_llama)
    assert all((scaled[name] - plain[name]).norm() < 0.01 * plain[name].norm() for name in plain)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_the_scales_keep_the_total_energy_of_the_inputs(alpha: float) -> None:
    energies = Tensor([4.0, 1.0, 0.0, 9.0])
    scale_values = scales(energies, alpha)
    assert scale_values.square().sum().item() == pytest.approx(14)
    assert (scale_values[0] / scale_values[1]).item() == pytest.approx(2**alpha)
    assert not scales(energies * 0, alpha).any()


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_the_factors_equal_the_papers_formula(alpha: float, tiny_llama: Path) -> None:
    actual = products(compress(Asvd(keep=0.5, alpha=alpha), tiny_llama), tiny_llama)
    original = loading.load(tiny_llama)
    for name, layer in original.linears().items():
        inputs: list[Tensor] = []
        hook = layer.register_forward_pre_hook(
            lambda m, args, inputs=inputs: inputs.append(args[0].flatten(0, -2))
        )
        original.module(make_tokens())
        hook.remove()
        size = torch.cat(inputs).double().square().mean(dim=0).sqrt()
        weight = layer.weight.detach().double()
        rank = int(0.5 * weight.numel() / sum(weight.shape))
        u, s, v = torch.linalg.svd(weight @ torch.diag(size**alpha), full_matrices=False)
        paper = (u[:, :rank] * s[:rank]) @ v[:rank] @ torch.diag(size**-alpha)
        assert (actual[name] - paper).norm() < 0.02 * paper.norm()


def test_strong_inputs_have_a_smaller_error_than_with_svd(tiny_llama: Path) -> None:
    model = loading.load(tiny_llama)
    # One input channel of every block's attention is a hundred times as large as the others.
    for block in model.blocks:
        block.input_layernorm.weight[5] = 100.0
    errors = []
    for step in (Svd(keep=0.3), Asvd(keep=0.3, alpha=1.0)):
        fresh = loading.load(tiny_llama)
        for block in fresh.blocks:
            block.input_layernorm.weight[5] = 100.0
        step.compress(fresh, Context(Statistics(None, "key"), Path(), 0, calibration=make_tokens()))
        name = "model.layers.2.self_attn.q_proj"
        product = products(fresh, tiny_llama)[name]
        errors.append((product - model.linears()[name].weight.detach())[:, 5].norm().item())
    assert errors[1] < 0.1 * errors[0]


def test_each_alpha_has_a_separate_decomposition(tiny_llama: Path) -> None:
    statistics = Statistics(None, "key")
    context = Context(statistics, Path(), 0, calibration=make_tokens())
    at_half = Asvd(alpha=0.5).compress(loading.load(tiny_llama), context)
    at_one = Asvd(alpha=1.0).compress(loading.load(tiny_llama), context)
    name = "model.layers.0.mlp.up_proj"
    assert not torch.equal(products(at_half, tiny_llama)[name], products(at_one, tiny_llama)[name])
