"""SmoothQuant: smoothing keeps the product, linears compute in integers, and outliers cause smaller errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from jobs.calibration.statistics import Statistics
from jobs.compression import packing
from jobs.context import Context
from jobs.models import loading
from jobs.models.layers import PackedLinear, RoundingLinear
from jobs.models.layout import Packing
from jobs.models.model import Model
from jobs.runtimes import on_torch
from jobs.techniques.smoothquant import Smoothquant, smoothing_of

TOKENS = torch.randint(3, 512, (4, 24), generator=torch.Generator().manual_seed(0))


def make_case() -> tuple[Tensor, Tensor]:
    """Return a weight and activations with outliers in two inputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 64, generator=generator)
    x[:, :2] *= 60
    return torch.randn(24, 64, generator=generator), x


def make_smoothed(weight: Tensor, x: Tensor, alpha: float, bias: Tensor | None = None) -> PackedLinear:
    options = Smoothquant().packing
    smoothing = smoothing_of(x.abs().amax(0), weight.abs().amax(0), alpha)
    integers, grid = packing.round_to_nearest(weight * smoothing, options)
    return PackedLinear.of(integers, grid.scales, None, options, bias, 1 / smoothing)


def compress(folder: Path, workdir: Path) -> Model:
    context = Context(Statistics(None, ""), workdir, 0, calibration=TOKENS)
    return Smoothquant().compress(loading.load(folder), context)


def test_smoothing_leaves_the_product_unchanged() -> None:
    weight, x = make_case()
    for alpha in (0.0, 0.5, 1.0):
        s = smoothing_of(x.abs().amax(0), weight.abs().amax(0), alpha).double()
        torch.testing.assert_close((x.double() / s) @ (weight.double() * s).T, x.double() @ weight.double().T)


def test_equation_4_equals_the_hand_worked_case() -> None:
    # √(max|X| / max|W|): √(16/1), √(1/1), √(1/16)
    smoothing = smoothing_of(torch.tensor([16.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 16.0]), 0.5)
    assert smoothing.tolist() == [4.0, 1.0, 0.25]


def test_unused_inputs_are_not_scaled() -> None:
    smoothing = smoothing_of(torch.tensor([0.0, 4.0, 3.0]), torch.tensor([1.0, 1.0, 0.0]), 0.5)
    assert smoothing.tolist() == [1.0, 1.0, 1.0]
    assert smoothing_of(torch.zeros(2), torch.ones(2), 0.5).tolist() == [1.0, 1.0]


def test_the_linear_equals_a_loop_over_integer_products() -> None:
    weight, x = make_case()
    bias = torch.linspace(-1, 1, 24).bfloat16()
    layer = make_smoothed(weight, x, 0.5, bias)
    y = layer(x)
    integers = layer.packed[:, :64].int() - 128
    for token in range(0, 50, 10):
        scaled_input = x[token] * layer.input_scales.float()
        scale = scaled_input.abs().max() / 127
        rounded = (scaled_input / scale).round().int()
        assert rounded.abs().max() == 127
        for out in range(0, 24, 5):
            total = sum(int(a) * int(b) for a, b in zip(rounded, integers[out], strict=True))
            expected = total * scale * layer.scales[out, 0].float() + bias[out].float()
            assert y[token, out].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)


def test_smoothing_reduces_the_error_from_outliers_in_activations() -> None:
    weight, x = make_case()
    y = x @ weight.T
    errors = [(make_smoothed(weight, x, alpha)(x) - y).norm().item() for alpha in (0.0, 0.5)]
    assert errors[1] < 0.7 * errors[0]
    assert errors[1] < 0.02 * y.norm().item()


def test_a_token_of_zeros_stays_zero() -> None:
    weight, x = make_case()
    assert not make_smoothed(weight, x, 0.5)(torch.zeros(2, 64)).any()


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_runtime_unpacks_once_and_still_rounds_activations(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(f"tiny_{family}")
    model = compress(folder, tmp_path)
    loading.save(model, tmp_path / "made", {})
    runtime_model = on_torch.load(tmp_path / "made")
    rounding = [part for part in runtime_model.module.modules() if isinstance(part, RoundingLinear)]
    assert len(rounding) == len(model.linears())
    assert not any(isinstance(part, PackedLinear) for part in runtime_model.module.modules())
    name = next(iter(model.linears()))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed_linear, runtime_linear = model.module.get_submodule(name), runtime_model.module.get_submodule(name)
    assert torch.equal(packed_linear(x), runtime_linear(x))
    weight = packed_linear.weight(torch.bfloat16)
    assert not torch.equal(runtime_linear(x), nn.functional.linear(x, weight, packed_linear.bias))


def test_eight_bits_for_weights_and_activations_are_close_to_the_original(
    tiny_llama: Path, tmp_path: Path
) -> None:
    expected, actual = (
        loading.load(tiny_llama).module(TOKENS).logits,
        compress(tiny_llama, tmp_path).module(TOKENS).logits,
    )
    assert (actual - expected).norm() < 0.05 * expected.norm()


def test_rounded_activations_need_one_scale_per_row() -> None:
    with pytest.raises(ValueError, match="activation_bits=8 needs a symmetric packing with group=0"):
        Packing(8, 64, True, activation_bits=8)
