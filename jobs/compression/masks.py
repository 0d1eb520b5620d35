"""Masks: train a sparse model with its zeros kept, dense while it trains and sparse again after."""

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
"""Which weights are kept, by the full name of their linear: one byte a weight."""


@contextmanager
def trainable(model: Model) -> Iterator[Masks]:
    """Until the end of the block sparse linears are dense ones whose zeros are held; then they are sparse
    again, at the same places. Where an exception ends the block, the model is of no use. One without sparse
    linears is left as it is.

    Gradients are to be required inside of the block: the dense linears are new ones."""
    masks = densify(model)
    hold(model, masks)
    yield masks
    sparsify(model, masks)


def highest_stage(sparse: bool) -> int:
    """Of ZeRO, for a model with sparse linears or without: stage 3 takes weights apart, whose zeros are then not
    held."""
    return 2 if sparse else HIGHEST_STAGE


def densify(model: Model) -> Masks:
    """Replace, in place, every sparse linear by a dense one of the same weight, zeros included.

    Returns what `hold` and `sparsify` need. The new linears do not require gradients.
    """
    masks = {}
    for name, layer in model.linears().items():
        if isinstance(layer, SparseLinear):
            masks[name] = layer.kept()
            model.replace(name, layer.dense(DTYPE))
    return masks


def hold(model: Model, masks: Masks) -> None:
    """Let the masked linears compute with what is kept of their weights, until `sparsify`.

    What is trained is then `NAME.parametrizations.weight.original`: no gradient reaches a place that is
    masked, so it stays zero whatever copies of the weights an optimizer keeps, as `jobs.training.engine` asks.
    The masks themselves are held: one that is changed in place counts from the next forward pass on, and a
    checkpoint of the training holds it.
    """
    for name, kept in masks.items():
        parametrize.register_parametrization(model.module.get_submodule(name), "weight", _Kept(kept))


def sparsify(model: Model, masks: Masks) -> None:
    """Replace, in place, each masked linear by a sparse one of the weights that are kept, whatever their
    values: it is of the layout it was of before `densify`."""
    for name, kept in masks.items():
        layer = cast(nn.Linear, model.module.get_submodule(name))
        model.replace(name, SparseLinear.of(layer.weight.detach(), kept, layer.bias))


class _Kept(nn.Module):
    kept: Tensor

    def __init__(self, kept: Bool[Tensor, "out in"]) -> None:
        super().__init__()
        self.register_buffer("kept", kept)

    def forward(self, weight: Tensor) -> Tensor:
        # Not a product: 0 times what is infinite is NaN.
        return weight.masked_fill(~self.kept, 0)
