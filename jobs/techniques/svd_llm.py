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
from jobs.compression import low_rank
from jobs.compression.importance import sensitivities
from jobs.compression.low_rank import Factorization
from jobs.context import Context
from jobs.knobs import Choice, knob
from jobs.models.layers import LowRankLinear
from jobs.models.layout import Form
from jobs.models.model import DTYPE, Model
from jobs.technique import Kind, Need, Technique

_RIDGE = 1e-4
"""Added to the diagonal when u is solved for, as a share of the mean diagonal."""


@dataclass(frozen=True)
class SvdLlm(Technique):
    """Factorizes every linear of the blocks so that its output on calibration text changes least.

    W' = U Uᵀ W, with U the first left singular vectors of W S and S Sᵀ the Gram matrix of the inputs. This is
    the paper's solution without the inverse of S. update, of the factor u (Wang et al., section 3.3):
        none        keeps u: with the parent's inputs it is already optimal for its v.
        sequential  solves for u again, block by block, with the outputs of already compressed blocks as inputs.
                    It needs two passes over the text for every candidate, and candidates share no result.
    """

    kind: ClassVar[Kind] = "rank"
    paper: ClassVar[str] = "Wang et al. 2024, SVD-LLM, arXiv:2403.07378"
    version: ClassVar[int] = 4
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    produces: ClassVar[frozenset[Form]] = frozenset({"factored"})

    keep: float = low_rank.keep_knob()
    allocation: str = low_rank.allocation_knob()
    update: str = knob(
        "none", Choice(("none", "sequential")), "whether to refit u to the outputs of compressed blocks"
    )

    @property
    def layout_change(self) -> Factorization:
        return Factorization(self.keep, self.allocation)

    def compress(self, model: Model, context: Context) -> Model:
        layout = model.layout()
        self.output_layout(layout)
        if self.is_noop:
            return model
        terms = low_rank.decompose(
            model, context, self.name(), "svd-whitened", lambda: _gram_root(model, context)
        )
        ranks = self.layout_change.ranks(layout.linears, terms, lambda: sensitivities(model, context))
        if self.update == "none":
            low_rank.factorize(model, context, terms, ranks)
        else:
            _factorize_in_sequence(model, context, terms, ranks)
        return model


def _gram_root(model: Model, context: Context) -> low_rank.Root:
    assert context.calibration is not None
    grams = context.statistics.grams(model, context.calibration, context.report)
    return lambda name, weight: low_rank.root_of(grams.gram(name).to(weight.device)).float()


def updated(
    weight: Float[Tensor, "out in"],
    u: Float[Tensor, "out rank"],
    v: Float[Tensor, "rank in"],
    gram: Float[Tensor, "in in"],
) -> Float[Tensor, "out rank"]:
    """Return the u' that makes u' v x nearest to W x on inputs x with this Gram matrix, computed in fp64.

    It is W G vᵀ (v G vᵀ)⁻¹ (Wang et al., section 3.3). The solved unknown is the difference to u, with a ridge:
    where the inputs give no information u stays the same, and the error is never larger than that of u.
    """
    v64, u64 = v.double(), u.double()
    half = gram.double() @ v64.T
    inner = v64 @ half
    inner.diagonal().add_(_RIDGE * inner.diagonal().mean().clamp(min=1e-30))
    residual = (weight.double() - u64 @ v64) @ half
    factor = cholesky(inner)
    if factor is None:
        raise ValueError(
            "svd_llm: the Gram matrix of a compressed layer's inputs contains NaN or is not positive"
        )
    return (u64 + torch.cholesky_solve(residual.T, factor).T).float()


def _factorize_in_sequence(
    model: Model, context: Context, terms: Mapping[str, Tensor], ranks: Mapping[str, int]
) -> None:
    """For each block: replace its linears by factors, collect their inputs, solve for every u, and continue.

    All linears of a block are solved for from one pass, in which the linears before them in the block are
    factored but not yet updated. One pass for each linear would need four to six times as many passes.
    """
    assert context.calibration is not None
    for visit in stream(model, context.calibration, context.report, "fitting the factors"):
        block = {
            name: cast(nn.Linear, layer)
            for name, layer in model.linears().items()
            if name.startswith(f"{visit.name}.")
        }
        factored: dict[str, LowRankLinear] = {}
        for name, dense in block.items():
            u, v = terms[f"{name}.u"], terms[f"{name}.v"]
            factored[name] = low_rank.factored(dense, u, v, ranks[name], name)
            model.replace(name, factored[name])
        inputs = Inputs.of(visit.block, factored, visit.run)
        for owner, names in inputs.sharing().items():
            gram = inputs.sums[owner]
            for name in names:
                first, second = cast(nn.Linear, factored[name].v), cast(nn.Linear, factored[name].u)
                better = updated(block[name].weight.detach(), second.weight, first.weight, gram)
                second.weight.data.copy_(better.to(DTYPE))
