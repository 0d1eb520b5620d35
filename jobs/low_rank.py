"""Low rank: the two thin matrices whose product comes nearest to a matrix on given inputs."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor


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
    seen = wide if gram is None else wide @ _root(gram.double())
    if seen.shape[0] <= seen.shape[1]:
        left = torch.linalg.eigh(seen @ seen.T).eigenvectors.flip(1)[:, :rank]
    else:
        right = torch.linalg.eigh(seen.T @ seen).eigenvectors.flip(1)[:, :rank]
        # Orthonormal even where singular values vanish.
        left = torch.linalg.qr(seen @ right).Q
    v = left.T @ wide
    share = v.norm(dim=1).clamp(min=1e-12).sqrt()
    return (left * share).float(), (v / share.unsqueeze(1)).float()


def _root(gram: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """Some S with S Sᵀ = gram: the Cholesky factor, or where gram is singular one from its eigenvectors."""
    root, failed = torch.linalg.cholesky_ex(gram)
    if not failed.item():
        return cast(Tensor, root)
    values, vectors = torch.linalg.eigh(gram)
    return cast(Tensor, vectors * values.clamp(min=0).sqrt())
