"""distill: train the smaller model for some steps to say what the original says."""

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
    """Hinton et al. 2015: match the teacher's softened predictions, and partly the text itself.

    The loss per token is (1 − hard_weight) · T² · D(teacher_T, student_T) + hard_weight · CE(text), D one of
    the divergences of `jobs.training.losses`. A classifier matches the logits of its classes, of each row, without
    the second term. An encoder without a head matches the teacher's last hidden states instead, each
    normalised over its width, by mean squared error; temperature, divergence and hard_weight are then
    without effect, and top_k is for both.

    hidden_weight adds the distance of the hidden states that the blocks leave, and attention_weight that of
    the last block's attention (`jobs.training.hidden_states`); both need the teacher beside the student.

    The blocks and the norms are trained, in bf16 with fp32 master weights, without dropout (a short recovery
    has nothing to overfit). Embeddings and head stay the original's: no technique has touched them, and
    training SmolLM2's too took 40 % longer and 0.5 GiB more, for a worse perplexity after 16 steps (126, not
    119). The teacher is the original, run in bf16 beside the student; or, with top_k, before it, once for
    all students of a study.
    """

    kind: ClassVar[Kind] = "recovery"
    paper: ClassVar[str] = "Hinton et al. 2015, arXiv:1503.02531"
    version: ClassVar[int] = 3
    needs: ClassVar[frozenset[Need]] = frozenset({"teacher", "training"})
    accepts: ClassVar[frozenset[Form]] = frozenset({"dense", "factored", "sparse"})

    temperature: float = knob(1.0, Range(1.0, 8.0), "softens both predictions before they are compared")
    hard_weight: float = knob(0.1, Range(0.0, 1.0), "weight of the text's own next token in the loss")
    learning_rate: float = knob(3e-4, Range(1e-6, 1e-2, log=True), "the highest rate, after the warm-up")
    steps: int = knob(
        200, Range(0, 100_000, integer=True), "updates of the weights; 0 leaves them as they are"
    )
    batch: int = knob(1, Range(1, 1024, integer=True), "sequences per step")
    divergence: str = knob(
        "forward", Choice(("forward", "reverse", "symmetric")), "how two predictions are compared"
    )
    hidden_weight: float = knob(0.0, Range(0.0, 100.0), "weight of the blocks' hidden states in the loss")
    attention_weight: float = knob(0.0, Range(0.0, 100.0), "weight of the last block's attention in the loss")
    top_k: int = knob(
        0, Range(0, 65_536, integer=True), "tokens kept of each of the teacher's predictions; 0 for all"
    )
    patience: int = knob(
        0, Range(0, 100, integer=True), "looks at held-out text without gain before the end; 0 for none"
    )

    @property
    def is_noop(self) -> bool:
        return self.steps == 0

    @property
    def plan(self) -> TrainingPlan:
        return TrainingPlan(self.learning_rate, self.steps, self.batch, self.patience)

    @property
    def aim(self) -> DistillationObjective:
        return DistillationObjective(cast(Divergence, self.divergence), self.temperature, self.hard_weight)

    def output_layout(self, layout: Layout) -> Layout:
        self.check_forms(layout)
        for name in ("hidden_weight", "attention_weight"):
            if self.top_k and getattr(self, name):
                raise ValueError(
                    f"distill.top_k={self.top_k} keeps what the teacher predicts, not its states: "
                    f"{name}={getattr(self, name):g} must be 0"
                )
        return layout

    def compress(self, model: Model, context: Context) -> Model:
        self.output_layout(model.layout())
        if context.teacher is None or context.training is None:
            raise ValueError("distill needs the teacher and training text; give the study data.training")
        with masks.trainable(model) as held:
            trainer.require_gradients(model)
            plan = dataclasses.replace(self.plan, highest_stage=masks.highest_stage(sparse=bool(held)))
            self._learn(model, context.training, plan, context)
        return model

    def _learn(self, model: Model, rows: Rows, plan: TrainingPlan, context: Context) -> None:
        if self.top_k and model.task == "causal-lm":
            met = plan.met(rows, context.seed)
            cached = CachedTeacher(context, self.top_k, self.temperature, met)
            trainer.check_vocabularies(self.name(), model, cached.vocabulary)
            trainer.train(model, rows, self._cached_loss(rows, cached, model.device), plan, context)
            return
        assert context.teacher is not None
        teacher = context.teacher()
        trainer.check_vocabularies(self.name(), model, trainer.vocabulary(teacher))
        with ExitStack() as reading:
            own, others = (
                reading.enter_context(
                    hidden_states.read(
                        one, hidden=self.hidden_weight > 0, attention=self.attention_weight > 0
                    )
                )
                for one in (model, teacher)
            )
            loss_of = self._loss(rows, teacher, own, others)
            trainer.train(model, rows, loss_of, plan, context)

    def _cached_loss(self, rows: Rows, cached: CachedTeacher, device: str) -> LossOf:
        def loss_of(student: nn.Module, ids: Ids) -> Float[Tensor, ""]:
            batch = rows[ids].to(device)
            said = trainer.predictions(student, batch)
            return distillation_loss(said, cached.top(ids, device), trainer.targets(batch), self.aim)

        return loss_of

    def _loss(self, rows: Rows, teacher: Model, own: States, others: States) -> LossOf:
        """The loss of a student that the teacher runs beside; own, others: what is read of both meanwhile."""
        said = matching(teacher, rows, self.aim)

        def loss_of(student: nn.Module, ids: Ids) -> Float[Tensor, ""]:
            loss = said(student, ids)
            if self.hidden_weight:
                loss = loss + self.hidden_weight * hidden_states.hidden_distance(own, others)
            if self.attention_weight:
                loss = loss + self.attention_weight * hidden_states.attention_distance(own, others)
            own.forget()
            others.forget()
            return loss

        return loss_of
