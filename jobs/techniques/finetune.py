"""finetune: train the smaller model for some steps on the text itself, without a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from jobs.compression import masks
from jobs.context import Context
from jobs.knobs import Choice, Range, Value, knob
from jobs.models.families import Family, Task
from jobs.models.layout import Form, Layout
from jobs.models.model import Model
from jobs.technique import Kind, Need, Technique
from jobs.training import lora, trainer
from jobs.training.losses import cross_entropy
from jobs.training.trainer import Ids, TrainingPlan


@dataclass(frozen=True)
class Finetune(Technique):
    """Minimizes the cross-entropy of the text's next tokens, the loss that the original was trained with.

    method:
        full  trains the blocks and the norms, in bf16 with fp32 master weights.
        lora  trains a correction of rank `rank` for each linear of the blocks, W + U V (Hu et al., eq. 3), and
              merges it into the weight at the end. Gradients and optimizer states exist for corrections only.
    It needs neither the memory nor the time of a teacher, but distillation gives more information per token.
    """

    kind: ClassVar[Kind] = "recovery"
    paper: ClassVar[str] = "Hu et al. 2021, LoRA, arXiv:2106.09685"
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[Need]] = frozenset({"training"})
    accepts: ClassVar[frozenset[Form]] = frozenset({"dense", "factored", "sparse"})

    method: str = knob("lora", Choice(("full", "lora")), "train all weights, or corrections of low rank")
    rank: int = knob(8, Range(1, 512, integer=True), "rank of the corrections of lora")
    learning_rate: float = knob(3e-4, Range(1e-6, 1e-2, log=True), "the highest rate, after the warm-up")
    steps: int = knob(200, Range(0, 100_000, integer=True), "updates of the weights; 0 trains nothing")
    batch: int = knob(1, Range(1, 1024, integer=True), "sequences per step")
    patience: int = knob(
        0,
        Range(0, 100, integer=True),
        "stop after this many evaluations on held-out text without improvement; 0 never stops early",
    )

    @classmethod
    def refusal(cls, family: Family, task: Task) -> str | None:
        if task == "embedding":
            return "an encoder predicts no next token, so the text alone teaches it nothing; take distill"
        if task == "classification":
            return "a classifier learns from labels, and training text has none; take distill"
        return None

    @property
    def is_noop(self) -> bool:
        return self.steps == 0

    def ignored_options(self) -> dict[str, Value]:
        if self.method == "full":
            return {"rank": 8}
        return {}

    def output_layout(self, layout: Layout) -> Layout:
        """Return the same layout; ValueError if `lora` cannot be applied to a linear."""
        self.check_forms(layout)
        if self.method == "lora" and "sparse" in layout.forms():
            raise ValueError("finetune.method=lora would make removed weights nonzero; take full")
        if self.method == "lora":
            for name, spec in layout.linears.items():
                max_rank = min(spec.in_features, spec.out_features)
                if self.rank > max_rank:
                    raise ValueError(
                        f"finetune.rank={self.rank} is outside [1, {max_rank}], the possible ranks of {name}"
                    )
        return layout

    def compress(self, model: Model, context: Context) -> Model:
        self.output_layout(model.layout())
        if context.training is None:
            raise ValueError("finetune needs training text; set data.training in the study")
        rows, device = context.training, model.device

        def loss_of(student: nn.Module, ids: Ids) -> Float[Tensor, ""]:
            batch = rows[ids].to(device)
            return cross_entropy(trainer.predictions(student, batch), trainer.targets(batch))

        with masks.trainable(model) as sparse_masks:
            if self.method == "lora":
                lora.add(model, self.rank, context.seed)
            else:
                trainer.require_gradients(model)
            stage = masks.highest_stage(sparse=bool(sparse_masks))
            plan = TrainingPlan(self.learning_rate, self.steps, self.batch, self.patience, stage)
            trainer.train(model, rows, loss_of, plan, context)
            lora.merge(model)
        return model
