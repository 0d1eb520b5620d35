"""synthesize: train the smaller model on text that the original generates; needs no other training text."""

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
from jobs.models.layout import Form
from jobs.models.model import Model
from jobs.technique import Kind, Need, Technique
from jobs.training import synthesis, trainer
from jobs.training.losses import DistillationObjective, Divergence
from jobs.training.teacher import matching
from jobs.training.trainer import TrainingPlan

_STORED_LOG_PERPLEXITY = "surprise"
"""The name of the log-perplexities in the cache. It never changes, so that cached rows stay readable."""


@dataclass(frozen=True)
class Synthesize(Technique):
    """Trains the student on sequences that the teacher generates (Kim & Rush 2016), to match its predictions.

    The second part is that of LLM-QAT (arXiv:2305.17888). The teacher generates `samples` rows once for all
    students of a study. Rows that repeat other rows or themselves are dropped, and then both tails of the
    teacher's own perplexity (`jobs.training.synthesis.choose`). The loss per token is that of distill at
    temperature 1: with hard_weight 1 it is Kim & Rush's, with 0 LLM-QAT's. The artifact's notes contain the
    teacher, the sampling options and the numbers of dropped rows.
    """

    kind: ClassVar[Kind] = "recovery"
    paper: ClassVar[str] = "Kim & Rush 2016, arXiv:1606.07947"
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[Need]] = frozenset({"teacher"})
    accepts: ClassVar[frozenset[Form]] = frozenset({"dense", "factored"})

    samples: int = knob(256, Range(1, 100_000, integer=True), "number of rows to generate")
    tokens: int = knob(128, Range(16, 4096, integer=True), "tokens of each row")
    sampling_temperature: float = knob(1.0, Range(0.1, 2.0), "temperature of the teacher's sampling")
    top_p: float = knob(
        1.0, Range(0.05, 1.0), "sample from the most probable tokens with this share of the probability"
    )
    keep: float = knob(0.9, Range(0.05, 1.0), "share of the rows kept, without the tails of perplexity")
    divergence: str = knob(
        "forward", Choice(("forward", "reverse", "symmetric")), "divergence between two predictions"
    )
    hard_weight: float = knob(0.1, Range(0.0, 1.0), "weight of the generated tokens themselves in the loss")
    learning_rate: float = knob(3e-4, Range(1e-6, 1e-2, log=True), "the highest rate, after the warm-up")
    steps: int = knob(200, Range(0, 100_000, integer=True), "updates of the weights; 0 trains nothing")
    batch: int = knob(1, Range(1, 1024, integer=True), "sequences per step")

    @classmethod
    def refusal(cls, family: Family, task: Task) -> str | None:
        if task == "causal-lm":
            return None
        return "only a model that predicts next tokens can write"

    @property
    def is_noop(self) -> bool:
        return self.steps == 0

    def compress(self, model: Model, context: Context) -> Model:
        self.output_layout(model.layout())
        if context.teacher is None or context.teacher_statistics is None:
            raise ValueError("synthesize needs the teacher and a cache for its text")
        teacher = context.teacher()
        trainer.check_vocabularies(self.name(), model, trainer.vocabulary(teacher))
        stored = context.teacher_statistics.stored(
            f"written-{self.samples}x{self.tokens}-at{self.sampling_temperature!r}-top{self.top_p!r}",
            lambda: self._generate(teacher, context),
        )
        rows = self._select(stored, context)
        objective = DistillationObjective(cast(Divergence, self.divergence), hard_weight=self.hard_weight)
        trainer.require_gradients(model)
        plan = TrainingPlan(self.learning_rate, self.steps, self.batch)
        trainer.train(model, rows, matching(teacher, rows, objective), plan, context)
        return model

    def _generate(self, teacher: Model, context: Context) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the generated rows with their perplexities, and a JSON text of their origin."""
        longest = getattr(teacher.config, "max_position_embeddings", None) or self.tokens
        if self.tokens > longest:
            raise ValueError(
                f"synthesize.tokens={self.tokens} is outside [16, {longest}], the teacher's context length"
            )
        sampling = synthesis.Sampling(self.samples, self.tokens, self.sampling_temperature, self.top_p)
        generated = synthesis.generate_rows(teacher, sampling, context.seed, context.report)
        origin = {
            "teacher": loading.digest(teacher.folder),
            "seed": context.seed,
            **dataclasses.asdict(sampling),
        }
        tensors = {"rows": generated.rows, _STORED_LOG_PERPLEXITY: generated.log_perplexity}
        return tensors, {"origin": json.dumps(origin)}

    def _select(self, stored: Stored, context: Context) -> trainer.Rows:
        """Return the rows to train on; records their origin and the dropped rows in `context.notes`."""
        selected = synthesis.choose(
            synthesis.GeneratedRows(stored["rows"], stored[_STORED_LOG_PERPLEXITY]), self.keep
        )
        context.notes["written"] = {
            **json.loads(stored.about["origin"]),
            "kept": len(selected.rows),
            "dropped_as_repeated": selected.repeated,
            "dropped_as_too_likely": selected.too_likely,
            "dropped_as_too_unlikely": selected.too_unlikely,
        }
        return selected.rows
