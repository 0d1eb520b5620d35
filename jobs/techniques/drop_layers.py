"""drop_layers: remove the blocks that change the hidden state least."""

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
    """Removes the `count` blocks of least influence, 1 − the mean cosine between a block's input and output.

    All influences are computed once, on the unmodified model (the paper's one-shot removal).
    """

    kind: ClassVar[Kind] = "depth"
    paper: ClassVar[str] = "Men et al. 2024, ShortGPT, arXiv:2403.03853"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    accepts: ClassVar[frozenset[Form]] = frozenset({"dense", "factored", "packed", "sparse"})

    count: int = knob(2, Range(0, 256, integer=True), "number of blocks to remove")

    @property
    def is_noop(self) -> bool:
        return self.count == 0

    def output_layout(self, layout: Layout) -> Layout:
        self.check_forms(layout)
        depth = layout.depth
        if self.count >= depth:
            raise ValueError(
                f"drop_layers.count={self.count} is outside [0, {depth - 1}]: the model has {depth} blocks, "
                f"and one must remain"
            )
        first = _block_specs(layout, 0)
        for index in range(1, depth):
            if self.count and _block_specs(layout, index) != first:
                raise ValueError(
                    f"drop_layers.count={self.count}: block {index} ({layout.blocks}.{index}) has other shapes "
                    f"than block 0, so the size depends on the removed blocks and is not known before the step; "
                    f"put drop_layers before techniques that give blocks different shapes"
                )
        remaining = depth - self.count
        return dataclasses.replace(
            layout,
            linears={
                name: spec for name, spec in layout.linears.items() if layout.block_of(name) < remaining
            },
            others={name: spec for name, spec in layout.others.items() if layout.block_of(name) < remaining},
        )

    def compress(self, model: Model, context: Context) -> Model:
        self.output_layout(model.layout())
        assert context.calibration is not None
        influence = context.statistics.block_influence(model, context.calibration, context.report)
        removed = set(torch.argsort(influence, stable=True)[: self.count].tolist())
        keep_blocks(model, [index for index in range(len(model.blocks)) if index not in removed])
        return model


def keep_blocks(model: Model, indices: list[int]) -> None:
    """Keep only these blocks, in this order; modifies the model and its config in place."""
    blocks = [model.blocks[index] for index in indices]
    for position, block in enumerate(blocks):
        for module in block.modules():
            # Attention indexes the cache of keys and values by this number.
            if hasattr(module, "layer_idx"):
                cast(Any, module).layer_idx = position
    model.replace(model.blocks_name, nn.ModuleList(blocks))
    config: Any = model.config
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in indices]
    if getattr(config, "attention_layers", None):  # GPT-Neo's config has them twice
        config.attention_layers = [config.attention_layers[index] for index in indices]
        config.attention_types = [[[kind], 1] for kind in config.attention_layers]
    config.num_hidden_layers = len(indices)


def _block_specs(layout: Layout, index: int) -> dict[str, object]:
    """Return the specs of one block's linears and tensors, by their names within the block."""
    prefix = layout.name(index, "")
    specs: dict[str, object] = {**layout.linears, **layout.others}
    return {name.removeprefix(prefix): spec for name, spec in specs.items() if layout.block_of(name) == index}
