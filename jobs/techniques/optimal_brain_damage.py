"""optimal_brain_damage: remove the weights whose loss raises the model's own loss least."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from jobs.compression.importance import fisher
from jobs.compression.sparsity import Sparsity, cut, dense_weight, keep
from jobs.context import Context
from jobs.knobs import Choice, Range, knob
from jobs.models.layout import Form, Layout
from jobs.models.model import Model
from jobs.models.placement import on_device
from jobs.technique import Kind, Need, Technique

_DAMPING = 0.3
"""Of 0.03, 0.1, 0.3 and 1, what lost least on MiniLM, and the best of 0, 0.1 and 0.3 on SmolLM2."""


@dataclass(frozen=True)
class OptimalBrainDamage(Technique):
    """Removes the weights of least saliency ½ h w², and stores the rest sparse.

    h is the diagonal of the loss's Hessian, for which the Fisher information stands (`jobs.compression.importance`): so
    ½ h w² is about what the loss rises by where w alone goes. Where we depart: h is damped (`damped`). scope:
        layer  removes the same share of every linear.
        model  compares the weights of all linears with each other and removes as many of all: how many each
               keeps is up to the data, at least one in each row.
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
    def target(self) -> Sparsity:
        return Sparsity(self.sparsity)

    @property
    def is_noop(self) -> bool:
        return self.target.is_noop

    @property
    def exact(self) -> bool:
        return self.scope == "layer"

    def output_layout(self, layout: Layout) -> Layout:
        """Of scope `model`: as many weights of all together as will be kept, shared evenly."""
        outline = self.target.output_layout(layout, self)
        if self.exact or self.is_noop:
            return outline
        return outline.with_linears(
            {
                name: dataclasses.replace(spec, kept=spec.out_features * spec.in_features)
                for name, spec in outline.linears.items()
                if spec.kept is None
            }
        )

    def compress(self, model: Model, context: Context) -> Model:
        outline = self.output_layout(model.layout())
        if self.is_noop:
            return model
        found = fisher(model, context)
        if self.exact:
            self._within_linears(model, context, outline, found)
        else:
            self._across_linears(model, context, outline, found)
        return model

    def _within_linears(
        self, model: Model, context: Context, outline: Layout, found: Mapping[str, Tensor]
    ) -> None:
        for name in outline.linears:
            if outline.linears[name].kept is None:
                continue
            context.report(outline.block_of(name) / outline.depth, name)
            with on_device(model, name):
                weight = self._weight(model, name)
                keep(model, name, weight, self.target.of_whole(saliency(weight, damped(found[name]))))

    def _across_linears(
        self, model: Model, context: Context, outline: Layout, found: Mapping[str, Tensor]
    ) -> None:
        def saliencies() -> Iterator[Float[Tensor, "out in"]]:
            for name in outline.linears:
                with on_device(model, name):
                    yield _with_one_a_row(saliency(self._weight(model, name), damped(found[name])))

        remaining = cut(saliencies, sum(spec.kept or 0 for spec in outline.linears.values()))
        for name in outline.linears:
            context.report(outline.block_of(name) / outline.depth, name)
            with on_device(model, name):
                weight = self._weight(model, name)
                kept, remaining = remaining.of(_with_one_a_row(saliency(weight, damped(found[name]))))
                keep(model, name, weight, kept)

    def _weight(self, model: Model, name: str) -> Float[Tensor, "out in"]:
        return dense_weight(model.module.get_submodule(name), self.name(), name)


def saliency(
    weight: Float[Tensor, "out in"], information: Float[Tensor, "out in"]
) -> Float[Tensor, "out in"]:
    """½ h w² (LeCun et al., section 2.2)."""
    # The square of a product: w² alone may be infinite where h is 0.
    return 0.5 * (information.to(weight.device).sqrt() * weight).square()


def damped(information: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """Each weight's information and a share of the mean over the weights that read the same input.

    The information is of small changes. An output whose neuron is saturated, or whose loss a norm swallows,
    has next to none: by it alone such a row is emptied, and is saturated no more. The mean says what an
    output of this linear usually costs (the damping of Levenberg 1944 and Marquardt 1963, in units of the input).
    """
    return information + _DAMPING * information.mean(dim=0)


def _with_one_a_row(scores: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """The scores with each row's highest made infinite: no output may lose all its weights."""
    return scores.scatter(1, scores.argmax(dim=1, keepdim=True), torch.inf)
