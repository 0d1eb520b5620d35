"""Losses: how far a student's predictions are from a teacher's or from a text, with gradients worked out by hand.

Autograd would keep several fp32 copies of all logits: for 512 tokens of a vocabulary of 49,152 those are
100 MB each. Here the loss is worked out a few positions at a time, and one gradient in the logits' own dtype
is all that is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

Divergence = Literal["forward", "reverse", "symmetric"]
"""forward: KL(teacher ‖ student), which covers all that the teacher finds likely (Hinton et al. 2015,
arXiv:1503.02531). reverse: KL(student ‖ teacher), which avoids what it finds unlikely (Gu et al. 2023, MiniLLM,
arXiv:2306.08543, eq. 1). symmetric: the Jensen-Shannon divergence, the generalized one of Agarwal et al. 2023,
GKD, arXiv:2306.13649, eq. 1, with β = ½; it is at most log 2, so that no single token dominates."""

_ROWS = 128
"""Positions whose logits are held in fp32 at once: a vocabulary wide, they would fill memory."""


@dataclass(frozen=True)
class TopKLogits:
    """What a teacher predicts at some temperature, cut to its k most probable tokens.

    log_shares: their log-probabilities. log_rest: the logarithm of what all others have together; -inf where
    k is the whole vocabulary.
    """

    log_shares: Float[Tensor, "tokens k"]
    indices: Int[Tensor, "tokens k"]
    log_rest: Float[Tensor, " tokens"]


@dataclass(frozen=True)
class DistillationObjective:
    """What a student is to match, besides the text. hard_weight: the share of the text's own tokens."""

    divergence: Divergence = "forward"
    temperature: float = 1.0
    hard_weight: float = 0.0


def top_k_logits(logits: Float[Tensor, "tokens vocabulary"], k: int, temperature: float) -> TopKLogits:
    """A teacher's predictions cut to the `k` most probable, fp16 and int32 as they are stored."""
    shares, indices, rest = [], [], []
    for start in range(0, len(logits), _ROWS):
        said = torch.log_softmax(logits[start : start + _ROWS].float() / temperature, dim=-1)
        most, places = said.topk(k, dim=-1)
        shares.append(most.half())
        indices.append(places.int())
        rest.append(said.scatter(1, places, -torch.inf).logsumexp(dim=-1))
    return TopKLogits(torch.cat(shares), torch.cat(indices), torch.cat(rest))


def distillation_loss(
    student: Float[Tensor, "tokens vocabulary"],
    teacher: Float[Tensor, "tokens vocabulary"] | TopKLogits,
    targets: Int[Tensor, " tokens"] | None,
    aim: DistillationObjective,
) -> Float[Tensor, ""]:
    """The mean over tokens of (1 − h) · T² · D(teacher_T, student_T) + h · CE; `student` gets the gradient.

    D is the divergence of the aim. Of a teacher cut to k tokens, all other tokens are one outcome, for the
    student too: D is then at most that of the whole vocabularies (by the log-sum inequality).
    targets: the text's own tokens; None needs hard_weight 0.
    """
    soft = (1 - aim.hard_weight) * aim.temperature

    def part(said: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        total, slope = torch.zeros((), device=said.device), torch.zeros_like(said)
        if soft:
            if isinstance(teacher, TopKLogits):
                apart, steep = _apart_from_top(said / aim.temperature, teacher, rows, aim.divergence)
            else:
                goal = torch.log_softmax(teacher[rows].to(said.dtype) / aim.temperature, dim=-1)
                apart, steep = _apart(torch.log_softmax(said / aim.temperature, dim=-1), goal, aim.divergence)
                steep -= torch.softmax(said / aim.temperature, dim=-1) * steep.sum(dim=1, keepdim=True)
            # d(T² D)/dz = T · dD/d(z/T)
            total, slope = soft * aim.temperature * apart.sum(), soft * steep
        if aim.hard_weight and targets is not None:
            hard, steep = _cross_entropy(said, targets[rows])
            total, slope = total + aim.hard_weight * hard, slope + aim.hard_weight * steep
        return total, slope

    if aim.hard_weight and targets is None:
        raise ValueError(f"hard_weight={aim.hard_weight:g} needs the text's own tokens")
    return cast(Tensor, _ByRows.apply(student, part))  # type: ignore[no-untyped-call]


def cross_entropy(
    student: Float[Tensor, "tokens vocabulary"], targets: Int[Tensor, " tokens"]
) -> Float[Tensor, ""]:
    """The mean over tokens of −log p(target); `student` gets the gradient."""

    def part(said: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        return _cross_entropy(said, targets[rows])

    return cast(Tensor, _ByRows.apply(student, part))  # type: ignore[no-untyped-call]


_Part = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""Of some rows of logits, in fp32 or fp64: the sum of their losses, and its gradient."""


class _ByRows(torch.autograd.Function):
    """The mean of a loss of rows, worked out some rows at a time together with its gradient."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, part: _Part) -> Tensor:
        wide = torch.promote_types(student.dtype, torch.float32)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
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
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * above[0].to(gradient.dtype), None


def _apart(
    said: Float[Tensor, "tokens outcomes"], goal: Float[Tensor, "tokens outcomes"], divergence: Divergence
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, "tokens outcomes"]]:
    """The divergence of each token from two logarithms of probabilities, q = exp(said) and p = exp(goal),
    and g = ∂D/∂said, each log-probability taken as free. By the logits z of q it is then g − q Σg."""
    if divergence == "forward":  # D = Σ p (log p − log q)
        p = goal.exp()
        return (p * (goal - said)).sum(dim=1), -p
    q = said.exp()
    if divergence == "reverse":  # D = Σ q (log q − log p)
        apart = said - goal
        return (q * apart).sum(dim=1), q * (apart + 1)
    # D = ½ Σ p (log p − log m) + ½ Σ q (log q − log m), m = (p + q) / 2; ∂D/∂q = ½ log(q / m)
    middle = torch.logaddexp(goal, said) - torch.log(torch.tensor(2.0, dtype=said.dtype))
    steep = 0.5 * q * (said - middle)
    return steep.sum(dim=1) + (0.5 * goal.exp() * (goal - middle)).sum(dim=1), steep


def _apart_from_top(
    logits: Float[Tensor, "tokens vocabulary"], teacher: TopKLogits, rows: slice, divergence: Divergence
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, "tokens vocabulary"]]:
    """The divergence from a teacher cut to k tokens, and its gradient by the logits.

    The rest r of the student has log q_r = log Σ q_j over all tokens j outside the top, so that
    ∂log q_r/∂z_j is q_j / q_r − q_j for them, and −q_j for those at the top.
    """
    said = torch.log_softmax(logits, dim=-1)
    places = teacher.indices[rows].long()
    goal = teacher.log_shares[rows].to(said.dtype)
    kept = said.gather(1, places)
    whole = goal.shape[1] == said.shape[1]
    if whole:
        rest = None
    else:
        goal = torch.cat([goal, teacher.log_rest[rows, None].to(said.dtype)], dim=1)
        rest = said.scatter(1, places, -torch.inf).logsumexp(dim=-1, keepdim=True)
        kept = torch.cat([kept, rest], dim=1)
    # Stored in fp16, they add up to 1 only nearly.
    apart, steep = _apart(kept, torch.log_softmax(goal, dim=-1), divergence)
    slope = -said.exp() * steep.sum(dim=1, keepdim=True)
    spread = 0.0 if rest is None else (said - rest).clamp(max=0).exp() * steep[:, -1:]
    at_top = slope.gather(1, places) + steep[:, : places.shape[1]]
    return apart, (slope + spread).scatter(1, places, at_top)


def _cross_entropy(
    said: Float[Tensor, "tokens vocabulary"], targets: Int[Tensor, " tokens"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "tokens vocabulary"]]:
    """The sum over tokens of −log p(target), and its gradient p − onehot(target)."""
    logs = torch.log_softmax(said, dim=-1)
    picked = targets.unsqueeze(1)
    slope = logs.exp().scatter_add(1, picked, torch.full_like(picked, -1, dtype=logs.dtype))
    return -logs.gather(1, picked).sum(), slope
