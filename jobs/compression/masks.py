"""Masks: train a sparse model as a dense one whose zeros are masked, and make it sparse again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.utils import parametrize

from jobs.models.layers import SparseLinear
from jobs.models.model import DTYPE, Model
from jobs.parallel import HIGHEST_STAGE

Masks = Mapping[str, Bool[Tensor, "out in"]]
"""The weights to keep, by the full name of their linear: one byte per weight."""


@contextmanager
def trainable(model: Model) -> Iterator[Masks]:
    """Turn sparse linears into dense ones with masked zeros, and back into sparse ones at the end of the block.

    The masks stay the same. A model without sparse linears is not changed. After an exception in the block
    the model must not be used. Call `requires_grad_` inside the block: the dense linears are new modules.
    """
    masks = densify(model)
    hold(model, masks)
    yield masks
    sparsify(model, masks)


def highest_stage(sparse: bool) -> int:
    """Return the highest ZeRO stage for a model with or without sparse linears.

    Stage 3 partitions the weights, so that masks could not be applied to them.
    """
    if sparse:
        return 2
    return HIGHEST_STAGE


def densify(model: Model) -> Masks:
    """Replace, in place, every sparse linear by a dense one with the same weight, zeros included.

    Returns the masks for `hold` and `sparsify`. The new linears do not require gradients.
    """
    masks = {}
    for name, layer in model.linears().items():
        if isinstance(layer, SparseLinear):
            masks[name] = layer.kept()
            model.replace(name, layer.dense(DTYPE))
    return masks


def hold(model: Model, masks: Masks) -> None:
    """Apply the masks in every forward pass, until `sparsify`.

    The trained parameter is then `NAME.parametrizations.weight.original`. No gradient reaches a masked
    position, so it stays zero whatever copies of the weights an optimizer has, as `jobs.training.loop`
    requires. The modules refer to the masks themselves: a mask changed in place counts from the next forward
    pass on, and a checkpoint of the training contains it.
    """
    for name, mask in masks.items():
        parametrize.register_parametrization(model.module.get_submodule(name), "weight", _Masked(mask))


def sparsify(model: Model, masks: Masks) -> None:
    """Replace, in place, each masked linear by a sparse one: the layout is the one before `densify`.

    A kept weight is stored even if its value is zero.
    """
    for name, mask in masks.items():
        layer = cast(nn.Linear, model.module.get_submodule(name))
        model.replace(name, SparseLinear.of(layer.weight.detach(), mask, layer.bias))


class _Masked(nn.Module):
    # The buffer's name is part of a checkpoint's keys.
    kept: Tensor

    def __init__(self, mask: Bool[Tensor, "out in"]) -> None:
        super().__init__()
        self.register_buffer("kept", mask)

    def forward(self, weight: Tensor) -> Tensor:
        # Not a product: 0 times infinity is NaN.
        return weight.masked_fill(~self.kept, 0)
