"""Grids: the evenly spaced values that the weights of a group may take, and rounding to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jobs.models.layout import Packing

SMALLEST_SCALE = 2.0**-24
"""The smallest positive fp16 number."""
_SHRINKS = 10
"""Number of narrower spans that `fit` tries, evenly spaced from the full span to half of it."""
_CACHED_WEIGHTS = 2**18
"""Weights whose grids are fitted at once on a CPU: intermediate results of more do not fit into its cache."""


@dataclass(frozen=True)
class Grid:
    """The values scale · (q − zero) for whole q in [0, 2**bits), with one grid per row and group."""

    scales: Float[Tensor, "rows groups"]
    """fp32 tensors whose values are fp16 numbers, as the file stores them."""
    zeros: Float[Tensor, "rows groups"]
    """Whole numbers; with real zero points, fp16 numbers."""
    bits: int

    def integers(self, weight: Float[Tensor, "rows groups columns"]) -> Float[Tensor, "rows groups columns"]:
        """Return the nearest q of each weight."""
        rounded = (weight / self.scales.unsqueeze(-1)).round_() + self.zeros.unsqueeze(-1)
        return rounded.clamp_(0, 2**self.bits - 1)

    def values(self, integers: Float[Tensor, "rows groups columns"]) -> Float[Tensor, "rows groups columns"]:
        return (integers - self.zeros.unsqueeze(-1)) * self.scales.unsqueeze(-1)


def grouped(weight: Float[Tensor, "rows in"], packing: Packing) -> Float[Tensor, "rows groups columns"]:
    """Return the weight by groups; a shorter last group is padded with zeros, which every grid contains."""
    group = packing.group or weight.shape[1]
    padded = nn.functional.pad(weight, (0, -weight.shape[1] % group))
    return padded.view(len(weight), -1, group)


def fit(
    weight: Float[Tensor, "rows groups columns"],
    packing: Packing,
    importance: Float[Tensor, "groups columns"] | None = None,
) -> Grid:
    """Return the grid of each group: it spans the weights and zero; a symmetric grid is centred on zero.

    `importance` weighs the squared error of each column. If it is not None, narrower spans down to half are
    tried as well, and the span of least error is selected, although it clips the few weights outside. Raises
    ValueError if a scale is too large for fp16.
    """
    rows = len(weight)
    if weight.device.type == "cpu":
        rows = max(1, _CACHED_WEIGHTS // weight[0].numel())
    fitted = [_fit(part, packing, importance) for part in torch.split(weight, rows)]
    scales = torch.cat([grid.scales for grid in fitted])
    zeros = torch.cat([grid.zeros for grid in fitted])
    return Grid(scales, zeros, packing.bits)


def stored_zeros(grid: Grid, packing: Packing) -> Tensor | None:
    """Return the zero points [rows, groups] in the file's type, uint8 or fp16; None if the packing is symmetric."""
    if packing.symmetric:
        return None
    dtype = torch.uint8
    if packing.real_zeros:
        dtype = torch.float16
    return grid.zeros.to(dtype)


def _fit(weight: Tensor, packing: Packing, importance: Tensor | None) -> Grid:
    low = weight.amin(dim=-1).clamp_(max=0)
    high = weight.amax(dim=-1).clamp_(min=0)
    best = _spanning(low, high, packing)
    if importance is None:
        return best
    best_error = _error(best, weight, importance)
    for shrink in range(1, _SHRINKS + 1):
        share = 1 - 0.5 * shrink / _SHRINKS
        narrower = _spanning(low * share, high * share, packing)
        error = _error(narrower, weight, importance)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = Grid(
            torch.where(better, narrower.scales, best.scales),
            torch.where(better, narrower.zeros, best.zeros),
            packing.bits,
        )
    return best


def _spanning(low: Tensor, high: Tensor, packing: Packing) -> Grid:
    steps = 2**packing.bits - 1
    span = 2 * torch.maximum(-low, high) if packing.symmetric else high - low
    # Rounded first, so that weights are quantized with the scale that the file stores.
    scales = (span / steps).half().float().clamp_(min=SMALLEST_SCALE)
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
