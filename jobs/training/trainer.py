"""Train a model on rows of text: the order of rows, the division among ranks, and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jobs import parallel
from jobs.context import Context
from jobs.models import memory
from jobs.models.model import Model
from jobs.models.placement import on_device
from jobs.parallel import HIGHEST_STAGE
from jobs.training import loop
from jobs.training import ranks as rank_group
from jobs.training.checkpoints import Checkpoints
from jobs.training.settings import AfterStep, HeldOut, Training, no_op

_ROWS_PER_HELD_OUT_ROW = 16
"""One row of this many is held out if a training may stop early."""
_CHECKPOINT_STEPS = 50

Rows = Int[Tensor, "samples tokens"]
Ids = Int[Tensor, " batch"]
"""Numbers of rows."""
LossOf = Callable[[nn.Module, Ids], Float[Tensor, ""]]
"""The loss of a module on the rows of these numbers."""


@dataclass(frozen=True)
class TrainingPlan:
    """The settings of a training on rows of text."""

    learning_rate: float
    steps: int
    batch: int
    """Rows per step."""
    patience: int = 0
    """The number of consecutive evaluations on held-out rows without a lower loss after which training ends; 0 holds no
    rows out."""
    highest_stage: int = HIGHEST_STAGE
    """The highest ZeRO stage."""

    def split(self, rows: Rows, seed: int) -> tuple[Ids, Ids]:
        """Return the rows to train on, in the order of the first epoch, and the held-out rows, as numbers."""
        order = order_of(len(rows), seed)
        if not self.patience:
            return order, order[:0]
        if len(rows) < 2:
            raise ValueError(f"patience={self.patience} holds out a row, and there is only {len(rows)}")
        count = max(1, len(rows) // _ROWS_PER_HELD_OUT_ROW)
        return order[:-count], order[-count:]

    def used(self, rows: Rows, seed: int) -> Ids:
        """Return the numbers of all rows that the training reads."""
        order, held_out = self.split(rows, seed)
        return torch.cat([order[: self.steps * self.batch], held_out])


def train(
    model: Model,
    rows: Rows,
    loss_of: LossOf,
    plan: TrainingPlan,
    context: Context,
    after_step: AfterStep = no_op,
) -> None:
    """Train the parameters of a model that require gradients, in place, on rows of equal length.

    The whole model is on its device during the training. With held-out rows, the model has the weights of the lowest
    held-out loss afterwards, and the context notes the number of steps and the held-out losses.
    after_step: see `jobs.training.loop.train`.
    """
    order, held_out_ids = plan.split(rows, context.seed)
    division = _divide(model, rows.shape[1], plan, context)
    training = Training(
        plan.learning_rate, plan.steps, plan.batch // division.rows, zero_stage=division.stage
    )
    held_out = None
    if plan.patience:
        batches = torch.split(held_out_ids, division.rows)
        held_out = HeldOut(batches, max(1, plan.steps // 20), plan.patience)
    checkpoints = None
    if context.checkpoints is not None:
        checkpoints = Checkpoints(context.checkpoints, _CHECKPOINT_STEPS)
    with on_device(model, ""):
        log = loop.train(
            model.module,
            _batches(order, division.rows, context.seed),
            loss_of,
            training,
            context.report,
            after_step=after_step,
            held_out=held_out,
            checkpoints=checkpoints,
        )
    if plan.patience:
        context.notes["steps_taken"] = len(log.losses)
        context.notes["held_out_losses"] = list(log.held_out)


def order_of(rows: int, seed: int) -> Ids:
    """Return the order of rows in the first epoch. It is the same for every plan, so that cached predictions of a
    teacher serve all students."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))


def require_gradients(model: Model) -> None:
    """Let the blocks and all vectors outside of them be trained; not the matrices outside: embeddings and head."""
    for parameter in model.module.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    model.blocks.requires_grad_(True)


def predictions(module: nn.Module, rows: Rows) -> Float[Tensor, "positions vocabulary"]:
    """Return the logits of each next token, the positions of all rows concatenated."""
    logits: Tensor = module(rows, use_cache=False).logits
    return logits[:, :-1].flatten(0, 1)


def targets(rows: Rows) -> Int[Tensor, " positions"]:
    """Return the tokens that `predictions` predicts."""
    return rows[:, 1:].flatten()


def vocabulary(model: Model) -> int:
    """Return the number of tokens of the model's embedding."""
    return int(cast(Any, model.module).get_input_embeddings().weight.shape[0])


def check_vocabularies(technique: str, student: Model, teacher: int) -> None:
    """Raise ValueError if student and teacher have vocabularies of different sizes."""
    size = vocabulary(student)
    if size != teacher:
        raise ValueError(
            f"{technique} cannot compare predictions: the student's vocabulary has {size} tokens, the "
            f"teacher's {teacher}"
        )


def _batches(order: Ids, rows: int, seed: int) -> Iterator[Ids]:
    """Yield batches without end: the first epoch has this order, each later epoch has a new one."""
    generator = torch.Generator().manual_seed(seed + 1)
    pending = order
    while True:
        while len(pending) < rows:
            pending = torch.cat([pending, order[torch.randperm(len(order), generator=generator)]])
        yield pending[:rows]
        pending = pending[rows:]


@dataclass(frozen=True)
class _Division:
    """How a training is divided among ranks and forward passes."""

    stage: int
    """The ZeRO stage."""
    rows: int
    """Rows of one forward pass."""


def _divide(model: Model, tokens: int, plan: TrainingPlan, context: Context) -> _Division:
    """Return the division of a training, equal on all ranks: the rank with the least memory decides it."""
    ranks, sharing = rank_group.join(), context.sharing
    device_gib = min(ranks.all_gather(sharing.device_gib or memory.device_gib()))
    weights = sum(parameter.numel() for parameter in model.module.parameters())
    stage = sharing.stage(weights, ranks.count, device_gib, plan.highest_stage)
    linears = [part for part in model.blocks.modules() if isinstance(part, nn.Linear)]
    widths = sum(linear.in_features + linear.out_features for linear in linears)
    logits = 0
    if model.task == "causal-lm":
        logits = vocabulary(model)
    free_bytes = (device_gib - parallel.training_gib(weights, stage, ranks.count)) * 2**30
    activations = parallel.row_bytes(tokens, widths, logits)
    kind = "cpu"
    if torch.cuda.is_available():
        kind = "cuda"
    rows = parallel.rows_at_once(
        plan.batch, ranks.count, tokens, kind, activations, free_bytes, sharing.micro_batch
    )
    return _Division(stage, rows)
