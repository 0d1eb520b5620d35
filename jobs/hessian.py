"""Hessian: of a linear's squared error on calibration text, which is the Gram matrix of its inputs."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor


def cholesky(matrix: Float[Tensor, "n n"], upper: bool = False) -> Float[Tensor, "n n"] | None:
    """The Cholesky factor, or None where the matrix is not positive.

    On CUDA (seen with torch 2.11 on an H100) the factor of a matrix that just isn't may hold NaN without a word of
    failure, so it is looked at.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix, upper=upper)
    if failed.item() or not bool(torch.isfinite(factor.diagonal()).all()):
        return None
    return cast(Tensor, factor)


def inverse_factor(gram: Float[Tensor, "in in"], damping: float, technique: str) -> Float[Tensor, "in in"]:
    """U, upper triangular, with UᵀU = (H + λI)⁻¹: row i holds how the error of input i spreads to later ones.

    U_ii² is the diagonal at i of the inverse of what is left of H without the inputs before i. λ is the share
    `damping` of the mean diagonal and grows tenfold where the matrix still has no Cholesky factor;
    ValueError, which names `technique`, where even that does not help.
    """
    mean = gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    for _ in range(6):
        damped = gram + torch.diag(torch.full_like(gram.diagonal(), (damping * mean).item()))
        lower = cholesky(damped)
        inverse = None if lower is None else cholesky(torch.cholesky_inverse(lower), upper=True)
        if inverse is not None:
            return inverse
        damping *= 10
    raise ValueError(
        f"{technique}: the Gram matrix of the inputs is not positive even with damping={damping:g}"
    )
