"""Losses of a student against a teacher or a text, with hand-written gradients.

Autograd would keep several fp32 copies of all logits, of 100 MB each for 512 tokens and a vocabulary of 49,152. These
losses are computed for a few positions at a time and keep a single gradient in the dtype of the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

Divergence = Literal["forward", "reverse", "symmetric"]
"""forward: KL(teacher ‖ student), which covers everything that the teacher finds likely (Hinton et al. 2015,
arXiv:1503.02531). reverse: KL(student ‖ teacher), which avoids tokens that the teacher finds unlikely (Gu et al. 2023,
MiniLLM, arXiv:2306.08543, eq. 1). symmetric: the Jensen-Shannon divergence, the generalized one of Agarwal et al. 2023,
GKD, arXiv:2306.13649, eq. 1, with β = ½; it is at most log 2, so that no single token dominates."""

_ROWS = 128
"""Positions whose logits are converted to fp32 at the same time. All positions of a long batch would fill memory."""


@dataclass(frozen=True)
class TopKLogits:
    """A teacher's predictions at some temperature, reduced to the k most probable tokens."""

    log_shares: Float[Tensor, "tokens k"]
    """Log-probabilities of the k tokens."""
    indices: Int[Tensor, "tokens k"]
    log_rest: Float[Tensor, " tokens"]
    """Logarithm of the total probability of all other tokens; -inf if k is the whole vocabulary."""


@dataclass(frozen=True)
class DistillationObjective:
    """The objective of a distillation."""

    divergence: Divergence = "forward"
    temperature: float = 1.0
    hard_weight: float = 0.0
    """The weight of the cross-entropy of the text."""


def top_k_logits(logits: Float[Tensor, "tokens vocabulary"], k: int, temperature: float) -> TopKLogits:
    """Return the `k` most probable tokens of a teacher's predictions, in fp16 and int32 as they are stored."""
    shares, indices, rest = [], [], []
    for start in range(0, len(logits), _ROWS):
        log_probabilities = torch.log_softmax(logits[start : start + _ROWS].float() / temperature, dim=-1)
        top_values, top_indices = log_probabilities.topk(k, dim=-1)
        shares.append(top_values.half())
        indices.append(top_indices.int())
        rest.append(log_probabilities.scatter(1, top_indices, -torch.inf).logsumexp(dim=-1))
    return TopKLogits(torch.cat(shares), torch.cat(indices), torch.cat(rest))


def distillation_loss(
    student: Float[Tensor, "tokens vocabulary"],
    teacher: Float[Tensor, "tokens vocabulary"] | TopKLogits,
    targets: Int[Tensor, " tokens"] | None,
    objective: DistillationObjective,
) -> Float[Tensor, ""]:
    """Return the mean over tokens of (1 − h) · T² · D(teacher_T, student_T) + h · CE; `student` receives the gradient.

    D is the divergence of the objective. With a teacher of k tokens, all other tokens are one outcome, for the student
    too: D is then at most the divergence of the whole vocabularies (by the log-sum inequality).
    targets: the tokens of the text; None needs hard_weight 0.
    """
    soft_weight = (1 - objective.hard_weight) * objective.temperature

    def part(student_logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        total = torch.zeros((), device=student_logits.device)
        gradient = torch.zeros_like(student_logits)
        if soft_weight:
            divergences, slope = _soft_part(student_logits, teacher, rows, objective)
            # d(T² D)/dz = T · dD/d(z/T)
            total = soft_weight * objective.temperature * divergences.sum()
            gradient = soft_weight * slope
        if objective.hard_weight and targets is not None:
            hard, slope = _cross_entropy(student_logits, targets[rows])
            total = total + objective.hard_weight * hard
            gradient = gradient + objective.hard_weight * slope
        return total, gradient

    if objective.hard_weight and targets is None:
        raise ValueError(f"hard_weight={objective.hard_weight:g} needs the tokens of the text")
    return cast(Tensor, _ByRows.apply(student, part))  # type: ignore[no-untyped-call]


def cross_entropy(
    student: Float[Tensor, "tokens vocabulary"], targets: Int[Tensor, " tokens"]
) -> Float[Tensor, ""]:
    """Return the mean over tokens of −log p(target); `student` receives the gradient."""

    def part(student_logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        return _cross_entropy(student_logits, targets[rows])

    return cast(Tensor, _ByRows.apply(student, part))  # type: ignore[no-untyped-call]


_Part = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""Returns the sum of the losses of some rows of logits, in fp32 or fp64, and its gradient."""


class _ByRows(torch.autograd.Function):
    """The mean loss of rows, computed a few rows at a time together with its gradient."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, part: _Part) -> Tensor:
        wide = torch.promote_types(student.dtype, torch.float32)
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = torch.empty_like(student)
        total = student.new_zeros((), dtype=torch.float64)
        for start in range(0, len(student), _ROWS):
            rows = slice(start, start + _ROWS)
            loss, slope = part(student[rows].to(wide), rows)
            total += loss
            if gradient is not None:
                gradient[rows] = slope / len(student)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return (total / len(student)).to(wide)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype), None


def _soft_part(
    student_logits: Tensor,
    teacher: Float[Tensor, "tokens vocabulary"] | TopKLogits,
    rows: slice,
    objective: DistillationObjective,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, "tokens vocabulary"]]:
    """Return the divergence D of each token, and dD/d(z/T)."""
    scaled = student_logits / objective.temperature
    if isinstance(teacher, TopKLogits):
        return _divergence_from_top_k(scaled, teacher, rows, objective.divergence)
    teacher_logits = teacher[rows].to(student_logits.dtype)
    teacher_logs = torch.log_softmax(teacher_logits / objective.temperature, dim=-1)
    divergences, slope = _divergence(torch.log_softmax(scaled, dim=-1), teacher_logs, objective.divergence)
    slope -= torch.softmax(scaled, dim=-1) * slope.sum(dim=1, keepdim=True)
    return divergences, slope


def _divergence(
    student_logs: Float[Tensor, "tokens outcomes"],
    teacher_logs: Float[Tensor, "tokens outcomes"],
    divergence: Divergence,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, "tokens outcomes"]]:
    """Return the divergence D of each token and g = ∂D/∂(log q).

    The arguments are log-probabilities: q = exp(student_logs) and p = exp(teacher_logs). g treats the log-probabilities
    as independent; the gradient with respect to the logits of q is g − q Σg.
    """
    if divergence == "forward":  # D = Σ p (log p − log q)
        p = teacher_logs.exp()
        return (p * (teacher_logs - student_logs)).sum(dim=1), -p
    q = student_logs.exp()
    if divergence == "reverse":  # D = Σ q (log q − log p)
        log_ratio = student_logs - teacher_logs
        return (q * log_ratio).sum(dim=1), q * (log_ratio + 1)
    # D = ½ Σ p (log p − log m) + ½ Σ q (log q − log m), m = (p + q) / 2; ∂D/∂q = ½ log(q / m)
    mixture = torch.logaddexp(teacher_logs, student_logs) - torch.log(
        torch.tensor(2.0, dtype=student_logs.dtype)
    )
    slope = 0.5 * q * (student_logs - mixture)
    return slope.sum(dim=1) + (0.5 * teacher_logs.exp() * (teacher_logs - mixture)).sum(dim=1), slope


def _divergence_from_top_k(
    logits: Float[Tensor, "tokens vocabulary"], teacher: TopKLogits, rows: slice, divergence: Divergence
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, "tokens vocabulary"]]:
    """Return the divergence from a teacher of k tokens, and its gradient with respect to the logits.

    The remaining probability r of the student has log q_r = log Σ q_j over all tokens j outside the top k, so that
    ∂log q_r/∂z_j is q_j / q_r − q_j for these tokens, and −q_j for the top k.
    """
    all_logs = torch.log_softmax(logits, dim=-1)
    indices = teacher.indices[rows].long()
    teacher_logs = teacher.log_shares[rows].to(all_logs.dtype)
    student_logs = all_logs.gather(1, indices)
    rest_log = None
    if teacher_logs.shape[1] != all_logs.shape[1]:
        teacher_logs = torch.cat([teacher_logs, teacher.log_rest[rows, None].to(all_logs.dtype)], dim=1)
        rest_log = all_logs.scatter(1, indices, -torch.inf).logsumexp(dim=-1, keepdim=True)
        student_logs = torch.cat([student_logs, rest_log], dim=1)
    # Stored in fp16, the probabilities sum to 1 only approximately.
    divergences, slope = _divergence(student_logs, torch.log_softmax(teacher_logs, dim=-1), divergence)
    gradient = -all_logs.exp() * slope.sum(dim=1, keepdim=True)
    top_gradient = gradient.gather(1, indices) + slope[:, : indices.shape[1]]
    if rest_log is not None:
        gradient = gradient + (all_logs - rest_log).clamp(max=0).exp() * slope[:, -1:]
    return divergences, gradient.scatter(1, indices, top_gradient)


def _cross_entropy(
    logits: Float[Tensor, "tokens vocabulary"], targets: Int[Tensor, " tokens"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "tokens vocabulary"]]:
    """Return the sum over tokens of −log p(target), and its gradient p − onehot(target)."""
    logs = torch.log_softmax(logits, dim=-1)
    target_indices = targets.unsqueeze(1)
    gradient = logs.exp().scatter_add(
        1, target_indices, torch.full_like(target_indices, -1, dtype=logs.dtype)
    )
    return -logs.gather(1, target_indices).sum(), gradient
