"""Build a DeepSpeed engine around a module, and remove it again. This folder is the one door to DeepSpeed.

The engine trains in bf16 with fp32 master weights, at ZeRO stages 0 to 3.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from jobs.models import memory
from jobs.training.optimizer_state import optimizer_state
from jobs.training.ranks import Ranks
from jobs.training.settings import Training

_BUCKET_ELEMENTS = 5_000_000
"""Elements of a gradient bucket. DeepSpeed's default of 5e8 would allocate gigabytes for one rank."""


def start_engine(module: nn.Module, training: Training, ranks: Ranks) -> Any:
    """Return a DeepSpeed engine that trains the parameters of a module that require gradients."""
    if not torch.cuda.is_available():
        # Otherwise DeepSpeed warns that it has no accelerator. It reads the variable at its import.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # takes seconds, which only trainings need to spend

    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    # The shared-memory op saves little between ranks of one machine, and has aborted when several ranks compiled it.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=parameters, config=_config(training, ranks), dist_init_required=False
    )
    if training.zero_stage == 0 and ranks.count == 1:
        # It would copy all gradients into one buffer and back, for an addition without a second summand.
        engine.enable_backward_allreduce = False
    optimizer_state(engine, training.zero_stage).begin(0)
    memory.release()
    return engine


def stop_engine(engine: Any, module: nn.Module) -> None:
    """Free the memory of an engine, and give its module plain parameters that require no gradients.

    Call it on all ranks. Parameters that were shared between names stay shared.
    """
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters()), modifier_rank=None):
        values = {id(parameter): parameter.detach().clone() for parameter in module.parameters()}
    engine.destroy()
    _replace_parameters(module, values)
    memory.release()


@contextmanager
def launcher_environment() -> Iterator[None]:
    """Set the variables of a launcher, which DeepSpeed reads. It uses the device whose number is the local rank."""
    device = 0
    if torch.cuda.is_available():
        device = torch.cuda.current_device()
    values = {"RANK": "0", "WORLD_SIZE": "1", **os.environ, "LOCAL_RANK": str(device)}
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    previous = {name: os.environ.get(name) for name in names}
    os.environ.update({name: values[name] for name in names})
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of a parameter. DeepSpeed may have divided the parameter itself among ranks."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def copy_of_trained(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of the trained parameters on the CPU, by name. Call it on all ranks."""
    import deepspeed

    trained = trained_parameters(module)
    with deepspeed.zero.GatheredParameters(list(trained.values()), modifier_rank=None):
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in trained.items()}


Hooks = dict[nn.Module, dict[str, dict[int, object]]]
"""The hooks of each submodule, by the attribute that contains them."""


def hooks_of(module: nn.Module) -> Hooks:
    """Return the hooks that are registered now."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks: Hooks = {}
    for part in module.modules():
        hooks[part] = {kind: dict(getattr(part, kind)) for kind in kinds}
    return hooks


def restore_hooks(previous: Hooks) -> None:
    """Remove the hooks that DeepSpeed does not remove, which would keep its engine in memory."""
    for part, kinds in previous.items():
        for kind, hooks in kinds.items():
            registered = getattr(part, kind)
            for key in [key for key in registered if key not in hooks]:
                del registered[key]


def _config(training: Training, ranks: Ranks) -> dict[str, Any]:
    """Return DeepSpeed's configuration. torch's own fused AdamW needs no compiler and makes no temporary copies."""
    adam = {
        "torch_adam": True, "fused": True, "lr": training.learning_rate, "betas": [0.9, 0.95],
        "weight_decay": 0.0,
    }  # fmt: skip
    zero = {
        "stage": training.zero_stage, "overlap_comm": False, "reduce_bucket_size": _BUCKET_ELEMENTS,
        "allgather_bucket_size": _BUCKET_ELEMENTS, "stage3_prefetch_bucket_size": _BUCKET_ELEMENTS,
    }  # fmt: skip
    return {
        "train_micro_batch_size_per_gpu": 1,  # the caller divides batches; DeepSpeed only counts them
        "gradient_accumulation_steps": math.ceil(training.accumulate / ranks.count),
        "gradient_clipping": training.clip,
        "optimizer": {"type": "AdamW", "params": adam},
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        "steps_per_print": 1_000_000_000,
    }


def _replace_parameters(module: nn.Module, values: dict[int, Tensor]) -> None:
    """Give a module new parameters of these values, by the id of the old ones, which have attributes of DeepSpeed and
    are empty at stage 3."""
    fresh = {key: nn.Parameter(value, requires_grad=False) for key, value in values.items()}
    for part in module.modules():
        parameters: dict[str, nn.Parameter | None] = {}
        for name, parameter in part._parameters.items():
            parameters[name] = None
            if parameter is not None:
                parameters[name] = fresh[id(parameter)]
        part._parameters = parameters
