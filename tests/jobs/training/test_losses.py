"""Losses and their gradients are compared with formulas that autograd differentiates, in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from jobs.training.losses import (
    DistillationObjective,
    Divergence,
    TopKLogits,
    cross_entropy,
    distillation_loss,
    top_k_logits,
)

DIVERGENCES: tuple[Divergence, ...] = ("forward", "reverse", "symmetric")


def divergence_by_formula(student: Tensor, p: Tensor, divergence: Divergence) -> Tensor:
    """Return the mean divergence of probabilities by the formula of the papers."""
    q = student

    def kl(numerator: Tensor, denominator: Tensor) -> Tensor:
        return (numerator * (numerator / denominator).log()).sum(-1).mean()

    if divergence == "forward":
        return kl(p, q)
    if divergence == "reverse":
        return kl(q, p)
    return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2


def make_logits(tokens: int = 300, vocabulary: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64) * 2
    teacher = torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64) * 2
    return student, teacher, torch.randint(vocabulary, (tokens,), generator=generator)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("temperature", "hard_weight"), [(1.0, 0.0), (3.0, 0.25), (2.0, 1.0)])
def test_the_loss_and_its_gradient_are_those_of_the_formula(
    divergence: Divergence, temperature: float, hard_weight: float
) -> None:
    start, teacher, targets = make_logits()
    student, plain = start.clone().requires_grad_(), start.clone().requires_grad_()
    soft = divergence_by_formula(
        (plain / temperature).softmax(-1), (teacher / temperature).softmax(-1), divergence
    )
    hard = nn.functional.cross_entropy(plain, targets)
    expected = (1 - hard_weight) * temperature**2 * soft + hard_weight * hard
    loss = distillation_loss(
        student, teacher, targets, DistillationObjective(divergence, temperature, hard_weight)
    )
    (3 * expected).backward()
    (3 * loss).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(student.grad, plain.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_top_k_logits_treat_all_other_tokens_as_one_outcome(
    divergence: Divergence,
) -> None:
    start, teacher, _ = make_logits()
    top = top_k_logits(teacher, 4, 1.5)
    indices = top.indices.long()
    p = torch.cat([top.log_shares.double(), top.log_rest.double()[:, None]], dim=1).softmax(-1)
    student, plain = start.clone().requires_grad_(), start.clone().requires_grad_()
    q = (plain / 1.5).softmax(-1)
    kept_probabilities = q.gather(1, indices)
    expected = 1.5**2 * divergence_by_formula(
        torch.cat([kept_probabilities, 1 - kept_probabilities.sum(1, keepdim=True)], 1), p, divergence
    )
    loss = distillation_loss(student, top, None, DistillationObjective(divergence, 1.5))
    expected.backward()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(student.grad, plain.grad, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_top_k_gives_a_lower_bound_and_the_full_divergence_for_all_tokens(
    divergence: Divergence,
) -> None:
    student, teacher, _ = make_logits()
    full = distillation_loss(student, teacher, None, DistillationObjective(divergence)).item()
    objective = DistillationObjective(divergence)
    truncated = [
        distillation_loss(student, top_k_logits(teacher, k, 1.0), None, objective).item()
        for k in range(1, 12)
    ]
    assert truncated[-1] == pytest.approx(full, rel=1e-3)  # stored in fp16
    assert all(fewer < more * 1.002 for fewer, more in itertools.pairwise(truncated))
    assert truncated[0] < 0.9 * full


def test_the_probability_of_other_tokens_is_exact_even_if_tiny() -> None:
    confident = torch.tensor([[200.0, 0.0, 0.0, 0.0]])
    top = top_k_logits(confident, 1, 1.0)
    assert top.log_rest.item() == pytest.approx(-200 + torch.tensor(3.0).log().item(), rel=1e-6)
    student = torch.zeros(1, 4, requires_grad=True)
    for divergence in DIVERGENCES:
        loss = distillation_loss(student, top, None, DistillationObjective(divergence))
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(student.grad).all()  # type: ignore[arg-type]


def test_the_symmetric_divergence_is_symmetric_and_at_most_log_2() -> None:
    student, teacher, _ = make_logits()
    objective = DistillationObjective("symmetric")
    loss = distillation_loss(student, teacher, None, objective)
    swapped_loss = distillation_loss(teacher, student, None, objective)
    assert loss.item() == pytest.approx(swapped_loss.item(), rel=1e-12)
    assert (
        distillation_loss(100 * student, 100 * teacher, None, objective).item()
        < torch.tensor(2.0).log().item()
    )


def test_cross_entropy_equals_that_of_torch() -> None:
    start, _, targets = make_logits()
    student, plain = start.clone().requires_grad_(), start.clone().requires_grad_()
    loss, expected = cross_entropy(student, targets), nn.functional.cross_entropy(plain, targets)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(student.grad, plain.grad)


def test_a_positive_hard_weight_needs_target_tokens() -> None:
    student, teacher, _ = make_logits()
    with pytest.raises(ValueError, match=r"hard_weight=0\.5 needs"):
        distillation_loss(student, teacher, None, DistillationObjective(hard_weight=0.5))


def test_top_k_logits_are_stored_in_fp16_and_int32() -> None:
    top = top_k_logits(make_logits()[1], 4, 1.0)
    assert isinstance(top, TopKLogits)
    assert (top.log_shares.dtype, top.indices.dtype, top.log_rest.dtype) == (
        torch.float16, torch.int32, torch.float32,
    )  # fmt: skip
