"""asvd: replace each linear by two thin ones, the best of their rank where strong inputs count more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from jobs.compression import importance as importance_module
from jobs.compression import low_rank
from jobs.context import Context
from jobs.knobs import Range, knob
from jobs.models.layout import Form, Layout
from jobs.models.model import Model
from jobs.technique import Kind, Need, Technique


@dataclass(frozen=True)
class Asvd(Technique):
    """Decomposes W S, where S scales each input by its size to the power `alpha` (Yuan et al., eq. 3 to 6).

    The size of an input is its root mean square on calibration text, the diagonal of the Gram matrix,
    where the paper takes the mean magnitude: so one pass serves the other techniques too. The paper's
    search for ranks by perplexity is left to the study, or to `allocation`. What svd_llm knows besides is
    how the inputs go together.
    """

    kind: ClassVar[Kind] = "rank"
    version: ClassVar[int] = 3
    paper: ClassVar[str] = "Yuan et al. 2023, ASVD, arXiv:2312.05821"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    produces: ClassVar[frozenset[Form]] = frozenset({"factored"})

    keep: float = knob(0.8, low_rank.KEEP, low_rank.KEEP_HELP)
    allocation: str = knob("uniform", low_rank.ALLOCATION, low_rank.ALLOCATION_HELP)
    alpha: float = knob(0.5, Range(0.0, 2.0), "how much more strong inputs count; 0 is svd")

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
        # Every alpha has a decomposition of its own.
        kind = f"svd-scaled-{self.alpha!r}"
        terms = low_rank.decomposed(model, context, self.name(), kind, lambda: self._rooting(model, context))
        importance = importance_module.sensitivities(model, context) if self.allocation == "global" else None
        ranks = low_rank.ranks_of(layout.linears, self.keep, terms, importance)
        low_rank.factorize(model, context, terms, ranks)
        return model

    def _rooting(self, model: Model, context: Context) -> low_rank.Root:
        assert context.calibration is not None
        grams = context.statistics.grams(model, context.calibration, context.report)
        return lambda name, weight: scales(grams.gram(name).diagonal(), self.alpha).to(weight.device)


def scales(energies: Float[Tensor, " in"], alpha: float) -> Float[Tensor, " in"]:
    """The root of each input's mean square, to the power alpha; all times what makes their squares sum up to
    the inputs' energy, so that the norm is on the average over weights that of the outputs' error."""
    raw = energies.double() ** (alpha / 2)
    return (raw * (energies.double().sum() / raw.square().sum().clamp(min=1e-300)).sqrt()).float()
