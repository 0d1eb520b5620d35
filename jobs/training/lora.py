"""LoRA: frozen linears, each with a trained low-rank correction."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jobs.models.layers import linear_of
from jobs.models.model import Model
from jobs.models.placement import on_device


class LoraLinear(nn.Linear):
    """y = W x + b + U (V x), with V of [rank, in] and U of [out, rank] (Hu et al. 2021, LoRA, arXiv:2106.09685, eq. 3).

    U starts at zero, so the correction is zero at first. The paper's α / r is 1, since a change of α has the effect of
    a change of the learning rate (section 4.1).
    """

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator) -> None:
        """Shares the weight and bias of `linear`. V is drawn with variance 1 / in."""
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        drawn = torch.randn(rank, linear.in_features, generator=generator) / linear.in_features**0.5
        self.v = nn.Parameter(drawn.to(linear.weight))
        self.u = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        projected = nn.functional.linear(x, self.v)
        return super().forward(x) + nn.functional.linear(projected, self.u)

    def merged(self) -> nn.Linear:
        """Return a linear with the weight W + U V, rounded once to the dtype of W."""
        with torch.no_grad():
            weight = self.weight.float() + self.u.float() @ self.v.float()
        return linear_of(weight.to(self.weight.dtype), self.bias)


def add(model: Model, rank: int, seed: int) -> None:
    """Add a correction of this rank to each linear of the blocks, in place, and freeze all other parameters."""
    generator = torch.Generator().manual_seed(seed)
    model.module.requires_grad_(False)
    for name, layer in model.linears().items():
        model.replace(name, LoraLinear(cast(nn.Linear, layer), rank, generator))


def merge(model: Model) -> None:
    """Add every correction to its weight, in place. The model has its former layout again."""
    for name, layer in model.linears().items():
        if isinstance(layer, LoraLinear):
            with on_device(model, name):
                model.replace(name, layer.merged())
