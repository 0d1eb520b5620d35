"""Read and write the state of an optimizer as whole tensors, at any ZeRO stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jobs.training import ranks as rank_group

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's state of each weight: the moving averages of its gradient and of the squared gradient."""


def optimizer_state(engine: Any, zero_stage: int) -> Zero0State | Zero1And2State | Zero3State:
    """Return access to an optimizer's fp32 `master` and Adam's moments of each weight, as whole tensors.

    Call `read` and `write` on all ranks together.
    """
    if zero_stage == 0:
        return Zero0State(engine)
    if zero_stage == 3:
        return Zero3State(engine)
    return Zero1And2State(engine)


@dataclass
class Zero0State:
    """Stage 0: every rank has the whole state, tensor by tensor."""

    engine: Any

    def begin(self, steps: int) -> None:
        """Set the number of completed steps.

        DeepSpeed creates the moments by a step of zeros, which Adam counts. Its bias correction would then reduce the
        first update to 0.74 of its size, and later ones too.
        """
        for state in self.engine.basic_optimizer.state.values():
            state["step"].fill_(steps)

    def read(self, parameter: nn.Parameter, kind: str) -> Tensor:
        return self._tensor(parameter, kind)

    def write(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        self._tensor(parameter, kind).copy_(value)

    def _tensor(self, parameter: nn.Parameter, kind: str) -> Tensor:
        optimizer = self.engine.optimizer
        for group, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for trained, master in zip(group, masters, strict=True):
                if trained is parameter:
                    tensor: Tensor = self.engine.basic_optimizer.state[master].get(kind, master).detach()
                    return tensor
        raise LookupError("a trained parameter is unknown to its optimizer")


@dataclass
class Zero1And2State:
    """Stages 1 and 2: every rank has a slice of the concatenated masters."""

    engine: Any

    def begin(self, steps: int) -> None:
        if steps:  # otherwise the first step creates the moments
            self._create(self.engine.optimizer.single_partition_of_fp32_groups, steps)
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _create(self, slices: Sequence[Tensor], steps: int) -> None:
        for slice_ in slices:
            self.engine.basic_optimizer.state[slice_] = {
                "step": torch.full((), steps, dtype=torch.float32, device=slice_.device),
                **{kind: torch.zeros_like(slice_) for kind in MOMENTS},
            }

    def read(self, parameter: nn.Parameter, kind: str) -> Tensor:
        from deepspeed import utils

        if kind == "master":
            tensor: Tensor = utils.safe_get_full_fp32_param(parameter)
        else:
            tensor = utils.safe_get_full_optimizer_state(parameter, kind)
        return tensor

    def write(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        from deepspeed import utils

        if kind == "master":
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, kind)


@dataclass
class Zero3State(Zero1And2State):
    """Stage 3: every rank has a slice of each master and of each weight."""

    def begin(self, steps: int) -> None:
        if steps:
            self._create(self.engine.optimizer.fp32_partitioned_groups_flat, steps)

    def write(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        from deepspeed import utils

        # The last slice is padded with zeros.
        ranks = rank_group.here()
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # DeepSpeed's
        padded = nn.functional.pad(value.flatten(), (0, size * ranks.count - value.numel()))
        local = padded[size * ranks.rank :][:size]
        if kind == "master":
            utils.safe_set_local_fp32_param(parameter, local)
        else:
            utils.safe_set_local_optimizer_state(parameter, local, kind)
