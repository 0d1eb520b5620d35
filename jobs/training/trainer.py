"""Recovery: what all techniques that train a model have in common, from the order of rows to the weights that learn."""

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
from jobs.training import engine
from jobs.training import ranks as gang
from jobs.training.checkpoints import Checkpoints
from jobs.training.engine import AfterStep

_HELD_OUT = 16
"""One row of so many is held out, where a training may stop early."""
_CHECKPOINT_STEPS = 50

Rows = Int[Tensor, "samples tokens"]
Ids = Int[Tensor, " batch"]
LossOf = Callable[[nn.Module, Ids], Float[Tensor, ""]]
"""The loss of a module on the rows of these numbers."""


@dataclass(frozen=True)
class TrainingPlan:
    """How to train on rows of text. batch: rows a step. patience: after how many looks at held-out rows
    without a better loss training ends; 0 holds nothing out. highest_stage: of ZeRO."""

    learning_rate: float
    steps: int
    batch: int
    patience: int = 0
    highest_stage: int = HIGHEST_STAGE

    def trained(self, rows: Rows, seed: int) -> tuple[Ids, Ids]:
        """The numbers of the rows to train on, in the order of the first round, and of those held out."""
        order = order_of(len(rows), seed)
        if not self.patience:
            return order, order[:0]
        if len(rows) < 2:
            raise ValueError(f"patience={self.patience} holds out a row, and there is but {len(rows)}")
        held = max(1, len(rows) // _HELD_OUT)
        return order[:-held], order[-held:]

    def met(self, rows: Rows, seed: int) -> Ids:
        """The numbers of all rows that training looks at."""
        order, held = self.trained(rows, seed)
        return torch.cat([order[: self.steps * self.batch], held])


def train(
    model: Model,
    rows: Rows,
    loss_of: LossOf,
    plan: TrainingPlan,
    context: Context,
    after_step: AfterStep = engine.no_op,
) -> None:
    """Train, in place, those parameters of a model that require gradients, on rows of equal length. The whole
    model lies on its device meanwhile.

    after_step: see `jobs.training.engine.train`.

    Where rows are held out, the best weights are left, and how it went is noted in the context.
    """
    order, held = plan.trained(rows, context.seed)
    shared = _shared(model, rows.shape[1], plan, context)
    training = engine.Training(
        plan.learning_rate, plan.steps, plan.batch // shared.rows, zero_stage=shared.stage
    )
    watched = engine.HeldOut(torch.split(held, shared.rows), max(1, plan.steps // 20), plan.patience)
    places = context.checkpoints
    with on_device(model, ""):
        log = engine.train(
            model.module,
            _rounds(order, shared.rows, context.seed),
            loss_of,
            training,
            context.report,
            after_step=after_step,
            held_out=watched if plan.patience else None,
            checkpoints=None if places is None else Checkpoints(places, _CHECKPOINT_STEPS),
        )
    if plan.patience:
        context.notes["steps_taken"] = len(log.losses)
        context.notes["held_out_losses"] = list(log.held_out)


def order_of(rows: int, seed: int) -> Ids:
    """The order in which training meets rows at first. It is the same whatever the plan, so that what a
    teacher says of the first rows serves all students."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))


def require_gradients(model: Model) -> None:
    """Of the blocks and of every vector outside them; of the matrices there, embeddings and head, not."""
    for parameter in model.module.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    model.blocks.requires_grad_(True)


def predictions(module: nn.Module, rows: Rows) -> Float[Tensor, "positions vocabulary"]:
    """The logits of each next token, all positions in a row."""
    logits: Tensor = module(rows, use_cache=False).logits
    return logits[:, :-1].flatten(0, 1)


def targets(rows: Rows) -> Int[Tensor, " positions"]:
    """The tokens that `predictions` are about."""
    return rows[:, 1:].flatten()


def vocabulary(model: Model) -> int:
    """How many tokens the model's embedding knows."""
    return int(cast(Any, model.module).get_input_embeddings().weight.shape[0])


def check_vocabularies(technique: str, student: Model, teacher: int) -> None:
    """Refuse, with a ValueError, a teacher of another vocabulary than the student's."""
    own = vocabulary(student)
    if own != teacher:
        raise ValueError(
            f"{technique} cannot compare predictions: the student's vocabulary has {own} tokens, the "
            f"teacher's {teacher}"
        )


def _rounds(order: Ids, batch: int, seed: int) -> Iterator[Ids]:
    """Batches without end: all rows in this order first, then in a new order each round."""
    generator = torch.Generator().manual_seed(seed + 1)
    waiting = order
    while True:
        while len(waiting) < batch:
            waiting = torch.cat([waiting, order[torch.randperm(len(order), generator=generator)]])
        yield waiting[:batch]
        waiting = waiting[batch:]


@dataclass(frozen=True)
class _Shared:
    """The ZeRO stage of a training, and the rows of one forward pass."""

    stage: int
    rows: int


def _shared(model: Model, tokens: int, plan: TrainingPlan, context: Context) -> _Shared:
    """How a training is shared out, the same on all ranks: by the least memory that one of them has."""
    ranks, asked = gang.join(), context.sharing
    device_gib = min(ranks.all_gather(asked.device_gib or memory.device_gib()))
    weights = sum(parameter.numel() for parameter in model.module.parameters())
    stage = asked.stage(weights, ranks.count, device_gib, plan.highest_stage)
    linears = [part for part in model.blocks.modules() if isinstance(part, nn.Linear)]
    widths = sum(one.in_features + one.out_features for one in linears)
    logits = vocabulary(model) if model.task == "causal-lm" else 0
    free = (device_gib - parallel.training_gib(weights, stage, ranks.count)) * 2**30
    activations = parallel.row_bytes(tokens, widths, logits)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    rows = parallel.rows_at_once(plan.batch, ranks.count, tokens, kind, activations, free, asked.micro_batch)
    return _Shared(stage, rows)
