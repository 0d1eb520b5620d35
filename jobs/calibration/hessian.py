"""The Hessian of a linear's squared error on calibration text: the Gram matrix of its inputs."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

_LEAF = 128
"""Rows of a triangle that is inverted at once."""


def cholesky(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"] | None:
    """Return the lower Cholesky factor, or None if the matrix is not positive definite.

    On CUDA (seen with torch 2.11 on an H100) the factor of a matrix that just isn't may hold NaN without a word of
    failure, so it is looked at.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed.item() or not bool(torch.isfinite(factor.diagonal()).all()):
        return None
    return cast(Tensor, factor)


def inverse_factor(gram: Float[Tensor, "in in"], damping: float, technique: str) -> Float[Tensor, "in in"]:
    """Return the upper triangular U with UᵀU = (H + λI)⁻¹. Its row i spreads the error of input i to later inputs.

    U_ii² is entry i of the diagonal of the inverse of H without the inputs before i. λ is `damping` times the mean
    diagonal, and is multiplied by 10 while there is no Cholesky factor. Raises ValueError, which names `technique`,
    if five increases do not help.
    """
    mean = gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    for _ in range(6):
        damped = gram + torch.diag(torch.full_like(gram.diagonal(), (damping * mean).item()))
        # With rows and columns reversed, the factor L gives R = J L J, upper triangular with
        # R Rᵀ = H. So U = R⁻¹, at half the work of inverting H and factoring the inverse.
        lower = cholesky(damped.flip(0, 1))
        if lower is not None:
            return _triangular_inverse(lower.flip(0, 1))
        damping *= 10
    raise ValueError(
        f"{technique}: the Gram matrix of the inputs is not positive even with damping={damping:g}"
    )


def _triangular_inverse(upper: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Return the inverse of an upper triangular matrix, by halves, so that most work is in matrix products."""
    size = len(upper)
    if size <= _LEAF:
        identity = torch.eye(size, dtype=upper.dtype, device=upper.device)
        return cast(Tensor, torch.linalg.solve_triangular(upper, identity, upper=True))
    half = size // 2
    first, last = _triangular_inverse(upper[:half, :half]), _triangular_inverse(upper[half:, half:])
    corner = -(first @ upper[:half, half:]) @ last
    return torch.cat([torch.cat([first, corner], 1), torch.cat([torch.zeros_like(corner.T), last], 1)])
