"""AWQ: scales follow the paper's formula, and the search chooses the exponent with the smallest output error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from jobs.calibration.statistics import Statistics
from jobs.compression import grids, packing
from jobs.context import Context
from jobs.models import loading
from jobs.models.layers import PackedLinear
from jobs.models.layout import Packing
from jobs.techniques.awq import Awq, best_scales, output_error, scales_for


def make_case(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a weight and activations with a few inputs much stronger than the others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, 64, generator=generator)
    x[:, :3] *= 20
    x @= torch.eye(64) + 0.05 * torch.randn(64, 64, generator=generator)
    return torch.randn(24, 64, generator=generator), x


def test_the_predicted_error_equals_that_of_the_outputs_on_activations() -> None:
    weight, x = make_case()
    options = Packing(3, 32, False, input_scales=True)
    gram = x.T @ x / len(x)
    for alpha in (0.0, 0.4, 0.9):
        scales = scales_for(gram, alpha)
        integers, grid = packing.round_to_nearest(weight * scales, options)
        zeros = grids.stored_zeros(grid, options)
        layer = PackedLinear.of(integers, grid.scales, zeros, options, None, 1 / scales)
        expected = (layer(x) - x @ weight.T).square().sum(1).mean().item()
        assert output_error(weight, gram, scales, options) == pytest.approx(expected, rel=1e-3)


def test_without_alpha_the_result_equals_rounding_to_nearest_with_clipping(
    tiny_llama: Path, tmp_path: Path
) -> None:
    tokens = torch.randint(3, 512, (4, 24), generator=torch.Generator().manual_seed(0))
    context = Context(Statistics(None, ""), tmp_path, 0, calibration=tokens)
    original = loading.load(tiny_llama)
    step = Awq(bits=3, trials=1, group=32)  # tries α = 0 only
    compressed = step.compress(loading.load(tiny_llama), context)
    grams = context.statistics.grams(original, tokens, context.report)
    for name, layer in original.linears().items():
        weight = layer.weight.float()
        energy = grids.grouped(grams.gram(name).diagonal().unsqueeze(0), step.packing)[0]
        integers, grid = packing.round_to_nearest(weight, step.packing, energy)
        expected = grid.values(grids.grouped(integers, step.packing)).flatten(1)[:, : weight.shape[1]]
        assert torch.equal(compressed.module.get_submodule(name).weight(), expected)


def test_the_alpha_with_the_smallest_error_is_chosen_and_is_better_than_none() -> None:
    weight, x = make_case()
    gram, options = x.T @ x / len(x), Awq(bits=3, group=32, trials=20)
    lowest_error = output_error(weight, gram, best_scales(weight, gram, options), options.packing)
    errors = [output_error(weight, gram, scales_for(gram, n / 20), options.packing) for n in range(20)]
    assert lowest_error == min(errors)
    assert lowest_error < 0.6 * errors[0]


def test_scales_are_the_magnitudes_of_activations_to_the_power_alpha() -> None:
    gram = torch.diag(torch.tensor([16.0, 1.0, 0.0625]))  # magnitudes 4, 1 and 1/4
    torch.testing.assert_close(scales_for(gram, 0.5), torch.tensor([2.0, 1.0, 0.5]))
    assert torch.equal(scales_for(gram, 0.0), torch.ones(3))


def test_linears_with_the_same_input_share_their_scales(tiny_llama: Path, tmp_path: Path) -> None:
    tokens = torch.randint(3, 512, (4, 24), generator=torch.Generator().manual_seed(0))
    context = Context(Statistics(None, ""), tmp_path, 0, calibration=tokens)
    block = Awq().compress(loading.load(tiny_llama), context).module.model.layers[1]
    attention = block.self_attn
    assert torch.equal(attention.q_proj.input_scales, attention.v_proj.input_scales)
    assert torch.equal(block.mlp.gate_proj.input_scales, block.mlp.up_proj.input_scales)
    assert not torch.equal(attention.q_proj.input_scales, block.mlp.up_proj.input_scales)


def test_unused_inputs_have_finite_positive_scales() -> None:
    weight, x = make_case()
    x[:, 5] = 0
    for gram in (x.T @ x / len(x), torch.zeros(64, 64)):
        scales = best_scales(weight, gram, Awq())
        assert torch.isfinite(scales).all()
        assert (scales > 0).all()
