"""Save and load the state of an optimizer, whatever its ZeRO stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jobs.training import ranks as gang

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What Adam keeps of each weight."""


def optimizer_state(engine: Any, zero_stage: int) -> Zero0State | Zero1And2State | Zero3State:
    """Access to what the optimizer of a stage holds of each weight: its fp32 `master` and Adam's moments, as whole
    tensors. All ranks must read and write together."""
    if zero_stage == 0:
        return Zero0State(engine)
    return Zero3State(engine) if zero_stage == 3 else Zero1And2State(engine)


@dataclass
class Zero0State:
    """Stage 0: every rank holds all, tensor by tensor."""

    engine: Any

    def begin(self, done: int) -> None:
        """Have moments, of so many steps. DeepSpeed makes them by a step of zeros, which Adam counts: its bias
        correction would then make the first update 0.74 of what it should be, and those after it too small as well."""
        for state in self.engine.basic_optimizer.state.values():
            state["step"].fill_(done)

    def read(self, parameter: nn.Parameter, kind: str) -> Tensor:
        return self._held(parameter, kind)

    def write(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        self._held(parameter, kind).copy_(value)

    def _held(self, parameter: nn.Parameter, kind: str) -> Tensor:
        optimizer = self.engine.optimizer
        for group, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for own, master in zip(group, masters, strict=True):
                if own is parameter:
                    held: Tensor = self.engine.basic_optimizer.state[master].get(kind, master).detach()
                    return held
        raise LookupError("a trained parameter is unknown to its optimizer")


@dataclass
class Zero1And2State:
    """Stages 1 and 2: every rank holds a slice of all masters in a row."""

    engine: Any

    def begin(self, done: int) -> None:
        if done:  # else the first step makes them
            self._make(self.engine.optimizer.single_partition_of_fp32_groups, done)
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _make(self, slices: Sequence[Tensor], done: int) -> None:
        for slice_ in slices:
            self.engine.basic_optimizer.state[slice_] = {
                "step": torch.full((), done, dtype=torch.float32, device=slice_.device),
                **{kind: torch.zeros_like(slice_) for kind in MOMENTS},
            }

    def read(self, parameter: nn.Parameter, kind: str) -> Tensor:
        from deepspeed import utils

        found: Tensor = (
            utils.safe_get_full_fp32_param(parameter)
            if kind == "master"
            else utils.safe_get_full_optimizer_state(parameter, kind)
        )
        return found

    def write(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        from deepspeed import utils

        if kind == "master":
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, kind)


@dataclass
class Zero3State(Zero1And2State):
    """Stage 3: every rank holds a slice of each master, and of each weight."""

    def begin(self, done: int) -> None:
        if done:
            self._make(self.engine.optimizer.fp32_partitioned_groups_flat, done)

    def write(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        from deepspeed import utils

        # The last slice is filled up with zeros.
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # DeepSpeed's
        padded = nn.functional.pad(value.flatten(), (0, size * gang.here().count - value.numel()))
        own = padded[size * gang.here().rank :][:size]
        if kind == "master":
            utils.safe_set_local_fp32_param(parameter, own)
        else:
            utils.safe_set_local_optimizer_state(parameter, own, kind)
