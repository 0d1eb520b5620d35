"""Distillation: train the smaller model for some steps to say what the original says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jobs import engine
from jobs.context import Context
from jobs.knobs import Choice, Range, knob
from jobs.layout import Layout
from jobs.models import Model
from jobs.technique import Form, Kind, Need, Technique

_TOKENS_AT_ONCE = 512
"""Tokens of one forward pass; a larger batch is gathered over several, which costs no memory."""
_ROWS = 128
"""Positions whose logits are held in fp32 at once: a vocabulary wide, they would fill memory."""


@dataclass(frozen=True)
class Distill(Technique):
    """Hinton et al. 2015: match the teacher's softened predictions, and partly the text itself.

    The loss per token is (1 − hard_weight) · T² · KL(teacher_T ‖ student_T) + hard_weight · CE(text). An
    encoder predicts no tokens: it matches the teacher's last hidden states instead, each normalised over
    its width, by mean squared error; temperature and hard_weight are then without effect.

    The blocks and the norms are trained, in bf16 with fp32 master weights, without dropout (a short recovery
    has nothing to overfit). Embeddings and head stay the original's: no technique has touched them, and
    training SmolLM2's too took 40 % longer and 0.5 GiB more, for a worse perplexity after 16 steps (126, not
    119). The teacher is the original, run in bf16 beside the student.
    """

    kind: ClassVar[Kind] = "recovery"
    paper: ClassVar[str] = "Hinton et al. 2015, arXiv:1503.02531"
    needs: ClassVar[frozenset[Need]] = frozenset({"teacher", "training"})
    accepts: ClassVar[frozenset[Form]] = frozenset({"dense", "factored"})

    temperature: float = knob(1.0, Range(1.0, 8.0), "softens both predictions before they are compared")
    hard_weight: float = knob(0.1, Range(0.0, 1.0), "weight of the text's own next token in the loss")
    learning_rate: float = knob(3e-4, Range(1e-6, 1e-2, log=True), "the highest rate, after the warm-up")
    steps: int = knob(
        200, Range(0, 100_000, integer=True), "updates of the weights; 0 leaves them as they are"
    )
    batch: int = knob(1, Range(1, 1024, integer=True), "sequences per step")
    zero_stage: int = knob(0, Choice((0, 1, 2, 3)), "what DeepSpeed ZeRO shares between ranks")

    @property
    def identity(self) -> bool:
        return self.steps == 0

    def outline(self, layout: Layout) -> Layout:
        if "packed" in layout.forms():
            raise ValueError("distill cannot train packed integers; put it before quantization")
        return layout

    def compress(self, model: Model, context: Context) -> Model:
        if context.teacher is None or context.training is None:
            raise ValueError("distill needs the teacher and training text; give the study data.training")
        teacher = context.teacher().module
        predicts = model.task == "causal-lm"
        loss_of = self._prediction_loss(teacher) if predicts else _state_loss(teacher)
        rows = context.training.to(context.device)
        at_once = _largest_divisor(self.batch, _TOKENS_AT_ONCE // rows.shape[1])
        training = engine.Training(
            self.learning_rate, self.steps, self.batch // at_once, zero_stage=self.zero_stage
        )
        _require_gradients(model)
        batches = _shuffled(rows, at_once, context.seed)
        engine.train(model.module, batches, loss_of, training, context.report)
        return model

    def _prediction_loss(self, teacher: nn.Module) -> Callable[[nn.Module, Tensor], Tensor]:
        def loss_of(student: nn.Module, rows: Int[Tensor, "batch tokens"]) -> Float[Tensor, ""]:
            with torch.no_grad():
                taught = teacher(rows, use_cache=False).logits[:, :-1].flatten(0, 1)
            said = student(rows, use_cache=False).logits[:, :-1].flatten(0, 1)
            return distillation_loss(said, taught, rows[:, 1:].flatten(), self.temperature, self.hard_weight)

        return loss_of


def distillation_loss(
    student: Float[Tensor, "tokens vocabulary"],
    teacher: Float[Tensor, "tokens vocabulary"],
    targets: Int[Tensor, " tokens"],
    temperature: float,
    hard_weight: float,
) -> Float[Tensor, ""]:
    """The mean over tokens of (1 − h) · T² · KL(teacher_T ‖ student_T) + h · CE; `student` gets the gradient."""
    return cast(
        Tensor,
        _Distillation.apply(student, teacher, targets, temperature, hard_weight),  # type: ignore[no-untyped-call]
    )


class _Distillation(torch.autograd.Function):
    """The loss with its gradient worked out by hand, a few positions at a time.

    Autograd would keep several fp32 copies of all logits: for 512 tokens of a vocabulary of 49,152 those
    are 100 MB each. Here one gradient in the logits' own dtype is all that is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, targets: Tensor, temperature: float, hard_weight: float
    ) -> Tensor:
        tokens = len(student)
        gradient = torch.empty_like(student)
        total = student.new_zeros((), dtype=torch.float64)
        for at in range(0, tokens, _ROWS):
            rows = slice(at, at + _ROWS)
            said, taught = student[rows].float(), teacher[rows].float()
            soft = torch.log_softmax(said / temperature, dim=-1)
            goal = torch.log_softmax(taught / temperature, dim=-1)
            share = goal.exp()
            apart = (share * (goal - soft)).sum()
            hard = torch.log_softmax(said, dim=-1)
            picked = targets[rows].unsqueeze(1)
            total += (1 - hard_weight) * temperature**2 * apart - hard_weight * hard.gather(1, picked).sum()
            # d(T² KL)/dz = T (student_T − teacher_T);  dCE/dz = student − onehot(target)
            slope = (1 - hard_weight) * temperature * (soft.exp() - share) + hard_weight * hard.exp()
            slope.scatter_add_(1, picked, torch.full_like(picked, -hard_weight, dtype=slope.dtype))
            gradient[rows] = slope / tokens
        ctx.save_for_backward(gradient)
        return (total / tokens).float()

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * above[0].to(gradient.dtype), None, None, None, None


def _require_gradients(model: Model) -> None:
    """Of the blocks and of every vector outside them; of the matrices there, embeddings and head, not."""
    for parameter in model.module.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    model.blocks.requires_grad_(True)


def _state_loss(teacher: nn.Module) -> Callable[[nn.Module, Tensor], Tensor]:
    def loss_of(student: nn.Module, rows: Int[Tensor, "batch tokens"]) -> Float[Tensor, ""]:
        with torch.no_grad():
            taught = _normalised(teacher(rows).last_hidden_state)
        return nn.functional.mse_loss(_normalised(student(rows).last_hidden_state), taught)

    return loss_of


def _normalised(states: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
    return nn.functional.layer_norm(states.float(), states.shape[-1:])


def _largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` up to `limit`, at least 1."""
    return max(
        divisor for divisor in range(1, number + 1) if number % divisor == 0 and divisor <= max(1, limit)
    )


def _shuffled(
    rows: Int[Tensor, "samples tokens"], batch: int, seed: int
) -> Iterator[Int[Tensor, "batch tokens"]]:
    """Batches without end: all rows in a new order each round."""
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.int64)
    while True:
        while len(waiting) < batch:
            waiting = torch.cat([waiting, torch.randperm(len(rows), generator=generator)])
        yield rows[waiting[:batch].to(rows.device)]
        waiting = waiting[batch:]
