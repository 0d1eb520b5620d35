"""The training loop: steps, divergence checks, early stopping and checkpoints.

Any number of ranks (`jobs.training.ranks`) computes the result of a single one: each takes its part of the batches of
a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from jobs.models import memory
from jobs.progress import JobInterruptedError, Report
from jobs.training import ranks as rank_group
from jobs.training.checkpoints import Checkpoint, Checkpoints
from jobs.training.engine import (
    copy_of_trained,
    hooks_of,
    launcher_environment,
    restore_hooks,
    start_engine,
    stop_engine,
    trained_parameters,
    whole_shape,
)
from jobs.training.optimizer_state import MOMENTS, optimizer_state
from jobs.training.ranks import Ranks
from jobs.training.settings import AfterStep, HeldOut, LossOf, Training, TrainingLog, no_op

_RECENT_STEPS = 4
"""Steps whose mean loss is compared with that of the first steps: the loss of a single step is too noisy."""


def train(
    module: nn.Module,
    batches: Iterable[Tensor],
    loss_of: LossOf,
    training: Training,
    report: Report,
    *,
    after_step: AfterStep = no_op,
    held_out: HeldOut | None = None,
    checkpoints: Checkpoints | None = None,
) -> TrainingLog:
    """Train the parameters of a bf16 module that require gradients, in place.

    `loss_of(module, batch)` must call the module that it receives, which is the engine's, and return a mean. The module
    keeps its mode: a module in eval mode trains without dropout. Afterwards its parameters are plain again, shared
    between names as before, and none requires gradients. Raises FloatingPointError as soon as the training diverges.

    `after_step` serves schedules (a temperature, a share of masked weights), which the forward pass reads from
    attributes and buffers. It must not write parameters: the optimizer has fp32 masters of them, divided according to
    the ZeRO stage, and its next update would overwrite the change. A constraint on weights (masked, rounded, of low
    rank) belongs into the forward pass: register it with
    `torch.nn.utils.parametrize.register_parametrization(linear, "weight", part)`, where `part` is a module that maps
    the trained weight to the weight of the forward pass; `remove_parametrizations(linear, "weight")` afterwards keeps
    the mapped weight. `weight * mask` has no gradient where the mask is zero, so masked weights stay unchanged at every
    stage.

    With `checkpoints`, the same call after an interruption resumes from the last checkpoint and gives the same result.
    `batches` must have the same rows in the same order, in batches of any size, and `after_step` is called once with
    the number of completed steps. The number of ranks and the stage may differ. If `report` raises JobInterruptedError
    on any rank, a checkpoint of that step is written first, and every rank raises it.

    Several ranks call this with the same arguments. They start from the weights and buffers of the first rank and
    synchronize at each loss. All return the same losses and whole parameters; only the first rank has the weights of
    the lowest held-out loss.
    """
    started = time.perf_counter()
    hooks = hooks_of(module)
    with launcher_environment():
        ranks = rank_group.join()
        checkpoint = _read_checkpoint(checkpoints, training, ranks)
        if checkpoint is not None:
            _restore(module, checkpoint)
        ranks.broadcast([*module.parameters(), *module.buffers()])
        engine = start_engine(module, training, ranks)
        run = TrainingRun(engine, ranks, loss_of, training, report, after_step, held_out, checkpoints)
        in_step = True
        try:
            run.resume(checkpoint)
            run.run(iter(batches))
        except (FloatingPointError, JobInterruptedError):
            raise
        except BaseException:
            in_step = ranks.count == 1  # other ranks wait for this one in another collective call
            raise
        finally:
            if in_step:
                stop_engine(engine, module)
                restore_hooks(hooks)
    if run.best:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name in run.best:
                    parameter.copy_(run.best[name])
    seconds = time.perf_counter() - started
    return TrainingLog(tuple(run.losses), run.peak_gib, seconds, tuple(run.held_losses))


@dataclass
class TrainingRun:
    """The state of one training."""

    engine: Any
    ranks: Ranks
    loss_of: LossOf
    training: Training
    report: Report
    after_step: AfterStep
    held_out: HeldOut | None
    checkpoints: Checkpoints | None
    losses: list[float] = field(default_factory=list)
    held_losses: list[float] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    """The trained weights of the lowest held-out loss, on the CPU of the first rank; empty on other ranks."""
    peak_gib: float = 0.0

    def run(self, batches: Iterator[Tensor]) -> None:
        """Take all remaining steps."""
        if self.losses:
            for _ in range(len(self.losses) * self.training.accumulate):
                next(batches)
            self.after_step(len(self.losses))
        else:
            self._evaluate()
        while len(self.losses) < self.training.steps and not self._patience_exhausted():
            self._step(list(islice(batches, self.training.accumulate)))
            steps = len(self.losses)
            self.after_step(steps)
            self._evaluate()
            is_due = self.checkpoints is not None and steps % self.checkpoints.interval == 0
            if is_due and steps < self.training.steps:
                self._save()
            self._report(saved=is_due)

    def resume(self, checkpoint: Checkpoint | None) -> None:
        """Restore the optimizer and the losses from the checkpoint of the first rank, if it has one."""
        course = None
        if checkpoint is not None:
            course = checkpoint.course
        course = self.ranks.broadcast_object(course)
        if course is None:
            return
        states = optimizer_state(self.engine, self.training.zero_stage)
        states.begin(course["done"])
        for name, parameter in trained_parameters(self.engine.module).items():
            for kind in ("master", *MOMENTS):
                value = torch.empty(whole_shape(parameter), dtype=torch.float32, device=self.engine.device)
                if checkpoint is not None:
                    value.copy_(checkpoint.tensor(f"{kind}.{name}"))
                self.ranks.broadcast([value])
                states.write(parameter, kind, value)
        if checkpoint is not None:
            self.best = {name: checkpoint.tensor(f"best.{name}") for name in checkpoint.names("best")}
        self.losses, self.held_losses = course["losses"], course["held_losses"]

    def _report(self, saved: bool) -> None:
        steps, reason = len(self.losses), None
        try:
            activity = f"step {steps} of {self.training.steps}, loss {self.losses[-1]:.4f}"
            self.report(steps / self.training.steps, activity)
        except JobInterruptedError as error:
            reason = str(error)
        if self.ranks.any(reason is not None):
            if not saved or steps == self.training.steps:
                self._save()
            raise JobInterruptedError(reason or "another rank was interrupted", on_all_ranks=True)

    def _step(self, batches: Sequence[Tensor]) -> None:
        step = len(self.losses)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.training.rate(step)
        step_losses: list[float] = []
        # DeepSpeed computes the mean over all ranks and rounds, in which some ranks may have no batch of their own.
        scale = self.engine.gradient_accumulation_steps() * self.ranks.count / len(batches)
        for batch, round_size in self.ranks.shard(batches):
            loss = self.loss_of(self.engine, batch)
            round_losses = self.ranks.all_gather(loss.item())[:round_size]
            for value in round_losses:
                if not math.isfinite(value):
                    raise FloatingPointError(f"the loss became {value} at step {step + 1}")
            step_losses += round_losses
            weight = scale
            if self.ranks.rank >= round_size:
                weight = 0.0
            if weight != 1.0:
                loss = loss * weight
            self.engine.backward(loss)
            self.peak_gib = max(self.peak_gib, memory.allocated_gib())
            self.engine.step()
        self.peak_gib = max(self.peak_gib, memory.allocated_gib())
        self.losses.append(fmean(step_losses))
        slack = 1.0
        if self.after_step is not no_op:
            slack = 5.0  # a schedule that compresses between steps raises the loss on purpose
        _refuse_divergence(self.losses, slack)
        if self.ranks.any(self.engine.skipped_steps > 0):
            raise FloatingPointError(f"the gradient became infinite or NaN at step {step + 1}")

    def _evaluate(self) -> None:
        """Compute the held-out loss if it is due, and copy the weights if they are the best so far."""
        steps, held_out = len(self.losses), self.held_out
        if held_out is None or (steps % held_out.interval and steps < self.training.steps):
            return
        batch_losses: list[float] = []
        with torch.no_grad():
            for batch, round_size in self.ranks.shard(held_out.batches):
                batch_losses += self.ranks.all_gather(self.loss_of(self.engine, batch).item())[:round_size]
        sizes = [len(batch) for batch in held_out.batches]
        loss = sum(size * value for size, value in zip(sizes, batch_losses, strict=True)) / sum(sizes)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the held-out loss became {loss} after {steps} steps")
        if not self.held_losses or loss < min(self.held_losses):
            best = copy_of_trained(self.engine.module)
            if self.ranks.first:
                self.best = best
        self.held_losses.append(loss)

    def _patience_exhausted(self) -> bool:
        if self.held_out is None or not self.held_losses:
            return False
        since_best = len(self.held_losses) - 1 - self.held_losses.index(min(self.held_losses))
        return since_best >= self.held_out.patience

    def _save(self) -> None:
        """Write a checkpoint of this step. Every rank contributes its state, the first rank writes."""
        if self.checkpoints is None:
            return
        tensors = self._state()
        if not self.ranks.first:
            for _ in tensors:
                pass
            return
        course = {
            "training": _deciding_fields(self.training), "done": len(self.losses), "losses": self.losses,
            "held_losses": self.held_losses,
        }  # fmt: skip
        self.checkpoints.write(course, tensors)

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor that a resumed training needs, on the CPU, by its name in a checkpoint."""
        states = optimizer_state(self.engine, self.training.zero_stage)
        for name, parameter in trained_parameters(self.engine.module).items():
            for kind in ("master", *MOMENTS):
                yield f"{kind}.{name}", states.read(parameter, kind).detach().to("cpu", copy=True)
        saved_names = self.engine.module.state_dict().keys()
        for name, buffer in self.engine.module.named_buffers():
            if name in saved_names:
                yield f"buffer.{name}", buffer.detach().to("cpu", copy=True)
        yield from ((f"best.{name}", value) for name, value in self.best.items())


def _deciding_fields(training: Training) -> dict[str, Any]:
    """Return the fields that decide the result of a training; not those that divide it among ranks."""
    fields = asdict(training)
    del fields["accumulate"], fields["zero_stage"]
    return fields


def _read_checkpoint(checkpoints: Checkpoints | None, training: Training, ranks: Ranks) -> Checkpoint | None:
    """Return the checkpoint from which the first rank resumes; None on other ranks.

    Raises ValueError on every rank if the checkpoint belongs to a training with other settings.
    """
    checkpoint, problem = None, None
    if checkpoints is not None and ranks.first:
        checkpoint = checkpoints.read()
    if checkpoint is not None and checkpoint.course["training"] != _deciding_fields(training):
        problem = f"{checkpoints} belong to another training: {checkpoint.course['training']}"
    problem = ranks.broadcast_object(problem)
    if problem is not None:
        raise ValueError(problem)
    return checkpoint


@torch.no_grad()
def _restore(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy the weights and buffers of a checkpoint into a module, in place."""
    for kind, values in (
        ("master", dict(module.named_parameters())),
        ("buffer", dict(module.named_buffers())),
    ):
        for name in checkpoint.names(kind):
            values[name].copy_(checkpoint.tensor(f"{kind}.{name}"))


def _refuse_divergence(losses: list[float], slack: float) -> None:
    """Raise FloatingPointError if the loss has risen to more than three times its start plus `slack` nats."""
    if len(losses) < 2 * _RECENT_STEPS:
        return
    start, recent = fmean(losses[:_RECENT_STEPS]), fmean(losses[-_RECENT_STEPS:])
    if recent > 3 * start + slack:
        raise FloatingPointError(
            f"the loss rose from {start:.3g} to {recent:.3g} within {len(losses)} steps: lower learning_rate"
        )
