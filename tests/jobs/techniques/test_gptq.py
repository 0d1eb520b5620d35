"""GPTQ: rounded weights equal the paper's equations, worked row by row, and have smaller output errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jobs.compression import grids
from jobs.models.layout import Packing
from jobs.techniques.gptq import Gptq, quantize


def make_case(seed: int, out: int = 6, into: int = 80, tokens: int = 300) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, into, generator=generator) @ torch.randn(into, into, generator=generator)
    return torch.randn(out, into, generator=generator), x.T @ x / tokens


def quantize_and_restore(weight: Tensor, gram: Tensor, options: Gptq) -> Tensor:
    integers, grid = quantize(weight, gram, options)
    grouped = grids.grouped(integers, options.packing)
    return grid.values(grouped).flatten(1)[:, : weight.shape[1]]


def output_error(difference: Tensor, gram: Tensor) -> float:
    return (difference @ gram * difference).sum().item()


def quantize_slowly(weight: Tensor, gram: Tensor, options: Gptq) -> Tensor:
    """Quantize row by row (Frantar et al., eq. 2 and 3): round an input, update the others, shrink the inverse."""
    packing: Packing = options.packing
    size = weight.shape[1]
    group = packing.group or size
    fixed = grids.fit(grids.grouped(weight, packing), packing)
    gram = gram.double() + options.damping * gram.double().diagonal().mean() * torch.eye(size)
    natural = options.order == "natural"
    order = list(range(size))
    if not natural:
        order = torch.argsort(gram.diagonal(), descending=True).tolist()
    rounded = torch.empty_like(weight)
    for row in range(len(weight)):
        w, inverse = weight[row].double(), torch.linalg.inv(gram)
        for q in order:
            if natural and packing.group and q % group == 0:
                group_weights = w[q : q + group].float().view(1, 1, -1)
                grid = grids.fit(group_weights, packing)
                scale, zero = grid.scales.item(), grid.zeros.item()
            elif not natural or q == 0:
                scale, zero = fixed.scales[row, q // group].item(), fixed.zeros[row, q // group].item()
            integer = torch.clamp(torch.round(w[q] / scale) + zero, 0, 2**packing.bits - 1)
            rounded[row, q] = (integer - zero) * scale
            w = w - inverse[:, q] * (w[q] - rounded[row, q]) / inverse[q, q]
            inverse = inverse - torch.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    return rounded


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_result_equals_the_papers_equations_worked_one_by_one(
    order: str, group: int, symmetric: bool
) -> None:
    weight, gram = make_case(0)
    options = Gptq(bits=3, group=group, symmetric=symmetric, order=order, clip=False)
    actual, expected = quantize_and_restore(weight, gram, options), quantize_slowly(weight, gram, options)
    # A weight halfway between two values may be rounded either way, which changes later weights too.
    assert (actual - expected).abs().gt(1e-3).float().mean() < 0.02
    assert output_error(weight - actual, gram) == pytest.approx(
        output_error(weight - expected, gram), rel=0.02
    )


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_output_error_is_smaller_than_with_rounding_to_nearest(order: str, bits: int) -> None:
    weight, gram = make_case(1)
    options = Gptq(bits=bits, group=32, order=order, clip=False)
    grouped = grids.grouped(weight, options.packing)
    grid = grids.fit(grouped, options.packing)
    nearest = grid.values(grid.integers(grouped)).flatten(1)[:, : weight.shape[1]]
    assert output_error(weight - quantize_and_restore(weight, gram, options), gram) < 0.7 * output_error(
        weight - nearest, gram
    )


def test_the_error_falls_as_bits_rise() -> None:
    weight, gram = make_case(2)
    errors = [
        output_error(weight - quantize_and_restore(weight, gram, Gptq(bits=bits)), gram)
        for bits in (2, 3, 4, 8)
    ]
    assert errors == sorted(errors, reverse=True)


def test_with_uncorrelated_inputs_weights_are_rounded_to_nearest() -> None:
    weight, _ = make_case(3)
    options = Gptq(bits=4, group=32, clip=False)
    grouped = grids.grouped(weight, options.packing)
    grid = grids.fit(grouped, options.packing)
    integers, _ = quantize(weight, torch.eye(weight.shape[1]), options)
    assert torch.equal(integers, grid.integers(grouped).flatten(1)[:, : weight.shape[1]])


def test_unused_inputs_and_a_singular_gram_give_finite_weights() -> None:
    weight, _ = make_case(4)
    x = torch.randn(5, 80, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 0
    for gram in (x.T @ x, torch.zeros(80, 80)):
        for order in ("natural", "activation"):
            assert torch.isfinite(quantize_and_restore(weight, gram, Gptq(order=order))).all()


def test_rows_do_not_depend_on_other_stacked_rows() -> None:
    weight, gram = make_case(5)
    separate, _ = quantize(weight[:3].clone(), gram, Gptq())
    stacked, _ = quantize(weight, gram, Gptq())
    assert (separate != stacked[:3]).float().mean() < 0.01
