"""svd_llm: replace each linear by two thin ones, the best of their rank on calibration text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jobs.calibration.block_stream import stream
from jobs.calibration.hessian import cholesky
from jobs.calibration.statistics import Inputs
from jobs.compression import importance as importance_module
from jobs.compression import low_rank
from jobs.context import Context
from jobs.knobs import Choice, knob
from jobs.models.layers import LowRankLinear
from jobs.models.layout import Form, Layout
from jobs.models.model import DTYPE, Model
from jobs.technique import Kind, Need, Technique


@dataclass(frozen=True)
class SvdLlm(Technique):
    """Factorizes every linear of the blocks so that its output on calibration text changes least.

    update, of the factor u (Wang et al., section 3.3):
        none        leaves it alone: with the parent's own inputs it is already the best there is for its v.
        sequential  solves for it anew, block by block, with the inputs that the compressed predecessors
                    give. Costs two passes over the text for every candidate; nothing of it can be shared.
    """

    kind: ClassVar[Kind] = "rank"
    paper: ClassVar[str] = "Wang et al. 2024, SVD-LLM, arXiv:2403.07378"
    version: ClassVar[int] = 4
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    produces: ClassVar[frozenset[Form]] = frozenset({"factored"})

    keep: float = knob(0.8, low_rank.KEEP, low_rank.KEEP_HELP)
    allocation: str = knob("uniform", low_rank.ALLOCATION, low_rank.ALLOCATION_HELP)
    update: str = knob(
        "none", Choice(("none", "sequential")), "whether to fit u to what compressed predecessors give"
    )

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
            model, context, self.name(), "svd-whitened", lambda: _rooting(model, context)
        )
        importance = importance_module.sensitivities(model, context) if self.allocation == "global" else None
        ranks = low_rank.ranks_of(layout.linears, self.keep, terms, importance)
        if self.update == "none":
            low_rank.factorize(model, context, terms, ranks)
        else:
            _factorize_in_sequence(model, context, terms, ranks)
        return model


def _rooting(model: Model, context: Context) -> low_rank.Root:
    assert context.calibration is not None
    grams = context.statistics.grams(model, context.calibration, context.report)
    return lambda name, weight: low_rank.root_of(grams.gram(name).to(weight.device)).float()


def updated(
    weight: Float[Tensor, "out in"],
    u: Float[Tensor, "out rank"],
    v: Float[Tensor, "rank in"],
    gram: Float[Tensor, "in in"],
) -> Float[Tensor, "out rank"]:
    """The u' that makes u' v x nearest to W x over the inputs x of this Gram matrix: W G vᵀ (v G vᵀ)⁻¹
    (Wang et al., section 3.3), in fp64.

    What is solved for is the difference to u, with a ridge of 1e-4 of the mean diagonal: where the inputs
    tell nothing u stays as it is, and the error is never larger than u's.
    """
    wide_v, wide_u = v.double(), u.double()
    half = gram.double() @ wide_v.T
    inner = wide_v @ half
    inner.diagonal().add_(1e-4 * inner.diagonal().mean().clamp(min=1e-30))
    missing = (weight.double() - wide_u @ wide_v) @ half
    factor = cholesky(inner)
    if factor is None:
        raise ValueError(
            "svd_llm: the Gram matrix of a compressed layer's inputs holds NaN or is not positive"
        )
    return (wide_u + torch.cholesky_solve(missing.T, factor).T).float()


def _factorize_in_sequence(
    model: Model, context: Context, terms: Mapping[str, Tensor], ranks: Mapping[str, int]
) -> None:
    """Per block: put all factors in, see what they read, solve for every u, and go on with the outputs.

    All linears of a block are solved for from one pass, in which those before them in the block are
    factored, though their u is not updated yet: a pass for each would be four to six times as many.
    """
    assert context.calibration is not None
    for visit in stream(model, context.calibration, context.report, "fitting the factors"):
        block = {
            name: cast(nn.Linear, layer)
            for name, layer in model.linears().items()
            if name.startswith(f"{visit.name}.")
        }
        thin: dict[str, LowRankLinear] = {}
        for name, dense in block.items():
            thin[name] = low_rank.factored(dense, terms[f"{name}.u"], terms[f"{name}.v"], ranks[name], name)
            model.replace(name, thin[name])
        inputs = Inputs.of(visit.block, thin, visit.run)
        for owner, names in inputs.sharing().items():
            gram = inputs.sums[owner]
            for name in names:
                u, v = cast(nn.Linear, thin[name].u), cast(nn.Linear, thin[name].v)
                better = updated(block[name].weight.detach(), u.weight, v.weight, gram)
                u.weight.data.copy_(better.to(DTYPE))
