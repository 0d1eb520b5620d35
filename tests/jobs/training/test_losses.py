"""Losses against the formulas that autograd differentiates, in fp64."""

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


def plainly(student: Tensor, p: Tensor, divergence: Divergence) -> Tensor:
    """The mean divergence of probabilities, as the papers write it."""
    q = student

    def kl(left: Tensor, right: Tensor) -> Tensor:
        return (left * (left / right).log()).sum(-1).mean()

    if divergence == "forward":
        return kl(p, q)
    if divergence == "reverse":
        return kl(q, p)
    return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2


def logits(tokens: int = 300, vocabulary: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64) * 2
    teacher = torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64) * 2
    return student, teacher, torch.randint(vocabulary, (tokens,), generator=generator)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("temperature", "hard_weight"), [(1.0, 0.0), (3.0, 0.25), (2.0, 1.0)])
def test_the_loss_and_its_gradient_are_those_of_the_formula(
    divergence: Divergence, temperature: float, hard_weight: float
) -> None:
    start, teacher, targets = logits()
    student, plain = start.clone().requires_grad_(), start.clone().requires_grad_()
    soft = plainly((plain / temperature).softmax(-1), (teacher / temperature).softmax(-1), divergence)
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
def test_a_teacher_cut_to_k_tokens_has_the_gradient_of_all_others_as_one_outcome(
    divergence: Divergence,
) -> None:
    start, teacher, _ = logits()
    top = top_k_logits(teacher, 4, 1.5)
    places = top.indices.long()
    p = torch.cat([top.log_shares.double(), top.log_rest.double()[:, None]], dim=1).softmax(-1)
    student, plain = start.clone().requires_grad_(), start.clone().requires_grad_()
    q = (plain / 1.5).softmax(-1)
    kept = q.gather(1, places)
    expected = 1.5**2 * plainly(torch.cat([kept, 1 - kept.sum(1, keepdim=True)], 1), p, divergence)
    loss = distillation_loss(student, top, None, DistillationObjective(divergence, 1.5))
    expected.backward()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(student.grad, plain.grad, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_whole_vocabulary_kept_is_the_full_divergence_and_less_is_a_lower_bound(
    divergence: Divergence,
) -> None:
    student, teacher, _ = logits()
    full = distillation_loss(student, teacher, None, DistillationObjective(divergence)).item()
    objective = DistillationObjective(divergence)
    cut = [
        distillation_loss(student, top_k_logits(teacher, k, 1.0), None, objective).item()
        for k in range(1, 12)
    ]
    assert cut[-1] == pytest.approx(full, rel=1e-3)  # stored in fp16
    assert all(fewer < more * 1.002 for fewer, more in itertools.pairwise(cut))
    assert cut[0] < 0.9 * full


def test_what_is_cut_off_is_the_mass_of_all_others_even_where_it_is_tiny() -> None:
    sure = torch.tensor([[200.0, 0.0, 0.0, 0.0]])
    top = top_k_logits(sure, 1, 1.0)
    assert top.log_rest.item() == pytest.approx(-200 + torch.tensor(3.0).log().item(), rel=1e-6)
    student = torch.zeros(1, 4, requires_grad=True)
    for divergence in DIVERGENCES:
        loss = distillation_loss(student, top, None, DistillationObjective(divergence))
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(student.grad).all()  # type: ignore[arg-type]


def test_the_symmetric_divergence_is_symmetric_and_at_most_log_2() -> None:
    student, teacher, _ = logits()
    aim = DistillationObjective("symmetric")
    there, back = (distillation_loss(*pair, None, aim) for pair in ((student, teacher), (teacher, student)))
    assert there.item() == pytest.approx(back.item(), rel=1e-12)
    assert distillation_loss(100 * student, 100 * teacher, None, aim).item() < torch.tensor(2.0).log().item()


def test_cross_entropy_is_torchs_own() -> None:
    start, _, targets = logits()
    student, plain = start.clone().requires_grad_(), start.clone().requires_grad_()
    loss, expected = cross_entropy(student, targets), nn.functional.cross_entropy(plain, targets)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(student.grad, plain.grad)


def test_the_texts_tokens_are_asked_for_where_they_have_weight() -> None:
    student, teacher, _ = logits()
    with pytest.raises(ValueError, match=r"hard_weight=0\.5 needs"):
        distillation_loss(student, teacher, None, DistillationObjective(hard_weight=0.5))


def test_a_teacher_is_stored_in_fp16_and_int32() -> None:
    top = top_k_logits(logits()[1], 4, 1.0)
    assert isinstance(top, TopKLogits)
    assert (top.log_shares.dtype, top.indices.dtype, top.log_rest.dtype) == (
        torch.float16, torch.int32, torch.float32,
    )  # fmt: skip
