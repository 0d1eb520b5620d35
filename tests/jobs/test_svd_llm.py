from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jobs.techniques.svd_llm import directions_of, factors, rank_of


def case(seed: int, out: int = 12, into: int = 9, tokens: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, correlated inputs and their Gram matrix."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, into, generator=generator) @ torch.randn(into, into, generator=generator)
    return torch.randn(out, into, generator=generator), x, x.T @ x / tokens


def approximated(weight: Tensor, gram: Tensor, rank: int) -> Tensor:
    vectors, values = directions_of(weight, gram)
    u, v = factors(weight, vectors[:, :rank], values[:rank])
    return u @ v


def loss(weight: Tensor, other: Tensor, x: Tensor) -> float:
    return (x @ (weight - other).T).norm().item()


@pytest.mark.parametrize(("out", "into"), [(12, 9), (9, 12), (7, 7)])
def test_full_rank_is_the_identity(out: int, into: int) -> None:
    weight, _, gram = case(0, out, into)
    assert torch.allclose(approximated(weight, gram, min(out, into)), weight, atol=1e-4)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), rank=st.integers(1, 8))
def test_no_other_matrix_of_that_rank_is_nearer_on_the_inputs(seed: int, rank: int) -> None:
    weight, x, gram = case(seed)
    ours = loss(weight, approximated(weight, gram, rank), x)
    # Eckart and Young: the error is the energy of the singular values left out. What is left at nearly full
    # rank is as small as the rounding of the whole in fp32.
    _, values = directions_of(weight, gram)
    rounding = 1e-5 * loss(weight, torch.zeros_like(weight), x)
    assert ours == pytest.approx(values[rank:].norm().item() * 200**0.5, rel=1e-2, abs=rounding)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    plain = (u[:, :rank] * s[:rank]) @ vh[:rank]
    assert ours <= loss(weight, plain, x) * 1.001 + 1e-4


def test_it_equals_the_papers_formula() -> None:
    weight, _, gram = case(1)
    root = torch.linalg.cholesky(gram.double())
    u, s, vh = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    paper = (u[:, :4] * s[:4]) @ vh[:4] @ torch.linalg.inv(root)
    assert torch.allclose(approximated(weight, gram, 4).double(), paper, atol=1e-3)


def test_a_singular_gram_matrix_does_no_harm() -> None:
    weight, x, _ = case(2, tokens=4)  # fewer tokens than inputs
    gram = x.T @ x / 4
    assert loss(weight, approximated(weight, gram, 4), x) < 1e-3
    assert torch.isfinite(approximated(weight, torch.zeros_like(gram), 3)).all()
    assert torch.isfinite(approximated(torch.zeros_like(weight), gram, 3)).all()


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.8, 0.999])
@pytest.mark.parametrize(("out", "into"), [(576, 576), (1536, 576), (192, 576), (3, 2)])
def test_the_factors_hold_no_more_than_the_share_to_keep(keep: float, out: int, into: int) -> None:
    rank = rank_of(keep, out, into)
    assert rank >= 1
    assert rank == 1 or rank * (out + into) <= keep * out * into
