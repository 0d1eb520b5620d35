"""HQQ: its zero points are checked against a loop over single numbers and against rounding to nearest."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from jobs.compression import grids
from jobs.models.layers import PackedLinear
from jobs.techniques.hqq import Hqq, fit, nearest, shrink


def weights(columns: int = 96) -> Tensor:
    """Return normally distributed weights with a few outliers."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, columns, generator=generator) * torch.rand(6, columns, generator=generator).pow(
        -0.4
    )


def fit_grid(weight: Tensor, options: Hqq) -> tuple[Tensor, grids.Grid]:
    grouped = grids.grouped(weight, options.packing)
    present = grids.grouped(torch.ones_like(weight[:1]), options.packing)[0]
    grid = fit(grouped, present, options)
    return nearest(grouped, grid), grid


def group_errors(weight: Tensor, options: Hqq) -> Tensor:
    """Return the sum of |error|^p of each row and group, without padding."""
    integers, grid = fit_grid(weight, options)
    rounded = grid.values(integers).flatten(1)[:, : weight.shape[1]]
    return sum_powers(rounded - weight, options)


def sum_powers(difference: Tensor, options: Hqq) -> Tensor:
    return torch.stack(
        [part.abs().pow(options.norm).sum(1) for part in difference.split(options.group or 10**6, 1)]
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("columns", [96, 80])
def test_no_group_has_a_larger_error_than_rounding_to_nearest(bits: int, columns: int) -> None:
    weight, options = weights(columns), Hqq(bits=bits, group=32)
    grouped = grids.grouped(weight, options.packing)
    grid = grids.fit(grouped, options.packing)
    rounded = grid.values(grid.integers(grouped)).flatten(1)[:, :columns]
    plain = sum_powers(rounded - weight, options)
    assert (group_errors(weight, options) <= plain * (1 + 1e-5)).all()
    assert group_errors(weight, options).sum() < 0.98 * plain.sum()


def shrink_slowly(error: float, norm: float, beta: float) -> float:
    """Return the shrunk error of a single number."""
    if error == 0:
        return 0.0
    return math.copysign(max(0.0, abs(error) - abs(error) ** (norm - 1) / beta), error)


def fit_slowly(group: list[float], bits: int, norm: float, iterations: int) -> float:
    """Return the least error of one group over the iterations, computed number by number in Python."""
    low, high = min(0.0, *group), max(0.0, *group)
    scale = torch.tensor((high - low) / (2**bits - 1)).half().item()
    zero: float = min(max(round(-low / scale), 0), 2**bits - 1)
    beta, lowest_error = 10.0, float("inf")
    for iteration in range(iterations + 1):
        q = [min(max(round(w / scale + zero), 0), 2**bits - 1) for w in group]
        errors = [w - (integer - zero) * scale for w, integer in zip(group, q, strict=True)]
        lowest_error = min(lowest_error, sum(abs(error) ** norm for error in errors))
        shrunk = [shrink_slowly(error, norm, beta) for error in errors]
        zeros = [integer - (w - error) / scale for integer, w, error in zip(q, group, shrunk, strict=True)]
        zero = torch.tensor(sum(zeros) / len(zeros)).half().item()
        if iteration < iterations:
            beta *= 1.01
    return lowest_error


@pytest.mark.parametrize("norm", [0.5, 0.7, 1.0])
def test_it_equals_a_loop_over_single_numbers(norm: float) -> None:
    weight, options = weights(), Hqq(bits=3, group=32, norm=norm, iterations=6)
    errors = group_errors(weight, options)
    for row in range(len(weight)):
        for group_index, group in enumerate(weight[row].split(32)):
            expected = fit_slowly(group.tolist(), 3, norm, 6)
            assert errors[group_index, row].item() == pytest.approx(expected, rel=1e-2)


def test_shrinkage_reduces_large_errors_and_zeroes_small_ones() -> None:
    # 2 − 2^(−1/2)/2 = 1.6464; 0.25 − 0.25^(−1/2)/2 < 0
    shrunk = shrink(torch.tensor([2.0, -2.0, 0.25, 0.0]), penalty=2.0, norm=0.5)
    assert shrunk.tolist() == pytest.approx([1.6464466, -1.6464466, 0.0, 0.0])


def test_the_padding_of_a_short_group_does_not_move_its_zero_point() -> None:
    weight = weights(80) + 2
    _, grid = fit_grid(weight, Hqq(bits=3, group=64))
    _, unpadded_grid = fit_grid(weight[:, 64:], Hqq(bits=3, group=0))
    torch.testing.assert_close(grid.zeros[:, 1], unpadded_grid.zeros[:, 0])


def test_real_valued_zero_points_are_packed_exactly() -> None:
    weight, options = weights(), Hqq(bits=4, group=32)
    integers, grid = fit_grid(weight, options)
    zeros = grids.stored_zeros(grid, options.packing)
    layer = PackedLinear.of(integers.flatten(1), grid.scales, zeros, options.packing, None)
    assert (grid.zeros != grid.zeros.round()).any()
    assert torch.equal(layer.weight(), grid.values(integers).flatten(1))
