"""optimal_brain_damage: remove the weights whose loss raises the model's own loss least."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from jobs.context import Context
from jobs.gradients import fisher
from jobs.knobs import Choice, Range, knob
from jobs.layout import Layout
from jobs.model import Model
from jobs.residency import resident
from jobs.sparsity import Sparsity, cut, dense_weight, keep
from jobs.technique import Form, Kind, Need, Technique


@dataclass(frozen=True)
class OptimalBrainDamage(Technique):
    """Removes the weights of least saliency ½ h w², and stores the rest sparse.

    h is the diagonal of the loss's Hessian, for which the Fisher information stands (`jobs.gradients`): so
    ½ h w² is about what the loss rises by where w alone goes. scope:
        layer  removes the same share of every linear.
        model  compares the weights of all linears with each other and removes as many of all: how many each
               keeps is up to the data, at least one in each row.
    """

    kind: ClassVar[Kind] = "sparsity"
    paper: ClassVar[str] = "LeCun, Denker & Solla 1989, Optimal Brain Damage, NIPS 2"
    needs: ClassVar[frozenset[Need]] = frozenset({"gradients"})
    accepts: ClassVar[frozenset[Form]] = frozenset({"dense", "factored"})
    leaves: ClassVar[frozenset[Form]] = frozenset({"sparse"})

    sparsity: float = knob(0.5, Range(0.0, 0.95), "share of the weights to remove")
    scope: str = knob("layer", Choice(("layer", "model")), "which weights are compared with each other")

    @property
    def target(self) -> Sparsity:
        return Sparsity(self.sparsity)

    @property
    def identity(self) -> bool:
        return self.target.identity

    @property
    def exact(self) -> bool:
        return self.scope == "layer"

    def outline(self, layout: Layout) -> Layout:
        """Of scope `model`: as many weights of all together as will be kept, shared evenly."""
        outline = self.target.outline(layout, self)
        if self.exact or self.identity:
            return outline
        return outline.with_linears(
            {
                name: dataclasses.replace(spec, kept=spec.out_features * spec.in_features)
                for name, spec in outline.linears.items()
                if spec.kept is None
            }
        )

    def compress(self, model: Model, context: Context) -> Model:
        outline = self.outline(model.layout())
        if self.identity:
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
            with resident(model, name):
                weight = self._weight(model, name)
                keep(model, name, weight, self.target.of_whole(saliency(weight, found[name])))

    def _across_linears(
        self, model: Model, context: Context, outline: Layout, found: Mapping[str, Tensor]
    ) -> None:
        def saliencies() -> Iterator[Float[Tensor, "out in"]]:
            for name in outline.linears:
                with resident(model, name):
                    yield _with_one_a_row(saliency(self._weight(model, name), found[name]))

        remaining = cut(saliencies, sum(spec.kept or 0 for spec in outline.linears.values()))
        for name in outline.linears:
            context.report(outline.block_of(name) / outline.depth, name)
            with resident(model, name):
                weight = self._weight(model, name)
                kept, remaining = remaining.of(_with_one_a_row(saliency(weight, found[name])))
                keep(model, name, weight, kept)

    def _weight(self, model: Model, name: str) -> Float[Tensor, "out in"]:
        return dense_weight(model.module.get_submodule(name), self.name(), name)


def saliency(
    weight: Float[Tensor, "out in"], information: Float[Tensor, "out in"]
) -> Float[Tensor, "out in"]:
    """½ h w² (LeCun et al., section 2.2)."""
    # The square of a product: w² alone may be infinite where h is 0.
    return 0.5 * (information.to(weight.device).sqrt() * weight).square()


def _with_one_a_row(scores: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """The scores with each row's highest made infinite: no output may lose all its weights."""
    return scores.scatter(1, scores.argmax(dim=1, keepdim=True), torch.inf)
