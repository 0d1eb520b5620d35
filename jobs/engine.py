"""Engine: the one door to DeepSpeed. Trains a module in bf16 with fp32 master weights, ZeRO stages 0 to 3.

One rank: the process group lives inside the process, without a launcher, a port or a file.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn

from jobs import memory
from jobs.context import Report

_BUCKET = 5_000_000
"""Elements of a gradient bucket: DeepSpeed's default of 5e8 would allocate gigabytes for one rank."""
_RECENT = 4
"""Steps whose mean loss is compared with the start's: single steps are too noisy to judge by."""


AfterStep = Callable[[int], None]
"""Called after each update with the number of steps done."""


def _nothing(done: int) -> None:
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
class TrainingLog:
    """losses: one a step. peak_gib: the most memory held at the end of a step's backward pass or update,
    of the device where there is one, else of this process."""

    losses: tuple[float, ...]
    peak_gib: float
    seconds: float


def train(
    module: nn.Module,
    batches: Iterable[Tensor],
    loss_of: Callable[[nn.Module, Tensor], Tensor],
    training: Training,
    report: Report,
    *,
    after_step: AfterStep = _nothing,
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
    """
    started = time.perf_counter()
    hooks = _hooks(module)
    with _single_rank():
        engine = _start(module, training)
        try:
            losses, peak = _run(engine, iter(batches), loss_of, training, report, after_step)
        finally:
            _stop(engine, module)
            _restore_hooks(hooks)
    return TrainingLog(tuple(losses), peak, time.perf_counter() - started)


def _run(
    engine: Any,
    batches: Iterator[Tensor],
    loss_of: Callable[[nn.Module, Tensor], Tensor],
    training: Training,
    report: Report,
    after_step: AfterStep,
) -> tuple[list[float], float]:
    """Take all steps; the loss of each and the peak of memory."""
    losses: list[float] = []
    peak = 0.0
    for step in range(training.steps):
        for group in engine.optimizer.param_groups:
            group["lr"] = training.rate(step)
        parts = []
        for _ in range(training.accumulate):
            loss = loss_of(engine, next(batches))
            parts.append(loss.item())
            if not math.isfinite(parts[-1]):
                raise FloatingPointError(f"the loss became {parts[-1]} at step {step + 1}")
            engine.backward(loss)
            peak = max(peak, memory.held_gib())
            engine.step()
        peak = max(peak, memory.held_gib())
        losses.append(fmean(parts))
        _refuse_divergence(losses)
        if engine.skipped_steps:
            raise FloatingPointError(f"the gradient became infinite or NaN at step {step + 1}")
        after_step(step + 1)
        report((step + 1) / training.steps, f"step {step + 1} of {training.steps}, loss {losses[-1]:.4f}")
    return losses, peak


def _refuse_divergence(losses: list[float]) -> None:
    if len(losses) < 2 * _RECENT:
        return
    start, now = fmean(losses[:_RECENT]), fmean(losses[-_RECENT:])
    if now > 3 * start + 1.0:
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
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        store = distributed.HashStore()  # type: ignore[attr-defined]  # exported, but not to mypy
        distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        # The shared-memory op serves ranks that talk to each other; one rank need not compile it.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=trained, config=_config(training), dist_init_required=False
    )
    memory.release()  # DeepSpeed made its optimizer states with a step of zeros
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
