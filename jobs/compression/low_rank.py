"""Low rank: what every factorization of linears shares: ranks from a budget, the layout, the two thin layers.

Each technique says in which norm the error counts. A linear W is decomposed once in that norm, W = Σ uᵢ vᵢ by
falling weight; the factors of rank r are the first r terms, so one decomposition serves every rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import SupportsFloat, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jobs.calibration.cache import Part
from jobs.calibration.hessian import cholesky
from jobs.context import Context
from jobs.knobs import Choice, Range
from jobs.models.layers import LowRankLinear, check_finite, linear_of
from jobs.models.layout import Layout, LinearSpec
from jobs.models.model import DTYPE, Model
from jobs.models.placement import on_device

KEEP = Range(0.05, 1.0)
KEEP_HELP = "share of the weights to keep; 1 leaves the linears as they are"
_EVEN = 32
ALLOCATION = Choice(("uniform", "global"))
ALLOCATION_HELP = "the same share for every linear, or more for those that lose more by it"

Root = Callable[[str, Float[Tensor, "out in"]], Tensor]
"""R of the norm ‖(W − W')R‖ in which a linear's error counts, [in, in], or [in] where it is diagonal; given the
linear's full name and its weight."""


def rank_of(keep: float, out_features: int, in_features: int) -> int:
    """The rank at which two factors hold the share `keep` of the weights, rounded down, at least 1."""
    return max(1, int(keep * out_features * in_features / (out_features + in_features)))


def even_rank_of(keep: float, out_features: int, in_features: int) -> int:
    """The same, rounded down to a multiple of 32 where it is as large. Products of such widths are faster, and groups
    of packed weights divide them: in a form whose groups must be even, rank 259 would have a scale for each weight."""
    rank = rank_of(keep, out_features, in_features)
    return rank - rank % _EVEN if rank >= _EVEN else rank


def output_layout(layout: Layout, keep: float, allocation: str) -> Layout:
    """The layout once every linear is factored.

    With `global` only the sum is known: the stand-in's ranks are uniform ones, some of them one more, so
    that they spend the whole budget.
    """
    if keep == 1:
        return layout
    uniform = rank_of if allocation == "global" else even_rank_of
    ranks = {
        name: uniform(keep, spec.out_features, spec.in_features) for name, spec in layout.linears.items()
    }
    if allocation == "global":
        left = _budget(layout.linears, keep) - sum(
            rank * _cost(layout.linears[name]) for name, rank in ranks.items()
        )
        for name in ranks:
            if left <= 0:
                break
            ranks[name] += 1
            left -= _cost(layout.linears[name])
    linears = {}
    for name, spec in layout.linears.items():
        linears[f"{name}.v"] = LinearSpec(ranks[name], spec.in_features, bias=False)
        linears[f"{name}.u"] = LinearSpec(spec.out_features, ranks[name], spec.bias)
    return dataclasses.replace(layout, linears=linears)


def ranks_of(
    linears: Mapping[str, LinearSpec],
    keep: float,
    terms: Mapping[str, Tensor],
    importance: Mapping[str, SupportsFloat] | None,
) -> dict[str, int]:
    """The rank of each linear: the same share for all where `importance` is None, else from one budget (see
    `allocated`). `terms` holds the singular values as `NAME.values` (see `decomposed`)."""
    if importance is None:
        return {
            name: even_rank_of(keep, spec.out_features, spec.in_features) for name, spec in linears.items()
        }
    spectra = {name: terms[f"{name}.values"] for name in linears}
    return allocated(linears, spectra, importance, _budget(linears, keep))


def allocated(
    linears: Mapping[str, LinearSpec],
    spectra: Mapping[str, Float[Tensor, " full"]],
    importance: Mapping[str, SupportsFloat],
    budget: float,
) -> dict[str, int]:
    """Ranks for which the sum of the linears' squared errors, each times its importance, is least while the
    factors hold at most `budget` weights.

    Another rank for a linear lowers its squared error by the square of the next singular value and costs
    in + out weights; the best ratio comes first, which is the optimum up to the last ranks that still fit.
    Every linear has at least rank 1, whatever the budget, and at most the rank where two factors hold as
    many weights as the one did.

    importance makes the errors comparable: what a unit of a linear's squared error adds to the loss. Two
    that need no gradients were tried on SmolLM2 with svd_llm's norm and lost to uniform ranks: all alike,
    and the inverse of the whole output's energy, by which layers that read one huge channel got rank 1.
    """
    ranks = dict.fromkeys(linears, 1)
    left = budget - sum(_cost(spec) for spec in linears.values())
    steps: list[tuple[float, str, int]] = []
    for name, spec in linears.items():
        worth = spectra[name].double().square() * float(importance[name]) / _cost(spec)
        most = rank_of(1.0, spec.out_features, spec.in_features)
        steps += [(-gain, name, rank) for rank, gain in enumerate(worth[1:most].tolist(), start=2)]
    for _, name, rank in sorted(steps):
        cost = _cost(linears[name])
        if cost <= left and ranks[name] == rank - 1:
            ranks[name] = rank
            left -= cost
    return ranks


def decomposed(
    model: Model, context: Context, technique: str, kind: str, rooting: Callable[[], Root]
) -> Mapping[str, Tensor]:
    """Per linear the factors up to the rank where they hold as many weights as it did, `NAME.u` [out, most]
    and `NAME.v` [most, in] in bf16, and all its singular values, `NAME.values`; from the cache where they are.

    kind: names the norm in the cache. rooting: called once, before the first decomposition.
    """

    def found() -> Iterator[Part]:
        rooted = rooting()
        linears = model.linears()
        for done, (name, layer) in enumerate(linears.items()):
            context.report(done / len(linears), f"decomposing {name}")
            dense = cast(nn.Linear, layer)
            with on_device(model, name):
                weight = check_finite(dense.weight.detach(), technique, name).float()
                u, v, values = terms_of(weight, rooted(name, weight))
            most = rank_of(1.0, dense.out_features, dense.in_features)
            yield (
                {
                    f"{name}.u": u[:, :most].to(DTYPE).contiguous(),
                    f"{name}.v": v[:most].to(DTYPE).contiguous(),
                    f"{name}.values": values,
                },
                {},
            )

    return context.statistics.streamed(kind, found)


def terms_of(
    weight: Float[Tensor, "out in"], root: Tensor
) -> tuple[Float[Tensor, "out full"], Float[Tensor, "full in"], Float[Tensor, " full"]]:
    """u, v and the singular values of W R, falling. For each r, u[:, :r] v[:r] = U Uᵀ W with U the first r
    left singular vectors of W R; root is R, or its diagonal.

    This is the best matrix of rank r in ‖(W − W')R‖ (Eckart and Young 1936), and the squares of the
    singular values left out sum up to its squared error. That best one is U Σ Vᵀ R⁻¹ truncated, and
    Uᵀ W R = Σ Vᵀ, so that R need not be inverted and may be singular. Each singular value is shared evenly
    between u and v, so that neither is rounded worse than the other where integers follow.
    """
    weighed = weight @ root if root.ndim == 2 else weight * root
    vectors, values, _ = torch.linalg.svd(weighed, full_matrices=False)
    share = values.clamp(min=1e-6 * values[0].clamp(min=1e-30)).sqrt()
    return vectors * share, (vectors.T @ weight) / share.unsqueeze(1), values


def root_of(gram: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """S with S Sᵀ = G, in fp64: then ‖(W − W')S‖ is the error on the text (Wang et al., eq. 5).

    Any such S gives the same factors: the Cholesky factor, or where the Gram matrix is singular its square root.
    """
    wide = gram.double()
    root = cholesky(wide)
    if root is None:
        values, vectors = torch.linalg.eigh(wide)
        root = vectors * values.clamp(min=0).sqrt()
    return root


def best_factors(
    matrix: Float[Tensor, "out in"], gram: Float[Tensor, "in in"] | None, rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """u and v for which E‖(M − u v) x‖² is least, for inputs x with E[x xᵀ] = gram; None is the identity.

    With gram = S Sᵀ that is ‖(M − u v) S‖², least where u v S is the truncated decomposition of M S
    (Eckart and Young), so u v = U Uᵀ M with U its left singular vectors. They are the eigenvectors of
    M S (M S)ᵀ, or come from those of (M S)ᵀ M S where that is the smaller. What u and v have of size is
    shared evenly between them.
    """
    wide = matrix.double()
    seen = wide if gram is None else wide @ root_of(gram)
    if seen.shape[0] <= seen.shape[1]:
        left = torch.linalg.eigh(seen @ seen.T).eigenvectors.flip(1)[:, :rank]
    else:
        right = torch.linalg.eigh(seen.T @ seen).eigenvectors.flip(1)[:, :rank]
        # Orthonormal even where singular values vanish.
        left = torch.linalg.qr(seen @ right).Q
    v = left.T @ wide
    share = v.norm(dim=1).clamp(min=1e-12).sqrt()
    return (left * share).float(), (v / share.unsqueeze(1)).float()


def factored(
    dense: nn.Linear, u: Float[Tensor, "out most"], v: Float[Tensor, "most in"], rank: int, name: str
) -> LowRankLinear:
    """The layer of this rank that takes the place of `dense`, with its bias."""
    most = len(v)
    if not 1 <= rank <= most:
        raise ValueError(f"rank={rank} of {name} is outside [1, {most}]")
    device = dense.weight.device
    first = linear_of(v[:rank].to(device, DTYPE).clone(), None)
    second = linear_of(u[:, :rank].to(device, DTYPE).contiguous(), dense.bias)
    return LowRankLinear(first, second)


def factorize(model: Model, context: Context, terms: Mapping[str, Tensor], ranks: Mapping[str, int]) -> None:
    """Replace every linear by its factors."""
    for done, (name, layer) in enumerate(model.linears().items()):
        context.report(done / len(ranks), name)
        dense = cast(nn.Linear, layer)
        model.replace(name, factored(dense, terms[f"{name}.u"], terms[f"{name}.v"], ranks[name], name))


def _cost(spec: LinearSpec) -> int:
    """The weights that one more rank adds."""
    return spec.out_features + spec.in_features


def _budget(linears: Mapping[str, LinearSpec], keep: float) -> float:
    return keep * sum(spec.out_features * spec.in_features for spec in linears.values())
