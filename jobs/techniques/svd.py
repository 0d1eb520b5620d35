"""svd: replace each linear by two thin ones, the best of their rank in the weights alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from jobs.compression import low_rank
from jobs.context import Context
from jobs.knobs import knob
from jobs.models.layout import Form, Layout
from jobs.models.model import Model
from jobs.technique import Kind, Technique


@dataclass(frozen=True)
class Svd(Technique):
    """Factorizes every linear of the blocks by its truncated singular value decomposition.

    Needs no data: of all matrices of that rank this is the nearest to the weight itself, all inputs
    counted alike. What the linears read is far from that, so svd_llm is nearer on text.
    """

    kind: ClassVar[Kind] = "rank"
    version: ClassVar[int] = 2
    paper: ClassVar[str] = "Eckart and Young 1936, The approximation of one matrix by another of lower rank"
    produces: ClassVar[frozenset[Form]] = frozenset({"factored"})

    keep: float = knob(0.8, low_rank.KEEP, low_rank.KEEP_HELP)
    allocation: str = knob("uniform", low_rank.ALLOCATION, low_rank.ALLOCATION_HELP)

    @property
    def is_noop(self) -> bool:
        return self.keep == 1

    @property
    def exact(self) -> bool:
        return self.is_noop or self.allocation == "uniform"

    def output_layout(self, layout: Layout) -> Layout:
        self.check_forms(layout)
        return low_rank.output_layout(layout, self.keep, self.allocation)

    def compress(self, model: Model, context: Context) -> Model:
        layout = model.layout()
        self.output_layout(layout)
        if self.is_noop:
            return model
        terms = low_rank.decomposed(model, context, self.name(), "svd-plain", lambda: _ones)
        # Squared changes of weights, summed over the whole model: what this decomposition makes least.
        importance = dict.fromkeys(layout.linears, 1.0) if self.allocation == "global" else None
        ranks = low_rank.ranks_of(layout.linears, self.keep, terms, importance)
        low_rank.factorize(model, context, terms, ranks)
        return model


def _ones(name: str, weight: Float[Tensor, "out in"]) -> Float[Tensor, " in"]:
    return torch.ones(weight.shape[1], device=weight.device)
