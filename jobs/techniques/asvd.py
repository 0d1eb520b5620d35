"""asvd: replace each linear by two thin ones, the best of their rank if strong inputs count more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from jobs.compression import low_rank
from jobs.compression.importance import sensitivities
from jobs.compression.low_rank import Factorization
from jobs.context import Context
from jobs.knobs import Range, knob
from jobs.models.layout import Form
from jobs.models.model import Model
from jobs.technique import Kind, Need, Technique


@dataclass(frozen=True)
class Asvd(Technique):
    """Decomposes W S, where S scales each input by its magnitude to the power `alpha` (Yuan et al., eq. 3 to 6).

    The magnitude of an input is its root mean square on calibration text, from the diagonal of the Gram
    matrix; the paper uses the mean of |x|. So one pass over the text serves the other techniques too. The
    paper also searches for ranks by perplexity; here the study does, or `allocation`. Unlike svd_llm, asvd
    ignores the correlations between inputs.
    """

    kind: ClassVar[Kind] = "rank"
    version: ClassVar[int] = 3
    paper: ClassVar[str] = "Yuan et al. 2023, ASVD, arXiv:2312.05821"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    produces: ClassVar[frozenset[Form]] = frozenset({"factored"})

    keep: float = low_rank.keep_knob()
    allocation: str = low_rank.allocation_knob()
    alpha: float = knob(0.5, Range(0.0, 2.0), "how much more strong inputs count; 0 is svd")

    @property
    def layout_change(self) -> Factorization:
        return Factorization(self.keep, self.allocation)

    def compress(self, model: Model, context: Context) -> Model:
        layout = model.layout()
        self.output_layout(layout)
        if self.is_noop:
            return model
        # Each alpha has its own norm, and so its own decomposition.
        kind = f"svd-scaled-{self.alpha!r}"
        terms = low_rank.decompose(model, context, self.name(), kind, lambda: self._root(model, context))
        ranks = self.layout_change.ranks(layout.linears, terms, lambda: sensitivities(model, context))
        low_rank.factorize(model, context, terms, ranks)
        return model

    def _root(self, model: Model, context: Context) -> low_rank.Root:
        assert context.calibration is not None
        grams = context.statistics.grams(model, context.calibration, context.report)
        return lambda name, weight: scales(grams.gram(name).diagonal(), self.alpha).to(weight.device)


def scales(energies: Float[Tensor, " in"], alpha: float) -> Float[Tensor, " in"]:
    """Return the root mean square of each input to the power alpha, times a common factor.

    With this factor the squares sum up to the energy of the inputs, so that the norm of an average change of
    the weights is the error of the outputs.
    """
    raw = energies.double() ** (alpha / 2)
    return (raw * (energies.double().sum() / raw.square().sum().clamp(min=1e-300)).sqrt()).float()
