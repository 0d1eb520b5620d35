"""Grids: the evenly spaced values that the weights of a group may take, and the rounding to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jobs.models.layout import Packing

_TINY = 2.0**-24  # the smallest fp16
_SHRINKS = 10
_AT_ONCE = 2**18
"""Weights whose grids are fitted together: what is made of more does not stay in a processor's cache."""


@dataclass(frozen=True)
class Grid:
    """The values scale · (q − zero) for whole q in [0, 2**bits), one grid per row and group.

    scales are fp32 tensors whose values are fp16 numbers, since the file holds them so; zeros are whole,
    or with real zeros fp16 numbers too.
    """

    scales: Float[Tensor, "rows groups"]
    zeros: Float[Tensor, "rows groups"]
    bits: int

    def integers(self, weight: Float[Tensor, "rows groups columns"]) -> Float[Tensor, "rows groups columns"]:
        """The nearest q of each weight."""
        whole = (weight / self.scales.unsqueeze(-1)).round_() + self.zeros.unsqueeze(-1)
        return whole.clamp_(0, 2**self.bits - 1)

    def values(self, integers: Float[Tensor, "rows groups columns"]) -> Float[Tensor, "rows groups columns"]:
        return (integers - self.zeros.unsqueeze(-1)) * self.scales.unsqueeze(-1)


def grouped(weight: Float[Tensor, "rows in"], packing: Packing) -> Float[Tensor, "rows groups columns"]:
    """The weight by groups; a shorter last group is filled up with zeros, which every grid holds exactly."""
    group = packing.group or weight.shape[1]
    filled = nn.functional.pad(weight, (0, -weight.shape[1] % group))
    return filled.view(len(weight), -1, group)


def fit(
    weight: Float[Tensor, "rows groups columns"],
    packing: Packing,
    importance: Float[Tensor, "groups columns"] | None = None,
) -> Grid:
    """The grid of each group: it spans the weights and zero; a symmetric one is centred on zero.

    importance: how much the square of each column's error counts. Where it is given, spans down to half
    are tried as well, and the one of the least error taken, though it clips the few weights outside.
    Raises ValueError where fp16 cannot hold a scale.
    """
    rows = max(1, _AT_ONCE // weight[0].numel()) if weight.device.type == "cpu" else len(weight)
    parts = [_fit(some, packing, importance) for some in torch.split(weight, rows)]
    scales, zeros = torch.cat([one.scales for one in parts]), torch.cat([one.zeros for one in parts])
    return Grid(scales, zeros, packing.bits)


def _fit(weight: Tensor, packing: Packing, importance: Tensor | None) -> Grid:
    low = weight.amin(dim=-1).clamp_(max=0)
    high = weight.amax(dim=-1).clamp_(min=0)
    best = _spanning(low, high, packing)
    if importance is None:
        return best
    least = _error(best, weight, importance)
    for step in range(1, _SHRINKS + 1):
        share = 1 - 0.5 * step / _SHRINKS
        other = _spanning(low * share, high * share, packing)
        error = _error(other, weight, importance)
        better = error < least
        least = torch.where(better, error, least)
        best = Grid(
            torch.where(better, other.scales, best.scales),
            torch.where(better, other.zeros, best.zeros),
            packing.bits,
        )
    return best


def _spanning(low: Tensor, high: Tensor, packing: Packing) -> Grid:
    steps = 2**packing.bits - 1
    span = 2 * torch.maximum(-low, high) if packing.symmetric else high - low
    # Rounded first, so that weights are quantized with the scale that the file will hold.
    scales = (span / steps).half().float().clamp_(min=_TINY)
    if not bool(torch.isfinite(scales).all()):
        raise ValueError(
            f"weights up to {max(high.max().item(), -low.min().item()):g} are too large for fp16 scales"
        )
    if packing.symmetric:
        return Grid(scales, torch.full_like(scales, 2 ** (packing.bits - 1)), packing.bits)
    return Grid(scales, (-low / scales).round_().clamp_(0, steps), packing.bits)


def _error(
    grid: Grid, weight: Float[Tensor, "rows groups columns"], importance: Float[Tensor, "groups columns"]
) -> Float[Tensor, "rows groups"]:
    squares = grid.values(grid.integers(weight)).sub_(weight).square_()
    return torch.einsum("rgc,gc->rg", squares, importance)


def stored_zeros(grid: Grid, packing: Packing) -> Tensor | None:
    """The zero points [rows, groups] as the file holds them, bytes or fp16; a symmetric packing holds none."""
    if packing.symmetric:
        return None
    return grid.zeros.to(torch.float16 if packing.real_zeros else torch.uint8)
