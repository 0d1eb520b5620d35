"""Rounding to nearest: grids equal hand-worked cases, and errors fall as bits rise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from jobs.calibration.statistics import Statistics
from jobs.compression import grids
from jobs.context import Context
from jobs.models import loading
from jobs.models.layout import Packing
from jobs.techniques.rtn import Rtn


def round_weight(weight: Tensor, packing: Packing, importance: Tensor | None = None) -> Tensor:
    grouped = grids.grouped(weight, packing)
    grid = grids.fit(grouped, packing, importance)
    return grid.values(grid.integers(grouped)).flatten(1)[:, : weight.shape[1]]


def test_the_grid_equals_the_hand_worked_case() -> None:
    # From −1 to 2 in 3 steps of 1: the zero point is 1.
    weight = torch.tensor([[-1.0, 2.0, 0.4, 0.6]])
    grid = grids.fit(grids.grouped(weight, Packing(2, 0, False)), Packing(2, 0, False))
    assert (grid.scales.item(), grid.zeros.item()) == (1.0, 1.0)
    assert grid.integers(weight.view(1, 1, 4)).flatten().tolist() == [0, 3, 1, 2]


def test_each_weight_is_rounded_to_the_nearest_value_of_its_grid() -> None:
    weight = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    for packing in (Packing(3, 32, False), Packing(3, 32, True), Packing(4, 0, False)):
        rounded = round_weight(weight, packing)
        for group in range(packing.groups(50)):
            columns = slice(group * (packing.group or 50), (group + 1) * (packing.group or 50))
            grid = grids.fit(grids.grouped(weight, packing), packing)
            grid_values = (torch.arange(2**packing.bits) - grid.zeros[:, group, None]) * grid.scales[
                :, group, None
            ]
            distances = (weight[:, columns, None] - grid_values[:, None, :]).abs().amin(dim=-1)
            assert torch.allclose((rounded - weight)[:, columns].abs(), distances, atol=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [0, 32, 128])
def test_the_error_falls_as_bits_rise(symmetric: bool, group: int) -> None:
    weight = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
    errors = [
        (round_weight(weight, Packing(bits, group, symmetric)) - weight).norm() for bits in (2, 3, 4, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02 * weight.norm()


def test_clipping_by_importance_reduces_the_weighted_error() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, packing = torch.randn(8, 64, generator=generator), Packing(3, 32, False)
    weight[:, 5] *= 4
    importance = torch.rand(2, 32, generator=generator)
    costs = [
        (importance.flatten() * (round_weight(weight, packing, chosen) - weight).square()).sum()
        for chosen in (None, importance)
    ]
    assert costs[1] < costs[0]


def test_weights_too_large_for_fp16_scales_are_refused() -> None:
    with pytest.raises(ValueError, match="too large for fp16 scales"):
        round_weight(torch.full((1, 8), 1e9), Packing(4, 0, False))


def test_rows_of_zeros_stay_zero() -> None:
    assert not round_weight(torch.zeros(2, 8), Packing(4, 0, True)).any()
    assert not round_weight(torch.zeros(2, 8), Packing(4, 0, False)).any()


def test_eight_bits_are_close_to_the_original(tiny_llama: Path, tmp_path: Path) -> None:
    tokens = torch.randint(3, 512, (2, 16))
    model = loading.load(tiny_llama)
    expected = model.module(tokens).logits
    Rtn(bits=8, group=32).compress(model, Context(Statistics(None, ""), tmp_path, 0))
    actual = model.module(tokens).logits
    assert (actual - expected).norm() < 0.05 * expected.norm()
