"""Engine: the one door to DeepSpeed. Trains a module in bf16 with fp32 master weights, ZeRO stages 0 to 3.

Any number of ranks (`jobs.training.ranks`) train as one would: of each step's batches each takes its part.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn

from jobs.models import memory
from jobs.progress import JobInterruptedError, Report
from jobs.training import ranks as gang
from jobs.training.checkpoints import Checkpoint, Checkpoints
from jobs.training.optimizer_state import MOMENTS, optimizer_state
from jobs.training.ranks import Ranks

_BUCKET = 5_000_000
"""Elements of a gradient bucket: DeepSpeed's default of 5e8 would allocate gigabytes for one rank."""
_RECENT = 4
"""Steps whose mean loss is compared with the start's: single steps are too noisy to judge by."""


LossOf = Callable[[nn.Module, Tensor], Tensor]
AfterStep = Callable[[int], None]
"""Called after each update with the number of steps done."""


def no_op(done: int) -> None:
    del done


@dataclass(frozen=True)
class Training:
    """How to train. accumulate: batches per step. warmup: the share of steps over which the rate rises.

    decay: how the rate then falls to zero. clip: the largest norm of the gradient.
    zero_stage: what ranks share out among them instead of each holding it (Rajbhandari et al. 2020, ZeRO,
        arXiv:1910.02054): 1 optimizer states, 2 gradients too, 3 the weights too.
    """

    learning_rate: float
    steps: int
    accumulate: int = 1
    warmup: float = 0.1
    decay: Literal["cosine", "linear"] = "cosine"
    clip: float = 1.0
    zero_stage: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0. It is never 0: each step is paid for."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        done = (step - rising) / max(1, self.steps - rising)
        left = (1 + math.cos(math.pi * done)) / 2 if self.decay == "cosine" else 1 - done
        return self.learning_rate * max(left, 0.01)


@dataclass(frozen=True)
class HeldOut:
    """Batches never trained on, whose mean loss is taken before the first step, after each `every` steps and
    after the last. Training ends when it has not fallen `patience` times in a row; the weights of the lowest
    are restored."""

    batches: Sequence[Tensor]
    every: int
    patience: int


@dataclass(frozen=True)
class TrainingLog:
    """losses: one a step. peak_gib: the most memory held at the end of a step's backward pass or update,
    of the device where there is one, else of this process. held_out: as often as it was taken."""

    losses: tuple[float, ...]
    peak_gib: float
    seconds: float
    held_out: tuple[float, ...] = ()


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
    """Train, in place, the parameters of a bf16 module that require gradients.

    `loss_of(module, batch)` must call the module it is given, which is the engine's, and return a mean.
    The module keeps its mode: one in eval mode trains without dropout. Afterwards its parameters are plain
    ones again, as shared between names as before, and none requires gradients.
    Raises FloatingPointError as soon as the training diverges.

    `after_step(done)` is called after each update with the number of steps done, for what follows a
    schedule (a temperature, a share of masked weights), which the forward pass reads from attributes and
    buffers. It must not write parameters: the optimizer holds fp32 masters of them, in slices that depend
    on the ZeRO stage, and its next update would write those over it. What is to hold of the weights
    (masked, rounded, of low rank) belongs into the forward pass: by
    `torch.nn.utils.parametrize.register_parametrization(linear, "weight", part)` with `part` a module that
    maps the trained weight to the one to compute with, and `remove_parametrizations(linear, "weight")`
    afterwards, which leaves the mapped one. `weight * mask` has no gradient where the mask is zero, so what
    is masked stays as it is, at every stage.

    With `checkpoints`, the same call made again after an interruption goes on from the last checkpoint, to
    the same result: `batches` must be the same rows in the same order, however they are cut, and `after_step` is
    called once with the number of steps that are done already. Neither the ranks nor the stage need be the same.
    Where `report` raises Interrupted, on whichever rank, a checkpoint of that very step is written first, and
    every rank raises it.

    Several ranks call this with the same arguments; they start from the first one's weights and buffers, and meet
    at each loss. All get the same losses, and full parameters; `best` weights are restored on the first alone.
    """
    started = time.perf_counter()
    hooks = _hooks(module)
    with _launched():
        ranks = gang.join()
        checkpoint = _found(checkpoints, training, ranks)
        if checkpoint is not None:
            _restore(module, checkpoint)
        ranks.share([*module.parameters(), *module.buffers()])
        engine = _start(module, training, ranks)
        course = TrainingRun(engine, ranks, loss_of, training, report, after_step, held_out, checkpoints)
        together = True
        try:
            course.resume(checkpoint)
            course.run(iter(batches))
        except (FloatingPointError, JobInterruptedError):
            raise
        except BaseException:
            together = ranks.count == 1  # others go on, and wait for this one elsewhere
            raise
        finally:
            if together:
                _stop(engine, module)
                _restore_hooks(hooks)
    if course.best:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name in course.best:
                    parameter.copy_(course.best[name])
    seconds = time.perf_counter() - started
    return TrainingLog(tuple(course.losses), course.peak_gib, seconds, tuple(course.held_losses))


@dataclass
class TrainingRun:
    """One training and how far it is. best: the trained weights at the lowest held-out loss, on the CPU, of the first
    rank alone."""

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
    peak_gib: float = 0.0

    def run(self, batches: Iterator[Tensor]) -> None:
        """Take all steps, or those left."""
        if self.losses:
            for _ in range(len(self.losses) * self.training.accumulate):
                next(batches)
            self.after_step(len(self.losses))
        else:
            self._judge()
        while len(self.losses) < self.training.steps and not self._gave_up():
            self._step(list(islice(batches, self.training.accumulate)))
            done = len(self.losses)
            self.after_step(done)
            self._judge()
            due = self.checkpoints is not None and done % self.checkpoints.every == 0
            if due and done < self.training.steps:
                self._save()
            self._report(saved=due)

    def _report(self, saved: bool) -> None:
        done, why = len(self.losses), None
        try:
            told = f"step {done} of {self.training.steps}, loss {self.losses[-1]:.4f}"
            self.report(done / self.training.steps, told)
        except JobInterruptedError as error:
            why = str(error)
        if self.ranks.any(why is not None):
            if not saved or done == self.training.steps:
                self._save()
            raise JobInterruptedError(why or "another rank was interrupted", together=True)

    def _step(self, batches: Sequence[Tensor]) -> None:
        step = len(self.losses)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.training.rate(step)
        parts: list[float] = []
        # DeepSpeed takes the mean over all ranks and turns, of which some may have nothing to add.
        scale = self.engine.gradient_accumulation_steps() * self.ranks.count / len(batches)
        for batch, others in self.ranks.shard(batches):
            loss = self.loss_of(self.engine, batch)
            found = self.ranks.all_gather(loss.item())[:others]
            for one in found:
                if not math.isfinite(one):
                    raise FloatingPointError(f"the loss became {one} at step {step + 1}")
            parts += found
            weight = scale if self.ranks.rank < others else 0.0
            self.engine.backward(loss if weight == 1.0 else loss * weight)
            self.peak_gib = max(self.peak_gib, memory.allocated_gib())
            self.engine.step()
        self.peak_gib = max(self.peak_gib, memory.allocated_gib())
        self.losses.append(fmean(parts))
        # What changes the model between steps raises the loss on purpose.
        _refuse_divergence(self.losses, slack=1.0 if self.after_step is no_op else 5.0)
        if self.ranks.any(self.engine.skipped_steps > 0):
            raise FloatingPointError(f"the gradient became infinite or NaN at step {step + 1}")

    def _judge(self) -> None:
        """Take the held-out loss, if it is time, and keep the weights if they are the best so far."""
        done, held = len(self.losses), self.held_out
        if held is None or (done % held.every and done < self.training.steps):
            return
        found: list[float] = []
        with torch.no_grad():
            for batch, others in self.ranks.shard(held.batches):
                found += self.ranks.all_gather(self.loss_of(self.engine, batch).item())[:others]
        sizes = [len(batch) for batch in held.batches]
        loss = sum(size * one for size, one in zip(sizes, found, strict=True)) / sum(sizes)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the held-out loss became {loss} after {done} steps")
        if not self.held_losses or loss < min(self.held_losses):
            best = _trained_values(self.engine.module)
            self.best = best if self.ranks.first else {}
        self.held_losses.append(loss)

    def _gave_up(self) -> bool:
        if self.held_out is None or not self.held_losses:
            return False
        since_best = len(self.held_losses) - 1 - self.held_losses.index(min(self.held_losses))
        return since_best >= self.held_out.patience

    def _save(self) -> None:
        """Write a checkpoint of this step: each rank gives what it has, the first writes."""
        if self.checkpoints is None:
            return
        tensors = self._state()
        if not self.ranks.first:
            for _ in tensors:
                pass
            return
        course = {
            "training": _deciding(self.training), "done": len(self.losses), "losses": self.losses,
            "held_losses": self.held_losses,
        }  # fmt: skip
        self.checkpoints.write(course, tensors)

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        """All that is to go on from, one tensor after the other, on the CPU."""
        states = optimizer_state(self.engine, self.training.zero_stage)
        for name, parameter in _trained(self.engine.module).items():
            for kind in ("master", *MOMENTS):
                yield f"{kind}.{name}", states.read(parameter, kind).detach().to("cpu", copy=True)
        held = self.engine.module.state_dict()
        for name, buffer in self.engine.module.named_buffers():
            if name in held:
                yield f"buffer.{name}", buffer.detach().to("cpu", copy=True)
        yield from ((f"best.{name}", value) for name, value in self.best.items())

    def resume(self, checkpoint: Checkpoint | None) -> None:
        """Put the optimizer and the course to where the checkpoint of the first rank was written, if there is one."""
        course = self.ranks.broadcast_object(None if checkpoint is None else checkpoint.course)
        if course is None:
            return
        states = optimizer_state(self.engine, self.training.zero_stage)
        states.begin(course["done"])
        for name, parameter in _trained(self.engine.module).items():
            for kind in ("master", *MOMENTS):
                value = torch.empty(_shape(parameter), dtype=torch.float32, device=self.engine.device)
                if checkpoint is not None:
                    value.copy_(checkpoint.tensor(f"{kind}.{name}"))
                self.ranks.share([value])
                states.write(parameter, kind, value)
        if checkpoint is not None:
            self.best = {name: checkpoint.tensor(f"best.{name}") for name in checkpoint.names("best")}
        self.losses, self.held_losses = course["losses"], course["held_losses"]


def _deciding(training: Training) -> dict[str, Any]:
    """What makes one training another one: not how it is shared out."""
    told = asdict(training)
    del told["accumulate"], told["zero_stage"]
    return told


def _found(checkpoints: Checkpoints | None, training: Training, ranks: Ranks) -> Checkpoint | None:
    """What the first rank finds to go on from. ValueError, on every rank, where it is of another training."""
    found = None if checkpoints is None or not ranks.first else checkpoints.read()
    other = None
    if found is not None and found.course["training"] != _deciding(training):
        other = f"{checkpoints} hold one of another training: {found.course['training']}"
    other = ranks.broadcast_object(other)
    if other is not None:
        raise ValueError(other)
    return found


@torch.no_grad()
def _restore(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Give a module, in place, the weights and buffers of a checkpoint."""
    for kind, values in (
        ("master", dict(module.named_parameters())),
        ("buffer", dict(module.named_buffers())),
    ):
        for name in checkpoint.names(kind):
            values[name].copy_(checkpoint.tensor(f"{kind}.{name}"))


def _refuse_divergence(losses: list[float], slack: float) -> None:
    """Raise FloatingPointError where the loss has risen to three times what it was, and by `slack` nats besides."""
    if len(losses) < 2 * _RECENT:
        return
    start, now = fmean(losses[:_RECENT]), fmean(losses[-_RECENT:])
    if now > 3 * start + slack:
        raise FloatingPointError(
            f"the loss rose from {start:.3g} to {now:.3g} within {len(losses)} steps: lower learning_rate"
        )


def _start(module: nn.Module, training: Training, ranks: Ranks) -> Any:
    """The DeepSpeed engine of a module."""
    if not torch.cuda.is_available():
        # Without it DeepSpeed warns that it found no accelerator. It is read when deepspeed is imported.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # takes seconds: only who trains pays them

    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    # The shared-memory op saves ranks of one machine little, and several that compile it at once have aborted.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=trained, config=_config(training, ranks), dist_init_required=False
    )
    if training.zero_stage == 0 and ranks.count == 1:
        # All gradients would be copied to one piece and back, to be added to nobody's.
        engine.enable_backward_allreduce = False
    optimizer_state(engine, training.zero_stage).begin(0)
    memory.release()
    return engine


def _config(training: Training, ranks: Ranks) -> dict[str, Any]:
    """DeepSpeed's configuration. torch's own fused AdamW needs no compiler and no temporary copies."""
    adam = {
        "torch_adam": True, "fused": True, "lr": training.learning_rate, "betas": [0.9, 0.95],
        "weight_decay": 0.0,
    }  # fmt: skip
    zero = {
        "stage": training.zero_stage, "overlap_comm": False, "reduce_bucket_size": _BUCKET,
        "allgather_bucket_size": _BUCKET, "stage3_prefetch_bucket_size": _BUCKET,
    }  # fmt: skip
    return {
        "train_micro_batch_size_per_gpu": 1,  # batches are cut by the caller; DeepSpeed only counts them
        "gradient_accumulation_steps": math.ceil(training.accumulate / ranks.count),
        "gradient_clipping": training.clip,
        "optimizer": {"type": "AdamW", "params": adam},
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        "steps_per_print": 1_000_000_000,
    }


@contextmanager
def _launched() -> Iterator[None]:
    """What a launcher sets, for as long as DeepSpeed reads it; it takes the device of the local rank's number."""
    device = torch.cuda.current_device() if torch.cuda.is_available() else 0
    told = {"RANK": "0", "WORLD_SIZE": "1", **os.environ, "LOCAL_RANK": str(device)}
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({name: told[name] for name in names})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: one for name, one in module.named_parameters() if one.requires_grad}


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Of a parameter that DeepSpeed may have taken apart."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _trained_values(module: nn.Module) -> dict[str, Tensor]:
    """Copies, on the CPU, of the parameters that are trained, by name."""
    import deepspeed

    trained = _trained(module)
    with deepspeed.zero.GatheredParameters(list(trained.values()), modifier_rank=None):
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in trained.items()}


def _stop(engine: Any, module: nn.Module) -> None:
    """Take DeepSpeed off the module again and free what it held."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters()), modifier_rank=None):
        values = {id(parameter): parameter.detach().clone() for parameter in module.parameters()}
    engine.destroy()
    _make_plain(module, values)
    memory.release()


def _make_plain(module: nn.Module, values: dict[int, Tensor]) -> None:
    """Give a module new parameters of these values (by the id of the old ones): the old ones carry
    DeepSpeed's attributes and, at stage 3, are empty."""
    fresh = {key: nn.Parameter(value, requires_grad=False) for key, value in values.items()}
    for part in module.modules():
        part._parameters = {
            name: None if parameter is None else fresh[id(parameter)]
            for name, parameter in part._parameters.items()
        }


_Hooks = dict[nn.Module, dict[str, dict[int, object]]]


def _hooks(module: nn.Module) -> _Hooks:
    """The hooks of each submodule, by the attribute that holds them."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {part: {kind: dict(getattr(part, kind)) for kind in kinds} for part in module.modules()}


def _restore_hooks(before: _Hooks) -> None:
    """Take off the hooks that DeepSpeed leaves behind; they would keep its engine in memory."""
    for part, kinds in before.items():
        for kind, hooks in kinds.items():
            present = getattr(part, kind)
            for key in [key for key in present if key not in hooks]:
                del present[key]
