"""drop_layers: remove the blocks that do least."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import nn

from jobs.context import Context
from jobs.knobs import Range, knob
from jobs.models.layout import Form, Layout
from jobs.models.model import Model
from jobs.technique import Kind, Need, Technique


@dataclass(frozen=True)
class DropLayers(Technique):
    """Removes the `count` blocks of least influence: those that turn the hidden state least.

    All influences are taken once, on the model as it comes (the paper's one-shot removal).
    """

    kind: ClassVar[Kind] = "depth"
    paper: ClassVar[str] = "Men et al. 2024, ShortGPT, arXiv:2403.03853"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    accepts: ClassVar[frozenset[Form]] = frozenset({"dense", "factored", "packed", "sparse"})

    count: int = knob(2, Range(0, 256, integer=True), "how many blocks to remove")

    @property
    def is_noop(self) -> bool:
        return self.count == 0

    def output_layout(self, layout: Layout) -> Layout:
        depth = layout.depth
        if self.count >= depth:
            raise ValueError(
                f"drop_layers.count={self.count} is outside [0, {depth - 1}]: the model has {depth} blocks, "
                f"and one must stay"
            )
        first = _block(layout, 0)
        for index in range(1, depth):
            if self.count and _block(layout, index) != first:
                raise ValueError(
                    f"drop_layers.count={self.count}: block {index} ({layout.blocks}.{index}) has "
                    f"other shapes than block 0, so the size without the least of them is not known "
                    f"beforehand; put drop_layers before what shapes blocks one by one"
                )
        kept = depth - self.count
        return dataclasses.replace(
            layout,
            linears={name: spec for name, spec in layout.linears.items() if layout.block_of(name) < kept},
            others={name: spec for name, spec in layout.others.items() if layout.block_of(name) < kept},
        )

    def compress(self, model: Model, context: Context) -> Model:
        self.output_layout(model.layout())
        assert context.calibration is not None
        influence = context.statistics.block_influence(model, context.calibration, context.report)
        dropped = set(torch.argsort(influence, stable=True)[: self.count].tolist())
        keep(model, [index for index in range(len(model.blocks)) if index not in dropped])
        return model


def keep(model: Model, kept: list[int]) -> None:
    """Keep only these blocks, in this order; changes the model and its config in place."""
    blocks = [model.blocks[index] for index in kept]
    for place, block in enumerate(blocks):
        for module in block.modules():
            # Attention finds its keys and values in the cache by this number.
            if hasattr(module, "layer_idx"):
                cast(Any, module).layer_idx = place
    model.replace(model.blocks_name, nn.ModuleList(blocks))
    config: Any = model.config
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in kept]
    if getattr(config, "attention_layers", None):  # GPT-Neo's, written twice
        config.attention_layers = [config.attention_layers[index] for index in kept]
        config.attention_types = [[[kind], 1] for kind in config.attention_layers]
    config.num_hidden_layers = len(kept)


def _block(layout: Layout, index: int) -> dict[str, object]:
    """What the file holds of one block, by names within it."""
    prefix = layout.name(index, "")
    every: dict[str, object] = {**layout.linears, **layout.others}
    return {name.removeprefix(prefix): spec for name, spec in every.items() if layout.block_of(name) == index}
