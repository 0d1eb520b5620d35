"""gradual_prune: remove the smallest weights step by step while the model learns from the original."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jobs.compression import masks
from jobs.compression.sparsity import Sparsity, dense_weight, highest, pattern_knob, sparsity_knob
from jobs.context import Context
from jobs.models.layout import Form, LinearSpec
from jobs.models.model import Model
from jobs.models.placement import on_device
from jobs.technique import Kind, Need, Technique
from jobs.training import schedule
from jobs.training.schedule import Ramp


@dataclass(frozen=True)
class GradualPrune(Technique):
    """Removes the weights of least |w| of each linear, an increasing share of them during a distillation.

    Over the first part of the steps, `ramp`, the removed share grows by the cubic of eq. 1; about 20 times in
    this phase the masks are computed again from the current weights. Afterwards the masks are fixed and the
    remaining weights are trained further. A masked weight keeps its last value, and returns if other weights
    have become smaller, as in the paper.

    With an n:m pattern the weights are removed in the same way, the smallest of those to remove first.
    """

    kind: ClassVar[Kind] = "sparsity"
    paper: ClassVar[str] = "Zhu and Gupta 2017, To prune, or not to prune, arXiv:1710.01878"
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[Need]] = frozenset({"teacher", "training"})
    highest_stage: ClassVar[int] = schedule.HIGHEST_STAGE
    accepts: ClassVar[frozenset[Form]] = frozenset({"dense", "factored"})
    produces: ClassVar[frozenset[Form]] = frozenset({"sparse"})

    sparsity: float = sparsity_knob()
    pattern: str = pattern_knob()
    ramp: float = schedule.ramp_knob()
    learning_rate: float = schedule.learning_rate_knob(3e-4)
    steps: int = schedule.steps_knob()
    batch: int = schedule.batch_knob()
    temperature: float = schedule.temperature_knob()
    hard_weight: float = schedule.hard_weight_knob()

    @property
    def layout_change(self) -> Sparsity:
        return Sparsity(self.sparsity, self.pattern)

    def compress(self, model: Model, context: Context) -> Model:
        expected = self.output_layout(model.layout()).linears
        if self.is_noop:
            return model
        schedule.check_inputs(self, context)
        with on_device(model, ""):  # the masks updated in place must be those of the forward pass
            self._learn(model, expected, context)
        return model

    def _learn(self, model: Model, expected: Mapping[str, LinearSpec], context: Context) -> None:
        mask_of: dict[str, Bool[Tensor, "out in"]] = {}
        for name, layer in model.linears().items():
            weight = dense_weight(layer, self.name(), name)
            if expected[name].kept is not None:
                mask_of[name] = torch.ones_like(weight, dtype=torch.bool)
        masks.hold(model, mask_of)
        ramp = Ramp.of(self.ramp, self.steps)

        def update_masks(step: int) -> None:
            if ramp.is_due(step):
                share = ramp.share(step)
                for name, mask in mask_of.items():
                    weight = model.module.get_parameter(f"{name}.parametrizations.weight.original")
                    mask.copy_(mask_at(share, weight.detach().float().abs(), self.layout_change))

        update_masks(0)
        schedule.learn(model, self, context, update_masks)
        masks.sparsify(model, mask_of)


def mask_at(share: float, scores: Float[Tensor, "out in"], target: Sparsity) -> Bool[Tensor, "out in"]:
    """Return the mask after `share` of the weights to remove has been removed.

    It keeps all weights that the target keeps, and of the others those with the highest scores; of equal
    scores, the first ones.
    """
    removed = round(share * scores.shape[0] * target.removed_per_row(scores.shape[1]))
    if target.group is not None:
        scores = scores.masked_fill(target.mask_by_row(scores), torch.inf)
    return highest(scores.flatten(), scores.numel() - removed).view(scores.shape)
