"""Teachers: the original that runs with the student, or its cached predictions."""

from __future__ import annotations

import dataclasses
import functools
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jobs.calibration.cache import Stored
from jobs.context import Context
from jobs.models import memory
from jobs.models.families import Task
from jobs.models.model import Model
from jobs.training import trainer
from jobs.training.hidden_states import state_distance
from jobs.training.losses import DistillationObjective, TopKLogits, distillation_loss, top_k_logits
from jobs.training.trainer import Ids, LossOf, Rows, order_of, predictions

_MAX_FILE_ROWS = 64
"""Rows of a file, at most. A row of 512 tokens takes 200 kB at k = 64."""
_FIRST_FILE_ROWS = 8
"""Rows of the first file. A short training reads only a few rows."""


class CachedTeacher:
    """The k most probable tokens of each prediction of the original, at a temperature.

    They depend only on the original and the training rows: computed once, they serve all students of a study. Rows are
    stored in the order of the first epoch, so that only files with used rows are computed. The original is loaded only
    if a file is missing, and released before the training.
    """

    def __init__(self, context: Context, k: int, temperature: float, used: Ids) -> None:
        """used: the numbers of the rows that the training reads. Raises ValueError if k exceeds the vocabulary."""
        if context.training is None:
            raise ValueError("a cached teacher needs training text")
        order = order_of(len(context.training), context.seed)
        self._positions = torch.argsort(order)
        self._files = _stored_files(context, k, temperature, order, self._positions[used])

    @property
    def vocabulary(self) -> int:
        return int(next(iter(self._files.values())).about["vocabulary"])

    def top(self, ids: Ids, device: str) -> TopKLogits:
        """Return the predictions for the rows of these numbers, the positions of all rows concatenated."""
        parts: dict[str, list[Tensor]] = {"log_shares": [], "indices": [], "log_rest": []}
        for position in self._positions[ids].tolist():
            file = self._files[_file_of(position).start]
            for name, tensors in parts.items():
                tensors.append(file[f"{position}.{name}"])
        return TopKLogits(**{name: torch.cat(tensors).to(device) for name, tensors in parts.items()})


def matching(teacher: Model, rows: Rows, objective: DistillationObjective) -> LossOf:
    """Return the loss of a student against a teacher that reads the same rows.

    A causal LM matches the predictions of next tokens as `objective` says; a classifier matches the logits of its
    classes, without the term of the text; an encoder without a head matches the last hidden states.
    """

    def loss_of(student: nn.Module, ids: Ids) -> Float[Tensor, ""]:
        batch = rows[ids].to(teacher.device)
        with torch.no_grad():
            teacher_output = _output(teacher.module, batch, teacher.task)
        student_output = _output(student, batch, teacher.task)
        if teacher.task == "embedding":
            return state_distance(student_output, teacher_output)
        if teacher.task == "classification":
            soft_only = dataclasses.replace(objective, hard_weight=0.0)
            return distillation_loss(student_output, teacher_output, None, soft_only)
        return distillation_loss(student_output, teacher_output, trainer.targets(batch), objective)

    return loss_of


def _output(module: nn.Module, rows: Rows, task: Task) -> Tensor:
    """Return the output that a student matches: the logits of next tokens or of classes, or the last hidden states."""
    if task == "causal-lm":
        return trainer.predictions(module, rows)
    output = module(rows)
    if task == "classification":
        return cast(Tensor, output.logits)
    return cast(Tensor, output.last_hidden_state)


def _file_of(position: int) -> range:
    """Return the positions in the file of this position: 0 to 7, 8 to 15, 16 to 31, 32 to 63, then 64 per file."""
    if position < _FIRST_FILE_ROWS:
        return range(_FIRST_FILE_ROWS)
    start = position // _MAX_FILE_ROWS * _MAX_FILE_ROWS
    if position < _MAX_FILE_ROWS:
        start = 1 << (position.bit_length() - 1)
    return range(start, min(2 * start, start + _MAX_FILE_ROWS))


def _stored_files(
    context: Context, k: int, temperature: float, order: Ids, positions: Int[Tensor, " used"]
) -> dict[int, Stored]:
    """Return the files that contain the rows at these positions of the order, by the first position of each."""
    if context.teacher is None or context.teacher_statistics is None:
        raise ValueError("a cached teacher needs the teacher and a cache for its predictions")
    teacher = functools.cache(context.teacher)
    rows = context.training
    assert rows is not None
    needed = sorted({_file_of(position) for position in positions.tolist()}, key=lambda file: file.start)
    files = {}
    for index, file in enumerate(needed):
        context.report(index / len(needed), f"the teacher's {k} most probable tokens")

        def compute(file: range = file) -> tuple[dict[str, Tensor], dict[str, str]]:
            return _predict(teacher(), rows, order[file.start : file.stop], file.start, k, temperature)

        kind = f"teacher-top{k}-at{temperature!r}-from{file.start}"
        files[file.start] = context.teacher_statistics.stored(kind, compute)
    if teacher.cache_info().currsize:
        teacher.cache_clear()
        memory.release()
    return files


@torch.no_grad()
def _predict(
    teacher: Model, rows: Int[Tensor, "samples tokens"], ids: Ids, first: int, k: int, temperature: float
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the k most probable tokens of these rows, named by positions from `first` on, and the vocabulary size."""
    tensors: dict[str, Tensor] = {}
    vocabulary = 0
    for position, row in enumerate(rows[ids], start=first):
        teacher_logits = predictions(teacher.module, row.unsqueeze(0).to(teacher.device))
        vocabulary = teacher_logits.shape[1]
        if k > vocabulary:
            raise ValueError(
                f"top_k={k} is outside [0, {vocabulary}]: the teacher has only {vocabulary} tokens"
            )
        if not bool(torch.isfinite(teacher_logits).all()):
            raise ValueError("the teacher predicts NaN or infinite logits on the training text")
        top = top_k_logits(teacher_logits, k, temperature)
        for name in ("log_shares", "indices", "log_rest"):
            tensors[f"{position}.{name}"] = getattr(top, name)
    return tensors, {"vocabulary": str(vocabulary)}
