"""Refit: solve for the remaining weights of a linear after some of its inputs have been removed."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jobs.calibration.hessian import cholesky

_RIDGE = 1e-4
"""λ as a share of the mean diagonal. Without it, neurons that always fire together would get huge weights of
opposite sign."""


def refit(
    weight: Float[Tensor, "out in"], gram: Float[Tensor, "in in"], columns: Int[Tensor, " kept"]
) -> Float[Tensor, "out kept"]:
    """Return the W' for which E‖W' a[K] − W a‖² is least: W G[:, K] (G[K, K] + λI)⁻¹, computed in fp64.

    `columns` is K, the indices of the remaining inputs; `gram` is G = E[a aᵀ].
    """
    gram64 = gram.double()
    inner = gram64[columns][:, columns]
    inner.diagonal().add_(_RIDGE * inner.diagonal().mean().clamp(min=1e-30))
    target = gram64[columns] @ weight.double().T
    factor = cholesky(inner)
    solution = (
        torch.linalg.lstsq(inner, target).solution if factor is None else torch.cholesky_solve(target, factor)
    )
    return solution.T.float()
