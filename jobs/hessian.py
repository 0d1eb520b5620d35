"""Hessian: of a linear's squared error on calibration text, which is the Gram matrix of its inputs."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor


def inverse_factor(gram: Float[Tensor, "in in"], damping: float, technique: str) -> Float[Tensor, "in in"]:
    """U, upper triangular, with UᵀU = (H + λI)⁻¹: row i holds how the error of input i spreads to later ones.

    U_ii² is the diagonal at i of the inverse of what is left of H without the inputs before i. λ is the share
    `damping` of the mean diagonal and grows tenfold where the matrix still has no Cholesky factor;
    ValueError, which names `technique`, where even that does not help.
    """
    mean = gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    for _ in range(6):
        damped = gram + torch.diag(torch.full_like(gram.diagonal(), (damping * mean).item()))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed.item():
            inverse, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed.item():
                return cast(Tensor, inverse)
        damping *= 10
    raise ValueError(
        f"{technique}: the Gram matrix of the inputs is not positive even with damping={damping:g}"
    )
