"""Compression-aware training: a model is compressed step by step while it learns from the original."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from jobs.context import Context
from jobs.knobs import Range, knob
from jobs.models.model import Model
from jobs.training import trainer
from jobs.training.losses import DistillationObjective
from jobs.training.settings import AfterStep, no_op
from jobs.training.teacher import matching
from jobs.training.trainer import TrainingPlan

HIGHEST_STAGE = 2
"""The highest ZeRO stage. Stage 3 divides the weights, and the compression reads whole weights."""
SELECTIONS = 20
"""The number of times that the compressed weights are selected during a ramp. A selection reads all weights."""


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
    return knob(1.0, Range(1.0, 8.0), "divides the logits of teacher and student before they are compared")


def hard_weight_knob() -> Any:
    return knob(0.0, Range(0.0, 1.0), "weight of the cross-entropy of the text in the loss")


def ramp_knob() -> Any:
    return knob(0.5, Range(0.0, 1.0), "share of the steps over which compression grows; then it is fixed")


@dataclass(frozen=True)
class Ramp:
    """The growth of compression from nothing to its full amount, which it keeps afterwards."""

    steps: int
    """The number of steps of the growth."""

    @staticmethod
    def of(share: float, steps: int) -> Ramp:
        """Return the ramp over this share of a training. The last step always has the full compression."""
        return Ramp(min(round(share * steps), steps - 1))

    def share(self, completed: int) -> float:
        """Return the share of the compression after this many steps.

        1 − (1 − t/nΔt)³ (Zhu and Gupta 2017, arXiv:1710.01878, eq. 1, from no sparsity at t₀ = 0): fast while many
        weights are redundant, then slower.
        """
        if completed >= self.steps:
            return 1.0
        return 1 - (1 - completed / self.steps) ** 3

    def is_due(self, completed: int) -> bool:
        """Whether the compressed weights are selected again after this many steps."""
        interval = max(1, self.steps // SELECTIONS)
        return completed == self.steps or (completed < self.steps and completed % interval == 0)


def check_inputs(step: AwareTrainingOptions, context: Context) -> None:
    """Raise ValueError if there is no teacher or no training text."""
    if context.teacher is None or context.training is None:
        raise ValueError(f"{step.name()} needs the teacher and training text; give the study data.training")


def learn(model: Model, step: AwareTrainingOptions, context: Context, after_step: AfterStep = no_op) -> None:
    """Train blocks and norms, in place, to predict as the original, which runs in bf16 next to the model.

    The loss is the one of distill: (1 − hard_weight) · T² · KL(teacher_T ‖ student_T) + hard_weight · CE(text). A
    classifier matches the logits of its classes without the second term, an encoder without a head the last hidden
    states. The compression belongs into the forward pass and reads the attributes that `after_step` sets (see
    `jobs.training.loop.train`).
    """
    check_inputs(step, context)
    assert context.teacher is not None
    assert context.training is not None
    rows, teacher = context.training, context.teacher()
    trainer.check_vocabularies(step.name(), model, trainer.vocabulary(teacher))
    objective = DistillationObjective("forward", step.temperature, step.hard_weight)
    trainer.require_gradients(model)
    plan = TrainingPlan(step.learning_rate, step.steps, step.batch, highest_stage=HIGHEST_STAGE)
    loss_of = matching(teacher, rows, objective)
    trainer.train(model, rows, loss_of, plan, context, after_step)
