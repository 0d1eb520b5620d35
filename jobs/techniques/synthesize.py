"""synthesize: train the smaller model on text that the original writes for it; needs no text of one's own."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor

from jobs.calibration.cache import Stored
from jobs.context import Context
from jobs.knobs import Choice, Range, knob
from jobs.models import loading
from jobs.models.families import Family, Task
from jobs.models.layout import Form, Layout
from jobs.models.model import Model
from jobs.technique import Kind, Need, Technique
from jobs.training import synthesis, trainer
from jobs.training.losses import DistillationObjective, Divergence
from jobs.training.teacher import matching
from jobs.training.trainer import TrainingPlan


@dataclass(frozen=True)
class Synthesize(Technique):
    """Kim & Rush 2016: the student learns from sequences that the teacher wrote, and, with LLM-QAT
    (arXiv:2305.17888), from what the teacher predicts at each of their tokens.

    The teacher writes `samples` rows once for all students of a study; those that repeat others or themselves
    are dropped, and of the rest both tails of the teacher's own perplexity (`jobs.training.synthesis.choose`). The loss
    per token is that of distill at temperature 1: with hard_weight 1 it is Kim & Rush's, with 0 LLM-QAT's.
    Who wrote what, and how much was dropped, is noted beside the artifact.
    """

    kind: ClassVar[Kind] = "recovery"
    paper: ClassVar[str] = "Kim & Rush 2016, arXiv:1606.07947"
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[Need]] = frozenset({"teacher"})
    accepts: ClassVar[frozenset[Form]] = frozenset({"dense", "factored"})

    samples: int = knob(256, Range(1, 100_000, integer=True), "rows that the teacher writes")
    tokens: int = knob(128, Range(16, 4096, integer=True), "tokens of each row")
    sampling_temperature: float = knob(1.0, Range(0.1, 2.0), "how boldly the teacher writes")
    top_p: float = knob(1.0, Range(0.05, 1.0), "share of the probability that the next token is drawn from")
    keep: float = knob(0.9, Range(0.05, 1.0), "share of the rows kept, without the tails of perplexity")
    divergence: str = knob(
        "forward", Choice(("forward", "reverse", "symmetric")), "how two predictions are compared"
    )
    hard_weight: float = knob(0.1, Range(0.0, 1.0), "weight of the tokens that the teacher wrote in the loss")
    learning_rate: float = knob(3e-4, Range(1e-6, 1e-2, log=True), "the highest rate, after the warm-up")
    steps: int = knob(
        200, Range(0, 100_000, integer=True), "updates of the weights; 0 leaves them as they are"
    )
    batch: int = knob(1, Range(1, 1024, integer=True), "sequences per step")

    @classmethod
    def refusal(cls, family: Family, task: Task) -> str | None:
        return None if task == "causal-lm" else "only a model that predicts next tokens can write"

    @property
    def is_noop(self) -> bool:
        return self.steps == 0

    def output_layout(self, layout: Layout) -> Layout:
        self.check_forms(layout)
        return layout

    def compress(self, model: Model, context: Context) -> Model:
        self.output_layout(model.layout())
        if context.teacher is None or context.teacher_statistics is None:
            raise ValueError("synthesize needs the teacher and somewhere to keep what it writes")
        teacher = context.teacher()
        trainer.check_vocabularies(self.name(), model, trainer.vocabulary(teacher))
        stored = context.teacher_statistics.stored(
            f"written-{self.samples}x{self.tokens}-at{self.sampling_temperature!r}-top{self.top_p!r}",
            lambda: self._write(teacher, context),
        )
        rows = self._choose(stored, context)
        aim = DistillationObjective(cast(Divergence, self.divergence), hard_weight=self.hard_weight)
        trainer.require_gradients(model)
        plan = TrainingPlan(self.learning_rate, self.steps, self.batch)
        trainer.train(model, rows, matching(teacher, rows, aim), plan, context)
        return model

    def _write(self, teacher: Model, context: Context) -> tuple[dict[str, Tensor], dict[str, str]]:
        longest = getattr(teacher.config, "max_position_embeddings", None) or self.tokens
        if self.tokens > longest:
            raise ValueError(
                f"synthesize.tokens={self.tokens} is outside [16, {longest}]: the teacher reads no more"
            )
        sampling = synthesis.Sampling(self.samples, self.tokens, self.sampling_temperature, self.top_p)
        written = synthesis.write(teacher, sampling, context.seed, context.report)
        origin = {
            "teacher": loading.digest(teacher.folder),
            "seed": context.seed,
            **dataclasses.asdict(sampling),
        }
        return dataclasses.asdict(written), {"origin": json.dumps(origin)}

    def _choose(self, stored: Stored, context: Context) -> trainer.Rows:
        """The rows to learn from; notes down where they come from."""
        chosen = synthesis.choose(synthesis.GeneratedRows(stored["rows"], stored["surprise"]), self.keep)
        context.notes["written"] = {
            **json.loads(stored.about["origin"]),
            "kept": len(chosen.rows),
            "dropped_as_repeated": chosen.repeated,
            "dropped_as_too_likely": chosen.too_likely,
            "dropped_as_too_unlikely": chosen.too_unlikely,
        }
        return chosen.rows
