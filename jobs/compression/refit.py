"""Refit: the weights that make the most of the inputs that pruning has left."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jobs.calibration.hessian import cholesky


def refit(
    weight: Float[Tensor, "out in"], gram: Float[Tensor, "in in"], kept: Int[Tensor, " kept"]
) -> Float[Tensor, "out kept"]:
    """The W' for which W' a[kept] comes nearest to W a in squared error: W G[:, K] (G[K, K] + λI)⁻¹.

    In fp64; λ is 1e-4 of the mean diagonal, which keeps neurons that always fire together from being
    given huge weights of opposite sign.
    """
    wide = gram.double()
    inner = wide[kept][:, kept]
    inner.diagonal().add_(1e-4 * inner.diagonal().mean().clamp(min=1e-30))
    target = wide[kept] @ weight.double().T
    factor = cholesky(inner)
    solved = (
        torch.linalg.lstsq(inner, target).solution if factor is None else torch.cholesky_solve(target, factor)
    )
    return solved.T.float()
