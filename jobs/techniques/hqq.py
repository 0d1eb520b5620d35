"""hqq: fit each group's zero point so that most weights are rounded well and outliers badly."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jobs.compression import grids, packing
from jobs.compression.packing import Quantization
from jobs.context import Context
from jobs.knobs import Range, knob
from jobs.models.layers import check_finite
from jobs.models.layout import Form, Packing
from jobs.models.model import Model
from jobs.models.placement import on_device
from jobs.technique import Kind, Technique

_PENALTY = 10.0
"""The initial β, that of the paper."""
_PENALTY_GROWTH = 1.01
"""The factor of β per iteration, that of the paper."""


@dataclass(frozen=True)
class Hqq(Technique):
    """Fits the zero point of each group to minimize the l_p norm of the rounding error, with p < 1.

    Such a norm makes most errors small at the expense of a few outliers. It needs no data, so the low-rank
    correction minimizes the error of the weights. Scales are those of rtn. Zero points are real numbers in
    fp16, one byte per group more than whole numbers, which cannot follow the closed form. Where we depart from
    the paper: each group keeps the best of its iterations and of rtn; the paper stops all groups together
    when the mean error no longer falls.
    """

    kind: ClassVar[Kind] = "bits"
    version: ClassVar[int] = 2
    paper: ClassVar[str] = "Badri & Shaji 2023, Half-Quadratic Quantization, mobiusml.github.io/hqq_blog"
    accepts: ClassVar[frozenset[Form]] = frozenset({"dense", "factored"})
    produces: ClassVar[frozenset[Form]] = frozenset({"packed"})
    by_block: ClassVar[frozenset[str]] = packing.OPTIONS_BY_LINEAR
    by_linear: ClassVar[frozenset[str]] = packing.OPTIONS_BY_LINEAR

    bits: int | str = packing.bits_knob(4)
    group: int = packing.group_knob()
    embedding_bits: int = packing.embedding_bits_knob()
    correction_rank: int | str = packing.correction_rank_knob()
    norm: float = knob(0.7, Range(0.1, 1.0), "p of the l_p norm of the error")
    iterations: int = knob(20, Range(1, 200, integer=True), "alternations of shrinkage and closed form")

    @functools.cached_property
    def packing(self) -> Packing:
        return Packing(int(self.bits), self.group, symmetric=False, real_zeros=True)

    @property
    def layout_change(self) -> Quantization:
        return Quantization(self)

    def compress(self, model: Model, context: Context) -> Model:
        self.output_layout(model.layout())
        linears, steps = model.linears(), self.for_linears(model.layout())
        for index, (name, layer) in enumerate(linears.items()):
            context.report(index / len(linears), name)
            with on_device(model, name):
                weight = check_finite(cast(nn.Linear, layer).weight.detach().float(), self.name(), name)
                step = steps[name]
                grouped = grids.grouped(weight, step.packing)
                present = grids.grouped(torch.ones_like(weight[:1]), step.packing)[0]
                grid = fit(grouped, present, step)
                integers = nearest(grouped, grid).flatten(1)[:, : weight.shape[1]]
                packing.pack_linear(model, name, integers, grid, step.packing)
                packing.correct(model, name, weight, None, step)
        packing.pack_tables(model, self)
        return model


def fit(
    weight: Float[Tensor, "rows groups columns"], present: Float[Tensor, "groups columns"], options: Hqq
) -> grids.Grid:
    """Return the grid of each group, whose zero point is found by half-quadratic splitting (Badri & Shaji).

    Two steps alternate: the rounding error is shrunk to a sparse error E by generalized soft-thresholding with
    weight β, and the zero point becomes the mean of q − (W − E) / scale. `present` is 1 for weights and 0 for
    the padding of a shorter last group.
    """
    start = grids.fit(weight, options.packing)
    best, best_cost = start, _cost(weight, present, start, options.norm)
    counts = present.sum(dim=-1)
    zeros, penalty = start.zeros, _PENALTY
    for _ in range(options.iterations):
        grid = grids.Grid(start.scales, zeros, options.packing.bits)
        integers = nearest(weight, grid)
        sparse_error = shrink(weight - grid.values(integers), penalty, options.norm)
        target = integers - (weight - sparse_error) / start.scales.unsqueeze(-1)
        # Rounded to the type that the file stores.
        zeros = (torch.einsum("rgc,gc->rg", target, present) / counts).half().float()
        penalty *= _PENALTY_GROWTH
        grid = grids.Grid(start.scales, zeros, options.packing.bits)
        cost = _cost(weight, present, grid, options.norm)
        best_zeros = torch.where(cost < best_cost, zeros, best.zeros)
        best = grids.Grid(start.scales, best_zeros, options.packing.bits)
        best_cost = torch.minimum(cost, best_cost)
    return best


def nearest(
    weight: Float[Tensor, "rows groups columns"], grid: grids.Grid
) -> Float[Tensor, "rows groups columns"]:
    """Return the nearest q of each weight on a grid whose zero point is not a whole number."""
    integers = (weight / grid.scales.unsqueeze(-1)).add_(grid.zeros.unsqueeze(-1)).round_()
    return integers.clamp_(0, 2**grid.bits - 1)


def shrink(errors: Tensor, penalty: float, norm: float) -> Tensor:
    """Return sign(e) · max(0, |e| − |e|^(p−1) / β), which nearly minimizes |x|^p + β/2 (x − e)² over x."""
    size = errors.abs()  # where it is 0, its power is infinite, and the difference is clamped to 0
    return errors.sign() * (size - size.pow(norm - 1) / penalty).clamp_(min=0)


def _cost(
    weight: Float[Tensor, "rows groups columns"],
    present: Float[Tensor, "groups columns"],
    grid: grids.Grid,
    norm: float,
) -> Float[Tensor, "rows groups"]:
    errors = (weight - grid.values(nearest(weight, grid))).abs_().pow_(norm)
    return torch.einsum("rgc,gc->rg", errors, present)
