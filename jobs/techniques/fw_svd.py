"""fw_svd: replace each linear by two thin ones, the best of their rank in the Fisher information of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from jobs.compression import low_rank
from jobs.compression.importance import fisher
from jobs.compression.low_rank import Factorization
from jobs.context import Context
from jobs.models.layout import Form
from jobs.models.model import Model
from jobs.technique import Kind, Need, Technique


@dataclass(frozen=True)
class FwSvd(Technique):
    """Decomposes W R, where R scales each input by the root of the Fisher information of its weights (Hsu et al.).

    A change d of the weights raises the loss by about ½ Σ F d². No decomposition minimizes this sum for any F,
    so the paper gives all weights of a row the same importance, the row's sum of F. It writes linears as x W,
    so its rows are the inputs: the columns of the W of nn.Linear.
    """

    kind: ClassVar[Kind] = "rank"
    version: ClassVar[int] = 2
    paper: ClassVar[str] = (
        "Hsu et al. 2022, Language model compression with weighted low-rank, arXiv:2207.00112"
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration", "gradients"})
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
        terms = low_rank.decompose(
            model, context, self.name(), "svd-fisher", lambda: _fisher_root(model, context)
        )

        def importance() -> dict[str, float]:
            # The norm is in units of the loss, except that R² of an input is a sum over all outputs.
            return {name: 1 / spec.out_features for name, spec in layout.linears.items()}

        ranks = self.layout_change.ranks(layout.linears, terms, importance)
        low_rank.factorize(model, context, terms, ranks)
        return model


def scales(information: Float[Tensor, "out in"]) -> Float[Tensor, " in"]:
    """Return the root of each input's summed Fisher information, the diagonal of R."""
    return information.float().sum(dim=0).sqrt()


def _fisher_root(model: Model, context: Context) -> low_rank.Root:
    information = fisher(model, context)
    return lambda name, weight: scales(information[name]).to(weight.device)
