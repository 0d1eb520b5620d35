"""svd_llm: replace each linear by two thin ones, the best of their rank on calibration text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jobs.context import Context
from jobs.knobs import Range, knob
from jobs.layers import LowRankLinear, check_finite, linear_of
from jobs.layout import Layout, LinearSpec
from jobs.models import DTYPE, Model
from jobs.technique import Form, Kind, Need, Technique


@dataclass(frozen=True)
class SvdLlm(Technique):
    """Factorizes every linear of the blocks so that both factors hold the share `keep` of its weights."""

    kind: ClassVar[Kind] = "rank"
    paper: ClassVar[str] = "Wang et al. 2024, SVD-LLM, arXiv:2403.07378"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    leaves: ClassVar[frozenset[Form]] = frozenset({"factored"})

    keep: float = knob(0.8, Range(0.05, 1.0), "share of the weights to keep; 1 leaves the linear as it is")

    @property
    def identity(self) -> bool:
        return self.keep == 1

    def outline(self, layout: Layout) -> Layout:
        self.check_forms(layout)
        if self.identity:
            return layout
        linears = {}
        for name, spec in layout.linears.items():
            rank = rank_of(self.keep, spec.out_features, spec.in_features)
            linears[f"{name}.v"] = LinearSpec(rank, spec.in_features, bias=False)
            linears[f"{name}.u"] = LinearSpec(spec.out_features, rank, spec.bias)
        return dataclasses.replace(layout, linears=linears)

    def compress(self, model: Model, context: Context) -> Model:
        self.outline(model.layout())
        if self.identity:
            return model
        directions = context.statistics.stored("svd", lambda: _all_directions(model, context))
        for name, layer in model.linears().items():
            dense = cast(nn.Linear, layer)
            rank = rank_of(self.keep, dense.out_features, dense.in_features)
            weight = check_finite(dense.weight.detach().float(), self.name(), name)
            u, v = factors(
                weight,
                directions[f"{name}.vectors"][:, :rank].to(weight.device),
                directions[f"{name}.values"][:rank].to(weight.device),
            )
            model.replace(
                name, LowRankLinear(linear_of(v.to(DTYPE), None), linear_of(u.to(DTYPE), dense.bias))
            )
        return model


def rank_of(keep: float, out_features: int, in_features: int) -> int:
    """The rank at which two factors hold the share `keep` of the weights, rounded down, at least 1."""
    return max(1, int(keep * out_features * in_features / (out_features + in_features)))


def directions_of(
    weight: Float[Tensor, "out in"], gram: Float[Tensor, "in in"]
) -> tuple[Float[Tensor, "out full"], Float[Tensor, " full"]]:
    """The left singular vectors and the singular values of W S, where S Sᵀ is the inputs' Gram matrix.

    The error on calibration text is ‖(W − W')S‖ (Wang et al., eq. 5), so any such S does: the Cholesky
    factor, or where the Gram is singular its square root.
    """
    root, failed = torch.linalg.cholesky_ex(gram)
    if failed.item():
        values, vectors = torch.linalg.eigh(gram.double())
        root = (vectors * values.clamp(min=0).sqrt()).to(gram.dtype)
    u, s, _ = torch.linalg.svd(weight @ root, full_matrices=False)
    return u, s


def factors(
    weight: Float[Tensor, "out in"], vectors: Float[Tensor, "out rank"], values: Float[Tensor, " rank"]
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """u and v with u v = U Uᵀ W, singular values shared evenly between them.

    That is the paper's U Σ Vᵀ S⁻¹ truncated (Uᵀ W S = Σ Vᵀ), written so that S need not be inverted.
    """
    share = values.clamp(min=1e-6 * values[0].clamp(min=1e-30)).sqrt()
    return vectors * share, (vectors.T @ weight) / share.unsqueeze(1)


def _all_directions(model: Model, context: Context) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Per linear, as many directions as the largest rank has: one decomposition serves every rank."""
    assert context.calibration is not None
    grams = context.statistics.grams(model, context.calibration, context.report)
    tensors = {}
    linears = model.linears()
    for done, (name, layer) in enumerate(linears.items()):
        context.report(done / len(linears), name)
        dense = cast(nn.Linear, layer)
        weight = check_finite(dense.weight.detach().float(), SvdLlm.name(), name)
        vectors, values = directions_of(weight, grams.gram(name).to(weight.device))
        most = rank_of(1.0, dense.out_features, dense.in_features)
        tensors[f"{name}.vectors"] = vectors[:, :most].contiguous()
        tensors[f"{name}.values"] = values[:most].contiguous()
    return tensors, {}
