"""gradual_prune: remove the smallest weights little by little while the model learns from the original."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jobs.compression import masks
from jobs.compression.sparsity import PATTERNS, Sparsity, dense_weight, highest
from jobs.context import Context
from jobs.knobs import Choice, Range, knob
from jobs.models.layout import Form, Layout, LinearSpec
from jobs.models.model import Model
from jobs.models.placement import on_device
from jobs.technique import Kind, Need, Technique
from jobs.training import schedule
from jobs.training.schedule import Ramp


@dataclass(frozen=True)
class GradualPrune(Technique):
    """Removes the weights of least |w| of each linear, more and more of them in the course of a distillation.

    Over the first part of the steps, `ramp`, the share that is removed grows by a cubic (eq. 1); about 20
    times meanwhile it is chosen anew what goes. Then the masks stay, and what is left learns on. What is
    masked keeps its last value, and comes back where others have become smaller, as in the paper.

    With n:m patterns the weights go in the same manner, those first that are smallest of all that will go.
    """

    kind: ClassVar[Kind] = "sparsity"
    paper: ClassVar[str] = "Zhu and Gupta 2017, To prune, or not to prune, arXiv:1710.01878"
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[Need]] = frozenset({"teacher", "training"})
    highest_stage: ClassVar[int] = schedule.HIGHEST_STAGE
    accepts: ClassVar[frozenset[Form]] = frozenset({"dense", "factored"})
    produces: ClassVar[frozenset[Form]] = frozenset({"sparse"})

    sparsity: float = knob(0.5, Range(0.0, 0.95), "share of the weights to remove; half where pattern is n:m")
    pattern: str = knob("unstructured", Choice(PATTERNS), "where weights may go; n:m keeps n of m neighbours")
    ramp: float = schedule.ramp_knob()
    learning_rate: float = schedule.learning_rate_knob(3e-4)
    steps: int = schedule.steps_knob()
    batch: int = schedule.batch_knob()
    temperature: float = schedule.temperature_knob()
    hard_weight: float = schedule.hard_weight_knob()

    @property
    def target(self) -> Sparsity:
        return Sparsity(self.sparsity, self.pattern)

    @property
    def is_noop(self) -> bool:
        return self.target.is_noop

    def output_layout(self, layout: Layout) -> Layout:
        return self.target.output_layout(layout, self)

    def compress(self, model: Model, context: Context) -> Model:
        expected = self.output_layout(model.layout()).linears
        if self.is_noop:
            return model
        schedule.check_given(self, context)
        with on_device(model, ""):  # the masks that are changed must be those that are computed with
            self._learn(model, expected, context)
        return model

    def _learn(self, model: Model, expected: Mapping[str, LinearSpec], context: Context) -> None:
        kept: dict[str, Bool[Tensor, "out in"]] = {}
        for name, layer in model.linears().items():
            weight = dense_weight(layer, self.name(), name)
            if expected[name].kept is not None:
                kept[name] = torch.ones_like(weight, dtype=torch.bool)
        masks.hold(model, kept)
        ramp = Ramp.of(self.ramp, self.steps)

        def choose(done: int) -> None:
            if ramp.due(done):
                for name, mask in kept.items():
                    weight = model.module.get_parameter(f"{name}.parametrizations.weight.original")
                    mask.copy_(kept_at(ramp.reached(done), weight.detach().float().abs(), self.target))

        choose(0)
        schedule.learn(model, self, context, choose)
        masks.sparsify(model, kept)


def kept_at(share: float, scores: Float[Tensor, "out in"], target: Sparsity) -> Bool[Tensor, "out in"]:
    """What is kept once this share of what will go is gone: all that the target keeps, and the highest scores
    of the rest. Equal scores go from behind."""
    removed = round(share * scores.shape[0] * target.removed(scores.shape[1]))
    if target.group is not None:
        scores = scores.masked_fill(target.of_rows(scores), torch.inf)
    return highest(scores.flatten(), scores.numel() - removed).view(scores.shape)
