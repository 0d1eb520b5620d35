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


def case() -> tuple[Tensor, Tensor]:
    """A weight, and activations with outliers in two inputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 64, generator=generator)
    x[:, :2] *= 60
    return torch.randn(24, 64, generator=generator), x


def smoothed(weight: Tensor, x: Tensor, alpha: float, bias: Tensor | None = None) -> PackedLinear:
    known = Smoothquant().packing
    smoothing = smoothing_of(x.abs().amax(0), weight.abs().amax(0), alpha)
    integers, grid = packing.round_to_nearest(weight * smoothing, known)
    return PackedLinear.of(integers, grid.scales, None, known, bias, 1 / smoothing)


def made(folder: Path, workdir: Path) -> Model:
    context = Context(Statistics(None, ""), workdir, 0, calibration=TOKENS)
    return Smoothquant().compress(loading.load(folder), context)


def test_smoothing_leaves_the_product_unchanged() -> None:
    weight, x = case()
    for alpha in (0.0, 0.5, 1.0):
        s = smoothing_of(x.abs().amax(0), weight.abs().amax(0), alpha).double()
        torch.testing.assert_close((x.double() / s) @ (weight.double() * s).T, x.double() @ weight.double().T)


def test_a_worked_case_of_equation_4() -> None:
    # √(max|X| / max|W|): √(16/1), √(1/1), √(1/16)
    made = smoothing_of(torch.tensor([16.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 16.0]), 0.5)
    assert made.tolist() == [4.0, 1.0, 0.25]


def test_inputs_never_seen_are_left_alone() -> None:
    made = smoothing_of(torch.tensor([0.0, 4.0, 3.0]), torch.tensor([1.0, 1.0, 0.0]), 0.5)
    assert made.tolist() == [1.0, 1.0, 1.0]
    assert smoothing_of(torch.zeros(2), torch.ones(2), 0.5).tolist() == [1.0, 1.0]


def test_the_linear_computes_in_integers_one_number_at_a_time() -> None:
    weight, x = case()
    bias = torch.linspace(-1, 1, 24).bfloat16()
    layer = smoothed(weight, x, 0.5, bias)
    y = layer(x)
    integers = layer.packed[:, :64].int() - 128
    for token in range(0, 50, 10):
        read = x[token] * layer.input_scales.float()
        scale = read.abs().max() / 127
        whole = (read / scale).round().int()
        assert whole.abs().max() == 127
        for out in range(0, 24, 5):
            total = sum(int(a) * int(b) for a, b in zip(whole, integers[out], strict=True))
            expected = total * scale * layer.scales[out, 0].float() + bias[out].float()
            assert y[token, out].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)


def test_smoothing_lowers_the_error_that_outliers_in_activations_make() -> None:
    weight, x = case()
    y = x @ weight.T
    errors = [(smoothed(weight, x, alpha)(x) - y).norm().item() for alpha in (0.0, 0.5)]
    assert errors[1] < 0.7 * errors[0]
    assert errors[1] < 0.02 * y.norm().item()


def test_a_token_of_zeros_stays_zero() -> None:
    weight, x = case()
    assert not smoothed(weight, x, 0.5)(torch.zeros(2, 64)).any()


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_runtime_unpacks_once_and_still_rounds_activations(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(f"tiny_{family}")
    model = made(folder, tmp_path)
    loading.save(model, tmp_path / "made", {})
    run = on_torch.load(tmp_path / "made")
    rounding = [part for part in run.module.modules() if isinstance(part, RoundingLinear)]
    assert len(rounding) == len(model.linears())
    assert not any(isinstance(part, PackedLinear) for part in run.module.modules())
    name = next(iter(model.linears()))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    held, running = model.module.get_submodule(name), run.module.get_submodule(name)
    assert torch.equal(held(x), running(x))
    weight = held.weight(torch.bfloat16)
    assert not torch.equal(running(x), nn.functional.linear(x, weight, held.bias))


def test_eight_bits_of_both_are_near_the_original(tiny_llama: Path, tmp_path: Path) -> None:
    before, after = (
        loading.load(tiny_llama).module(TOKENS).logits,
        made(tiny_llama, tmp_path).module(TOKENS).logits,
    )
    assert (after - before).norm() < 0.05 * before.norm()


def test_activations_are_rounded_only_where_scales_are_whole_rows() -> None:
    with pytest.raises(ValueError, match="activation_bits=8 needs a symmetric packing with group=0"):
        Packing(8, 64, True, activation_bits=8)
