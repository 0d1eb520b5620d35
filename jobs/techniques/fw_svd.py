"""fw_svd: replace each linear by two thin ones, the best of their rank by the Fisher information of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from jobs.compression import importance as importance_module
from jobs.compression import low_rank
from jobs.context import Context
from jobs.knobs import knob
from jobs.models.layout import Form, Layout
from jobs.models.model import Model
from jobs.technique import Kind, Need, Technique


@dataclass(frozen=True)
class FwSvd(Technique):
    """Decomposes W R, where R scales each input by the root of its weights' Fisher information (Hsu et al.).

    The loss grows by about ½ Σ F d² with changes d of the weights. No decomposition is the best for any F,
    so the paper lets all weights of a row count alike, by the row's sum of F. It writes linears as x W, so
    its rows are the inputs: the columns of the W of nn.Linear.
    """

    kind: ClassVar[Kind] = "rank"
    version: ClassVar[int] = 2
    paper: ClassVar[str] = (
        "Hsu et al. 2022, Language model compression with weighted low-rank, arXiv:2207.00112"
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration", "gradients"})
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
        terms = low_rank.decomposed(
            model, context, self.name(), "svd-fisher", lambda: _rooting(model, context)
        )
        importance = None
        if self.allocation == "global":
            # The norm is in units of the loss already, but that each input has the sum over all outputs.
            importance = {name: 1 / spec.out_features for name, spec in layout.linears.items()}
        ranks = low_rank.ranks_of(layout.linears, self.keep, terms, importance)
        low_rank.factorize(model, context, terms, ranks)
        return model


def scales(fisher: Float[Tensor, "out in"]) -> Float[Tensor, " in"]:
    """The root of each input's sum."""
    return fisher.float().sum(dim=0).sqrt()


def _rooting(model: Model, context: Context) -> low_rank.Root:
    fisher = importance_module.fisher(model, context)
    return lambda name, weight: scales(fisher[name]).to(weight.device)
