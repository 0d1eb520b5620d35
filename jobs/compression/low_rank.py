"""Low rank: replace linears by two thin ones; ranks from a budget, the layout and the factors.

Techniques differ in the norm in which the error of a linear counts. A linear W is decomposed once in that norm,
W = Σ uᵢ vᵢ with falling singular values; the factors of rank r are the first r terms, so one decomposition serves
every rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, SupportsFloat, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jobs.calibration.cache import Part
from jobs.calibration.hessian import cholesky
from jobs.context import Context
from jobs.knobs import Choice, Range, knob
from jobs.models.layers import LowRankLinear, check_finite, linear_of
from jobs.models.layout import Layout, LinearSpec
from jobs.models.model import DTYPE, Model
from jobs.models.placement import on_device

_RANK_MULTIPLE = 32
"""Products with such widths are faster, and groups of packed weights divide them."""

Root = Callable[[str, Float[Tensor, "out in"]], Tensor]
"""From a linear's full name and weight W to the R of its error ‖(W − W')R‖, [in, in], or [in] if R is diagonal."""


def keep_knob() -> Any:
    return knob(0.8, Range(0.05, 1.0), "share of the weights to keep; 1 leaves the linears unchanged")


def allocation_knob() -> Any:
    return knob(
        "uniform",
        Choice(("uniform", "global")),
        "the same share for every linear, or more for linears that affect the loss more",
    )


@dataclass(frozen=True)
class Factorization:
    """The layout change of techniques that factorize every linear (`jobs.technique.LayoutChange`)."""

    keep: float
    """The share of the weights that the factors hold."""
    allocation: str
    """"uniform": the same share for every linear; "global": the data decide the share of each linear."""

    @property
    def is_noop(self) -> bool:
        return self.keep == 1

    @property
    def exact(self) -> bool:
        return self.is_noop or self.allocation == "uniform"

    def apply(self, layout: Layout, technique: str) -> Layout:
        """Return the layout with two thin linears for each linear.

        With global allocation only the total is known: ranks are then uniform, and some of them one higher, so
        that the whole budget is spent.
        """
        if self.is_noop:
            return layout
        ranks = self._uniform_ranks(layout.linears)
        if self.allocation == "global":
            remaining = self._budget(layout.linears) - sum(
                rank * _rank_cost(layout.linears[name]) for name, rank in ranks.items()
            )
            for name in ranks:
                if remaining <= 0:
                    break
                ranks[name] += 1
                remaining -= _rank_cost(layout.linears[name])
        linears = {}
        for name, spec in layout.linears.items():
            linears[f"{name}.v"] = LinearSpec(ranks[name], spec.in_features, bias=False)
            linears[f"{name}.u"] = LinearSpec(spec.out_features, ranks[name], spec.bias)
        return dataclasses.replace(layout, linears=linears)

    def ranks(
        self,
        linears: Mapping[str, LinearSpec],
        terms: Mapping[str, Tensor],
        importance: Callable[[], Mapping[str, SupportsFloat]],
    ) -> dict[str, int]:
        """Return the rank of each linear: of equal shares, or with global allocation from one budget.

        `terms` holds the singular values as `NAME.values` (see `decompose`). `importance` is called with global
        allocation only (see `allocate`).
        """
        if self.allocation == "uniform":
            return self._uniform_ranks(linears)
        spectra = {name: terms[f"{name}.values"] for name in linears}
        return allocate(linears, spectra, importance(), self._budget(linears))

    def _uniform_ranks(self, linears: Mapping[str, LinearSpec]) -> dict[str, int]:
        rank_for = even_rank_of
        if self.allocation == "global":
            rank_for = rank_of
        return {
            name: rank_for(self.keep, spec.out_features, spec.in_features) for name, spec in linears.items()
        }

    def _budget(self, linears: Mapping[str, LinearSpec]) -> float:
        return self.keep * sum(spec.out_features * spec.in_features for spec in linears.values())


def rank_of(keep: float, out_features: int, in_features: int) -> int:
    """Return the rank at which two factors hold the share `keep` of the weights, rounded down, at least 1."""
    return max(1, int(keep * out_features * in_features / (out_features + in_features)))


def even_rank_of(keep: float, out_features: int, in_features: int) -> int:
    """Return `rank_of`, rounded down to a multiple of 32 if it is at least 32.

    In a file format whose groups must be of equal size, rank 259 would need a scale for each weight.
    """
    rank = rank_of(keep, out_features, in_features)
    if rank < _RANK_MULTIPLE:
        return rank
    return rank - rank % _RANK_MULTIPLE


def allocate(
    linears: Mapping[str, LinearSpec],
    spectra: Mapping[str, Float[Tensor, " full"]],
    importance: Mapping[str, SupportsFloat],
    budget: float,
) -> dict[str, int]:
    """Return the ranks for which Σ importance · squared error is least while the factors hold at most `budget` weights.

    One rank more lowers the squared error of a linear by the square of the next singular value, and costs
    in + out weights. The best ratio comes first, which is optimal up to the last ranks that still fit. Every
    linear has at least rank 1, whatever the budget, and at most the rank at which two factors hold as many
    weights as the linear.

    `importance` is the increase of the loss per unit of a linear's squared error. Two values that need no
    gradients were tried on SmolLM2 with svd_llm's norm and gave worse models than uniform ranks: 1 for all
    linears, and the inverse energy of the whole output, which gave rank 1 to layers that read one huge channel.
    """
    ranks = dict.fromkeys(linears, 1)
    remaining = budget - sum(_rank_cost(spec) for spec in linears.values())
    increments: list[tuple[float, str, int]] = []
    for name, spec in linears.items():
        gains = spectra[name].double().square() * float(importance[name]) / _rank_cost(spec)
        max_rank = rank_of(1.0, spec.out_features, spec.in_features)
        increments += [(-gain, name, rank) for rank, gain in enumerate(gains[1:max_rank].tolist(), start=2)]
    for _, name, rank in sorted(increments):
        cost = _rank_cost(linears[name])
        if cost <= remaining and ranks[name] == rank - 1:
            ranks[name] = rank
            remaining -= cost
    return ranks


def decompose(
    model: Model, context: Context, technique: str, kind: str, root: Callable[[], Root]
) -> Mapping[str, Tensor]:
    """Return the factors and singular values of every linear, from the cache if they are there.

    Per linear: `NAME.u` [out, max_rank] and `NAME.v` [max_rank, in] in bf16, where max_rank is the rank at which
    they hold as many weights as the linear, and all its singular values, `NAME.values`. `kind` is the cache's
    name of the norm. `root` is called once, before the first decomposition.
    """

    def parts() -> Iterator[Part]:
        root_for = root()
        linears = model.linears()
        for index, (name, layer) in enumerate(linears.items()):
            context.report(index / len(linears), f"decomposing {name}")
            dense = cast(nn.Linear, layer)
            with on_device(model, name):
                weight = check_finite(dense.weight.detach(), technique, name).float()
                u, v, values = terms_of(weight, root_for(name, weight))
            max_rank = rank_of(1.0, dense.out_features, dense.in_features)
            yield (
                {
                    f"{name}.u": u[:, :max_rank].to(DTYPE).contiguous(),
                    f"{name}.v": v[:max_rank].to(DTYPE).contiguous(),
                    f"{name}.values": values,
                },
                {},
            )

    return context.statistics.streamed(kind, parts)


def terms_of(
    weight: Float[Tensor, "out in"], root: Tensor
) -> tuple[Float[Tensor, "out full"], Float[Tensor, "full in"], Float[Tensor, " full"]]:
    """Return u, v and the falling singular values of W R; `root` is R, or its diagonal.

    For each r, u[:, :r] v[:r] = U Uᵀ W, where U holds the first r left singular vectors of W R. This is the
    best matrix of rank r in ‖(W − W')R‖ (Eckart and Young 1936); its squared error is the sum of the squared
    singular values beyond r. That matrix is the truncated U Σ Vᵀ R⁻¹, and Uᵀ W R = Σ Vᵀ, so R need not be
    inverted and may be singular. Each singular value is shared evenly between u and v, so that a later
    quantization rounds both equally well.
    """
    weighted = weight @ root if root.ndim == 2 else weight * root
    vectors, values, _ = torch.linalg.svd(weighted, full_matrices=False)
    share = values.clamp(min=1e-6 * values[0].clamp(min=1e-30)).sqrt()
    return vectors * share, (vectors.T @ weight) / share.unsqueeze(1), values


def root_of(gram: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """Return S with S Sᵀ = G, in fp64: then ‖(W − W')S‖ is the error on the text (Wang et al. 2024, SVD-LLM, eq. 5).

    Any such S gives the same factors. It is the Cholesky factor, or the square root if G is singular.
    """
    gram64 = gram.double()
    root = cholesky(gram64)
    if root is None:
        values, vectors = torch.linalg.eigh(gram64)
        root = vectors * values.clamp(min=0).sqrt()
    return root


def best_factors(
    matrix: Float[Tensor, "out in"], gram: Float[Tensor, "in in"] | None, rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """Return the u and v for which E‖(M − u v) x‖² is least, for inputs x with E[x xᵀ] = gram; None is the identity.

    With gram = S Sᵀ that is ‖(M − u v) S‖², which is least where u v S is the truncated singular value
    decomposition of M S (Eckart and Young 1936), so u v = U Uᵀ M with U its left singular vectors. They are
    the eigenvectors of M S (M S)ᵀ, or follow from those of (M S)ᵀ M S if that matrix is smaller. The norm
    is shared evenly between u and v.
    """
    matrix64 = matrix.double()
    weighted = matrix64
    if gram is not None:
        weighted = matrix64 @ root_of(gram)
    if weighted.shape[0] <= weighted.shape[1]:
        u = torch.linalg.eigh(weighted @ weighted.T).eigenvectors.flip(1)[:, :rank]
    else:
        right = torch.linalg.eigh(weighted.T @ weighted).eigenvectors.flip(1)[:, :rank]
        # Orthonormal even where singular values vanish.
        u = torch.linalg.qr(weighted @ right).Q
    v = u.T @ matrix64
    share = v.norm(dim=1).clamp(min=1e-12).sqrt()
    return (u * share).float(), (v / share.unsqueeze(1)).float()


def factored(
    dense: nn.Linear, u: Float[Tensor, "out max"], v: Float[Tensor, "max in"], rank: int, name: str
) -> LowRankLinear:
    """Return the low-rank layer that replaces `dense`, with its bias and the first `rank` terms of u v."""
    max_rank = len(v)
    if not 1 <= rank <= max_rank:
        raise ValueError(f"rank={rank} of {name} is outside [1, {max_rank}]")
    device = dense.weight.device
    first = linear_of(v[:rank].to(device, DTYPE).clone(), None)
    second = linear_of(u[:, :rank].to(device, DTYPE).contiguous(), dense.bias)
    return LowRankLinear(first, second)


def factorize(model: Model, context: Context, terms: Mapping[str, Tensor], ranks: Mapping[str, int]) -> None:
    """Replace every linear of `model`, in place, by its factors of these ranks."""
    for index, (name, layer) in enumerate(model.linears().items()):
        context.report(index / len(ranks), name)
        dense = cast(nn.Linear, layer)
        model.replace(name, factored(dense, terms[f"{name}.u"], terms[f"{name}.v"], ranks[name], name))


def _rank_cost(spec: LinearSpec) -> int:
    """Return the number of weights of one more rank."""
    return spec.out_features + spec.in_features
