"""Aware training: what the techniques have in common that compress a model while it learns from the original."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from jobs.context import Context
from jobs.knobs import Range, knob
from jobs.models.model import Model
from jobs.training import trainer
from jobs.training.engine import AfterStep, no_op
from jobs.training.losses import DistillationObjective
from jobs.training.teacher import matching
from jobs.training.trainer import TrainingPlan

HIGHEST_STAGE = 2
"""Of ZeRO: the next one takes the weights apart, which what compresses reads whole."""
CHOICES = 20
"""How often, about, what is compressed is chosen anew while compression grows: a choice reads all weights."""


class AwareTrainingOptions(Protocol):
    """A technique that compresses while it trains."""

    @property
    def learning_rate(self) -> float: ...
    @property
    def steps(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def temperature(self) -> float: ...
    @property
    def hard_weight(self) -> float: ...
    def name(self) -> str: ...


def learning_rate_knob(default: float) -> Any:
    return knob(default, Range(1e-6, 1e-2, log=True), "the highest rate, after the warm-up")


def steps_knob() -> Any:
    return knob(200, Range(1, 100_000, integer=True), "updates of the weights")


def batch_knob() -> Any:
    return knob(1, Range(1, 1024, integer=True), "sequences per step")


def temperature_knob() -> Any:
    return knob(1.0, Range(1.0, 8.0), "softens both predictions before they are compared")


def hard_weight_knob() -> Any:
    return knob(0.0, Range(0.0, 1.0), "weight of the text's own next token in the loss")


def ramp_knob() -> Any:
    return knob(0.5, Range(0.0, 1.0), "share of the steps over which compression grows; then it is fixed")


@dataclass(frozen=True)
class Ramp:
    """How compression grows from nothing to its whole over the first `steps` steps, and stays there."""

    steps: int

    @staticmethod
    def of(share: float, steps: int) -> Ramp:
        """The ramp over this share of a training. The last step always sees the whole compression."""
        return Ramp(min(round(share * steps), steps - 1))

    def reached(self, done: int) -> float:
        """The share of the compression after `done` steps: 1 − (1 − t/nΔt)³ (Zhu and Gupta 2017,
        arXiv:1710.01878, eq. 1, from no sparsity at t₀ = 0): fast while much is redundant, then slower."""
        return 1.0 if done >= self.steps else 1 - (1 - done / self.steps) ** 3

    def due(self, done: int) -> bool:
        """Whether it is time to choose anew what is compressed."""
        every = max(1, self.steps // CHOICES)
        return done == self.steps or (done < self.steps and done % every == 0)


def check_given(step: AwareTrainingOptions, context: Context) -> None:
    """Refuse, with a ValueError, to start without a teacher or text."""
    if context.teacher is None or context.training is None:
        raise ValueError(f"{step.name()} needs the teacher and training text; give the study data.training")


def learn(model: Model, step: AwareTrainingOptions, context: Context, after_step: AfterStep = no_op) -> None:
    """Train, in place, blocks and norms to say what the original says, which runs in bf16 beside.

    The loss is that of distill: (1 − hard_weight) · T² · KL(teacher_T ‖ student_T) + hard_weight · CE(text); a
    classifier matches the logits of its classes without the second term, an encoder without a head the last
    hidden states. What compresses belongs into the forward pass, and reads what `after_step` (called with
    the number of steps done, see `jobs.training.engine.train`) sets.
    """
    check_given(step, context)
    assert context.teacher is not None
    assert context.training is not None
    rows, teacher = context.training, context.teacher()
    trainer.check_vocabularies(step.name(), model, trainer.vocabulary(teacher))
    aim = DistillationObjective("forward", step.temperature, step.hard_weight)
    trainer.require_gradients(model)
    plan = TrainingPlan(step.learning_rate, step.steps, step.batch, highest_stage=HIGHEST_STAGE)
    loss_of = matching(teacher, rows, aim)
    trainer.train(model, rows, loss_of, plan, context, after_step)
