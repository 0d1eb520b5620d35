"""svd: replace each linear by two thin ones, the best of their rank in the weights alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from jobs import lowrank
from jobs.context import Context
from jobs.knobs import knob
from jobs.layout import Layout
from jobs.model import Model
from jobs.technique import Form, Kind, Technique


@dataclass(frozen=True)
class Svd(Technique):
    """Factorizes every linear of the blocks by its truncated singular value decomposition.

    Needs no data: of all matrices of that rank this is the nearest to the weight itself, all inputs
    counted alike. What the linears read is far from that, so svd_llm is nearer on text.
    """

    kind: ClassVar[Kind] = "rank"
    version: ClassVar[int] = 2
    paper: ClassVar[str] = "Eckart and Young 1936, The approximation of one matrix by another of lower rank"
    leaves: ClassVar[frozenset[Form]] = frozenset({"factored"})

    keep: float = knob(0.8, lowrank.KEEP, lowrank.KEEP_HELP)
    allocation: str = knob("uniform", lowrank.ALLOCATION, lowrank.ALLOCATION_HELP)

    @property
    def identity(self) -> bool:
        return self.keep == 1

    @property
    def exact(self) -> bool:
        return self.identity or self.allocation == "uniform"

    def outline(self, layout: Layout) -> Layout:
        self.check_forms(layout)
        return lowrank.outline(layout, self.keep, self.allocation)

    def compress(self, model: Model, context: Context) -> Model:
        layout = model.layout()
        self.outline(layout)
        if self.identity:
            return model
        terms = lowrank.decomposed(model, context, self.name(), "svd-plain", lambda: _ones)
        # Squared changes of weights, summed over the whole model: what this decomposition makes least.
        importance = dict.fromkeys(layout.linears, 1.0) if self.allocation == "global" else None
        ranks = lowrank.ranks_of(layout.linears, self.keep, terms, importance)
        lowrank.factorize(model, context, terms, ranks)
        return model


def _ones(name: str, weight: Float[Tensor, "out in"]) -> Float[Tensor, " in"]:
    return torch.ones(weight.shape[1], device=weight.device)
