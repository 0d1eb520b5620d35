"""svd: replace each linear by two thin ones, the best of their rank for the weights alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from jobs.compression import low_rank
from jobs.compression.low_rank import Factorization
from jobs.context import Context
from jobs.models.layout import Form
from jobs.models.model import Model
from jobs.technique import Kind, Technique


@dataclass(frozen=True)
class Svd(Technique):
    """Factorizes every linear of the blocks by its truncated singular value decomposition.

    It needs no data: of all matrices of this rank the result is nearest to W in ‖W − W'‖, as if all inputs
    were equally strong. They are not, so svd_llm is nearer on text.
    """

    kind: ClassVar[Kind] = "rank"
    version: ClassVar[int] = 2
    paper: ClassVar[str] = "Eckart and Young 1936, The approximation of one matrix by another of lower rank"
    produces: ClassVar[frozenset[Form]] = frozenset({"factored"})

    keep: float = low_rank.keep_knob()
    allocation: str = low_rank.allocation_knob()

    @property
    def layout_change(self) -> Factorization:
        return Factorization(self.keep, self.allocation)

    def compress(self, model: Model, context: Context) -> Model:
        layout = model.layout()
        self.output_layout(layout)
        if self.is_noop:
            return model
        terms = low_rank.decompose(model, context, self.name(), "svd-plain", lambda: _ones)

        def importance() -> dict[str, float]:
            # Global ranks minimize the squared changes of all weights, as each decomposition does.
            return dict.fromkeys(layout.linears, 1.0)

        ranks = self.layout_change.ranks(layout.linears, terms, importance)
        low_rank.factorize(model, context, terms, ranks)
        return model


def _ones(name: str, weight: Float[Tensor, "out in"]) -> Float[Tensor, " in"]:
    return torch.ones(weight.shape[1], device=weight.device)
