"""Meter: what measures some metrics of an artifact."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from jobs.materials import Materials, Target
from jobs.measurement.measurement import Measurement, standard_error
from jobs.models.families import Task
from jobs.progress import Report

if TYPE_CHECKING:
    from jobs.measurement.stopwatch import Timings
    from jobs.measurement.timing import Timed
    from jobs.models.tokenizers import Tokenizer
    from jobs.runtimes import Runner

Reads = Literal["evaluation", "choices", "labelled", "tasks"]


@dataclass(frozen=True)
class Subject:
    """What is measured: an artifact as it is shipped to the target, beside the original it came from.

    fidelity: the share of the evaluation data to read, 1.0 for all.
    workdir: where the artifact is written in the form that the target's runtime reads, if that is not its own.
    cache: where what exports share is kept.
    before: what the same meters found of the same artifact on fewer of the items, in the same environment.
    report: called before each batch, and before each process that is timed; how much is done it is not told.
    """

    folder: Path
    original: Path
    materials: Materials
    fidelity: float = 1.0
    workdir: Path | None = None
    cache: Path | None = None
    before: Measurement | None = None
    report: Report = lambda share, what: None

    @property
    def format(self) -> str:
        """The form that the target's runtime reads."""
        from jobs import runtimes

        return runtimes.load(self.materials.target.runtime).FORMAT

    @cached_property
    def shipped(self) -> Path:
        """The folder that is shipped; written when first asked for."""
        from jobs import formats

        if self.format == formats.NATIVE or (self.folder / formats.EXPORT_MANIFEST).is_file():
            return self.folder  # an artifact that runs as it is, or what has been shipped already
        if self.workdir is None:
            raise ValueError(f"to be measured as {self.format}, an artifact needs a workdir to be written to")
        return formats.export_or_native(
            self.format, self.folder, self.workdir / f"shipped-{self.format}", self.cache
        )

    @cached_property
    def runner(self) -> Runner:
        """What is shipped, loaded by the target's runtime, on this process's threads."""
        from jobs import runtimes

        started = runtimes.load(self.materials.target.runtime).start(self.shipped, torch.get_num_threads())
        return _Reporting(started, self.report)

    @cached_property
    def timed(self) -> Timed:
        """What is shipped, timed in new processes of the target's runtime: once, for all meters that need it."""
        from jobs.measurement import timing
        from jobs.measurement.stopwatch import time_artifact

        request = timing.request_of(self.materials, self.original, self.shipped)

        def once() -> Timings:
            self.report(1.0, "timing")
            return time_artifact(request)

        return timing.time_quietly(once)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        from jobs.models import tokenizers

        return tokenizers.load_tokenizer(self.folder)

    def evaluation(self) -> Int[Tensor, "windows tokens"]:
        """The windows to measure on: the first `fidelity` of them, so that all candidates see the same."""
        from jobs import data

        if self.materials.evaluation is None:
            raise ValueError("there is no text to measure on; give the study data.evaluation")
        windows = data.windows_for(self.materials.evaluation, self.original)
        return windows[: self.items_of(len(windows))]

    def items_of(self, count: int) -> int:
        """How many of so many items are measured on."""
        return max(1, math.ceil(self.fidelity * count))

    def observed(
        self,
        names: Sequence[str],
        count: int,
        observe: Callable[[int], Sequence[Tensor]],
        at_once: int = 1,
    ) -> list[Float[Tensor, " items"]]:
        """What is seen of the first `count` items, by these names, as float64: `observe` tells it of all from a number
        on, and is asked for no more than `before` does not tell.

        at_once: how many items go through the model together. How a batch is divided can change the last bits of what
        each item gives, so what stood in an incomplete one is seen again: the batches are those of a measurement from
        the start, and so is every bit.
        """
        told = {} if self.before is None else {**self.before.items, **self.before.observed}
        if any(name not in told for name in names):
            return [one.double() for one in observe(0)]
        known = [torch.tensor(told[name], dtype=torch.float64) for name in names]
        fewest = min(map(len, known))
        if fewest >= count:
            return [one[:count] for one in known]
        start = fewest - fewest % at_once
        return [
            torch.cat([one[:start], more.double()]) for one, more in zip(known, observe(start), strict=True)
        ]


@dataclass(frozen=True)
class _Reporting:
    """A runner that reports before it answers."""

    runner: Runner
    report: Report

    def answer(self, rows: Int[np.ndarray, "batch tokens"]) -> Float[np.ndarray, "batch ..."]:
        self.report(1.0, "measuring")
        return self.runner.answer(rows)

    def prefill(self, tokens: Int[np.ndarray, "1 tokens"]) -> Float[np.ndarray, "1 outputs width"]:
        self.report(1.0, "measuring")
        return self.runner.prefill(tokens)

    def decode(self, token: Int[np.ndarray, "1 1"]) -> Float[np.ndarray, "1 1 vocabulary"]:
        return self.runner.decode(token)


def no_op(target: Target) -> str | None:
    return None


@dataclass(frozen=True)
class Meter:
    """metrics: what `measure` produces for these tasks; beside: what it tells of the machine as well, where that can
    tell, which is no objective. reads: which of the study's data it needs. exclusive: nothing else may run on the
    machine meanwhile. missing: why this machine cannot measure it for this target, with the cure; None where it can."""

    metrics: tuple[str, ...]
    tasks: tuple[Task, ...]
    measure: Callable[[Subject], Measurement]
    reads: Reads | None = None
    exclusive: bool = False
    diagnostics: tuple[str, ...] = ()
    missing: Callable[[Target], str | None] = no_op


def run_meter(
    items: Mapping[str, Float[Tensor, " items"]],
    observed: Mapping[str, Float[Tensor, " items"]] | None = None,
) -> Measurement:
    """The metrics that are means of these items, with their standard errors; `observed` is what they are made of,
    where they are not what was seen.

    What is no mean gives as items its value plus what each item moves it by, to first order (the infinitesimal
    jackknife; Efron & Tibshirani 1993, ch. 21): the mean and its error are then right as well.
    """
    values = {metric: found.double() for metric, found in items.items()}
    return Measurement(
        {metric: found.mean().item() for metric, found in values.items()},
        {metric: standard_error(found.tolist()) for metric, found in values.items()},
        items={metric: found.tolist() for metric, found in values.items()},
        observed={name: found.tolist() for name, found in (observed or {}).items()},
    )
