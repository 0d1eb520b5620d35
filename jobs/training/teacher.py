"""Teacher: what a student learns from, the original beside it or what that said before, kept in files."""

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

_ROWS = 64
"""The most rows of one file. A row of 512 tokens takes 200 kB at k = 64."""
_FEW = 8
"""Rows of the first file: a short training meets few."""


class CachedTeacher:
    """The k most probable tokens of each prediction of the original, at some temperature.

    They depend on the original and the training rows alone: computed once, they serve all students of a
    study. Rows are filed in the order in which students meet them, so that only those met are computed (to
    the end of a file). The original is loaded only where something is missing, and let go before training.
    """

    def __init__(self, context: Context, k: int, temperature: float, met: Ids) -> None:
        """met: the numbers of the rows that will be asked for. ValueError where k is above the vocabulary."""
        if context.training is None:
            raise ValueError("a cached teacher needs training text")
        order = order_of(len(context.training), context.seed)
        self._places = torch.argsort(order)
        self._files = _files(context, k, temperature, order, self._places[met])

    @property
    def vocabulary(self) -> int:
        return int(next(iter(self._files.values())).about["vocabulary"])

    def top(self, ids: Ids, device: str) -> TopKLogits:
        """What the original predicts in the rows of these numbers, one row's positions after the other's."""
        parts: dict[str, list[Tensor]] = {"log_shares": [], "indices": [], "log_rest": []}
        for place in self._places[ids].tolist():
            for name, found in parts.items():
                found.append(self._files[_file(place).start][f"{place}.{name}"])
        return TopKLogits(**{name: torch.cat(found).to(device) for name, found in parts.items()})


def _file(place: int) -> range:
    """The places that are filed together with this one: 0 to 7, 8 to 15, 16 to 31, 32 to 63, then by 64."""
    if place < _FEW:
        return range(_FEW)
    start = 1 << (place.bit_length() - 1) if place < _ROWS else place // _ROWS * _ROWS
    return range(start, min(2 * start, start + _ROWS))


def _files(
    context: Context, k: int, temperature: float, order: Ids, places: Int[Tensor, " met"]
) -> dict[int, Stored]:
    """The files that hold the rows at these places of the order, by the first place of each."""
    if context.teacher is None or context.teacher_statistics is None:
        raise ValueError("a cached teacher needs the teacher and somewhere to keep its statistics")
    teacher = functools.cache(context.teacher)
    rows = context.training
    assert rows is not None
    wanted = sorted({_file(place) for place in places.tolist()}, key=lambda file: file.start)
    found = {}
    for done, file in enumerate(wanted):
        context.report(done / len(wanted), f"the teacher's {k} most probable tokens")

        def compute(file: range = file) -> tuple[dict[str, Tensor], dict[str, str]]:
            return _predict(teacher(), rows, order[file.start : file.stop], file.start, k, temperature)

        kind = f"teacher-top{k}-at{temperature!r}-from{file.start}"
        found[file.start] = context.teacher_statistics.stored(kind, compute)
    if teacher.cache_info().currsize:
        teacher.cache_clear()
        memory.release()
    return found


@torch.no_grad()
def _predict(
    teacher: Model, rows: Int[Tensor, "samples tokens"], ids: Ids, first: int, k: int, temperature: float
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The cut predictions in the rows of these numbers, under the names of their places from `first` on."""
    tensors: dict[str, Tensor] = {}
    vocabulary = 0
    for place, row in enumerate(rows[ids], start=first):
        said = predictions(teacher.module, row.unsqueeze(0).to(teacher.device))
        vocabulary = said.shape[1]
        if k > vocabulary:
            raise ValueError(f"top_k={k} is outside [0, {vocabulary}]: the teacher knows so many tokens")
        if not bool(torch.isfinite(said).all()):
            raise ValueError("the teacher predicts NaN or infinite logits on the training text")
        top = top_k_logits(said, k, temperature)
        for name in ("log_shares", "indices", "log_rest"):
            tensors[f"{place}.{name}"] = getattr(top, name)
    return tensors, {"vocabulary": str(vocabulary)}


def matching(teacher: Model, rows: Rows, aim: DistillationObjective) -> LossOf:
    """The loss of a student on rows that the teacher reads beside it: by `aim` for next tokens; for the logits
    of classes too, without the text's own part; an encoder without a head matches last hidden states."""

    def loss_of(student: nn.Module, ids: Ids) -> Float[Tensor, ""]:
        batch = rows[ids].to(teacher.device)
        with torch.no_grad():
            taught = _answer(teacher.module, batch, teacher.task)
        said = _answer(student, batch, teacher.task)
        if teacher.task == "embedding":
            return state_distance(said, taught)
        if teacher.task == "classification":
            return distillation_loss(said, taught, None, dataclasses.replace(aim, hard_weight=0.0))
        return distillation_loss(said, taught, trainer.targets(batch), aim)

    return loss_of


def _answer(module: nn.Module, rows: Rows, task: Task) -> Tensor:
    """What a student is to match: the logits of each next token, of the classes, or the last hidden states."""
    if task == "causal-lm":
        return trainer.predictions(module, rows)
    said = module(rows)
    return cast(Tensor, said.logits if task == "classification" else said.last_hidden_state)
