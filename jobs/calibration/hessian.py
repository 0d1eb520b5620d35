"""Hessian: of a linear's squared error on calibration text, which is the Gram matrix of its inputs."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

_LEAF = 128
"""A triangle of so many rows is inverted at once."""


def cholesky(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"] | None:
    """The lower Cholesky factor, or None where the matrix is not positive.

    On CUDA (seen with torch 2.11 on an H100) the factor of a matrix that just isn't may hold NaN without a word of
    failure, so it is looked at.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
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
        # Turned about, its factor L gives R = J L J, upper triangular with R Rᵀ = H: so U = R⁻¹, at half the work of
        # inverting H and factoring that.
        lower = cholesky(damped.flip(0, 1))
        if lower is not None:
            return _triangular_inverse(lower.flip(0, 1))
        damping *= 10
    raise ValueError(
        f"{technique}: the Gram matrix of the inputs is not positive even with damping={damping:g}"
    )


def _triangular_inverse(upper: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """The inverse of an upper triangular matrix, by halves, so that most of the work is in products."""
    size = len(upper)
    if size <= _LEAF:
        identity = torch.eye(size, dtype=upper.dtype, device=upper.device)
        return cast(Tensor, torch.linalg.solve_triangular(upper, identity, upper=True))
    half = size // 2
    first, last = _triangular_inverse(upper[:half, :half]), _triangular_inverse(upper[half:, half:])
    beside = -(first @ upper[:half, half:]) @ last
    return torch.cat([torch.cat([first, beside], 1), torch.cat([torch.zeros_like(beside.T), last], 1)])
