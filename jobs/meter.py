"""Meter: what measures some metrics of an artifact."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jaxtyping import Float, Int
from torch import Tensor

from jobs.families import Task
from jobs.job import Materials, Measurement

if TYPE_CHECKING:
    from jobs.model import Model
    from jobs.models import Tokenizer

Reads = Literal["evaluation", "choices", "labelled"]


@dataclass(frozen=True)
class Subject:
    """What is measured: the artifact's folder as it would be shipped, beside the original it came from.

    fidelity: the share of the evaluation data to read, 1.0 for all.
    """

    folder: Path
    original: Path
    materials: Materials
    fidelity: float = 1.0

    @cached_property
    def model(self) -> Model:
        """The artifact, loaded from its files the way the torch runtime runs it."""
        from jobs.runtimes import on_torch

        return on_torch.load(self.folder)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        from jobs import models

        return models.tokenizer(self.folder)

    def evaluation(self) -> Int[Tensor, "windows tokens"]:
        """The windows to measure on: the first `fidelity` of them, so that all candidates see the same."""
        from jobs import data

        if self.materials.evaluation is None:
            raise ValueError("there is no text to measure on; give the study data.evaluation")
        windows = data.windows_for(self.materials.evaluation, self.original)
        return windows[: max(1, math.ceil(self.fidelity * len(windows)))]


@dataclass(frozen=True)
class Meter:
    """metrics: what `measure` produces for these tasks. reads: which of the study's data it needs.
    exclusive: nothing else may run on the machine meanwhile."""

    metrics: tuple[str, ...]
    tasks: tuple[Task, ...]
    measure: Callable[[Subject], Measurement]
    reads: Reads | None = None
    exclusive: bool = False


def mean_and_error(values: Float[Tensor, " items"]) -> tuple[float, float]:
    """The mean and its standard error, which is 0 for a single item: one says nothing about spread."""
    if len(values) < 2:
        return values.mean().item(), 0.0
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()
