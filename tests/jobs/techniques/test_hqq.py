from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jobs.compression import grids
from jobs.models.layers import PackedLinear
from jobs.techniques.hqq import Hqq, fit, nearest, shrink


def weights(columns: int = 96) -> Tensor:
    """Normal ones with a few outliers."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, columns, generator=generator) * torch.rand(6, columns, generator=generator).pow(
        -0.4
    )


def fitted(weight: Tensor, options: Hqq) -> tuple[Tensor, grids.Grid]:
    grouped = grids.grouped(weight, options.packing)
    present = grids.grouped(torch.ones_like(weight[:1]), options.packing)[0]
    grid = fit(grouped, present, options)
    return nearest(grouped, grid), grid


def errors(weight: Tensor, options: Hqq) -> Tensor:
    """Summed |error|^p of each row and group, the filling left out."""
    whole, grid = fitted(weight, options)
    made = grid.values(whole).flatten(1)[:, : weight.shape[1]]
    return powers(made - weight, options)


def powers(difference: Tensor, options: Hqq) -> Tensor:
    return torch.stack(
        [part.abs().pow(options.norm).sum(1) for part in difference.split(options.group or 10**6, 1)]
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("columns", [96, 80])
def test_no_group_has_a_larger_error_than_rounding_to_nearest(bits: int, columns: int) -> None:
    weight, options = weights(columns), Hqq(bits=bits, group=32)
    grouped = grids.grouped(weight, options.packing)
    grid = grids.fit(grouped, options.packing)
    made = grid.values(grid.integers(grouped)).flatten(1)[:, :columns]
    plain = powers(made - weight, options)
    assert (errors(weight, options) <= plain * (1 + 1e-5)).all()
    assert errors(weight, options).sum() < 0.98 * plain.sum()


def slow(group: list[float], bits: int, norm: float, iterations: int) -> float:
    """The least error of one group over the iterations, number by number, in Python."""
    low, high = min(0.0, *group), max(0.0, *group)
    scale = torch.tensor((high - low) / (2**bits - 1)).half().item()
    zero: float = min(max(round(-low / scale), 0), 2**bits - 1)
    beta, least = 10.0, float("inf")
    for turn in range(iterations + 1):
        q = [min(max(round(w / scale + zero), 0), 2**bits - 1) for w in group]
        away = [w - (each - zero) * scale for w, each in zip(group, q, strict=True)]
        least = min(least, sum(abs(e) ** norm for e in away))
        given = [
            0.0 if e == 0 else (1 if e > 0 else -1) * max(0.0, abs(e) - abs(e) ** (norm - 1) / beta)
            for e in away
        ]
        wanted = [each - (w - e) / scale for each, w, e in zip(q, group, given, strict=True)]
        zero = torch.tensor(sum(wanted) / len(wanted)).half().item()
        beta *= 1.01 if turn < iterations else 1
    return least


@pytest.mark.parametrize("norm", [0.5, 0.7, 1.0])
def test_it_equals_a_loop_over_single_numbers(norm: float) -> None:
    weight, options = weights(), Hqq(bits=3, group=32, norm=norm, iterations=6)
    made = errors(weight, options)
    for row in range(len(weight)):
        for place, group in enumerate(weight[row].split(32)):
            expected = slow(group.tolist(), 3, norm, 6)
            assert made[place, row].item() == pytest.approx(expected, rel=1e-2)


def test_shrinkage_gives_up_large_errors_and_keeps_small_ones() -> None:
    # 2 − 2^(−1/2)/2 = 1.6464; 0.25 − 0.25^(−1/2)/2 < 0
    made = shrink(torch.tensor([2.0, -2.0, 0.25, 0.0]), penalty=2.0, norm=0.5)
    assert made.tolist() == pytest.approx([1.6464466, -1.6464466, 0.0, 0.0])


def test_what_fills_up_a_short_group_does_not_move_its_zero_point() -> None:
    weight = weights(80) + 2
    _, grid = fitted(weight, Hqq(bits=3, group=64))
    _, alone = fitted(weight[:, 64:], Hqq(bits=3, group=0))
    torch.testing.assert_close(grid.zeros[:, 1], alone.zeros[:, 0])


def test_real_zero_points_are_packed_to_the_last_digit() -> None:
    weight, options = weights(), Hqq(bits=4, group=32)
    whole, grid = fitted(weight, options)
    zeros = grids.stored_zeros(grid, options.packing)
    layer = PackedLinear.of(whole.flatten(1), grid.scales, zeros, options.packing, None)
    assert (grid.zeros != grid.zeros.round()).any()
    assert torch.equal(layer.weight(), grid.values(whole).flatten(1))
