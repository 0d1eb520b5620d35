"""Engine: the one door to DeepSpeed. Trains a module in bf16 with fp32 master weights, ZeRO stages 0 to 3.

One rank: the process group lives inside the process, without a launcher, a port or a file.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn

from jobs import memory
from jobs.context import Report

_BUCKET = 5_000_000
"""Elements of a gradient bucket: DeepSpeed's default of 5e8 would allocate gigabytes for one rank."""
_MARKER = "checkpoint.json"
_BEST = "best.safetensors"
_RECENT = 4
"""Steps whose mean loss is compared with the start's: single steps are too noisy to judge by."""


LossOf = Callable[[nn.Module, Tensor], Tensor]
AfterStep = Callable[[int], None]
"""Called after each update with the number of steps done."""


def nothing(done: int) -> None:
    del done


@dataclass(frozen=True)
class Training:
    """How to train. accumulate: batches per step. warmup: the share of steps over which the rate rises.

    decay: how the rate then falls to zero. clip: the largest norm of the gradient.
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
class Checkpoints:
    """Where a training leaves what it needs to go on after an interruption, after each `every` steps.

    folder: this training's own; it must outlive the attempt, and the caller removes it. DeepSpeed reads its
    files back as pickles, which can run code: nobody else may write there. A checkpoint holds 14 bytes for
    each trained weight, and the last one stays until the next is complete.
    """

    folder: Path
    every: int


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
    after_step: AfterStep = nothing,
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
    the same result: `batches` must be the same ones from the start, and `after_step` is called once with
    the number of steps that are done already.
    """
    started = time.perf_counter()
    hooks = _hooks(module)
    course = _Course(loss_of, training, report, after_step, held_out, checkpoints)
    with _single_rank():
        engine = _start(module, training)
        try:
            course.run(engine, iter(batches))
        finally:
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
class _Course:
    """One training and how far it is. best: the trained weights at the lowest held-out loss, on the CPU."""

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

    def run(self, engine: Any, batches: Iterator[Tensor]) -> None:
        """Take all steps, or those left."""
        self._resume(engine)
        if self.losses:
            for _ in range(len(self.losses) * self.training.accumulate):
                next(batches)
            self.after_step(len(self.losses))
        else:
            self._judge(engine)
        while len(self.losses) < self.training.steps and not self._gave_up():
            self._step(engine, batches)
            done = len(self.losses)
            self.after_step(done)
            self._judge(engine)
            self._save(engine)
            share = done / self.training.steps
            self.report(share, f"step {done} of {self.training.steps}, loss {self.losses[-1]:.4f}")

    def _step(self, engine: Any, batches: Iterator[Tensor]) -> None:
        step = len(self.losses)
        for group in engine.optimizer.param_groups:
            group["lr"] = self.training.rate(step)
        parts = []
        for _ in range(self.training.accumulate):
            loss = self.loss_of(engine, next(batches))
            parts.append(loss.item())
            if not math.isfinite(parts[-1]):
                raise FloatingPointError(f"the loss became {parts[-1]} at step {step + 1}")
            engine.backward(loss)
            self.peak_gib = max(self.peak_gib, memory.held_gib())
            engine.step()
        self.peak_gib = max(self.peak_gib, memory.held_gib())
        self.losses.append(fmean(parts))
        # What changes the model between steps raises the loss on purpose.
        _refuse_divergence(self.losses, slack=1.0 if self.after_step is nothing else 5.0)
        if engine.skipped_steps:
            raise FloatingPointError(f"the gradient became infinite or NaN at step {step + 1}")

    def _judge(self, engine: Any) -> None:
        """Take the held-out loss, if it is time, and keep the weights if they are the best so far."""
        done, held = len(self.losses), self.held_out
        if held is None or (done % held.every and done < self.training.steps):
            return
        with torch.no_grad():
            sums = [len(batch) * self.loss_of(engine, batch).item() for batch in held.batches]
        loss = sum(sums) / sum(len(batch) for batch in held.batches)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the held-out loss became {loss} after {done} steps")
        if not self.held_losses or loss < min(self.held_losses):
            self.best = _trained_values(engine.module)
        self.held_losses.append(loss)

    def _gave_up(self) -> bool:
        if self.held_out is None or not self.held_losses:
            return False
        since_best = len(self.held_losses) - 1 - self.held_losses.index(min(self.held_losses))
        return since_best >= self.held_out.patience

    def _save(self, engine: Any) -> None:
        """Write a checkpoint, if it is time. It counts from the moment that the marker names it."""
        done, places = len(self.losses), self.checkpoints
        if places is None or done % places.every or done == self.training.steps:
            return
        before = self._marker()
        places.folder.mkdir(parents=True, exist_ok=True)
        # A name of its own: an attempt that was given up may still be writing beside this one.
        folder = Path(tempfile.mkdtemp(dir=places.folder, prefix=f"step-{done}-"))
        engine.save_checkpoint(
            str(places.folder), folder.name, save_latest=False, exclude_frozen_parameters=True
        )
        save_file(self.best, folder / _BEST)
        marker = {
            "training": asdict(self.training), "folder": folder.name, "losses": self.losses,
            "held_losses": self.held_losses,
        }  # fmt: skip
        beside = folder / _MARKER
        beside.write_text(json.dumps(marker))
        os.replace(beside, places.folder / _MARKER)
        if before is not None:
            shutil.rmtree(places.folder / before["folder"], ignore_errors=True)

    def _resume(self, engine: Any) -> None:
        """Put everything back to where the last checkpoint was written, if there is one."""
        marker = self._marker()
        if marker is None or self.checkpoints is None:
            return
        folder = self.checkpoints.folder
        if marker["training"] != asdict(self.training):
            raise ValueError(f"{folder} holds a checkpoint of another training: {marker['training']}")
        engine.load_checkpoint(str(folder), marker["folder"], load_module_strict=False)
        self.best = load_file(folder / marker["folder"] / _BEST)
        self.losses, self.held_losses = marker["losses"], marker["held_losses"]

    def _marker(self) -> dict[str, Any] | None:
        if self.checkpoints is None or not (self.checkpoints.folder / _MARKER).is_file():
            return None
        marker: dict[str, Any] = json.loads((self.checkpoints.folder / _MARKER).read_text())
        return marker


def _refuse_divergence(losses: list[float], slack: float) -> None:
    """Raise FloatingPointError where the loss has risen to three times what it was, and by `slack` nats besides."""
    if len(losses) < 2 * _RECENT:
        return
    start, now = fmean(losses[:_RECENT]), fmean(losses[-_RECENT:])
    if now > 3 * start + slack:
        raise FloatingPointError(
            f"the loss rose from {start:.3g} to {now:.3g} within {len(losses)} steps: lower learning_rate"
        )


def _start(module: nn.Module, training: Training) -> Any:
    """The DeepSpeed engine of a module."""
    if not torch.cuda.is_available():
        # Without it DeepSpeed warns that it found no accelerator. It is read when deepspeed is imported.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # takes seconds: only who trains pays them

    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not distributed.is_initialized():
        # Kept for as long as the process lives, since DeepSpeed keeps references to its groups.
        gpu = torch.cuda.is_available()
        store = distributed.HashStore()  # type: ignore[attr-defined]  # exported, but not to mypy
        distributed.init_process_group(
            "nccl" if gpu else "gloo",
            store=store,
            rank=0,
            world_size=1,
            # Not told, NCCL warns at each barrier that it guesses.
            device_id=torch.device("cuda", torch.cuda.current_device()) if gpu else None,
        )
        # The shared-memory op serves ranks that talk to each other; one rank need not compile it.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=trained, config=_config(training), dist_init_required=False
    )
    if training.zero_stage == 0 and distributed.get_world_size() == 1:
        # All gradients would be copied to one piece and back, to be added to nobody's.
        engine.enable_backward_allreduce = False
    # At stage 0 DeepSpeed makes the optimizer's states by a step of zeros, which Adam counts: its bias correction
    # would then make the first update 0.74 of what it should be, and those after it too small as well.
    for state in engine.basic_optimizer.state.values():
        state["step"].zero_()
    memory.release()
    return engine


def _config(training: Training) -> dict[str, Any]:
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
        "gradient_accumulation_steps": training.accumulate,
        "gradient_clipping": training.clip,
        "optimizer": {"type": "AdamW", "params": adam},
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        "steps_per_print": 1_000_000_000,
    }


@contextmanager
def _single_rank() -> Iterator[None]:
    """What a launcher would have set, for as long as DeepSpeed reads it."""
    told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _trained_values(module: nn.Module) -> dict[str, Tensor]:
    """Copies, on the CPU, of the parameters that are trained, by name."""
    import deepspeed

    trained = {name: one for name, one in module.named_parameters() if one.requires_grad}
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
