"""Settings and results of one training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

LossOf = Callable[[nn.Module, Tensor], Tensor]
"""Returns the mean loss of a module on a batch."""
AfterStep = Callable[[int], None]
"""Called after each update with the number of completed steps."""


def no_op(steps: int) -> None:
    """Do nothing after a step."""
    del steps


@dataclass(frozen=True)
class Training:
    """The settings of a training. Checkpoints store the fields that decide its result by their names."""

    learning_rate: float
    """The highest learning rate."""
    steps: int
    """The number of updates."""
    accumulate: int = 1
    """Batches per step (gradient accumulation)."""
    warmup: float = 0.1
    """The share of the steps over which the learning rate rises."""
    decay: Literal["cosine", "linear"] = "cosine"
    """The schedule by which the learning rate falls to zero after the warm-up."""
    clip: float = 1.0
    """The largest norm of the gradient."""
    zero_stage: int = 0
    """The state that ranks divide among them instead of copying it (Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054):
    1 optimizer states, 2 also gradients, 3 also weights."""

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0. It is never 0, since every step takes time."""
        warmup_steps = max(1, round(self.warmup * self.steps))
        if step < warmup_steps:
            return self.learning_rate * (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, self.steps - warmup_steps)
        factor = 1 - progress
        if self.decay == "cosine":
            factor = (1 + math.cos(math.pi * progress)) / 2
        return self.learning_rate * max(factor, 0.01)


@dataclass(frozen=True)
class HeldOut:
    """Early stopping by batches that are never trained on.

    Their mean loss is computed before the first step, after each `interval` steps and after the last step. Afterwards
    the model has the weights of the lowest loss.
    """

    batches: Sequence[Tensor]
    interval: int
    """Steps between two evaluations."""
    patience: int
    """The number of consecutive evaluations without a lower loss after which training ends."""


@dataclass(frozen=True)
class TrainingLog:
    """The result of a training besides its weights."""

    losses: tuple[float, ...]
    """The loss of each step."""
    peak_gib: float
    """The largest memory in use after a backward pass or update, of the GPU if there is one, else of this process."""
    seconds: float
    held_out: tuple[float, ...] = ()
    """The held-out losses."""
