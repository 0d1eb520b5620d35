"""The factor of the inverse Hessian is compared with its definition in fp64."""

from __future__ import annotations

import pytest
import torch

from jobs.calibration.hessian import inverse_factor


@pytest.mark.parametrize("size", [1, 7, 128, 129, 300])
def test_the_factor_is_upper_and_its_square_is_the_inverse(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    inputs = torch.randn(2 * size, size, generator=generator) * torch.linspace(0.1, 3, size)
    gram = inputs.T @ inputs
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(size)
    factor = inverse_factor(gram, 0.01, "gptq")
    assert torch.equal(factor, factor.triu())
    assert (factor.diagonal() > 0).all()
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(factor.double(), expected, rtol=1e-4, atol=1e-5 * expected.max().item())


def test_a_matrix_without_a_factor_is_damped_until_it_has_one() -> None:
    gram = torch.diag(torch.tensor([4.0, -0.1, 4.0]))  # not positive semidefinite, as rounding can make it
    factor = inverse_factor(gram, 0.01, "gptq")
    torch.testing.assert_close(
        factor, torch.diag(1 / (gram.diagonal() + 0.1 * gram.diagonal().mean()).sqrt())
    )


def test_a_matrix_that_no_damping_can_factor_is_refused_with_the_technique() -> None:
    with pytest.raises(ValueError, match="gptq: the Gram matrix"):
        inverse_factor(torch.full((3, 3), float("nan")), 0.01, "gptq")
