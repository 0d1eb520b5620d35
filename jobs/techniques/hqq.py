"""hqq: move each group's zero point so that the few large rounding errors cost little."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jobs.compression import grids, packing
from jobs.context import Context
from jobs.knobs import Range, knob
from jobs.models.layers import check_finite
from jobs.models.layout import Form, Layout, Packing
from jobs.models.model import Model
from jobs.models.placement import on_device
from jobs.technique import Kind, Technique

_PENALTY = 10.0
_PENALTY_GROWTH = 1.01
"""β at first, and by what it grows with each iteration: the paper's."""


@dataclass(frozen=True)
class Hqq(Technique):
    """Fits the zero point of each group so that the l_p norm of the error, p < 1, is small: most weights
    come near their values, and outliers are given up.

    Needs no data, so its correction of low rank counts all inputs alike. Scales are those of rounding to
    nearest. Zero points are real numbers, held in fp16: a byte more per group than whole ones, which cannot
    follow the closed form. Of all iterations each group keeps its best, rounding to nearest included, where
    the paper stops all groups at once when the mean error no longer falls.
    """

    kind: ClassVar[Kind] = "bits"
    version: ClassVar[int] = 2
    paper: ClassVar[str] = "Badri & Shaji 2023, Half-Quadratic Quantization, mobiusml.github.io/hqq_blog"
    accepts: ClassVar[frozenset[Form]] = frozenset({"dense", "factored"})
    produces: ClassVar[frozenset[Form]] = frozenset({"packed"})
    by_block: ClassVar[frozenset[str]] = packing.BY_LINEAR
    by_linear: ClassVar[frozenset[str]] = packing.BY_LINEAR

    bits: int | str = packing.bits_knob(4)
    group: int = packing.group_knob()
    embedding_bits: int = packing.embedding_bits_knob()
    correction_rank: int | str = packing.correction_rank_knob()
    norm: float = knob(0.7, Range(0.1, 1.0), "p of the l_p norm of the error")
    iterations: int = knob(20, Range(1, 200, integer=True), "alternations of shrinkage and closed form")

    @functools.cached_property
    def packing(self) -> Packing:
        return Packing(int(self.bits), self.group, symmetric=False, real_zeros=True)

    def output_layout(self, layout: Layout) -> Layout:
        return packing.output_layout(self, layout)

    def compress(self, model: Model, context: Context) -> Model:
        self.output_layout(model.layout())
        linears, steps = model.linears(), self.for_linears(model.layout())
        for done, (name, layer) in enumerate(linears.items()):
            context.report(done / len(linears), name)
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
    """The grid of each group, its zero point found by half-quadratic splitting (Badri & Shaji).

    In turn, what rounding errs is shrunk to the error E that is given up, by generalized soft-thresholding
    with weight β, and the zero point becomes the mean of q − (W − E) / scale.
    present: 1 for weights, 0 for what fills up a shorter last group.
    """
    start = grids.fit(weight, options.packing)
    best, least = start, _cost(weight, present, start, options.norm)
    counts = present.sum(dim=-1)
    zeros, penalty = start.zeros, _PENALTY
    for _ in range(options.iterations):
        grid = grids.Grid(start.scales, zeros, options.packing.bits)
        whole = nearest(weight, grid)
        given_up = shrink(weight - grid.values(whole), penalty, options.norm)
        wanted = whole - (weight - given_up) / start.scales.unsqueeze(-1)
        # Rounded to what the file will hold.
        zeros = (torch.einsum("rgc,gc->rg", wanted, present) / counts).half().float()
        penalty *= _PENALTY_GROWTH
        grid = grids.Grid(start.scales, zeros, options.packing.bits)
        cost = _cost(weight, present, grid, options.norm)
        best = grids.Grid(start.scales, torch.where(cost < least, zeros, best.zeros), options.packing.bits)
        least = torch.minimum(cost, least)
    return best


def nearest(
    weight: Float[Tensor, "rows groups columns"], grid: grids.Grid
) -> Float[Tensor, "rows groups columns"]:
    """The nearest q of each weight on a grid whose zero point is no whole number."""
    whole = (weight / grid.scales.unsqueeze(-1)).add_(grid.zeros.unsqueeze(-1)).round_()
    return whole.clamp_(0, 2**grid.bits - 1)


def shrink(errors: Tensor, penalty: float, norm: float) -> Tensor:
    """sign(e) · max(0, |e| − |e|^(p−1) / β), which nearly minimizes |x|^p + β/2 (x − e)² over x."""
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
