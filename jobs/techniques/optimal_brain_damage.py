"""optimal_brain_damage: remove the weights whose removal is predicted to raise the loss least."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from jobs.compression.importance import fisher
from jobs.compression.sparsity import Sparsity, dense_weight, replace_by_sparse, threshold
from jobs.context import Context
from jobs.knobs import Choice, Range, knob
from jobs.models.layout import Form, Layout
from jobs.models.model import Model
from jobs.models.placement import on_device
from jobs.technique import Kind, Need, Technique

_DAMPING = 0.3
"""The best of 0.03, 0.1, 0.3 and 1 on MiniLM, and of 0, 0.1 and 0.3 on SmolLM2."""


@dataclass(frozen=True)
class OptimalBrainDamage(Technique):
    """Removes the weights of least saliency ½ h w², and stores the others as a sparse linear.

    h is the diagonal of the loss's Hessian, approximated by the Fisher information
    (`jobs.compression.importance.fisher`): ½ h w² is about the increase of the loss if w alone is removed.
    Where we depart from the paper: h is damped (`damped`). scope:
        layer  removes the same share of every linear.
        model  compares the weights of all linears with each other and removes the same share of the total.
               The data decide how many each linear keeps, at least one in each row.
    """

    kind: ClassVar[Kind] = "sparsity"
    version: ClassVar[int] = 2
    paper: ClassVar[str] = "LeCun, Denker & Solla 1989, Optimal Brain Damage, NIPS 2"
    needs: ClassVar[frozenset[Need]] = frozenset({"gradients"})
    accepts: ClassVar[frozenset[Form]] = frozenset({"dense", "factored"})
    produces: ClassVar[frozenset[Form]] = frozenset({"sparse"})

    sparsity: float = knob(0.5, Range(0.0, 0.95), "share of the weights to remove")
    scope: str = knob("layer", Choice(("layer", "model")), "which weights are compared with each other")

    @property
    def layout_change(self) -> Sparsity:
        return Sparsity(self.sparsity, across_linears=self.scope == "model")

    def compress(self, model: Model, context: Context) -> Model:
        layout = self.output_layout(model.layout())
        if self.is_noop:
            return model
        information = fisher(model, context)
        if self.scope == "layer":
            self._prune_each_linear(model, context, layout, information)
        else:
            self._prune_across_linears(model, context, layout, information)
        return model

    def _prune_each_linear(
        self, model: Model, context: Context, layout: Layout, information: Mapping[str, Tensor]
    ) -> None:
        for name in layout.linears:
            if layout.linears[name].kept is None:
                continue
            context.report(layout.block_of(name) / layout.depth, name)
            with on_device(model, name):
                weight = self._weight(model, name)
                scores = saliency(weight, damped(information[name]))
                replace_by_sparse(model, name, weight, self.layout_change.mask_by_linear(scores))

    def _prune_across_linears(
        self, model: Model, context: Context, layout: Layout, information: Mapping[str, Tensor]
    ) -> None:
        def scores(name: str, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
            return _keep_highest_of_row(saliency(weight, damped(information[name])))

        def all_scores() -> Iterator[Float[Tensor, "out in"]]:
            for name in layout.linears:
                with on_device(model, name):
                    yield scores(name, self._weight(model, name))

        remaining = threshold(all_scores, sum(spec.kept or 0 for spec in layout.linears.values()))
        for name in layout.linears:
            context.report(layout.block_of(name) / layout.depth, name)
            with on_device(model, name):
                weight = self._weight(model, name)
                mask, remaining = remaining.mask(scores(name, weight))
                replace_by_sparse(model, name, weight, mask)

    def _weight(self, model: Model, name: str) -> Float[Tensor, "out in"]:
        return dense_weight(model.module.get_submodule(name), self.name(), name)


def saliency(
    weight: Float[Tensor, "out in"], information: Float[Tensor, "out in"]
) -> Float[Tensor, "out in"]:
    """Return ½ h w² (LeCun et al., section 2.2)."""
    # The square of a product: w² alone may be infinite where h is 0.
    return 0.5 * (information.to(weight.device).sqrt() * weight).square()


def damped(information: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """Return each weight's information plus a share of the mean over the weights that read the same input.

    Fisher information describes small changes. An output has nearly none if its neuron is saturated, or if a
    norm cancels its effect on the loss: by its information alone such a row would be emptied, and then be
    saturated no more. The mean is the usual cost of an output of this linear (the damping of Levenberg 1944 and
    Marquardt 1963, in units of the input).
    """
    return information + _DAMPING * information.mean(dim=0)


def _keep_highest_of_row(scores: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """Return the scores with the highest of each row made infinite: no output may lose all its weights."""
    return scores.scatter(1, scores.argmax(dim=1, keepdim=True), torch.inf)
