"""The interface of meters: a model under measurement, and a meter that measures some of its metrics."""

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
from jobs.progress import Report, no_report

if TYPE_CHECKING:
    from jobs.measurement.stopwatch import Timings
    from jobs.measurement.timing import RepeatedTimings
    from jobs.models.tokenizers import Tokenizer
    from jobs.runtimes import Runner

Reads = Literal["evaluation", "choices", "labelled", "tasks"]


@dataclass(frozen=True)
class ShippedModel:
    """An artifact under measurement, as it is shipped to the target.

    The properties export, load and time the artifact when they are first used, and keep the result for all meters.
    """

    folder: Path
    """The artifact, or an export of it."""
    original: Path
    """The original model that the artifact was made from."""
    materials: Materials
    fidelity: float = 1.0
    """Share of the evaluation data to read."""
    workdir: Path | None = None
    """Folder in which the artifact is written in the format of the target's runtime, if it has another one."""
    cache: Path | None = None
    """Folder for files that exports share."""
    before: Measurement | None = None
    """Result of the same meters on fewer items of the same artifact in the same environment."""
    report: Report = no_report
    """Called before each batch and before each timing process, always with share 1."""

    @property
    def format(self) -> str:
        """The format that the target's runtime reads."""
        from jobs import runtimes

        return runtimes.load(self.materials.target.runtime).FORMAT

    @cached_property
    def shipped(self) -> Path:
        """The shipped folder. It is written at the first use."""
        from jobs import formats

        if self.format == formats.NATIVE or (self.folder / formats.EXPORT_MANIFEST).is_file():
            return self.folder  # the runtime reads artifacts, or this is an export already
        if self.workdir is None:
            raise ValueError(f"measuring an artifact as {self.format} needs a workdir to write it to")
        return formats.export_or_native(
            self.format, self.folder, self.workdir / f"shipped-{self.format}", self.cache
        )

    @cached_property
    def runner(self) -> Runner:
        """The shipped model, loaded by the target's runtime on this process's threads."""
        from jobs import runtimes

        runtime = runtimes.load(self.materials.target.runtime)
        return _ReportingRunner(runtime.start(self.shipped, torch.get_num_threads()), self.report)

    @cached_property
    def timed(self) -> RepeatedTimings:
        """Timings of the shipped model in new processes of the target's runtime, taken once for all meters."""
        from jobs.measurement import timing
        from jobs.measurement.stopwatch import time_artifact

        request = timing.request_of(self.materials, self.original, self.shipped)

        def time_once() -> Timings:
            self.report(1.0, "timing")
            return time_artifact(request)

        return timing.time_quietly(time_once)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        from jobs.models import tokenizers

        return tokenizers.load_tokenizer(self.folder)

    def evaluation(self) -> Int[Tensor, "windows tokens"]:
        """Return the windows to measure on: the first ones, so that all candidates see the same."""
        from jobs import data

        if self.materials.evaluation is None:
            raise ValueError("there is no text to measure on; give the study data.evaluation")
        windows = data.windows_for(self.materials.evaluation, self.original)
        return windows[: self.items_of(len(windows))]

    def items_of(self, count: int) -> int:
        """Return the number of items to measure on, of `count` items."""
        return max(1, math.ceil(self.fidelity * count))

    def observed(
        self,
        names: Sequence[str],
        count: int,
        observe: Callable[[int], Sequence[Tensor]],
        at_once: int = 1,
    ) -> list[Float[Tensor, " items"]]:
        """Return the named values of the first `count` items, as float64.

        `observe(start)` computes the values of all items from `start` on. It is called only for items that `before`
        does not contain. at_once: items per batch. The division into batches can change the last bits of a value, so
        an incomplete batch is observed again: batches, and so all bits, equal those of a measurement from the start.
        """
        earlier: dict[str, Sequence[float]] = {}
        if self.before is not None:
            earlier = {**self.before.items, **self.before.observed}
        if any(name not in earlier for name in names):
            return [values.double() for values in observe(0)]
        measured = [torch.tensor(earlier[name], dtype=torch.float64) for name in names]
        measured_count = min(map(len, measured))
        if measured_count >= count:
            return [values[:count] for values in measured]
        start = measured_count - measured_count % at_once
        return [
            torch.cat([values[:start], added.double()])
            for values, added in zip(measured, observe(start), strict=True)
        ]


@dataclass(frozen=True)
class _ReportingRunner:
    """A runner that reports progress before each answer."""

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


def always_available(target: Target) -> str | None:
    """Return None: the meter needs nothing from the machine."""
    return None


@dataclass(frozen=True)
class Meter:
    """Measures some metrics for some tasks."""

    metrics: tuple[str, ...]
    """The metrics that `measure` returns; each may be an objective."""
    tasks: tuple[Task, ...]
    measure: Callable[[ShippedModel], Measurement]
    reads: Reads | None = None
    """The part of the study's data that it needs."""
    exclusive: bool = False
    """Whether nothing else may run on the machine at the same time."""
    diagnostics: tuple[str, ...] = ()
    """Facts about the machine that `measure` also returns where it can. They are no objectives."""
    missing: Callable[[Target], str | None] = always_available
    """Returns the reason why this machine cannot measure it for a target, with the cure; None if it can."""


def run_meter(
    items: Mapping[str, Float[Tensor, " items"]],
    observed: Mapping[str, Float[Tensor, " items"]] | None = None,
) -> Measurement:
    """Return metrics that are means of items, with their standard errors.

    A metric that is not a mean (perplexity, F1) has as items its value plus the first-order effect of each item (the
    infinitesimal jackknife; Efron & Tibshirani 1993, ch. 21), so that their mean and its error are right too.
    `observed` then holds the values that the items were computed from.
    """
    doubles = {metric: values.double() for metric, values in items.items()}
    return Measurement(
        {metric: values.mean().item() for metric, values in doubles.items()},
        {metric: standard_error(values.tolist()) for metric, values in doubles.items()},
        items={metric: values.tolist() for metric, values in doubles.items()},
        observed={name: values.tolist() for name, values in (observed or {}).items()},
    )
