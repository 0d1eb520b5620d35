"""distill: train the smaller model for some steps to match the predictions of the original."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar, cast

from jaxtyping import Float
from torch import Tensor, nn

from jobs.compression import masks
from jobs.context import Context
from jobs.knobs import Choice, Range, knob
from jobs.models.layout import Form, Layout
from jobs.models.model import Model
from jobs.technique import Kind, Need, Technique
from jobs.training import hidden_states, trainer
from jobs.training.hidden_states import States
from jobs.training.losses import DistillationObjective, Divergence, distillation_loss
from jobs.training.teacher import CachedTeacher, matching
from jobs.training.trainer import Ids, LossOf, Rows, TrainingPlan


@dataclass(frozen=True)
class Distill(Technique):
    """Matches the softened predictions of the teacher, the original, and partly the text itself (Hinton et al. 2015).

    The loss per token is (1 − hard_weight) · T² · D(teacher_T, student_T) + hard_weight · CE(text), with D one of
    the divergences of `jobs.training.losses`. A classifier matches the logits of its classes for each row,
    without the second term. An encoder without a head matches the last hidden states of the teacher, each
    normalised over its width, by mean squared error; temperature, divergence and hard_weight then have no
    effect. top_k has no effect on classifiers and encoders.

    hidden_weight adds the distance between the hidden states after the blocks, and attention_weight that between
    the attentions of the last block (`jobs.training.hidden_states`); both need the teacher in memory.

    Blocks and norms are trained in bf16 with fp32 master weights, without dropout, since a short recovery does
    not overfit. Embeddings and head are those of the original: no technique has changed them, and training
    SmolLM2's too took 40 % longer and 0.5 GiB more, with a worse perplexity after 16 steps (126 instead of
    119). The teacher runs in bf16 during the training; with top_k it runs before, once for all students of a
    study.
    """

    kind: ClassVar[Kind] = "recovery"
    paper: ClassVar[str] = "Hinton et al. 2015, arXiv:1503.02531"
    version: ClassVar[int] = 3
    needs: ClassVar[frozenset[Need]] = frozenset({"teacher", "training"})
    accepts: ClassVar[frozenset[Form]] = frozenset({"dense", "factored", "sparse"})

    temperature: float = knob(1.0, Range(1.0, 8.0), "softens both predictions before their comparison")
    hard_weight: float = knob(0.1, Range(0.0, 1.0), "weight of the text's own next token in the loss")
    learning_rate: float = knob(3e-4, Range(1e-6, 1e-2, log=True), "the highest rate, after the warm-up")
    steps: int = knob(200, Range(0, 100_000, integer=True), "updates of the weights; 0 trains nothing")
    batch: int = knob(1, Range(1, 1024, integer=True), "sequences per step")
    divergence: str = knob(
        "forward", Choice(("forward", "reverse", "symmetric")), "divergence between two predictions"
    )
    hidden_weight: float = knob(0.0, Range(0.0, 100.0), "weight of the blocks' hidden states in the loss")
    attention_weight: float = knob(0.0, Range(0.0, 100.0), "weight of the last block's attention in the loss")
    top_k: int = knob(
        0, Range(0, 65_536, integer=True), "number of tokens to store of each teacher prediction; 0 for all"
    )
    patience: int = knob(
        0,
        Range(0, 100, integer=True),
        "stop after this many evaluations on held-out text without improvement; 0 never stops early",
    )

    @property
    def is_noop(self) -> bool:
        return self.steps == 0

    @property
    def plan(self) -> TrainingPlan:
        return TrainingPlan(self.learning_rate, self.steps, self.batch, self.patience)

    @property
    def objective(self) -> DistillationObjective:
        return DistillationObjective(cast(Divergence, self.divergence), self.temperature, self.hard_weight)

    def output_layout(self, layout: Layout) -> Layout:
        """Return the same layout; ValueError if top_k is combined with losses of the teacher's states."""
        self.check_forms(layout)
        for name in ("hidden_weight", "attention_weight"):
            if self.top_k and getattr(self, name):
                raise ValueError(
                    f"distill.top_k={self.top_k} stores what the teacher predicts, not its states: "
                    f"{name}={getattr(self, name):g} must be 0"
                )
        return layout

    def compress(self, model: Model, context: Context) -> Model:
        self.output_layout(model.layout())
        if context.teacher is None or context.training is None:
            raise ValueError("distill needs the teacher and training text; set data.training in the study")
        with masks.trainable(model) as sparse_masks:
            trainer.require_gradients(model)
            stage = masks.highest_stage(sparse=bool(sparse_masks))
            plan = dataclasses.replace(self.plan, highest_stage=stage)
            if self.top_k and model.task == "causal-lm":
                self._learn_from_cache(model, context.training, plan, context)
            else:
                self._learn_from_teacher(model, context.training, plan, context)
        return model

    def _learn_from_cache(self, model: Model, rows: Rows, plan: TrainingPlan, context: Context) -> None:
        """Train `model` in place on the stored top predictions of the teacher."""
        used = plan.used(rows, context.seed)
        cached = CachedTeacher(context, self.top_k, self.temperature, used)
        trainer.check_vocabularies(self.name(), model, cached.vocabulary)
        device = model.device

        def loss_of(student: nn.Module, ids: Ids) -> Float[Tensor, ""]:
            batch = rows[ids].to(device)
            student_logits = trainer.predictions(student, batch)
            targets = trainer.targets(batch)
            return distillation_loss(student_logits, cached.top(ids, device), targets, self.objective)

        trainer.train(model, rows, loss_of, plan, context)

    def _learn_from_teacher(self, model: Model, rows: Rows, plan: TrainingPlan, context: Context) -> None:
        """Train `model` in place while the teacher runs on the same text."""
        assert context.teacher is not None
        teacher = context.teacher()
        trainer.check_vocabularies(self.name(), model, trainer.vocabulary(teacher))
        hidden, attention = self.hidden_weight > 0, self.attention_weight > 0
        with ExitStack() as stack:
            student_states = stack.enter_context(
                hidden_states.read(model, hidden=hidden, attention=attention)
            )
            teacher_states = stack.enter_context(
                hidden_states.read(teacher, hidden=hidden, attention=attention)
            )
            loss_of = self._loss(rows, teacher, student_states, teacher_states)
            trainer.train(model, rows, loss_of, plan, context)

    def _loss(self, rows: Rows, teacher: Model, student_states: States, teacher_states: States) -> LossOf:
        """Return the loss of a student that is trained next to the teacher."""
        prediction_loss = matching(teacher, rows, self.objective)

        def loss_of(student: nn.Module, ids: Ids) -> Float[Tensor, ""]:
            loss = prediction_loss(student, ids)
            if self.hidden_weight:
                distance = hidden_states.hidden_distance(student_states, teacher_states)
                loss = loss + self.hidden_weight * distance
            if self.attention_weight:
                distance = hidden_states.attention_distance(student_states, teacher_states)
                loss = loss + self.attention_weight * distance
            student_states.forget()
            teacher_states.forget()
            return loss

        return loss_of
